"""The Tracker: what it records is right, what it says is true, and training does not notice it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchflat import Objective
from torchflat.errors import DataError, UsageError
from torchflat.optim import Alarm, NormalizedGD, Tracker, TrackerWarning
from torchflat.optim.escape import escape, norm_bound
from torchflat.optim.history import Columns, load, save
from torchflat.optim.sweep import Sweep
from torchflat.problems import MaskedProduct
from torchflat.symmetry import Laws, laws

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "normalized": lambda params: NormalizedGD(params, lr=0.05),
}


class Point(nn.Module):
    """A function of one flat x as a module, whose output is its value."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__()
        self.x, self.function = nn.Parameter(x.clone()), function

    def forward(self) -> Tensor:
        return self.function(self.x)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).to(dtype)


def batches(number: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 5, generator=source).to(dtype), torch.randn(16, 2, generator=source).to(dtype))
        for _ in range(number)
    ]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    tracker: Tracker | None = None,
    penalty: float = 0.0,
) -> None:
    for x, y in data:
        loss = F.mse_loss(model(x), y)
        total = loss + penalty * sum(p.square().sum() for p in model.parameters())
        if tracker:
            tracker.record(loss=loss)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


def silent(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Tracker:
    return Tracker(model, optimizer, log=lambda _: None, **options)


def kinds(tracker: Tracker) -> set[str]:
    return {alarm.kind for alarm in tracker.alarms}


def descend(
    f: Callable[[Tensor], Tensor], x: Tensor, steps: int, tracked: Callable[..., Tracker], lr: float
) -> Tracker:
    model = Point(f, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with tracked(model, optimizer) as tracker:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            tracker.record(loss=loss)
            optimizer.step()
    return tracker


# The account ----------------------------------------------------------------------------------------------------------


def test_a_step_of_given_length_changes_the_law_as_t037_says() -> None:
    model = Point(lambda x: (x[0] * x[1] - 1) ** 2, torch.tensor([2.0, 0.7], dtype=torch.float64))
    optimizer = NormalizedGD(model.parameters(), lr=0.3, decay=0)
    known = Laws.from_group(B=torch.tensor([[1.0], [-1.0]]))
    with silent(model, optimizer, laws=known) as tracker:
        for _ in range(2):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    before = 2.0**2 - 0.7**2
    assert tracker.history["drift/law 1"][1] == pytest.approx(before * (1 - 0.9799554566), rel=1e-8)
    assert tracker.history["length"] == pytest.approx([0.3, 0.3], rel=1e-12)
    assert tracker.history["sum_length_squared"][1] == pytest.approx(0.18, rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("depth", ["linear", "relu"])
def test_the_account_explains_the_drift_of_every_law(name: str, depth: str) -> None:
    torch.manual_seed(0)
    model = network(torch.float64)
    if depth == "linear":
        model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    found = laws(model, torch.zeros(2, 5, dtype=torch.float64))
    start = found.values(model)
    explained = {law: torch.zeros_like(value) for law, value in start.items()}
    with silent(model, optimizer) as tracker:
        for x, y in batches(30, torch.float64):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            gradient = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            length = math.sqrt(
                sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True))
            )
            alpha = length / math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
            for law, value in found.values(gradient).items():
                explained[law] += alpha**2 * value
            assert tracker.history["length"][-1] == pytest.approx(length, rel=1e-9)
    state = tracker.state_dict()["account"]
    assert state["refused"] == {} and tracker.alarms == []
    for law, value in found.values(model).items():
        torch.testing.assert_close(state["explained"][law], explained[law], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(value - state["initial"][law], explained[law], rtol=0, atol=1e-13)
        assert float(explained[law].abs().max()) > 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rounding_breaks_no_law(name: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(200, dtype), tracker)
    columns = [column for key, column in tracker.history.items() if key.startswith("unexplained/")]
    assert len(columns) == 2 and all(0 <= value < 1 for column in columns for value in column)
    assert "law" not in kinds(tracker)


def test_autocast_is_noticed_and_breaks_no_law() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer) as tracker:
        for x, y in batches(100):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.mse_loss(model(x), y.bfloat16())
            loss.backward()
            optimizer.step()
    assert tracker.alarms == [] and tracker.refused == {}


def test_a_penalty_in_the_loss_breaks_the_laws() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.warns(TrackerWarning, match="broken by something other"), Tracker(model, optimizer) as tracker:
        train(model, optimizer, batches(100), penalty=1e-3)
    assert {alarm.subject for alarm in tracker.alarms} == {"0 → 2", "2 → 4"}


@pytest.mark.parametrize("meddle", ["write", "clip by value"])
def test_meddling_breaks_the_laws(meddle: str) -> None:
    model = network()
    optimizer = OPTIMIZERS["normalized"](model.parameters())
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(5), tracker)
        assert kinds(tracker) == set()
        for x, y in batches(40):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            if meddle == "write":
                with torch.no_grad():
                    model[0].weight.mul_(1.0001)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            optimizer.step()
    assert kinds(tracker) == {"law"}


