"""The distance from a point to where the loss has changed by a given amount: the inverse of the variation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchflat.errors import UsageError
from torchflat.flatness.climb import Peak
from torchflat.flatness.variation import Search
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Status

__all__ = ["LevelDistance", "level_distance"]

# How much further out than the ladder, and further in, a level is looked for: so many factors.
FURTHER, FACTOR = 16, 4.0
LOOKS = 60
TIGHT, LOOSE = 1e-10, 1e-3


@dataclass(frozen=True)
class LevelDistance(Answer):
    """f̄(x, ℓ) = dist(x, {y : |f(y) − f(x)| ≥ ℓ}) for each of ``levels``.

    ``points[i]`` (n,) is a point at ``distances[i]`` where f has changed by that much, so that the true distance is no
    larger. Where none was found, the distance is infinite, and the point x.
    """

    levels: tuple[float, ...]
    distances: tuple[float, ...]
    status: Status
    points: tuple[Tensor, ...] = field(repr=False)
    cost: Cost


def level_distance(
    f: Objective, levels: float | Sequence[float], *, seed: int = 0, budget: float | None = None
) -> LevelDistance:
    """Find how near the loss changes by each level: f̄(x, f°(x, r)) = r and f°(x, f̄(x, ℓ)) = ℓ (T002).

    Args:
        f: the objective, at its point x.
        levels: positive changes of the loss.
        seed: of the random starts.
        budget: in full-data gradients; see :func:`~torchflat.flatness.variation`.

    Raises:
        UsageError: a level is not positive and finite.

    Example: f = x₁², whose distance is √ℓ.

        >>> import torch
        >>> f = Objective.from_function(lambda x: x[0] ** 2, torch.zeros(2, dtype=torch.float64))
        >>> round(level_distance(f, 0.09).distances[0], 9)
        0.3
    """
    wanted = [levels] if isinstance(levels, int | float) else [float(level) for level in levels]
    if not wanted or not all(0 < level < math.inf for level in wanted):
        raise UsageError(f"levels={wanted}: give positive changes of the loss, one at least")
    with Search(f, seed, budget, None) as search:
        radii = search.ladder()
        found = search.run(radii)
        curve = list(zip(radii, search.peaks, strict=False))
        answers = [_inverted(search, curve, level) for level in wanted]
    return LevelDistance(
        levels=tuple(wanted),
        distances=tuple(math.inf if answer is None else answer[0] for answer in answers),
        status=found.status,
        points=tuple(f.x if answer is None else answer[1].place.point for answer in answers),
        cost=found.cost if not answers else f.cost - search.before,
    )


def _inverted(search: Search, curve: list[tuple[float, Peak]], level: float) -> tuple[float, Peak] | None:
    """Find the smallest radius whose peak reaches the level, by the secant in the logarithms of both."""
    low, high = _bracket(search, curve, level)
    if low is None or high is None:
        return high
    close = TIGHT if search.small else LOOSE
    for _ in range(LOOKS):
        if high[0] / low[0] - 1 <= close or high[1].rise / level - 1 <= close:
            break
        (r, a), (s, b) = low, high
        share = math.log(level / a.rise) / math.log(b.rise / a.rise)
        # Aimed a little beyond, and never too near an end: one side alone would creep.
        share = min(0.9, max(0.1, share + 0.1 * close))
        radius = r * (s / r) ** share
        peak = search.peak(radius, [a, b])
        if peak is None:
            break
        if peak.rise >= level:
            high = radius, peak
        else:
            low = radius, peak
    return high


def _bracket(
    search: Search, curve: list[tuple[float, Peak]], level: float
) -> tuple[tuple[float, Peak] | None, tuple[float, Peak] | None]:
    """Return the last radius whose peak is below the level and the first whose is not; further out or in if need be."""
    curve = list(curve)
    for _ in range(FURTHER):
        if curve and curve[0][1].rise >= level:
            radius, peak = curve[0][0] / FACTOR, search.peak(curve[0][0] / FACTOR, [curve[0][1]])
            if peak is not None and peak.rise > 0:
                curve.insert(0, (radius, peak))
                continue
        elif curve and curve[-1][1].rise < level:
            radius, peak = curve[-1][0] * FACTOR, search.peak(curve[-1][0] * FACTOR, [curve[-1][1]])
            if peak is not None:
                curve.append((radius, peak))
                continue
        break
    below = [entry for entry in curve if 0 < entry[1].rise < level]
    above = [entry for entry in curve if entry[1].rise >= level]
    return (below[-1] if below else None), (above[0] if above else None)
