"""f(x + u) − f(x) and its gradient, around one point x."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import NonFiniteError
from torchflat.objective import Objective

__all__ = ["Place", "Surface"]

# So many roundings stand clear of rounding.
CLEAR = 100.0


@dataclass(frozen=True, eq=False)
class Place:
    """A point y = x + u, the change f(y) − f(x), and ∇f(y)."""

    point: Tensor
    offset: Tensor
    change: float
    gradient: Tensor

    @property
    def distance(self) -> float:
        """|u|, in float64, of the point that the working precision could represent."""
        return float(ops.norm([self.offset]))

    @property
    def slope(self) -> float:
        """|∇f(y)|."""
        return float(ops.norm([self.gradient]))

    def cosine(self, other: Place) -> float:
        """Cosine of the angle between the two offsets."""
        sizes = self.distance * other.distance
        return float(ops.dot([self.offset], [other.offset])) / sizes if sizes else 0.0


class Surface:
    """The objective seen from its point x: what it changes by at x + u, for offsets u of shape (n,).

    ``unbounded`` is the smallest distance at which f was found not to be finite, infinity if it always was.
    """

    def __init__(self, f: Objective) -> None:
        self.f = f
        self.x = f.x
        self.level = f.value()
        self.gradient = f.gradient()
        self.slope = float(ops.norm([self.gradient]))
        self.size = float(ops.norm([self.x]))
        self.eps = torch.finfo(f.dtype).eps
        self.unbounded = math.inf

    def place(self, offset: Tensor, radius: float) -> Place | None:
        """Evaluate at x + u, with u in the ball of ``radius`` also once it was rounded; None where f is not finite."""
        point, offset = self._rounded(offset, radius)
        there = self.f.at(point)
        try:
            gradient = there.gradient()
        except NonFiniteError:
            self._note_unbounded(offset)
            return None
        return Place(point, offset, there.value() - self.level, gradient)

    def change(self, offset: Tensor, radius: float) -> float:
        """Return f(x + u) − f(x), without a gradient; NaN where f is not finite."""
        point, offset = self._rounded(offset, radius)
        try:
            return self.f.at(point).value() - self.level
        except NonFiniteError:
            self._note_unbounded(offset)
            return math.nan

    def noise(self, point: Tensor) -> float:
        """How far f(y) moves when every coordinate of y moves by about one rounding, and that of f(y) itself."""
        value, moved = (self.f.at(each).value() for each in (point, self._moved(point)))
        return max(2 * abs(moved - value), self.eps * abs(value))

    def critical(self) -> bool:
        """Whether nothing leads down from x at first order: ∇f(x) is rounding, or −∇f(x) leads up from a kink."""
        if self.slope == 0:
            return True
        near = self.f.at(self._moved(self.x)).gradient()
        if self.slope <= CLEAR * float(ops.norm([near - self.gradient])):
            return True
        radius = max(CLEAR * self.noise(self.x) / self.slope, CLEAR * self.eps * (self.size or 1.0))
        fall = -self.change(self.gradient * (-radius / self.slope), radius)
        return fall < 0.1 * self.slope * radius

    def _note_unbounded(self, offset: Tensor) -> None:
        self.unbounded = min(self.unbounded, float(ops.norm([offset])))

    def _moved(self, point: Tensor) -> Tensor:
        """Move every coordinate by one rounding, up or down."""
        source = torch.Generator().manual_seed(0)
        signs = torch.randint(2, point.shape, generator=source).to(point.device, point.dtype) * 2 - 1
        return point + self.eps * signs * point

    def _rounded(self, offset: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        for _ in range(4):
            point = self.x + offset
            real = point - self.x
            excess = float(ops.norm([real])) / radius
            if excess <= 1:
                break
            offset = offset * ((1 - self.eps) / excess)
        return point, real
