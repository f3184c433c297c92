"""Kernels against known answers, the compiled ones against their twins, and what both refuse."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchflat import ops
from torchflat.ops import library, reference

TWO = torch.tensor([0.5, 2.0], dtype=torch.float64)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float64).eps
# Lengths around the lanes, the tiles and the chunks of the kernels.
LENGTHS = (1, 7, 8, 31, 33, 255, 256, 257, 1000, 4097, 16384, 16385, 70001)

needs_native = pytest.mark.skipif(
    ops.backend("cpu") != "native", reason=f"no compiled CPU kernels: {ops.describe()['cpu']['reason']}"
)


class Kernels:
    """The operators of one implementation, called below the public functions."""

    def __init__(self, library: Any) -> None:
        self.orthogonalize_ = library.orthogonalize_
        self.dot, self.norms, self.axpy_ = library.dot, library.norms, library.axpy_
        self.axpby_, self.normalized_axpby_ = library.axpby_, library.normalized_axpby_


TWIN = Kernels(reference)
COMPILED = Kernels(torch.ops.torchflat)


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return TWIN if request.param == "reference" else COMPILED


def orthonormal_rows(k: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0].T.contiguous()


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- orthogonalize_ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_removes_coordinates_exactly(kernels: Kernels, dtype: torch.dtype) -> None:
    basis = torch.eye(5, dtype=dtype)[[3, 1]]
    vector = torch.tensor([3.0, 7.0, 0.0, -2.0, 4.0], dtype=torch.float64)
    assert kernels.orthogonalize_(basis, vector).tolist() == [-2.0, 7.0, 5.0]
    assert vector.tolist() == [3.0, 0.0, 0.0, 0.0, 4.0]


def test_empty_basis_leaves_the_vector_and_returns_its_norm(kernels: Kernels) -> None:
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert kernels.orthogonalize_(torch.empty(0, 2), vector).tolist() == [5.0]
    assert vector.tolist() == [3.0, 4.0]


def test_empty_vector(kernels: Kernels) -> None:
    assert kernels.orthogonalize_(torch.empty(2, 0), torch.empty(0, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("n", [40, 5000])
def test_twice_is_enough(kernels: Kernels, n: int) -> None:
    """What is left is 1e-10 of the vector: one sweep would leave it orthogonal to 1e-6 of its size only."""
    basis = orthonormal_rows(9, n)
    vector = basis.T @ randn(8 + 1)
    rest = randn(n, seed=2)
    rest -= basis.T @ (basis @ rest)
    rest -= basis.T @ (basis @ rest)
    vector += 1e-10 * rest / rest.norm()
    norm = kernels.orthogonalize_(basis, vector)[-1]
    assert norm.item() == pytest.approx(1e-10, rel=1e-4)
    assert (basis @ vector).norm() <= 50 * EPS * norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_in_float64_whatever_the_basis(kernels: Kernels, dtype: torch.dtype) -> None:
    basis = orthonormal_rows(5, 3000).to(dtype)
    vector, wide = randn(3000), basis.double()
    first = wide @ vector
    rest = vector - wide.T @ first
    second = wide @ rest
    rest -= wide.T @ second
    result = kernels.orthogonalize_(basis, vector)
    torch.testing.assert_close(result[:-1], first + second, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(vector, rest, rtol=1e-12, atol=1e-13)


def test_rows_may_lie_apart(kernels: Kernels) -> None:
    store = torch.full((6, 50), torch.nan)
    store[:4, :40] = orthonormal_rows(4, 40).float()
    basis, vector = store[:4, :40], randn(40)
    dense, again = basis.contiguous(), vector.clone()
    assert torch.equal(kernels.orthogonalize_(basis, vector), kernels.orthogonalize_(dense, again))
    assert vector.isfinite().all()


@needs_native
@settings(max_examples=40, deadline=None)
@given(n=st.sampled_from(LENGTHS), k=st.integers(0, 13), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**31 - 1))
def test_native_orthogonalize_is_its_twin(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    basis = orthonormal_rows(min(k, n), n, seed).to(dtype)
    one = randn(n, seed=seed)
    two = one.clone()
    scale = one.norm().item()
    torch.testing.assert_close(
        COMPILED.orthogonalize_(basis, one), TWIN.orthogonalize_(basis, two), rtol=0, atol=1e-14 * scale
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14 * scale)


# --- dot and norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", FLOATS)
@pytest.mark.parametrize("right", FLOATS)
def test_dot_of_mixed_dtypes_is_exact_where_it_can_be(kernels: Kernels, left: torch.dtype, right: torch.dtype) -> None:
    integers = torch.arange(100.0)
    a = [integers.to(left), torch.tensor(3.0, dtype=left), torch.empty(0, 4, dtype=left)]
    b = [integers.to(right), torch.tensor(-2.0, dtype=right), torch.empty(0, 4, dtype=right)]
    result = kernels.dot(a, b)
    assert result.dtype == torch.float64 and result.shape == ()
    assert result.item() == 99 * 100 * 199 / 6 - 6


def test_dot_error_does_not_grow_with_the_length(kernels: Kernels) -> None:
    """4 million times 0.1: adding up in float32 loses four digits, plain float64 one or two."""
    n = 1 << 22
    tenth = torch.full((n,), 0.1)
    assert kernels.dot([tenth], [torch.ones(n)]).item() == pytest.approx(n * tenth[0].item(), rel=4 * EPS)


def test_dot_matches_the_correctly_rounded_sum(kernels: Kernels) -> None:
    a, b = randn(20000, dtype=torch.float32), randn(20000, dtype=torch.float32, seed=2)
    exact = math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert kernels.dot([a[:7000], a[7000:]], [b[:7000], b[7000:]]).item() == pytest.approx(exact, abs=1e-12)


def test_dot_reads_strided_tensors_in_logical_order(kernels: Kernels) -> None:
    a = randn(6, 5, dtype=torch.float32)
    b = randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    expected = (a.double() ** 2).sum() + (b * b.contiguous()).sum()
    result = kernels.dot([a.T, b], [a.T.contiguous(), b.contiguous()])
    assert result.item() == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_entries_show(kernels: Kernels, bad: float) -> None:
    a = torch.ones(100)
    a[17] = bad
    result = kernels.dot([torch.ones(3), a, torch.ones(3)], [torch.ones(3), torch.ones(100), torch.ones(3)]).item()
    assert result == bad or (math.isnan(result) and math.isnan(bad))


def test_norm() -> None:
    assert ops.norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]).item() == 5.0
    assert ops.norm([torch.full((10,), 1e30)]).item() == pytest.approx(math.sqrt(10) * 1e30, rel=1e-7)


def test_empty_lists_are_zero() -> None:
    assert ops.norm([]).item() == 0.0 and ops.dot([], []).dtype == torch.float64
    assert ops.norms([]).tolist() == []
    ops.axpy_([], [], 2.0)
    ops.axpby_([], [], factors(2.0), factors(1.0))
    assert ops.normalized_axpby_([], [], factors(2.0), factors(1.0)).item() == 0.0


def test_norms_of_mixed_dtypes(kernels: Kernels) -> None:
    a = [torch.tensor([3.0, 4.0], dtype=dtype) * 2**i for i, dtype in enumerate(FLOATS)]
    a += [torch.empty(0, 4), torch.tensor(-2.0), torch.full((5, 5), 1e30).T]
    result = kernels.norms(a)
    assert result.dtype == torch.float64
    assert result[:-1].tolist() == [5.0, 10.0, 20.0, 40.0, 0.0, 2.0]
    assert result[-1].item() == pytest.approx(5 * a[-1][0, 0].item(), rel=4 * EPS)


def test_norms_of_strided_tensors_are_those_of_their_elements(kernels: Kernels) -> None:
    store = torch.full((6, 50), torch.nan)
    store[::2, 5:40] = 2.0
    last = randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expected = [2 * math.sqrt(3 * 35), last.norm().item(), 2 * math.sqrt(35)]
    found = kernels.norms([store[::2, 5:40].T, last, torch.tensor(2.0).expand(35)])
    assert found.tolist() == pytest.approx(expected, rel=4 * EPS)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_norms_show_which_tensor_is_not_finite(kernels: Kernels, bad: float) -> None:
    a = torch.ones(20000)
    a[-1] = bad
    assert kernels.norms([torch.ones(4), a, torch.ones(9)]).isfinite().tolist() == [True, False, True]


@needs_native
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_native_lists_are_their_twins(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from((0, *LENGTHS)), min_size=1, max_size=4))
    dtypes = st.sampled_from(FLOATS)
    a = [randn(n, dtype=data.draw(dtypes), seed=i) for i, n in enumerate(sizes)]
    b = [randn(n, dtype=data.draw(dtypes), seed=i + 9) for i, n in enumerate(sizes)]
    scale = 1.0 + sum(x.double().norm() * y.double().norm() for x, y in zip(a, b, strict=True)).item()
    assert COMPILED.dot(a, b).item() == pytest.approx(TWIN.dot(a, b).item(), abs=1e-14 * scale)
    torch.testing.assert_close(COMPILED.norms(a), TWIN.norms(a), rtol=1e-14, atol=0)
    numbers = st.floats(-2, 2).map(lambda x: x if abs(x) > 1e-3 else 0.0)
    alpha = factors(*data.draw(st.one_of(st.lists(numbers, min_size=n, max_size=n) for n in {1, len(a)})))
    beta = factors(data.draw(numbers))
    for change in (
        lambda kernels, y: kernels.axpy_(y, b, 0.37),
        lambda kernels, y: kernels.axpby_(y, b, alpha, beta),
        lambda kernels, y: kernels.normalized_axpby_(y, b, alpha[:1], beta),
    ):
        one, two = [x.clone() for x in a], [x.clone() for x in a]
        got, expected = change(COMPILED, one), change(TWIN, two)
        assert got is None or got.item() == pytest.approx(expected.item(), rel=1e-14)
        assert_rounded_alike(one, two, b)


def assert_rounded_alike(one: list[Tensor], two: list[Tensor], x: list[Tensor]) -> None:
    """A fused multiply-add may round once where the twin rounds twice: one unit in the last place."""
    for got, expected, added in zip(one, two, x, strict=True):
        largest = max(each.double().abs().amax().item() if each.numel() else 0.0 for each in (expected, added))
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(got.dtype).eps, atol=8 * EPS * (1 + largest))


# --- line_squares -----------------------------------------------------------------------------------------------------

MATRICES = st.lists(st.tuples(st.sampled_from((1, 2, 33, 300)), st.sampled_from((1, 5, 32, 257)), st.integers(1, 4)))


@pytest.mark.parametrize("implementation", [reference, pytest.param(torch.ops.torchflat, marks=needs_native)])
@settings(max_examples=30, deadline=None)
@given(shapes=MATRICES.filter(bool), dtype=st.sampled_from(FLOATS), transposed=st.booleans())
def test_rows_and_columns_of_squares(
    implementation: Any, shapes: list[tuple[int, int, int]], dtype: torch.dtype, transposed: bool
) -> None:
    tensors = [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    tensors += [randn(7, 3, dtype=dtype)]
    if transposed:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    found = implementation.line_squares(tensors)
    squares = [
        tensor.double().square().flatten(2) if tensor.ndim > 2 else tensor.double().square() for tensor in tensors
    ]
    expected = [
        square.sum([other for other in range(square.ndim) if other != axis]) for square in squares for axis in (0, 1)
    ]
    exact = dtype == torch.float64 or implementation is not reference
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-13 if exact else 1e-5, atol=0)


def test_line_squares_of_nothing_and_of_what_has_no_rows() -> None:
    assert ops.line_squares([]).tolist() == []
    assert ops.line_squares([torch.ones(2, 0), torch.ones(0, 3)]).tolist() == [0.0] * 5
    with pytest.raises(RuntimeError, match="two axes or more"):
        ops.line_squares([torch.ones(3)])
    with pytest.raises(RuntimeError, match="not differentiable"):
        ops.line_squares([torch.ones(3, 3, requires_grad=True)])


# --- axpy_ ------------------------------------------------------------------------------------------------------------


def test_axpy_adds_float32_gradients_into_views_of_one_float64_buffer(kernels: Kernels) -> None:
    flat = torch.ones(20, dtype=torch.float64)
    views = [flat[2:8].view(2, 3), flat[8], flat[10:14]]
    gradients = [torch.arange(6.0).view(3, 2).T, torch.tensor(4.0), torch.tensor([1, 2, 3, 4], dtype=torch.float16)]
    kernels.axpy_(views, gradients, 0.5)
    added = [0, 0, 0, 1, 2, 0.5, 1.5, 2.5, 2, 0, 0.5, 1, 1.5, 2] + 6 * [0]
    assert flat.tolist() == [1 + value for value in added]


def test_axpy_keeps_what_float32_would_lose(kernels: Kernels) -> None:
    total = torch.ones(3, dtype=torch.float64)
    kernels.axpy_([total], [torch.full((3,), 2.0**-20)], 2.0**-20)
    assert total.tolist() == 3 * [1 + 2.0**-40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_axpy_rounds_at_the_end(kernels: Kernels, dtype: torch.dtype) -> None:
    """1 + a little over half a unit in the last place, the little being lost if the product is rounded first."""
    unit = torch.finfo(dtype).eps
    y = torch.ones(5, dtype=dtype)
    kernels.axpy_([y], [torch.ones(5, dtype=dtype)], unit / 2 * (1 + unit / 4))
    assert y.tolist() == 5 * [1 + unit]


def test_axpy_of_a_tensor_onto_itself(kernels: Kernels) -> None:
    y = randn(1000, dtype=torch.float32)
    expected = (y.double() * 1.5).float()
    kernels.axpy_([y], [y], 0.5)
    assert torch.equal(y, expected)


# --- axpby_ and normalized_axpby_ -------------------------------------------------------------------------------------


def factors(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_axpby_with_one_factor_and_with_one_for_each(kernels: Kernels, dtype: torch.dtype) -> None:
    def lists() -> tuple[list[Tensor], list[Tensor]]:
        y = [torch.tensor([1.0, 2.0], dtype=dtype), torch.empty(0, dtype=dtype), torch.tensor(-4.0, dtype=dtype)]
        return y, [torch.tensor([8.0, 16.0]), torch.empty(0), torch.tensor(32.0, dtype=torch.float16)]

    y, x = lists()
    kernels.axpby_(y, x, factors(0.25), factors(-1.0))
    assert [each.tolist() for each in y] == [[1.0, 2.0], [], 12.0]
    y, x = lists()
    kernels.axpby_(y, x, factors(0.25, math.nan, -0.5), factors(3.0))
    assert [each.tolist() for each in y] == [[5.0, 10.0], [], -28.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("beta", [1.0, 0.75])
def test_a_factor_of_0_leaves_out_what_is_not_finite(kernels: Kernels, bad: float, beta: float) -> None:
    y, x = [torch.ones(5), torch.ones(3)], [torch.full((5,), bad), torch.ones(3)]
    kernels.axpby_(y, x, factors(0.0, 2.0), factors(beta))
    assert y[0].tolist() == 5 * [beta] and y[1].tolist() == 3 * [beta + 2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_scaling_is_rounded_once(kernels: Kernels, dtype: torch.dtype) -> None:
    y = randn(40, dtype=dtype)
    expected = (y.double() * 0.9).to(dtype)
    kernels.axpby_([y], [torch.ones(40)], factors(0.0), factors(0.9))
    assert torch.equal(y, expected)


def test_a_step_of_given_length(kernels: Kernels) -> None:
    y = [torch.tensor([1.0, 2.0]), torch.tensor(1.0).bfloat16()]
    x = [torch.tensor([2.0, 4.0]), torch.tensor(4.0).half()]
    norm = kernels.normalized_axpby_(y, x, factors(-12.0), factors(0.5))
    assert norm.dtype == torch.float64 and norm.shape == () and norm.item() == 6.0
    assert y[0].tolist() == [-3.5, -7.0] and y[1].item() == -7.5


def test_a_step_against_nothing_only_shrinks(kernels: Kernels) -> None:
    y, x = [torch.tensor([1.0, 2.0]), torch.empty(0)], [torch.zeros(2), torch.empty(0)]
    assert kernels.normalized_axpby_(y, x, factors(-12.0), factors(0.5)).item() == 0.0
    assert y[0].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_of_unknown_direction_changes_nothing(kernels: Kernels, bad: float) -> None:
    x = [randn(20000, dtype=torch.float32), torch.tensor([1.0, bad])]
    y = [randn(20000, dtype=torch.float32, seed=2), torch.tensor([1.0, -0.0])]
    before = [each.clone() for each in y]
    assert not kernels.normalized_axpby_(y, x, factors(-1.0), factors(0.5)).isfinite()
    assert all(map(torch.equal, y, before)) and math.copysign(1.0, y[1][1]) == -1.0


def test_a_step_of_given_length_is_axpby_with_the_norm(kernels: Kernels) -> None:
    x = [randn(n, dtype=torch.float32, seed=n) for n in (20000, 33, 1)]
    one, two = ([randn(n, dtype=torch.float32, seed=n + 1) for n in (20000, 33, 1)] for _ in range(2))
    norm = kernels.normalized_axpby_(one, x, factors(-0.1), factors(0.99))
    assert norm.item() == pytest.approx(math.sqrt(math.fsum(v * v for each in x for v in each.tolist())), rel=4 * EPS)
    kernels.axpby_(two, x, factors(-0.1) / norm, factors(0.99))
    assert all(map(torch.equal, one, two))


def test_strided_targets_are_written_and_their_gaps_are_not(kernels: Kernels) -> None:
    for change in (
        lambda y, x: kernels.axpby_(y, x, factors(2.0), factors(-1.0)),
        lambda y, x: kernels.normalized_axpby_(y, x, 2 * kernels.norms(x).norm().reshape(1), factors(-1.0)),
    ):
        base = torch.full((4, 6), 7.0, dtype=torch.float64)
        last = torch.full((2, 3, 4, 5), 7.0, dtype=torch.float64).to(memory_format=torch.channels_last)
        x = [torch.arange(6.0).reshape(3, 2), torch.arange(60.0).reshape(3, 4, 5).expand(2, 3, 4, 5)]
        change([base[::2, 1::2].T, last], x)
        expected = torch.full((4, 6), 7.0, dtype=torch.float64)
        expected[::2, 1::2] = 2 * x[0].T - 7
        torch.testing.assert_close(base, expected, rtol=4 * EPS, atol=0)
        torch.testing.assert_close(last, (2 * x[1] - 7).double(), rtol=4 * EPS, atol=0)


# --- normalized_step_: the same, past the dispatcher ------------------------------------------------------------------

needs_exchange = pytest.mark.skipif(library.compiled_step is None, reason="no compiled step, or a torch without DLPack")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "a slice": lambda x: torch.cat([x, x])[len(x) :],
}


def with_gradient(p: Tensor, gradient: Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(p)
    parameter.grad = gradient
    return parameter


@needs_exchange
@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(
        st.sampled_from([(1,), (0, 3), (7,), (33, 9), (1, 5), (130, 257), (2, 1, 3)]), min_size=1, max_size=5
    ),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    factor=st.sampled_from([(-0.3, 1.0), (0.7, 0.9), (0.0, 0.5), (-1.0, 0.0)]),
    scale=st.sampled_from([0.0, 1e-30, 1.0, math.inf, math.nan]),
)
def test_a_step_past_the_dispatcher_is_that_through_it(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, layout: str, factor: tuple[float, float], scale: float
) -> None:
    def laid(x: Tensor) -> Tensor:
        return LAYOUTS[layout](x) if x.dim() == 2 else x

    y = [laid(randn(*shape, dtype=dtype, seed=index)) for index, shape in enumerate(shapes)]
    x = [laid(scale * randn(*shape, dtype=dtype, seed=index + 9)) for index, shape in enumerate(shapes)]
    expected = [each.clone() for each in y]
    norm = ops.normalized_axpby_(expected, x, factors(factor[0]), factors(factor[1]))
    params = [with_gradient(each, gradient) for each, gradient in zip(y, x, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(ops.normalized_step_(params, *factor), norm.item(), rtol=0, atol=0, equal_nan=True)
    for p, value, gradient in zip(params, expected, x, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=0, equal_nan=True)
        assert p.grad is gradient


class Wrapped(Tensor):
    """A tensor that may be more than its memory shows."""


def as_imaginary_part() -> Tensor:
    """A tensor of one element whose sign is not in memory."""
    part = torch.complex(torch.zeros(1), -torch.ones(1)).conj().imag
    assert part.is_neg() and part.is_contiguous() and part.item() == 1.0
    return part


@needs_exchange
@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: torch.nn.Parameter(torch.ones(1)), id="no gradient"),
        pytest.param(lambda: with_gradient(torch.ones(1), as_imaginary_part()), id="negated"),
        pytest.param(lambda: with_gradient(torch.ones(2), torch.ones(2).to_sparse()), id="sparse"),
        pytest.param(lambda: with_gradient(torch.ones(2, 3), torch.ones(3, 2).T), id="another order"),
        pytest.param(lambda: with_gradient(torch.ones(4)[::2], torch.ones(2)), id="gaps"),
        pytest.param(lambda: with_gradient(*torch.ones(2, 2, dtype=torch.complex64)), id="complex"),
        pytest.param(lambda: with_gradient(*torch.ones(2, 2, device="meta")), id="meta"),
        pytest.param(lambda: with_gradient(torch.ones(2), torch.ones(2).as_subclass(Wrapped)), id="odd gradient"),
        pytest.param(lambda: with_gradient(torch.ones(2).as_subclass(Wrapped), torch.ones(2)), id="odd parameter"),
        pytest.param(lambda: with_gradient(torch.ones(2), torch._efficientzerotensor(2)), id="zeros without memory"),
        pytest.param(lambda: None, id="no tensor"),
    ],
)
def test_what_must_be_looked_at_is_not_stepped_past_the_dispatcher(odd: Callable[[], Any]) -> None:
    plain = with_gradient(torch.ones(3), torch.ones(3))
    with torch.no_grad():
        assert ops.normalized_step_([plain, odd()], -1.0, 0.5) is None
        assert ops.normalized_step_([odd(), plain], -1.0, 0.5) is None
        assert plain.tolist() == [1.0, 1.0, 1.0] and plain._version == 0
        assert ops.normalized_step_([], -1.0, 0.5) is None
        assert ops.normalized_step_((plain,), -1.0, 0.5) is None  # type: ignore[arg-type]
        assert ops.normalized_step_([plain], -1.0, 1.0) == math.sqrt(3)


@needs_exchange
def test_a_mode_that_watches_gets_to_see_the_step() -> None:
    plain = with_gradient(torch.ones(3), torch.ones(3))
    with torch.no_grad(), TorchDispatchMode():
        assert ops.normalized_step_([plain], -1.0, 1.0) is None
    assert plain.tolist() == [1.0, 1.0, 1.0]


@needs_exchange
def test_a_norm_that_is_not_finite_leaves_saved_tensors_as_they_were() -> None:
    p = with_gradient(torch.ones(3), torch.full((3,), math.inf))
    with torch.no_grad():
        assert ops.normalized_step_([p], -1.0, 1.0) == math.inf
    assert p.tolist() == [1.0, 1.0, 1.0] and p._version == 0


@needs_exchange
def test_a_step_past_the_dispatcher_is_noticed_by_autograd() -> None:
    p = with_gradient(torch.ones(3), torch.ones(3))
    loss = (p**2).sum()
    with pytest.raises(RuntimeError, match="normalized_step_ is not differentiable"):
        ops.normalized_step_([p], -1.0, 1.0)
    with torch.no_grad():
        ops.normalized_step_([p], -1.0, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_exchange
def test_references_are_given_back() -> None:
    p, odd = with_gradient(torch.ones(3), torch.ones(3)), torch.nn.Parameter(torch.ones(1))
    before = [sys.getrefcount(each) for each in (p, p.grad, odd, None)]
    with torch.no_grad():
        for _ in range(1000):
            ops.normalized_step_([p], -1e-3, 1.0)
            ops.normalized_step_([p, odd], -1e-3, 1.0)
    after = [sys.getrefcount(each) for each in (p, p.grad, odd, None)]
    assert all(abs(one - other) < 100 for one, other in zip(before, after, strict=True))


# --- what holds for all -----------------------------------------------------------------------------------------------


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
def test_native_answers_do_not_depend_on_the_number_of_threads(thread_count: Callable[[int], None]) -> None:
    basis = orthonormal_rows(6, 100_000).float()
    lists = [randn(n, dtype=torch.float32, seed=n) for n in (90_001, 3, 40_000)]
    answers = []
    for threads in (1, 2, 5):
        thread_count(threads)
        vector = randn(100_000)
        answer = [COMPILED.orthogonalize_(basis, vector), vector, COMPILED.dot(lists, lists), COMPILED.norms(lists)]
        y = [randn(each.numel(), dtype=torch.float32) for each in lists]
        COMPILED.axpby_(y, lists, factors(0.1, -0.2, 0.3), factors(0.9))
        answers.append([*answer, COMPILED.normalized_axpby_(y, lists, factors(0.1), factors(0.9)), *y])
    for answer in answers[1:]:
        assert all(torch.equal(got, expected) for got, expected in zip(answer, answers[0], strict=True))


class LargestFloat64(TorchDispatchMode):
    """Records the size of the largest float64 tensor that owns new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64 and not func.is_view and result is not args[0]:
            self.elements = max(self.elements, result.numel())
        return result


