"""T090's root against bisection in 50 digits, and the start's quantile against simulation."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from torchflat.spectrum.bounds import growth_upper_bound, log_start_quantile, polynomial_upper_bound
from torchflat.spectrum.student import t_quantile

RITZ = st.lists(st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0, 1e-300, -1e8])), min_size=1, max_size=12)


def bisected(ritz: list[float], log_couplings: float, n: int, delta: float) -> Decimal:
    """The excess over max θ, from Σ ln(excess + gap) = Σ ln β + ln(√(2n/π)/δ)."""
    with localcontext() as context:
        context.prec = 50
        gaps = [Decimal(max(ritz)) - Decimal(value) for value in ritz]
        pi = Decimal("3.14159265358979323846264338327950288419716939937510")
        target = Decimal(log_couplings) + (Decimal(2 * n) / pi).ln() / 2 - Decimal(delta).ln()
        low, high = Decimal(-5000), Decimal(5000)
        for _ in range(90):
            middle = (low + high) / 2
            excess = middle.exp()
            low, high = (middle, high) if sum((excess + gap).ln() for gap in gaps) < target else (low, middle)
        return high.exp()


@settings(deadline=None, max_examples=25)
@given(RITZ, st.floats(-600, 50), st.integers(1, 10**7), st.floats(1e-6, 0.9))
@example([1.0] * 8, -200.0, 100, 0.5)
@example([0.0, -1e8, -1e8 + 1], -30.0, 100, 0.01)
@example([1.0], -700.0, 1, 0.5)
@example([0.0, *(-(10.0**-k) for k in range(1, 200))], -20000.0, 10, 0.1)
def test_root_agrees_with_bisection(ritz: list[float], log_couplings: float, n: int, delta: float) -> None:
    exact = bisected(ritz, log_couplings, n, delta)
    assume(Decimal(-690).exp() < exact < Decimal(690).exp())
    top = max(ritz)
    # Seen from zero, so that the excess is not rounded to the spacing of numbers near the top.
    if top == 0:
        found = polynomial_upper_bound(ritz, log_couplings, n, delta)
        assert float(exact) == pytest.approx(found, rel=1e-9)
    found = polynomial_upper_bound(ritz, log_couplings, n, delta)
    assert found - top == pytest.approx(float(exact), rel=1e-9, abs=4e-16 * max(abs(top), float(exact)))


@settings(deadline=None)
@given(RITZ, st.floats(-600, 50), st.integers(2, 1000), st.floats(1e-6, 0.9))
def test_bound_lies_above_every_ritz_value_and_grows_with_confidence(
    ritz: list[float], log_couplings: float, n: int, delta: float
) -> None:
    wide, narrow = (polynomial_upper_bound(ritz, log_couplings, n, d) for d in (delta / 2, delta))
    assert wide >= narrow >= max(ritz)


def test_spacing_invariance() -> None:
    ritz, couplings = [3.0, 1.0, -2.0], [0.5, 0.25, 0.125]
    log_couplings = sum(map(math.log, couplings))
    bound = polynomial_upper_bound(ritz, log_couplings, 50, 0.1)
    scaled = polynomial_upper_bound([1e9 * x for x in ritz], log_couplings + 3 * math.log(1e9), 50, 0.1)
    shifted = polynomial_upper_bound([x + 7 for x in ritz], log_couplings, 50, 0.1)
    assert scaled == pytest.approx(1e9 * bound, rel=1e-12)
    assert shifted == pytest.approx(bound + 7, rel=1e-12)


def test_one_step_in_closed_form() -> None:
    # λ − α = β · √(2n/π)/δ
    assert polynomial_upper_bound([2.0], math.log(3.0), 8, 0.5) == pytest.approx(2 + 3 * math.sqrt(16 / math.pi) / 0.5)


def test_zero_coupling_closes_the_bound() -> None:
    assert polynomial_upper_bound([1.0, -3.0], -math.inf, 100, 0.01) == 1.0
    assert polynomial_upper_bound([-5.0], -math.inf, 1, 0.9) == -5.0


def test_a_bound_beyond_all_numbers_is_infinite() -> None:
    assert polynomial_upper_bound([0.0], 800.0, 100, 0.5) == math.inf


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_start_is_rarely_almost_orthogonal(n: int) -> None:
    # By integration of the density (1 − t²)^((n−3)/2); in two dimensions the angle is uniform.
    for delta in (0.9, 0.5, 0.1, 0.01):
        s = min(1.0, math.exp(-log_start_quantile(n, delta)))
        angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
        weights = torch.cos(angles) ** (n - 2)
        inside = torch.trapezoid(weights * (angles <= math.asin(s)), angles) / torch.trapezoid(weights, angles)
        assert float(inside) <= delta + 1e-4
        if n == 30 and delta <= 0.5:
            assert float(inside) >= 0.9 * delta  # tight: nothing is given away


def test_growth_bound_is_the_polynomial_bound_of_a_power() -> None:
    # With all Ritz values at 0, Π(λ − θᵢ) = λᵏ.
    growth = growth_upper_bound(-12.0, 5, 40, 0.1)
    assert growth == pytest.approx(polynomial_upper_bound([0.0] * 5, -12.0, 40, 0.1), rel=1e-12)


def test_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 15, 30, 101, 1000):
        for confidence in (0.5, 0.9, 0.99, 0.9999):
            expected = stats.t.ppf(0.5 + confidence / 2, freedom)
            assert t_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-9)
