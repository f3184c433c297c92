"""Deep linear networks."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from torchflat.objective import Objective
from torchflat.problems.problem import Problem, with_zeros

__all__ = ["DeepLinear"]


@dataclass(frozen=True, eq=False)
class DeepLinear(Problem):
    """f = mean over samples of |y − W_m⋯W₁x|² where y = Tx, T = W_m⋯W₁: a stack of linear layers with exact targets.

    With Σ the second moment of the inputs, P_k = W_{k−1}⋯W₁ before and Q_k = W_m⋯W_{k+1} after layer k, the nonzero
    eigenvalues of H are those of

        2 Σ_k (Σ^½ P_kᵀP_k Σ^½) ⊗ (Q_kQ_kᵀ),

    a d_x d_y × d_x d_y matrix (T060); the block of layer k is 2 (P_kΣP_kᵀ) ⊗ (Q_kᵀQ_k). Where all layers are
    scalars, H = 2στ²zzᵀ with z = 1/w and τ = Πw: λ₁ = 2στ² Σw_k⁻² (T056), which is 2mσ|τ|^{2(1−1/m)} at least (T057).
    The least λ₁ over all factorisations of T with white data is 2m‖T‖₂^{2(1−1/m)} (T061).

    ``weights`` are W₁ … W_m, ``inputs`` (rows, d_x).

    >>> chain = DeepLinear.chain((-2.0, 1.25, 1.0), second_moment=1.7)
    >>> round(chain.sharpness(), 4), round(2 * 1.7 * 2.5**2 * (1 / 4 + 1 / 1.25**2 + 1), 4)
    (40.1625, 40.1625)
    """

    source: ClassVar[str] = "T056, T060"

    weights: tuple[Tensor, ...]
    inputs: Tensor

    @classmethod
    def chain(cls, weights: tuple[float, ...], second_moment: float) -> DeepLinear:
        """Take scalar layers, on inputs whose mean square is ``second_moment``."""
        size = math.sqrt(second_moment)
        return cls(tuple(torch.tensor([[w]]) for w in weights), torch.tensor([[size], [-size]], dtype=torch.float64))

    @classmethod
    def white(cls, weights: tuple[Tensor, ...]) -> DeepLinear:
        """Take these layers, on inputs whose second moment is the identity."""
        size = weights[0].shape[1]
        identity = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
        return cls(weights, torch.cat([identity, -identity]))

    def objective(self) -> Objective:
        """Return f of a stack of float64 linear layers, on the inputs and what the stack makes of them."""
        layers = [skip_init(nn.Linear, *w.T.shape, bias=False, dtype=torch.float64) for w in self.weights]
        for layer, weight in zip(layers, self.weights, strict=True):
            layer.weight.data.copy_(weight)
        inputs = self.inputs.double()
        targets = inputs @ _product(self.weights, self.inputs.shape[1]).T
        return Objective(nn.Sequential(*layers), _squared_distance, (inputs, targets))

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of T060's matrix, with zeros to make up the number."""
        values, vectors = torch.linalg.eigh(self._second_moment())
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        total = sum(2 * torch.kron(root @ P.T @ P @ root, Q @ Q.T) for P, Q in self._around_layers())
        assert isinstance(total, Tensor)
        return with_zeros(torch.linalg.eigvalsh(total), sum(w.numel() for w in self.weights))

    def block_sharpness(self) -> Mapping[str, float]:
        """Return 2 ‖P_kΣP_kᵀ‖₂ ‖Q_k‖₂² for every layer."""
        moment = self._second_moment()
        return {
            str(k): 2 * float(torch.linalg.eigvalsh(P @ moment @ P.T)[-1] * torch.linalg.eigvalsh(Q.T @ Q)[-1])
            for k, (P, Q) in enumerate(self._around_layers())
        }

    def _second_moment(self) -> Tensor:
        return self.inputs.double().T @ self.inputs.double() / len(self.inputs)

    def _around_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return (P_k, Q_k) for every layer."""
        return [
            (_product(self.weights[:k], self.inputs.shape[1]), _product(self.weights[k + 1 :], len(w)))
            for k, w in enumerate(self.weights)
        ]


def _product(weights: tuple[Tensor, ...], size: int) -> Tensor:
    """Return the product of the weights, the last leftmost; the identity of this size if there are none."""
    identity = torch.eye(size, dtype=torch.float64)
    return functools.reduce(lambda product, weight: weight.double() @ product, weights, identity)


def _squared_distance(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum(1).mean()
