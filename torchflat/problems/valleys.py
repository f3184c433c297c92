"""Valleys whose points λ₁ alone does not tell apart, or where it does not exist."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.problems.kinks import absolute, positive_part
from torchflat.problems.maximum import interval_maximum
from torchflat.problems.problem import Function
from torchflat.problems.residual import Residual

__all__ = ["EquivalentPoints", "QuarticTie", "ReluProduct", "SixthOrderTie", "SquareOrAbsolute"]


@dataclass(frozen=True)
class SquareOrAbsolute(Function):
    """f(x) = min{x₁², |x₂|} where it vanishes: at 0 the Lipschitz modulus is 1, yet f° = (√(1 + 4r²) − 1)/2 ~ r².

    A maximiser sits on the kink x₁² = |x₂|, where only a mixture of the two gradients is radial. On x₁ = 0 f° = r² up
    to r² = |x₂|, on x₂ = 0 f° = r up to r = x₁²: the points of a branch are equivalent, hence flat, and 0 is the
    flattest of all.

    >>> round(SquareOrAbsolute((0.0, 0.0)).variation(0.3), 11)
    0.08309518948
    """

    source: ClassVar[str] = "T001, T005"

    def function(self, x: Tensor) -> Tensor:
        """Return min{x₁², |x₂|}, with the derivative of the square where they tie: f is differentiable at 0."""
        square, size = x[0] ** 2, absolute(x[1])
        return torch.where(square <= size, square, size)

    def eigenvalues(self) -> Tensor | None:
        """Return 0, 2 on x₁ = 0, off 0."""
        if self.point[0] != 0 or self.point[1] == 0:
            return None
        return torch.tensor([0.0, 2.0], dtype=torch.float64)

    def variation(self, radius: float) -> float | None:
        """Return f° as above."""
        if not any(self.point):
            # The same, without the cancellation for small r.
            return 2 * radius**2 / (math.sqrt(1 + 4 * radius**2) + 1)
        if self.point[0] == 0 and radius**2 <= abs(self.point[1]):
            return radius**2
        return radius if self.point[1] == 0 and radius <= self.point[0] ** 2 else None

    def order(self) -> tuple[float, float] | None:
        """Return (2, 1) on x₁ = 0, and (1, 1) on the rest of x₂ = 0."""
        if self.point[0] == 0:
            return 2, 1.0
        return (1, 1.0) if self.point[1] == 0 else None

    def flat(self) -> bool | None:
        """Say yes, on both branches."""
        return True if 0 in self.point else None

    def flattest(self) -> SquareOrAbsolute:
        """Take 0."""
        return self.at((0.0, 0.0))


@dataclass(frozen=True)
class QuarticTie(Function):
    """f(x) = x₂² + x₁²x₂⁴ on x₂ = 0: λ₁ = 2 everywhere, f° = r² + x₁²r⁴ + x₁²r⁸ + o(r⁸), and 0 is the flat minimum.

    Normalised descent lowers x₁², which the gradient flow does not keep. At 0 f° = r² for r ≤ 1.

    >>> round(QuarticTie((2.0, 0.0)).variation(0.1), 12)
    0.01040003704
    """

    source: ClassVar[str] = "T029, T039"

    def function(self, x: Tensor) -> Tensor:
        """Return x₂² + x₁²x₂⁴."""
        return x[1] ** 2 + x[0] ** 2 * x[1] ** 4

    def eigenvalues(self) -> Tensor | None:
        """Return 0, 2."""
        return torch.tensor([0.0, 2.0], dtype=torch.float64) if self.point[1] == 0 else None

    def variation(self, radius: float) -> float | None:
        """Return the maximum over the quarter circle u = r(sin φ, cos φ) that leads away from 0."""
        if self.point[1] != 0:
            return None

        def along(angle: Tensor) -> Tensor:
            square = (radius * torch.cos(angle)) ** 2
            return square + (abs(self.point[0]) + radius * torch.sin(angle)) ** 2 * square**2

        return interval_maximum(along, 0.0, torch.pi / 2)

    def order(self) -> tuple[float, float] | None:
        """Return (2, 1)."""
        return (2, 1.0) if self.point[1] == 0 else None

    def flat(self) -> bool | None:
        """Say whether x₁ = 0."""
        return self.point[0] == 0 if self.point[1] == 0 else None

    def flattest(self) -> QuarticTie:
        """Take 0."""
        return self.at((0.0, 0.0))


@dataclass(frozen=True)
class EquivalentPoints(Function):
    """f(x) = x₁² + x₂⁴(1 + x₃²) at (0, 0, a): f° = r² for r ≤ r*(a), so that all these points are equivalent and flat.

    >>> problem = EquivalentPoints((0.0, 0.0, 2.0))
    >>> round(problem.radius(), 8), problem.variation(0.44), problem.variation(0.45)
    (0.44375847, 0.1936, None)
    """

    source: ClassVar[str] = "T008"

    def function(self, x: Tensor) -> Tensor:
        """Return x₁² + x₂⁴(1 + x₃²)."""
        return x[0] ** 2 + x[1] ** 4 * (1 + x[2] ** 2)

    def radius(self) -> float:
        """Return r*(a), the smallest r with max over |s| ≤ r of (r² − s²)²(1 + (a + s)²) = r².

        That is where u = (0, √(r² − s²), s) overtakes u = (r, 0, 0). The printed 1/(1 + a²) is smaller.
        """
        low, high = 0.0, 1.0
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if self._sideways(middle) >= middle**2 else (middle, high)
        return high

    def eigenvalues(self) -> Tensor | None:
        """Return 0, 0, 2."""
        return torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64) if self._in_valley else None

    def variation(self, radius: float) -> float | None:
        """Return r²."""
        return radius**2 if self._in_valley and radius <= self.radius() else None

    def order(self) -> tuple[float, float] | None:
        """Return (2, 1)."""
        return (2, 1.0) if self._in_valley else None

    def flat(self) -> bool | None:
        """Say yes."""
        return True if self._in_valley else None

    def flattest(self) -> EquivalentPoints:
        """Take 0, for one; no point is flatter than another."""
        return self.at((0.0, 0.0, 0.0))

    @property
    def _in_valley(self) -> bool:
        return self.point[:2] == (0, 0)

    def _sideways(self, radius: float) -> float:
        a = self.point[2]
        return interval_maximum(lambda s: (radius**2 - s**2) ** 2 * (1 + (a + s) ** 2), -radius, radius)


@dataclass(frozen=True)
class SixthOrderTie(Function):
    """f(x) = x₁² + x₂⁴(1 + x₃²) + x₁⁶(1 + (x₃ − 1)²) at (0, 0, a): a tie up to order 4, decided at order 6.

    f° = max over |s| ≤ r of q + q³(1 + (a + s − 1)²), q = r² − s², up to the r*(a) of :class:`EquivalentPoints`, which
    is r² + (1 + (a − 1)²)r⁶ + (a − 1)²r¹² + o(r¹²): a = 1 is the only flat minimum. (At fixed |u| and u₃, f is convex
    in x₂²: x₂ = 0 or x₁ = 0 is best.)

    >>> round(SixthOrderTie((0.0, 0.0, 3.0)).variation(0.3), 14)
    0.09364689648776
    """

    source: ClassVar[str] = "T009"

    def function(self, x: Tensor) -> Tensor:
        """Return f."""
        return x[0] ** 2 + x[1] ** 4 * (1 + x[2] ** 2) + x[0] ** 6 * (1 + (x[2] - 1) ** 2)

    def eigenvalues(self) -> Tensor | None:
        """Return 0, 0, 2."""
        return EquivalentPoints(self.point).eigenvalues()

    def variation(self, radius: float) -> float | None:
        """Return the maximum above."""
        if EquivalentPoints(self.point).variation(radius) is None:
            return None
        a = self.point[2]

        def along(s: Tensor) -> Tensor:
            square = radius**2 - s**2
            return square + square**3 * (1 + (a + s - 1) ** 2)

        return interval_maximum(along, -radius, radius)

    def order(self) -> tuple[float, float] | None:
        """Return (2, 1)."""
        return EquivalentPoints(self.point).order()

    def flat(self) -> bool | None:
        """Say whether a = 1."""
        return self.point[2] == 1 if self.point[:2] == (0, 0) else None

    def flattest(self) -> SixthOrderTie:
        """Take (0, 0, 1)."""
        return self.at((0.0, 0.0, 1.0))


@dataclass(frozen=True)
class ReluProduct(Residual):
    """f(x) = |x₂ max{x₁, 0} + x₃ − 1|ᵏ where it vanishes: its flat minima are {x₁ < 0, x₃ = 1} and (0, 0, 1).

    At k = 2, f° = r² for x₁ < 0 and at (0, 0, 1), ~ (1 + x₂²)r² at the other points with x₁ = 0, and for x₁ > 0
    ~ (1 + x₁² + x₂²)r², half of λ₁. C = x₁² − x₂².

    >>> [round(ReluProduct((0.0, x2, 1.0)).variation(1e-3) / 1e-6, 2) for x2 in (0.0, 0.3, 1.0, 2.0)]
    [1.0, 1.09, 2.0, 5.0]
    """

    source: ClassVar[str] = "T027"

    def residual(self, x: Tensor) -> Tensor:
        """Return x₂ max{x₁, 0} + x₃ − 1."""
        return x[1] * positive_part(x[0]) + x[2] - 1

    def slope(self) -> tuple[float, ...]:
        """Return (x₂, x₁, 1), on the right side for x₁ = 0; (0, 0, 1) for x₁ < 0."""
        first, second, _ = self.point
        return (second, first, 1.0) if first >= 0 else (0.0, 0.0, 1.0)

    def eigenvalues(self) -> Tensor | None:
        """Return 0, 0, 2|F′|² at k = 2; None on x₁ = 0, except at (0, 0, 1)."""
        first, second, _ = self.point
        return None if first == 0 != second else super().eigenvalues()

    def curvature(self) -> Tensor:
        """Return F″ on the side that the slope is of."""
        curvature = torch.zeros(3, 3, dtype=torch.float64)
        curvature[0, 1] = curvature[1, 0] = float(self.point[0] >= 0)
        return curvature

    def variation(self, radius: float) -> float | None:
        """Return f° up to r = |x₁|; for all r at x₁ = 0.

        There |F| ≤ |u₁|(|x₂| + |u₂|) + |u₃|, and equal to it at some u with u₁ ≥ 0: the kink makes no difference.
        """
        return super().variation(radius) if radius <= abs(self.point[0]) or self.point[0] == 0 else None

    def flat(self) -> bool | None:
        """Say whether x₁ < 0 or x = (0, 0, 1)."""
        return self.point[0] < 0 or self.point[:2] == (0, 0) if self.solved() else None

    def flattest(self) -> ReluProduct:
        """Take (0, 0, 1)."""
        return self.at((0.0, 0.0, 1.0))

    def conserved(self) -> Tensor:
        """Return x₁² − x₂²."""
        return torch.tensor(self.point[0] ** 2 - self.point[1] ** 2, dtype=torch.float64)
