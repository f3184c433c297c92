"""λ₁ from subsamples and shards: never less truthful than Lanczos with all the data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from calibration import allowed, fresh_entropy
from finite_sums import KINDS, FiniteSum, calibrate_multilevel, finite_sum, finite_sums
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from torchflat import Objective, Status, sharpness
from torchflat.errors import UsageError
from torchflat.spectrum.bounds import coupled_upper_bound, sampled_mean_upper_bound
from torchflat.spectrum.shards import COUNT, Strata, _cheapest
from torchflat.spectrum.sharpness import Sharpness
from torchflat.spectrum.student import t_quantile

quiet = pytest.mark.filterwarnings("ignore::torchflat.spectrum.NotConvergedWarning")


# Calibration ----------------------------------------------------------------------------------------------------------


def test_calibrated_on_a_fixed_subset() -> None:
    tally = calibrate_multilevel(finite_sums(7, 33), 0.1, 1e-2)
    assert tally.runs["shards"] >= 15 and tally.runs["krylov"] >= 5, tally
    assert all(tally.misses[basis] <= allowed(runs, 0.1) for basis, runs in tally.runs.items()), tally
    assert not tally.faults, tally


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.5, 0.1, 0.01])
def test_calibrated_with_fresh_seeds(delta: float) -> None:
    tally = calibrate_multilevel(finite_sums(fresh_entropy(), 300), delta, 1e-2)
    assert all(tally.misses[basis] <= allowed(runs, delta) for basis, runs in tally.runs.items()), tally
    assert not tally.faults, tally


def test_without_sampling_it_is_calibrated_too() -> None:
    tally = calibrate_multilevel(finite_sums(8, 22), 0.1, 1e-2, certify="krylov")
    assert tally.runs["deflation"] >= 10 and not tally.runs["shards"], tally
    assert sum(tally.misses.values()) <= allowed(22, 0.1) and not tally.faults, tally


@pytest.mark.parametrize("kind", ["one row", "rare rows", "some rows", "rare rows in a network"])
def test_rare_rows_do_not_hide(kind: str) -> None:
    tally = calibrate_multilevel(finite_sums(9, 6, kind), 0.01, 1e-2)
    assert not tally.missed and not tally.faults, tally


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_coupled_bound_on_dense_matrices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, p = 12, int(rng.integers(1, 5))
    matrix = rng.standard_normal((n, n))
    h = torch.from_numpy(matrix + matrix.T)
    basis = torch.linalg.qr(torch.from_numpy(rng.standard_normal((n, n)))).Q
    y, rest = basis[:, :p], basis[:, p:]
    values, rotation = torch.linalg.eigh(y.T @ h @ y)
    y = y @ rotation
    r = h @ y - y * values
    mu = float(torch.linalg.eigvalsh(rest.T @ h @ rest)[-1])
    truth = float(torch.linalg.eigvalsh(h)[-1])
    assert coupled_upper_bound(values, r.T @ r, mu) >= truth - 1e-12
    # It is attained by the matrix that couples the worst directions.
    assert coupled_upper_bound(values, 0 * r.T @ r, mu) == pytest.approx(max(float(values[-1]), mu))


def test_coupled_bound_is_attained_in_two_dimensions() -> None:
    h = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    ritz, gram = h[:1, 0], h[:1, 1:] ** 2
    bound = coupled_upper_bound(ritz, gram, 1.0)
    assert bound == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-14)
    assert coupled_upper_bound(ritz, gram, -math.inf) == 2.0


@pytest.mark.parametrize("delta", [0.5, 0.1, 0.01])
def test_mean_of_normal_numbers_exceeds_its_bound_as_often_as_allowed(delta: float) -> None:
    rng = np.random.default_rng(0)
    missed = sum(sampled_mean_upper_bound(list(rng.standard_normal(8)), delta) < 0 for _ in range(4000))
    assert allowed(4000, delta) >= missed >= 4000 * delta - (allowed(4000, delta) - 4000 * delta)


def test_bound_of_the_mean_in_closed_form() -> None:
    assert sampled_mean_upper_bound([1.0, 3.0], 0.05) == pytest.approx(2 + t_quantile(0.9, 1))


# Strata ---------------------------------------------------------------------------------------------------------------


def rows_of(strata: Strata) -> list[set[int]]:
    return [set(stratum.tolist()) for stratum in strata.strata]


def linear(rows: int, n: int = 5) -> Objective:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    return Objective(nn.Linear(n, 1).double(), mse_loss, (x, x[:, :1]))


def test_strata_hold_every_row_once_and_outlying_ones_are_in_every_shard() -> None:
    f = linear(20_000)
    curvatures = torch.ones(20_000).double()
    curvatures[[5, 17_000]] = 2e4
    strata = Strata.of(f, curvatures, 1.0, 0.01)
    assert strata is not None
    parts = rows_of(strata)
    assert sum(map(len, parts)) == 20_000 and set.union(*parts) == set(range(20_000))
    assert {5, 17_000} in parts and strata.outlying == 2
    sample = strata.draw(strata.rows, torch.Generator().manual_seed(1))
    assert sum(weight for weight, _ in sample._parts) == pytest.approx(1)
    assert [part.rows for _, part in sample._parts] == list(strata.takes)


def test_expected_product_of_a_shard_is_that_of_all_rows() -> None:
    f = linear(3000)
    curvatures = torch.linspace(0, 4, 3000).double().exp()
    strata = Strata.of(f, curvatures, 1.0, 0.01)
    assert strata is not None and len(strata.strata) > 1
    v = torch.ones(f.n, dtype=torch.float64)
    source = torch.Generator().manual_seed(2)
    drawn = torch.stack([strata.draw(strata.rows, source).product(v) for _ in range(200)])
    error = drawn.std(dim=0) / math.sqrt(200)
    assert float(((drawn.mean(dim=0) - f.hvp(v)) / error).abs().max()) < 4


def test_strata_are_the_cheapest_of_all() -> None:
    curvatures = torch.tensor([1.0] * 50 + [2.0] * 30 + [8.0] * 3).double()
    chosen = _cheapest(curvatures, 0.5)
    assert sum(size for size, _ in chosen) == 83
    for size, take in chosen:
        assert 1 <= take <= size


def test_no_strata_where_they_save_nothing() -> None:
    assert Strata.of(linear(100), torch.ones(100).double(), 1.0, 0.01) is None
    assert Strata.of(linear(5000), torch.full((5000,), 1e4).double(), 1.0, 0.01) is None
    assert Strata.of(linear(5000), torch.ones(5000).double(), -1.0, 0.01) is None


# The method -----------------------------------------------------------------------------------------------------------


def spiked(seed: int = 0, rows: int = 60_000, n: int = 150) -> FiniteSum:
    """A problem with a gap, on which shards are worth it."""
    rng = np.random.default_rng(seed)
    scales = np.r_[1.0, 0.9 * np.arange(1, n) ** -0.3]
    x = torch.from_numpy(rng.standard_normal((rows, n)) * scales)
    model = nn.Linear(n, 1, bias=False).double()
    f = Objective(model, mse_loss, (x, torch.zeros(rows, 1).double()))
    return FiniteSum("spiked", seed, f, float(torch.linalg.eigvalsh(2 / rows * x.T @ x)[-1]))


def test_many_rows_take_few_products_of_all_of_them() -> None:
    item = spiked()
    answer = sharpness(item.objective, method="multilevel")
    plain = sharpness(spiked().objective)
    assert plain.basis == "krylov", "a problem of so few parameters needs few products anyway"
    assert answer.status is Status.CONVERGED and answer.basis == "shards"
    assert answer.lower <= item.sharpness <= answer.upper
    assert abs(answer.value - item.sharpness) <= 1e-3 * item.sharpness
    assert answer.steps <= 4 and answer.cost.gradients < plain.cost.gradients


def test_tolerance_costs_corrections_and_not_more_shards() -> None:
    coarse, fine = (
        sharpness(spiked().objective, method="multilevel"),
        sharpness(spiked().objective, 1e-4, method="multilevel"),
    )
    assert fine.status is Status.CONVERGED and fine.basis == "shards"
    assert fine.cost.gradients < coarse.cost.gradients + 10


def test_certificate_without_sampling() -> None:
    item = spiked()
    forced = sharpness(item.objective, method="multilevel", certify="krylov")
    default = sharpness(item.objective, method="auto", certify="krylov")
    assert forced.basis == "deflation" and default.basis == "krylov"
    for answer in (forced, default):
        assert answer.status is Status.CONVERGED and answer.lower <= item.sharpness <= answer.upper


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_rows_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(3)
    rows, n, classes = 18_000, 120, 10
    labels = np.sort(rng.integers(classes, size=rows))
    x = rng.standard_normal((rows, n)) + 2 * rng.standard_normal((classes, n))[labels]
    x[-120:] *= 6
    order = rng.permutation(rows)
    torch.manual_seed(seed)
    model = nn.Linear(n, classes)
    answers = []
    for chosen in (np.arange(rows), order):
        data = torch.from_numpy(x[chosen]).float(), torch.from_numpy(labels[chosen])
        answers.append(sharpness(Objective(model, cross_entropy, data), seed=1))
    exact = sharpness(Objective(model, cross_entropy, data), rtol=1e-5, method="lanczos")
    for answer in answers:
        # Sorted by class with outliers in the last rows, or shuffled: the truth is inside, whatever bounds it.
        assert answer.status is Status.CONVERGED
        assert answer.lower <= exact.upper and exact.lower <= answer.upper


@quiet
def test_falls_back_on_all_the_data_and_says_why() -> None:
    few = finite_sum(0, "plain", rows=300)
    x = torch.randn(10_000, 120, generator=torch.Generator().manual_seed(0))
    summed = Objective(
        nn.Linear(120, 1), None, (x, x[:, :1]), batch_loss=lambda m, b: (m(b[0]).square().sum(), len(b[0]))
    )
    for f, reason in ((few.objective, "rows"), (summed, "loss")):
        answer = sharpness(f, method="multilevel")
        assert answer.basis == "krylov" and answer.status is Status.CONVERGED
        assert any("fell back" in note and reason in note for note in answer.provenance["notes"])


def test_a_function_without_rows_is_left_to_lanczos() -> None:
    f = Objective.from_function(lambda x: (x**2).sum(), torch.ones(200).double())
    assert sharpness(f).basis == "krylov"
    assert sharpness(f, method="multilevel").basis == "krylov"


def test_same_seed_same_answer() -> None:
    a, b = (sharpness(spiked().objective, method="multilevel", seed=5) for _ in range(2))
    assert (a.value, a.lower, a.upper) == (b.value, b.lower, b.upper) and a.vector.equal(b.vector)


def stopped_when(enough: Callable[[Sharpness], bool]) -> Sharpness:
    with pytest.warns(match="BUDGET"):
        return sharpness(spiked().objective, method="multilevel", callback=enough)


def test_callback_sees_samples_and_shards_and_can_stop() -> None:
    on_samples = stopped_when(lambda known: True)
    assert (on_samples.lower, on_samples.upper) == (-math.inf, math.inf), "a sample proves nothing"
    assert on_samples.value == pytest.approx(spiked().sharpness, rel=0.2) and on_samples.steps == 0
    before_shards = stopped_when(lambda known: known.steps > 0)
    assert before_shards.basis == "none" and before_shards.to_dict()["upper"] is None
    assert 0.9 * spiked().sharpness <= before_shards.lower <= spiked().sharpness
    uppers = [known["upper"] for known in sharpness(spiked().objective, method="multilevel").history]
    assert len(uppers) >= COUNT + 1 and uppers[-1] < math.inf


@pytest.mark.parametrize("arguments", [{"certify": "shards"}, {"method": "levels"}])
def test_unknown_choices_are_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is not one of"):
        sharpness(linear(50), **arguments)  # type: ignore[arg-type]


def test_kinds_are_what_they_are_called() -> None:
    for kind in KINDS:
        item = finite_sum(3, kind, rows=500)
        answer = sharpness(item.objective, rtol=1e-8, method="lanczos")
        assert answer.value == pytest.approx(item.sharpness, rel=1e-7), kind
