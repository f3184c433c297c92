"""The sheet's numbers for deep linear networks, and the moves that keep their product."""

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
from torchflat.problems import PROBLEMS, DeepLinear, mixed, nudged, random_minimiser
from torchflat.problems.deep_linear import multiplied

seeds = st.integers(0, 10_000)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat_vector(problem: DeepLinear) -> Tensor:
    return torch.cat([w.flatten() for w in problem.weights]).double()


def loss_of(problem: DeepLinear) -> Callable[[Tensor], Tensor]:
    """Write f once more, of the flat vector."""
    product, moment = problem.product(), problem.inputs.T @ problem.inputs / len(problem.inputs)
    sizes = [w.numel() for w in problem.weights]

    def loss(x: Tensor) -> Tensor:
        total = torch.eye(problem.inputs.shape[1], dtype=torch.float64)
        for part, weight in zip(x.split(sizes), problem.weights, strict=True):
            total = part.view_as(weight) @ total
        return ((total - product) @ moment.double() @ (total - product).T).trace()

    return loss


def listed(name: str) -> DeepLinear:
    problem = PROBLEMS[name]
    assert isinstance(problem, DeepLinear)
    return problem


# The flattest networks --------------------------------------------------------------------------------------------


def test_t057_all_sign_patterns_of_the_flattest_chain() -> None:
    size = 2.5 ** (1 / 3)
    patterns = [signs for signs in itertools.product((1, -1), repeat=3) if math.prod(signs) < 0]
    assert len(patterns) == 2**2
    for signs in patterns:
        chain = DeepLinear.chain(tuple(s * size for s in signs), second_moment=1.7)
        assert chain.flat()
        assert chain.sharpness() == pytest.approx(34.60882461, abs=1e-8)
        assert chain.least_sharpness() == pytest.approx(34.60882461, abs=1e-8)
    assert listed("deep-linear/chain").flat() is False


@pytest.mark.parametrize(
    ("other", "here", "there"),
    [((0.25, 2.0, 2.0), 1.219512195, 3.121951220), ((4.0, 0.5, 0.5), 0.8421052632, 0.3289473684)],
)
def test_t058_curvature_along_the_segment_can_mislead(other: tuple[float, ...], here: float, there: float) -> None:
    direction = torch.tensor(other).double() - 1
    direction /= direction.norm()
    found = [
        float(direction @ DeepLinear.chain(weights, second_moment=1.0).objective().hvp(direction))
        for weights in ((1.0, 1.0, 1.0), other)
    ]
    assert found == pytest.approx([here, there], rel=1e-9)


def test_t061_canonical_flattest_network() -> None:
    for widths in ((2, 3, 3, 2), (3, 2, 4), (4, 1, 2, 5), (3, 3)):
        shapes = zip(widths[1:], widths[:-1], strict=True)
        problem = DeepLinear.white(tuple(drawn(k, *shape) for k, shape in enumerate(shapes)))
        flattest = problem.flattest()
        assert flattest is not None and flattest.flat()
        torch.testing.assert_close(flattest.product(), problem.product(), rtol=1e-10, atol=1e-10)
        assert [w.shape for w in flattest.weights] == [w.shape for w in problem.weights]
        assert flattest.sharpness() == pytest.approx(problem.least_sharpness(), rel=1e-12)
        assert problem.sharpness() >= problem.least_sharpness() * (1 - 1e-12)
        assert float(flattest.conserved().abs().max()) < 1e-4 if len(widths) > 2 else len(flattest.conserved()) == 0


def test_t061_two_layers_are_a_factorisation_without_the_half() -> None:
    W1, W2 = drawn(1, 2, 3), drawn(2, 2, 2)
    white = DeepLinear.white((W1, W2))
    assert white.least_sharpness() == pytest.approx(4 * float(torch.linalg.matrix_norm(W2 @ W1, 2)), rel=1e-13)
    s, r = math.sqrt(float(torch.linalg.matrix_norm(W2 @ W1, 2))), 0.3
    flattest = white.flattest()
    assert flattest is not None
    assert flattest.variation(r) == pytest.approx((math.sqrt(2) * s * r + r**2 / 2) ** 2, rel=1e-12)


