"""Every closed form against a dense Hessian, and against the numbers of the theory sheet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchflat.problems import (
    PROBLEMS,
    DeepLinear,
    Factorisation,
    LinearRegression,
    Monomial,
    Problem,
    Quadratic,
    SoftmaxRegression,
    WeightedSquares,
    sines,
)
from torchflat.problems.problem import with_zeros

small = st.integers(1, 4)
seeds = st.integers(0, 10_000)


# The problems with a second derivative.
SMOOTH = [name for name, problem in PROBLEMS.items() if problem.eigenvalues() is not None]


def dense(problem: Problem) -> Tensor:
    f = problem.objective()
    return f.hvp(torch.eye(f.n, dtype=f.dtype)).double()


def assert_spectrum(found: Tensor, known: Tensor, rtol: float = 1e-12) -> None:
    assert found.shape == known.shape
    size = float(known.abs().max())
    torch.testing.assert_close(found, known, rtol=0, atol=rtol * size)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_spectrum_is_that_of_the_dense_hessian(name: str) -> None:
    problem = PROBLEMS[name]
    hessian = dense(problem)
    rtol = 1e-6 if problem.objective().dtype == torch.float32 else 1e-13
    assert_spectrum(torch.linalg.eigvalsh(hessian), problem.eigenvalues(), rtol)
    size = float(problem.eigenvalues().abs().max())
    assert problem.sharpness() == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0, abs=rtol * size)
    assert problem.trace() == pytest.approx(float(hessian.trace()), rel=0, abs=rtol * size * len(hessian))


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.block_sharpness()])
def test_blocks_are_those_of_the_dense_hessian(name: str) -> None:
    problem, hessian = PROBLEMS[name], dense(PROBLEMS[name])
    slices = problem.objective().layout.slices()
    found = {
        parameter.removesuffix(".weight"): float(torch.linalg.eigvalsh(hessian[part, part])[-1])
        for parameter, part in slices.items()
    }
    assert problem.block_sharpness() == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_objective_is_new_and_draws_nothing(name: str) -> None:
    state = torch.get_rng_state()
    first, second = PROBLEMS[name].objective(), PROBLEMS[name].objective()
    first.gradient()
    assert second.cost.gradients == 0 < first.cost.gradients
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, second.x)


# The functions themselves, written once more, so that a problem and its objective cannot be wrong together ------------


@settings(max_examples=25, deadline=None)
@given(m=small, r=small, n=small, seed=seeds)
def test_factorisation_of_any_shape(m: int, r: int, n: int, seed: int) -> None:
    X, Y = drawn(seed, m, r), drawn(seed + 1, r, n)
    M = X @ Y

    def f(x: Tensor) -> Tensor:
        return 0.5 * ((x[: m * r].view(m, r) @ x[m * r :].view(r, n) - M) ** 2).sum()

    problem = Factorisation(X, Y)
    hessian = torch.func.hessian(f)(torch.cat([X.flatten(), Y.flatten()]))
    assert_spectrum(torch.linalg.eigvalsh(hessian), problem.eigenvalues())
    torch.testing.assert_close(dense(problem), hessian, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(widths=st.lists(small, min_size=2, max_size=4), seed=seeds)
def test_deep_linear_network_of_any_widths(widths: list[int], seed: int) -> None:
    weights = tuple(drawn(seed + k, *shape) for k, shape in enumerate(zip(widths[1:], widths[:-1], strict=True)))
    inputs = drawn(seed + 99, 5, widths[0])

    def output(x: Tensor) -> Tensor:
        signal = inputs.T
        for weight, part in zip(weights, x.split([w.numel() for w in weights]), strict=True):
            signal = part.view_as(weight) @ signal
        return signal.T

    x = torch.cat([w.flatten() for w in weights])
    hessian = torch.func.hessian(lambda p: ((output(p) - output(x)) ** 2).sum(1).mean())(x)
    problem = DeepLinear(weights, inputs)
    assert_spectrum(torch.linalg.eigvalsh(hessian), problem.eigenvalues(), 1e-11)
    torch.testing.assert_close(dense(problem), hessian, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_a_quadratic_has_the_spectrum_given_in_a_basis_of_its_own(seed: int) -> None:
    spectrum = drawn(seed, 30)
    hessian = dense(Quadratic(spectrum, seed))
    assert_spectrum(torch.linalg.eigvalsh(hessian), spectrum.sort().values)
    off_diagonal = hessian - hessian.diag().diag()
    assert float(off_diagonal.abs().max()) > 0.01
    assert not torch.allclose(hessian, dense(Quadratic(spectrum, seed + 1)), atol=0.01)


def test_monomial_and_squares_by_hand() -> None:
    point = torch.tensor([2.0, 0.5], dtype=torch.float64)
    by_hand = torch.func.hessian(lambda x: (x[0] ** 2 * x[1] ** 2 - 1) ** 2)(point)
    assert_spectrum(Monomial((2.0, 0.5), (2, 2)).eigenvalues(), torch.linalg.eigvalsh(by_hand))
    point = torch.tensor([0.5, 0.5, math.sqrt(0.75)], dtype=torch.float64)
    by_hand = torch.func.hessian(lambda x: (2 * x[0] ** 2 + 5 * x[1] ** 2 - x[2] ** 2 - 1) ** 2)(point)
    assert_spectrum(WeightedSquares(tuple(point.tolist()), (2, 5, -1)).eigenvalues(), torch.linalg.eigvalsh(by_hand))


def test_regressions_by_hand() -> None:
    X = drawn(5, 17, 4)
    by_hand = torch.func.hessian(lambda w: (X @ w).square().mean())(torch.ones(4).double())
    assert_spectrum(LinearRegression(X).eigenvalues(), torch.linalg.eigvalsh(by_hand))
    X = X.float().double()
    labels = torch.arange(17) % 3
    by_hand = torch.func.hessian(lambda w: cross_entropy(X @ w.view(3, 4).T, labels))(torch.zeros(12).double())
    assert_spectrum(SoftmaxRegression(X, classes=3).eigenvalues(), torch.linalg.eigvalsh(by_hand))


def test_linear_regression_goes_through_ragged_batches() -> None:
    f = LinearRegression(sines(33, 4, 0.4)).objective()
    f.value()
    assert f.rows == 33 and 33 % 7 != 0
    assert f.cost.forwards >= 1


# The sheet's numbers ----------------------------------------------------------------------------------------------


def test_t024_factorisation() -> None:
    values = PROBLEMS["factorisation/sheet"].eigenvalues()
    assert values[-2:].tolist() == pytest.approx([13, 13], rel=1e-14)
    assert values[-3] < 12


@pytest.mark.parametrize(("t", "sharpness"), [(1.0, 12), (1.5, 12), (math.sqrt(3), 12), (2.0, 14)])
def test_t026_sharpness_is_constant_until_the_other_direction_takes_over(t: float, sharpness: float) -> None:
    # M = diag(3, 1), balanced, then the second direction rescaled by t; the sheet's f has no factor ½.
    root = math.sqrt(3)
    X, Y = torch.diag(torch.tensor([root, t])), torch.diag(torch.tensor([root, 1 / t]))
    expected = 12 if t * t <= 3 else 2 * (t * t + 3)
    assert expected == sharpness
    assert 2 * Factorisation(X, Y).sharpness() == pytest.approx(sharpness, rel=1e-6)


def test_t030_weighted_squares() -> None:
    flattest = PROBLEMS["squares/flattest"]
    assert flattest.sharpness() == pytest.approx(16, rel=1e-14)
    assert PROBLEMS["squares/sharp"].sharpness() > 16


@pytest.mark.parametrize(
    ("exponents", "point", "sharpness"),
    [
        ((1, 2), (0.7937005260, 1.1224620483), 9.524406312),
        ((1, 2, 3), (0.6769366, 0.9573330, 1.1724887), 26.18696726),
    ],
)
def test_t032_monomial(exponents: tuple[int, ...], point: tuple[float, ...], sharpness: float) -> None:
    problem = Monomial(tuple(1.0 for _ in exponents), exponents).flattest()
    assert problem.point == pytest.approx(point, abs=1e-7)
    assert problem.sharpness() == pytest.approx(sharpness, rel=1e-9)
    # Any other point of the same valley is sharper.
    moved = [x * math.exp(0.1 / v) for x, v in zip(problem.point[:1], exponents[:1], strict=True)]
    moved += [x * math.exp(-0.1 / v) for x, v in zip(problem.point[1:2], exponents[1:2], strict=True)]
    assert Monomial((*moved, *problem.point[2:]), exponents).sharpness() > sharpness


@pytest.mark.parametrize(("weights", "sharpness"), [((1, 1, 1), 6), ((0.25, 2, 2), 33), ((4, 0.5, 0.5), 16.125)])
def test_t058_scalar_chain(weights: tuple[float, ...], sharpness: float) -> None:
    assert DeepLinear.chain(weights, second_moment=1.0).sharpness() == pytest.approx(sharpness, rel=1e-12)


def test_t057_flattest_scalar_chain() -> None:
    size = 2.5 ** (1 / 3)
    chain = DeepLinear.chain((size, -size, size), second_moment=1.7)
    assert chain.sharpness() == pytest.approx(34.60882461, rel=1e-9)
    assert PROBLEMS["deep-linear/chain"].sharpness() > chain.sharpness()


def test_t064_flattest_network_attains_the_bound_of_t061() -> None:
    problem = PROBLEMS["deep-linear/flattest"]
    assert isinstance(problem, DeepLinear)
    w1, w2, w3 = problem.weights
    norm = float(torch.linalg.matrix_norm(w3 @ w2 @ w1, 2))
    assert problem.sharpness() == pytest.approx(6 * norm ** (4 / 3), rel=1e-13)
    assert problem.sharpness() == pytest.approx(15.1190526, rel=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, depth=st.integers(2, 4))
def test_t061_no_network_is_below_the_bound(seed: int, depth: int) -> None:
    weights = tuple(drawn(seed + k, 3, 3) for k in range(depth))
    total = weights[0]
    for weight in weights[1:]:
        total = weight @ total
    bound = 2 * depth * float(torch.linalg.matrix_norm(total, 2)) ** (2 - 2 / depth)
    assert DeepLinear.white(weights).sharpness() >= bound * (1 - 1e-12)


def test_t064_sines() -> None:
    assert float(sines(3, 4, 0.5)[2, 3]) == pytest.approx(math.sin(0.5 + 2.6 + 8.1 + 3.0), rel=1e-13)


@settings(max_examples=25, deadline=None)
@given(rows=small, columns=small, seed=seeds)
def test_with_zeros_turns_one_gram_matrix_into_the_other(rows: int, columns: int, seed: int) -> None:
    J = drawn(seed, rows, columns)
    assert_spectrum(with_zeros(torch.linalg.eigvalsh(J @ J.T), columns), torch.linalg.eigvalsh(J.T @ J), 1e-10)
