"""A matrix of low rank below the Hessian, that moves along the orbit without any product (T093)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchflat.symmetry.group import Group
from torchflat.symmetry.scaling import least_norm

__all__ = ["LowerModel", "Smoothed"]

# Shares of the mixture below this are left out.
SHARE = 1e-9
# What an indefinite model takes up may exceed ‖H‖ by this factor.
SOUND = 1.5
# Columns that are multiplied at once.
COLUMNS = 2**16


class Smoothed(NamedTuple):
    """log of the Schatten norm (Σ|λ|^q)^{1/q} of the model at some z, its gradient, and λ₁ there."""

    value: float
    gradient: Tensor
    top: float


class LowerModel:
    """M = Yᵀ E Y with rows Y (p, n) and signs E: what exact products HX of a basis X prove about H.

    M = HX(XᵀHX)⁺XᵀH agrees with H on the range of X. If H ⪰ 0 then M ⪯ H, and as congruence keeps the order,
    g⁻¹Mg⁻¹ ⪯ g⁻¹Hg⁻¹ at every g: λ₁ of the model is below λ₁ of H all over the orbit. With ``definite`` directions
    where H seems negative are left out, as rounding; without, they have the sign −1, and M bounds nothing.
    ``magnitude`` takes |λ| for λ.

    The Gram matrix of the moved rows (p, p) has all the eigenvalues; none of this takes a product.
    """

    def __init__(self, group: Group, dtype: torch.dtype, device: torch.device, definite: bool, magnitude: bool) -> None:
        self.group, self.definite, self.magnitude = group, definite, magnitude
        self.rows = torch.empty(0, group.layout.n, dtype=dtype, device=device)
        self.signs = torch.empty(0, dtype=torch.float64)

    def add(self, vectors: Tensor, products: Tensor, z: Tensor, norm: float) -> None:
        """Take up the products H x for rows x, (m, n) both: y = (HX − Y…)/√σ for what they tell beyond the model.

        Where H is not semidefinite, a small σ can go with a large numerator: what exceeds ``norm``, that of H at z, is
        left out.
        """
        weights = _products(vectors, self.rows)
        schur = _products(vectors, products)
        # Rounding in products is relative to ‖H‖, which the largest of the products shows.
        size = float(schur.diagonal().abs().max())
        schur = (schur + schur.T) / 2 - weights * self.signs @ weights.T
        values, rotation = torch.linalg.eigh(schur)
        noise = 64 * torch.finfo(vectors.dtype).eps * size
        kept = values > noise if self.definite else values.abs() > noise
        values, rotation = values[kept], rotation[:, kept] / values[kept].abs().sqrt()
        left = rotation.T.to(products.device, products.dtype) @ products
        left -= (rotation.T @ (weights * self.signs)).to(left.device, left.dtype) @ self.rows
        signs = values.sign()
        if not self.definite:
            sound = self.group.act(left, z, inverse=True).square().sum(1, dtype=torch.float64) <= SOUND * norm
            left, signs = left[sound], signs[sound.cpu()]
        self.rows = torch.cat([self.rows, left])
        self.signs = torch.cat([self.signs, signs])

    def eigenpairs(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of g⁻¹Mg⁻¹ at z in falling order of size, and c as columns: unit vectors g⁻¹Yᵀc."""
        gram = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64)
        for _, piece in self.group.pieces(self.rows, z, inverse=True):
            gram += (piece @ piece.T).double().cpu()
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        # M = ỸᵀEỸ with ỸỸᵀ = LLᵀ has the eigenvalues of LᵀEL, and with LᵀELu = λu the vectors ỸᵀELu.
        root = vectors * values.clamp(min=0).sqrt()
        values, vectors = torch.linalg.eigh(root.T @ (self.signs[:, None] * root))
        order = self._size(values).argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        known = values.abs() > 1e-14 * values.abs().amax() if len(values) else values > 0
        values, vectors = values[known], vectors[:, known]
        return values, self.signs[:, None] * (root @ vectors) / values

    def smoothed(self, z: Tensor, power: float) -> Smoothed:
        """Return log (Σ λ^q)^{1/q} over positive λ, q = ``power``: convex along the orbit if H ⪰ 0, as log λ₁ is.

        It exceeds log λ₁ by log(p)/q at most. Its gradient is −2C of the mixture of eigenvectors with shares λ^q/Σλ^q.
        """
        values, vectors = self.eigenpairs(z)
        relative = (self._size(values) / self._size(values[0])).clamp(min=0)
        shares = relative**power
        total = float(shares.sum())
        shares /= total
        imbalance = self._imbalance(z, self._mixture(vectors, shares))
        value = math.log(float(self._size(values[0]))) + math.log(total) / power
        return Smoothed(value, -2 * self.group.pulled_back(imbalance, z), float(values[0]))

    def bound(self, z: Tensor, power: float, most: float) -> float:
        """Bound λ₁ of the model, and so of H ⪰ 0, from below at all log-scales up to ``most``.

        For any W ⪰ 0 with trace 1, λ₁ at z is at least h(z) = tr(W·Gram(z)) = Σ|g⁻¹y|², over rows y with YᵀWY = Σyyᵀ.
        log h is convex, so that at any z' it exceeds log h(z) + ⟨∇ log h(z), z' − z⟩, and ∇ log h = −2C/h: however
        inexactly h is minimised, h(z)·exp(−2 max⟨C/h, z' − z⟩) is a bound (:meth:`Group.slack`). W is that of the
        smoothed norm at z, whose stationary point is one of h too.
        """
        values, vectors = self.eigenpairs(z)
        shares = (values / values[0]).clamp(min=0) ** (power - 1)
        shares /= shares.sum()
        mixture = self._mixture(vectors, shares * values.clamp(min=0))
        # g⁻¹ is g at −z for diagonal and full couplings alike.
        balance = least_norm(self.group, mixture @ self.rows, -z, most, tolerance=min(1e-6, 1e-3 / power), steps=100)
        return balance.value * math.exp(-2 * self.group.slack(balance.imbalance, balance.z, most))

    def vectors(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """Return g⁻¹Yᵀc for the columns c, as rows."""
        weights = coefficients.T.to(self.rows.device, self.rows.dtype)
        rows = self.rows.new_empty(len(weights), self.rows.shape[1])
        for place, piece in self.group.pieces(self.rows, z, inverse=True):
            rows[:, place] = weights @ piece
        return rows

    def compress(self, z: Tensor, most: int, share: float) -> None:
        """Keep the ``most`` largest eigenpairs at z, and of these what is at least ``share`` of the first."""
        values, vectors = self.eigenpairs(z)
        chosen = (values.abs() >= share * values.abs().max()).nonzero().reshape(-1)[:most]
        weights = (vectors[:, chosen] * values[chosen].abs().sqrt()).T.to(self.rows.device, self.rows.dtype)
        # √|λ|·g v = √|λ|·Yᵀc: the same matrix, less what is left out.
        self.rows, self.signs = weights @ self.rows, values[chosen].sign()

    def _size(self, values: Tensor) -> Tensor:
        return values.abs() if self.magnitude else values

    def _mixture(self, vectors: Tensor, shares: Tensor) -> Tensor:
        chosen = shares > SHARE * shares.max()
        return (vectors[:, chosen] * shares[chosen].sqrt()).T.to(self.rows.device, self.rows.dtype)

    def _imbalance(self, z: Tensor, mixture: Tensor) -> Tensor:
        """Return C of the rows ``mixture``·Y at g(z)⁻¹."""
        if not self.group.diagonal:
            return self.group.imbalance(self.group.act(mixture @ self.rows, z, inverse=True))
        squares = torch.empty(self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        for start in range(0, len(squares), COLUMNS):
            columns = slice(start, start + COLUMNS)
            squares[columns] = (mixture @ self.rows[:, columns]).square_().sum(0)
        return self.group.imbalance_of(self.group.act(squares[None], 2 * z, inverse=True)[0], None)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return ⟨left_i, right_j⟩, summed in float64 over short ranges."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for a, b in zip(left.split(COLUMNS, 1), right.split(COLUMNS, 1), strict=True):
        total += (a @ b.T).double().cpu()
    return total
