"""vᵀHv and f of random groups of rows: what they add up to, and which rows fall together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, network
from torch import Tensor, nn

from torchflat import Objective
from torchflat.errors import DataError, NonFiniteError, UsageError
from torchflat.objective.forms import Forms, deal


def regression(rows: int, **options: Any) -> tuple[Objective, Tensor]:
    """Row i has the curvature 2·xᵢ² of the single parameter; xᵢ = i + 1."""
    x = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    return Objective(model, nn.MSELoss(), options.pop("data", (x, x)), **options), torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_add_up_to_the_quadratic_form(name: str) -> None:
    case = network(name)
    f = case.objective()
    v = torch.randn(f.n, generator=torch.Generator().manual_seed(1))
    forms = f.quadratic_forms(v, groups=4)
    exact = case.hessian()
    assert len(forms.sums) >= 4
    assert abs(forms.mean - float(v.double() @ exact @ v.double())) <= 1e-5 * float(exact.norm() * (v @ v))


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    groups=st.integers(1, 30),
    microbatch=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_row_counts_once_in_batches_of_any_size(cuts: list[int], groups: int, microbatch: int, seed: int) -> None:
    rows = torch.arange(1.0, sum(cuts) + 1, dtype=torch.float64)[:, None].split(cuts)
    f, v = regression(0, data=[(x, x) for x in rows], microbatch=microbatch)
    forms = f.quadratic_forms(v, groups, seed)
    assert forms.mean == pytest.approx(float(v @ f.hvp(v)), rel=1e-12)
    assert forms.cut and int(forms.units.sum()) == sum(cuts) == forms.weights.sum()
    assert forms.units.max() <= microbatch and len(forms.sums) >= min(groups, sum(cuts))
    assert torch.bincount(forms.strata, weights=forms.units).tolist() == cuts
    assert all(count > 1 or cut == 1 for count, cut in zip(torch.bincount(forms.strata).tolist(), cuts, strict=True))


def test_groups_of_one_row_have_the_curvature_of_that_row() -> None:
    f, v = regression(20)
    assert sorted(f.quadratic_forms(3 * v, groups=20).sums.tolist()) == [18 * i * i for i in range(1, 21)]


def test_rows_fall_to_groups_at_random_by_the_seed() -> None:
    f, v = regression(1000)
    forms, same, other = (f.quadratic_forms(v, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(forms.sums, same.sums) and not torch.equal(forms.sums, other.sums)
    # In their order, the last tenth of the rows has 271 times the curvature of the first.
    means = forms.sums / forms.weights
    assert means.max() < 2 * means.min()


def test_the_l2_term_is_in_every_group() -> None:
    f, v = regression(10, weight_decay=5.0)
    plain, _ = regression(10)
    difference = f.quadratic_forms(2 * v).sums - plain.quadratic_forms(2 * v).sums
    assert difference.tolist() == [20.0] * 10


def test_batches_that_cannot_be_cut_are_one_unit_each() -> None:
    x = torch.ones(3, 1, dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return (model(batch[0]) - batch[1]).square().sum(), len(batch[0])

    # The first dimensions differ, so that there are no rows to count.
    f = Objective(model, None, [(i * x, x[:1]) for i in range(1, 10)], batch_loss=batch_loss)
    forms = f.quadratic_forms(torch.ones(1))
    assert not forms.cut and forms.units.tolist() == [1.0] * 9
    assert forms.sums.tolist() == [6.0 * i * i for i in range(1, 10)]


def test_a_function_is_one_unit() -> None:
    f = Objective.from_function(lambda x: (x**2).sum(), torch.zeros(3))
    forms = f.quadratic_forms(torch.ones(3))
    assert forms.mean == 6.0 and len(forms.sums) == 1


def test_it_costs_one_gradient_and_one_product_and_keeps_no_graph() -> None:
    f, v = regression(100, microbatch=10)
    f.hvp(v)
    before, kept = f.cost, f.provenance()["plan"]["kept"]
    f.quadratic_forms(v)
    spent = f.cost - before
    assert (spent.forwards, spent.backwards, spent.products) == pytest.approx((1, 1, 1))
    assert f.provenance()["plan"]["kept"] == kept == 10


class _Shrinking:
    """Loses a row after some passes."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        x = torch.ones(9 if self.passes >= 0 else 8, 1, dtype=torch.float64)
        yield x, x