def test_twins_never_copy_the_whole_basis_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 64)
    basis, vector = orthonormal_rows(4, 1000).float(), randn(1000)
    with LargestFloat64() as largest:
        TWIN.orthogonalize_(basis, vector)
        TWIN.dot([basis], [basis])
        TWIN.axpy_([vector], [basis[0]], 1.0)
        TWIN.norms([basis])
        TWIN.normalized_axpby_([vector], [basis[0]], factors(1.0), factors(0.5))
    assert 0 < largest.elements <= 64


@pytest.mark.parametrize(
    ("basis", "vector", "message"),
    [
        (torch.eye(2, 3), torch.ones(3), "vector must be float64"),
        (torch.eye(2, 3), torch.ones(2).double(), r"got \(2, 3\) and \(2,\)"),
        (torch.ones(3), torch.ones(3).double(), r"basis must be \(k, n\)"),
        (torch.eye(3, 2).T, torch.ones(3).double(), "must be contiguous"),
        (torch.eye(2, 3), torch.ones(6).double()[::2], "must be contiguous"),
        (torch.eye(2, 3).long(), torch.ones(3).double(), "must be floating point"),
    ],
)
def test_orthogonalize_refuses(kernels: Kernels, basis: Tensor, vector: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.orthogonalize_(basis, vector)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([torch.ones(2)], [], "same length, at least 1, got 1 and 0"),
        ([torch.ones(2), torch.ones(2, 3)], [torch.ones(2), torch.ones(6)], r"pair 1 .*\(2, 3\) and \(6,\)"),
        ([torch.ones(2)], [torch.ones(2).int()], "must be floating point"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.complex64)], "must be floating point"),
    ],
)
def test_lists_refuse(kernels: Kernels, a: list[Tensor], b: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.dot(a, b)
    with pytest.raises(RuntimeError, match=message):
        kernels.axpy_(a, b, 1.0)
    for change in (kernels.axpby_, kernels.normalized_axpby_):
        with pytest.raises(RuntimeError, match=message):
            change(a, b, factors(1.0), factors(1.0))


def test_norms_refuse(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="same length, at least 1, got 0 and 0"):
        kernels.norms([])
    with pytest.raises(RuntimeError, match="must be floating point"):
        kernels.norms([torch.ones(2), torch.ones(2).int()])


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (torch.ones(1), factors(1.0), "alpha must be contiguous float64 of length 1"),
        (factors(1.0)[0], factors(1.0), r"alpha must be .*got .*\(\)"),
        (factors(1.0, 2.0, 3.0), factors(1.0), r"alpha must be .*got .*\(3,\)"),
        (factors(), factors(1.0), "alpha must be"),
        (factors(1.0), factors(1.0, 2.0), r"beta must be .*got .*\(2,\)"),
        (factors(1.0), factors(1.0)[0], "beta must be"),
    ],
)
def test_factors_are_refused(kernels: Kernels, alpha: Tensor, beta: Tensor, message: str) -> None:
    y = [torch.ones(2), torch.ones(3)]
    for change, name in ((kernels.axpby_, "axpby_"), (kernels.normalized_axpby_, "normalized_axpby_")):
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            change(y, [torch.ones(2), torch.ones(3)], alpha, beta)
    assert y[0].tolist() == [1.0, 1.0]


