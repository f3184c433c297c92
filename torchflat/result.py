"""What every answer carries: an interval, a status, and what it cost."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["Answer", "Cost", "Interval", "Status"]


class Status(enum.Enum):
    """How an answer ended. The value of a member is the sentence that explains it.

    >>> Status.CONVERGED.ok, Status.BUDGET.ok
    (True, False)
    """

    CONVERGED = "the answer is as accurate as was asked for, at the confidence asked for"
    BUDGET = "the budget was spent before the answer was as accurate as asked for: raise the budget or rtol"
    ROUNDING_LIMITED = (
        "the interval is as narrow as rounding lets it be, and wider than was asked for: "
        "raise rtol or use dtype=torch.float64"
    )
    NOT_CERTIFIED = "the iteration settled, but nothing it saw proves that this is the largest: use method='lanczos'"
    TRACKED = "followed from a given start until it settled; without a random part nothing bounds it from above"
    INCONSISTENT = (
        "values and slopes do not agree at some radii: the values are attained, and the maximum may be larger there"
    )
    TRUNCATED = "the loss is not finite at larger distances: the radii end before"
    UNCERTIFIED = "the value is attained, but as the Hessian has a negative part, nothing bounds the least from below"
    INTERRUPTED = "interrupted: the interval holds for what was seen until then"

    @property
    def ok(self) -> bool:
        """Whether the answer meets what was asked for."""
        return self in (Status.CONVERGED, Status.TRACKED)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Base of all answers: frozen, and able to turn into plain JSON-ready values."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values; non-finite floats become ``None``, tensors become lists."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self) if field.repr}


@dataclasses.dataclass(frozen=True)
class Interval(Answer):
    """``lower <= value <= upper`` holds with probability at least ``confidence``.

    A bound that is not known is infinite, and ``None`` in :meth:`to_dict`.
    """

    value: float
    lower: float
    upper: float
    confidence: float

    @property
    def width(self) -> float:
        """``upper - lower``."""
        return self.upper - self.lower


@dataclasses.dataclass(frozen=True)
class Cost(Answer):
    """What was spent, in passes over all the data (a pass over half the rows counts one half).

    ``forwards`` evaluations of the loss, ``backwards`` first derivatives, ``products`` Hessian-vector products taken
    through an existing gradient graph. In matrix products of a dense layer these are 1, 2 and 6, and a gradient is one
    forward and one backward, so

        gradients = (forwards + 2 * backwards + 6 * products) / 3:

    a product on a retained graph counts 2 gradients, one whose graph must be rebuilt counts 3.

    >>> Cost(forwards=1, backwards=1).gradients, Cost(products=1).gradients
    (1.0, 2.0)
    """

    forwards: float = 0.0
    backwards: float = 0.0
    products: float = 0.0
    seconds: float = 0.0

    @property
    def gradients(self) -> float:
        """The same in multiples of one full-data gradient."""
        return (self.forwards + 2 * self.backwards + 6 * self.products) / 3

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, the seconds, and the sum in gradients."""
        return {"gradients": self.gradients, **super().to_dict()}


def _plain(value: Any) -> Any:
    if isinstance(value, Answer):
        return value.to_dict()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
