"""The flatness profile of a point: its part of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torchflat.audit.subject import picked
from torchflat.flatness import Order, Variation

__all__ = ["doubling_radius", "profile_part"]

# Beyond its last radius a profile is continued by its last exponent until it has grown this much more.
CONTINUED = 2.0
KEYS = (
    "radii", "values", "slopes", "signs", "floor", "disagreements", "accuracy",
    "level", "gradient_norm", "critical", "unbounded", "status", "cost",
)  # fmt: skip


def profile_part(answer: Variation, sharpness: float | None = None) -> dict[str, Any]:
    """Return the part ``variation`` of a report, with the two radii that tell where curvature and growth show.

    From ``curvature_radius`` = 2|∇f|/λ₁ on, the quadratic term ½λ₁r² exceeds |∇f|·r. At ``doubling_radius`` the profile
    reaches f(x). Either is None where it does not exist or is not known.
    """
    curved = sharpness is not None and sharpness > 0
    return {
        **picked(answer, *KEYS),
        "order": None if answer.order is None else _order_part(answer.order),
        "curvature_radius": 2 * answer.gradient_norm / sharpness if curved and sharpness else None,
        "doubling_radius": doubling_radius(answer.radii, answer.values, answer.slopes, answer.level),
    }


def _order_part(order: Order) -> dict[str, Any]:
    return {
        "p": {"value": order.p, "lower": order.p_lower, "upper": order.p_upper},
        "exact": order.exact,
        "modulus": {"value": order.modulus, "lower": order.modulus_lower, "upper": order.modulus_upper},
        "radius": order.radius,
    }


def doubling_radius(
    radii: Sequence[float], values: Sequence[float], slopes: Sequence[float], level: float
) -> float | None:
    """Read off the profile where it reaches ``level``, by lines between the logarithms; None where it does not.

    >>> round(doubling_radius([1.0, 2.0], [1.0, 4.0], [2.0, 4.0], 2.25), 9), doubling_radius([1.0], [1.0], [2.0], 9.0)
    (1.5, None)
    """
    known = [(r, value, slope) for r, value, slope in zip(radii, values, slopes, strict=True) if value > 0]
    if level <= 0 or not known:
        return None
    for (r, low, _), (s, high, _) in pairwise(known):
        if low < level <= high:
            return float(r * (s / r) ** (math.log(level / low) / math.log(high / low)))
    radius, value, slope = known[-1]
    if value < level <= CONTINUED * value and slope > 0:
        return float(radius * (level / value) ** (value / (radius * slope)))
    return None