def test_one_factor_for_each_tensor_has_one_for_each(kernels: Kernels) -> None:
    y, two = [torch.ones(2), torch.ones(3)], factors(1.0, 2.0)
    kernels.axpby_(y, y, two, factors(1.0))
    with pytest.raises(RuntimeError, match="normalized_axpby_: alpha must be"):
        kernels.normalized_axpby_(y, y, two, factors(1.0))
    with pytest.raises(RuntimeError, match="must be contiguous"):
        kernels.axpby_(y, y, factors(1.0, 2.0, 3.0)[::2], factors(1.0))


def test_axpy_writes_to_strided_targets(kernels: Kernels) -> None:
    base = torch.zeros(4, 6)
    last = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    x = torch.arange(60.0).reshape(3, 4, 5).expand(2, 3, 4, 5)
    kernels.axpy_([base[::2, 1::2].T, last], [torch.arange(6.0).reshape(3, 2), x], 2.0)
    expected = torch.zeros(4, 6)
    expected[::2, 1::2] = 2 * torch.arange(6.0).reshape(3, 2).T
    assert torch.equal(base, expected)
    assert torch.equal(last, 2 * x)
    same = x.clone(memory_format=torch.channels_last)
    kernels.axpy_([same], [same.clone(memory_format=torch.preserve_format)], 1.0)
    assert torch.equal(same, 2 * x)


