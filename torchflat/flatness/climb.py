"""The largest rise of a function on a ball, by its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat import ops
from torchflat.flatness.surface import Place, Surface

__all__ = ["Climb", "Peak"]

# Earlier steps from which the next one is extrapolated.
DEPTH = 4
# Halvings of a step that does not rise, before a kink is suspected.
HALVINGS = 6
# A kink is looked at in balls that shrink by this factor, from this share of the radius on.
SHRINK, WIDEST = 0.2, 0.05
# Gains below this share of the value are not sought on kinks, and below the second the climb counts as settled.
KINK_TOLERANCE, KINK_SETTLED = 1e-10, 1e-6
# A mixture of gradients this short, relative to the steepest of them, leads nowhere.
FLAT = 1e-6
# After so many shortened steps in a row, a kink is suspected.
ZIGZAG = 3
LARGEST_BUNDLE = 12
# The linear model promises too little where eigenvalues crowd: without a step that shows it, only so much is trusted.
SURE = 0.03
# What a climb that was cut short may have left, relative to its rise: not known, and more than nothing.
UNSETTLED = 0.1
# After so many gradients, a climb that is below this share of what is known elsewhere is given up.
PATIENCE, HOPE = 10, 0.5
# Offsets at this cosine from a higher peak lead there.
JOINED = 0.99999


@dataclass(frozen=True, eq=False)
class Peak:
    """Where a climb ended.

    ``accuracy`` is what the linear model, or on a kink the bundle, promised of another step, relative to the rise, and
    ``settled`` whether that is little. ``slope`` is how fast the rise grows with the radius: |∇f(y)|, or that of the
    mixture of gradients which is radial where y is on a kink.
    """

    place: Place
    sign: float
    settled: bool
    slope: float
    accuracy: float

    @property
    def rise(self) -> float:
        """sign·(f(y) − f(x))."""
        return self.sign * self.place.change


class Climb:
    """Maximise φ(u) = sign·(f(x + u) − f(x)) on |u| ≤ r.

    A maximiser satisfies u ∥ ∇φ(u) (T094), so that u ← r·∇φ(u)/|∇φ(u)| is iterated, which on a quadratic is power
    iteration, extrapolated from a few earlier steps (Anderson), and halved where it does not rise. Where no step along
    the gradient rises, u may sit on a kink of f, where only a mixture of nearby gradients is radial: then the shortest
    convex combination of the gradients seen nearby, tangential to the ball, is a way up for all of them, or proof that
    there is none (bundle method; Kiwiel 1985, Burke, Lewis and Overton 2005).

    Gains below ``tolerance`` times what is ``known`` to be reached on this ball do not matter, and a climb that joins
    one of the peaks ``reached`` before ends. Every gradient counts against ``limit``.
    """

    def __init__(
        self,
        surface: Surface,
        radius: float,
        sign: float,
        tolerance: float,
        limit: int,
        known: float = 0.0,
        reached: Sequence[Peak] = (),
    ) -> None:
        self.surface, self.radius, self.sign = surface, radius, sign
        self.tolerance, self.known, self.reached = tolerance, known, reached
        self.left, self._limit = limit, limit

    @property
    def taken(self) -> int:
        """Gradients taken so far."""
        return self._limit - self.left

    def from_(self, start: Place) -> Peak:
        """Climb until the gain of a step, and what the linear model promises of the next, are within the tolerance."""
        place, gain, shortened = start, math.inf, 0
        earlier: list[tuple[Tensor, Tensor]] = []
        while self.left > 0:
            slope = place.slope
            if slope == 0 or self._hopeless(place):
                return Peak(place, self.sign, True, slope, self.tolerance)
            target = place.gradient * (self.sign * self.radius / slope)
            promised = self.sign * float(ops.dot([place.gradient], [target - place.offset]))
            enough = self._negligible(place)
            if promised <= enough * (1 if gain <= enough else SURE):
                return Peak(place, self.sign, True, slope, self.tolerance)
            earlier = [*earlier[-DEPTH:], (place.offset, target)]
            higher = self._step(place, target, earlier)
            shortened = 0 if higher is not None else shortened + 1
            if higher is None:
                earlier = []
                higher = self._shorter(place, target, enough)
            if higher is None and promised <= enough:
                return Peak(place, self.sign, True, slope, self.tolerance)
            if higher is None or shortened == ZIGZAG:
                return self._over_kinks(higher or place)
            gain = self.sign * (higher.change - place.change)
            place = higher
        return Peak(place, self.sign, False, place.slope, UNSETTLED)

    def _hopeless(self, place: Place) -> bool:
        """Whether the climb leads to where another one ended, or many steps have led to too little."""
        joined = any(p.rise >= self._rise(place) and p.place.cosine(place) > JOINED for p in self.reached)
        return joined or (self.taken >= PATIENCE and self._rise(place) < HOPE * self.known)

    def _step(self, place: Place, target: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Place | None:
        if len(earlier) > 1:
            trial = self._place(self._on_sphere(_extrapolated(earlier)))
            if trial is not None and self._rise(trial) > self._rise(place):
                return trial
        trial = self._place(target)
        return trial if trial is not None and self._rise(trial) > self._rise(place) else None

    def _shorter(self, place: Place, target: Tensor, enough: float) -> Place | None:
        """Halve the step until it rises by some of what the linear model promises."""
        share = 0.5
        slope = self.sign * place.gradient
        for _ in range(HALVINGS):
            offset = place.offset + share * (target - place.offset)
            if place.distance > (1 - 1e-6) * self.radius and float(ops.dot([slope], [place.offset])) > 0:
                offset = self._on_sphere(offset)
            if share * float(ops.dot([slope], [target - place.offset])) <= 0.1 * enough:
                return None
            rise = self.sign * self.surface.change(offset, self.radius)
            if rise > self._rise(place):
                return self._place(offset)
            share /= 2
        return None

    def _over_kinks(self, place: Place) -> Peak:
        width, bundle, steepest, slope = WIDEST * self.radius, [place], place.slope, place.slope

        def left() -> float:
            """Bound what a kink within the width can hide, as steep as what was seen, relative to what is known."""
            return steepest * width / (max(abs(place.change), self.known) or math.inf)

        while self.left > 0 and left() > KINK_TOLERANCE and not self._hopeless(place):
            # A step of this width, once it is on the sphere, ends a little off it.
            near = [each for each in bundle if _apart(each, place) <= 1.5 * width][-LARGEST_BUNDLE:]
            steepest = max(each.slope for each in near)
            uphill, radial = self._common_direction(place, near)
            size = float(ops.norm([uphill]))
            if len(near) > 1:
                slope = math.hypot(radial, size)
            trial = None
            if size > FLAT * steepest:
                trial = self._place(self._kept_inside(place.offset + uphill * (width / size)))
            if trial is None:
                width *= SHRINK
                continue
            bundle.append(trial)
            # A new gradient that points up as well is no news: it is the curvature that turns the step down.
            news = self.sign * float(ops.dot([trial.gradient], [uphill])) < 0.5 * size**2
            if self._rise(trial) > self._rise(place):
                place = trial
            elif not news or len(near) == LARGEST_BUNDLE:
                width *= SHRINK
        return Peak(place, self.sign, left() <= KINK_SETTLED, slope, max(left(), KINK_TOLERANCE))

    def _common_direction(self, place: Place, near: list[Place]) -> tuple[Tensor, float]:
        """Shortest convex combination of the gradients, each without its part along u where u is on the sphere.

        Returns it, and the part along u of the same combination.
        """
        outward = torch.zeros_like(place.offset)
        if place.distance > (1 - 1e-6) * self.radius:
            outward = place.offset / place.distance
        rows, parts = [], []
        for each in near:
            row = self.sign * each.gradient
            parts.append(max(0.0, float(ops.dot([row], [outward]))))
            rows.append(row - parts[-1] * outward)
        stacked = torch.stack(rows)
        weights = shortest_combination((stacked.double() @ stacked.double().T).cpu())
        combined: Tensor = weights.to(stacked.device, stacked.dtype) @ stacked
        return combined, float(weights @ torch.tensor(parts, dtype=torch.float64))

    def _negligible(self, place: Place) -> float:
        return self.tolerance * max(abs(place.change), self.known)

    def _rise(self, place: Place) -> float:
        return self.sign * place.change

    def _place(self, offset: Tensor) -> Place | None:
        self.left -= 1
        return self.surface.place(offset, self.radius)

    def _on_sphere(self, offset: Tensor) -> Tensor:
        size = float(ops.norm([offset]))
        return offset * (self.radius / size) if size else offset

    def _kept_inside(self, offset: Tensor) -> Tensor:
        return self._on_sphere(offset) if float(ops.norm([offset])) > self.radius else offset


def _apart(a: Place, b: Place) -> float:
    return float(ops.norm([a.offset - b.offset]))


def _extrapolated(earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's step: the mixture of targets whose mixture of steps is shortest."""
    steps = torch.stack([(target - offset).double() for offset, target in earlier])
    differences = steps[1:] - steps[:-1]
    gram = differences @ differences.T
    gram += 1e-14 * gram.diagonal().max() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.lstsq(gram, differences @ steps[-1]).solution
    targets = torch.stack([target.double() for _, target in earlier])
    mixture: Tensor = targets[-1] - weights @ (targets[1:] - targets[:-1])
    return mixture.to(earlier[0][0].dtype)


