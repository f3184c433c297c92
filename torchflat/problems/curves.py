"""Squared residuals whose zeros are a curve with one flattest place: the examples of table 1."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.problems.problem import same
from torchflat.problems.residual import Residual

__all__ = ["Bilinear", "Cubic", "Parabola"]


@dataclass(frozen=True)
class Parabola(Residual):
    """f(x) = |x₂ − x₁²|ᵏ on the parabola: λ₁ = 2(1 + 4x₁²) at k = 2, the vertex is the flat minimum, C = x₁²e^{4x₂}.

    >>> Parabola((0.5, 0.25)).sharpness(), Parabola((0.5, 0.25)).flattest().sharpness()
    (4.0, 2.0)
    """

    source: ClassVar[str] = "T040"

    def residual(self, x: Tensor) -> Tensor:
        """Return x₂ − x₁²."""
        return x[1] - x[0] ** 2

    def slope(self) -> tuple[float, ...]:
        """Return (−2x₁, 1)."""
        return -2 * self.point[0], 1.0

    def curvature(self) -> Tensor:
        """Return diag(−2, 0)."""
        return torch.diag(torch.tensor([-2.0, 0.0], dtype=torch.float64))

    def flat(self) -> bool | None:
        """Say whether x₁ = 0."""
        return same(self.point[0], 0.0) if self.solved() else None

    def flattest(self) -> Parabola:
        """Take the vertex, 0."""
        return self.at((0.0, 0.0))

    def conserved(self) -> Tensor:
        """Return x₁²e^{4x₂}."""
        return torch.tensor(self.point[0] ** 2 * math.exp(4 * self.point[1]), dtype=torch.float64)


@dataclass(frozen=True)
class Cubic(Residual):
    """f(x) = |x₁³ + x₂³ − 1|ᵏ on that curve: λ₁ = 18(x₁⁴ + x₂⁴) at k = 2; the flat minimum is where x₁ = x₂.

    c = |1/x₁ − 1/x₂| where x₁x₂ > 0, and its inverse elsewhere, vanishes at (1, 0) and (0, 1) too: normalised descent
    can end at these, which are not flat.

    >>> round(Cubic((1.0, 0.0)).flattest().sharpness(), 8)
    14.28660947
    """

    source: ClassVar[str] = "T041"

    def residual(self, x: Tensor) -> Tensor:
        """Return x₁³ + x₂³ − 1."""
        return x[0] ** 3 + x[1] ** 3 - 1

    def slope(self) -> tuple[float, ...]:
        """Return 3(x₁², x₂²)."""
        return 3 * self.point[0] ** 2, 3 * self.point[1] ** 2

    def flat(self) -> bool | None:
        """Say whether x₁ = x₂."""
        return same(*self.point) if self.solved() else None

    def flattest(self) -> Cubic:
        """Take x₁ = x₂ = 2^{−1/3}."""
        return self.at(2 * (0.5 ** (1 / 3),))

    def conserved(self) -> Tensor:
        """Return c."""
        first, second = self.point
        product, difference = abs(first * second), abs(first - second)
        c = difference / product if first * second > 0 else product / difference
        return torch.tensor(c, dtype=torch.float64)


@dataclass(frozen=True)
class Bilinear(Residual):
    """f(x, y) = |xᵀAy − b|ᵏ where xᵀAy = b, b ≠ 0: λ₁ = 2(|Ay|² + |Aᵀx|²) at k = 2, which is 4|b|σ at least.

    σ is the smallest positive singular value of A; the flat minima are its pairs, with |x| = |y| = √(|b|/σ). With the
    singular value decomposition A = UΣVᵀ, C is (Uᵀx)ᵢ² − (Vᵀy)ᵢ². The point is x, then y.

    >>> round(Bilinear((1.0, 0.0, 0.5, 0.0), ((2.0, 1.0), (0.0, 3.0))).flattest().sharpness(), 9)
    7.369611902
    """

    source: ClassVar[str] = "T043"

    matrix: tuple[tuple[float, ...], ...]
    level: float = field(default=1.0, kw_only=True)

    def residual(self, x: Tensor) -> Tensor:
        """Return xᵀAy − b."""
        left, right = self._split(x)
        value: Tensor = left @ self._matrix @ right - self.level
        return value

    def slope(self) -> tuple[float, ...]:
        """Return (Ay, Aᵀx)."""
        left, right = self._split(torch.tensor(self.point, dtype=torch.float64))
        return tuple(torch.cat([self._matrix @ right, left @ self._matrix]).tolist())

    def curvature(self) -> Tensor:
        """Return [[0, A], [Aᵀ, 0]]."""
        A, rows = self._matrix, len(self.matrix)
        curvature = A.new_zeros(sum(A.shape), sum(A.shape))
        curvature[:rows, rows:], curvature[rows:, :rows] = A, A.T
        return curvature

    def flat(self) -> bool | None:
        """Say whether |F′|² = 2|b|σ."""
        smallest = float(self._smallest_pair()[1])
        return same(math.hypot(*self.slope()) ** 2, 2 * abs(self.level) * smallest) if self.solved() else None

    def flattest(self) -> Bilinear:
        """Take √(|b|/σ) times the smallest singular pair."""
        left, smallest, right = self._smallest_pair()
        size = torch.sqrt(abs(self.level) / smallest)
        return self.at(torch.cat([size * left, math.copysign(1.0, self.level) * size * right]))

    def conserved(self) -> Tensor:
        """Return (Uᵀx)ᵢ² − (Vᵀy)ᵢ², one for each singular value."""
        left, right = self._split(torch.tensor(self.point, dtype=torch.float64))
        U, _, Vh = torch.linalg.svd(self._matrix, full_matrices=False)
        difference: Tensor = (left @ U) ** 2 - (Vh @ right) ** 2
        return difference

    @property
    def _matrix(self) -> Tensor:
        return torch.tensor(self.matrix, dtype=torch.float64)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[: len(self.matrix)], x[len(self.matrix) :]

    def _smallest_pair(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, σ, v."""
        U, values, Vh = torch.linalg.svd(self._matrix, full_matrices=False)
        k = int((values > 1e-12 * values[0]).sum()) - 1
        return U[:, k], values[k], Vh[k]
