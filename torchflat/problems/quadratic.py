"""Quadratics: any spectrum, in a basis that no algorithm can guess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.objective import Objective
from torchflat.problems.problem import Problem

__all__ = ["Quadratic"]

REFLECTIONS = 3


@dataclass(frozen=True, eq=False)
class Quadratic(Problem):
    """f(x) = ½ Σᵢ λᵢ (Qx)ᵢ² at x = 0, with the orthogonal Q a product of three random reflections: H = Qᵀ diag(λ) Q.

    Nothing of size n × n is ever formed, so that a product costs 𝒪(n). ``seed`` draws Q.

    >>> Quadratic(torch.tensor([3.0, -1.0, 2.0])).eigenvalues().tolist()
    [-1.0, 2.0, 3.0]
    """

    source: ClassVar[str] = "the definition"

    spectrum: Tensor
    seed: int = 0

    def objective(self) -> Objective:
        """Return f as a function of the flat vector, in float64."""
        spectrum = self.spectrum.double()
        generator = torch.Generator().manual_seed(self.seed)
        mirrors = torch.randn(REFLECTIONS, len(spectrum), generator=generator, dtype=torch.float64)
        mirrors /= torch.linalg.vector_norm(mirrors, dim=1, keepdim=True)

        def f(x: Tensor) -> Tensor:
            for mirror in mirrors:
                x = x - 2 * (mirror @ x) * mirror
            return 0.5 * (spectrum * x * x).sum()

        return Objective.from_function(f, torch.zeros_like(spectrum))

    def eigenvalues(self) -> Tensor:
        """Return λ, sorted."""
        return self.spectrum.double().sort().values

    def variation(self, radius: float) -> float:
        """Return ½ max|λ| r²."""
        return 0.5 * float(self.spectrum.double().abs().max()) * radius**2

    def order(self) -> tuple[float, float] | None:
        """Return (2, ½ max|λ|), unless all are 0."""
        size = float(self.spectrum.double().abs().max())
        return (2, 0.5 * size) if size > 0 else None
