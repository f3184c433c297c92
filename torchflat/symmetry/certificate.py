"""What shows that a point is the flattest of its orbit: a mixture of top eigenvectors with C = 0."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchflat.result import Answer
from torchflat.symmetry.group import Group

__all__ = ["Certificate", "balanced_mixture"]

ITERATIONS = 200
# Vectors with smaller weights are left out.
LEAST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Certificate(Answer):
    """A mixture V = Σ w_i v_i v_iᵀ of orthonormal vectors in the span of top eigenvectors, whose C(V) is nearly zero.

    C(V) = 0 for some mixture of top eigenvectors is what makes a point the flattest (T085, T086; with one vector it
    need not be so, T018). ``vectors`` (m, n) lie in the span of the lower model's eigenvectors at the point returned
    whose eigenvalues are within rtol of λ₁, ``values`` are v_iᵀMv_i for the model M, and ``residual`` is Σ|C(V)| over
    channels, with the eigenvalues of C for full couplings. It is at most 1 for exponents ±1, and more where channels
    overlap.
    """

    weights: tuple[float, ...]
    values: tuple[float, ...]
    vectors: Tensor = field(repr=False)
    residual: float


def balanced_mixture(group: Group, values: Tensor, rows: Tensor) -> Certificate:
    """Minimise |C(V)|² over mixtures V = Σ W_ab v_a v_bᵀ of the orthonormal ``rows`` (m, n), W ⪰ 0 with trace 1.

    C is linear in W: a convex problem in m(m+1)/2 numbers, solved in a square root of W.
    """
    count = len(rows)
    single = [group.imbalance(row[None]) for row in rows]
    C = torch.stack(
        [
            torch.stack(
                [(group.imbalance((rows[a] + rows[b])[None]) - single[a] - single[b]) / 2 for b in range(count)]
            )
            for a in range(count)
        ]
    ).flatten(0, 1)
    gram = C @ C.T
    root = (torch.eye(count, dtype=torch.float64) / count**0.5).requires_grad_()
    solver = torch.optim.LBFGS([root], max_iter=ITERATIONS, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def mixture() -> Tensor:
        W: Tensor = root @ root.T
        return W.div(W.trace())

    def closure() -> Tensor:
        solver.zero_grad()
        W = mixture().flatten()
        loss = W @ gram @ W
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    W = mixture().detach()
    weights, rotation = torch.linalg.eigh((W + W.T) / 2)
    kept = weights > LEAST_WEIGHT
    tops = (rotation.square() * values[:, None]).sum(0)[kept].tolist()
    residual = group.magnitude(W.flatten() @ C)
    vectors = rotation[:, kept].T.to(rows.device, rows.dtype) @ rows
    return Certificate(tuple(weights[kept].tolist()), tuple(tops), vectors, residual)
