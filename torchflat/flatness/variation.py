"""f°(x, r), the largest change of the loss within a distance r, over a ladder of radii."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.flatness.climb import Climb, Peak
from torchflat.flatness.ladder import ladder, rising_above
from torchflat.flatness.order import Order, leading_order
from torchflat.flatness.quadratic import QuadraticModel
from torchflat.flatness.surface import Surface
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Status

__all__ = ["Search", "Variation", "checked", "variation"]

# Up to so many parameters a search may cost thousands of gradients, and takes many starts.
SMALL = 1000
SMALL_BUDGET, BUDGET = 20_000.0, 100.0
# Gains that are not climbed for, and how far below the peak that may leave a value where eigenvalues crowd.
TIGHT, SINGLE, LOOSE = 1e-12, 1e-6, 1e-3
SURE, SINGLE_SURE, FAIR = 1e-9, 1e-4, 5e-3
SMALL_RADII, RADII = 25, 8
# How many roundings of f, and of x, the smallest radius keeps away from.
SMALL_CLEARANCE, CLEARANCE = (1e4, 1e4), (1e2, 1e2)
# Branches that are followed from radius to radius, and how low one may be, relative to the best, to be climbed from.
SMALL_BRANCHES, BRANCHES = (4, 0.3), (2, 0.8)
# Random starts of a small problem, at the ends and in the middle of its ladder.
RANDOM_STARTS = 24
# Differences of gradients from which the quadratic model is made.
MODEL_STEPS = 12
# Gradients that one climb may take, and has while there are as many.
LONGEST_CLIMB, SHORTEST_CLIMB = 100, 3
# Starts closer than this are the same.
SAME = 0.9999
# Gradients that the rounding floor of one value takes, two evaluations of the loss; and those that it takes to tell
# whether x is critical, with two more by which the last climb may exceed it.
FLOOR_COST, CRITICAL_COST = 2 / 3, 4
# Vectors of the length of x that a search holds at its peak, besides the model's.
VECTORS = 40
# Values and slopes agree if log f° grows between two radii as the slopes say, to this.
AGREEMENT = 0.1


@dataclass(frozen=True)
class Variation(Answer):
    """f°(x, r) = max over |u| ≤ r of |f(x + u) − f(x)|, at each of ``radii``.

    Every value is attained: ``points[i]`` (n,) lies within ``radii[i]`` of x, and f changes there by
    ``signs[i]·values[i]``. So it is a lower bound, and the maximum as far as all starts and the slopes tell: at a
    maximiser y, d f°/dr = |∇f(y)| (T094), and ``disagreements[i]`` is by how much log f° grows otherwise from radius i
    to i + 1. ``floor`` is how far each value moves when y moves by one rounding: a value that is no larger says only
    that f° is no larger. ``accuracy`` is how far the climb may have ended below its peak, relative to the value; other
    peaks are not in it. ``order`` describes r → 0.

    ``critical`` tells whether nothing leads down from x at first order, as far as rounding lets see: ∇f(x) = 0, or x is
    on a kink. ``unbounded`` is a distance at which f was found not to be finite: the radii end before it.
    """

    radii: tuple[float, ...]
    values: tuple[float, ...]
    slopes: tuple[float, ...]
    signs: tuple[float, ...]
    floor: tuple[float, ...]
    disagreements: tuple[float, ...]
    accuracy: tuple[float, ...]
    order: Order | None
    level: float
    gradient_norm: float
    critical: bool
    unbounded: float
    status: Status
    points: tuple[Tensor, ...] = field(repr=False)
    cost: Cost
    provenance: Mapping[str, Any]

    @property
    def modulus(self) -> float | None:
        """The a of f°(x, r) = a·r^p + o(r^p)."""
        return None if self.order is None else self.order.modulus


def variation(
    f: Objective,
    radii: Sequence[float] | Tensor | None = None,
    *,
    seed: int = 0,
    budget: float | None = None,
    callback: Callable[[float, float], object] | None = None,
) -> Variation:
    """Find f°(x, r) = max over |u| ≤ r of |f(x + u) − f(x)| over a ladder of radii.

    Maximisers are followed from radius to radius, from those of a quadratic model and from random starts, for both
    signs of the change, and climb by gradients (:class:`~torchflat.flatness.climb.Climb`). For exact values of small
    problems use float64; a network's float32 is enough down to where rounding shows.

    Args:
        f: the objective, at its point x.
        radii: positive distances; by default from where rounding shows to where the loss has changed by its own size.
        seed: of the random starts.
        budget: in full-data gradients; default 100, or 20 000 up to 1 000 parameters.
        callback: called with each radius and its value; a true return value stops the search.

    Raises:
        UsageError: a radius is not positive and finite.

    Source: T094, T002; design section 6.

    >>> f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, torch.ones(2, dtype=torch.float64))
    >>> answer = variation(f, [0.2])
    >>> round(answer.values[0], 9), round(answer.slopes[0], 9)
    (0.091713708, 0.977705627)
    """
    with Search(f, seed, budget, callback) as search:
        return search.run(search.ladder() if radii is None else checked(radii))


class Search:
    """One search for f°, in two steps: radii that suit f, and the values there.

    Where ``budget`` is None, it is ``usual``, or more for a small problem.
    """

    def __init__(
        self,
        f: Objective,
        seed: int,
        budget: float | None,
        callback: Callable[[float, float], object] | None,
        usual: float = BUDGET,
    ) -> None:
        self.f, self.before, self.callback = f, f.cost, callback
        self.small = f.n <= SMALL
        exact = (TIGHT, SURE) if f.dtype == torch.float64 else (SINGLE, SINGLE_SURE)
        self.tolerance, self.accuracy = exact if self.small else (LOOSE, FAIR)
        self.budget = budget if budget is not None else SMALL_BUDGET if self.small else usual
        self.surface = Surface(f)
        self.random = torch.Generator().manual_seed(seed)
        scale = self.surface.size or 1.0
        self.model = QuadraticModel(self.surface, self.surface.eps ** (1 / 3) * scale, seed)
        self.model.extend(min(MODEL_STEPS, f.n))
        self.branches = SMALL_BRANCHES if self.small else BRANCHES
        self.stopped = False
        self.peaks: list[Peak] = []
        self.waiting, self.reserve = 1, 0.0
        f.memory.keep_vectors(self, VECTORS * self.surface.x.nbytes)

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *error: object) -> None:
        self.model.krylov.release()

    def ladder(self) -> list[float]:
        """Return radii from where rounding shows to where the loss has changed by its own size."""
        count, clearance = (SMALL_RADII, SMALL_CLEARANCE) if self.small else (RADII, CLEARANCE)
        return ladder(self.surface, self.model, count, *clearance)

    def curved(self, share: float, radius: float) -> float | None:
        """Return a radius, the one given or larger, where f° exceeds |∇f|·r ``share`` times; None if none is found."""
        return rising_above(self.surface, self.model, share * self.surface.slope, radius)

    def run(self, radii: list[float]) -> Variation:
        """Find f° at these radii, which ascend."""
        self.reserve = FLOOR_COST * len(radii) + CRITICAL_COST
        self.peaks = self._upwards(radii)
        if self.peaks and not self.small and self._affordable():
            # One start that owes nothing to the model: it rarely finds more, and would show that there is.
            last, radius, self.waiting = self.peaks[-1], radii[len(self.peaks) - 1], 2
            self.peaks[-1] = max([last, *self._climbed([self._random_offset(radius)], radius, last.rise)], key=_rise)
        if not self.stopped:
            self._downwards(radii, self.peaks)
        return self._answer(radii[: len(self.peaks)], self.peaks, complete=len(self.peaks) == len(radii))

    def peak(self, radius: float, near: Sequence[Peak]) -> Peak | None:
        """Climb at one more radius, from peaks at radii near by; None where f is not finite."""
        starts = [each.place.offset * (radius / each.place.distance) for each in near if each.place.distance]
        peaks = self._climbed(starts, radius)
        within = [each for each in near if each.place.distance <= radius]
        return None if self.surface.unbounded <= radius else max([*peaks, *within], key=_rise, default=None)

    def _longest(self) -> int:
        """Gradients for one climb: no more than its radius may have of what is left."""
        share = max(SHORTEST_CLIMB, min(LONGEST_CLIMB, int(self._left() / max(1, self.waiting))))
        return max(1, min(share, int(self._left())))

    def _affordable(self) -> bool:
        return self._left() > 0 and not self.stopped

    def _left(self) -> float:
        """Gradients left, less those that the floors take in the end."""
        return self.budget - (self.f.cost - self.before).gradients - self.reserve

    def _upwards(self, radii: list[float]) -> list[Peak]:
        """Follow branches from the smallest radius to the largest."""
        best: list[Peak] = []
        branches: list[Peak] = []
        anew = {0, len(radii) // 2, len(radii) - 1}
        for i, radius in enumerate(radii):
            self.waiting = len(radii) - i
            starts = [peak.place.offset * (radius / peak.place.distance) for peak in branches if peak.place.distance]
            starts += self._model_starts(radius, starts)
            if self.small and i in anew:
                starts += [self._random_offset(radius) for _ in range(RANDOM_STARTS // len(anew))]
            peaks = self._climbed(starts, radius)
            if best:
                peaks.append(best[-1])
            if self.surface.unbounded <= radius or not peaks:
                return best
            peaks.sort(key=lambda peak: -peak.rise)
            best.append(peaks[0])
            most, share = self.branches
            branches = _distinct([peak for peak in peaks if peak.rise > share * peaks[0].rise])[:most]
            if self.callback is not None and self.callback(radius, peaks[0].rise):
                self.stopped = True
            if not self._affordable():
                return best
        return best

    def _downwards(self, radii: list[float], best: list[Peak]) -> None:
        """Follow the best branch back to smaller radii: what takes over far out may have done so before."""
        for i in range(len(best) - 2, -1, -1):
            above = best[i + 1]
            if above.place.distance and above.place.cosine(best[i].place) < SAME and self._affordable():
                start = above.place.offset * (radii[i] / above.place.distance)
                peaks = self._climbed([start], radii[i], best[i].rise)
                best[i] = max([best[i], *peaks], key=_rise)

    def _model_starts(self, radius: float, starts: list[Tensor]) -> list[Tensor]:
        """Return the maximisers of the model of both signs that are not yet among the starts."""
        new: list[Tensor] = []
        for sign in (1.0, -1.0):
            for offset in self.model.maximisers(radius, sign)[: 2 if self.small else 1]:
                size = torch.linalg.vector_norm(offset)
                if size > 0 and all(_cosine(offset, other) < SAME for other in [*starts, *new]):
                    new.append(offset * (radius / size))
        return new

    def _random_offset(self, radius: float) -> Tensor:
        draw = torch.randn(self.f.n, generator=self.random, dtype=torch.float64).to(self.f.device, self.f.dtype)
        draw *= radius / float(ops.norm([draw]))
        return draw

    def _climbed(self, starts: list[Tensor], radius: float, known: float = 0.0) -> list[Peak]:
        """Climb from each start that promises something, in the direction of the change that it has."""
        tried = [self.surface.place(start, radius) for i, start in enumerate(starts) if i == 0 or self._affordable()]
        places = sorted((place for place in tried if place is not None), key=lambda place: -abs(place.change))
        peaks: list[Peak] = []
        for place in places:
            if peaks and not (self._affordable() and (self.small or abs(place.change) > self.branches[1] * known)):
                break
            sign = math.copysign(1.0, place.change)
            climb = Climb(self.surface, radius, sign, self.tolerance, self._longest(), known, peaks)
            peaks.append(climb.from_(place))
            known = max(known, peaks[-1].rise)
        return peaks

    def _answer(self, radii: list[float], best: list[Peak], complete: bool) -> Variation:
        values = [peak.rise for peak in best]
        slopes = [peak.slope if peak.place.distance > 0.999 * r else 0.0 for peak, r in zip(best, radii, strict=True)]
        floor = [self.surface.noise(peak.place.point) for peak in best]
        disagreements = _disagreements(radii, values, slopes, floor)
        accuracy = tuple(max(self.accuracy, peak.accuracy) for peak in best)
        unsure = [low + share * value for low, share, value in zip(floor, accuracy, values, strict=True)]
        return Variation(
            radii=tuple(radii),
            values=tuple(values),
            slopes=tuple(slopes),
            signs=tuple(peak.sign for peak in best),
            floor=tuple(floor),
            disagreements=disagreements,
            accuracy=accuracy,
            order=leading_order(radii, values, unsure),
            level=self.surface.level,
            gradient_norm=self.surface.slope,
            critical=self.surface.critical(),
            unbounded=self.surface.unbounded,
            status=self._status(best, disagreements, complete, any(map(operator.le, values, floor))),
            points=tuple(peak.place.point for peak in best),
            cost=self.f.cost - self.before,
            provenance=self.f.provenance(),
        )

    def _status(self, best: list[Peak], disagreements: Sequence[float], complete: bool, drowned: bool) -> Status:
        if not complete:
            return Status.TRUNCATED if self._affordable() else Status.BUDGET
        if drowned:
            return Status.ROUNDING_LIMITED
        if max(disagreements, default=0.0) > AGREEMENT:
            return Status.INCONSISTENT
        if not all(peak.settled for peak in best):
            return Status.INCONSISTENT if self._left() > SHORTEST_CLIMB else Status.BUDGET
        return Status.CONVERGED


def checked(radii: Sequence[float] | Tensor) -> list[float]:
    """Return the radii in ascending order, each once.

    Raises:
        UsageError: one is not positive and finite, or there is none.
    """
    chosen = sorted({float(radius) for radius in radii})
    if not chosen or not all(0 < radius < math.inf for radius in chosen):
        raise UsageError(f"radii={list(map(float, radii))}: give positive distances, one at least")
    return chosen


def _disagreements(
    radii: Sequence[float], values: Sequence[float], slopes: Sequence[float], floor: Sequence[float]
) -> tuple[float, ...]:
    """How far log f° grows, from each radius to the next, outside what the local exponents p = r·slope/f° allow.

    Growth is ∫ p d log r, so that it lies between the smaller and the larger p, where p does not turn in between.
    """
    found = []
    for i in range(len(radii) - 1):
        if values[i] <= floor[i]:
            found.append(0.0)
            continue
        exponents = [radii[j] * slopes[j] / values[j] for j in (i, i + 1)]
        grown, step = math.log(values[i + 1] / values[i]), math.log(radii[i + 1] / radii[i])
        noise = floor[i] / values[i] + floor[i + 1] / values[i + 1]
        found.append(max(0.0, grown - max(exponents) * step - noise, min(exponents) * step - grown - noise))
    return tuple(found)


def _rise(peak: Peak) -> float:
    return peak.rise


def _distinct(peaks: list[Peak]) -> list[Peak]:
    kept: list[Peak] = []
    for peak in peaks:
        if all(peak.place.cosine(other.place) < SAME for other in kept):
            kept.append(peak)
    return kept


def _cosine(a: Tensor, b: Tensor) -> float:
    sizes = float(ops.norm([a])) * float(ops.norm([b]))
    return float(ops.dot([a], [b])) / sizes if sizes else 0.0
