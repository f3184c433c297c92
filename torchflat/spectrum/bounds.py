"""What a Krylov run from a random start proves about eigenvalues it may not have seen (T090)."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["growth_upper_bound", "log_start_quantile", "polynomial_upper_bound"]


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


def _log_sum(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b)) without overflow."""
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