def test_data_that_changes_is_refused() -> None:
    data = _Shrinking(1000)
    f, v = regression(0, data=data)
    f.hvp(v)
    data.passes = 0
    with pytest.raises(DataError, match="the data changes between passes: 9 rows at first, and now 8"):
        f.quadratic_forms(v)


def test_what_is_not_finite_is_named() -> None:
    f = Objective.from_function(lambda x: (x**4).sum(), torch.tensor([1e9, 1.0]))
    with pytest.raises(NonFiniteError, match="Hessian product"):
        f.quadratic_forms(torch.tensor([1e30, 0.0]))
    with pytest.raises(NonFiniteError, match="the vector that H is applied to"):
        f.quadratic_forms(torch.tensor([float("nan"), 0.0]))
    with pytest.raises(UsageError, match=r"v must have shape \(2,\), not \(2, 1\)"):
        f.quadratic_forms(torch.ones(2, 1))


# f by groups ----------------------------------------------------------------------------------------------------------


def powers(rows: int, **options: Any) -> Objective:
    """Row i has the loss 2ⁱ: a sum over rows tells which they are."""
    x = torch.full((rows, 1), 2.0, dtype=torch.float64).pow(torch.arange(rows)[:, None] / 2)
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    cuts = options.pop("cuts", [rows])
    return Objective(model, nn.MSELoss(), [(part, 0 * part) for part in x.split(cuts)], **options)


def members(forms: Forms) -> list[set[int]]:
    """The rows of each group of ``powers``."""
    return [{row for row in range(50) if round(total) >> row & 1} for total in forms.sums.tolist()]


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_add_up_to_the_value(name: str) -> None:
    f = network(name).objective()
    for groups in (1, 3, 10_000):
        forms = f.group_values(groups)
        assert forms.mean == pytest.approx(f.value(), rel=1e-5)
        assert not forms.cut or len(forms.sums) == min(groups, f.rows)


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    groups=st.integers(1, 50),
    microbatch=st.none() | st.integers(1, 9),
    seed=st.integers(0, 9),
)
@example(cuts=[5, 9, 9, 9, 9], groups=1, microbatch=None, seed=0)
def test_groups_are_the_rows_that_were_dealt(cuts: list[int], groups: int, microbatch: int | None, seed: int) -> None:
    rows = sum(cuts)
    labels, strata = deal(rows, groups, seed)
    forms = powers(rows, cuts=cuts, microbatch=microbatch).group_values(groups, seed)
    assert members(forms) == [set((labels == group).nonzero().flatten().tolist()) for group in range(len(forms.sums))]
    assert torch.equal(forms.weights, torch.bincount(labels).double()) and torch.equal(forms.units, forms.weights)
    assert torch.equal(forms.strata, strata) and forms.cut and len(forms.sums) == min(groups, rows)