def test_clipping_the_norm_breaks_no_law() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer) as tracker:
        for x, y in batches(30):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert tracker.alarms == []
    assert max(tracker.history["length"]) <= 0.05 * 0.1 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-2), "Adam does not take plain steps"),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum"),
        (lambda p: NormalizedGD(p, lr=1e-2, weight_decay=0.1), "weight decay"),
        (lambda p: NormalizedGD(p, lr=1e-2, norm="tensor"), "tensor"),
    ],
)
def test_what_has_no_account_says_why_and_drifts(make: Callable[..., Any], reason: str) -> None:
    model = network()
    optimizer = make(model.parameters())
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(10), tracker)
    assert set(tracker.refused) == {"0 → 2", "2 → 4"}
    assert all(reason in words for words in tracker.refused.values())
    assert "law" not in kinds(tracker) and "unexplained/0 → 2" not in tracker.history
    assert tracker.history["drift/0 → 2"][0] == 0 < tracker.history["drift/0 → 2"][-1]


def test_groups_with_other_rates_break_only_the_laws_between_them() -> None:
    model = network()
    groups = [
        {"params": [*model[0].parameters(), *model[2].parameters()]},
        {"params": model[4].parameters(), "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(10), tracker)
    assert list(tracker.refused) == ["2 → 4"] and "different learning rates" in tracker.refused["2 → 4"]
    assert tracker.history["lr/1"] == [0.01] * 10 and tracker.alarms == []
    assert all(value < 1 for value in tracker.history["unexplained/0 → 2"])


def test_a_rate_that_a_schedule_changes_is_accounted_for() -> None:
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    with silent(model, optimizer) as tracker:
        for pair in batches(20, torch.float64):
            train(model, optimizer, [pair], tracker)
            schedule.step()
    assert tracker.refused == {} and tracker.alarms == []
    assert tracker.history["lr"][3] == pytest.approx(0.2 * 0.8**3)


def test_momentum_that_comes_later_ends_the_account() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
        assert tracker.refused == {}
        optimizer.param_groups[0]["momentum"] = 0.5
        train(model, optimizer, batches(3), tracker)
    assert set(tracker.refused) == {"0 → 2", "2 → 4"} and tracker.alarms == []


def test_parameters_that_are_added_later_end_the_account() -> None:
    model = network()
    optimizer = NormalizedGD([*model[0].parameters(), *model[2].parameters()], lr=0.05)
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
        assert "0 → 2" not in tracker.refused
        optimizer.add_param_group({"params": model[4].parameters()})
        train(model, optimizer, batches(20), tracker)
    assert "were added to the optimizer" in tracker.refused["0 → 2"] and tracker.alarms == []


def test_parameters_that_are_replaced_end_the_account() -> None:
    model = network()
    optimizer = NormalizedGD(model.parameters(), lr=0.05)
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        optimizer.param_groups[0]["params"][0] = model[0].weight
        train(model, optimizer, batches(20), tracker)
    assert "or replaced in it" in tracker.refused["0 → 2"] and tracker.alarms == []


@pytest.mark.parametrize("make", [torch.optim.SGD, NormalizedGD])
def test_rates_in_tensors_are_compared_by_value(make: Callable[..., Any]) -> None:
    model = network()
    groups = [{"params": layer.parameters(), "lr": torch.tensor(0.05)} for layer in (model[0], model[2], model[4])]
    optimizer = make(groups, lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda k: 1.0, lambda k: 0.5 if k > 2 else 1.0, lambda k: 1.0]
    )
    with silent(model, optimizer) as tracker:
        for batch in batches(12):
            train(model, optimizer, [batch], tracker)
            schedule.step()
    assert "different learning rates" in tracker.refused["0 → 2"] and tracker.alarms == []


def test_going_back_to_a_state_keeps_what_the_optimizer_does_now() -> None:
    model = network()
    optimizer = NormalizedGD(model.parameters(), lr=0.05)
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
        weights, state = copy.deepcopy((model.state_dict(), tracker.state_dict()))
        optimizer.param_groups[0]["weight_decay"] = 0.1
        train(model, optimizer, batches(3), tracker)
        model.load_state_dict(weights)
        tracker.load_state_dict(state)
        train(model, optimizer, batches(20), tracker)
    assert tracker.refused["0 → 2"] == "weight decay was used" and tracker.alarms == []


@pytest.mark.parametrize("read", [False, True])
def test_a_loss_that_is_not_finite_is_said_also_where_its_row_was_read(read: bool) -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer) as tracker:
        for index, batch in enumerate(batches(4)):
            train(model, optimizer, [batch])
            if read:
                assert len(tracker.history["step"]) == index + 1
            tracker.record(loss=math.nan if index == 2 else 1.0)
        assert [(alarm.kind, alarm.step) for alarm in tracker.alarms] == [("nonfinite", 2)]


