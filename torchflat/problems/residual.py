"""One squared residual, f = F(x)², where it vanishes: H has rank one."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.objective import Objective
from torchflat.problems.problem import Problem, with_zeros

__all__ = ["Monomial", "SquaredResidual", "WeightedSquares"]


@dataclass(frozen=True)
class SquaredResidual(Problem):
    """f(x) = F(x)² at a ``point`` with F(x) = 0, where H = 2 F′ᵀF′: one eigenvalue 2|F′|², the others zero."""

    point: tuple[float, ...]

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """Return F(x), a 0-dim tensor."""

    def objective(self) -> Objective:
        """Return F² as a function of the flat vector, in float64."""
        return Objective.from_function(lambda x: self.residual(x) ** 2, torch.tensor(self.point, dtype=torch.float64))

    def eigenvalues(self) -> Tensor:
        """Return 0, …, 0, λ₁."""
        return with_zeros(torch.tensor([self.sharpness()], dtype=torch.float64), len(self.point))

    @abstractmethod
    def sharpness(self) -> float:
        """Return λ₁ = 2|F′|²."""


@dataclass(frozen=True)
class Monomial(SquaredResidual):
    """f(x) = (Πxᵢ^υᵢ − 1)² where Πxᵢ^υᵢ = 1: λ₁ = 2 Σ (υᵢ/xᵢ)².

    >>> round(Monomial.flattest((1, 2)).sharpness(), 9)
    9.524406312
    """

    source: ClassVar[str] = "T032"

    exponents: tuple[int, ...]

    @classmethod
    def flattest(cls, exponents: tuple[int, ...]) -> Monomial:
        """Take the point where λ₁ is least: xᵢ = √υᵢ / (Πυⱼ^υⱼ)^{1/2|υ|₁}, λ₁ = 2|υ|₁ (Πυⱼ^υⱼ)^{1/|υ|₁}."""
        scale = math.prod(v**v for v in exponents) ** (-0.5 / sum(exponents))
        return cls(tuple(scale * math.sqrt(v) for v in exponents), exponents)

    def residual(self, x: Tensor) -> Tensor:
        """Return Πxᵢ^υᵢ − 1."""
        return torch.stack([x[i] ** v for i, v in enumerate(self.exponents)]).prod() - 1

    def sharpness(self) -> float:
        """Return 2 Σ (υᵢ/xᵢ)²."""
        return 2 * sum((v / x) ** 2 for v, x in zip(self.exponents, self.point, strict=True))


@dataclass(frozen=True)
class WeightedSquares(SquaredResidual):
    """f(x) = (Σaᵢxᵢ² − 1)² where Σaᵢxᵢ² = 1: λ₁ = 8 Σ (aᵢxᵢ)², least (8 min aᵢ > 0) on the longest axis.

    >>> round(WeightedSquares((0.5**0.5, 0.0, 0.0), weights=(2.0, 5.0, -1.0)).sharpness(), 9)
    16.0
    """

    source: ClassVar[str] = "T030"

    weights: tuple[float, ...]

    def residual(self, x: Tensor) -> Tensor:
        """Return Σaᵢxᵢ² − 1."""
        return torch.tensor(self.weights, dtype=torch.float64) @ x**2 - 1

    def sharpness(self) -> float:
        """Return 8 Σ (aᵢxᵢ)²."""
        return 8 * sum((a * x) ** 2 for a, x in zip(self.weights, self.point, strict=True))
