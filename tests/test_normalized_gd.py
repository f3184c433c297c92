"""NormalizedGD beside its readable twin, its law in closed form, and all that training loops do with an optimizer."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import Parameter
from torch.optim import lr_scheduler

from torchflat import ops
from torchflat.optim import NormalizedGD, PowerDecayLR, normalized_gd
from torchflat.optim.reference import ReferenceNormalizedGD

needs_native = pytest.mark.skipif(
    ops.backend("cpu") != "native", reason=f"no compiled CPU kernels: {ops.describe()['cpu']['reason']}"
)
NORMS = ["global", "group", "tensor"]
FORLOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
PATHS = [FORLOOP, FOREACH] + ([FUSED] if ops.backend("cpu") == "native" else [])
paths = pytest.mark.parametrize(
    "path", [FORLOOP, FOREACH, pytest.param(FUSED, marks=needs_native)], ids=["forloop", "foreach", "fused"]
)
norms = pytest.mark.parametrize("norm", NORMS)
masked = pytest.mark.parametrize("capturable", [False, True])


def with_gradients(*gradients: Any, dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """Parameters that are all ones, with these gradients."""
    params = [Parameter(torch.ones_like(torch.tensor(gradient, dtype=dtype))) for gradient in gradients]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = torch.tensor(gradient, dtype=dtype)
    return params


def clones(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def equal(ones: Sequence[Tensor], others: Sequence[Tensor], **tolerances: float) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, **(tolerances or {"rtol": 0.0, "atol": 0.0, "equal_nan": True}))


def count(optimizer: NormalizedGD) -> float:
    return float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"])


# The twin -------------------------------------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (33, 9)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    return {
        "shapes": shapes,
        "dtype": draw(st.sampled_from(DTYPES)),
        "cuts": sorted(draw(st.sets(st.integers(1, len(shapes)), max_size=2)) | {0, len(shapes)}),
        "missing": draw(st.sets(st.tuples(st.integers(0, 3), st.integers(0, len(shapes) - 1)), max_size=8)),
        "zero": draw(st.sets(st.integers(0, 3), max_size=1)),
        "frozen": draw(st.sets(st.integers(0, len(shapes) - 1), max_size=1)),
        "seed": draw(st.integers(0, 2**31)),
        "scale": draw(st.sampled_from([1e-2, 1.0, 30.0])),
        "options": {
            "lr": draw(st.sampled_from([0.0, 0.3, 1.0])),
            "decay": draw(st.sampled_from([0.0, 0.25, 0.5])),
            "momentum": draw(st.sampled_from([0.0, 0.5])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "maximize": draw(st.booleans()),
        },
        "path": draw(st.sampled_from([{}, *PATHS])),
        "capturable": draw(st.booleans()),
    }


@settings(max_examples=200, deadline=None)
@given(run=runs())
def test_steps_are_those_of_the_twin(run: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(run["seed"])
    dtype: torch.dtype = run["dtype"]

    def drawn(shape: tuple[int, ...], scale: float) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return (scale * torch.randn(shape, dtype=wide, generator=generator)).to(dtype)

    params = [Parameter(drawn(shape, 1.0)) for shape in run["shapes"]]
    # The twin works in the widest numbers, on the same gradients.
    wide = torch.complex128 if dtype.is_complex else torch.float64
    twins = [p.detach().to(wide) for p in params]
    for index in run["frozen"]:
        params[index].requires_grad_(False)
    groups = [{"params": params[low:high]} for low, high in zip(run["cuts"], run["cuts"][1:], strict=False)]
    optimizer = NormalizedGD(groups, **run["options"], **run["path"], capturable=run["capturable"])
    reference = ReferenceNormalizedGD(twins, **run["options"])
    # Parameters, and the sums of momentum, are rounded in every step.
    tolerance = 40 * torch.finfo(dtype).eps
    for step in range(4):
        for index, (p, twin) in enumerate(zip(params, twins, strict=True)):
            given = index not in run["frozen"] and (step, index) not in run["missing"]
            scale = 0.0 if step in run["zero"] else run["scale"]
            p.grad = drawn(p.shape, scale) if given else None
            twin.grad = p.grad.to(wide) if p.grad is not None else None
        optimizer.step()
        reference.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach().to(wide), twin, rtol=tolerance, atol=tolerance)


@paths
def test_the_readable_twin_and_the_fast_one_count_alike(path: dict[str, Any]) -> None:
    (p,) = with_gradients([3.0, 4.0])
    twin = p.detach().clone()
    optimizer, reference = NormalizedGD([p], 1.0, **path), ReferenceNormalizedGD([twin], 1.0)
    for gradient in ([3.0, 4.0], [math.nan, 0.0], [0.0, 0.0], None, [math.inf, 1.0], [1.0, 0.0]):
        p.grad = twin.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        reference.step()
        torch.testing.assert_close(p.detach(), twin, rtol=1e-15, atol=1e-15)
    assert count(optimizer) == reference.k == 3


# Laws and lengths -----------------------------------------------------------------------------------------------------


@paths
@norms
def test_a_quadratic_law_changes_by_the_square_of_the_step(path: dict[str, Any], norm: str) -> None:
    """T037: one step of length α multiplies x₁² − x₂² by 1 − α²/|x|² for a loss of x₁x₂."""
    x = Parameter(torch.tensor([2.0, 0.7], dtype=torch.float64))
    optimizer = NormalizedGD([x], 0.3, norm=norm, **path)
    before = float(x.detach()[0] ** 2 - x.detach()[1] ** 2)
    (x[0] * x[1] - 1).square().backward()
    optimizer.step()
    after = float(x.detach()[0] ** 2 - x.detach()[1] ** 2)
    assert after / before == pytest.approx(0.9799554566, abs=5e-11)
    assert after / before == pytest.approx(1 - 0.09 / 4.49, rel=1e-13)


@paths
def test_the_length_of_each_step(path: dict[str, Any]) -> None:
    params = with_gradients([3.0, 0.0], [[0.0], [4.0]], 12.0)
    optimizer = NormalizedGD([{"params": params[:2]}, {"params": params[2:]}], 0.5, **path)
    for k in range(6):
        before = clones(params)
        optimizer.step()
        moved = [p.detach() - q for p, q in zip(params, before, strict=True)]
        length = 0.5 * (k + 1) ** -0.25
        equal(moved, [-length / 13 * p.grad for p in params if p.grad is not None], rtol=1e-12, atol=1e-14)


@paths
@pytest.mark.parametrize(
    ("norm", "divisors"), [("global", [13, 13, 13]), ("group", [5, 5, 12]), ("tensor", [3, 4, 12])]
)
def test_norms_span_what_they_say(path: dict[str, Any], norm: str, divisors: list[float]) -> None:
    params = with_gradients([3.0, 0.0], [[0.0], [4.0]], 12.0)
    optimizer = NormalizedGD([{"params": params[:2]}, {"params": params[2:]}], 0.5, norm=norm, **path)
    optimizer.step()
    expected = [1 - 0.5 * p.grad / by for p, by in zip(params, divisors, strict=True) if p.grad is not None]
    equal(clones(params), expected, rtol=1e-13, atol=1e-14)


@paths
def test_groups_differ_in_rate_decay_and_norm(path: dict[str, Any]) -> None:
    params = with_gradients([3.0], [4.0], [12.0], [5.0])
    groups = [
        {"params": params[:1], "lr": 0.1, "decay": 0.5},
        {"params": params[1:2], "maximize": True},
        {"params": params[2:3], "norm": "group", "weight_decay": 0.25},
        {"params": params[3:], "norm": "tensor", "decay": 0.0, "momentum": 0.5},
    ]
    optimizer = NormalizedGD(groups, 0.2, **path)
    optimizer.step()
    optimizer.step()
    slow, quick = 2**-0.25, 2**-0.5
    decayed = (1 - 0.2 * 0.25) - 0.2
    expected = [
        1 - 0.1 * 0.6 * (1 + quick),
        1 + 0.2 * 0.8 * (1 + slow),
        (1 - 0.2 * slow * 0.25) * decayed - 0.2 * slow,
        1 - 0.2 * 2,
    ]
    assert [p.item() for p in params] == pytest.approx(expected, rel=1e-13)


@paths
@norms
def test_gradients_are_never_written(path: dict[str, Any], norm: str) -> None:
    params = with_gradients([3.0, 1.0], 2.0)
    before = [p.grad for p in params]
    kept = [p.grad.clone() for p in params if p.grad is not None]
    optimizer = NormalizedGD(params, 0.5, norm=norm, momentum=0.5, weight_decay=0.1, maximize=True, **path)
    for _ in range(3):
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(params, before, strict=True))
        equal([p.grad for p in params if p.grad is not None], kept)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [20, 14])
def test_tiny_gradients_move_by_the_whole_length(path: dict[str, Any], dtype: torch.dtype, power: int) -> None:
    """The inverse of their norm overflows in float16, and the sum of their squares underflows in all three."""
    tiny = 2.0**-power if dtype == torch.float16 else 2.0 ** (-5 * power)
    (p,) = with_gradients([tiny, 0.0], dtype=dtype)
    NormalizedGD([p], 0.5, **path).step()
    assert p.tolist() == [0.5, 1.0]


@paths
@masked
def test_gradients_below_normal_numbers_never_give_nan(path: dict[str, Any], capturable: bool) -> None:
    (p,) = with_gradients([1e-42, 0.0], dtype=torch.float32)
    NormalizedGD([p], 0.5, capturable=capturable, **path).step()
    assert 0.5 <= p[0] < 1 and p[1] == 1


# Zero, infinity, NaN --------------------------------------------------------------------------------------------------


@paths
@norms
@masked
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_zero_gradient_moves_nothing(path: dict[str, Any], norm: str, capturable: bool, momentum: float) -> None:
    params = with_gradients([0.0, 0.0], 0.0, [])
    optimizer = NormalizedGD(params, 0.5, norm=norm, momentum=momentum, capturable=capturable, **path)
    optimizer.step()
    equal(clones(params), [torch.ones_like(p) for p in params])
    assert count(optimizer) == 1


@paths
@norms
def test_beside_a_zero_gradient_the_others_move(path: dict[str, Any], norm: str) -> None:
    params = with_gradients([0.0, 0.0], [3.0, 4.0])
    NormalizedGD(params, 0.5, norm=norm, **path).step()
    assert params[0].tolist() == [1.0, 1.0]
    assert params[1].tolist() == pytest.approx([0.7, 0.6])


@paths
@norms
@masked
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(
    path: dict[str, Any], norm: str, capturable: bool, bad: float
) -> None:
    params = with_gradients([1.0, 2.0], 3.0, [4.0])
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = NormalizedGD(groups, 0.5, norm=norm, momentum=0.9, weight_decay=0.1, capturable=capturable, **path)
    optimizer.step()
    before, state = clones(params), copy.deepcopy(optimizer.state_dict())
    for index in range(3):
        params[index].grad, good = torch.full_like(params[index], bad), params[index].grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        params[index].grad = good
        equal(clones(params), before)
    for index, kept in optimizer.state_dict()["state"].items():
        equal(list(kept.values()), list(state["state"][index].values()))
    optimizer.step()
    assert count(optimizer) == 2
    assert all(bool((p != q).all() and p.isfinite().all()) for p, q in zip(params, before, strict=True))


def test_the_warning_comes_once_and_points_at_the_caller() -> None:
    (p,) = with_gradients([math.nan])
    for schedule in (False, True):
        optimizer = NormalizedGD([p], 1.0)
        if schedule:
            lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match="the norm of the gradient is not finite: such steps move nothing") as seen:
            optimizer.step()
            optimizer.step()
        assert [warning.filename for warning in seen] == [__file__]
    scaled = NormalizedGD([p], 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.warns(UserWarning, match="Said once") as seen:
        scaler.step(scaled)
    assert [warning.filename for warning in seen] == [__file__]


@masked
def test_only_steps_that_may_read_back_warn(capturable: bool) -> None:
    (p,) = with_gradients([math.inf])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        NormalizedGD([p], 1.0, capturable=capturable).step()
    assert len(seen) == (not capturable)


@paths
def test_a_gradient_that_is_not_finite_is_an_error_if_wanted(path: dict[str, Any]) -> None:
    (p,) = with_gradients([math.nan])
    optimizer = NormalizedGD([p], 1.0, error_if_nonfinite=True, momentum=0.5, **path)
    with pytest.raises(RuntimeError, match="the norm of the gradient is not finite, so it has no direction"):
        optimizer.step()
    assert p.item() == 1 and count(optimizer) == 0
    assert optimizer.state[p]["momentum_buffer"].item() == 0


# One count of steps ---------------------------------------------------------------------------------------------------


@paths
def test_a_layer_that_thaws_late_steps_with_the_others(path: dict[str, Any]) -> None:
    params = with_gradients([3.0], [4.0])
    optimizer = NormalizedGD(params, 1.0, **path)
    late, params[1].grad = params[1].grad, None
    for _ in range(3):
        optimizer.step()
    before = clones(params)
    params[1].grad = late
    optimizer.step()
    alpha = 4**-0.25
    equal(clones(params), [before[0] - 0.6 * alpha, before[1] - 0.8 * alpha], rtol=1e-13, atol=1e-13)


@paths
@pytest.mark.parametrize("first", [True, False])
def test_a_group_that_is_added_late_steps_with_the_others(path: dict[str, Any], first: bool) -> None:
    params = with_gradients([3.0], [4.0])
    optimizer = NormalizedGD(params[:1], 1.0, **path)
    if first:
        for _ in range(3):
            optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    k = 3 if first else 0
    for step in range(k, k + 2):
        before = clones(params)
        optimizer.step()
        alpha = (step + 1) ** -0.25
        equal(clones(params), [before[0] - 0.6 * alpha, before[1] - 0.8 * alpha], rtol=1e-13, atol=1e-13)
    assert [float(state["step"]) for state in optimizer.state_dict()["state"].values()] == [k + 2] * 2


def test_a_parameter_given_twice_is_counted_once() -> None:
    params = with_gradients([3.0], [4.0])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = NormalizedGD([params[0], params[0], params[1]], 1.0)
    for _ in range(3):
        optimizer.step()
    assert count(optimizer) == 3


@pytest.mark.parametrize("spoil", ["counts differ", "some have none", "integers"])
def test_states_with_other_counts_join(spoil: str) -> None:
    """The largest count is right: those of frozen layers lag behind, in optimizers that count for each tensor."""
    params = with_gradients([3.0], [4.0])
    optimizer = NormalizedGD(params, 1.0)
    for _ in range(5):
        optimizer.step()
    state = optimizer.state_dict()
    if spoil == "counts differ":
        state["state"][0]["step"] = torch.tensor(2.0)
    elif spoil == "some have none":
        del state["state"][0]
    else:
        state["state"] = {0: {"step": 2}, 1: {"step": 5}}
    other = NormalizedGD(params, 1.0)
    other.load_state_dict(state)
    other.step()
    assert [float(kept["step"]) for kept in other.state_dict()["state"].values()] == [6.0, 6.0]


def test_the_state_of_sgd_is_taken_over_with_its_momentum() -> None:
    params = with_gradients([3.0], [4.0])
    before = torch.optim.SGD(params, lr=0.1, momentum=0.5)
    before.step()
    optimizer = NormalizedGD(params, 1.0)
    optimizer.load_state_dict(before.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["decay"]) == (0.1, 0.25)
    at = clones(params)
    optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"].item() == 4.5
    equal(clones(params), [at[0] - 0.06, at[1] - 0.08], rtol=1e-13, atol=1e-13)
    assert count(optimizer) == 1


def test_loading_into_another_dtype() -> None:
    params = with_gradients([3.0], [4.0])
    optimizer = NormalizedGD(params, 1.0, momentum=0.5)
    optimizer.step()
    halves = with_gradients([3.0], [4.0], dtype=torch.bfloat16)
    other = NormalizedGD(halves, 1.0, momentum=0.5)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert other.state[halves[0]]["momentum_buffer"].dtype == torch.bfloat16
    assert other.state[halves[0]]["step"].dtype == torch.float32
    assert count(other) == 2


def test_two_optimizers_from_one_state_count_for_themselves() -> None:
    params = with_gradients([3.0], [4.0])
    optimizer = NormalizedGD(params, 1.0)
    optimizer.step()
    state = optimizer.state_dict()
    others = [NormalizedGD(with_gradients([3.0], [4.0]), 1.0) for _ in range(2)]
    for other in others:
        other.load_state_dict(state)
        other.step()
    optimizer.step()
    assert [count(each) for each in (optimizer, *others)] == [2, 2, 2]
    assert float(state["state"][0]["step"]) == 1


# Saved and copied -----------------------------------------------------------------------------------------------------


def through_torch(state: dict[str, Any], folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state: dict[str, Any], folder: Path) -> Any:
    """Tensors in one file, all else in JSON, as stores do that take no pickles."""
    tensors = {f"{index}.{name}": value for index, kept in state["state"].items() for name, value in kept.items()}
    safetensors.torch.save_file(tensors, folder / "state.safetensors")
    (folder / "groups.json").write_text(json.dumps(state["param_groups"]))
    loaded: dict[str, Any] = {"state": {}, "param_groups": json.loads((folder / "groups.json").read_text())}
    for key, value in safetensors.torch.load_file(folder / "state.safetensors").items():
        index, _, name = key.partition(".")
        loaded["state"].setdefault(int(index), {})[name] = value
    return loaded


@pytest.mark.parametrize("route", [through_torch, through_safetensors])
@pytest.mark.parametrize("names", [False, True])
def test_a_run_resumes(route: Callable[[dict[str, Any], Path], Any], names: bool, tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, NormalizedGD, PowerDecayLR]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        params = list(model.named_parameters()) if names else list(model.parameters())
        optimizer = NormalizedGD(params, 0.1, decay=0, momentum=0.5, weight_decay=0.01)
        return model, optimizer, PowerDecayLR(optimizer, 0.5, cooldown_steps=3, total_steps=10)

    def train(model: nn.Module, optimizer: NormalizedGD, scheduler: PowerDecayLR, steps: int) -> list[Tensor]:
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            scheduler.step()
        return clones(list(model.parameters()))

    expected = train(*begin(), 10)
    model, optimizer, scheduler = begin()
    train(model, optimizer, scheduler, 4)
    kept = copy.deepcopy(model.state_dict()), route(optimizer.state_dict(), tmp_path), scheduler.state_dict()
    resumed = begin()
    for each, state in zip(resumed, kept, strict=True):
        each.load_state_dict(state)
    equal(train(*resumed, 6), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_copies_go_on_alone(copied: Callable[[Any], Any]) -> None:
    model = nn.Linear(3, 2)
    optimizer = NormalizedGD(model.parameters(), torch.tensor(0.1), momentum=0.5)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    twin_model, twin = copied((model, optimizer))
    assert twin.param_groups[0]["params"][0] is twin_model.weight
    before = clones(list(model.parameters()))
    twin_model(torch.ones(3)).sum().backward()
    twin.step()
    twin.step()
    equal(clones(list(model.parameters())), before)
    assert (count(optimizer), count(twin)) == (1, 3)


# Loops ----------------------------------------------------------------------------------------------------------------


def test_schedulers_see_the_undecayed_rate() -> None:
    params = with_gradients([3.0])
    optimizer = NormalizedGD(params, 1.0, decay=0.5)
    scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
    rates = []
    for k in range(4):
        before = params[0].item()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        assert before - params[0].item() == pytest.approx(rates[-1] * (k + 1) ** -0.5)
        scheduler.step()
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1])


@paths
def test_the_scale_of_a_loss_scaler_does_not_matter(path: dict[str, Any]) -> None:
    found = []
    for scale in (None, 2.0**3, 2.0**16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = NormalizedGD(model.parameters(), 0.1, weight_decay=0.1, momentum=0.5, **path)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 3)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(clones(list(model.parameters())))
    equal(found[0], found[1], rtol=1e-6, atol=1e-7)
    equal(found[1], found[2], rtol=1e-6, atol=1e-7)


def test_a_loss_scaler_skips_what_overflows_and_so_does_the_count() -> None:
    x = Parameter(torch.ones(2))
    optimizer = NormalizedGD([x], 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((factor * x).sum()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert count(optimizer) == 2
    torch.testing.assert_close(x.detach(), torch.full((2,), 1 - 0.5 * (1 + 2**-0.25) / 2**0.5))


def test_accumulated_gradients_make_one_step() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for pieces in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        optimizer = NormalizedGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for piece in x.chunk(pieces):
                (model(piece).square().sum() / 8).backward()
            optimizer.step()
        found.append(clones(list(model.parameters())))
    equal(*found, rtol=1e-12, atol=1e-13)


def test_clipping_the_norm_changes_nothing() -> None:
    found = []
    for limit in (math.inf, 1e-3):
        params = with_gradients([3.0, 1.0], 2.0)
        optimizer = NormalizedGD(params, 0.5)
        nn.utils.clip_grad_norm_(params, limit)
        optimizer.step()
        found.append(clones(params))
    equal(*found, rtol=1e-12, atol=1e-13)


def test_a_closure_is_run_once_with_gradients_on_and_its_value_returned() -> None:
    x, calls = Parameter(torch.tensor([3.0, 4.0])), []
    optimizer = NormalizedGD([x], 5.0)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 25.0
    assert calls == [True]
    assert x.tolist() == [0.0, 0.0]
    assert optimizer.step() is None


def test_a_saved_activation_that_the_step_changes_is_noticed() -> None:
    """Autograd refuses to use a parameter that was changed since it was saved, whichever kernels changed it."""
    x = Parameter(torch.ones(3))
    loss = (x * x).sum()
    x.grad = torch.ones(3)
    NormalizedGD([x], 0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Autograd through steps -----------------------------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_differentiable(norm: str, momentum: float, weight_decay: float) -> None:
    def steps(x: Tensor, y: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        params = [x.clone(), y.clone()]
        optimizer = NormalizedGD(
            params, lr, norm=norm, momentum=momentum, weight_decay=weight_decay, differentiable=True
        )
        for _ in range(3):
            copies = [p.clone() for p in params]
            loss = (copies[0].sin() * copies[1]).sum() + copies[0].pow(4).sum()
            gradients = torch.autograd.grad(loss, copies, create_graph=True)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
        return params[0], params[1]

    x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(steps, (x, y, lr))


# torch.compile --------------------------------------------------------------------------------------------------------


def compiled_run(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], compiled: str, steps: int = 5
) -> tuple[list[Tensor], list[int], dict[str, int]]:
    """What some steps reach, how many graphs there were after each, and the breaks between graphs by their reason."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = make([{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.2}])
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))

    def backward() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()

    def step() -> None:
        if compiled == "training":
            backward()
        optimizer.step()

    one = step if compiled == "no" else torch.compile(step, backend="aot_eager")
    graphs = []
    for _ in range(steps):
        if compiled != "training":
            backward()
        one()
        graphs.append(counters["stats"]["unique_graphs"])
    return clones(list(model.parameters())), graphs, {key[:60]: n for key, n in counters["graph_break"].items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["step", "training"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "tensor", "momentum": 0.9},
        {"lr": torch.tensor(0.1), "norm": "group"},
        {"foreach": False},
        pytest.param({"fused": True}, marks=needs_native),
        pytest.param({"fused": True, "norm": "tensor", "momentum": 0.9, "weight_decay": 0.1}, marks=needs_native),
    ],
    ids=str,
)
def test_compiled_steps_are_the_same_without_breaks_or_recompiling(what: str, options: dict[str, Any]) -> None:
    options = {"lr": 0.1, **options}
    found, graphs, breaks = compiled_run(lambda groups: NormalizedGD(groups, **copy.deepcopy(options)), what)
    momentum = options.get("momentum", 0.0)
    _, graphs_of_sgd, breaks_of_sgd = compiled_run(lambda groups: torch.optim.SGD(groups, 0.1, momentum), what)
    assert breaks == breaks_of_sgd
    assert graphs == graphs_of_sgd
    assert len(set(graphs[1:])) == 1
    expected, _, _ = compiled_run(lambda groups: NormalizedGD(groups, **copy.deepcopy(options)), "no")
    equal(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@norms
def test_compiled_steps_move_nothing_where_the_gradient_is_not_finite(norm: str) -> None:
    torch._dynamo.reset()
    params = with_gradients([3.0, 4.0], [[1.0]])
    optimizer = NormalizedGD(params, 0.5, norm=norm, momentum=0.5, weight_decay=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    step()
    before, kept = clones(params), copy.deepcopy(optimizer.state_dict()["state"])
    params[0].grad = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    step()
    equal(clones(params), before)
    for index, state in optimizer.state_dict()["state"].items():
        equal(list(state.values()), list(kept[index].values()))


# One call of a kernel -------------------------------------------------------------------------------------------------


@needs_native
@masked
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "maximize": True}, {"lr": torch.tensor([0.3])}, {"norm": "group"}], ids=str
)
def test_one_call_of_a_kernel_is_what_its_parts_are(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype, capturable: bool
) -> None:
    ends = []
    for way in ("past the dispatcher", "at once", "in parts"):
        params = with_gradients([[3.0, -4.0], [0.5, 7.0]], [12.0], [[]], dtype=dtype)
        given = {"lr": 0.3, "capturable": capturable, "fused": True, **options}
        optimizer = NormalizedGD(params, **given)
        if way != "past the dispatcher":
            params[0].grad = params[0].grad.T.contiguous().T
            monkeypatch.setattr(ops, "normalized_step_", lambda *_: None)
        if way == "in parts":
            monkeypatch.setattr(normalized_gd._Share, "is_plain", False)
        before = clones([p.grad for p in params])
        for _ in range(3):
            optimizer.step()
        equal([p.grad for p in params], before)
        assert count(optimizer) == 3
        ends.append(clones(params))
    eps = torch.finfo(dtype).eps
    for end in ends[1:]:
        equal(ends[0], end, rtol=4 * eps, atol=4 * eps)
    assert not torch.equal(ends[0][0], torch.ones_like(ends[0][0]))