def test_differentiation_is_refused_not_dropped() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for call in (
        lambda: ops.dot([x], [x]),
        lambda: ops.norms([x]),
        lambda: ops.axpy_([torch.ones(3).double()], [x]),
        lambda: ops.axpby_([x], [torch.ones(3)], factors(1.0), factors(1.0)),
        lambda: ops.axpby_([torch.ones(3)], [torch.ones(3)], factors(1.0).requires_grad_(), factors(1.0)),
        lambda: ops.normalized_axpby_([x], [torch.ones(3)], factors(1.0), factors(1.0)),
        lambda: ops.orthogonalize_(torch.eye(1, 3), x),
    ):
        with pytest.raises(RuntimeError, match="not differentiable"):
            call()
    with torch.no_grad():
        assert ops.dot([x], [x]).item() == 3.0
        ops.axpy_([x], [x.detach().clone()], 1.0)
    assert x.tolist() == [2.0, 2.0, 2.0]


def test_autograd_notices_that_a_saved_tensor_was_changed() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for change in (
        lambda saved: ops.axpy_([saved], [torch.ones(3)]),
        lambda saved: ops.axpby_([saved], [torch.ones(3)], factors(1.0), factors(1.0)),
        lambda saved: ops.normalized_axpby_([saved], [torch.ones(3)], factors(1.0), factors(1.0)),
        lambda saved: ops.orthogonalize_(torch.eye(1, 3), saved),
    ):
        saved = x * 2
        loss = (saved * saved).sum()
        with torch.no_grad():
            change(saved.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("orthogonalize_", (torch.eye(3, 10), torch.ones(10).double())),
        ("orthogonalize_", (torch.empty(0, 10), torch.ones(10).double())),
        ("dot", ([torch.ones(3, 2), torch.ones(4)], [torch.ones(3, 2).bfloat16(), torch.ones(4).double()])),
        ("dot", ([torch.ones(3, requires_grad=True)], [torch.ones(3)])),
        ("axpy_", ([torch.ones(3, 2).double(), torch.ones(4)], [torch.ones(2, 3).T, torch.ones(4)], 0.5)),
        ("line_squares", ([torch.ones(3, 4), torch.ones(2, 5, 3).double()],)),
        ("norms", ([torch.ones(3, 2).T, torch.ones(4).double()],)),
        ("axpby_", ([torch.ones(3, 2).T, torch.ones(4)], [torch.ones(2, 3), torch.ones(4)], TWO, TWO[:1])),
        ("axpby_", ([torch.ones(3, requires_grad=True)], [torch.ones(3).half()], TWO[:1], TWO[1:])),
        ("normalized_axpby_", ([torch.ones(3, 2).T], [torch.ones(2, 3).double()], TWO[:1], TWO[1:])),
    ],
)
def test_opcheck(name: str, arguments: tuple) -> None:
    torch.library.opcheck(getattr(torch.ops.torchflat, name).default, arguments)