def test_t064_another_flattest_network() -> None:
    problem = listed("deep-linear/flattest")
    sigma = float(torch.linalg.matrix_norm(problem.product(), 2))
    assert problem.sharpness() == pytest.approx(15.1190526, abs=1e-7)
    assert problem.least_sharpness() == pytest.approx(problem.sharpness(), rel=1e-13)
    # Its first layer has the gain 1.4 > 2^{1/3}: λ₁ is the least, and yet T065's condition does not hold.
    assert problem.flat() is None and problem.variation(0.1) is None
    assert problem.gains()[0] == pytest.approx(1.4, rel=1e-14)
    for k, gain in enumerate(problem.gains(), start=1):
        assert gain <= math.sqrt(3) * sigma ** (k / 3)
    coupling = problem.coupling()
    _, _, Vh = torch.linalg.svd(problem.product())
    for k, (weight, (r, q)) in enumerate(zip(problem.weights, coupling, strict=True), start=1):
        assert float(r.norm()) == pytest.approx(sigma ** ((k - 1) / 3), rel=1e-13)
        assert float(q.norm()) == pytest.approx(sigma ** (1 - k / 3), rel=1e-13)
        torch.testing.assert_close(weight @ (r / r.norm()), sigma ** (1 / 3) * q / q.norm())
        P = multiplied(problem.weights[:k], 2)
        torch.testing.assert_close(P.T @ P @ Vh[0], sigma ** (2 * k / 3) * Vh[0])
    # The top eigenvector (T061).
    v = torch.cat([torch.outer(q, r).flatten() for r, q in coupling])
    torch.testing.assert_close(problem.objective().hvp(v), problem.sharpness() * v)
    for (_, q), (r, _) in itertools.pairwise(coupling):
        torch.testing.assert_close(r / r.norm(), q / q.norm())


@pytest.mark.parametrize(("widths", "scale"), [((2, 2), 1.0), ((1, 1, 1), 1.0), ((1, 1, 1), 1.7), ((2, 1, 2), 1.0)])
@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_t065_variation_is_attained_and_not_exceeded(widths: tuple[int, ...], scale: float, radius: float) -> None:
    shapes = zip(widths[1:], widths[:-1], strict=True)
    problem = DeepLinear.white(tuple(drawn(k, *shape) for k, shape in enumerate(shapes)))
    flattest = DeepLinear(problem.weights, math.sqrt(scale) * problem.inputs).flattest()
    assert flattest is not None
    known = flattest.variation(radius)
    found = largest_change(loss_of(flattest), flat_vector(flattest), radius)
    assert known * (1 - 1e-3) <= found <= known * (1 + 1e-9)
    p, a = flattest.order()
    assert flattest.variation(1e-6) == pytest.approx(a * 1e-6**p, rel=1e-5)


def test_t065_variation_of_a_flattest_network_that_is_not_balanced() -> None:
    weights = tuple(torch.diag(torch.tensor([2.0, c], dtype=torch.float64)) for c in (1.5, 0.1, 1.0))
    problem = DeepLinear.white(weights)
    assert problem.flat() and float(problem.conserved().abs().max()) > 1
    assert problem.variation(0.3) == pytest.approx(((2 + 0.3 / math.sqrt(3)) ** 3 - 8) ** 2, rel=1e-13)
    found = largest_change(loss_of(problem), flat_vector(problem), 0.3)
    assert problem.variation(0.3) * (1 - 3e-2) <= found <= problem.variation(0.3) * (1 + 1e-9)


def test_data_that_is_not_white_leaves_the_flattest_open() -> None:
    problem = listed("deep-linear/sharp")
    answers = (problem.least_sharpness(), problem.flat(), problem.flattest(), problem.variation(0.1))
    assert answers == (None, None, None, None)
    assert problem.order() == (2, problem.sharpness() / 2)


def test_flatness_is_left_open_where_layers_are_not_invertible() -> None:
    assert DeepLinear.white((drawn(1, 3, 2), drawn(2, 2, 3))).flat() is None
    assert DeepLinear.white((drawn(1, 2, 2), drawn(2, 2, 2))).flat() is False
    one_of_two = DeepLinear.white((torch.diag(torch.tensor([2.0, 0.1])), torch.diag(torch.tensor([2.0, 5.0]))))
    assert one_of_two.flat() is False and one_of_two.variation(0.1) is None
    assert DeepLinear.white((torch.eye(2), torch.zeros(2, 2))).flat() is None
    assert DeepLinear.white((torch.zeros(2, 2), torch.zeros(2, 2))).flat() is True


