"""Two profiles r ↦ f°(x, r) on the same radii, held against each other."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchflat.flatness.ladder import geometric
from torchflat.flatness.order import Order
from torchflat.flatness.variation import Variation

__all__ = ["Decision", "Profiles", "Verdict", "shared"]

# Errors of what is compared are multiplied by this before a difference counts.
MARGIN = 3.0
# A difference that is a power of r has the same local exponent from one radius to the next, to this share.
SAME_POWER = 0.3
# f° is about curvature where it exceeds the gradient's share |∇f|·r this many times (design, section 6).
CURVED = 2.0


class Verdict(enum.Enum):
    """Which point is flatter. The value of a member is the sentence that explains it."""

    FLATTER = "the first point is flatter"
    SHARPER = "the first point is sharper"
    EQUIVALENT = "the two points are equally flat, within the tolerance"
    UNDECIDED = "what was found does not decide"

    @property
    def mirrored(self) -> Verdict:
        """The verdict on the same points in the other order.

        >>> Verdict.FLATTER.mirrored.name
        'SHARPER'
        """
        return {Verdict.FLATTER: Verdict.SHARPER, Verdict.SHARPER: Verdict.FLATTER}.get(self, self)


def _of_difference(difference: float) -> Verdict:
    return Verdict.SHARPER if difference > 0 else Verdict.FLATTER


@dataclass(frozen=True)
class Decision:
    """A verdict, what decided it (order, modulus or profile), the radius down to which it holds, and why, in words."""

    verdict: Verdict
    by: str | None
    radius: float | None
    reason: str


@dataclass(frozen=True)
class Profiles:
    """f° of two points on the same radii. ``sampled`` is how far chance in the data moves their difference."""

    first: Variation
    second: Variation
    sampled: tuple[float, ...]
    tolerance: float

    @property
    def radii(self) -> tuple[float, ...]:
        """The radii that both reached."""
        return min(self.first.radii, self.second.radii, key=len)

    @property
    def differences(self) -> list[float]:
        """f°(x, r) − f°(y, r)."""
        return [a - b for a, b, _ in zip(self.first.values, self.second.values, self.radii, strict=False)]

    @property
    def errors(self) -> list[float]:
        """How far a difference may be off: rounding, what the climbs may have left, and the data's chance."""
        both = (
            [low + share * value for low, share, value in zip(v.floor, v.accuracy, v.values, strict=True)]
            for v in (self.first, self.second)
        )
        return [MARGIN * (a + b) + chance for a, b, chance in zip(*both, self.sampled, strict=False)]

    def at_small_radii(self) -> Decision:
        """Decide by the limit r → 0: the orders, then the moduli, then how the profiles part."""
        a, b = self.first.order, self.second.order
        if a is None or b is None:
            return Decision(Verdict.UNDECIDED, None, None, "too few radii are clear of rounding to tell the order")
        for by in ("order", "modulus"):
            apart = _apart(a, b, by)
            if apart is not None:
                verdict = _of_difference(apart if by == "modulus" else -apart)
                return Decision(verdict, by, self.radii[0], f"the {by} differs")
        if not (a.exact and b.exact):
            return Decision(Verdict.UNDECIDED, None, None, "the orders are not known well enough to tell them apart")
        return self._by_parting((a.p + b.p) / 2)

    def on_curved_range(self) -> Decision:
        """Decide by the profiles where f° of both is above twice |∇f|·r: there the curvature shows."""
        curved = [
            i
            for i, radius in enumerate(self.radii)
            if all(v.values[i] > CURVED * v.gradient_norm * radius for v in (self.first, self.second))
        ]
        if not curved:
            return Decision(
                Verdict.UNDECIDED, None, None, "at no radius that both have do their profiles rise above the gradient"
            )
        seen = [self._at(i) for i in curved]
        strict = {verdict for verdict in seen if verdict in (Verdict.FLATTER, Verdict.SHARPER)}
        lowest = self.radii[curved[0]]
        if len(strict) == 2:
            return Decision(Verdict.UNDECIDED, None, None, "the profiles cross")
        if set(seen) == {Verdict.EQUIVALENT}:
            return Decision(Verdict.EQUIVALENT, "profile", lowest, "the profiles agree within the tolerance")
        if strict and sum(verdict in strict for verdict in seen) > len(seen) / 2:
            return Decision(strict.pop(), "profile", lowest, "one profile lies above the other")
        return Decision(Verdict.UNDECIDED, None, None, "the profiles differ by less than their errors")

    def _at(self, i: int) -> Verdict:
        difference, error = self.differences[i], self.errors[i]
        size = max(self.first.values[i], self.second.values[i])
        if abs(difference) > max(error, self.tolerance * size):
            return _of_difference(difference)
        return Verdict.EQUIVALENT if abs(difference) + error <= self.tolerance * size else Verdict.UNDECIDED

    def _by_parting(self, order: float) -> Decision:
        """Decide where order and modulus tie: by a difference that grows like a higher power of r from the origin on.

        A difference that sets in at some radius says nothing about r → 0: below it the two are equivalent.
        """
        differences, errors = self.differences, self.errors
        clear = [abs(difference) > error for difference, error in zip(differences, errors, strict=True)]
        close = [
            abs(d) + e <= self.tolerance * max(a, b)
            for d, e, a, b in zip(differences, errors, self.first.values, self.second.values, strict=False)
        ]
        start = clear.index(True) if any(clear) else len(clear)
        equal = Decision(Verdict.EQUIVALENT, "profile", self.radii[0], "the profiles agree at small radii")
        below = equal if start >= 3 and all(close[:start]) else None
        unknown = Decision(Verdict.UNDECIDED, None, None, "the profiles differ by less than their errors")
        if start > len(clear) - 3:
            return below or unknown
        signs = {math.copysign(1.0, difference) for difference in differences[start : start + 3]}
        if not all(clear[start : start + 3]) or len(signs) != 1:
            return below or unknown
        r = self.radii
        powers = [_power(r[i], r[i + 1], differences[i], differences[i + 1]) for i in (start, start + 1)]
        if abs(powers[1] - powers[0]) > SAME_POWER * max(powers) or min(powers) <= order:
            return below or unknown
        if start:
            expected = abs(differences[start]) * (r[start - 1] / r[start]) ** powers[0]
            if expected > 2 * errors[start - 1]:
                return below or unknown
        return Decision(
            _of_difference(differences[start]), "profile", r[start], f"the profiles part like r^{powers[0]:.2g}"
        )


def _apart(a: Order, b: Order, by: str) -> float | None:
    """Return the difference of the orders, or of the moduli, if it is clearly not zero."""
    if by == "order":
        if a.p_lower > b.p_upper or a.p_upper < b.p_lower:
            return a.p - b.p
        return None
    if not (a.exact and b.exact):
        return None
    errors = (a.modulus_upper - a.modulus_lower + b.modulus_upper - b.modulus_lower) / 2
    difference = a.modulus - b.modulus
    return difference if abs(difference) > MARGIN * errors else None


def _power(r: float, s: float, at_r: float, at_s: float) -> float:
    return math.log(at_s / at_r) / math.log(s / r)


def shared(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return one ladder for two: from the larger of their first radii to the larger of their last, with as many radii.

    So far out one loss has changed by more than its size, and the curvature of the other shows. Empty if that spans no
    factor of 4.
    """
    low, high = max(first[0], second[0]), max(first[-1], second[-1])
    return geometric(low, high, max(len(first), len(second))) if high >= 4 * low else []