@given(rows=st.integers(1, 300), groups=st.integers(1, 100), seed=st.integers(0, 3))
def test_dealing_is_even_and_keeps_to_the_strata(rows: int, groups: int, seed: int) -> None:
    labels, strata = deal(rows, groups, seed)
    sizes = torch.bincount(labels)
    assert len(sizes) == len(strata) == min(groups, rows) and sizes.min() >= 1
    # Strata differ by one row and by one group at most.
    assert sizes.max() <= -(-(rows // (int(strata.max()) + 1) + 1) // min(4, len(sizes)))
    assert torch.equal(strata[labels], strata[labels].sort().values)
    per_stratum = torch.bincount(strata)
    assert per_stratum.min() >= min(4, groups, rows) and per_stratum.max() <= 7


def test_groups_are_dealt_by_the_seed() -> None:
    first, same, other = (members(powers(40).group_values(10, seed)) for seed in (0, 0, 1))
    assert first == same != other
    # At random inside a stratum, not in runs.
    assert all(max(group) - min(group) > 3 for group in first)


def test_differences_can_be_paired() -> None:
    """Where rows differ a thousand times more than the two networks do, only pairing shows the difference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    noise = 30 * torch.randn(500, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Linear(3, 1).double()
    deep = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1)).double()
    deep[0].weight.data.copy_(torch.eye(3) * 1.001)
    deep[1].load_state_dict(plain.state_dict())
    f = Objective(plain, nn.MSELoss(), (x, noise), microbatch=7)
    g = Objective(deep, nn.MSELoss(), [(x[:123], noise[:123]), (x[123:], noise[123:])])
    a, b = f.group_values(32), g.group_values(32)
    assert torch.equal(a.weights, b.weights) and torch.equal(a.strata, b.strata)
    means = a.sums / a.weights
    differences = b.sums / b.weights - means
    assert float(differences.mean()) == pytest.approx(g.value() - f.value(), rel=0.05)
    assert float(differences.std()) < 1e-3 * float(means.std())


def test_weights_of_a_batch_loss_are_counted() -> None:
    x = torch.arange(1.0, 31.0, dtype=torch.float64)[:, None]

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return (batch[0] * model(batch[0]).square()).sum(), batch[0].sum()

    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    f = Objective(model, None, (x, x), batch_loss=batch_loss, weight_decay=3.0, microbatch=4)
    labels, _ = deal(30, 9, seed=5)
    forms = f.group_values(9, seed=5)
    w = model.weight.item()
    for group in range(9):
        own = x[labels == group]
        weight = float(own.sum())
        total = w * w * float((own**3).sum()) + weight * 1.5 * w * w
        assert (float(forms.weights[group]), float(forms.sums[group])) == pytest.approx((weight, total), rel=1e-12)


def test_values_of_batches_that_cannot_be_cut_are_one_unit_each() -> None:
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)

    def mean_over_the_batch(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return model(batch[0]).mean().square(), 1

    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    f = Objective(model, None, [(i * x, x) for i in range(1, 10)], batch_loss=mean_over_the_batch)
    forms = f.group_values(4)
    assert not forms.cut and forms.units.tolist() == [1.0] * 9 and forms.strata.tolist() == list(range(9))
    assert forms.sums.tolist() == [0.25 * i * i for i in range(1, 10)]


def test_the_value_of_a_function_is_one_unit() -> None:
    forms = Objective.from_function(lambda x: (x**2).sum(), torch.ones(3), weight_decay=2.0).group_values()
    assert forms.mean == 6.0 and len(forms.sums) == 1 and not forms.cut


def test_it_costs_one_evaluation() -> None:
    f = powers(40, microbatch=3)
    f.value()
    before = f.cost
    f.group_values()
    spent = f.cost - before
    assert (spent.forwards, spent.backwards, spent.products) == (1, 0, 0)


def test_values_fail_by_name() -> None:
    f = powers(40)
    with pytest.raises(UsageError, match="groups=0: it must be a positive number"):
        f.group_values(0)
    x = torch.ones(2, 1)
    far = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, x)).at(torch.tensor([1e30, 0.0]))
    with pytest.raises(NonFiniteError, match="loss of micro-batch"):
        far.group_values()
    data = _Shrinking(1000)
    f, _ = regression(0, data=data)
    f.value()
    data.passes = 0
    with pytest.raises(DataError, match="the data changes between passes: 9 rows at first, and now 8"):
        f.group_values()
