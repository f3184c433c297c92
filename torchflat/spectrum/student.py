"""Student's t: how far the mean of a few samples may be from the truth."""

from __future__ import annotations

import functools
import math

__all__ = ["t_quantile"]


@functools.lru_cache(maxsize=4096)
def t_quantile(confidence: float, freedom: int) -> float:
    """Return t with P(|T| ≤ t) = ``confidence`` for Student's T with ``freedom`` ≥ 1 degrees of freedom.

    >>> round(t_quantile(0.95, 1), 3), round(t_quantile(0.99, 10), 3), round(t_quantile(0.99, 1000), 3)
    (12.706, 3.169, 2.581)
    """
    low, high = 0.0, 0.5 * math.pi
    # With t = √freedom · tan(angle) the probability is a finite trigonometric sum.
    for _ in range(80):
        angle = 0.5 * (low + high)
        low, high = (angle, high) if _probability(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(0.5 * (low + high))


def _probability(angle: float, freedom: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = sine * cosine if odd else sine
    total = term if freedom > 1 else 0.0
    for k in range(1 + odd, freedom - 2, 2):
        term *= cosine * cosine * k / (k + 1)
        total += term
    return 2 / math.pi * (angle + total) if odd else total
