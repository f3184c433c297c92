"""Values, gradients and products against dense Hessians; paths, costs, accuracy and errors."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Network, network
from torch import Tensor, nn

import torchflat
from torchflat import Objective
from torchflat.errors import DataError, LossError, NonFiniteError, ReproducibilityError, UsageError
from torchflat.objective.accuracy import DIFFERENCE_ROWS

DIGITS = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, least: float = 0.0) -> None:
    error = torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected)
    assert float(error) <= max(DIGITS[dtype], least)


# Against dense Hessians ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", NETWORKS)
def test_value_gradient_and_hessian_are_those_of_the_dense_reference(name: str, dtype: torch.dtype) -> None:
    case = network(name)
    reference, x = case.reference()
    f = case.objective(dtype=dtype)
    assert f.n == len(x)
    assert_close(f.x, x, dtype)
    assert f.value() == pytest.approx(float(reference(x)), rel=DIGITS[dtype])
    assert_close(f.gradient(), case.gradient(reference, x), dtype)
    assert_close(f.hvp(torch.eye(f.n, dtype=dtype)), case.hessian(), dtype, case.by_differences)
    assert f.provenance()["products"] == "retained"


@pytest.mark.parametrize("name", ["fused_attention", "multihead", "weight_norm"])
def test_fused_kernels_give_way_and_the_answer_says_so(name: str) -> None:
    f = network(name).objective()
    f.gradient()
    assert f.provenance()["notes"] == []
    f.hvp(torch.ones(f.n))
    assert len(f.provenance()["notes"]) == 1 and "its plain form was used" in f.provenance()["notes"][0]


def test_the_fused_attention_of_the_table_is_one_that_cannot_be_differentiated_twice() -> None:
    case = network("fused_attention")
    parameters = list(case.model.parameters())
    gradients = torch.autograd.grad(case.total(case.model, lambda value: value), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match=r"flash_attention.* is not implemented"):
        torch.autograd.grad(sum(g.sum() for g in gradients), parameters)


PATH_CASES = ["relu", "tokens", "dict_batches", "weight_decay", "unused_and_scalar", "batchnorm", "lstm"]


@pytest.mark.parametrize("microbatch", [1, 3, 7, None])
@pytest.mark.parametrize("name", PATH_CASES)
def test_micro_batches_change_nothing(name: str, microbatch: int | None) -> None:
    case = network(name)
    reference, x = case.reference()
    f = case.objective(dtype=torch.float64, microbatch=microbatch)
    vectors = torch.randn(f.n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert f.value() == pytest.approx(float(reference(x)), rel=1e-12)
    assert_close(f.gradient(), case.gradient(reference, x), torch.float64)
    assert_close(f.hvp(vectors), case.hessian() @ vectors, torch.float64)
    assert f.provenance()["microbatch"] == (microbatch or 4096)


def budget_for(f: Objective, share: float) -> int:
    """Bytes of memory in which this share of the graphs that f has retained would be."""
    workspace = f.memory.total - f._graphs._room()
    return workspace + int(share * f.memory.graphs)


@pytest.mark.parametrize("name", PATH_CASES)
def test_retained_rebuilt_and_mixed_graphs_give_the_same_products(name: str) -> None:
    case = network(name)
    roomy = case.objective(dtype=torch.float64, microbatch=3)
    vector = torch.randn(roomy.n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = case.hessian() @ vector
    roomy.hvp(vector)
    for path, total in [("rebuilt", 0), ("mixed", budget_for(roomy, 0.5)), ("retained", budget_for(roomy, 1.0))]:
        f = case.objective(dtype=torch.float64, microbatch=3, memory=total)
        for _ in range(2):
            assert_close(f.hvp(vector), expected, torch.float64)
            assert f.provenance()["products"] == path
        assert f.memory.graphs <= total


def test_graphs_of_all_the_rows_make_room_for_those_of_a_sample() -> None:
    case = network("relu")
    f = case.objective(microbatch=3, memory="10MB")
    v = torch.ones(f.n)
    f.hvp(v)
    sample = f.take(torch.arange(6))
    sample.hvp(v)
    assert f.provenance()["products"] == sample.provenance()["products"] == "retained"
    own = sum(graph.bytes for graph in sample._graphs._kept.values())
    with f.memory.vectors_held(sample._graphs._room() - own):
        sample.hvp(v)
        assert f.provenance()["products"] == "rebuilt" and f.memory.graphs == own
        assert sample.provenance()["products"] == "retained"
    with f.memory.vectors_held(10_000_000):
        sample.hvp(v)
        assert sample.provenance()["products"] == "rebuilt" and f.memory.graphs == 0


def test_graphs_make_room_for_vectors_and_come_back() -> None:
    case = network("relu")
    f = case.objective(microbatch=3, memory="10MB")
    v = torch.ones(f.n)
    expected = f.hvp(v)
    assert f.provenance()["products"] == "retained"
    with f.memory.vectors_held(10_000_000):
        assert torch.equal(f.hvp(v), expected)
        assert f.provenance()["products"] == "rebuilt" and f.memory.graphs == 0
    f.hvp(v)
    assert f.provenance()["products"] == "retained" and f.memory.graphs > 0


def test_a_product_of_several_vectors_is_each_vectors_product() -> None:
    f = network("conv").objective()
    vectors = torch.randn(f.n, 4, generator=torch.Generator().manual_seed(0))
    together = f.hvp(vectors)
    assert together.shape == (f.n, 4)
    assert all(torch.equal(together[:, k], f.hvp(vectors[:, k])) for k in range(4))


@pytest.mark.parametrize("name", ["relu", "unused_and_scalar", "weight_decay"])
def test_block_products_are_those_of_the_diagonal_blocks(name: str) -> None:
    case = network(name)
    f, hessian = case.objective(dtype=torch.float64, microbatch=4), case.hessian()
    slices = list(f.layout.slices().values())
    blocks = [(0, 1), (2,), tuple(range(3, len(slices)))]
    at = {b: torch.cat([torch.arange(f.n)[slices[i]] for i in b]) for b in blocks}
    vectors = {b: torch.randn(len(at[b]), dtype=torch.float64) for b in blocks}
    products = f.block_products(vectors)
    for block, vector in vectors.items():
        expected = hessian[at[block]][:, at[block]] @ vector
        assert torch.allclose(products[block], expected, rtol=1e-12, atol=1e-14)


def test_at_is_the_same_function_elsewhere() -> None:
    case = network("relu")
    f = case.objective(dtype=torch.float64)
    x = f.x + 0.3 * torch.randn(f.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference, _ = case.reference()
    g = f.at(x)
    assert g.value() == pytest.approx(float(reference(x)), rel=1e-12)
    expected = torch.func.jacrev(torch.func.jacrev(reference))(x)
    assert_close(g.hvp(torch.eye(f.n, dtype=torch.float64)), expected, torch.float64)
    assert f.value() == pytest.approx(float(reference(f.x)), rel=1e-12)


def test_graphs_of_another_point_leave_the_budget_with_it() -> None:
    f = network("relu").objective()
    f.hvp(torch.ones(f.n))
    before = f.memory.graphs, f.memory.vectors
    g = f.at(f.x + 1)
    g.hvp(torch.ones(f.n))
    assert f.memory.graphs > before[0] and f.memory.vectors > before[1]
    gone = weakref.ref(g)
    gc.disable()
    try:
        del g
        assert gone() is None, "an objective is part of a reference cycle: its graphs would outlive it"
    finally:
        gc.enable()
    assert (f.memory.graphs, f.memory.vectors) == before


def test_an_objective_is_freed_with_its_last_reference_after_all_was_used() -> None:
    f = network("relu").objective()
    torchflat.sharpness(f)
    gone = weakref.ref(f)
    gc.disable()
    try:
        del f
        assert gone() is None
    finally:
        gc.enable()


def test_a_subset_holds_that_many_different_rows() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    losses = 2.0 ** torch.arange(20)[:, None]
    f = Objective(model, lambda out, y: out.mean(), (losses, torch.zeros(20, 1)), dtype=torch.float64)
    for size in (1, 7, 20):
        total = round(f.subset(size, seed=3).value() * size)
        assert total.bit_count() == size
    assert f.subset(7, seed=3).value() == f.subset(7, seed=3).value() != f.subset(7, seed=4).value()


def test_half_precision_is_audited_in_float32() -> None:
    case = network("relu")
    case.model.to(torch.bfloat16)
    f = case.objective()
    assert f.dtype == torch.float32 and f.hvp(torch.ones(f.n)).dtype == torch.float32
    assert_close(f.hvp(torch.eye(f.n)), case.hessian(), torch.float32)
    assert next(case.model.parameters()).dtype == torch.bfloat16


def test_bfloat16_is_used_when_asked_for() -> None:
    case = network("relu")
    f = case.objective(dtype=torch.bfloat16)
    error = torch.linalg.vector_norm(f.hvp(torch.eye(f.n)).double() - case.hessian())
    assert 1e-4 < float(error / torch.linalg.vector_norm(case.hessian())) < 0.1


def test_a_function_of_x() -> None:
    a = torch.tensor([[2.0, 1.0], [1.0, -3.0]], dtype=torch.float64)
    f = Objective.from_function(
        lambda x: 0.5 * x @ a @ x, torch.tensor([1.0, 2.0], dtype=torch.float64), weight_decay=0.5
    )
    assert f.value() == 0.5 * (2 + 4 - 12) + 0.25 * 5
    assert f.gradient().tolist() == [2 + 2 + 0.5, 1 - 6 + 1.0]
    assert torch.equal(f.hvp(torch.eye(2, dtype=torch.float64)), a + 0.5 * torch.eye(2, dtype=torch.float64))
    assert (f.rows, f.n, f.rounding_error(torch.eye(2))) == (1, 2, 0.0)


# Surroundings that must not matter -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "surrounding", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_surrounding_mode_does_not_matter(
    surrounding: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    case = network("relu")
    with surrounding():
        f = case.objective()
        hessian, gradient, value = f.hvp(torch.eye(f.n)), f.gradient(), f.value()
    assert_close(hessian, case.hessian(), torch.float32)
    assert_close(f.hvp(torch.eye(f.n)), case.hessian(), torch.float32)
    assert torch.equal(gradient, case.objective().gradient()) and value == case.objective().value()


@pytest.mark.parametrize("how", ["whole", "in place", "one layer"])
def test_compiled_models_are_audited_uncompiled(how: str) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise AssertionError("the compiled model was run")

    case = network("relu")
    expected = case.hessian()
    model: Any = case.model
    if how == "whole":
        model = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model[0] = torch.compile(model[0], backend=backend)
    f = Objective(model, case.loss, case.data)
    assert_close(f.hvp(torch.eye(f.n)), expected, torch.float32)
    names = set(f.layout.names)
    assert names == {"0._orig_mod.weight", "0._orig_mod.bias"} | names if how == "one layer" else "0.weight" in names


def test_data_parallel_models_are_audited_by_their_module() -> None:
    case = network("relu")
    f = Objective(nn.DataParallel(case.model), case.loss, case.data)
    assert_close(f.hvp(torch.eye(f.n)), case.hessian(), torch.float32)
    assert f.layout.names[0] == "0.weight"


# Cost ----------------------------------------------------------------------------------------------------------------


class _Count(torch.autograd.Function):
    """The identity; counts the rows that pass forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: dict[str, int]) -> Tensor:
        ctx.counts = counts
        counts["forwards"] += len(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _CountBackward.apply(gradient, ctx.counts), None


class _CountBackward(torch.autograd.Function):
    """Counts the rows of a first derivative, and those of its own derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, counts: dict[str, int]) -> Tensor:
        ctx.counts = counts
        counts["firsts"] += len(gradient)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.counts["products"] += len(gradient)
        return gradient, None


class _Counted(nn.Module):
    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.first, self.second, self.counts = nn.Linear(3, 4), nn.Linear(4, 2), [counts]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(_Count.apply(self.first(x), self.counts[0])))


def _counted(**options: Any) -> tuple[Objective, dict[str, int]]:
    counts = {"forwards": 0, "firsts": 0, "products": 0}
    torch.manual_seed(0)
    data = torch.randn(50, 3), torch.randn(50, 2)
    return Objective(_Counted(counts), nn.MSELoss(), data, **options), counts


def _assert_counted(f: Objective, counts: dict[str, int]) -> None:
    cost = f.cost
    assert round(cost.forwards * f.rows, 6) == counts["forwards"]
    assert round(cost.products * f.rows, 6) == counts["products"]
    # A product runs through the first derivative once more; it is part of what a product costs.
    assert round(cost.backwards * f.rows, 6) == counts["firsts"] - counts["products"]
    assert cost.gradients == pytest.approx((cost.forwards + 2 * cost.backwards + 6 * cost.products) / 3)


@pytest.mark.parametrize(("path", "share"), [("retained", 2.0), ("rebuilt", 0.0), ("mixed", 0.5)])
@pytest.mark.parametrize("microbatch", [7, 50, None])
def test_cost_is_what_hooks_in_the_model_count(path: str, share: float, microbatch: int | None) -> None:
    roomy, _ = _counted(microbatch=microbatch)
    roomy.hvp(torch.ones(roomy.n))
    f, counts = _counted(memory=budget_for(roomy, share), microbatch=microbatch)
    f.value()
    _assert_counted(f, counts)
    assert f.cost.backwards <= 16 / 50 and f.cost.products == 0
    before = f.cost
    f.gradient()
    assert (f.cost - before).gradients == pytest.approx(1)
    f.gradient()
    f.value()
    assert (f.cost - before).gradients == pytest.approx(1)
    f.hvp(torch.ones(f.n))
    _assert_counted(f, counts)
    before = f.cost
    f.hvp(torch.ones(f.n, 3))
    f.block_products({(0, 1): torch.ones(16), (0,): torch.ones(12)})
    _assert_counted(f, counts)
    spent = f.cost - before
    assert spent.products == pytest.approx(5)
    if microbatch == 7:
        assert f.provenance()["products"] == path
        assert {"retained": spent.forwards == 0, "rebuilt": spent.forwards == 2, "mixed": 0 < spent.forwards < 2}[path]


def test_what_is_derived_is_charged_to_where_it_came_from() -> None:
    f, counts = _counted()
    half = f.subset(25)
    before, own = f.cost, half.cost
    half.gradient()
    half.hvp(torch.ones(f.n))
    # With the check of the second derivative.
    assert half.cost.products - own.products == pytest.approx(1 + DIFFERENCE_ROWS / 25)
    _assert_counted(f, counts)
    moved = half.at(f.x + 1)
    own = half.cost
    moved.hvp(torch.ones(f.n))
    assert moved.cost.products == 1 == pytest.approx(half.cost.products - own.products)
    f.rounding_error(torch.ones(1, f.n))
    _assert_counted(f, counts)
    assert (f.cost - before).seconds > 0


def test_a_whole_sharpness_run_costs_what_the_hooks_count() -> None:
    f, counts = _counted(microbatch=20)
    answer = torchflat.sharpness(f)
    _assert_counted(f, counts)
    assert answer.cost.gradients == pytest.approx(f.cost.gradients)


# Accuracy ------------------------------------------------------------------------------------------------------------


def test_rounding_error_is_the_distance_from_float64() -> None:
    case = network("conv")
    f = case.objective()
    v = torch.randn(3, f.n, generator=torch.Generator().manual_seed(0))
    errors = f.products(v).double() - v.double() @ case.hessian()
    assert f.rounding_error(v) == pytest.approx(float(torch.linalg.vector_norm(errors, dim=1).max()), rel=1e-3)
    assert f.rounding_error(v, quadratic=True) == pytest.approx(float((errors * v).sum(1).abs().max()), rel=1e-3)
    assert case.objective(dtype=torch.float64).rounding_error(v) == 0.0
    assert case.objective(dtype=torch.bfloat16).rounding_error(v) > 1000 * f.rounding_error(v)


class _SinglePrecision(nn.Module):
    """A model with a constant that does not follow the parameters' dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.constant = [torch.randn(3, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.constant[0]


def test_where_there_is_no_float64_rounding_is_estimated_and_the_answer_says_so() -> None:
    torch.manual_seed(0)
    model = _SinglePrecision()
    x, y = torch.randn(300, 4), torch.randn(300, 2)
    f = Objective(model, nn.MSELoss(), (x, y))
    v = torch.randn(2, f.n)
    estimate = f.rounding_error(v)
    assert "rounding was estimated" in " ".join(f.provenance()["notes"])
    assert "second derivative was not checked" in " ".join(f.provenance()["notes"])
    products = f.products(v).double()
    model.constant[0] = model.constant[0].double()
    exact = Objective(model, nn.MSELoss(), (x, y), dtype=torch.float64)
    truth = torch.linalg.vector_norm(products - exact.products(v.double()), dim=1).max()
    assert float(truth) / 4 <= estimate <= 100 * float(truth)


def test_rounding_of_a_quadratic_function_with_float32_constants() -> None:
    torch.manual_seed(0)
    a = torch.randn(200, 200)
    a = a + a.T
    f = Objective.from_function(lambda x: 0.5 * x @ (a @ x), torch.randn(200))
    v = torch.randn(1, 200)
    truth = float(torch.linalg.vector_norm(f.products(v).double() - v.double() @ a.double()))
    assert truth / 4 <= f.rounding_error(v) <= 100 * truth
    assert "rounding was estimated" in f.provenance()["notes"][0]


class _WrongTwice(torch.autograd.Function):
    """x³ with a derivative that is right, and a second derivative that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x.detach() * x


class _Through(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def test_a_wrong_second_derivative_is_found_and_named() -> None:
    f = Objective(_Through(_WrongTwice.apply), nn.MSELoss(), (torch.randn(8, 3), torch.randn(8, 2)))
    f.gradient()
    with pytest.raises(
        LossError, match=r"second derivative .* wrong by \d+% in layer\.(weight|bias).*plain operations"
    ):
        f.hvp(torch.ones(f.n))


@pytest.mark.parametrize("function", [torch.relu, torch.abs, nn.Hardtanh(), nn.SiLU(), nn.Softplus(20), nn.Hardswish()])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_right_second_derivative_passes_also_at_kinks(function: Callable[[Tensor], Tensor], scale: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    f = Objective(_Through(function), nn.MSELoss(), (scale * x, y))
    assert torch.isfinite(f.hvp(torch.ones(f.n))).all()


# Errors --------------------------------------------------------------------------------------------------------------

X, Y, LABELS = torch.linspace(-1, 1, 24).view(8, 3), torch.linspace(0, 1, 16).view(8, 2), torch.tensor([0, 1] * 4)


class _Noisy(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.layer, self.size = nn.Linear(3, 2), size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.size * torch.randn(2)


def _linear() -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 6).view(2, 3))
        layer.bias.copy_(torch.tensor([0.3, -0.2]))
    return layer


def _with_nan() -> nn.Linear:
    layer = _linear()
    with torch.no_grad():
        layer.weight[0, 1] = torch.nan
    return layer


MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()

FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "vector loss": (
        lambda: Objective(_linear(), nn.MSELoss(reduction="none"), (X, Y)),
        LossError,
        r"shape \(8, 2\).*mean",
    ),
    "float loss": (lambda: Objective(_linear(), lambda o, y: 1.0, (X, Y)), LossError, r"returned a float.*\.item\(\)"),
    "complex loss": (lambda: Objective(_linear(), lambda o, y: o.sum() * 1j, (X, Y)), LossError, "complex"),
    "nan loss": (
        lambda: Objective(_linear(), lambda o, y: o.sum() * torch.inf - torch.inf, (X, Y)),
        NonFiniteError,
        "loss of micro-batch 0 is .*all weights and inputs are finite",
    ),
    "nan input": (
        lambda: Objective(_linear(), MSE, (torch.where(X > 0.9, torch.nan, X), Y)),
        NonFiniteError,
        r"batch\[0\] \(2 of 24 entries\)",
    ),
    "nan weights": (lambda: Objective(_with_nan(), MSE, (X, Y)), NonFiniteError, r"weight \(1 of 6 entries\)"),
    "nan frozen weights": (
        lambda: Objective(_with_nan(), MSE, (X, Y), params="bias"),
        NonFiniteError,
        r"weight \(1 of 6 entries\)",
    ),
    "independent loss": (
        lambda: Objective(_linear(), lambda o, y: o.detach().mean(), (X, Y)),
        LossError,
        "does not depend on the audited parameters",
    ),
    "sum": (
        lambda: Objective(_linear(), nn.MSELoss(reduction="sum"), (X, Y)),
        LossError,
        "not a mean over rows.*batch_loss",
    ),
    "class weights": (
        lambda: Objective(_linear(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0])), (X, LABELS.sort()[0])),
        LossError,
        "not a mean over rows.*class weights",
    ),
    "ignored targets": (
        lambda: Objective(_linear(), F.cross_entropy, (X, torch.tensor([0, 1, -100, 1, -100, 0, 1, 0]))),
        LossError,
        r"2 of 8 targets .* -100.*batch_loss",
    ),
    "batch statistics": (
        lambda: Objective(nn.Sequential(_linear(), nn.BatchNorm1d(2, track_running_stats=False)), MSE, (X, Y)),
        LossError,
        "layer that mixes rows",
    ),
    "mean with weight": (
        lambda: Objective(_linear(), None, (X, Y), batch_loss=lambda m, b: (F.mse_loss(m(b[0]), b[1]), len(b[0]))),
        LossError,
        r"mean where the sum belongs; return \(mean \* weight, weight\)",
    ),
    "bare batch_loss": (
        lambda: Objective(_linear(), None, (X, Y), batch_loss=lambda m, b: F.mse_loss(m(b[0]), b[1])),
        LossError,
        r"must return \(sum over the batch, weight\)",
    ),
    "nan weight": (
        lambda: Objective(_linear(), None, (X, Y), batch_loss=lambda m, b: (m(b[0]).sum(), float("nan"))),
        LossError,
        "weight nan",
    ),
    "no weight": (
        lambda: Objective(_linear(), None, (X, Y), batch_loss=lambda m, b: (m(b[0]).sum(), 0)),
        DataError,
        "weights of the data sum to zero",
    ),
    "label out of range": (
        lambda: Objective(_linear(), CE, (X, LABELS + 4)),
        DataError,
        r"IndexError: Target \d is out of bounds.*\(8,\) int64 in \[4, 5\]",
    ),
    "shape mismatch": (
        lambda: Objective(_linear(), MSE, (X[:, :2], Y)),
        DataError,
        r"RuntimeError: mat1 and mat2 shapes.*\(8, 2\) float32",
    ),
    "integer input": (
        lambda: Objective(_linear(), MSE, ((X * 100).byte(), Y)),
        DataError,
        r"\(8, 3\) uint8 in \[4, 252\]",
    ),
    "batch structure": (lambda: Objective(_linear(), MSE, [(X, Y, Y)]), DataError, "tuple of length 3: use batch_loss"),
    "dict without target": (
        lambda: Objective(_linear(), MSE, {"x": X, "z": Y}),
        DataError,
        r"keys \['x', 'z'\] and none",
    ),
    "dropout": (
        lambda: Objective(nn.Sequential(_linear(), nn.Dropout(0.1)), MSE, (X, Y), mode="train"),
        ReproducibilityError,
        "two evaluations on the same rows gave",
    ),
    "noise": (lambda: Objective(_Noisy(0.01), MSE, (X, Y)), ReproducibilityError, "random"),
    "batchnorm in train mode": (
        lambda: Objective(nn.Sequential(_linear(), nn.BatchNorm1d(2)), MSE, (X, Y), mode="train"),
        UsageError,
        r"refused: 1 \(BatchNorm1d\).*mode='eval'",
    ),
    "unknown mode": (
        lambda: Objective(_linear(), MSE, (X, Y), mode="test"),
        UsageError,
        "'eval' or 'train', not 'test'",
    ),
    "two losses": (
        lambda: Objective(_linear(), MSE, (X, Y), batch_loss=lambda m, b: (m(b[0]).sum(), 1)),
        UsageError,
        "not both",
    ),
    "no loss": (lambda: Objective(_linear(), None, (X, Y)), UsageError, "either loss"),
    "microbatch": (lambda: Objective(_linear(), MSE, (X, Y), microbatch=0), UsageError, "microbatch=0"),
    "memory": (lambda: Objective(_linear(), MSE, (X, Y), memory="lots"), UsageError, "memory='lots'.*2GiB"),
    "weight decay": (lambda: Objective(_linear(), MSE, (X, Y), weight_decay=torch.inf), UsageError, "weight_decay=inf"),
    "dtype": (lambda: Objective(_linear(), MSE, (X, Y), dtype=torch.int64), UsageError, "int64"),
    "complex x": (
        lambda: Objective.from_function(torch.sum, torch.zeros(2, dtype=torch.complex64)),
        UsageError,
        "complex64",
    ),
    "scripted model": (lambda: Objective(_traced(), MSE, (X, Y)), UsageError, "ScriptModule.*nn.Module"),
    # Here torch drops a term without a word.
    "once differentiable": (
        lambda: Objective(_Through(_Once.apply), MSE, (X, Y)),
        LossError,
        "second derivative .* wrong",
    ),
    "no double backward": (
        lambda: Objective(_Through(_reduced), MSE, (X, Y)),
        LossError,
        "cannot be differentiated twice: .*_segment_reduce_backward is not implemented",
    ),
}


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


def _reduced(x: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", lengths=torch.ones(len(x), dtype=torch.int64), axis=0)


def _traced() -> nn.Module:
    model: nn.Module = torch.jit.trace(_linear(), X)
    return model


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_faults_get_one_clear_line(fault: str) -> None:
    make, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message) as caught:
        f = make()
        f.hvp(torch.ones(f.n))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("action", ["value", "gradient"])
@pytest.mark.parametrize("fault", ["vector loss", "sum", "noise", "label out of range", "nan input"])
def test_values_and_gradients_are_refused_too(fault: str, action: str) -> None:
    make, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        getattr(make(), action)()


@pytest.mark.parametrize("shape", [(3,), (9, 2), (8, 1, 1), ()])
def test_vectors_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    f = Objective(_linear(), MSE, (X, Y))
    with pytest.raises(UsageError, match="must have shape"):
        f.hvp(torch.zeros(shape))
    with pytest.raises(UsageError, match="must have shape"):
        f.at(torch.zeros(3))


def test_a_product_that_is_not_finite_is_located() -> None:
    # |x|^1.5 has a gradient at 0, and no second derivative.
    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        out = model(batch[0]) + (batch[1] < 0.5)
        return (out.abs() ** 1.5).sum(), len(out)

    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    nn.init.zeros_(layer[1].weight)
    nn.init.zeros_(layer[1].bias)
    f = Objective(layer, None, (X, Y), batch_loss=batch_loss, microbatch=4, dtype=torch.float64)
    f.gradient()
    f._term.verified = True
    with pytest.raises(NonFiniteError, match=r"product of micro-batch 1 holds NaN or infinity.*1\.(weight|bias) \("):
        f.hvp(torch.ones(f.n, dtype=torch.float64))


def test_a_gradient_that_is_not_finite_is_located() -> None:
    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        out = model(batch[0]) * (batch[1] < 0.5)
        return out.abs().sqrt().sum(), len(out)

    f = Objective(_linear(), None, (X, Y), batch_loss=batch_loss, microbatch=4)
    with pytest.raises(
        NonFiniteError, match=r"gradient of micro-batch 1 holds NaN or infinity; not finite: weight \(6 of 6"
    ):
        f.gradient()


def test_vectors_that_are_not_finite_are_refused() -> None:
    f = Objective(_linear(), MSE, (X, Y))
    with pytest.raises(NonFiniteError, match="vector that H is applied to"):
        f.hvp(torch.full((f.n,), torch.nan))
    with pytest.raises(NonFiniteError, match="vector that H is applied to"):
        f.block_products({(0,): torch.full((6,), torch.inf)})


# Networks that fit their targets --------------------------------------------------------------------------------------


class _Fitted(nn.Module):
    """A network, and noise that it adds to its outputs."""

    def __init__(self, noise: float, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 3)).to(dtype)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out + self.noise * torch.randn_like(out)


def fitted(loss: Any, dtype: torch.dtype, noise: float = 0.0, **more: Any) -> Objective:
    """The targets are what the network computes for all rows at once: losses are what rounding makes of 0."""
    model = _Fitted(noise, dtype)
    x = torch.randn(1000, 20, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return Objective(model, loss, (x, model.layers(x).detach()), **more)


DOUBLE_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])


@DOUBLE_AND_SINGLE
def test_a_loss_that_is_nothing_but_rounding_is_a_mean(dtype: torch.dtype) -> None:
    for f in (
        fitted(MSE, dtype),
        fitted(None, dtype, batch_loss=lambda m, b: ((m(b[0]) - b[1]).square().sum(), len(b[0]))),
    ):
        assert 0 <= f.value() < 1e-10
        assert torchflat.sharpness(f, rtol=0.1).value > 0.1
        assert f.provenance()["notes"] == []


@DOUBLE_AND_SINGLE
def test_wrong_losses_are_refused_where_they_are_nothing_but_rounding(dtype: torch.dtype) -> None:
    with pytest.raises(LossError, match="not a mean over rows"):
        fitted(nn.MSELoss(reduction="sum"), dtype).value()
    with pytest.raises(LossError, match="not a mean over rows"):
        fitted(lambda o, y: (o - y).square().mean() + (o - y).mean() ** 2, dtype).value()
    with pytest.raises(LossError, match="mean where the sum belongs"):
        fitted(None, dtype, batch_loss=lambda m, b: (MSE(m(b[0]), b[1]), len(b[0]))).value()
    with pytest.raises(ReproducibilityError):
        fitted(MSE, dtype, noise=1e-6).value()


def test_wrong_losses_are_refused_where_they_are_zero() -> None:
    layer = nn.Linear(3, 3, bias=False)
    nn.init.eye_(layer.weight)
    assert Objective(layer, MSE, (X, X)).value() == 0
    with pytest.raises(LossError, match="not a mean over rows"):
        Objective(layer, nn.MSELoss(reduction="sum"), (X, X)).value()


# What is no fault ----------------------------------------------------------------------------------------------------


def _contrastive(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    a, b = model(batch[0]), model(batch[1])
    return F.cross_entropy(a @ b.T, torch.arange(len(a)), reduction="sum"), len(a)


def test_a_loss_within_batches_keeps_them_whole() -> None:
    torch.manual_seed(0)
    model, pairs = nn.Linear(3, 2), [(torch.randn(n, 3), torch.randn(n, 3)) for n in (6, 6, 4)]
    f = Objective(model, None, pairs, batch_loss=_contrastive, microbatch=2, dtype=torch.float64)
    exact = model.double()
    with torch.no_grad():
        sums = [_contrastive(exact, tuple(part.double() for part in pair)) for pair in pairs]
    expected = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
    assert f.value() == pytest.approx(float(expected), rel=1e-12)
    assert f.provenance()["notes"] == ["batch_loss is not a sum over rows: batches were kept whole"]


def test_a_model_for_batches_of_one_size_keeps_them_whole() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(4, 3))

    f = Objective(Fixed(), MSE, [(X[:4], Y[:4]), (X[4:], Y[4:])], microbatch=2)
    f.hvp(torch.ones(f.n))
    assert f.provenance()["notes"] == ["the model fails on a part of a batch: batches were kept whole"]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("loss", ["ce", "mse", "bce", "huber"])
def test_real_losses_of_any_size_raise_no_false_alarm(loss: str, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.randn(300, 50) * scale
    targets = {
        "ce": (nn.CrossEntropyLoss(), model(x).argmax(1)),  # fitted: losses far below the size of the logits
        "mse": (nn.MSELoss(), model(x).detach() + 1e-4 * torch.randn(300, 10)),
        "bce": (nn.BCEWithLogitsLoss(), (model(x) > 0).float()),
        "huber": (nn.HuberLoss(), torch.randn(300, 10)),
    }
    criterion, y = targets[loss]
    f = Objective(model, criterion, (x, y))
    f.gradient()
    assert f.provenance()["notes"] == [] and f.provenance()["microbatch"] > 1


def test_ignored_targets_are_weighted_by_batch_loss() -> None:
    case: Network = network("tokens")
    reference, x = case.reference()
    assert case.objective(dtype=torch.float64, microbatch=1).value() == pytest.approx(float(reference(x)), rel=1e-12)


def test_micro_batches_without_any_weight_do_not_count() -> None:
    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        counts = batch[1][:, 0] > 0.5
        if not counts.any():
            return torch.zeros(()), counts.sum()
        return F.mse_loss(model(batch[0][counts]), batch[1][counts], reduction="sum"), counts.sum()

    f = Objective(_linear(), None, (X, Y), batch_loss=batch_loss, microbatch=2, dtype=torch.float64)
    expected = F.mse_loss(_linear()(X[4:]), Y[4:]).item() * 2
    assert f.value() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(f.hvp(torch.ones(f.n, dtype=torch.float64))).all()


def test_sparse_gradients_are_made_dense() -> None:
    dense, sparse = nn.Embedding(5, 2), nn.Embedding(5, 2, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    data = torch.tensor([0, 1, 1, 3]), torch.randn(4, 2)
    f, g = (Objective(model, MSE, data, dtype=torch.float64) for model in (dense, sparse))
    assert torch.equal(f.gradient(), g.gradient())
    eye = torch.eye(10, dtype=torch.float64)
    assert torch.equal(f.hvp(eye), g.hvp(eye))


def test_long_recurrences_are_differentiated_and_freed() -> None:
    def function(x: Tensor) -> Tensor:
        state = x
        for _ in range(3000):
            state = torch.sin(state) * 1.01
        return state.sum()

    f = Objective.from_function(function, torch.ones(2, dtype=torch.float64))
    f.hvp(torch.ones(2, dtype=torch.float64))
    assert f.provenance()["products"] == "retained"
    del f
