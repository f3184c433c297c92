"""One computation's request and budget, and when it is over."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Cost, Status

__all__ = ["FLOORS", "Callback", "NotConvergedWarning", "Run", "check_request"]

Callback = Callable[[Any], object]

# Half the width of an interval is one floor at least; this many of them count as narrow, however small the value.
FLOORS = 16


class NotConvergedWarning(UserWarning):
    """An answer is less than was asked for; its status says why."""


class Bounded(Protocol):
    """A number between two bounds, with the rounding allowance that they contain."""

    @property
    def value(self) -> float: ...
    @property
    def lower(self) -> float: ...
    @property
    def upper(self) -> float: ...
    @property
    def floor(self) -> float: ...


def check_request(rtol: float, confidence: float, budget: float, atol: float | None = None) -> None:
    """Refuse requests that cannot be met by any answer."""
    if not 0 <= rtol < math.inf:
        raise UsageError(f"rtol={rtol}: it must be a number >= 0")
    if atol is not None and not 0 <= atol < math.inf:
        raise UsageError(f"atol={atol}: it must be a number >= 0, or None for what rounding allows")
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

    def tolerance(self, size: float, floor: float) -> float:
        """Return how wide an interval may be: rtol·size + atol, where atol is 16 floors unless given."""
        return self.rtol * size + (FLOORS * floor if self.atol is None else self.atol)

    def narrow_enough(self, answer: Bounded) -> bool:
        """Whether upper − lower ≤ rtol·|value| + atol."""
        return answer.upper - answer.lower <= self.tolerance(abs(answer.value), answer.floor)

    def over(self, progress: object) -> bool:
        """Whether to stop after this step: the callback asks for it on any rank, or no other step is affordable."""
        callback = self.callback
        stop = callback is not None and self.f.team.anywhere(lambda: callback(progress))
        return not self.affordable() or stop

    def status(self, answer: Bounded, size: float, *, exhausted: bool = False, over: bool = False) -> Status | None:
        """Say how the run ends here, or None if it goes on. ``size`` is the scale of the spectrum, max |θ|."""
        if self.narrow_enough(answer):
            return self.settled(size, answer.floor)
        if exhausted:
            return Status.ROUNDING_LIMITED
        return Status.BUDGET if over else None

    def settled(self, size: float, floor: float) -> Status:
        """Return the status of a narrow interval, which tells whether it met rtol or only the floor."""
        limited = self.atol is None and self.rtol * size < floor
        return Status.ROUNDING_LIMITED if limited else Status.CONVERGED

    def affordable(self) -> bool:
        """Whether another step like the last one fits into the budget."""
        spent = self.cost.gradients
        step, self._last = spent - self._last, spent
        return spent + step <= self.budget

    def warn(self, status: Status, what: str) -> None:
        """Say once that an answer is less than was asked for."""
        if not status.ok:
            warnings.warn(f"{what}: {status.name}: {status.value}", NotConvergedWarning, stacklevel=3)
