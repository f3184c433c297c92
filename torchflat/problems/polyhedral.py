"""Sums and maxima of absolute values of quadratics, where they all vanish."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.problems.kinks import absolute, largest
from torchflat.problems.maximum import quadratic_maximum
from torchflat.problems.problem import Function, same

__all__ = ["AbsoluteFactorisation", "MaximumOfThree", "Polyhedral"]


@dataclass(frozen=True)
class Polyhedral(Function):
    """f(x) = max over signs Λ of Λ·F(x), where F(x) = 0: all Fᵢ are quadratic, Λ is from a finite set that is even.

    So f° is the largest of the maxima of the quadratics Λ·F over the ball, and lip f = max |F′ᵀΛ| (Fact 10).
    """

    @abstractmethod
    def residuals(self, x: Tensor) -> Tensor:
        """Return F(x), (k,)."""

    @abstractmethod
    def signs(self) -> Tensor:
        """Return all Λ, one a row, (count, k)."""

    @abstractmethod
    def slopes(self) -> Tensor:
        """Return F′ at the point, (k, n)."""

    @abstractmethod
    def curvatures(self) -> Tensor:
        """Return all Fᵢ″, (k, n, n)."""

    def solved(self) -> bool:
        """Say whether F(x) = 0: nothing is known about other points."""
        return same(float(self.residuals(torch.tensor(self.point, dtype=torch.float64)).abs().max()), 0.0)

    def variation(self, radius: float) -> float | None:
        """Return the largest max of Λ·(F′u + ½uᵀF″u)."""
        if not self.solved():
            return None
        signs = self.signs()
        curvatures = torch.tensordot(signs, self.curvatures(), 1)
        return float(quadratic_maximum(signs @ self.slopes(), curvatures, radius).max())

    def order(self) -> tuple[float, float] | None:
        """Return (1, lip f), the Lipschitz modulus."""
        return (1, float(self._lengths().max())) if self.solved() else None

    def maximal_subgradients(self) -> Tensor:
        """Return the longest F′ᵀΛ, one a row: at a flat minimum 0 is a convex combination of their C (T016)."""
        lengths = self._lengths()
        return (self.signs() @ self.slopes())[lengths >= (1 - 1e-9) * lengths.max()]

    def _lengths(self) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(self.signs() @ self.slopes(), dim=1)
        return lengths


@dataclass(frozen=True)
class AbsoluteFactorisation(Polyhedral):
    """f(X, Y) = ‖XY − M‖₁, the sum of the absolute entries, where XY = M, X (m, r), Y (r, n), M = ``target``.

    lip² = max over Λ ∈ {±1}^{m×n} of ‖ΛYᵀ‖_F² + ‖XᵀΛ‖_F², C = XᵀX − YYᵀ (T020). For r = 1 it is m‖Y‖₁² + n‖X‖₁², and
    flat minima are where the two terms are equal, to √(mn)‖X‖₁‖Y‖₁. |x₁x₃ − a| + |x₂x₃ − b| has m = 2, r = n = 1: there
    lip² = 2x₃² + (|x₁| + |x₂|)² (T031; T045 with (a, b) = (1, 0)). The point is X, then Y, row by row.

    >>> rank_one = AbsoluteFactorisation((1.0, 2.0, 1.0, -1.5, 0.5), ((1.0, -1.5, 0.5), (2.0, -3.0, 1.0)))
    >>> flattest = rank_one.flattest()
    >>> round(flattest.point[0], 10), round(flattest.order()[1] ** 2, 8)
    (0.9036020036, 44.09081537)
    """

    source: ClassVar[str] = "T020, T021, T031, T045, T046"

    target: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, X: Tensor, Y: Tensor) -> AbsoluteFactorisation:
        """Take the factors of XY."""
        X, Y = X.double(), Y.double()
        return cls(tuple(torch.cat([X.flatten(), Y.flatten()]).tolist()), tuple(map(tuple, (X @ Y).tolist())))

    def residuals(self, x: Tensor) -> Tensor:
        """Return XY − M, flat."""
        X, Y = self.factors(x)
        return (X @ Y - torch.tensor(self.target, dtype=torch.float64)).flatten()

    def function(self, x: Tensor) -> Tensor:
        """Return ‖XY − M‖₁."""
        return absolute(self.residuals(x)).sum()

    def signs(self) -> Tensor:
        """Return {±1}^{mn}."""
        count = len(self.target) * len(self.target[0])
        return torch.tensor(list(itertools.product((1.0, -1.0), repeat=count)), dtype=torch.float64)

    def slopes(self) -> Tensor:
        """Return the derivative AY + XB of every entry by A and B."""
        X, Y = self.factors()
        left, right = torch.eye(len(X)).double(), torch.eye(Y.shape[1]).double()
        by_left, by_right = torch.einsum("ik,lj->ijkl", left, Y), torch.einsum("il,jk->ijlk", X, right)
        return torch.cat([by_left.flatten(2), by_right.flatten(2)], dim=2).flatten(0, 1)

    def curvatures(self) -> Tensor:
        """Return the matrix of 2(AB)ᵢⱼ for every entry."""
        X, Y = self.factors()
        (m, rank), n = X.shape, Y.shape[1]
        curvatures = X.new_zeros(m, n, X.numel() + Y.numel(), X.numel() + Y.numel())
        for i, j, k in itertools.product(range(m), range(n), range(rank)):
            a, b = i * rank + k, X.numel() + k * n + j
            curvatures[i, j, a, b] = curvatures[i, j, b, a] = 1
        return curvatures.flatten(0, 1)

    def flat(self) -> bool | None:
        """Say whether m‖Y‖₁² = n‖X‖₁², for r = 1."""
        X, Y = self.factors()
        if X.shape[1] > 1 or not self.solved():
            return None
        return same(len(X) * float(Y.abs().sum()) ** 2, Y.shape[1] * float(X.abs().sum()) ** 2)

    def flattest(self) -> AbsoluteFactorisation | None:
        """Take (sX, Y/s) with s⁴ = m‖Y‖₁²/(n‖X‖₁²), for r = 1."""
        X, Y = self.factors()
        if X.shape[1] > 1 or not self.solved():
            return None
        scale = (len(X) / Y.shape[1]) ** 0.25 * math.sqrt(float(Y.abs().sum() / X.abs().sum()))
        return self.at(torch.cat([scale * X.flatten(), Y.flatten() / scale]))

    def conserved(self) -> Tensor:
        """Return XᵀX − YYᵀ, (r, r)."""
        X, Y = self.factors()
        return X.T @ X - Y @ Y.T

    def factors(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return X and Y, at the point or at another x."""
        x = torch.tensor(self.point, dtype=torch.float64) if x is None else x
        m, n = len(self.target), len(self.target[0])
        rank = len(x) // (m + n)
        return x[: m * rank].view(m, rank), x[m * rank :].view(rank, n)


