"""The sheet's numbers for functions of a few variables."""

from __future__ import annotations

import math

import pytest
import torch

from torchflat.problems import (
    Bilinear,
    Cubic,
    Determinants,
    EquivalentPoints,
    MaximumOfThree,
    Monomial,
    Parabola,
    QuarticTie,
    ReluProduct,
    SixthOrderTie,
    SquareOrAbsolute,
    WeightedSquares,
)


def product(x1: float, power: int = 2) -> Monomial:
    return Monomial((x1, 1 / x1), (1, 1), power=power)


def test_t001_minimum_of_square_and_absolute_value() -> None:
    value = SquareOrAbsolute((0.0, 0.0)).variation(0.3)
    assert value == pytest.approx(0.08309518948, abs=1e-11)
    # The level distance √(ℓ + ℓ²) is the inverse.
    assert math.sqrt(value + value**2) == pytest.approx(0.3, rel=1e-14)


def test_t005_the_order_at_the_kink_is_2_though_the_lipschitz_modulus_is_1() -> None:
    problem = SquareOrAbsolute((0.0, 0.0))
    assert problem.order() == (2, 1)
    assert problem.variation(1e-4) / 1e-8 == pytest.approx(1, abs=1e-7)
    beside = problem.at((1e-3, 1e-8)).objective().gradient()
    assert float(beside.norm()) == 1
    assert float(problem.objective().gradient().norm()) == 0


def test_t002_t006_product_at_its_flat_minimum() -> None:
    assert product(1.0).variation(0.2) == pytest.approx(0.09171370850, abs=1e-11)
    assert product(1.0, 4).variation(0.1) == pytest.approx(4.596398782e-4, rel=1e-9)
    assert product(1.0, 1).variation(0.2) == pytest.approx(math.sqrt(2) * 0.2 + 0.02, rel=1e-14)


@pytest.mark.parametrize(("radius", "value", "slope"), [(0.05, 0.0107513962, 0.43268), (0.2, 0.1790104374, 1.84099)])
def test_t094_product_elsewhere(radius: float, value: float, slope: float) -> None:
    problem = product(2.0)
    assert problem.variation(radius) == pytest.approx(value, abs=1e-10)
    h = 1e-5
    assert (problem.variation(radius + h) - problem.variation(radius - h)) / (2 * h) == pytest.approx(slope, abs=1e-5)


def test_t004_lipschitz_modulus() -> None:
    assert product(2.0, 1).order() == (1, pytest.approx(2.0615528128, abs=1e-10))


def test_t015_sharpness_along_the_flow_to_the_flat_minimum() -> None:
    # The flow of −∇(x₁² − x₂²)²/4 from (3, 1/3): x₁ = e^θ, tanh θ = 0.8e^{−4t}, λ₁ = 4cosh 2θ.
    theta = math.atanh(0.8 * math.exp(-0.4))
    assert math.exp(theta) == pytest.approx(1.820089175, abs=1e-9)
    assert product(3.0).sharpness() == pytest.approx(18.22222222, abs=1e-8)
    assert product(math.exp(theta)).sharpness() == pytest.approx(7.229181857, abs=1e-9)


def test_t037_normalised_steps_shrink_what_the_flow_conserves() -> None:
    problem, step = product(1.0).at((2.0, 0.7)), 0.3
    gradient = problem.objective().gradient()
    moved = problem.at(torch.tensor(problem.point, dtype=torch.float64) - step * gradient / gradient.norm())
    assert float(moved.conserved() / problem.conserved()) == pytest.approx(0.9799554566, abs=1e-10)
    assert 1 - step**2 / (2**2 + 0.7**2) == pytest.approx(0.9799554566, abs=1e-10)


def test_t038_limit_of_the_gradient_flow() -> None:
    limit = product(1.817354021)
    assert limit.point[1] == pytest.approx(0.5502505227, abs=1e-9)
    assert limit.conserved().tolist() == pytest.approx(product(1.0).at((2.0, 1.0)).conserved().tolist(), abs=1e-8)