@needs_native
def test_the_short_way_past_the_dispatcher_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    monkeypatch.setattr(ops, "normalized_axpby_", lambda *_: ways.append("dispatcher") or torch.zeros(()))
    for options in ({}, {"weight_decay": 0.1}, {"norm": "group"}, {"maximize": True}):
        optimizer = NormalizedGD(with_gradients([3.0], [4.0, 0.0]), 1.0, **options)
        optimizer.step()
        assert ways.pop() == "dispatcher" and not ways  # the first makes the state
        for _ in range(2):
            optimizer.step()
        assert not ways and count(optimizer) == 3


@paths
def test_a_parameter_without_a_gradient_stays_and_may_be_saved_for_backward(path: dict[str, Any]) -> None:
    optimizer = NormalizedGD(params := with_gradients([3.0], [4.0]), 1.0, decay=0, **path)
    optimizer.step()
    params[1].grad = None
    loss = (params[1] ** 2).sum()
    optimizer.step()
    loss.backward()  # no false alarm that it was modified
    equal(clones(params), [torch.tensor([end], dtype=torch.float64) for end in (-0.6, 0.2)], rtol=1e-14, atol=1e-14)


@paths
def test_the_first_group_may_be_empty(path: dict[str, Any]) -> None:
    params = with_gradients([3.0, 4.0])
    optimizer = NormalizedGD([{"params": []}, {"params": params}], 1.0, decay=0, **path)
    for _ in range(2):
        optimizer.step()
    equal(clones(params), [torch.tensor([-0.2, -0.6], dtype=torch.float64)], rtol=1e-14, atol=1e-14)
    assert [float(state["step"]) for state in optimizer.state_dict()["state"].values()] == [2]


