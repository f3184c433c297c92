"""Matrix factorisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchflat.objective import Objective
from torchflat.problems.problem import Problem, with_zeros

__all__ = ["Factorisation"]


@dataclass(frozen=True, eq=False)
class Factorisation(Problem):
    """f(X, Y) = ½‖XY − M‖_F² where XY = M, with X (m, r) and Y (r, n): λ₁ = ‖X‖₂² + ‖Y‖₂².

    At XY = M the Hessian is JᵀJ with J(A, B) = AY + XB, so that JJᵀ = XXᵀ ⊗ I + I ⊗ YᵀY is a Kronecker sum: its mn
    eigenvalues are σᵢ(X)² + σⱼ(Y)², where the singular values beyond the rank are zero. H has these, less or more
    zeros. Its diagonal blocks are I ⊗ YYᵀ and XᵀX ⊗ I.

    >>> X, Y = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> Factorisation(X, Y).eigenvalues().tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 5.0, 5.0, 9.0, 13.0, 13.0]
    """

    source: ClassVar[str] = "T024"

    X: Tensor
    Y: Tensor

    def objective(self) -> Objective:
        """Return f of a module with two parameters, ``left`` and ``right``; the one row of data is M."""
        X, Y = self.X.double(), self.Y.double()
        return Objective(_Product(X, Y), None, ((X @ Y)[None],), batch_loss=_half_squared_distance)

    def eigenvalues(self) -> Tensor:
        """Return σᵢ(X)² + σⱼ(Y)² for all i and j, with zeros to make up the number."""
        left, right = _gram_eigenvalues(self.X), _gram_eigenvalues(self.Y.T)
        return with_zeros(left[:, None] + right[None, :], self.X.numel() + self.Y.numel())

    def sharpness(self) -> float:
        """Return ‖X‖₂² + ‖Y‖₂²."""
        return sum(self.block_sharpness().values())

    def block_sharpness(self) -> Mapping[str, float]:
        """Return ‖Y‖₂² for X, and ‖X‖₂² for Y."""
        return {
            "left": float(torch.linalg.matrix_norm(self.Y.double(), 2) ** 2),
            "right": float(torch.linalg.matrix_norm(self.X.double(), 2) ** 2),
        }


class _Product(nn.Module):
    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left.clone()), nn.Parameter(right.clone())

    def forward(self) -> Tensor:
        return self.left @ self.right


def _half_squared_distance(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, float]:
    return 0.5 * ((model() - batch[0]) ** 2).sum(), 1.0


def _gram_eigenvalues(A: Tensor) -> Tensor:
    """Return the eigenvalues of AAᵀ, one for each row of A."""
    return with_zeros(torch.linalg.svdvals(A.double()) ** 2, len(A))
