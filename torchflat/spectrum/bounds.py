"""What a Krylov run from a random start proves about eigenvalues it may not have seen (T090)."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["growth_upper_bound", "log_start_quantile", "polynomial_upper_bound"]


def log_start_quantile(n: int, delta: float) -> float:
    """log(√(2n/π)/δ).

    With u uniform on the unit sphere of ℝⁿ and v a fixed unit vector, P(|⟨v,u⟩| ≤ s) ≤ s·√(2n/π). So with probability
    at least 1 − δ, 1/|⟨v,u⟩| is at most the exponential of this number.
    """
    return 0.5 * math.log(2 * n / math.pi) - math.log(delta)


def polynomial_upper_bound(ritz: Sequence[float], log_couplings: float, n: int, delta: float) -> float:
    """Upper bound on λ₁ of a symmetric n × n matrix, with probability at least 1 − δ over the random start (T090).

    After k Lanczos steps from a unit start u, with Ritz values θᵢ and couplings βⱼ, the residual polynomial gives
    |⟨v₁,u⟩| · Π(λ₁ − θᵢ) ≤ Πβⱼ. The start has almost no component along v₁ with probability δ only; otherwise

        Σ log(λ₁ − θᵢ) ≤ Σ log βⱼ + log(√(2n/π)/δ),

    whose root above max θᵢ is returned. The event is one per run: the bound may be evaluated at every step, and the
    run stopped at any of them.

    Args:
        ritz: the k Ritz values, in any order.
        log_couplings: Σ log βⱼ over j = 1…k, the norm of the last residual included; −inf if the space is exhausted.
        n: dimension of the sphere that the start was drawn from.
        delta: probability of a miss.

    >>> polynomial_upper_bound([1.0], math.log(0.5), n=4, delta=0.5) == 1.0 + 0.5 * math.sqrt(8 / math.pi) / 0.5
    True
    """
    top = max(ritz)
    gaps = [top - value for value in ritz]
    target = log_couplings + log_start_quantile(n, delta)
    if target == -math.inf:
        return top
    # Solve Σ log(exp(s) + gapᵢ) = target for s = log(λ − top). The sum is convex and increasing in s, so Newton from the
    # right stays on the right: whatever the number of iterations, the result is an upper bound. At the start below one
    # factor at least is as large as the target's geometric mean.
    s = max(target / len(gaps), target - sum(math.log(gap) for gap in gaps if gap > 0))
    for _ in range(100):
        excess = sum(map(_log_sum, [s] * len(gaps), gaps)) - target
        slope = sum(1 / (1 + gap * math.exp(-s)) if s > -700 else float(gap == 0) for gap in gaps)
        step = excess / slope
        s -= step
        if abs(step) <= 1e-12 * max(1.0, abs(s)):
            break
    return top + math.exp(s) if s < 700 else math.inf


def _log_sum(s: float, gap: float) -> float:
    """log(exp(s) + gap) without overflow."""
    if gap == 0:
        return s
    log_gap = math.log(gap)
    return max(s, log_gap) + math.log1p(math.exp(-abs(s - log_gap)))


def growth_upper_bound(log_growth: float, steps: int, n: int, delta: float) -> float:
    """Upper bound on max |λ| from ``steps`` power iterations: with probability ≥ 1 − δ over a random unit start u,

        max |λ|ᵏ ≤ ‖Hᵏu‖ · √(2n/π)/δ,        log_growth = log ‖Hᵏu‖.

    It is T090's inequality for the polynomial λᵏ, and narrows like log(n)/k only.

    >>> growth_upper_bound(10 * math.log(2.0), steps=10, n=100, delta=0.01) > 2.0
    True
    """
    return math.exp((log_growth + log_start_quantile(n, delta)) / steps)