# Shards of unknown norm -----------------------------------------------------------------------------------------------


def test_what_fsdp1_has_flattened_is_refused_with_the_cure() -> None:
    whole, flat = with_gradients([3.0], [4.0])
    flat._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="FullyShardedDataParallel has flattened: shard the model with torch"):
        NormalizedGD([whole, flat], 1.0)
    optimizer = NormalizedGD([whole], 1.0)
    with pytest.raises(ValueError, match="fully_shard"):
        optimizer.add_param_group({"params": [flat]})
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and whole.item() == 0.0


def test_parameters_that_are_the_same_memory_are_refused_with_the_cure() -> None:
    encoder, decoder = nn.Linear(3, 3), nn.Linear(3, 3)
    decoder.weight.data = encoder.weight.data
    with pytest.raises(ValueError, match=r"tie weights by assigning the parameter"):
        NormalizedGD([*encoder.parameters(), *decoder.parameters()], 1.0)
    optimizer = NormalizedGD(encoder.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"tie weights by assigning the parameter"):
        optimizer.add_param_group({"params": [decoder.weight]})
    assert len(optimizer.param_groups) == 1
    whole = torch.zeros(6)
    NormalizedGD(
        [Parameter(whole[:3]), Parameter(whole[3:]), Parameter(torch.empty(0)), Parameter(torch.empty(0))], 1.0
    )
    NormalizedGD([Parameter(torch.empty(3, device="meta")), Parameter(torch.empty(3, device="meta"))], 1.0)


