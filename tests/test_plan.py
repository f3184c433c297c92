"""The plan of a pass: how many rows at once and why, how many graphs are kept, what happens when memory runs out."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import network
from torch import Tensor, nn

from torchflat import Objective, sharpness
from torchflat.objective.plan import FASTEST_GRAPH, LARGEST_MICROBATCH, PROBE_ROWS, choose_rows, graphs_that_fit

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("bytes_per_row", "budget", "device", "limit", "rows", "reason"),
    [
        (2**20, 2**30, CPU, None, 64, "1/16 of the memory budget"),
        (2**20, 2**40, CPU, None, FASTEST_GRAPH // 2**20, "larger graphs are slower"),
        (2**20, 2**40, GPU, None, LARGEST_MICROBATCH, "more rows are no faster"),
        (0.0, 2**30, CPU, None, LARGEST_MICROBATCH, "more rows are no faster"),
        (2**40, 2**30, CPU, None, PROBE_ROWS, "fewer rows save no memory worth the time"),
        (2**20, 2**30, CPU, 50, 50, "memory ran out above"),
        (2**40, 2**30, CPU, 3, 3, "memory ran out above"),
        (2**20, 2**30, CPU, 64, 64, "1/16 of the memory budget"),
    ],
)
def test_rows(
    bytes_per_row: float, budget: int, device: torch.device, limit: int | None, rows: int, reason: str
) -> None:
    assert choose_rows(bytes_per_row, budget, device, limit) == (rows, reason)


@given(rows=st.integers(1, 999), batch=st.integers(1, 99), microbatch=st.integers(1, 99), room=st.integers(0, 9999))
def test_no_more_graphs_than_there_are_or_fit(rows: int, batch: int, microbatch: int, room: int) -> None:
    graphs, kept = graphs_that_fit(rows, batch, microbatch, 8.0, room)
    assert graphs >= -(-rows // microbatch) and 0 <= kept <= graphs
    assert kept * 8.0 * rows / graphs <= room * (1 + 1e-9)
    assert graphs_that_fit(rows, batch, microbatch, 0.0, room) == (graphs, graphs)


def perceptron(rows: int, width: int = 64, **options: object) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    return Objective(model, nn.MSELoss(), (torch.randn(rows, width), torch.randn(rows, 4)), **options)


def test_what_was_planned_comes_true() -> None:
    f = perceptron(8000, memory="8MiB")
    f.value()
    before = f.provenance()["plan"]
    f.hvp(torch.ones(f.n))
    after = f.provenance()["plan"]
    assert before["reason"] == "1/16 of the memory budget" and before["kept"] == 0
    assert after["graphs"] == before["graphs"] == -(-8000 // before["microbatch"])
    assert 0 < after["kept"] < after["graphs"]
    assert abs(after["kept"] - before["planned"]) <= 1
    assert f.memory.graphs == pytest.approx(8000 * after["bytes_per_row"] * after["kept"] / after["graphs"], rel=0.05)
    assert after["seconds_per_row"] > 0


def test_what_is_given_overrides() -> None:
    f = perceptron(100, microbatch=7)
    f.value()
    plan = f.provenance()["plan"]
    assert (plan["microbatch"], plan["reason"], plan["bytes_per_row"]) == (7, "as given", None)
    assert f.cost.forwards == pytest.approx(1 + 3 * 0.07, abs=0.02)


def test_rows_and_points_that_come_from_it_follow_the_plan() -> None:
    f = perceptron(600)
    plan = f.subset(500).at(f.x).provenance()["plan"]
    own = f.provenance()["plan"]
    assert [plan[key] for key in ("microbatch", "reason", "bytes_per_row")] == [
        own[key] for key in ("microbatch", "reason", "bytes_per_row")
    ]


def test_the_clock_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = perceptron(3000, memory="8MiB")
    v = torch.ones(plain.n)
    expected = plain.hvp(v)
    given = perceptron(3000, memory="8MiB", microbatch=plain.provenance()["microbatch"])
    assert torch.equal(given.hvp(v), expected)
    monkeypatch.setattr(time, "perf_counter", random.Random(0).random)
    hurried = perceptron(3000, memory="8MiB")
    assert torch.equal(hurried.hvp(v), expected)
    assert hurried.provenance()["microbatch"] == plain.provenance()["microbatch"]


def test_batches_that_cannot_be_cut_have_no_microbatch() -> None:
    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        return model(batch[0]).square().mean(), 1.0

    data = [(torch.ones(4, 2), torch.ones(4))] * 3
    f = Objective(nn.Linear(2, 1), None, data, batch_loss=batch_loss)
    f.hvp(torch.ones(3))
    plan = f.provenance()["plan"]
    assert (plan["microbatch"], plan["reason"], plan["graphs"]) == (None, "batches cannot be cut", 3)


class _Small(nn.Module):
    """Runs out of memory above so many rows, or while graphs of more than so many bytes are kept."""

    def __init__(self, rows: int, graphs: float = float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.rows, self.graphs = rows, graphs
        self.failures = 0
        self.watched: Objective | None = None

    def forward(self, x: Tensor) -> Tensor:
        held = 0 if self.watched is None else self.watched.memory.graphs
        if len(x) > self.rows or held > self.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.body(x)


def small(model: _Small, rows: int = 200, **options: object) -> Objective:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    f = Objective(model, nn.MSELoss(), (x, x[:, :2]), **options)
    model.watched = f
    return f


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("microbatch", [None, 150])
def test_rows_are_halved_when_memory_runs_out(rows: int, microbatch: int | None) -> None:
    expected = sharpness(small(_Small(1000)))
    f = small(_Small(rows), microbatch=microbatch)
    answer = sharpness(f)
    assert answer.status.ok and answer.value == pytest.approx(expected.value, rel=1e-4)
    plan = f.provenance()["plan"]
    assert rows / 2 <= plan["microbatch"] <= rows
    assert plan["reason"] == "memory ran out above"
    assert f.provenance()["notes"].count("memory ran out: fewer rows went through the model at once") == 1


def test_fewer_graphs_are_kept_when_memory_runs_out_before_the_budget_is_spent() -> None:
    plenty = small(_Small(1000), microbatch=10)
    v = torch.ones(plenty.n)
    expected, everything = plenty.hvp(v), plenty.memory.graphs
    f = small(_Small(1000, graphs=everything / 3), microbatch=10)
    torch.testing.assert_close(f.hvp(v), expected)
    assert f.memory.graphs <= everything / 3
    assert f.provenance()["microbatch"] == 10 and f.provenance()["products"] in ("mixed", "rebuilt")
    assert f.provenance()["notes"] == ["memory ran out before the budget was spent: fewer graphs were kept"]


def test_a_row_that_does_not_fit_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        small(_Small(0)).value()


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    f = network("relu").objective(microbatch=4)
    f.value()

    def broken() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        f._passes.attempt(broken)
    assert f.provenance()["microbatch"] == 4