def chain(basis: Tensor, vector: Tensor, y: list[Tensor], x: list[Tensor]) -> Tensor:
    coefficients, rest = ops.orthogonalize_(basis, vector)
    ops.axpy_(y, x, 2.0)
    ops.axpby_(y, x, ops.norms(x), rest.reshape(1))
    length = ops.normalized_axpby_(y, x, coefficients[:1], rest.reshape(1))
    return coefficients.sum() + rest + ops.dot(y, x) + ops.norm(x) + length


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend: str) -> None:
    def arguments() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        y = [randn(4, 3), randn(5)]
        return orthonormal_rows(3, 40), randn(40), y, [each.float() for each in y]

    eager, compiled = arguments(), arguments()
    expected = chain(*eager)
    assert torch.equal(torch.compile(chain, fullgraph=True, backend=backend)(*compiled), expected)
    assert torch.equal(compiled[1], eager[1]) and torch.equal(compiled[2][0], eager[2][0])


# --- which kernels run ------------------------------------------------------------------------------------------------


def in_new_process(code: str, choice: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCHFLAT_OPS": choice}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_forces_the_twins() -> None:
    code = "from torchflat import ops; print(ops.backend('cpu'), ops.describe()['cpu']['reason'])"
    assert in_new_process(code, "reference").stdout.strip() == "reference TORCHFLAT_OPS=reference"


def test_an_unknown_choice_is_refused() -> None:
    answer = in_new_process("import torchflat.ops", "fast")
    assert answer.returncode != 0 and "UsageError: TORCHFLAT_OPS is 'fast'" in answer.stderr


def test_describe_names_the_reason_that_the_build_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    record = tmp_path / "_build.json"
    record.write_text('{"cpu_reason": "no C++ compiler", "cuda_reason": "no nvcc"}')
    monkeypatch.delenv("TORCHFLAT_OPS", raising=False)
    monkeypatch.setattr(library, "_BUILD_RECORD", record)
    with pytest.raises(OSError, match="no nvcc"):
        library._load("cuda")
    record.unlink()
    with pytest.raises(OSError, match="not built: run `pip install"):
        library._load("cpu")


def test_kernels_for_another_cuda_are_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    record = tmp_path / "_build.json"
    record.write_text('{"cpu_reason": null, "cuda_reason": null, "cuda": "7.5"}')
    monkeypatch.delenv("TORCHFLAT_OPS", raising=False)
    monkeypatch.setattr(library, "_BUILD_RECORD", record)
    with pytest.raises(OSError, match=r"built for CUDA 7\.5"):
        library._load("cuda")


def test_describe_agrees_with_backend() -> None:
    for device in ("cpu", "cuda"):
        entry = ops.describe()[device]
        assert entry["kernels"] == ops.backend(device)
        assert (entry["kernels"] == "native") == (entry["library"] is not None) == (entry["reason"] is None)


# --- CUDA -------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (1000, 7), (4097, 33), (1_000_003, 20), (3000, 300)])
def test_cuda_orthogonalize_is_its_twin(n: int, k: int, dtype: torch.dtype) -> None:
    assert ops.backend("cuda") == "native", ops.describe()["cuda"]["reason"]
    basis, one = orthonormal_rows(k, n).to("cuda", dtype), randn(n).cuda()
    two, three = one.clone(), one.clone()
    scale = one.norm().item()
    expected = TWIN.orthogonalize_(basis, two)
    got = COMPILED.orthogonalize_(basis, one)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14 * scale)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14 * scale)
    assert torch.equal(COMPILED.orthogonalize_(basis, three), got) and torch.equal(three, one)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("left", FLOATS)