def test_t044_the_conserved_quantity_of_the_gradient_points_back() -> None:
    problem = Monomial((1.3, 0.8, 1.1), (1, 2, 3))
    x, v = (torch.tensor(values, dtype=torch.float64) for values in (problem.point, problem.exponents))
    C = problem.conserved()
    monomial = float((x**v).prod())
    expected = -4 * (monomial - 1) ** 2 * v[-1] * monomial**2 / x[-1] ** 2 * (v[:-1] * C**2 / x[:-1] ** 2).sum()
    assert float(C @ problem.at(problem.objective().gradient()).conserved()) == pytest.approx(
        float(expected), rel=1e-12
    )


@pytest.mark.parametrize(("x1", "norm"), [(2.0, 433.5), (1.0, 96), (-1.0, 96)])
def test_t028_norm_of_the_fourth_derivative(x1: float, norm: float) -> None:
    problem = product(x1, 4)
    p, a = problem.order()
    assert p == 4
    assert math.factorial(4) * a == pytest.approx(norm, rel=1e-14)
    assert problem.flat() == (abs(x1) == 1)
    assert problem.eigenvalues().tolist() == [0, 0]


def test_t007_fourth_derivative_of_a_quarter_of_the_fourth_power() -> None:
    # ‖f⁗‖ = 3!|F′|⁴ for f = F⁴/4.
    assert math.factorial(4) * product(2.0, 4).order()[1] / 4 == pytest.approx(108.375, rel=1e-14)


@pytest.mark.parametrize(("a", "radius"), [(0.0, 1.0), (0.5, 0.86419270), (1.0, 0.68692374), (2.0, 0.44375847)])
def test_t008_radius_up_to_which_all_points_are_equivalent(a: float, radius: float) -> None:
    problem = EquivalentPoints((0.0, 0.0, a))
    assert problem.radius() == pytest.approx(radius, abs=1e-8)
    assert problem.radius() >= 1 / (1 + a**2)
    assert problem.variation(0.99 * radius) == (0.99 * radius) ** 2
    assert problem.variation(1.01 * radius) is None
    # Beyond it something else is larger: the point that the formula says.
    r, s = 1.01 * radius, torch.linspace(-1, 1, 2001).double() * 1.01 * radius
    sideways = torch.stack([torch.zeros_like(s), (r**2 - s**2).clamp(min=0).sqrt(), a + s])
    assert float(problem.function(sideways).max()) > r**2
    assert problem.flat() and problem.at((0.0, 0.0, -a)).flat()


def test_t009_a_tie_that_order_six_decides() -> None:
    problem = SixthOrderTie((0.0, 0.0, 3.0))
    value, r = problem.variation(0.3), 0.3
    assert value == pytest.approx(0.09364689648776, abs=1e-14)
    assert value > r**2 + 5 * r**6
    flattest = problem.flattest()
    assert flattest.variation(r) == pytest.approx(r**2 + r**6, rel=1e-14)
    assert flattest.flat() and not problem.flat()
    excess = problem.variation(0.1) - (0.1**2 + 5 * 0.1**6)
    assert excess == pytest.approx(4 * 0.1**12, rel=1e-2, abs=0)


def test_t010_cone() -> None:
    cone = WeightedSquares((1.0, math.sqrt(2)), (2.0, -1.0), level=0.0, power=1)
    assert cone.order() == (1, pytest.approx(4.898979486, abs=1e-9))
    assert cone.flattest().order() == (2, 2)
    assert cone.flattest().variation(0.3) == pytest.approx(2 * 0.3**2, rel=1e-14)


def test_t016_strictly_flat_though_no_maximal_subgradient_is_balanced() -> None:
    flattest = MaximumOfThree((2.0, 0.5, 0.5, 2.0))
    assert flattest.flat()
    assert flattest.order() == (1, pytest.approx(math.sqrt(17) / 2, rel=1e-15))
    for t in (0.9, 0.99, 1.01, 1.1, -2.0):
        other = flattest.at((2 * t, 1 / (2 * t), t / 2, 2 / t))
        assert other.solved() and not other.flat()
        assert other.order()[1] > flattest.order()[1]
        assert other.variation(1e-3) > flattest.variation(1e-3)
    subgradients = flattest.maximal_subgradients()
    assert sorted(map(tuple, subgradients.abs().tolist())) == 2 * [(0, 0, 2, 0.5)] + 2 * [(0.5, 2, 0, 0)]
    laws = [float(flattest.at(v).conserved()) for v in subgradients]
    assert sorted(laws) == [-3.75, -3.75, 3.75, 3.75]
    assert float(flattest.conserved()) == 0