def test_other_things_in_the_state_of_the_optimizer_do_no_harm() -> None:
    model = network()
    optimizer = NormalizedGD(model.parameters(), lr=0.05)
    optimizer.state["note"] = "mine"
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
    assert tracker.refused == {} and tracker.alarms == []


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_is_seen_through_also_where_the_optimizer_unscales(overflow: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with silent(model, optimizer) as tracker:
        for index, (x, y) in enumerate(batches(10)):
            optimizer.zero_grad()
            scaler.scale(F.mse_loss(model(x), y)).backward()
            if overflow and index == 4:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
    assert tracker.refused == {} and "law" not in kinds(tracker)
    finite = [value for value in tracker.history["length"] if math.isfinite(value)]
    assert 0 < max(finite) < 1 and len(finite) == 10


def test_gradients_that_are_not_finite_move_nothing_and_are_said() -> None:
    model = network()
    optimizer = NormalizedGD(model.parameters(), lr=0.05)
    with silent(model, optimizer) as tracker, pytest.warns(UserWarning, match="not finite"):
        for index, (x, y) in enumerate(batches(8)):
            loss = F.mse_loss(model(x), y) * (math.nan if index == 3 else 1.0)
            optimizer.zero_grad()
            loss.backward()
            tracker.record(loss=loss)
            optimizer.step()
    assert {alarm.subject for alarm in tracker.alarms} == {"loss", "gradient_norm"}
    assert tracker.history["length"][3] == 0 and "law" not in kinds(tracker)
    assert tracker.history["unexplained/0 → 2"][-1] < 1


# Norms, escape, edge --------------------------------------------------------------------------------------------------

STUCK = (0.9, -0.8, 0.5, -0.6), (0.3, -0.9, 0.8, -0.2)
SOLVED = (0.9, 0.8, 0.5, 0.6), (-0.3, -0.9, -0.8, -0.2)
MASKED = MaskedProduct((0.0,) * 4)


@pytest.mark.parametrize(("start", "stuck"), [*((x, True) for x in STUCK), *((x, False) for x in SOLVED)])
def test_descent_that_runs_to_infinity_is_told_from_descent_that_solves(start: Any, stuck: bool) -> None:
    known = Laws.from_group(blocks=[(torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))], names=["x|y"])
    tracker = descend(
        MASKED.function, torch.tensor(start, dtype=torch.float64), 1000, lambda *a: silent(*a, laws=known), 0.01
    )
    final = tracker.history["loss"][-1]
    assert (final > 1) == stuck and (final < 1e-3) == (not stuck)
    assert kinds(tracker) == ({"escape"} if stuck else set())
    assert tracker.history["unexplained/x|y"][-1] < 1


