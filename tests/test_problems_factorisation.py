"""The sheet's numbers for matrix factorisation, with squared and with absolute entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from brute_force import largest_change
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.problems import AbsoluteFactorisation, Factorisation

seeds = st.integers(0, 10_000)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def flat_vector(problem: Factorisation) -> Tensor:
    return torch.cat([problem.X.flatten(), problem.Y.flatten()]).double()


def squared_distance(problem: Factorisation) -> Callable[[Tensor], Tensor]:
    """Write f once more, of the flat vector."""
    M, split = problem.X.double() @ problem.Y.double(), problem.X.numel()
    return lambda x: 0.5 * ((x[:split].view_as(problem.X) @ x[split:].view_as(problem.Y) - M) ** 2).sum()


# Squared entries --------------------------------------------------------------------------------------------------


def test_t019_t022_least_norms() -> None:
    flattest = Factorisation(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)).flattest()
    assert float(flattest.X.square().sum() + flattest.Y.square().sum()) == pytest.approx(8, rel=1e-14)
    assert flattest.sharpness() == pytest.approx(6, rel=1e-14)
    assert flattest.conserved().abs().max() < 1e-14


def test_t023_rescaling_at_equal_norms_without_aligned_vectors() -> None:
    # ‖tX‖² + ‖Y/t‖² has derivative 0 at t = 1; the repaired proof moves along the top vector of X: 2s²(1 − |Pu|²).
    X = torch.diag(torch.tensor([2.0, 1.0])).double()
    c = math.sqrt(0.5)
    Y = matrix((c, -c), (c, c)) @ X
    problem = Factorisation(X, Y)
    assert problem.sharpness() == pytest.approx(8, rel=1e-14)
    assert not problem.flat()
    assert problem.flattest().sharpness() < 8
    u, v = torch.linalg.svd(X).Vh[0], torch.linalg.svd(Y).U[:, 0]
    assert 2 * 4 * (1 - float((u @ v) ** 2)) == pytest.approx(4, rel=1e-14)


def test_t024_sharpness_of_a_pair_that_is_not_balanced() -> None:
    problem = Factorisation(matrix((2, 0), (0, 2), (0, 0)), matrix((3, 0), (0, 1)))
    assert problem.order() == (2, 6.5)
    assert not problem.flat() and problem.variation(0.1) is None
    assert problem.conserved().tolist() == [[-5, 0], [0, 3]]


def test_t025_variation_at_a_flat_minimum() -> None:
    flattest = Factorisation(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)).flattest()
    assert flattest.variation(0.2) == pytest.approx(0.1299979590, abs=1e-10)
    r, s = 0.2, math.sqrt(3)
    assert flattest.variation(r) == pytest.approx(s**2 * r**2 + s * r**3 / math.sqrt(2) + r**4 / 8, rel=1e-14)


@pytest.mark.parametrize(("t", "flat"), [(1.0, True), (1.5, True), (1 / 1.5, True), (1.8, False), (2.0, False)])
def test_t026_flat_minima_need_not_be_balanced(t: float, flat: bool) -> None:
    # t may lie between √(b/a) and √(a/b), a = 3, b = 1.
    root = math.sqrt(3)
    X, Y = (torch.diag(torch.tensor([root, s], dtype=torch.float64)) for s in (t, 1 / t))
    problem = Factorisation(X, Y)
    assert problem.flat() == flat
    expected = torch.diag(torch.tensor([0, t**2 - t**-2], dtype=torch.float64))
    torch.testing.assert_close(problem.conserved(), expected)
    if flat:
        assert problem.variation(0.1) == pytest.approx(problem.flattest().variation(0.1), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_t025_variation_is_attained_and_not_exceeded(shape: tuple[int, int, int], radius: float) -> None:
    m, rank, n = shape
    flattest = Factorisation(drawn(1, m, rank), drawn(2, rank, n)).flattest()
    found = largest_change(squared_distance(flattest), flat_vector(flattest), radius)
    known = flattest.variation(radius)
    assert known * (1 - 1e-3) <= found <= known * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 4), rank=st.integers(1, 4), n=st.integers(1, 4), seed=seeds)
def test_the_flattest_factors_of_any_shape(m: int, rank: int, n: int, seed: int) -> None:
    problem = Factorisation(drawn(seed, m, rank), drawn(seed + 1, rank, n))
    flattest = problem.flattest()
    torch.testing.assert_close(flattest.X @ flattest.Y, problem.X @ problem.Y, rtol=1e-10, atol=1e-10)
    assert flattest.X.shape == problem.X.shape and flattest.Y.shape == problem.Y.shape
    assert flattest.flat()
    assert float(flattest.conserved().abs().max()) < 1e-7
    norm = float(torch.linalg.matrix_norm(problem.X @ problem.Y, 2))
    assert flattest.sharpness() == pytest.approx(2 * norm, rel=1e-10)
    assert problem.sharpness() >= 2 * norm * (1 - 1e-12)


def test_nothing_to_factor_is_of_order_four() -> None:
    zero = Factorisation(torch.zeros(2, 2), torch.zeros(2, 2))
    assert zero.flat() and zero.order() == (4, 0.125)
    assert zero.variation(0.3) == pytest.approx(0.125 * 0.3**4, rel=1e-14)


def test_the_same_function_at_another_point() -> None:
    problem = Factorisation(matrix((2, 0), (0, 2), (0, 0)), matrix((3, 0), (0, 1)))
    G = matrix((1, 2), (0, 1))
    moved = problem.at(torch.cat([(problem.X @ G).flatten(), torch.linalg.solve(G, problem.Y).flatten()]))
    torch.testing.assert_close(moved.X @ moved.Y, problem.X @ problem.Y)
    with pytest.raises(UsageError, match=r"the product at x is 0\.5 away from M"):
        problem.at(flat_vector(problem) + torch.tensor([0.5 / 3] + 9 * [0.0]))


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_t013_gradient_steps_move_the_conserved_matrix_by_second_order_only(seed: int) -> None:
    X, Y, M = drawn(seed, 3, 2), drawn(seed + 1, 2, 2), drawn(seed + 2, 3, 2)
    residual = X @ Y - M
    by_X, by_Y = residual @ Y.T, X.T @ residual
    step = 0.1
    before, after = (Factorisation(X - a * by_X, Y - a * by_Y).conserved() for a in (0.0, step))
    # C(x − αv) = C(x) + α²C(v), exactly.
    torch.testing.assert_close(after - before, step**2 * (by_X.T @ by_X - by_Y @ by_Y.T), rtol=1e-9, atol=1e-11)


# Absolute entries -------------------------------------------------------------------------------------------------


def test_t020_rank_one() -> None:
    problem = AbsoluteFactorisation.of(matrix((1.0,), (2.0,)), matrix((1.0, -1.5, 0.5)))
    flattest = problem.flattest()
    assert flattest is not None and flattest.flat() and not problem.flat()
    assert flattest.point[0] == pytest.approx(0.9036020036, abs=1e-10)
    assert flattest.order()[1] ** 2 == pytest.approx(44.09081537, abs=1e-8)
    assert flattest.order()[1] ** 2 == pytest.approx(2 * math.sqrt(6) * 3 * 3, rel=1e-14)
    for s in (0.8, 0.99, 1.01, 1.3):
        other = problem.at(torch.cat([s * torch.tensor(flattest.point)[:2], torch.tensor(flattest.point)[2:] / s]))
        assert other.order() is None or other.order()[1] > flattest.order()[1]


@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 3), rank=st.integers(1, 2), n=st.integers(1, 3), seed=seeds)
def test_t020_lipschitz_modulus(m: int, rank: int, n: int, seed: int) -> None:
    X, Y = drawn(seed, m, rank), drawn(seed + 1, rank, n)
    signs = [torch.tensor(s).double().view(m, n) for s in itertools.product((-1, 1), repeat=m * n)]
    largest = max(float((sign @ Y.T).square().sum() + (X.T @ sign).square().sum()) for sign in signs)
    assert largest >= float(X.square().sum() + Y.square().sum()) / (m + n)
    assert AbsoluteFactorisation.of(X, Y).order() == (1, pytest.approx(math.sqrt(largest), rel=1e-12))


def test_t021_flat_though_no_maximal_subgradient_is_balanced() -> None:
    M = matrix((1.0, 0.3), (-0.2, 0.7))
    U, values, Vh = torch.linalg.svd(M)
    root = torch.diag(values.sqrt())

    def at(P: Tensor) -> AbsoluteFactorisation:
        eigenvalues, vectors = torch.linalg.eigh(P)
        A = vectors * eigenvalues.sqrt()
        return AbsoluteFactorisation.of(U @ root @ A, torch.linalg.solve(A, root @ Vh))

    P = matrix((1.17963158, 0.01344919), (0.01344919, 0.79007638))
    flattest = at(P)
    assert flattest.flat() is None and flattest.flattest() is None
    assert flattest.order()[1] ** 2 == pytest.approx(7.227039175077, abs=1e-6)
    for seed in range(20):
        E = 0.05 * drawn(seed, 2, 2)
        assert at(P + E + E.T).order()[1] ** 2 > 7.227039175077
    # P has eight digits, so that the active patterns tie to about as many: all of them, eight and their negatives.
    lengths = (flattest.signs() @ flattest.slopes()).square().sum(1)
    active = (flattest.signs() @ flattest.slopes())[lengths > 7.227039175077 - 1e-6]
    assert len(active) == 2 * 8
    laws = [flattest.at(v).conserved().norm() for v in active]
    assert float(min(laws)) == pytest.approx(0.441641958, abs=1e-6)


def test_t031_vector_times_number() -> None:
    problem = AbsoluteFactorisation((1.0, -2.0, 1.0), ((1.0,), (-2.0,)))
    assert problem.order()[1] ** 2 == pytest.approx(2 + 9, rel=1e-14)
    flattest = problem.flattest()
    assert flattest is not None
    t = 0.6865890480
    assert flattest.point == pytest.approx((t, -2 * t, 1 / t), abs=1e-9)
    assert flattest.order()[1] ** 2 == pytest.approx(8.485281374, abs=1e-9)
    assert flattest.conserved().tolist() == [[pytest.approx(0.2357022604, abs=1e-9)]]
    laws = [abs(float(flattest.at(v).conserved())) for v in flattest.maximal_subgradients()]
    assert max(laws) < 1e-13
    assert problem.at((0.8, -1.6, 1.25)).order()[1] > flattest.order()[1]


def test_t045_flat_minimum_of_the_example_with_one_zero() -> None:
    flattest = AbsoluteFactorisation((1.0, 0.0, 1.0), ((1.0,), (0.0,))).flattest()
    assert flattest is not None
    assert flattest.point == pytest.approx((2**0.25, 0, 2**-0.25), rel=1e-14)
    assert float(flattest.conserved()) == pytest.approx(1 / math.sqrt(2), rel=1e-14)


def test_a_product_other_than_the_target_is_off_the_zero_level() -> None:
    problem = AbsoluteFactorisation.of(drawn(1, 2, 1), drawn(2, 1, 2))
    moved = problem.at(2 * torch.tensor(problem.point))
    assert moved.order() is None and moved.flat() is None and moved.flattest() is None
    assert float(moved.objective().value()) > 0
