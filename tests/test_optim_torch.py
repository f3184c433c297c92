"""NormalizedGD under the checks that torch has for its own optimizers, by their names there (TestOptimRenewed)."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torchflat import ops
from torchflat.optim import NormalizedGD, normalized_gd

needs_native = pytest.mark.skipif(
    ops.backend("cpu") != "native", reason=f"no compiled CPU kernels: {ops.describe()['cpu']['reason']}"
)
without_native = pytest.mark.skipif(ops.backend("cpu") == "native", reason="the kernels are there")
FORLOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
paths = pytest.mark.parametrize(
    "path", [FORLOOP, FOREACH, pytest.param(FUSED, marks=needs_native)], ids=["forloop", "foreach", "fused"]
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "group"},
    {"norm": "tensor"},
    {"decay": 0.0},
    {"lr": torch.tensor(0.02)},
    {"lr": torch.tensor([0.02]), "weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.5, "norm": "tensor", "weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "norm": "group"},
    {"maximize": True},
    {"capturable": True},
    {"capturable": True, "momentum": 0.9, "weight_decay": 0.1, "norm": "tensor"},
    {"error_if_nonfinite": True},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make(params: Any, options: dict[str, Any], **more: Any) -> NormalizedGD:
    return NormalizedGD(params, **{"lr": 0.02, **copy.deepcopy(options), **more})


def line(contiguous: bool = True, dtype: torch.dtype = torch.float64) -> tuple[list[Parameter], Callable[[], Tensor]]:
    """The parameters of a small regression, and a closure that evaluates it."""
    generator = torch.Generator().manual_seed(0)
    shape = (10, 5) if contiguous else (10, 5, 2)
    weight = torch.randn(shape, dtype=dtype, generator=generator)
    params = [Parameter(weight if contiguous else weight[..., 0]), Parameter(torch.randn(10, generator=generator))]
    params[1] = Parameter(params[1].to(dtype))
    x = torch.randn(5, dtype=dtype, generator=generator)

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss: Tensor = (params[0].mv(x) + params[1]).square().sum()
        loss.backward()
        return loss

    return params, closure


def run(optimizer: Optimizer, closure: Callable[[], Tensor], steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.step(closure)


def equal(ones: Iterable[Tensor], others: Iterable[Tensor], **tolerances: float) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, **(tolerances or {"rtol": 0.0, "atol": 0.0}))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        (lambda a, b: a, {}, TypeError, "params argument given to the optimizer should be an iterable of Tensors or"),
        (lambda a, b: [a, a], {}, UserWarning, "a parameter group with duplicate parameters"),
        (
            lambda a, b: [{"params": a}, {"params": a}],
            {},
            ValueError,
            "some parameters appear in more than one parameter group",
        ),
        (lambda a, b: [a], {"lr": torch.tensor([0.001, 0.001])}, ValueError, "Tensor lr must be 1-element"),
        (
            lambda a, b: [("weight", a), b],
            {},
            ValueError,
            "all optimizer params should be with/without names. Some param names are missing",
        ),
        (
            lambda a, b: [{"params": [a], "lr": 1e-2}, {"params": [("weight", b)]}],
            {},
            ValueError,
            "all optimizer param groups should be with/without names. cannot add param group with names to the optim",
        ),
        (lambda a, b: [], {}, ValueError, "optimizer got an empty parameter list"),
        (lambda a, b: [a * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        (lambda a, b: [a], {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        (lambda a, b: [a], {"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        (lambda a, b: [a], {"lr": torch.tensor(-1.0)}, ValueError, r"Invalid learning rate: -1\.0|tensor\(-1"),
        (lambda a, b: [a], {"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5"),
        (lambda a, b: [a], {"momentum": 1.0}, ValueError, "Invalid momentum value: 1.0"),
        (lambda a, b: [a], {"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
        (lambda a, b: [a], {"decay": -0.25}, ValueError, "Invalid decay value: -0.25"),
        (lambda a, b: [a], {"norm": "max"}, ValueError, "Invalid norm value: 'max', it must be one of 'global', 'gr"),
        (
            lambda a, b: [a],
            {"fused": True, "foreach": True},
            RuntimeError,
            "`fused` and `foreach` cannot be `True` together",
        ),
        (
            lambda a, b: [a],
            {"fused": True, "differentiable": True},
            RuntimeError,
            "`fused` does not support `differentiable`",
        ),
    ],
)
def test_errors(params: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    a, b = (Parameter(torch.randn(1, 1)) for _ in range(2))
    context = pytest.warns if issubclass(error, Warning) else pytest.raises
    with context(error, match=message):
        make(params(a, b), options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="NormalizedGD does not support sparse gradients"):
        make(embedding.parameters(), {}).step()


@without_native
def test_fused_without_kernels_is_refused() -> None:
    params, closure = line()
    with pytest.raises(RuntimeError, match="`fused=True` needs compiled kernels for cpu: see `torchflat doctor`"):
        make(params, FUSED).step(closure)


# Direction ------------------------------------------------------------------------------------------------------------


@paths
@options
@pytest.mark.parametrize("contiguous", [True, False])
def test_forloop_goes_right_direction(path: dict[str, Any], options: dict[str, Any], contiguous: bool) -> None:
    params, closure = line(contiguous)
    optimizer = make(params, options, **path)
    first = closure().item()
    for _ in range(20):
        value = optimizer.step(closure)
        assert value.grad_fn is not None
    assert (closure().item() > first) == optimizer.defaults["maximize"]


SCHEDULES: list[list[Callable[[Optimizer], Any]]] = [
    [lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10)],
    [lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)],
    [
        lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.4, total_iters=4),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.99),
    ],
]


@paths
@options
@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
def test_param_group_with_lrscheduler_goes_right_direction(
    path: dict[str, Any], options: dict[str, Any], schedule: int
) -> None:
    params, closure = line()
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], options, **path)
    schedulers = [kind(optimizer) for kind in SCHEDULES[schedule]]
    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step()
    assert (closure().item() > first) == optimizer.defaults["maximize"]


@paths
@options
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("scheduled", [False, True])
def test_tensor_lr(path: dict[str, Any], options: dict[str, Any], shape: tuple[int, ...], scheduled: bool) -> None:
    """A tensor is as good as the number in it, and stays the same tensor under a schedule."""
    rate = torch.full(shape, 0.02, dtype=torch.float64)
    found = []
    for lr in (0.02, rate):
        params, closure = line()
        optimizer = make(params, options, lr=lr, **path)
        scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5) if scheduled else None
        for _ in range(5):
            optimizer.step(closure)
            if scheduler:
                scheduler.step()
        found.append(params)
        kept = optimizer.param_groups[0]["lr"]
        assert isinstance(kept, Tensor) == isinstance(lr, Tensor)
        assert float(kept) == pytest.approx(0.02 * (0.5**5 if scheduled else 1))
    equal(*found, rtol=1e-13, atol=1e-13)


# Complex numbers ------------------------------------------------------------------------------------------------------


@paths
@options
def test_complex(path: dict[str, Any], options: dict[str, Any]) -> None:
    """A complex tensor moves as its real view does."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10, 5, 2, dtype=torch.float64, generator=generator)
    z, x = Parameter(torch.view_as_complex(start.clone())), Parameter(start.clone())
    ones, others = make([z], options, **path), make([x], options, **path)
    for _ in range(5):
        gradient = torch.randn(10, 5, 2, dtype=torch.float64, generator=generator)
        z.grad, x.grad = torch.view_as_complex(gradient), gradient.clone()
        ones.step()
        others.step()
        assert torch.equal(torch.view_as_real(z), x)