def test_an_infimum_that_is_reached_is_no_escape() -> None:
    k = range(1, 2000)
    rising = [j**0.25 for j in k]
    assert escape([1 + j**-0.5 for j in k], rising, 0.0, 0.5)
    assert escape([1 + j**-0.5 for j in k], rising, 1.0, 0.5) is None
    assert escape([1 + j**-0.5 for j in k], [2 - j**-0.5 for j in k], 0.0, 0.5) is None
    assert escape([1 + j**-0.5 for j in k][:200], rising[:200], 0.0, 0.5) is None
    assert escape([1 / j for j in k], [math.log(j + 1) for j in k], 0.0, 0.5) is None
    limit = escape([3 + 2 * j**-0.5 for j in k], rising, 0.0, 0.5)
    assert limit is not None and limit.limit == pytest.approx(3, abs=0.01)


def test_the_conserved_quantity_bounds_the_norms_of_a_factorisation() -> None:
    # f = ½‖XYᵀ − M‖²: while f does not rise, ‖XYᵀ‖ ≤ ‖M‖ + √(2f₀) (T082).
    source = torch.Generator().manual_seed(0)
    M = torch.randn(4, 3, generator=source).double()
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=source)
    eye = torch.eye(4, dtype=torch.float64)
    product = float(M.norm() + (model(eye).detach() - M).norm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with silent(model, optimizer, product_bound=product) as tracker:
        for _ in range(600):
            loss = 0.5 * (model(eye) - M).square().sum()
            optimizer.zero_grad()
            loss.backward()
            tracker.record(loss=loss)
            optimizer.step()
    history = tracker.history
    assert all(x <= bound for x, bound in zip(history["parameter_norm"], history["norm_bound"], strict=True))
    assert history["norm_bound"][0] < 4 * history["parameter_norm"][-1]  # it says something
    least = 0.5 * float(torch.linalg.svdvals(M)[2]) ** 2
    assert history["loss"][-1] >= least > 0.01 and tracker.alarms == []  # rank two: a stall, but no escape


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 4), n=st.integers(1, 4), r=st.integers(1, 3))
def test_norm_bound_holds(seed: int, m: int, n: int, r: int) -> None:
    source = torch.Generator().manual_seed(seed)
    X, Y = (torch.randn(rows, r, generator=source).double() * 3 for rows in (m, n))
    bound = norm_bound(float((X.T @ X - Y.T @ Y).norm()), float((X @ Y.T).norm()), r)
    assert math.hypot(float(X.norm()), float(Y.norm())) <= bound * (1 + 1e-12)


def test_a_bound_that_leaves_parameters_free_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match=r"does not bound 0\.weight"), silent(model, optimizer, product_bound=1.0):
        train(model, optimizer, batches(1))