def test_the_same_function_at_another_point() -> None:
    problem = listed("deep-linear/flattest")
    x = flat_vector(problem)
    assert problem.at(x).sharpness() == problem.sharpness()
    with pytest.raises(UsageError, match="away from T"):
        problem.at(1.01 * x)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_t080_the_gradient_leaves_the_conserved_matrices_alone(seed: int) -> None:
    weights, inputs = (drawn(seed, 2, 3), drawn(seed + 1, 3, 2), drawn(seed + 2, 1, 3)), drawn(seed + 3, 5, 3)
    x = flat_vector(DeepLinear(weights, inputs))
    target = DeepLinear(tuple(w + 0.3 for w in weights), inputs)
    gradient = torch.func.grad(loss_of(target))(x)
    sizes = [w.numel() for w in weights]

    def conserved(point: Tensor) -> Tensor:
        parts = point.split(sizes)
        return DeepLinear(tuple(p.view_as(w) for p, w in zip(parts, weights, strict=True)), inputs).conserved()

    h = 1e-5 / float(gradient.norm())
    drift = (conserved(x + h * gradient) - conserved(x - h * gradient)) / (2 * h * gradient.norm())
    assert float(drift.abs().max()) < 1e-8
    assert len(drift) == 2 * 2 + 3 * 3


# Moves that keep the product --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 4), depth=st.integers(1, 5), seed=seeds)
def test_t066_moves_keep_the_product(size: int, depth: int, seed: int) -> None:
    product, generator = drawn(seed, size, size), torch.Generator().manual_seed(seed)
    weights = random_minimiser(product, depth, generator)
    # The layer that makes up for the others is as large as they are ill-conditioned.
    assert_same_product(weights, weights, product)
    assert_same_product(weights, nudged(weights, 0.01, generator), product)
    assert_same_product(weights, mixed(weights, 0.01, generator), product)


def assert_same_product(before: tuple[Tensor, ...], after: tuple[Tensor, ...], product: Tensor) -> None:
    assert len(before) == len(after)
    condition = math.prod(float(torch.linalg.cond(w)) for w in before + after)
    error = float((multiplied(after, len(product)) - product).abs().max())
    assert error <= 1e-13 * condition * (1 + float(product.abs().max()))


def test_mixing_takes_any_widths() -> None:
    weights = (drawn(1, 4, 2), drawn(2, 3, 4), drawn(3, 1, 3))
    moved = mixed(weights, 0.1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(multiplied(moved, 2), multiplied(weights, 2))
    assert not any(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))
    assert [w.shape for w in moved] == [w.shape for w in weights]


def test_moves_are_drawn_from_the_generator_alone_and_are_as_large_as_asked() -> None:
    state = torch.get_rng_state()
    weights = random_minimiser(torch.eye(3), 3, torch.Generator().manual_seed(0))
    again = random_minimiser(torch.eye(3), 3, torch.Generator().manual_seed(0))
    other = random_minimiser(torch.eye(3), 3, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert not torch.equal(weights[0], other[0])
    for move in (mixed, nudged):
        lengths = [
            sum(
                float((a - b).norm())
                for a, b in zip(weights, move(weights, size, torch.Generator().manual_seed(5)), strict=True)
            )
            for size in (1e-4, 1e-5)
        ]
        assert lengths[0] == pytest.approx(10 * lengths[1], rel=0.01)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_minimiser_needs_a_square_product() -> None:
    generator = torch.Generator()
    with pytest.raises(UsageError, match=r"square product and a depth of 1 or more, not \(2, 3\) and 2"):
        random_minimiser(torch.zeros(2, 3), 2, generator)
    with pytest.raises(UsageError, match=r"not \(2, 2\) and 0"):
        random_minimiser(torch.zeros(2, 2), 0, generator)


def test_t067_greedy_moves_come_down_towards_the_least_sharpness() -> None:
    # Two by two and three layers, where a few hundred draws do.
    generator = torch.Generator().manual_seed(0)
    product = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    weights = random_minimiser(product, 3, generator)
    start = best = DeepLinear.white(weights).sharpness()
    least = DeepLinear.white(weights).least_sharpness()
    assert least is not None
    for draw in range(600):
        moved = (nudged, mixed)[draw % 2](weights, 0.05, generator)
        sharpness = DeepLinear.white(moved).sharpness()
        if sharpness < best:
            weights, best = moved, sharpness
    assert least * (1 - 1e-12) <= best < 1.1 * least < start