@dataclass(frozen=True)
class MaximumOfThree(Polyhedral):
    """f(x) = max{|x₁x₂ − 1|, |x₃x₄ − 1|, |x₁x₄ − 4|/10}, which vanishes on (2t, 1/2t, t/2, 2/t).

    lip² = max{4t² + 1/4t², t²/4 + 4/t²}: t = ±1 is strictly flat, and C = x₁² − x₂² + x₃² − x₄² vanishes there; but the
    maximal subgradients v have C(v) = ∓15/4, so that 0 is a convex combination of these C and none of them, against
    theorem 2 as it is printed.

    >>> flattest = MaximumOfThree((4.0, 0.25, 1.0, 1.0)).flattest()
    >>> flattest.order(), [float(flattest.at(v).conserved()) for v in flattest.maximal_subgradients()]
    ((1, 2.0615528128088303), [-3.75, -3.75, 3.75, 3.75])
    """

    source: ClassVar[str] = "T016"

    def residuals(self, x: Tensor) -> Tensor:
        """Return x₁x₂ − 1, x₃x₄ − 1, (x₁x₄ − 4)/10."""
        return torch.stack([x[0] * x[1] - 1, x[2] * x[3] - 1, (x[0] * x[3] - 4) / 10])

    def function(self, x: Tensor) -> Tensor:
        """Return the largest absolute value."""
        return largest(absolute(self.residuals(x)))

    def signs(self) -> Tensor:
        """Return the six ± unit vectors."""
        unit = torch.eye(3, dtype=torch.float64)
        return torch.stack([unit, -unit], dim=1).flatten(0, 1)

    def slopes(self) -> Tensor:
        """Return F′."""
        a, b, c, d = self.point
        return torch.tensor([[b, a, 0, 0], [0, 0, d, c], [d / 10, 0, 0, a / 10]], dtype=torch.float64)

    def curvatures(self) -> Tensor:
        """Return F″."""
        curvatures = torch.zeros(3, 4, 4, dtype=torch.float64)
        for k, (i, j, size) in enumerate([(0, 1, 1.0), (2, 3, 1.0), (0, 3, 0.1)]):
            curvatures[k, i, j] = curvatures[k, j, i] = size
        return curvatures

    def flat(self) -> bool | None:
        """Say whether t = ±1, which is |x₁| = |x₄|."""
        return same(abs(self.point[0]), abs(self.point[3])) if self.solved() else None

    def flattest(self) -> MaximumOfThree:
        """Take t = 1."""
        return self.at((2.0, 0.5, 0.5, 2.0))

    def conserved(self) -> Tensor:
        """Return x₁² − x₂² + x₃² − x₄²."""
        a, b, c, d = self.point
        return torch.tensor(a**2 - b**2 + c**2 - d**2, dtype=torch.float64)