@pytest.mark.parametrize(("rate", "edge"), [(0.1, 0.5), (0.39, 1.95)])
def test_the_edge_of_stability_is_seen(rate: float, edge: float) -> None:
    scales = torch.tensor([5.0, 1.0], dtype=torch.float64)
    f = Objective.from_function(lambda x: 0.5 * (scales * x * x).sum(), torch.ones(2, dtype=torch.float64))
    tracker = descend(
        lambda x: 0.5 * (scales * x * x).sum(),
        torch.ones(2, dtype=torch.float64),
        21,
        lambda *a: silent(*a, laws=Laws(()), objective=f, sharpness_every=10, sharpness_share=math.inf),
        rate,
    )
    readings = [(s, e) for s, e in zip(tracker.history["step"], tracker.history["edge"], strict=True) if e is not None]
    assert [s for s, _ in readings] == [0, 10, 20]
    assert [e for _, e in readings] == pytest.approx([edge] * 3, rel=1e-9)
    assert kinds(tracker) == ({"edge"} if edge > 1.9 else set())


def test_a_step_of_given_length_has_the_rate_of_its_length_over_the_gradient() -> None:
    x = torch.tensor([3.0, 0.0], dtype=torch.float64)
    f = Objective.from_function(lambda x: (x * x).sum(), x)
    model = Point(lambda x: (x * x).sum(), x)
    optimizer = NormalizedGD(model.parameters(), lr=0.6, decay=0)
    with silent(model, optimizer, laws=Laws(()), objective=f, sharpness_every=1, sharpness_share=math.inf) as tracker:
        model().backward()
        optimizer.step()
    assert tracker.history["edge"] == pytest.approx([2 * 0.6 / 6])
    assert tracker.history["sharpness_status"] == ["TRACKED"]


def test_sharpness_follows_a_network_and_waits_for_its_share() -> None:
    model = network()
    x, y = batches(1)[0]
    f = Objective(model, F.mse_loss, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    every = {"objective": lambda: Objective(model, F.mse_loss, (x, y)), "sharpness_every": 5}
    with silent(model, optimizer, sharpness_share=math.inf, **every) as tracker:
        train(model, optimizer, batches(10), tracker)
        now = f.at(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        train(model, optimizer, batches(6), tracker)
    known = [i for i, value in enumerate(tracker.history["sharpness"]) if value is not None]
    assert known == [0, 5, 10, 15]
    exact = float(torch.linalg.eigvalsh(now.hvp(torch.eye(now.n)).double())[-1])
    assert tracker.history["sharpness"][10] == pytest.approx(exact, rel=0.02)
    edge = tracker.history["edge"][10] / tracker.history["sharpness"][10]
    assert edge == pytest.approx(0.05 / 1.5)
    with silent(model, optimizer, sharpness_share=1e-9, **every) as tracker:
        train(model, optimizer, batches(11), tracker)
    assert sum(value is not None for value in tracker.history.get("sharpness", [])) <= 1


# Training does not notice ---------------------------------------------------------------------------------------------


def test_training_is_the_same_with_and_without() -> None:
    ends = []
    for tracked in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, y = batches(1)[0]
        options = {"objective": Objective(model, F.mse_loss, (x, y)), "sharpness_every": 2, "sharpness_share": math.inf}
        tracker = silent(model, optimizer, **options) if tracked else None
        train(model, optimizer, batches(6), tracker)
        assert model.training and all(p.grad is not None for p in model.parameters())
        ends.append([*(t.clone() for t in model.state_dict().values()), torch.get_rng_state()])
        if tracker:
            tracker.detach()
            assert not model._forward_pre_hooks
            assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_no_hook_is_left_after_an_interruption() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(KeyboardInterrupt), silent(model, optimizer):
        train(model, optimizer, batches(1))
        raise KeyboardInterrupt
    assert not model._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_compiled_model_stays_one_graph() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer, example_input=torch.zeros(2, 5)) as tracker:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        train(compiled, optimizer, batches(4), tracker)
    assert tracker.alarms == [] and len(tracker.history["drift/0 → 2"]) == 4


def test_steps_are_counted_not_batches() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer, every=2) as tracker:
        for index, (x, y) in enumerate(batches(12)):
            F.mse_loss(model(x), y).backward()
            if index % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    assert tracker.steps == 4 and tracker.history["step"] == [0, 2]
    assert tracker.history["loss"] == [None, None] and tracker.alarms == []


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adam"])
def test_asking_after_every_step_or_never_gives_the_same_history(name: str) -> None:
    found = []
    for ask in (True, False):
        model = network()
        optimizer = {**OPTIMIZERS, "adam": torch.optim.Adam}[name](model.parameters())
        with silent(model, optimizer, every=2) as tracker:
            for pair in batches(37):
                train(model, optimizer, [pair], tracker)
                assert not ask or len(tracker.history["step"]) == (tracker.steps + 1) // 2
        found.append(tracker.history)
    assert found[0] == found[1] and found[0]["step"] == list(range(0, 37, 2))


