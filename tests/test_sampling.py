"""How far λ₁ moves on fresh data: against closed forms, and against data sets that are really drawn anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import network
from scipy import stats
from torch import Tensor, nn

from torchflat import Objective, Task, audit, sharpness
from torchflat.errors import UsageError
from torchflat.objective.forms import Forms
from torchflat.spectrum.sampling import Sampling, sampling_interval, standard_error

SCALE = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)


def linear(rows: Any) -> Objective:
    """Linear regression on these rows: H = 2 XᵀX / m."""
    data = [(x, x[:, :1]) for x in rows] if isinstance(rows, list | tuple) else (rows, rows[:, :1])
    return Objective(nn.Linear(len(SCALE), 1, bias=False, dtype=torch.float64), nn.MSELoss(), data)


def drawn(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, len(SCALE), generator=generator, dtype=torch.float64) * SCALE


def top(rows: Tensor) -> tuple[float, Tensor]:
    values, vectors = torch.linalg.eigh(2 * rows.T @ rows / len(rows))
    return float(values[-1]), vectors[:, -1]


def by_curvature(rows: Tensor) -> Tensor:
    """In the worst order there is for groups of neighbours."""
    return rows[(rows @ top(rows)[1]).abs().argsort()]


ORDERS = {
    "as drawn": lambda rows: rows,
    "sorted": by_curvature,
    "sorted, in batches": lambda rows: by_curvature(rows).split(30),
}


@pytest.mark.parametrize("order", ORDERS)
def test_fresh_data_falls_into_the_interval_as_often_as_it_says(order: str) -> None:
    generator, trials, confidence = torch.Generator().manual_seed(1), 300, 0.8
    hits = 0
    for trial in range(trials):
        rows = drawn(150, generator)
        fresh, _ = top(drawn(150, generator))
        answer = sampling_interval(linear(ORDERS[order](rows)), top(rows)[1], confidence, seed=trial, groups=16)
        hits += answer.lower <= fresh <= answer.upper
    # Without the chance of the fresh data it would be 63 %; with neighbours as groups nearly all.
    low, high = stats.binom.interval(0.9998, trials, confidence)
    assert low <= hits <= high


@pytest.mark.parametrize("order", ORDERS)
def teststandard_error_is_that_of_the_closed_form(order: str) -> None:
    # The squares of a Gaussian: Var 2(x·v)² = 2·(2σ²)², so that the error is λ·√(2/m).
    rows = drawn(6000, torch.Generator().manual_seed(0))
    value, vector = top(rows)
    answer = sampling_interval(linear(ORDERS[order](rows)), vector, groups=1500)
    assert answer.value == pytest.approx(value, rel=1e-12)
    assert answer.standard_error == pytest.approx(value * math.sqrt(2 / len(rows)), rel=0.1)
    # What it guards against: the spread of neighbours.
    neighbours = (by_curvature(rows) @ vector).square().reshape(200, -1).mean(1) * 2
    assert float(neighbours.std()) / math.sqrt(200) > 4 * answer.standard_error


def test_order_does_not_matter_where_groups_are_rows() -> None:
    rows = drawn(60, torch.Generator().manual_seed(0))
    vector = top(rows)[1]
    answers = [sampling_interval(linear(ORDERS[order](rows)), vector) for order in ORDERS]
    assert [answer.groups for answer in answers] == [60, 60, 60]
    for other in answers[1:]:
        assert other.standard_error == pytest.approx(answers[0].standard_error, rel=1e-12)
        assert (other.lower, other.upper) == pytest.approx((answers[0].lower, answers[0].upper), rel=1e-12)


def test_it_is_the_ratio_estimator_where_rows_have_weights() -> None:
    case = network("tokens")
    f = case.objective(dtype=torch.float64)
    v = torch.ones(f.n, dtype=torch.float64) / math.sqrt(f.n)
    forms = f.quadratic_forms(v)
    assert len(forms.sums) == f.rows == 9 and forms.weights.min() < forms.weights.max()
    answer = sampling_interval(f, v, confidence=0.9)
    q, total = float(forms.sums.sum() / forms.weights.sum()), float(forms.weights.sum())
    error = math.sqrt(9 / 8 * float((forms.sums - q * forms.weights).square().sum())) / total
    assert answer.standard_error == pytest.approx(error, rel=1e-12)
    half = stats.t.ppf(0.95, 8) * math.sqrt(2) * error
    assert (answer.lower, answer.upper) == pytest.approx((q - half, q + half), rel=1e-12)


def test_it_is_near_the_jackknife() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 1 + torch.rand(400, generator=generator, dtype=torch.float64)
    sums = weights * torch.randn(400, generator=generator, dtype=torch.float64).square()
    left_out = (sums.sum() - sums) / (weights.sum() - weights)
    jackknife = math.sqrt(399 / 400 * float((left_out - left_out.mean()).square().sum()))
    ones, one_stratum = torch.ones(400, dtype=torch.float64), torch.zeros(400, dtype=torch.int64)
    error, freedom = standard_error(Forms(weights, sums, ones, one_stratum, True))
    assert error == pytest.approx(jackknife, rel=0.01) and freedom == 399


@pytest.mark.parametrize(
    ("units", "strata", "freedom"),
    [([10.0] * 16, [0] * 16, 15), ([1.0] * 16, [0] * 16, 15), ([1.0] * 16, list(range(16)), 15)],
)
def test_degrees_of_freedom(units: list[float], strata: list[int], freedom: int) -> None:
    sums = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.tensor(units, dtype=torch.float64)
    assert standard_error(Forms(counts, sums, counts, torch.tensor(strata), True))[1] == freedom


@pytest.mark.parametrize("size", [1e-150, 1e120])
def test_huge_and_tiny_curvature(size: float) -> None:
    rows = drawn(40, torch.Generator().manual_seed(0))
    reference, answer = (sampling_interval(linear(s * rows), torch.ones(4).double()) for s in (1.0, math.sqrt(size)))
    assert answer.standard_error == pytest.approx(size * reference.standard_error, rel=1e-9)


def test_rows_that_are_alike_leave_nothing_to_chance() -> None:
    answer = sampling_interval(linear(torch.ones(50, 4, dtype=torch.float64)), torch.ones(4))
    assert answer.standard_error == pytest.approx(0, abs=1e-12) and answer.width == pytest.approx(0, abs=1e-12)


def test_few_rows_say_so() -> None:
    answer = sampling_interval(linear(drawn(7, torch.Generator().manual_seed(0))), torch.ones(4))
    assert answer.note == "7 rows are too few to say how far λ₁ moves on fresh data"
    assert (answer.lower, answer.upper, answer.standard_error) == (-math.inf, math.inf, math.inf)
    assert answer.to_dict()["lower"] is None and answer.value > 0


def test_batches_that_cannot_be_cut_are_taken_as_they_come() -> None:
    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return model(batch[0]).square().sum(), 1

    def answer(count: int) -> Sampling:
        rows = drawn(count, torch.Generator().manual_seed(0))
        data = [(row[None].expand(2, -1), torch.zeros(1)) for row in rows]
        model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        return sampling_interval(Objective(model, None, data, batch_loss=batch_loss), top(rows)[1])

    assert answer(30).note == "the batches cannot be cut: each counts as one random draw of fresh data"
    assert 0 < answer(30).standard_error < math.inf
    assert answer(5).note.startswith("5 batches are too few")


def test_it_takes_a_sharpness_and_a_vector_of_any_length() -> None:
    f = linear(drawn(100, torch.Generator().manual_seed(0)))
    found = sharpness(f)
    answer = sampling_interval(f, found)
    assert answer.value == pytest.approx(found.value, rel=1e-6)
    longer = sampling_interval(f, 7 * found.vector)
    assert (longer.value, longer.lower, longer.upper) == pytest.approx((answer.value, answer.lower, answer.upper))
    assert answer.cost.gradients == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 1.0}, "confidence=1.0: it must lie between 0 and 1"),
        ({"groups": 7}, "groups=7: it must be at least 8"),
        ({"vector": torch.zeros(4)}, "the vector is zero or empty"),
        ({"vector": torch.empty(0)}, "the vector is zero or empty"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampling_interval(linear(torch.ones(9, 4).double()), **{"vector": torch.ones(4), **arguments})


@pytest.mark.parametrize(("rows", "known"), [(100, True), (5, False)])
def test_it_is_in_the_report_beside_the_interval_of_the_measurement(rows: int, known: bool) -> None:
    x = drawn(rows, torch.Generator().manual_seed(0))
    report = audit(Task(nn.Linear(4, 1).double(), nn.MSELoss(), (x, x[:, :1])), parts=("sharpness",)).content
    fresh, measured = report["sharpness"]["sampling"], report["sharpness"]
    assert fresh["value"] == pytest.approx(measured["value"], rel=1e-6)
    assert (fresh["lower"] is not None) == known == (fresh["upper"] is not None)
    if known:
        assert fresh["lower"] < measured["lower"] and measured["upper"] < fresh["upper"]
    else:
        assert any("5 rows are too few" in note for note in report["provenance"]["notes"])
