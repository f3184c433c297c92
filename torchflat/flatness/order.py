"""The order p and the modulus a of f°(x, r) = a·r^p + o(r^p), from values on a ladder of radii."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torchflat.result import Answer

__all__ = ["Order", "leading_order"]

# Values this many floors high are used, and this many radii beyond the smallest of them say how sure the order is.
CLEAR, NEIGHBOURS = 100.0, 3
# An exponent is taken for a fraction with a denominator up to the second if it is known to the first.
SNAP, DENOMINATOR = 0.05, 4
# No exponent from differences of logarithms is known better than this.
BEST = 1e-3
# What a·r^p leaves out grows like another power of r, between these.
SLOWEST, FASTEST = 0.4, 8.0


@dataclass(frozen=True)
class Order(Answer):
    """f°(x, r) = a·r^p + o(r^p), as far as the smallest radii tell; each number within its bounds.

    ``exact`` tells whether p was taken for the only simple fraction between its bounds; then they are p itself.
    """

    p: float
    p_lower: float
    p_upper: float
    exact: bool
    modulus: float
    modulus_lower: float
    modulus_upper: float
    radius: float


def leading_order(radii: Sequence[float], values: Sequence[float], floor: Sequence[float]) -> Order | None:
    """Read p and a off the values at ascending radii; None where fewer than four are clear of rounding.

    The local exponents are p(r) = d log f°/d log r, which tend to p; a(r) = f°/r^p tends to a.
    """
    clear = [i for i, (value, noise) in enumerate(zip(values, floor, strict=True)) if value > CLEAR * noise]
    if len(clear) <= NEIGHBOURS:
        return None
    clear = list(range(clear[0], len(radii)))
    radii, values, floor = ([column[i] for i in clear] for column in (radii, values, floor))
    exponents = [math.log(values[i + 1] / values[i]) / math.log(radii[i + 1] / radii[i]) for i in range(NEIGHBOURS)]
    noise = 2 * floor[0] / values[0] / math.log(radii[1] / radii[0])
    p = sorted(exponents)[NEIGHBOURS // 2]
    unsure = max(exponents) - min(exponents) + noise + BEST
    simple = _simple(p, unsure)
    exact = simple is not None
    if simple is not None:
        p, unsure = simple, 0.0
    moduli = [value / radius**p for value, radius in zip(values, radii, strict=True)]
    noises = [modulus * low / value for modulus, low, value in zip(moduli, floor, values, strict=True)]
    modulus, error, radius = _limit(radii, moduli, noises)
    # What p leaves open, a has too.
    error += modulus * abs(radius**-unsure - 1)
    return Order(p, p - unsure, p + unsure, exact, modulus, max(0.0, modulus - error), modulus + error, radius)


def _limit(radii: Sequence[float], moduli: Sequence[float], noises: Sequence[float]) -> tuple[float, float, float]:
    """Extrapolate a(r) = a + c·r^q to r = 0; return a, its error, and the radius that it was read off at.

    Three neighbours on a geometric ladder give c·r^q (Aitken's Δ²) where their differences grow like a power. Rounding
    shows most at small radii, and the power most at large ones: what errs least by both is taken.
    """
    found = []
    ratio = radii[1] / radii[0]
    previous: float | None = None
    for i in range(len(moduli) - 2):
        first, second = moduli[i + 1] - moduli[i], moduli[i + 2] - moduli[i + 1]
        noise = max(noises[i : i + 3])
        growth = second / first if first else 0.0
        if ratio**SLOWEST <= growth <= ratio**FASTEST and abs(first) > 4 * noise:
            limit = moduli[i] - first / (growth - 1)
            drift = abs(limit - previous) if previous is not None else abs(limit - moduli[i])
            # The next power is at least r: so much is left of what the last step changed; twice, to be safe.
            drift *= 2 + 2 / (ratio - 1)
            found.append((drift + noise * (1 + 2 * growth / (growth - 1) ** 2), limit, radii[i]))
            previous = limit
        else:
            previous = None
            found.append((abs(first) / (ratio**SLOWEST - 1) + 2 * noise, moduli[i], radii[i]))
    error, limit, radius = min(found)
    return limit, error, radius


def _simple(p: float, unsure: float) -> float | None:
    """Return the only fraction with a small denominator within reach of p, if there is just one."""
    if unsure > SNAP:
        return None
    near = {
        Fraction(round(p * denominator), denominator)
        for denominator in range(1, DENOMINATOR + 1)
        if abs(round(p * denominator) / denominator - p) <= unsure
    }
    return float(near.pop()) if len(near) == 1 else None