@paths
@options
def test_complex_2d(path: dict[str, Any], options: dict[str, Any]) -> None:
    """One complex tensor moves as two real ones do, except where each tensor has a norm of its own."""
    if options.get("norm") == "tensor":
        pytest.skip("the norm of a complex tensor is not those of its parts")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, dtype=torch.complex128, generator=generator).requires_grad_()
    parts = [z.detach().real.clone().requires_grad_(), z.detach().imag.clone().requires_grad_()]

    def rosenbrock(real: Tensor, imag: Tensor) -> Tensor:
        return ((1 - real) ** 2 + 100 * (imag - real**2) ** 2).abs().sum()

    ones, others = make([z], options, **path), make(parts, options, **path)
    for _ in range(5):
        ones.zero_grad()
        others.zero_grad()
        rosenbrock(z.real, z.imag).backward()
        rosenbrock(*parts).backward()
        assert z.grad is not None
        equal([z.grad.real, z.grad.imag], [p.grad for p in parts if p.grad is not None], rtol=1e-9, atol=1e-9)
        ones.step()
        others.step()
        equal([z.real, z.imag], parts, rtol=1e-9, atol=1e-9)


# Implementations ------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """A small network of layers that are frozen and unused at times, with a parameter without dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).double()
    model.register_parameter("scalar", nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    return model


def trajectory(options: dict[str, Any], steps: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    """What seven steps reach, the first layer frozen in the fourth, and without a gradient in the third."""
    model = network()
    optimizer = make(model.parameters(), options)
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64).reshape(6, 1)
    for step in range(steps):
        optimizer.zero_grad()
        (model(x).sum() * model.scalar).backward()
        if step == 2:
            model[0].weight.grad = model[0].bias.grad = None
        if step == 3:
            optimizer.zero_grad()
            model[0].requires_grad_(False)
            (model(x).sum() * model.scalar).backward()
            model[0].requires_grad_(True)
        optimizer.step()
    return list(model.parameters()), [each["step"] for each in optimizer.state.values()]


@options
@pytest.mark.parametrize("path", [FOREACH, pytest.param(FUSED, marks=needs_native)], ids=["foreach", "fused"])
def test_foreach_matches_forloop(path: dict[str, Any], options: dict[str, Any]) -> None:
    (ones, clocks), (others, other_clocks) = trajectory({**options, **FORLOOP}), trajectory({**options, **path})
    equal(ones, others, rtol=1e-12, atol=1e-13)
    equal(clocks, other_clocks)
    assert clocks[0].item() == 7


@paths
@options
@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_set_default_dtype_works_with_foreach(
    path: dict[str, Any], options: dict[str, Any], default: torch.dtype
) -> None:
    found = []
    for dtype in (torch.float32, default):
        params, closure = line()
        torch.set_default_dtype(dtype)
        try:
            optimizer = make(params, options, **path)
            run(optimizer, closure)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([*params, optimizer.state_dict()["state"][0]["step"]])
    equal(*found)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"momentum": 0.5}, "_fused_normalizedgd", marks=needs_native),
        pytest.param({}, "move_at_once", marks=needs_native),
        pytest.param({}, "_multi_tensor_normalizedgd", marks=without_native),
        ({"fused": False}, "_multi_tensor_normalizedgd"),
        ({"foreach": True}, "_multi_tensor_normalizedgd"),
        ({"foreach": False}, "_single_tensor_normalizedgd"),
        ({"differentiable": True}, "_single_tensor_normalizedgd"),
    ],
)
def test_defaults_changed_to_foreach(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: str) -> None:
    called = []
    for name in ("_single_tensor_normalizedgd", "_multi_tensor_normalizedgd", "_fused_normalizedgd"):
        monkeypatch.setattr(normalized_gd, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(
        normalized_gd._Share, "move_at_once", lambda *_: called.append("move_at_once") or torch.zeros(())
    )
    params, closure = line()
    closure()
    make(params, options).step()
    assert called == [expected]


# Groups ---------------------------------------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("norm", ["global", "group", "tensor"])
def test_param_groups_weight_decay(path: dict[str, Any], norm: str) -> None:
    """The one group decays, the other does not; neither of them otherwise moves, for lack of a gradient."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = make([{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:]}], {"norm": norm}, **path)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert params[0].tolist() == pytest.approx([1 - 0.02 * 0.5] * 3)
    assert params[1].tolist() == [1.0] * 2


@paths
@pytest.mark.parametrize("norm", ["global", "group", "tensor"])
def test_param_groups_lr(path: dict[str, Any], norm: str) -> None:
    """A group with rate 0 stays, the other moves; the rate that the constructor gives is the default of a group."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = make([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], {"norm": norm}, lr=0.0, **path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.0]
    params[0].grad, params[1].grad = torch.tensor([0.0, 3.0, 0.0]), torch.tensor([4.0, 0.0])
    optimizer.step()
    share = 3 / 5 if norm == "global" else 1
    assert params[0].tolist() == pytest.approx([1.0, 1 - 0.5 * share, 1.0])
    assert params[1].tolist() == [1.0] * 2


# Nothing to do --------------------------------------------------------------------------------------------------------


@paths
@options
def test_step_is_noop_when_params_have_no_grad(path: dict[str, Any], options: dict[str, Any]) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = copy.deepcopy(params)
    optimizer = make(params, options, **path)
    optimizer.step()
    equal(params, before)
    assert not optimizer.state


@paths
@options
def test_step_is_noop_for_zero_grads(path: dict[str, Any], options: dict[str, Any]) -> None:
    params = [Parameter(torch.randn(2, 3)), Parameter(torch.randn(()))]
    before = copy.deepcopy(params)
    optimizer = make(params, {**options, "weight_decay": 0.0}, **path)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    equal(params, before)


# State dicts ----------------------------------------------------------------------------------------------------------


def test_optimizer_can_be_printed() -> None:
    for options in OPTIONS:
        text = repr(make(line()[0], options))
        assert text.startswith("NormalizedGD (\nParameter Group 0\n") and "    decay: " in text


def named(params: list[Parameter], names: bool) -> Any:
    return [(f"param{index}", p) for index, p in enumerate(params)] if names else params


@paths
@options
@pytest.mark.parametrize(("names", "names_there"), itertools.product([True, False], repeat=2))
def test_state_dict_deterministic(
    path: dict[str, Any], options: dict[str, Any], names: bool, names_there: bool
) -> None:
    """A copy goes on exactly as its original."""
    params, closure = line()
    optimizer = make(named(params, names), options, **path)
    run(optimizer, closure)
    again, closure_again = line()
    with torch.no_grad():
        for p, there in zip(params, again, strict=True):
            there.copy_(p)
    other = make(named(again, names_there), options, **path)
    kept = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(copy.deepcopy(kept))
    for _ in range(4):
        run(optimizer, closure, 1)
        run(other, closure_again, 1)
        equal(params, again)
        state, state_there = optimizer.state_dict(), other.state_dict()
        for index in state["state"]:
            assert state["state"][index].keys() == state_there["state"][index].keys()
            equal(state["state"][index].values(), state_there["state"][index].values())
        assert float(state["state"][0]["step"]) > float(kept["state"][0]["step"])
    for group in kept["param_groups"]:
        assert ("param_names" in group) == names


@options
@pytest.mark.parametrize("missing", ["all", *NormalizedGD([torch.zeros(1)], 1.0).defaults])
def test_can_load_older_state_dict(options: dict[str, Any], missing: str) -> None:
    """A state that was written before an option was there takes what the optimizer was made with."""
    if missing == "lr":
        pytest.skip("was always there")
    params, closure = line()
    optimizer = make(params, options)
    run(optimizer, closure)
    kept = copy.deepcopy(optimizer.state_dict())
    for group in kept["param_groups"]:
        for name in [name for name in optimizer.defaults if name != "lr"] if missing == "all" else [missing]:
            del group[name]
    optimizer.load_state_dict(kept)
    for name, value in optimizer.defaults.items():
        assert name == "lr" or optimizer.param_groups[0][name] == value
    run(optimizer, closure, 1)


@options
@pytest.mark.parametrize(("names", "names_there"), itertools.product([True, False], repeat=2))
def test_can_load_from_to_named_state_dict(options: dict[str, Any], names: bool, names_there: bool) -> None:
    """Names come and go as they do for SGD, and do not stand in the way."""
    kept = []
    for kind in (NormalizedGD, torch.optim.SGD):
        params, closure = line()
        optimizer = kind(named(params, names), **({"lr": 0.02, **options} if kind is NormalizedGD else {}))
        run(optimizer, closure)
        again, closure_again = line()
        other = kind(named(again, names_there), **({"lr": 0.02, **options} if kind is NormalizedGD else {}))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(other, closure_again)
        kept.append([group.get("param_names") for group in (*other.param_groups, *other.state_dict()["param_groups"])])
    assert kept[0] == kept[1]


@options
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_load_equality_with_weights_only(options: dict[str, Any], weights_only: bool, tmp_path: Path) -> None:
    params, closure = line()
    optimizer = make(params, options)
    run(optimizer, closure)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=weights_only)
    other = make(line()[0], options)
    other.load_state_dict(loaded)
    one, two = optimizer.state_dict(), other.state_dict()
    assert one["param_groups"] == two["param_groups"]
    for index in one["state"]:
        equal(one["state"][index].values(), two["state"][index].values())