@pytest.mark.parametrize("right", FLOATS)
def test_cuda_lists_are_their_twins(left: torch.dtype, right: torch.dtype) -> None:
    assert ops.backend("cuda") == "native", ops.describe()["cuda"]["reason"]
    sizes = [0, 1, 255, 257, 65536, 65537, 1_000_003, *range(200)]
    a = [randn(n, seed=n).to("cuda", left) for n in sizes]
    b = [randn(n, seed=n + 1).to("cuda", right) for n in sizes]
    assert COMPILED.dot(a, b).item() == pytest.approx(TWIN.dot(a, b).item(), abs=1e-10)
    assert torch.equal(COMPILED.dot(a, b), COMPILED.dot(a, b))
    torch.testing.assert_close(COMPILED.norms(a), TWIN.norms(a), rtol=1e-13, atol=0)
    alpha, beta = torch.linspace(-1, 1, len(a)).double().cuda(), factors(0.9).cuda()
    alpha[3] = 0
    for change in (
        lambda kernels, y: kernels.axpy_(y, b, 0.37),
        lambda kernels, y: kernels.axpby_(y, b, alpha, beta),
        lambda kernels, y: kernels.normalized_axpby_(y, b, alpha[:1], beta),
    ):
        one, two = [x.clone() for x in a], [x.clone() for x in a]
        change(COMPILED, one)
        change(TWIN, two)
        assert_rounded_alike(one, two, b)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_cuda_steps_of_unknown_direction_change_nothing(bad: float) -> None:
    y, x = [torch.ones(70000, device="cuda"), torch.ones(3, device="cuda")], [torch.ones(70000, device="cuda")]
    x.append(torch.tensor([1.0, bad, 1.0], device="cuda"))
    one = factors(1.0).cuda()
    assert not COMPILED.normalized_axpby_(y, x, one, one / 2).isfinite()
    assert all((each == 1).all() for each in y)
    COMPILED.axpby_(y, x, torch.cat([one, 0 * one]), one / 2)
    assert (y[0] == 1.5).all() and (y[1] == 0.5).all()