def shortest_combination(gram: Tensor) -> Tensor:
    """Weights w ≥ 0, Σw = 1, that minimise wᵀGw, (k,), for a Gram matrix G = AAᵀ, (k, k).

    The least squares solution of Aᵀw = 0, Σw = 1 under w ≥ 0 alone is a multiple of it; an active set finds that one.

    >>> shortest_combination(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
    tensor([0.7143, 0.2857], dtype=torch.float64)
    """
    normal = gram.double() / (float(gram.diagonal().max()) or 1.0) + 1.0
    weights = torch.zeros(len(gram), dtype=torch.float64)
    for _ in range(10 * len(gram)):
        fall = torch.where(weights > 0, -math.inf, 1.0 - normal @ weights)
        enters = int(fall.argmax())
        if float(fall[enters]) <= 1e-12:
            break
        active = weights > 0
        active[enters] = True
        while True:
            wanted = torch.zeros_like(weights)
            wanted[active] = torch.linalg.lstsq(normal[active][:, active], torch.ones(int(active.sum()), 1).double())[
                0
            ][:, 0]
            falls = active & (wanted <= 0)
            if not falls.any():
                break
            # As far towards what is wanted as the first weight allows; that one leaves.
            shares = torch.where(falls, weights / (weights - wanted).clamp_min(1e-300), math.inf)
            weights += float(shares.min()) * (wanted - weights)
            active[int(shares.argmin())] = False
            weights[~active] = 0.0
        weights = wanted
    return weights / weights.sum()