def test_t018_flat_though_no_top_eigenvector_is_balanced() -> None:
    flattest = Determinants((0.0, 0.0, 1.0, 0.0, 0.0, 1.0))
    assert flattest.eigenvalues().tolist() == [0, 0, 0, 0.5, 1, 1]
    assert not flattest.conserved().any()
    hessian = flattest.objective().hvp(torch.eye(6, dtype=torch.float64))
    for angle in (0.0, 0.4, 2.0):
        v = torch.tensor([math.cos(angle), math.sin(angle), 0, 0, 0, 0], dtype=torch.float64)
        torch.testing.assert_close(hessian @ v, v)
        assert float(flattest.at(v).conserved().norm()) == pytest.approx(1 / math.sqrt(2), rel=1e-14)
    # A mixture of two that are orthogonal is.
    both = [flattest.at([*e, 0, 0, 0, 0]).conserved() for e in ((1, 0), (0, 1))]
    assert not (both[0] + both[1]).any()


@pytest.mark.parametrize("s", [1.0, 1.1, 2.0, 0.5])
def test_t018_sharpness_along_the_orbit(s: float) -> None:
    c, d = math.cos(0.3), math.sin(0.3)
    problem = Determinants((0.0, 0.0, s * c, d / s, -s * d, c / s))
    s1 = max(s, 1 / s)
    assert problem.sharpness() == pytest.approx(max(s1**2, (s1**2 + s1**-2) / 4), rel=1e-14)
    assert problem.flat() == (s == 1)


@pytest.mark.parametrize(("x2", "ratio"), [(0.0, 1.0), (0.3, 1.09), (1.0, 2.0), (-1.0, 2.0), (2.0, 5.0)])
def test_t027_relu_on_the_edge(x2: float, ratio: float) -> None:
    problem = ReluProduct((0.0, x2, 1.0))
    assert problem.variation(1e-3) / 1e-6 == pytest.approx(ratio, abs=0.005)
    assert problem.order() == (2, pytest.approx(1 + x2**2, rel=1e-15))
    assert problem.flat() == (x2 == 0)
    assert (problem.eigenvalues() is None) == (x2 != 0)


def test_t027_relu_on_both_sides() -> None:
    inactive, active = ReluProduct((-0.5, 3.0, 1.0)), ReluProduct((0.5, 2.0, 0.0))
    assert inactive.flat() and not active.flat()
    assert inactive.variation(0.4) == pytest.approx(0.16, rel=1e-14)
    assert inactive.variation(0.6) is None and active.variation(0.6) is None
    assert active.sharpness() == 2 * (1 + 0.25 + 4)
    assert ReluProduct((0.0, 0.0, 1.0)).variation(0.7) == pytest.approx(0.49, rel=1e-14)


def test_t035_normalised_descent_ends_beside_the_flat_minimum() -> None:
    problem, x = QuarticTie((3.2, 0.6)), [3.2, 0.6]
    ends = {999: (0.04401217, -0.05627909), 1000: (0.04400969, 0.25994868)}
    for k in range(1000):
        first, second = 2 * x[0] * x[1] ** 4, 2 * x[1] + 4 * x[0] ** 2 * x[1] ** 3
        if k in (0, 7):
            assert problem.at(x).objective().gradient().tolist() == pytest.approx([first, second], rel=1e-14)
        step = (k + 1) ** (-1 / 6) / math.hypot(first, second)
        x = [x[0] - step * first, x[1] - step * second]
        if k + 1 in ends:
            assert x == pytest.approx(ends[k + 1], abs=1e-8)


def test_t029_a_tie_that_order_four_decides() -> None:
    points = {x1: QuarticTie((x1, 0.0)) for x1 in (0.0, 1.0, 2.0, -2.0)}
    assert points[2.0].variation(0.1) == pytest.approx(0.01040003703992, abs=1e-13)
    assert points[0.0].variation(0.1) == pytest.approx(0.01, rel=1e-15)
    assert {problem.sharpness() for problem in points.values()} == {2}
    assert [problem.flat() for problem in points.values()] == [True, False, False, False]
    for r in (0.01, 0.1, 0.3):
        assert points[0.0].variation(r) < points[1.0].variation(r) < points[2.0].variation(r)
        assert points[2.0].variation(r) == points[-2.0].variation(r)
    r = 0.02
    assert points[1.0].variation(r) - r**2 - r**4 == pytest.approx(r**8, rel=0.01, abs=1e-18)


