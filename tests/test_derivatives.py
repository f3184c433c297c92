"""Norms of derivatives of any order, against closed forms, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import network
from torch import Tensor, nn

from torchflat import Objective, Status
from torchflat.errors import LossError, NonFiniteError, UsageError
from torchflat.flatness import DerivativeNorm, derivative_norm
from torchflat.spectrum import NotConvergedWarning

Function = Callable[[Tensor], Tensor]


def norm_of(fn: Function, x: list[float] | Tensor, k: int, **options: Any) -> DerivativeNorm:
    point = torch.as_tensor(x, dtype=torch.float64)
    answer = derivative_norm(Objective.from_function(fn, point), k, **options)
    assert float(answer.vector.norm()) == pytest.approx(1, abs=1e-12)
    return answer


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def form(weights: list[float], k: int, seed: int) -> Function:
    """Σ wᵢ⟨qᵢ,x⟩ᵏ/k! with orthonormal qᵢ: its k-th derivative has the norm max |wᵢ|, for k ≥ 3 and for k = 2."""
    basis, scales = orthogonal(len(weights), seed), torch.tensor(weights, dtype=torch.float64) / math.factorial(k)
    return lambda x: (scales * (basis @ x) ** k).sum()


# Known answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn, x, k, norm",
    [
        (lambda x: (x[0] * x[1] - 1) ** 4, [2.0, 0.5], 4, 433.5),  # T028
        (lambda x: (x[0] * x[1] - 1) ** 4, [1.0, 1.0], 4, 96.0),  # T006
        (lambda x: (x[0] * x[1] - 1) ** 4, [1.5, 2 / 3], 4, 24 * (2.25 + 4 / 9) ** 2),
        (lambda x: (x[0] * x[1] - 1) ** 4 / 4, [2.0, 0.5], 4, 108.375),  # T007
        (lambda x: -((x[0] * x[1] - 1) ** 4) / 4, [2.0, 0.5], 4, 108.375),
        (lambda x: x[1] ** 2 + x[0] ** 2 * x[1] ** 4, [0.0, 0.0], 2, 2.0),
        (lambda x: x[1] ** 2 + x[0] ** 2 * x[1] ** 4, [0.0, 0.0], 3, 0.0),
        # max of x²y⁴·6! on the circle, at x² = 1/3.
        (lambda x: x[1] ** 2 + x[0] ** 2 * x[1] ** 4, [0.0, 0.0], 6, 720 * 4 / 27),
        # 3·2xyz on the sphere, at (1, 1, 1)/√3.
        (lambda x: x[0] * x[1] * x[2], [0.0, 0.0, 0.0], 3, 6 / 3**1.5),
        (lambda x: x.abs().sum() ** 2, [3.0, -4.0], 2, 4.0),
        (lambda x: x.relu().sum(), [1.0, 2.0], 2, 0.0),
        (lambda x: x.exp().sum(), [0.0], 5, 1.0),
    ],
)
def test_norms_in_closed_form(fn: Function, x: list[float], k: int, norm: float) -> None:
    answer = norm_of(fn, x, k, starts=2 if k > 4 else 4)
    assert answer.value == pytest.approx(norm, rel=1e-6, abs=1e-12)
    assert answer.status is Status.CONVERGED and answer.residual <= 1e-4 * answer.value


@pytest.mark.parametrize("rows, k", [(1, 4), (3, 4), (3, 2)])
def test_the_norm_of_a_power_of_residuals(rows: int, k: int) -> None:
    """T007: for f = |F|ᵏ/k with F(x) = 0, (k − 1)!·‖F′(x)‖ᵏ."""
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(5, generator=generator, dtype=torch.float64)

    def residuals(y: Tensor) -> Tensor:
        return a @ y.sin() + (b @ y) ** 2 - (a @ x.sin() + (b @ x) ** 2)

    jacobian = torch.func.jacrev(residuals)(x)
    answer = norm_of(lambda y: residuals(y).square().sum() ** (k // 2) / k, x, k)
    assert answer.value == pytest.approx(
        math.factorial(k - 1) * float(torch.linalg.matrix_norm(jacobian, 2)) ** k, rel=1e-6
    )
    assert answer.sign == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [3, 4])
def test_orthogonally_decomposable_forms(k: int, seed: int) -> None:
    answer = norm_of(form([-3.0, 2.5, 1.0], k, seed), torch.zeros(3), k)
    assert answer.value == pytest.approx(3, rel=1e-6)
    assert answer.sign == -1 or k == 3  # −v takes the opposite value, and either may be found
    assert abs(float(answer.vector @ orthogonal(3, seed)[0])) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("k", [3, 4])
@settings(max_examples=5, deadline=None)
@given(
    weights=st.lists(st.floats(-4, 4).filter(lambda w: abs(w) > 0.1), min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_what_is_reached_is_a_local_maximum(k: int, weights: list[float], seed: int) -> None:
    """Those of an orthogonally decomposable form are its components, and one start may end at any of them."""
    answer = norm_of(form(weights, k, seed), torch.zeros(len(weights)), k, starts=1)
    assert any(answer.value == pytest.approx(abs(weight), rel=1e-6) for weight in weights)
    assert answer.value <= max(map(abs, weights)) * (1 + 1e-12)


def test_the_vector_attains_the_value() -> None:
    """By an independent path: the whole tensor of derivatives."""

    def fn(x: Tensor) -> Tensor:
        return (x.sin().cumsum(0) ** 2).sum() + x.prod()

    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    for k in (1, 2, 3, 4):
        answer = norm_of(fn, x, k)
        tensor = fn
        for _ in range(k):
            tensor = torch.func.jacfwd(tensor)
        contracted = tensor(x)
        for _ in range(k):
            contracted = contracted @ answer.vector
        assert float(contracted) == pytest.approx(answer.sign * answer.value, rel=1e-10)
        points = torch.randn(2000, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        points /= points.norm(dim=1, keepdim=True)
        values = torch.einsum(f"{'abcd'[:k]},{','.join('z' + i for i in 'abcd'[:k])}->z", tensor(x), *[points] * k)
        assert 0.98 * answer.value <= float(values.abs().max()) <= answer.value * (1 + 1e-9)


def test_the_first_is_the_gradient_and_the_second_the_spectral_norm() -> None:
    case = network("linear")
    f = case.objective(dtype=torch.float64)
    first, second = (derivative_norm(f, k, starts=2) for k in (1, 2))
    assert first.value == pytest.approx(float(f.gradient().norm()), rel=1e-12)
    eigenvalues = torch.linalg.eigvalsh(case.hessian())
    extreme = max(eigenvalues, key=abs)
    assert second.value == pytest.approx(abs(float(extreme)), rel=1e-5) and second.sign == torch.sign(extreme)


@settings(max_examples=5, deadline=None)
@given(scale=st.floats(-1e3, 1e3).filter(lambda s: abs(s) > 1e-3), k=st.integers(1, 3), seed=st.integers(0, 9))
def test_scaling_f_scales_the_norm(scale: float, k: int, seed: int) -> None:
    def fn(x: Tensor) -> Tensor:
        return (orthogonal(3, seed) @ x).sin().sum().exp()

    x = orthogonal(3, seed)[0]
    plain, scaled = (norm_of(lambda y, c=c: c * fn(y), x, k, starts=2, rtol=1e-6) for c in (1.0, scale))
    assert scaled.value == pytest.approx(abs(scale) * plain.value, rel=1e-8)


@settings(max_examples=5, deadline=None)
@given(k=st.integers(1, 3), seed=st.integers(0, 9))
def test_turning_the_variables_keeps_the_norm_and_turns_the_vector(k: int, seed: int) -> None:
    def fn(x: Tensor) -> Tensor:
        return x[0] ** 3 + (x[0] * x[1] - x[2]) ** 2 + x.sin().sum() ** 4

    x, turn = torch.tensor([0.4, -0.2, 0.9], dtype=torch.float64), orthogonal(3, seed)
    options = {"rtol": 1e-6, "starts": 4}
    plain, turned = norm_of(fn, x, k, **options), norm_of(lambda y: fn(turn @ y), turn.T @ x, k, **options)
    assert turned.value == pytest.approx(plain.value, rel=1e-8)
    assert abs(float((turn @ turned.vector) @ plain.vector)) == pytest.approx(1, abs=1e-4)


# Models over data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused_attention", "conv", "batchnorm", "lstm", "tokens", "weight_decay"])
def test_networks_agree_with_the_loss_of_all_rows_at_once(name: str) -> None:
    case = network(name)
    f = case.objective(dtype=torch.float64, microbatch=3)
    reference, x = case.reference()
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        answer = derivative_norm(f, 3, starts=1, budget=8 * 4)
    line: Function = lambda t: reference(x + t * answer.vector)  # noqa: E731
    for _ in range(3):
        line = torch.func.grad(line)
    third = float(line(torch.zeros((), dtype=torch.float64)))
    assert answer.sign * answer.value == pytest.approx(third, rel=1e-5)


def test_a_network_with_layer_norm_agrees_with_differences_of_products() -> None:
    f = network("layernorm").objective(dtype=torch.float64)
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        answer = derivative_norm(f, 3, starts=1, budget=8 * 4)
    ahead, behind = (float(f.at(f.x + t * answer.vector).hvp(answer.vector) @ answer.vector) for t in (1e-4, -1e-4))
    assert answer.sign * answer.value == pytest.approx((ahead - behind) / 2e-4, rel=1e-5)


def test_the_ledger_books_what_nested_duals_cost() -> None:
    f = Objective.from_function(lambda x: (x**4).sum(), torch.ones(3, dtype=torch.float64))
    f.value()
    for k, each in ((2, 3), (3, 8), (4, 20)):
        answer = derivative_norm(f, k, starts=2)
        assert answer.cost.gradients == pytest.approx(answer.steps * each)
        assert answer.cost.forwards == answer.cost.backwards and answer.cost.products == 0


def test_the_l2_term_counts_up_to_order_two() -> None:
    def norm(k: int, weight_decay: float) -> float:
        x = torch.tensor([3.0, 4.0], dtype=torch.float64)
        f = Objective.from_function(lambda x: x.sum() ** 3 / 6, x, weight_decay=weight_decay)
        return derivative_norm(f, k, starts=2).value

    assert norm(2, 5.0) == pytest.approx(norm(2, 0.0) + 5)
    assert norm(3, 5.0) == pytest.approx(norm(3, 0.0)) == pytest.approx(2**1.5)
    assert norm(1, 2.0) == pytest.approx(math.hypot(24.5 + 6, 24.5 + 8))


def test_float32_says_when_rounding_stops_it() -> None:
    weights = torch.linspace(1, 2, 50)
    f = Objective.from_function(lambda x: (weights * x**2).sum().exp() / 1e3, torch.full((50,), 0.1))
    with pytest.warns(NotConvergedWarning, match="ROUNDING_LIMITED"):
        answer = derivative_norm(f, 3, starts=1, rtol=0.0)
    exact = Objective.from_function(lambda x: (weights * x**2).sum().exp() / 1e3, torch.full((50,), 0.1).double())
    assert answer.value == pytest.approx(derivative_norm(exact, 3).value, rel=1e-4)


def test_the_same_seed_gives_the_same_answer() -> None:
    first, same, other = (norm_of(form([1, 2, -1.5], 3, 0), [0.0] * 3, 3, seed=seed).reached for seed in (0, 0, 1))
    assert first == same != other


def test_a_callback_sees_the_value_grow_and_can_stop_it() -> None:
    seen: list[float] = []
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        answer = norm_of(
            form([1, 2, -1.5], 4, 0), [0.0] * 3, 4, callback=lambda value: seen.append(value) or len(seen) > 6
        )
    assert len(seen) == 7 and seen == sorted(seen) and answer.value == seen[-1]
    assert answer.status is Status.BUDGET and "value" in answer.to_dict()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k=0: it must be an integer from 1 to 8"),
        ({"k": 9}, "k=9: it must be an integer from 1 to 8"),
        ({"k": 2.5}, r"k=2\.5: it must be an integer"),
        ({"k": 2, "starts": 0}, "starts=0: it must be a positive number"),
        ({"k": 2, "rtol": -1.0}, "rtol=-1.0: it must be a number >= 0"),
        ({"k": 2, "budget": 0.0}, "budget=0.0: it must be a positive number"),
    ],
)
def test_requests_out_of_range(options: dict[str, Any], message: str) -> None:
    f = Objective.from_function(lambda x: (x**2).sum(), torch.ones(2))
    with pytest.raises(UsageError, match=message):
        derivative_norm(f, **options)
    assert f.cost.gradients == 0


def test_a_derivative_that_is_not_finite_is_named() -> None:
    with pytest.raises(NonFiniteError, match="the derivative of micro-batch 0 holds NaN or infinity"):
        norm_of(lambda x: x.abs().pow(1.5).sum(), [0.0, 1.0], 3)


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class _Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.1]]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.centres).sum(dim=1, keepdim=True)


def test_an_operator_without_forward_mode_is_named_with_its_cure() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-1.0, 0.0]])
    message = "forward-mode AD of _cdist_forward is not implemented in torch: write it in plain operations"
    with pytest.raises(LossError, match=message):
        norm_of(lambda y: torch.cdist(y[None], x.double()).sum(), [0.0, 1.0], 3)
    with pytest.raises(LossError, match=r"cannot nest .* write \(x \* x\)\.sum\(\)\.sqrt\(\) in their place"):
        norm_of(lambda y: y.norm() ** 3, [1.0, 1.0], 3)
    f = Objective(_Distances(), nn.MSELoss(), (x, x[:, :1]))
    assert derivative_norm(f, 1).value == pytest.approx(float(f.gradient().norm()))
    with pytest.raises(LossError, match=message):
        derivative_norm(f, 2)
    with pytest.raises(LossError, match="has no forward-mode derivative: give the function setup_context and jvp"):
        norm_of(lambda y: _Squared.apply(y).sum(), [1.0, 1.0], 2)


# Operators whose forward-mode rule takes for constant what is none ----------------------------------------------------


def _written_out(x: Tensor, axes: tuple[int, ...], scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt() * scale + shift


WEIGHT, BIAS = torch.tensor([[0.7, 1.6, -1.1], [0.2, -0.4, 0.5]], dtype=torch.float64)
COLUMN, SHIFT = WEIGHT[:, None], BIAS[:, None]
NORMS: dict[str, tuple[Function, Function]] = {
    "layer": (lambda h: F.layer_norm(h, (3, 4)), lambda h: _written_out(h, (-2, -1))),
    "layer with a scale": (
        lambda h: F.layer_norm(h.mT, (3,), WEIGHT, BIAS),
        lambda h: _written_out(h.mT, (-1,), WEIGHT, BIAS),
    ),
    "torch.layer": (lambda h: torch.layer_norm(h, (4,)), lambda h: _written_out(h, (-1,))),
    "aten.layer": (lambda h: torch.ops.aten.layer_norm.default(h, [4]), lambda h: _written_out(h, (-1,))),
    "batch": (
        lambda h: F.batch_norm(h, None, None, WEIGHT, BIAS, training=True),
        lambda h: _written_out(h, (0, 2), COLUMN, SHIFT),
    ),
    "torch.batch": (
        lambda h: torch.batch_norm(h, WEIGHT, BIAS, None, None, True, 0.1, 1e-5, True),
        lambda h: _written_out(h, (0, 2), COLUMN, SHIFT),
    ),
    "batch as it was trained": (
        lambda h: F.batch_norm(h, BIAS, WEIGHT**2, WEIGHT, BIAS),
        lambda h: (h - SHIFT) / (COLUMN**2 + 1e-5).sqrt() * COLUMN + SHIFT,
    ),
    "instance": (nn.InstanceNorm1d(3), lambda h: _written_out(h, (2,))),
    "torch.instance": (
        lambda h: torch.instance_norm(h, WEIGHT, BIAS, None, None, True, 0.1, 1e-5, True),
        lambda h: _written_out(h, (2,), COLUMN, SHIFT),
    ),
    "instance as it was trained": (
        lambda h: F.instance_norm(h, BIAS, WEIGHT**2, use_input_stats=False),
        lambda h: (h - SHIFT) / (COLUMN**2 + 1e-5).sqrt(),
    ),
    "group": (
        lambda h: F.group_norm(h, 1, WEIGHT, BIAS),
        lambda h: _written_out(h, (1, 2), COLUMN, SHIFT),
    ),
    "rms": (
        lambda h: F.rms_norm(h, (4,), eps=1e-5),
        lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    ),
    "softmax": (lambda h: h.softmax(-1), lambda h: h.exp() / h.exp().sum(-1, keepdim=True)),
    "log_softmax": (lambda h: h.log_softmax(-1), lambda h: h - h.exp().sum(-1, keepdim=True).log()),
    "gelu": (F.gelu, lambda h: h / 2 * (1 + torch.erf(h / 2**0.5))),
    "silu": (F.silu, lambda h: h / (1 + (-h).exp())),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_derivatives_are_those_of_the_operator_written_out(name: str, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, weights, x = (torch.randn(24, generator=generator, dtype=torch.float64) for _ in range(3))
    kernel, plain = NORMS[name]

    def loss(norm: Function) -> Function:
        return lambda x: (norm((base * x + x.roll(1) ** 2).view(2, 3, 4)).reshape(-1) * weights).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        found = norm_of(loss(kernel), x, k, starts=1, budget=3 * 2**k * k)
    line: Function = lambda t: loss(plain)(x + t * found.vector)  # noqa: E731
    for _ in range(k):
        line = torch.func.grad(line)
    assert found.sign * found.value == pytest.approx(float(line(torch.zeros((), dtype=torch.float64))), rel=1e-8)


@pytest.mark.parametrize("operator", [torch.linalg.det, lambda a: torch.linalg.solve(a, a.new_ones(2, 1)).sum()])
def test_a_rule_that_cannot_be_differentiated_is_refused(operator: Function) -> None:
    x = [2.0, 1.0, 0.5, 3.0]
    with pytest.raises(LossError, match=r"off H·v by .*: torch lacks a derivative of .*; write that in plain"):
        norm_of(lambda x: operator(x.view(2, 2)), x, 3)
    assert norm_of(lambda x: x[0] * x[3] - x[1] * x[2], x, 2).value == pytest.approx(1)
    assert norm_of(lambda x: operator(x.view(2, 2)), x, 1).value > 0
