"""Closed forms of all listed problems against the functions: variation, order, flat minima, conservation."""

from __future__ import annotations

import math

import pytest
import torch
from brute_force import largest_change
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchflat.problems import PROBLEMS, Function, Monomial, Parabola, Problem, WeightedSquares
from torchflat.problems.kinks import absolute, largest, positive_part
from torchflat.problems.maximum import interval_maximum, quadratic_maximum

FUNCTIONS = {name: problem for name, problem in PROBLEMS.items() if isinstance(problem, Function)}
# Other points of the same functions, among them all whose formula is another one than at the listed point.
FUNCTIONS |= {
    "valley/minimum, smooth branch": FUNCTIONS["valley/minimum"].at((0.0, -0.5)),
    "valley/minimum, kink": FUNCTIONS["valley/minimum"].at((-0.7, 0.0)),
    "valley/quartic-tie, flat": FUNCTIONS["valley/quartic-tie"].at((0.0, 0.0)),
    "valley/relu, inactive": FUNCTIONS["valley/relu-edge"].at((-0.3, 0.6, 1.0)),
    "valley/relu, flat": FUNCTIONS["valley/relu-edge"].at((0.0, 0.0, 1.0)),
    "valley/relu, other side": FUNCTIONS["valley/relu-edge"].at((0.0, -2.0, 1.0)),
    "absolute/maximum, sharp": FUNCTIONS["absolute/maximum"].at((3.0, 1 / 3, 0.75, 4 / 3)),
    "absolute/rank-one, flat": FUNCTIONS["absolute/rank-one"].flattest(),
    "squares/level": WeightedSquares((0.5, 1.5), weights=(2.0, -2.0), level=-4.0, power=4),
    "infinity/relu, active": FUNCTIONS["infinity/relu"].at((1.0, 0.5)),
    "curve/bilinear, flat": FUNCTIONS["curve/bilinear"].flattest(),
}
RADII = (1e-3, 0.05, 0.2)


def point_of(problem: Function) -> Tensor:
    return torch.tensor(problem.point, dtype=torch.float64)


def known_variations() -> list[tuple[str, float]]:
    return [(name, r) for name, problem in FUNCTIONS.items() for r in RADII if problem.variation(r) is not None]


@pytest.mark.parametrize(("name", "radius"), known_variations())
def test_variation_is_attained_and_not_exceeded(name: str, radius: float) -> None:
    problem = FUNCTIONS[name]
    known = problem.variation(radius)
    found = largest_change(problem.function, point_of(problem), radius)
    # What is found beyond it can be no more than the rounding of f(x + u) with u in the last places of x.
    assert known * (1 - 1e-3) - 1e-15 <= found <= known * (1 + 1e-9) + 1e-15


