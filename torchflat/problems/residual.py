"""A power of one residual, f = |F(x)|ᵏ, where F vanishes."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.problems.kinks import absolute
from torchflat.problems.maximum import quadratic_maximum
from torchflat.problems.problem import Function, same, with_zeros

__all__ = ["Monomial", "Residual", "WeightedSquares"]


@dataclass(frozen=True)
class Residual(Function):
    """f(x) = |F(x)|ᵏ at a point with F(x) = 0, k = ``power``.

    f°(x, r) = max|F(x + u)|ᵏ = |F′|ᵏ rᵏ + o(rᵏ): the k-th derivative has norm k!|F′|ᵏ (T006, T007), and at k = 1 the
    Lipschitz modulus is |F′| (T004). H = 2F′F′ᵀ at k = 2, and 0 beyond. Which points are flat does not depend on k.
    Where F is quadratic f° is known for all r.
    """

    power: int = field(default=2, kw_only=True)

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """Return F(x), 0-dim."""

    @abstractmethod
    def slope(self) -> tuple[float, ...]:
        """Return F′ at the point."""

    def curvature(self) -> Tensor | None:
        """Return F″, (n, n), if F is quadratic."""
        return None

    def function(self, x: Tensor) -> Tensor:
        """Return |F(x)|ᵏ."""
        return absolute(self.residual(x)) ** self.power

    def solved(self) -> bool:
        """Say whether F(x) = 0: nothing is known about other points."""
        return same(float(self.residual(torch.tensor(self.point, dtype=torch.float64))), 0.0)

    def eigenvalues(self) -> Tensor | None:
        """Return 0, …, 0, 2|F′|² at k = 2, and zeros beyond."""
        if self.power == 1 or not self.solved():
            return None
        top = 2 * sum(s**2 for s in self.slope()) if self.power == 2 else 0.0
        return with_zeros(torch.tensor([top], dtype=torch.float64), len(self.point))

    def variation(self, radius: float) -> float | None:
        """Return (max |F′·u + ½uᵀF″u|)ᵏ if F is quadratic."""
        curvature = self.curvature()
        if curvature is None or not self.solved():
            return None
        slope = torch.tensor(self.slope(), dtype=torch.float64)
        both = quadratic_maximum(torch.stack([slope, -slope]), torch.stack([curvature, -curvature]), radius)
        return float(both.max()) ** self.power

    def order(self) -> tuple[float, float] | None:
        """Return (k, |F′|ᵏ), or (2k, (‖F″‖₂/2)ᵏ) where F′ = 0 and F is quadratic."""
        slope, curvature = math.hypot(*self.slope()), self.curvature()
        if not self.solved():
            return None
        if slope > 0:
            return self.power, slope**self.power
        if curvature is None:
            return None
        return 2 * self.power, float(torch.linalg.matrix_norm(curvature, 2) / 2) ** self.power


@dataclass(frozen=True)
class Monomial(Residual):
    """f(x) = |Πxᵢ^υᵢ − 1|ᵏ where Πxᵢ^υᵢ = 1: λ₁ = 2 Σ (υᵢ/xᵢ)² at k = 2 (T032).

    C is υ_n xᵢ² − υᵢx_n², i < n, and the flat minima are where it vanishes. (x₁x₂ − 1)ᵏ has υ = (1, 1) (T002, T028).

    >>> flattest = Monomial((1.0, 1.0), (1, 2)).flattest()
    >>> round(flattest.sharpness(), 9), flattest.flat()
    (9.524406312, True)
    >>> round(Monomial((1.0, 1.0), (1, 1)).variation(0.2), 10), round((2**0.5 * 0.2 + 0.2**2 / 2) ** 2, 10)
    (0.0917137085, 0.0917137085)
    """

    source: ClassVar[str] = "T002, T028, T032, T033"

    exponents: tuple[int, ...]

    def residual(self, x: Tensor) -> Tensor:
        """Return Πxᵢ^υᵢ − 1."""
        return torch.stack([x[i] ** v for i, v in enumerate(self.exponents)]).prod() - 1

    def slope(self) -> tuple[float, ...]:
        """Return υᵢ/xᵢ."""
        return tuple(v / x for v, x in zip(self.exponents, self.point, strict=True))

    def curvature(self) -> Tensor | None:
        """Return the matrix of 2u₁u₂ for x₁x₂."""
        return torch.eye(2, dtype=torch.float64).flip(0) if self.exponents == (1, 1) else None

    def variation(self, radius: float) -> float | None:
        """Return ((1 + r/|x|)^|υ|₁ − 1)ᵏ at a flat minimum, up to r = min |xᵢ|; at all x and r for x₁x₂.

        On a sphere about 0 the monomial is largest along its flat minimum: so x + u is best with u along x. The other
        sign gives less: 1 − Π(1 + uᵢ/xᵢ)^υᵢ ≤ Συᵢ|uᵢ/xᵢ| ≤ |υ|₁ r/|x| there.
        """
        if self.curvature() is not None:
            return super().variation(radius)
        if not self.flat() or radius > min(map(abs, self.point)):
            return None
        growth = math.expm1(sum(self.exponents) * math.log1p(radius / math.hypot(*self.point)))
        return float(growth**self.power)

    def flat(self) -> bool | None:
        """Say whether C = 0."""
        return all(same(float(c), 0.0) for c in self.conserved()) if self.solved() else None

    def flattest(self) -> Monomial:
        """Take xᵢ = √υᵢ / (Πυⱼ^υⱼ)^{1/2|υ|₁}, where λ₁ = 2|υ|₁ (Πυⱼ^υⱼ)^{1/|υ|₁}."""
        scale = math.prod(v**v for v in self.exponents) ** (-0.5 / sum(self.exponents))
        return self.at([scale * math.sqrt(v) for v in self.exponents])

    def conserved(self) -> Tensor:
        """Return υ_n xᵢ² − υᵢx_n², (n − 1,)."""
        x, v = (torch.tensor(values, dtype=torch.float64) for values in (self.point, self.exponents))
        return v[-1] * x[:-1] ** 2 - v[:-1] * x[-1] ** 2


@dataclass(frozen=True)
class WeightedSquares(Residual):
    """f(x) = |Σaᵢxᵢ² − b|ᵏ where Σaᵢxᵢ² = b, b = ``level``: λ₁ = 8 Σ (aᵢxᵢ)² at k = 2.

    For b = 1 it is least, 8 min aᵢ > 0, on the longest axis (T030); the ellipse and the hyperbola have a = (1, a₂)
    (T042). For b = 0 the flat minima are where F′ vanishes too: |2x₁² − x₂²| is of order 2 at 0 (T010).

    >>> round(WeightedSquares((0.5, 0.5, 0.75**0.5), weights=(2.0, 5.0, -1.0)).flattest().sharpness(), 12)
    16.0
    """

    source: ClassVar[str] = "T010, T030, T042"

    weights: tuple[float, ...]
    level: float = field(default=1.0, kw_only=True)

    def residual(self, x: Tensor) -> Tensor:
        """Return Σaᵢxᵢ² − b."""
        return torch.tensor(self.weights, dtype=torch.float64) @ x**2 - self.level

    def slope(self) -> tuple[float, ...]:
        """Return 2aᵢxᵢ."""
        return tuple(2 * a * x for a, x in zip(self.weights, self.point, strict=True))

    def curvature(self) -> Tensor:
        """Return diag(2a)."""
        return torch.diag(2 * torch.tensor(self.weights, dtype=torch.float64))

    def flat(self) -> bool | None:
        """Say whether aᵢxᵢ = 0 off the smallest aᵢ of the level's sign; everywhere, for b = 0."""
        if not self.solved():
            return None
        return all(
            same(a * x, 0.0)
            for a, x in zip(self.weights, self.point, strict=True)
            if self.level == 0 or a != self._flattest_weight()
        )

    def flattest(self) -> WeightedSquares:
        """Take the longest axis; 0 for b = 0."""
        point = [0.0] * len(self.weights)
        if self.level != 0:
            weight = self._flattest_weight()
            point[self.weights.index(weight)] = math.sqrt(self.level / weight)
        return self.at(point)

    def conserved(self) -> Tensor:
        """Return |xᵢ|^{2a₁} / |x₁|^{2aᵢ}, i > 1: infinite or NaN on some of the axes."""
        x, a = (torch.tensor(values, dtype=torch.float64) for values in (self.point, self.weights))
        return x[1:].abs() ** (2 * a[0]) / x[0].abs() ** (2 * a[1:])

    def _flattest_weight(self) -> float:
        return min((a for a in self.weights if a * self.level > 0), key=abs)