@paths
def test_an_expanded_parameter_ends_the_step_before_it_begins(path: dict[str, Any]) -> None:
    plain, expanded = Parameter(torch.zeros(2)), Parameter(torch.zeros(1).expand(3))
    optimizer = NormalizedGD([plain, expanded], lr=1.0, decay=0, **path)
    plain.grad, expanded.grad = torch.ones(2), torch.ones(3)
    with pytest.raises(RuntimeError):
        optimizer.step()
    # Stock optimizers, and ours without kernels, have moved those before it once.
    assert plain.tolist() == ([0.0, 0.0] if "fused" in path else pytest.approx([-(5**-0.5)] * 2))


@masked
def test_the_first_group_may_be_empty_or_hold_what_is_new(capturable: bool) -> None:
    (p,) = with_gradients([3.0, 4.0])
    optimizer = NormalizedGD([{"params": []}, {"params": [p]}], lr=1.0, capturable=capturable)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(Parameter(torch.zeros(2, dtype=torch.float64)))
    optimizer.step()
    assert count(optimizer) == 2
    optimizer.param_groups[1]["params"].append(Parameter(torch.zeros(2, dtype=torch.float64)))
    optimizer.step()
    assert count(optimizer) == 3


@paths
def test_a_step_that_is_refused_leaves_saved_tensors_as_they_were(path: dict[str, Any]) -> None:
    (p,) = with_gradients([1.0, 1.0])
    optimizer = NormalizedGD([p], lr=1.0, **({} if "fused" in path else path))
    optimizer.step()
    loss = p.square().sum()
    p.grad = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    loss.backward()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, FOREACH, FORLOOP])
def test_the_default_device_does_not_matter(options: dict[str, Any]) -> None:
    (p,) = with_gradients([3.0, 4.0])
    optimizer = NormalizedGD([p], lr=1.0, **options)
    with torch.device("meta"):
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.4, 0.2], dtype=torch.float64))
