"""What a Krylov run from a random start proves about eigenvalues it may not have seen (T090)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchflat.spectrum.student import t_quantile

__all__ = [
    "coupled_upper_bound",
    "growth_upper_bound",
    "log_start_quantile",
    "polynomial_upper_bound",
    "sampled_mean_upper_bound",
]


def log_start_quantile(n: int, delta: float) -> float:
    """Return log(√(2n/π)/δ).

    With u uniform on the unit sphere of ℝⁿ, n ≥ 2, and v a fixed unit vector, P(|⟨v,u⟩| ≤ s) ≤ s·√(2n/π). So with
    probability at least 1 − δ, 1/|⟨v,u⟩| is at most the exponential of this number.
    """
    return 0.5 * math.log(2 * n / math.pi) - math.log(delta)


def polynomial_upper_bound(ritz: Sequence[float], log_couplings: float, n: int, delta: float) -> float:
    """Bound λ₁ of a symmetric n × n matrix from above, with probability at least 1 − δ over the random start (T090).

    After k Lanczos steps from a unit start u, with Ritz values θᵢ and couplings βⱼ, the residual polynomial gives
    |⟨v₁,u⟩| · Π(λ₁ − θᵢ) ≤ Πβⱼ. The start has almost no component along v₁ with probability δ only; otherwise

        Σ log(λ₁ − θᵢ) ≤ Σ log βⱼ + log(√(2n/π)/δ),

    whose root above max θᵢ is returned. The event is one per run: the bound may be evaluated at every step, and the
    run stopped at any of them.

    Args:
        ritz: the k Ritz values, in any order.
        log_couplings: Σ log βⱼ over j = 1…k, the norm of the last residual included; −inf if the space is exhausted.
        n: dimension of the sphere that the start was drawn from, at least 2 unless the space is exhausted.
        delta: probability of a miss.

    >>> polynomial_upper_bound([1.0], math.log(0.5), n=4, delta=0.5) == 1.0 + 0.5 * math.sqrt(8 / math.pi) / 0.5
    True
    """
    top = max(ritz)
    target = log_couplings + log_start_quantile(n, delta)
    if target == -math.inf:
        return top
    log_gaps = [math.log(top - value) if value < top else -math.inf for value in ritz]
    # Solve F(s) = Σ log(exp(s) + gapᵢ) = target for s = log(λ − top). F is convex and increasing, with slope ≥ 1, so
    # Newton from the right stays on the right: whatever the number of iterations, the result is an upper bound. Every
    # summand is at least s, so s = target/k lies right of the root.
    s = target / len(log_gaps)
    for _ in range(100):
        sums = [_log_sum(s, log_gap) for log_gap in log_gaps]
        step = (math.fsum(sums) - target) / math.fsum(math.exp(s - value) for value in sums)
        s -= step
        if step <= 1e-13 * max(1.0, abs(s)):
            break
    return top + math.exp(s) if s < 700 else math.inf


def growth_upper_bound(log_growth: float, steps: int, n: int, delta: float) -> float:
    """Bound |λ₁| from above by ``steps`` power iterations, with probability at least 1 − δ over a random unit start u.

        |λ₁|ᵏ ≤ ‖Hᵏu‖ · √(2n/π)/δ,        log_growth = log ‖Hᵏu‖.

    It is T090's inequality for the polynomial λᵏ, and narrows like log(n)/k only.

    >>> growth_upper_bound(10 * math.log(2.0), steps=10, n=100, delta=0.01) > 2.0
    True
    """
    return math.exp((log_growth + log_start_quantile(n, delta)) / steps)


def coupled_upper_bound(ritz: Tensor, gram: Tensor, rest: float) -> float:
    """Bound λ₁ of a symmetric matrix from what it does on a subspace and a bound on the complement (T092).

    For orthonormal Y (n, p) with YᵀHY = diag(θ), R = HY − Yθ and wᵀHw ≤ μ|w|² for all w orthogonal to Y,

        λ₁(H) ≤ λ_max [[diag(θ), L], [Lᵀ, μI]],      LLᵀ = RᵀR:

    for a unit vector Yc + w, 2cᵀRᵀw sees w only within the range of R.

    Args:
        ritz: θ, (p,) float64.
        gram: RᵀR, (p, p) float64.
        rest: μ; −inf if there is no complement.

    >>> coupled_upper_bound(torch.tensor([2.0]).double(), torch.tensor([[0.0]]).double(), 1.0)
    2.0
    """
    if rest == -math.inf:
        return float(ritz.max())
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    block = torch.cat(
        [
            torch.cat([torch.diag(ritz), root], dim=1),
            torch.cat([root.T, rest * torch.eye(len(ritz), dtype=ritz.dtype)], dim=1),
        ]
    )
    return float(torch.linalg.eigvalsh(block)[-1])


def sampled_mean_upper_bound(sample: Sequence[float], delta: float) -> float:
    """Bound the mean of a distribution from above by a sample of it, with probability at least 1 − δ.

        ȳ + t·s/√m,      t the 1 − δ quantile of Student's distribution with m − 1 degrees of freedom,

    for m ≥ 2 numbers that scatter like a normal variable.

    >>> sampled_mean_upper_bound([1.0, 3.0], 0.5)
    2.0
    """
    m = len(sample)
    mean = math.fsum(sample) / m
    deviation = math.sqrt(math.fsum((y - mean) ** 2 for y in sample) / (m - 1))
    return mean + t_quantile(max(0.0, 1 - 2 * delta), m - 1) * deviation / math.sqrt(m)


def _log_sum(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b)) without overflow."""
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
