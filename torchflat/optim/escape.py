"""Escape to infinity: norms that keep growing while the loss settles above its infimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LEAST_ROWS", "Escape", "escape", "norm_bound"]

# Rows of history before anything is said.
LEAST_ROWS = 256
# Least growth of the norm from one half of a run to the next that counts, and how much of it may have faded since.
GROWTH, FADING = 0.03, 0.6


@dataclass(frozen=True)
class Escape:
    """``limit`` is where the loss settles, extrapolated; ``growth`` what the norm gained since half as many steps."""

    limit: float
    growth: float


def escape(losses: Sequence[float], norms: Sequence[float], infimum: float, stall: float) -> Escape | None:
    """Say whether a run, given by evenly spaced losses and norms |x|, escapes to infinity.

    Along an escape the norm grows like a power of the number k of steps, or its logarithm, and f − f_∞ falls like a
    power (T074: |x| ~ k^¼ and f − 1 ~ k^(−½)), while a run that converges has norms that do. So values around k/4, k/2
    and k are compared, each averaged over a quarter of what came before. Where f − f_∞ is a power of k, the three give
    f_∞ exactly, by Aitken's formula. It is an escape if

    - log |x| grew by 0.03 at least from k/2 to k, and by no less than 0.6 times as much as from k/4 to k/2, and
    - f_∞ keeps more than the share ``stall`` of what f has above ``infimum``.

    A heuristic: nothing proves that a norm goes on growing. Where the loss can reach 0 only at infinity, as for
    separable classes, f_∞ is 0, and this says nothing.

    >>> k = range(1, 1001)
    >>> escape([1 + j**-0.5 for j in k], [j**0.25 for j in k], 0.0, 0.5) is not None
    True
    >>> escape([1 / j for j in k], [math.log(j + 1) for j in k], 0.0, 0.5) is None
    True
    """
    n = len(losses)
    if n < LEAST_ROWS or not all(map(math.isfinite, losses[-n // 4 :])):
        return None
    early, middle, late = (_mean(losses, n // part) for part in (4, 2, 1))
    sizes = [_mean(norms, n // part) for part in (4, 2, 1)]
    if not min(sizes) > 0 or not math.isfinite(early + middle + late + sum(sizes)):
        return None
    before, now = math.log(sizes[1] / sizes[0]), math.log(sizes[2] / sizes[1])
    if now < GROWTH or now < FADING * before:
        return None
    limit = _limit(early, middle, late)
    stuck = limit is not None and limit - infimum > stall * (late - infimum) > 0
    return Escape(limit, math.expm1(now)) if stuck and limit is not None else None


def _mean(values: Sequence[float], end: int) -> float:
    part = values[3 * end // 4 : end]
    return sum(part) / len(part)


def _limit(early: float, middle: float, late: float) -> float | None:
    """Extrapolate by Aitken's formula; None where the fall is not slowing down."""
    first, second = middle - early, late - middle
    if second >= 0:
        return late
    return late - second**2 / (second - first) if first < second else None


def norm_bound(imbalance: float, product: float, rank: int) -> float:
    """Bound √(|X|² + |Y|²) for X (m, r) and Y (n, r) with ‖XᵀX − YᵀY‖_F = ``imbalance`` and ‖XYᵀ‖_F ≤ ``product``.

    ‖XᵀX‖_F² + ‖YᵀY‖_F² = ‖XᵀX − YᵀY‖_F² + 2‖XYᵀ‖_F², and |X|² + |Y|² ≤ √(2r) times the root of that. As the flow
    conserves the imbalance, norms stay bounded where the loss bounds the product (T082, T083).

    >>> norm_bound(0.0, 4.0, 1) == math.sqrt(8)
    True
    """
    return math.sqrt(math.sqrt(2 * rank * (imbalance**2 + 2 * product**2)))
