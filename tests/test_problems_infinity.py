"""The sheet's numbers for functions whose descent escapes."""

from __future__ import annotations

import math

import pytest

from torchflat.problems import EscapingFunction, MaskedProduct, ReluPlateau, SigmoidPair

ORIGIN = MaskedProduct((0.0, 0.0, 0.0, 0.0))
PROBLEMS: list[EscapingFunction] = [ORIGIN, ReluPlateau((-1.0, 0.5)), SigmoidPair((0.0, 0.0), (1.0, -3.0))]


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_t073_critical_points(t: float) -> None:
    points = [(t, t, 1 / t, 1 / t), (t, 0, 1 / t, -1 / t), (t, -t, 0, -1 / t), (0, 0, 0, 0)]
    critical = [ORIGIN.at(point).objective() for point in points]
    assert [f.value() for f in critical] == pytest.approx([0, 2, 2, 3], abs=1e-14)
    assert max(float(f.gradient().abs().max()) for f in critical) < 1e-14


def test_t073_the_origin_is_a_strict_saddle() -> None:
    assert ORIGIN.eigenvalues()[0] < 0
    assert ORIGIN.at((1.0, 1.0, 1.0, 1.0)).eigenvalues() is None


@pytest.mark.parametrize("t", [1.0, 3.0, 10.0])
def test_t074_value_along_the_escape(t: float) -> None:
    assert ORIGIN.escaped(t).objective().value() == pytest.approx(1 + 2 / t**2 + 1 / t**4, rel=1e-13)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_escapes_tend_to_the_stuck_value_above_the_infimum(problem: EscapingFunction) -> None:
    assert problem.escaped(30.0).objective().value() == pytest.approx(problem.stuck(), abs=3e-3)
    assert problem.infimum() < problem.stuck()
    gradients = [float(problem.escaped(t).objective().gradient().norm()) for t in (3.0, 30.0)]
    assert gradients[1] <= gradients[0] and gradients[1] < 0.1


def test_t076b_plateau() -> None:
    plateau = ReluPlateau((-1.0, 0.5))
    assert plateau.objective().value() == 1
    assert plateau.variation(1.0) == 0 and plateau.variation(1.01) is None
    assert plateau.at((1.0, 1.0)).objective().value() == plateau.infimum() == 0
    assert plateau.at((1.0, 1.0)).flat() is None


def test_t076_two_ends() -> None:
    problem = SigmoidPair((0.0, 0.0), (1.0, -3.0))
    assert (problem.infimum(), problem.stuck()) == (0.5, 4.5)
    assert problem.at((-40.0, -3.0)).objective().value() == pytest.approx(0.5, rel=1e-14)
    assert problem.at((40.0, 1.0)).objective().value() == pytest.approx(4.5, rel=1e-14)
    # The other way round is its mirror image.
    mirrored = SigmoidPair((0.0, 0.0), (3.0, -1.0)).escaped(40.0)
    assert mirrored.point == pytest.approx((-40, -1), rel=1e-14)
    assert mirrored.objective().value() == pytest.approx(4.5, rel=1e-14)


def test_t076_gradient_flow_is_left_with_the_larger_value() -> None:
    # The sheet's flow from (4, 1.5), T = 2000, ends at f = 4.500496, w₁ = 8.7066: Euler steps of ½ follow it.
    problem, x, step = SigmoidPair((4.0, 1.5), (1.0, -3.0)), [4.0, 1.5], 0.5
    first, second = problem.targets
    for _ in range(4000):
        up, down = 1 / (1 + math.exp(-x[0])), 1 / (1 + math.exp(x[0]))
        one, two = x[1] * up - first, x[1] * down - second
        x = [x[0] - step * (one - two) * x[1] * up * down, x[1] - step * (one * up + two * down)]
    end = problem.at(x)
    assert end.point[0] == pytest.approx(8.7066, abs=2e-3)
    assert end.objective().value() == pytest.approx(4.500496, abs=2e-6)


def test_t077_best_second_factor() -> None:
    best = SigmoidPair((1.7, 0.0), (1.0, -1.0)).best_factor()
    assert best.point == pytest.approx((1.7, 0.9354090706), abs=1e-10)
    assert best.objective().value() == pytest.approx(0.6767836748, abs=1e-10)
    assert best.point[1] == pytest.approx(math.tanh(1.7), rel=1e-14)
    assert best.objective().value() == pytest.approx(1 / (1 + math.tanh(0.85) ** 2), rel=1e-14)
    assert float(best.objective().gradient()[1]) == pytest.approx(0, abs=1e-15)


def test_t077_the_only_critical_point_is_a_strict_saddle() -> None:
    origin = SigmoidPair((0.0, 0.0), (1.0, -1.0))
    assert origin.objective().value() == 1
    assert origin.objective().gradient().tolist() == [0, 0]
    assert origin.eigenvalues().tolist() == pytest.approx([(1 - math.sqrt(5)) / 4, (1 + math.sqrt(5)) / 4], rel=1e-14)