def test_most_functions_have_a_known_variation() -> None:
    unknown = {name for name, problem in FUNCTIONS.items() if problem.variation(1e-3) is None}
    assert unknown == {
        "monomial/sharp",
        "curve/cubic",
        "determinants/flat",
        "determinants/sharp",
        "infinity/masked",
        "infinity/relu, active",
        "infinity/sigmoid",
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_order_is_what_the_variation_tends_to(name: str) -> None:
    problem = FUNCTIONS[name]
    if problem.order() is None:
        assert name.startswith("infinity/")
        return
    p, a = problem.order()
    for radius, rtol in ((1e-2, 0.1), (1e-3, 0.01)):
        assert largest_change(problem.function, point_of(problem), radius) == pytest.approx(a * radius**p, rel=rtol)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_is_that_of_finite_differences_beside_the_point(name: str) -> None:
    problem = FUNCTIONS[name]
    x = point_of(problem) + 0.05 * torch.linspace(-1, 1.3, len(problem.point), dtype=torch.float64)
    h = 1e-6
    differences = [
        float(problem.function(x + h * unit) - problem.function(x - h * unit)) / (2 * h)
        for unit in torch.eye(len(x), dtype=torch.float64)
    ]
    assert problem.at(x).objective().gradient().tolist() == pytest.approx(differences, rel=1e-6, abs=1e-8)


def test_off_the_zero_level_nothing_is_claimed() -> None:
    for name, problem in FUNCTIONS.items():
        if name.startswith("infinity/"):
            continue
        moved = problem.at(point_of(problem) + 0.05 * torch.linspace(-1, 1.3, len(problem.point)))
        assert float(moved.function(point_of(moved))) > 0, name
        claims = (moved.eigenvalues(), moved.sharpness(), moved.trace(), moved.variation(1e-3), moved.order())
        assert (*claims, moved.flat()) == (None,) * 6, name


# On the plateau of infinity/relu nothing moves.
@pytest.mark.parametrize(
    "name", [name for name, problem in FUNCTIONS.items() if problem.conserved() is not None and name != "infinity/relu"]
)
def test_what_is_conserved_does_not_change_along_the_gradient(name: str) -> None:
    problem = FUNCTIONS[name]
    moves = torch.tensor([0.31, -0.17, 0.23, 0.11, -0.29, 0.19, 0.13, -0.07], dtype=torch.float64)
    x = point_of(problem) + moves[: len(problem.point)]
    gradient = problem.at(x).objective().gradient()
    assert float(gradient.norm()) > 0.01
    h = 1e-5 / float(gradient.norm())
    along, beside = (
        float((problem.at(x + h * v).conserved() - problem.at(x - h * v).conserved()).norm())
        / (2 * h * float(v.norm()))
        for v in (gradient, torch.ones_like(gradient))
    )
    assert along <= 1e-7 * max(1.0, beside)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_flattest_point_is_flat_on_the_same_level_and_varies_least(name: str) -> None:
    problem = PROBLEMS[name]
    flattest = problem.flattest()
    if flattest is None:
        return
    assert flattest.flat()
    assert flattest.objective().value() == pytest.approx(problem.objective().value(), abs=1e-14)
    (p, a), (q, b) = flattest.order(), problem.order()
    assert p > q or (p == q and a <= b * (1 + 1e-12))
    if problem.flat() is False:
        here, there = ([other.variation(r) for r in (0.05, 0.1)] for other in (problem, flattest))
        if None not in here + there:
            assert all(least < other for least, other in zip(there, here, strict=True))


def test_listed_points_that_are_not_flat() -> None:
    sharp = {name for name, problem in PROBLEMS.items() if problem.flat() is False}
    assert sharp == {
        "factorisation/sheet",
        "factorisation/thin",
        "factorisation/wide",
        "factorisation/tall",
        "monomial/sharp",
        "monomial/product",
        "monomial/quartic",
        "monomial/absolute",
        "squares/sharp",
        "squares/ellipse",
        "squares/cone",
        "curve/parabola",
        "curve/bilinear",
        "valley/quartic-tie",
        "valley/sixth-tie",
        "valley/relu-active",
        "valley/relu-edge",
        "absolute/rank-one",
        "determinants/sharp",
        "deep-linear/chain",
    }


@settings(max_examples=30, deadline=None)
@given(x1=st.floats(0.2, 4.0), power=st.sampled_from([1, 2, 4]), radius=st.floats(1e-3, 1.0))
def test_powers_of_one_residual_agree(x1: float, power: int, radius: float) -> None:
    first, squared = (Monomial((x1, 1 / x1), (1, 1), power=k) for k in (1, 2))
    other = Monomial((x1, 1 / x1), (1, 1), power=power)
    assert other.variation(radius) == pytest.approx(first.variation(radius) ** power, rel=1e-12)
    assert other.flat() == squared.flat()


# What the closed forms are made of ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), seed=st.integers(0, 1000), radius=st.floats(0.01, 10.0))
def test_a_quadratic_is_maximised_over_the_ball(n: int, seed: int, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    g, A = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n,), (n, n)))
    H = A + A.T
    found = largest_change(lambda u: (g @ u + 0.5 * u @ H @ u).clamp(min=0), torch.zeros(n).double(), radius, seed)
    known = float(quadratic_maximum(g, H, radius))
    assert known * (1 - 1e-4) <= found <= known * (1 + 1e-12)