@pytest.mark.parametrize("room", [2**24, 2**10], ids=["64 steps", "fewer"])
def test_alarms_come_by_themselves_within_a_stretch(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr("torchflat.optim.tracker.STRETCH_BYTES", room)
    said: list[tuple[int, Alarm]] = []
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Tracker(model, optimizer, log=lambda alarm: said.append((tracker.steps, alarm))) as tracker:
        train(model, optimizer, batches(20), tracker)
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        train(model, optimizer, batches(70), tracker)
    assert {alarm.subject for _, alarm in said} == {"0 → 2"}
    assert tracker.stretch == 64 if room > 2**20 else 1 <= tracker.stretch < 10
    assert all(alarm.step == 20 and 20 < steps <= 21 + tracker.stretch for steps, alarm in said)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_loss_may_come_before_or_after_the_step_or_from_a_closure(kind: Callable[..., Any]) -> None:
    found = {}
    for way in ("before", "after", "closure", "keyword"):
        model = network()
        optimizer = kind(model.parameters(), lr=0.05)
        with silent(model, optimizer, every=2) as tracker:
            for x, y in batches(5):

                def closure(
                    x: Tensor = x, y: Tensor = y, model: nn.Module = model, optimizer: Any = optimizer
                ) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.mse_loss(model(x), y)
                    loss.backward()
                    return loss

                if way == "closure":
                    optimizer.step(closure)
                elif way == "keyword":
                    optimizer.step(closure=closure)
                else:
                    loss = closure()
                    if way == "before":
                        tracker.record(loss=float(loss.detach()))
                    optimizer.step()
                    if way == "after":
                        tracker.record(loss=loss)
        found[way] = {name: column for name, column in tracker.history.items() if name != "loss"}
        assert tracker.history["loss"] == pytest.approx([1.55, 1.5, 1.5], abs=0.8)
        found[way]["loss"] = tracker.history["loss"]
    assert found["before"] == found["after"] == found["closure"] == found["keyword"]


def test_lbfgs_is_measured_where_its_step_began() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    x, y = batches(1)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    first = float(closure().detach())
    with silent(model, optimizer, measure_steps=True) as tracker:
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.step(closure)
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), start, strict=True))
    )
    assert tracker.history["loss"] == pytest.approx([first]) and tracker.history["drift/0 → 2"] == [0.0]
    assert tracker.history["length"] == pytest.approx([moved]) == tracker.history["sum_length"]


# Odd models -----------------------------------------------------------------------------------------------------------


def test_a_model_without_laws_is_tracked_by_its_norms() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = OPTIMIZERS["normalized"](model.parameters())
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
    assert tracker.alarms == [] and not [name for name in tracker.history if "/" in name]
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    assert tracker.history["parameter_norm"][-1] == pytest.approx(norm, abs=0.1)