@pytest.mark.parametrize("exponents", [(1, 2), (1, 2, 3), (2, 2)])
def test_t032_variation_at_the_flat_minimum(exponents: tuple[int, ...]) -> None:
    flattest = Monomial(tuple(1.0 for _ in exponents), exponents).flattest()
    total, size = sum(exponents), math.hypot(*flattest.point)
    assert flattest.variation(0.1) == pytest.approx(((1 + 0.1 / size) ** total - 1) ** 2, rel=1e-14)
    assert flattest.variation(2 * size) is None
    assert flattest.conserved().tolist() == pytest.approx(len(exponents[1:]) * [0], abs=1e-15)


@pytest.mark.parametrize("x1", [0.0, 0.3, -1.0])
def test_t040_parabola(x1: float) -> None:
    problem = Parabola((x1, x1**2))
    assert problem.sharpness() == pytest.approx(2 * (1 + 4 * x1**2), rel=1e-15)
    assert problem.flat() == (x1 == 0)
    assert float(problem.conserved()) == pytest.approx(x1**2 * math.exp(4 * x1**2), rel=1e-14)


def test_t041_cubic() -> None:
    flattest = Cubic((1.0, 0.0)).flattest()
    assert flattest.point == pytest.approx((2 ** (-1 / 3),) * 2, rel=1e-15)
    assert flattest.sharpness() == pytest.approx(14.28660947, abs=1e-8)
    attractor = [flattest, Cubic((1.0, 0.0)), Cubic((0.0, 1.0))]
    assert [float(problem.conserved()) for problem in attractor] == [0, 0, 0]
    assert [problem.flat() for problem in attractor] == [True, False, False]
    assert float(Cubic((2.0, 0.5)).conserved()) == 1.5
    assert float(Cubic((2.0, -0.5)).conserved()) == 0.4


@pytest.mark.parametrize(
    ("weight", "point", "flat"),
    [(3.0, (1.0, 0.0), True), (-2.0, (-1.0, 0.0), True), (0.5, (1.0, 0.0), False), (0.5, (0.0, math.sqrt(2)), True)],
)
def test_t042_ellipse_and_hyperbola(weight: float, point: tuple[float, float], flat: bool) -> None:
    problem = WeightedSquares(point, (1.0, weight))
    assert problem.solved()
    assert problem.flat() == flat
    x1, x2 = 1.3, -0.4
    expected = x2**2 * abs(x1) ** (-2 * weight)
    assert problem.at((x1, x2)).conserved().tolist() == [pytest.approx(expected, rel=1e-14)]


def test_t043_bilinear() -> None:
    problem = Bilinear((1.0, 0.0, 0.5, 0.0), ((2.0, 1.0), (0.0, 3.0)))
    flattest = problem.flattest()
    assert flattest.sharpness() == pytest.approx(7.369611902, abs=1e-9)
    x = torch.tensor(flattest.point, dtype=torch.float64)
    assert float(x[:2].norm()) == pytest.approx(float(x[2:].norm()), rel=1e-14)
    assert flattest.conserved().tolist() == pytest.approx([0, 0], abs=1e-14)
    negative = Bilinear((1.0, 0.0, -1.0, 0.0), ((2.0, 1.0), (0.0, 3.0)), level=-2.0)
    assert negative.solved() and negative.flattest().solved()
    assert negative.flattest().sharpness() == pytest.approx(2 * 7.369611902, abs=1e-8)


@pytest.mark.parametrize("shape", [(1, 3), (3, 2), (2, 2)])
def test_t043_no_point_is_below_the_flattest(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(*shape, generator=generator, dtype=torch.float64)
    matrix = tuple(map(tuple, A.tolist()))
    flattest = None
    for _ in range(50):
        x, y = (torch.randn(size, generator=generator, dtype=torch.float64) for size in shape)
        scale = float((1 / (x @ A @ y)).abs()) ** 0.5
        y = y * torch.sign(x @ A @ y)
        problem = Bilinear(tuple(torch.cat([scale * x, scale * y]).tolist()), matrix)
        flattest = problem.flattest()
        assert problem.solved() and problem.sharpness() >= flattest.sharpness() * (1 - 1e-12)
    assert flattest is not None and flattest.flat()
