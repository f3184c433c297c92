"""Matrix factorisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.problems.problem import Problem, same, spectral_norm, with_zeros

__all__ = ["Factorisation"]


@dataclass(frozen=True, eq=False)
class Factorisation(Problem):
    """f(X, Y) = ½‖XY − M‖_F² where XY = M, with X (m, r) and Y (r, n): λ₁ = ‖X‖₂² + ‖Y‖₂².

    At XY = M the Hessian is JᵀJ with J(A, B) = AY + XB, so that JJᵀ = XXᵀ ⊗ I + I ⊗ YᵀY is a Kronecker sum: its mn
    eigenvalues are σᵢ(X)² + σⱼ(Y)², where the singular values beyond the rank are zero. H has these, less or more
    zeros. Its diagonal blocks are I ⊗ YYᵀ and XᵀX ⊗ I.

    Flat minima are where ‖X‖₂ = ‖Y‖₂ = √‖M‖₂ =: s, λ₁ = 2‖M‖₂ (T022, T025): nothing is said about the other singular
    values. All have the same f°(r) = ½(√2 s r + r²/2)², an upper bound by the triangle inequality that the top singular
    vectors attain. C = XᵀX − YYᵀ need not vanish there.

    >>> X, Y = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> Factorisation(X, Y).eigenvalues().tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 5.0, 5.0, 9.0, 13.0, 13.0]
    >>> flattest = Factorisation(X, Y).flattest()
    >>> round(flattest.sharpness(), 12), round(flattest.variation(0.2), 12), round(6 * 0.04 + 3**0.5 * 0.008 + 2e-4, 12)
    (12.0, 0.254056406461, 0.254056406461)
    """

    source: ClassVar[str] = "T019, T022, T024, T025"

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
            "left": spectral_norm(self.Y) ** 2,
            "right": spectral_norm(self.X) ** 2,
        }

    def variation(self, radius: float) -> float | None:
        """Return ½(√2 s r + r²/2)² at a flat minimum."""
        if not self.flat():
            return None
        return 0.5 * (math.sqrt(2) * spectral_norm(self.X) * radius + radius**2 / 2) ** 2

    def order(self) -> tuple[float, float]:
        """Return (2, λ₁/2); (4, 1/8) at X = 0, Y = 0."""
        return (2, self.sharpness() / 2) if self.sharpness() > 0 else (4, 0.125)

    def flat(self) -> bool:
        """Say whether ‖X‖₂² = ‖Y‖₂² = ‖XY‖₂."""
        total = spectral_norm(self.X.double() @ self.Y.double())
        return same(spectral_norm(self.X) ** 2, total) and same(spectral_norm(self.Y) ** 2, total)

    def flattest(self) -> Factorisation:
        """Take X = UΣ^½, Y = Σ^½Vᵀ from the singular value decomposition of XY: balanced, and of least |X|² + |Y|²."""
        rank = self.X.shape[1]
        U, values, Vh = torch.linalg.svd(self.X.double() @ self.Y.double(), full_matrices=False)
        # The rank of the product is r at most: what is left out or filled in is zero.
        k = min(rank, len(values))
        X, Y = U.new_zeros(len(U), rank), Vh.new_zeros(rank, Vh.shape[1])
        X[:, :k], Y[:k] = U[:, :k] * values[:k].sqrt(), values[:k].sqrt()[:, None] * Vh[:k]
        return Factorisation(X, Y)

    def at(self, x: Tensor) -> Factorisation:
        """Return the same function at another point, X then Y, with the same product; another product is an error."""
        X, Y = x[: self.X.numel()].view_as(self.X).double(), x[self.X.numel() :].view_as(self.Y).double()
        off = spectral_norm(X @ Y - self.X.double() @ self.Y.double())
        if not same(off, 0.0):
            raise UsageError(f"the product at x is {off:.3g} away from M: take x with XY = M, or use objective().at(x)")
        return Factorisation(X, Y)

    def conserved(self) -> Tensor:
        """Return XᵀX − YYᵀ, (r, r)."""
        X, Y = self.X.double(), self.Y.double()
        return X.T @ X - Y @ Y.T


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