@pytest.mark.parametrize(
    ("g", "eigenvalues", "maximum"),
    [
        ((0.0, 0.0), (3.0, 1.0), 0.06),
        ((0.0, 0.0), (-3.0, -1.0), 0.0),
        # Inside the ball: at u = (0.1, 0).
        ((1.0, 0.0), (-10.0, -10.0), 0.05),
        # The hard case: no gradient along the top eigenvector, and (3I − H)⁻¹g = (0, ½) · 0.1 is shorter than r.
        ((0.0, 0.1), (3.0, 1.0), 0.5 * (0.01 / 2 + 3 * 0.04)),
    ],
)
def test_degenerate_quadratics(g: tuple[float, ...], eigenvalues: tuple[float, ...], maximum: float) -> None:
    H = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    assert float(quadratic_maximum(torch.tensor(g, dtype=torch.float64), H, 0.2)) == pytest.approx(maximum, abs=1e-15)


def test_a_stack_of_quadratics_is_maximised_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    g, A = torch.randn(6, 3, generator=generator).double(), torch.randn(6, 3, 3, generator=generator).double()
    H = A + A.mT
    singly = [float(quadratic_maximum(g[i], H[i], 0.7)) for i in range(6)]
    assert quadratic_maximum(g, H, 0.7).tolist() == pytest.approx(singly, rel=1e-14)


@pytest.mark.parametrize(
    ("low", "high", "maximum"), [(0.0, 2.0, 1.0), (1.7, 2.0, math.sin(1.7)), (-1.0, 0.3, math.sin(0.3))]
)
def test_one_variable_is_maximised_inside_and_at_the_ends(low: float, high: float, maximum: float) -> None:
    assert interval_maximum(torch.sin, low, high) == pytest.approx(maximum, rel=1e-15)


def test_t052b_derivatives_at_kinks_are_limits_of_those_beside() -> None:
    zero = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(absolute(zero).sum(), zero)[0].tolist() == [1, 1, 1]
    assert torch.autograd.grad(positive_part(zero).sum(), zero)[0].tolist() == [1, 1, 1]
    assert sorted(torch.autograd.grad(largest(zero), zero)[0].tolist()) == [0, 0, 1]
    x = torch.tensor([-2.0, -0.0, 0.5])
    assert absolute(x).tolist() == [2, 0, 0.5]
    assert positive_part(x).tolist() == [0, 0, 0.5]
    assert float(largest(x)) == 0.5


def test_t052b_gradient_of_a_listed_function_on_its_kink() -> None:
    # |x₁x₃ − 1| + |x₂x₃| where the second residual is 0 exactly: with sign(0) = 0 the gradient would forget it.
    problem = PROBLEMS["absolute/vector"]
    assert isinstance(problem, Function)
    vector = type(problem)((2.0, 0.0, 1.0), ((1.0,), (0.0,)))
    assert vector.objective().gradient().tolist() == [1.0, 1.0, 2.0]


class Unknown(Problem):
    source = "nothing"

    def objective(self) -> object:  # type: ignore[override]
        raise NotImplementedError


def test_the_defaults_say_not_known() -> None:
    problem = Unknown()
    answers = [problem.eigenvalues(), problem.sharpness(), problem.trace(), problem.variation(0.1), problem.order()]
    answers += [problem.flat(), problem.flattest(), problem.conserved()]
    assert answers == [None] * 8
    assert problem.block_sharpness() == {}
    assert problem.rows == 1
    assert Parabola((1.0, 1.0)).rows == 1