def test_a_model_that_cannot_be_followed_says_so_and_goes_on() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if float(y.detach().sum()) > 0 else -y

    model = Fickle()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.warns(TrackerWarning, match="no laws were found"), Tracker(model, optimizer) as tracker:
        train(model, optimizer, batches(2), tracker)
    assert kinds(tracker) == {"untracked"} and len(tracker.history["step"]) == 2


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_what_torch_cannot_differentiate_twice_still_trains(kind: str) -> None:
    if kind == "complex":
        layers = [nn.Linear(3, 4, bias=False, dtype=torch.complex64), nn.Linear(4, 1, dtype=torch.complex64)]
        x = torch.randn(8, 3, dtype=torch.complex64)
    else:
        layers, x = [nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)], torch.arange(8)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with silent(model, optimizer) as tracker:
        model(x).abs().square().mean().backward()
        optimizer.step()
    assert kinds(tracker) == {"untracked"} and len(tracker.history["step"]) == 1


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"](p for p in model.parameters() if p.requires_grad)
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(5), tracker)
    assert [name for name in tracker.history if name.startswith("drift/")] == ["drift/2 → 4"]
    assert tracker.alarms == [] and tracker.refused == {}


def test_parameters_that_the_optimizer_does_not_have_are_named() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model[4].parameters())
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(3), tracker)
    assert "is not among the parameters of the optimizer" in tracker.refused["2 → 4"]
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in model[4].parameters()))
    assert tracker.history["parameter_norm"][-1] == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"stall": 1.0}, "stall=1.0"),
        ({"sharpness_every": 3}, "needs objective="),
        ({"objective": lambda: None, "sharpness_every": 0}, "sharpness_every=0"),
        ({"objective": lambda: None, "sharpness_share": 0.0}, "sharpness_share=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match=words):
        Tracker(model, optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks and not model._forward_pre_hooks


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="no parameter of this model"):
        Tracker(network(), OPTIMIZERS["sgd"](network().parameters()))


# Keeping --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_is_resumed_has_the_history_of_one_that_is_not(name: str, tmp_path: Path) -> None:
    data = batches(20)
    whole = network()
    optimizer = OPTIMIZERS[name](whole.parameters())
    with silent(whole, optimizer, every=3) as uninterrupted:
        train(whole, optimizer, data, uninterrupted)

    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    with silent(model, optimizer, every=3) as tracker:
        train(model, optimizer, data[:8], tracker)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "tracker": tracker.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    with silent(model, optimizer, every=3) as tracker:
        tracker.load_state_dict(state["tracker"])
        train(model, optimizer, data[8:], tracker)
    assert tracker.history == uninterrupted.history and tracker.steps == 20
    ends = [each.state_dict()["account"] for each in (tracker, uninterrupted)]
    for key in ("initial", "explained"):
        assert all(torch.equal(ends[0][key][law], ends[1][key][law]) for law in ends[1][key])


def test_a_state_of_other_laws_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer) as tracker:
        train(model, optimizer, batches(1), tracker)
    other = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    with silent(other, optimizer) as second, pytest.raises(UsageError, match="has the laws"):
        second.load_state_dict(tracker.state_dict())
        train(other, optimizer, batches(1), second)
    with pytest.raises(UsageError, match="version"):
        second.load_state_dict({"version": 99})


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_files_keep_every_number(tmp_path: Path, suffix: str) -> None:
    columns = Columns()
    columns.add({"step": 0, "loss": 0.1 + 0.2, "sharpness_status": "TRACKED", 'drift/0 → 2, "x"': 1e-300})
    columns.add({"step": 1, "loss": math.inf, "late": 2.5})
    columns.add({"step": 2, "loss": -math.inf})
    path = tmp_path / f"history{suffix}"
    save(columns, path)
    assert load(path) == columns
    assert isinstance(load(path)["step"][0], int)


