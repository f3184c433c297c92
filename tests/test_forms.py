"""vᵀHv of random groups of rows: what they add up to, and which rows fall together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, network
from torch import Tensor, nn

from torchflat import Objective
from torchflat.errors import DataError, NonFiniteError, UsageError


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
