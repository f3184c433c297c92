"""What the theory says to watch in training, as alarms that are raised once each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchflat.errors import UsageError
from torchflat.optim.escape import LEAST_ROWS, escape, norm_bound
from torchflat.optim.history import Cell, Columns
from torchflat.symmetry import Coupling, LinearLaw

__all__ = ["Alarm", "TrackerWarning", "Watch", "warn"]

# η·λ₁ from here on counts as being at the edge of stability, 2.
EDGE = 1.9
# How much longer a history gets before it is searched for an escape again.
LONGER = 1.1


class TrackerWarning(UserWarning):
    """Something that the theory says to watch for was seen in training."""


@dataclass(frozen=True)
class Alarm:
    """What was seen, and before which step. ``kind`` is law, edge, escape or nonfinite, or untracked without laws.

    ``subject`` is what it is about: the name of a law, or a column.
    """

    step: int
    kind: str
    subject: str
    message: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


def warn(alarm: Alarm) -> None:
    """Issue a warning."""
    warnings.warn(str(alarm), TrackerWarning, stacklevel=2)


class Watch:
    """Looks at each row of a history, and remembers what it has said.

    Args:
        infimum: of the loss.
        stall: share of the loss above the infimum that must remain in the end for the loss to stall.
        product_bound: by coupling, or for all, a bound on ‖XYᵀ‖_F; see :meth:`bound`.
    """

    def __init__(self, infimum: float, stall: float, product_bound: float | Mapping[str, float] | None) -> None:
        if not 0 <= stall < 1:
            raise UsageError(f"stall={stall}: it must be a share, from 0 to below 1")
        self.infimum, self.stall, self.product_bound = infimum, stall, product_bound
        self.alarms: list[Alarm] = []
        self._next = LEAST_ROWS

    def look(self, row: Mapping[str, Cell], history: Columns) -> Iterator[Alarm]:
        """Yield the alarms that the last row of a history, ``row``, gives rise to for the first time."""
        said = {(alarm.kind, alarm.subject) for alarm in self.alarms}
        for alarm in (*_nonfinite(row), *_broken(row), *_edge(row), *self._escape(row, history)):
            if (alarm.kind, alarm.subject) not in said:
                self.alarms.append(alarm)
                yield alarm

    def _escape(self, row: Mapping[str, Cell], history: Columns) -> Iterator[Alarm]:
        if history.rows < self._next:
            return
        self._next = int(LONGER * history.rows) + 1
        pairs = zip(history["loss"], history["parameter_norm"], strict=True)
        known = [(float(loss), float(norm)) for loss, norm in pairs if loss is not None and norm is not None]
        found = escape([loss for loss, _ in known], [norm for _, norm in known], self.infimum, self.stall)
        bound = row.get("norm_bound")
        if found is None or (bound is not None and _number(row, "parameter_norm") <= float(bound)):
            return
        yield Alarm(
            _step(row),
            "escape",
            "loss",
            f"the parameters may be escaping to infinity: their norm, {_number(row, 'parameter_norm'):.3g}, grew by "
            f"{100 * found.growth:.0f} % in the last half of the steps, while the loss settles near "
            f"{found.limit:.3g}, above infimum={self.infimum:g}. Start again from smaller or other parameters; if the "
            "loss cannot get lower, give its infimum",
        )

    def bound(
        self, laws: Iterable[Coupling | LinearLaw], row: Mapping[str, Cell], names: Sequence[str]
    ) -> float | None:
        """Bound |x| by what is conserved: √Σ (2r(‖C‖_F² + 2P²))^½ over the full couplings, of rank r each (T082, T083).

        P is ``product_bound``; None without one.

        Raises:
            UsageError: a parameter of ``names`` is in no full coupling of two parameters with such a bound.
        """
        if self.product_bound is None:
            return None
        total, covered = 0.0, set()
        for law in laws:
            if not isinstance(law, Coupling) or law.kind != "full" or len(law.members) != 2:
                continue
            given = self.product_bound
            product = given.get(law.name) if isinstance(given, Mapping) else given
            if product is not None:
                total += norm_bound(_number(row, f"balance/{law.name}"), product, law.size) ** 2
                covered |= {member.parameter for member in law.members}
        free = [name for name in names if name not in covered]
        if free:
            raise UsageError(f"product_bound= does not bound {free[0]}: it is in no full coupling of two parameters")
        return math.sqrt(total)

    def state_dict(self) -> dict[str, Any]:
        """Return what was said, and when the next search for an escape is due."""
        alarms = [[alarm.step, alarm.kind, alarm.subject, alarm.message] for alarm in self.alarms]
        return {"alarms": alarms, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.alarms[:] = [Alarm(*each) for each in state["alarms"]]
        self._next = state["next"]


def _nonfinite(row: Mapping[str, Cell]) -> Iterator[Alarm]:
    for column, words in (("loss", "the loss"), ("gradient_norm", "the gradient"), ("parameter_norm", "a parameter")):
        value = row.get(column)
        if value is not None and not math.isfinite(float(value)):
            yield Alarm(_step(row), "nonfinite", column, f"{words} is not finite")


def _broken(row: Mapping[str, Cell]) -> Iterator[Alarm]:
    for column in row:
        name = column.removeprefix("unexplained/")
        if name != column and _number(row, column) > 1:
            yield Alarm(
                _step(row),
                "law",
                name,
                f"the conservation law {name!r} is broken by something other than the size of the steps: its change "
                f"exceeds what steps and rounding explain {_number(row, column):.3g} times. A penalty in the loss, "
                "gradients that were changed entry by entry, or parameters that were written to, do this",
            )


def _edge(row: Mapping[str, Cell]) -> Iterator[Alarm]:
    if row.get("edge") is not None and _number(row, "edge") >= EDGE:
        yield Alarm(
            _step(row),
            "edge",
            "edge",
            f"training is at the edge of stability: η·λ₁ = {_number(row, 'edge'):.3g}, where 2 is the limit of a "
            "quadratic. Steps of given length are driven there as they swing across a valley; with others, a smaller "
            "learning rate leaves it",
        )


def _step(row: Mapping[str, Cell]) -> int:
    return int(_number(row, "step"))


def _number(row: Mapping[str, Cell], column: str) -> float:
    value = row[column]
    assert value is not None
    return float(value)