@paths
@options
def test_load_nontensor_step(path: dict[str, Any], options: dict[str, Any]) -> None:
    params, closure = line()
    optimizer = make(params, options, **path)
    run(optimizer, closure)
    kept = copy.deepcopy(optimizer.state_dict())
    for each in kept["state"].values():
        each["step"] = int(each["step"])
    optimizer.load_state_dict(kept)
    run(optimizer, closure, 1)
    assert [each["step"].item() for each in optimizer.state.values()] == [4.0, 4.0]


def test_non_empty_state() -> None:
    """The states of all parameters are tensors and not empty after a step."""
    for options in OPTIONS:
        params, closure = line()
        optimizer = make(params, options)
        run(optimizer, closure, 1)
        assert set(optimizer.state) == set(params)
        for each in optimizer.state.values():
            assert each and all(isinstance(value, Tensor) for value in each.values())


# Hooks ----------------------------------------------------------------------------------------------------------------


class Fixture:
    """An optimizer that has taken a step, to hang hooks on."""

    def __init__(self, lr: float = 0.02) -> None:
        self.params, self.closure = line()
        self.optimizer = make(self.params, {}, lr=lr)
        run(self.optimizer, self.closure, 1)


def state_dict_pre_hook(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1  # type: ignore[index]


def state_dict_post_hook(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    state["test"] = state["state"].get("test", 0) + 1
    return state


def test_state_dict_pre_hook() -> None:
    kept = Fixture()
    kept.optimizer.register_state_dict_pre_hook(state_dict_pre_hook)
    assert kept.optimizer.state_dict()["state"]["test"] == 1
    run(kept.optimizer, kept.closure)  # what is no state of a parameter stands in nobody's way
    again = Fixture()
    again.optimizer.load_state_dict(kept.optimizer.state_dict())
    assert again.optimizer.state["test"] == 1  # type: ignore[index]
    run(again.optimizer, again.closure)


def test_state_dict_post_hook() -> None:
    optimizer = Fixture().optimizer
    optimizer.register_state_dict_post_hook(state_dict_post_hook)
    assert optimizer.state_dict()["test"] == 1


def test_state_dict_pre_post_hook() -> None:
    optimizer = Fixture().optimizer
    optimizer.register_state_dict_pre_hook(state_dict_pre_hook)
    optimizer.register_state_dict_post_hook(state_dict_post_hook)
    assert optimizer.state_dict()["test"] == 2


def load_state_dict_pre_hook(optimizer: Optimizer, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def load_state_dict_pre_hook_copying(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


def load_state_dict_post_hook(optimizer: Optimizer) -> None:
    optimizer.state["test"] = optimizer.param_groups[0]["lr"]  # type: ignore[index]


def test_load_state_dict_pre_hook_and_prepend() -> None:
    optimizer = Fixture().optimizer
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(load_state_dict_pre_hook)
    optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(load_state_dict_pre_hook_copying, prepend=True)
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["lr"], state["param_groups"][0]["lr"]) == (0.002, 0.02)


def test_load_state_dict_post_hook() -> None:
    optimizer = Fixture().optimizer
    optimizer.register_load_state_dict_post_hook(load_state_dict_post_hook)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["test"] == 0.02  # type: ignore[index]


def test_load_state_dict_pre_post_hook() -> None:
    optimizer = Fixture().optimizer
    optimizer.register_load_state_dict_pre_hook(load_state_dict_pre_hook_copying)
    optimizer.register_load_state_dict_post_hook(load_state_dict_post_hook)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["test"] == 0.003  # type: ignore[index]


def test_step_pre_hook() -> None:
    kept, seen = Fixture(), []
    handle = kept.optimizer.register_step_pre_hook(lambda *_: seen.append(kept.params[1].detach().clone()))
    before = kept.params[1].detach().clone()
    kept.optimizer.step(kept.closure)
    equal(seen, [before])
    handle.remove()
    kept.optimizer.step(kept.closure)
    assert len(seen) == 1


def test_step_post_hook() -> None:
    kept, seen = Fixture(), []
    handle = kept.optimizer.register_step_post_hook(lambda *_: seen.append(kept.params[1].detach().clone()))
    kept.optimizer.step(kept.closure)
    equal(seen, [kept.params[1].detach()])
    handle.remove()
    kept.optimizer.step(kept.closure)
    assert len(seen) == 1


def test_step_all_hooks() -> None:
    kept, seen, again = Fixture(), [], pickle.loads(pickle.dumps(make(line()[0], {})))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append(0)),
        kept.optimizer.register_step_pre_hook(lambda *_: seen.append(1)),
        kept.optimizer.register_step_post_hook(lambda *_: seen.append(2)),
        register_optimizer_step_post_hook(lambda *_: seen.append(3)),
    ]
    try:
        kept.optimizer.step(kept.closure)
        again.step()  # nothing has a gradient; the common hooks are run all the same
    finally:
        for handle in handles:
            handle.remove()
    kept.optimizer.step(kept.closure)
    assert seen == [0, 1, 2, 3, 0, 3]


# Copies ---------------------------------------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_deepcopy_copies_all_public_attrs(options: dict[str, Any], copied: Callable[[Any], Any]) -> None:
    def public(optimizer: Optimizer) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    params, closure = line()
    optimizer = make(params, options)
    run(optimizer, closure)
    again = copied(optimizer)
    assert public(again) == public(optimizer)
    twins = again.param_groups[0]["params"]
    for _ in range(2):
        optimizer.zero_grad()
        closure()
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad
        optimizer.step()
        again.step()
        equal(params, twins)
    equal([each["step"] for each in again.state.values()], [torch.tensor(5.0)] * 2)


# CUDA -----------------------------------------------------------------------------------------------------------------


def on_cuda(test: Any) -> Any:
    needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(needs_cuda(test))


@on_cuda
@options
@pytest.mark.parametrize("path", [FORLOOP, FOREACH, {}], ids=["forloop", "foreach", "default"])
def test_mixed_device_dtype(path: dict[str, Any], options: dict[str, Any]) -> None:
    """Tensors of three dtypes on the CPU and on the device move as one process with float64 moves them."""
    kinds = [("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float64)]
    generator = torch.Generator().manual_seed(0)
    found: list[list[Tensor]] = []
    starts = [torch.randn(5, 3, generator=generator) for _ in kinds]
    grads = [torch.randn(5, 3, generator=generator).bfloat16() for _ in kinds]
    for there in (True, False):
        params = []
        for (device, dtype), start, grad in zip(kinds, starts, grads, strict=True):
            kind = (device, dtype) if there else ("cpu", torch.float64)
            params.append(Parameter(start.to(*kind)))
            params[-1].grad = grad.to(*kind)
        optimizer = make([{"params": params[:3]}, {"params": params[3:]}], options, **path)
        for _ in range(3):
            optimizer.step()
        found.append([p.detach().cpu().double() for p in params])
    for (_, dtype), one, other in zip(kinds, *found, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@on_cuda
@pytest.mark.parametrize("capturable", [True, False])
def test_cpu_load_state_dict(capturable: bool) -> None:
    """The state of an optimizer of the CPU goes on where that of a device is wanted, and the other way round."""
    params, closure = line()
    optimizer = make(params, {"momentum": 0.9, "capturable": capturable})
    run(optimizer, closure)
    there = [Parameter(p.detach().cuda()) for p in params]
    other = make(there, {"momentum": 0.9, "capturable": capturable})
    other.load_state_dict(optimizer.state_dict())
    for each in other.state.values():
        assert each["step"].is_cuda == capturable and each["momentum_buffer"].is_cuda
    closure()
    for p, twin in zip(params, there, strict=True):
        twin.grad = None if p.grad is None else p.grad.cuda()
    optimizer.step()
    other.step()
    equal(params, [p.cpu() for p in there], rtol=1e-12, atol=1e-12)
    optimizer.load_state_dict(other.state_dict())
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"].item() == 5.0


@on_cuda
def test_state_dict_with_cuda_params() -> None:
    params, closure = line()
    closure()
    there = [Parameter(p.detach().cuda()) for p in params]
    for p, twin in zip(params, there, strict=True):
        twin.grad = None if p.grad is None else p.grad.cuda()
    ones, others = make(params, {"momentum": 0.9}), make(there, {"momentum": 0.9})
    for _ in range(3):
        ones.step()
        others.step()
        others.load_state_dict(copy.deepcopy(others.state_dict()))
    equal(params, [p.cpu() for p in there], rtol=1e-12, atol=1e-12)


@on_cuda
def test_peak_memory_foreach() -> None:
    """A list of products as large as the gradients is all that the lists of foreach need beyond the loop."""
    peaks = []
    for path in (FORLOOP, FOREACH):
        params = [Parameter(torch.ones(1 << 20, device="cuda")) for _ in range(4)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = make(params, path)
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated() - start)
    assert peaks[0] <= (1 << 22) + (1 << 16)
    assert peaks[1] <= 4 * (1 << 22) + (1 << 16)


@on_cuda
@pytest.mark.parametrize("path", [FORLOOP, FOREACH, {}], ids=["forloop", "foreach", "default"])
def test_a_captured_graph_takes_the_steps(path: dict[str, Any]) -> None:
    params = [[Parameter(torch.ones(5, 3, device="cuda")), Parameter(torch.ones(4, device="cuda"))] for _ in range(2)]
    optimizers = [make(each, {"capturable": True, "momentum": 0.5, "weight_decay": 0.1, **path}) for each in params]
    for p in itertools.chain(*params):
        p.grad = torch.arange(p.numel(), device="cuda").reshape(p.shape).float()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizers[0].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        optimizers[1].step()
    equal(*params, rtol=1e-6, atol=1e-6)
    equal([optimizers[0].state[params[0][1]]["step"]], [torch.tensor(5.0, device="cuda")])
