"""Deep linear networks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.problems.problem import Problem, same, spectral_norm, with_zeros

__all__ = ["DeepLinear", "multiplied"]


@dataclass(frozen=True, eq=False)
class DeepLinear(Problem):
    """f = mean over samples of |y − W_m⋯W₁x|² where y = Tx, T = W_m⋯W₁: a stack of linear layers with exact targets.

    With Σ the second moment of the inputs, P_k = W_{k−1}⋯W₁ before and Q_k = W_m⋯W_{k+1} after layer k, the nonzero
    eigenvalues of H are those of

        2 Σ_k (Σ^½ P_kᵀP_k Σ^½) ⊗ (Q_kQ_kᵀ),

    a d_x d_y × d_x d_y matrix (T060); the block of layer k is 2 (P_kΣP_kᵀ) ⊗ (Q_kᵀQ_k). Where all layers are
    scalars, H = 2στ²zzᵀ with z = 1/w and τ = Πw: λ₁ = 2στ² Σw_k⁻² (T056), which is 2mσ|τ|^{2(1−1/m)} at least (T057).
    The least λ₁ over all factorisations of T with white data is 2m‖T‖₂^{2(1−1/m)} (T061).

    With white data, where ‖W_k‖₂ = ‖T‖₂^{1/m} for all k, λ₁ is that (T065), and

        f°(r) = ((‖T‖₂^{1/m} + r/√m)^m − ‖T‖₂)².

    (The triangle inequality bounds the change of T by Π(‖W_k‖₂ + ‖D_k‖_F) − Π‖W_k‖₂, which is largest where all ‖D_k‖_F
    are equal, and the aligned top singular vectors attain it.) With Σ = cI, c times both.

    C is W_{k+1}ᵀW_{k+1} − W_kW_kᵀ, for any data (T080).

    ``weights`` are W₁ … W_m, ``inputs`` (rows, d_x).

    >>> chain = DeepLinear.chain((-2.0, 1.25, 1.0), second_moment=1.7)
    >>> round(chain.sharpness(), 4), round(2 * 1.7 * 2.5**2 * (1 / 4 + 1 / 1.25**2 + 1), 4)
    (40.1625, 40.1625)
    >>> round(chain.flattest().sharpness(), 8), round(chain.least_sharpness(), 8)
    (34.60882461, 34.60882461)
    """

    source: ClassVar[str] = "T056, T057, T060, T061, T064, T065, T080"

    weights: tuple[Tensor, ...]
    inputs: Tensor

    @classmethod
    def chain(cls, weights: tuple[float, ...], second_moment: float) -> DeepLinear:
        """Take scalar layers, on inputs whose mean square is ``second_moment``."""
        size = math.sqrt(second_moment)
        layers = tuple(torch.tensor([[w]], dtype=torch.float64) for w in weights)
        return cls(layers, torch.tensor([[size], [-size]], dtype=torch.float64))

    @classmethod
    def white(cls, weights: tuple[Tensor, ...]) -> DeepLinear:
        """Take these layers, on inputs whose second moment is the identity."""
        size = weights[0].shape[1]
        identity = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
        return cls(weights, torch.cat([identity, -identity]))

    @property
    def rows(self) -> int:
        """The number of inputs."""
        return len(self.inputs)

    def objective(self) -> Objective:
        """Return f of a stack of float64 linear layers, on the inputs and what the stack makes of them."""
        layers = [skip_init(nn.Linear, *w.T.shape, bias=False, dtype=torch.float64) for w in self.weights]
        for layer, weight in zip(layers, self.weights, strict=True):
            layer.weight.data.copy_(weight)
        inputs = self.inputs.double()
        targets = inputs @ self.product().T
        return Objective(nn.Sequential(*layers), _squared_distance, (inputs, targets))

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of T060's matrix, with zeros to make up the number."""
        values, vectors = torch.linalg.eigh(self._second_moment())
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        total = sum(2 * torch.kron(root @ P.T @ P @ root, Q @ Q.T) for P, Q in self._around_layers())
        assert isinstance(total, Tensor)
        return with_zeros(torch.linalg.eigvalsh(total), sum(w.numel() for w in self.weights))

    def sharpness(self) -> float:
        """Return the largest of them."""
        return float(self.eigenvalues()[-1])

    def block_sharpness(self) -> Mapping[str, float]:
        """Return 2 ‖P_kΣP_kᵀ‖₂ ‖Q_k‖₂² for every layer."""
        moment = self._second_moment()
        return {
            str(k): 2 * float(torch.linalg.eigvalsh(P @ moment @ P.T)[-1] * torch.linalg.eigvalsh(Q.T @ Q)[-1])
            for k, (P, Q) in enumerate(self._around_layers())
        }

    def product(self) -> Tensor:
        """Return T = W_m⋯W₁."""
        return multiplied(self.weights, self.inputs.shape[1])

    def least_sharpness(self) -> float | None:
        """Return 2mc‖T‖₂^{2(1−1/m)}, the least λ₁ of all networks with this product, where Σ = cI."""
        m, scale = len(self.weights), self._white_scale()
        return None if scale is None else 2 * m * scale * spectral_norm(self.product()) ** (2 - 2 / m)

    def variation(self, radius: float) -> float | None:
        """Return c((‖T‖₂^{1/m} + r/√m)^m − ‖T‖₂)² where all layers have the norm ‖T‖₂^{1/m} and Σ = cI."""
        m, scale, norm = len(self.weights), self._white_scale(), spectral_norm(self.product())
        if scale is None or not self._equal_norms():
            return None
        return float(scale * ((norm ** (1 / m) + radius / math.sqrt(m)) ** m - norm) ** 2)

    def order(self) -> tuple[float, float] | None:
        """Return (2, λ₁/2), for T ≠ 0."""
        return (2, self.sharpness() / 2) if self.sharpness() > 0 else None

    def flat(self) -> bool | None:
        """Say yes where all norms are equal, and no above the least sharpness if all layers are invertible.

        With invertible layers log λ₁ is convex along the geodesics of the group that connects all networks of this
        product, so that no local minimum is above the least. Other networks that attain the least sharpness may vary
        more at higher order: nothing is said about these, nor about data that is not white.
        """
        least = self.least_sharpness()
        if least is None:
            return None
        if self._equal_norms():
            return True
        square = all(w.shape == self.weights[0].shape[:1] * 2 for w in self.weights)
        singular = not (square and float(torch.linalg.cond(self.product())) < 1e12)
        return None if singular or same(self.sharpness(), least) else False

    def flattest(self) -> DeepLinear | None:
        """Take W_k = Σ_T^{1/m} between the singular vectors of T = UΣ_TVᵀ, the canonical flattest network (T061)."""
        if self._white_scale() is None:
            return None
        m, sizes = len(self.weights), [self.weights[0].shape[1], *map(len, self.weights)]
        U, values, Vh = torch.linalg.svd(self.product())
        layers = []
        for rows, columns in zip(sizes[1:], sizes[:-1], strict=True):
            layer = U.new_zeros(rows, columns)
            # The rank of T is no larger than any width: what does not fit is zero.
            k = min(rows, columns, len(values))
            layer.diagonal()[:k] = values[:k] ** (1 / m)
            layers.append(layer)
        layers[0] = layers[0] @ Vh
        layers[-1] = U @ layers[-1]
        return DeepLinear(tuple(layers), self.inputs)

    def at(self, x: Tensor) -> DeepLinear:
        """Return the same function at another point, W₁ … W_m, with the same product; another product is an error."""
        parts = x.double().split([w.numel() for w in self.weights])
        other = DeepLinear(tuple(p.view_as(w) for p, w in zip(parts, self.weights, strict=True)), self.inputs)
        off = spectral_norm(other.product() - self.product())
        if not same(off, 0.0):
            raise UsageError(f"the product at x is {off:.3g} away from T, which the targets come from: see objective()")
        return other

    def conserved(self) -> Tensor:
        """Return all W_{k+1}ᵀW_{k+1} − W_kW_kᵀ, k < m, each flat, one after the other."""
        weights = [w.double() for w in self.weights]
        gaps = [after.T @ after - before @ before.T for before, after in itertools.pairwise(weights)]
        return torch.cat([gap.flatten() for gap in gaps]) if gaps else torch.zeros(0, dtype=torch.float64)

    def gains(self) -> list[float]:
        """Return ‖W_k⋯W₁‖₂ for k = 1, …, m: the largest gain from the input to every layer.

        In a flattest network the gain of the end-to-end top singular vector is ‖T‖₂^{k/m}, and no gain is more than √m
        times that (T064).
        """
        size = self.inputs.shape[1]
        return [spectral_norm(multiplied(self.weights[: k + 1], size)) for k in range(len(self.weights))]

    def coupling(self) -> list[tuple[Tensor, Tensor]]:
        """Return (r_k, q_k) = (P_kv, Q_kᵀu) for every layer, with (u, v) the top singular pair of T.

        In a flattest network, with σ = ‖T‖₂ and r̄, q̄ of unit length: W_k r̄_k = σ^{1/m} q̄_k, r̄_{k+1} = q̄_k,
        |r_k| = σ^{(k−1)/m} and |q_k| = σ^{1−k/m} (T064).
        """
        U, _, Vh = torch.linalg.svd(self.product())
        return [(P @ Vh[0], Q.T @ U[:, 0]) for P, Q in self._around_layers()]

    def _equal_norms(self) -> bool:
        common = spectral_norm(self.product()) ** (1 / len(self.weights))
        return all(same(spectral_norm(w), common) for w in self.weights)

    def _white_scale(self) -> float | None:
        """Return c if Σ = cI."""
        moment = self._second_moment()
        scale = float(moment.trace()) / len(moment)
        white = torch.allclose(moment, scale * torch.eye(len(moment)).double(), rtol=0, atol=1e-12 * scale)
        return scale if white else None

    def _second_moment(self) -> Tensor:
        return self.inputs.double().T @ self.inputs.double() / len(self.inputs)

    def _around_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return (P_k, Q_k) for every layer."""
        return [
            (multiplied(self.weights[:k], self.inputs.shape[1]), multiplied(self.weights[k + 1 :], len(w)))
            for k, w in enumerate(self.weights)
        ]


def multiplied(weights: Sequence[Tensor], size: int) -> Tensor:
    """Return the product of the weights in float64, the last leftmost; the identity of this size if there are none."""
    identity = torch.eye(size, dtype=torch.float64)
    return functools.reduce(lambda product, weight: weight.double() @ product, weights, identity)


def _squared_distance(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum(1).mean()
