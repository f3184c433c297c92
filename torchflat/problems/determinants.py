"""A function of three plane vectors, invariant under SL(2): where it is flat its largest eigenvalue is double."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.problems.problem import Function, same, with_zeros

__all__ = ["Determinants"]


@dataclass(frozen=True)
class Determinants(Function):
    """f = ½det(x₁, x₂)² + ½det(x₁, x₃)² + ⅛(det(x₂, x₃) − 1)² where it vanishes: x₁ = 0, det(x₂, x₃) = 1.

    With s₁ ≥ s₂ = 1/s₁ the singular values of (x₂ x₃), the eigenvalues are s₁², s₂², (s₁² + s₂²)/4 and zeros: flat
    minima have s₁ = 1. There E₁ = {(w, 0, 0)}, and C(v) = Σvᵢvᵢᵀ − ½|v|²I is nonzero for all v in it: 0 is C of a
    mixture only, against theorem 3 as it is printed. The point is x₁, x₂, x₃.

    >>> Determinants((0.0, 0.0, 2.0, 0.0, 0.0, 0.5)).eigenvalues()
    tensor([0.0000, 0.0000, 0.0000, 0.2500, 1.0625, 4.0000], dtype=torch.float64)
    """

    source: ClassVar[str] = "T018"

    def function(self, x: Tensor) -> Tensor:
        """Return f."""
        first, second, third = x.view(3, 2)
        squares = 0.5 * _det(first, second) ** 2 + 0.5 * _det(first, third) ** 2
        return squares + 0.125 * (_det(second, third) - 1) ** 2

    def solved(self) -> bool:
        """Say whether f = 0: nothing is known about other points."""
        first, second, third = torch.tensor(self.point, dtype=torch.float64).view(3, 2)
        return not first.any() and same(float(_det(second, third)), 1.0)

    def eigenvalues(self) -> Tensor | None:
        """Return s₁², s₂², (s₁² + s₂²)/4 and three zeros, in order."""
        if not self.solved():
            return None
        squares = self._singular_values() ** 2
        return with_zeros(torch.cat([squares, squares.sum()[None] / 4]), 6)

    def order(self) -> tuple[float, float] | None:
        """Return (2, λ₁/2)."""
        sharpness = self.sharpness()
        return None if sharpness is None else (2, sharpness / 2)

    def flat(self) -> bool | None:
        """Say whether s₁ = 1."""
        return same(float(self._singular_values()[0]), 1.0) if self.solved() else None

    def flattest(self) -> Determinants:
        """Take (0, e₁, e₂)."""
        return self.at((0.0, 0.0, 1.0, 0.0, 0.0, 1.0))

    def conserved(self) -> Tensor:
        """Return Σxᵢxᵢᵀ − ½|x|²I, (2, 2)."""
        x = torch.tensor(self.point, dtype=torch.float64).view(3, 2)
        gram = x.T @ x
        return gram - 0.5 * gram.trace() * torch.eye(2, dtype=torch.float64)

    def _singular_values(self) -> Tensor:
        values: Tensor = torch.linalg.svdvals(torch.tensor(self.point[2:], dtype=torch.float64).view(2, 2))
        return values


def _det(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[1] - a[1] * b[0]
