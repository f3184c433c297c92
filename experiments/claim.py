"""What an experiment expects, said beforehand, and what became of it."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchflat.errors import UsageError

__all__ = ["Claim", "Outcome", "Unreached", "Verdict", "judge", "told"]

Bounds = tuple[float, float]
Measured = "float | Unreached"


class Outcome(enum.Enum):
    """How a claim of a paper came out."""

    REPRODUCED = "reproduced"
    CORRECTED = "corrected"
    NOT_REPRODUCED = "not reproduced"
    NOT_REACHED = "not reached"


@dataclasses.dataclass(frozen=True)
class Unreached:
    """A number that would have taken longer: what was done, and where it would be reached if it went on like that."""

    done: str
    extrapolated: str

    def __str__(self) -> str:
        return f"not reached in {self.done} (extrapolated: {self.extrapolated})"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement about one number that an experiment measures.

    Args:
        number: the name of the number.
        says: the statement, in words.
        source: paper, figure or statement, and the number in the theory sheet.
        printed: bounds of the number if the statement is right as printed.
        corrected: its bounds where the print is wrong; None if there is nothing to correct.
        expected: how it is to come out; by default :attr:`Outcome.CORRECTED` where there is a correction.
    """

    number: str
    says: str
    source: str
    printed: Bounds | None
    corrected: Bounds | None = None
    expected: Outcome | None = None

    def declared(self) -> Outcome:
        """Return how the claim is expected to come out."""
        default = Outcome.REPRODUCED if self.corrected is None else Outcome.CORRECTED
        return default if self.expected is None else self.expected


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim beside the number that was measured."""

    claim: Claim
    measured: float | Unreached

    @property
    def outcome(self) -> Outcome:
        """Judge by the bounds alone; a number that is not finite reproduces nothing."""
        if isinstance(self.measured, Unreached):
            return Outcome.NOT_REACHED
        if _inside(self.measured, self.claim.printed):
            return Outcome.REPRODUCED
        return Outcome.CORRECTED if _inside(self.measured, self.claim.corrected) else Outcome.NOT_REPRODUCED

    @property
    def as_declared(self) -> bool:
        """Whether it came out as was said beforehand."""
        return self.outcome is self.claim.declared()

    def line(self) -> str:
        """Return the verdict in one line.

        >>> Verdict(Claim("end", "the end point is (0.044, 0.260)", "Fig. 1, T035", (0, 1e-6)), 3e-10).line()
        'reproduced: the end point is (0.044, 0.260): end = 3e-10, expected ≤ 1e-06 (Fig. 1, T035)'
        """
        number = self.measured if isinstance(self.measured, Unreached) else f"{self.claim.number} = {self.measured:.4g}"
        surprise = "" if self.as_declared else f"UNEXPECTED, declared {self.claim.declared().value}: "
        return f"{surprise}{self.outcome.value}: {self.claim.says}: {number}, {self._bounds()} ({self.claim.source})"

    def _bounds(self) -> str:
        printed = "" if self.claim.printed is None else f"expected {told(self.claim.printed)}"
        corrected = "" if self.claim.corrected is None else f"corrected {told(self.claim.corrected)}"
        return ", ".join(filter(None, (printed.replace("expected", "printed") if corrected else printed, corrected)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        measured = str(self.measured) if isinstance(self.measured, Unreached) else self.measured
        return {
            **dataclasses.asdict(self.claim),
            "expected": self.claim.declared().value,
            "measured": measured,
            "outcome": self.outcome.value,
            "as_declared": self.as_declared,
            "line": self.line(),
        }


def judge(claims: Sequence[Claim], measured: Mapping[str, float | Unreached]) -> list[Verdict]:
    """Put each claim beside its number.

    Raises:
        UsageError: a number is missing, or none of the claims is about it.
    """
    if {claim.number for claim in claims} != set(measured):
        missing, idle = {claim.number for claim in claims} - set(measured), set(measured)
        idle -= {claim.number for claim in claims}
        raise UsageError(f"claims without a number: {sorted(missing)}; numbers without a claim: {sorted(idle)}")
    return [Verdict(claim, measured[claim.number]) for claim in claims]


def _inside(value: float, bounds: Bounds | None) -> bool:
    return bounds is not None and math.isfinite(value) and bounds[0] <= value <= bounds[1]


def told(bounds: Bounds) -> str:
    """Return bounds in words.

    >>> told((0, 1e-6)), told((2, math.inf)), told((1, 3)), told((16.125 - 1e-8, 16.125 + 1e-8))
    ('≤ 1e-06', '≥ 2', '1 to 3', '16.125 ± 1e-08')
    """
    low, high = bounds
    if low == high:
        return f"{low:g}"
    if math.isinf(high):
        return f"≥ {low:g}"
    if low in (0, -math.inf):
        return f"≤ {high:g}"
    middle, half = (low + high) / 2, (high - low) / 2
    return f"{middle:.10g} ± {half:.1g}" if half < 1e-4 * abs(middle) else f"{low:g} to {high:g}"