def test_files_that_are_no_histories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.csv or \.jsonl"):
        save(Columns(), tmp_path / "history.txt")
    (tmp_path / "bad.jsonl").write_text("[1, 2]\n")
    (tmp_path / "bad.csv").write_text("a,b\n1\n")
    for name in ("bad.jsonl", "bad.csv"):
        with pytest.raises(DataError, match="not a history"):
            load(tmp_path / name)


def test_tensorboard_gets_each_number_once(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.calls: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.calls.append((name, value, step))

        def flush(self) -> None:
            pass

    model, writer = network(), Writer()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with silent(model, optimizer) as tracker:
        for pair in batches(3):
            train(model, optimizer, [pair], tracker)
            tracker.tensorboard(writer)
    losses = [(step, value) for name, value, step in writer.calls if name == "loss"]
    assert losses == list(zip([0, 1, 2], tracker.history["loss"], strict=True))


def test_the_figure_shows_what_there_is(tmp_path: Path) -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    x, y = batches(1)[0]
    options = {"objective": Objective(model, F.mse_loss, (x, y)), "sharpness_every": 3, "sharpness_share": math.inf}
    with silent(model, optimizer, **options) as tracker:
        train(model, optimizer, batches(10), tracker)
    titles = [axes.get_title(loc="left") for axes in tracker.figure().axes]
    assert titles == ["Loss and norms", "Drift of each law, |C(x) − C(x₀)|", "η·λ₁"]
    tracker.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


# The sweep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_sweep_finds_what_the_laws_say(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 7),
        nn.LayerNorm(7), nn.Linear(7, 5, bias=False), nn.Linear(5, 3),
    )  # fmt: skip
    found = laws(model, torch.zeros(2, 1, 8, 8), loss=F.cross_entropy)
    assert found.linear and {coupling.kind for coupling in found.couplings} == {"diagonal", "full"}
    model = model.to(dtype)
    parameters = dict(model.named_parameters())
    sweep = Sweep(found, parameters)
    swept = sweep([sweep.read(list(parameters.values()))])
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    values = sweep.by_name(swept.values[:, 0])
    for name, value in found.values(model).items():
        torch.testing.assert_close(values[name], value, rtol=rtol, atol=rtol)
    for coupling in found.couplings:
        total = sum(float(side.sum() if side.ndim == 1 else side.trace()) for side in coupling.sides(parameters))
        unit = next(i for i, law in enumerate(sweep.laws) if law is coupling)
        assert float(swept.masses[sweep.owner == unit].sum()) == pytest.approx(total, rel=rtol)
    torch.testing.assert_close(
        swept.squares[:, 0],
        torch.stack([p.detach().double().square().sum() for p in model.parameters()]),
        rtol=rtol,
        atol=0,
    )
    nothing = sweep([sweep.read([None] * len(parameters))])
    assert not nothing.values.any() and not nothing.squares.any()


def test_large_tensors_are_swept_in_pieces() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 900, bias=False), nn.ReLU(), nn.Linear(900, 3, bias=False))
    found = laws(model, torch.zeros(2, 700))
    sweep = Sweep(found, dict(model.named_parameters()))
    values = sweep([sweep.read(list(model.parameters()))]).values
    torch.testing.assert_close(values[:, 0], found.values(model)["0 → 2"], rtol=1e-5, atol=1e-6)


def test_alarms_are_said_once_and_copied_states_are_independent() -> None:
    said: list[Alarm] = []
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Tracker(model, optimizer, log=said.append) as tracker:
        train(model, optimizer, batches(20), tracker, penalty=1e-2)
        state = copy.deepcopy(tracker.state_dict())
        rows = len(state["history"]["step"])
        train(model, optimizer, batches(2), tracker, penalty=1e-2)
    assert said == tracker.alarms and len({(a.kind, a.subject) for a in said}) == len(said)
    assert len(state["history"]["step"]) == rows == 20
    assert all(a.step <= b.step for a, b in itertools.pairwise(said))
