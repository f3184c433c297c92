"""One computation's request and budget, and when it is over."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Cost, Status

__all__ = ["Callback", "NotConvergedWarning", "Run", "check_request"]

Callback = Callable[[Any], object]

# Half the width of an interval is one floor at least; this many of them count as narrow, however small the value.
FLOORS = 16


class NotConvergedWarning(UserWarning):
    """An answer is less than was asked for; its status says why."""


def check_request(rtol: float, confidence: float, budget: float) -> None:
    """Refuse requests that cannot be met by any answer."""
    if not 0 <= rtol < math.inf:
        raise UsageError(f"rtol={rtol}: it must be a number >= 0")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence}: it must lie between 0 and 1, both excluded")
    if not budget > 0:
        raise UsageError(f"budget={budget}: it must be a positive number of full-data gradients")


class Run:
    """Tolerance, confidence and budget of one computation on ``f``, and what it has spent so far."""

    def __init__(
        self,
        f: Objective,
        rtol: float,
        atol: float | None,
        confidence: float,
        budget: float,
        callback: Callback | None,
    ) -> None:
        self.f, self.rtol, self.atol = f, rtol, atol
        self.confidence, self.budget, self.callback = confidence, budget, callback
        self._before = f.cost
        self._last = 0.0

    @property
    def delta(self) -> float:
        """Probability of a miss that is allowed."""
        return 1 - self.confidence

    @property
    def cost(self) -> Cost:
        """Spent since the run began."""
        return self.f.cost - self._before

    def narrow_enough(self, answer: Any, size: float | None = None) -> bool:
        """upper − lower ≤ rtol·size + atol, with size = |value| unless given."""
        atol = FLOORS * answer.floor if self.atol is None else self.atol
        reference = abs(answer.value) if size is None else size
        return bool(answer.upper - answer.lower <= self.rtol * reference + atol)

    def status(self, answer: Any, size: float, *, exhausted: bool = False, full: bool = False) -> Status | None:
        """How the run ends here, or None if it goes on. ``size`` is the scale of the spectrum, max |θ|."""
        stop = self.callback is not None and self.callback(answer)
        if self.narrow_enough(answer):
            return Status.ROUNDING_LIMITED if self.rtol * size < answer.floor else Status.CONVERGED
        if exhausted:
            return Status.ROUNDING_LIMITED
        return Status.BUDGET if stop or full or not self.affordable() else None

    def affordable(self) -> bool:
        """Whether another step like the last one fits into the budget."""
        spent = self.cost.gradients
        step, self._last = spent - self._last, spent
        return spent + step <= self.budget

    def warn(self, status: Status, what: str) -> None:
        """Say once that an answer is less than was asked for."""
        if not status.ok:
            warnings.warn(f"{what}: {status.name}: {status.value}", NotConvergedWarning, stacklevel=3)
