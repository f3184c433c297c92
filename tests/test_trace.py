"""The trace in its interval: exactly where that is cheap, and as often as promised where it is sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration import allowed, calibrate_trace, dense_network, fresh_entropy, problem, quadratic, sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS

from torchflat import Objective, Status, trace
from torchflat.errors import UsageError
from torchflat.spectrum import NotConvergedWarning, Trace

quiet = pytest.mark.filterwarnings("ignore::torchflat.spectrum.NotConvergedWarning")


def diagonal(values: np.ndarray, dtype: torch.dtype = torch.float64) -> Objective:
    return quadratic(torch.from_numpy(np.diag(values)).to(dtype))


@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_coverage_on_a_fixed_subset(delta: float) -> None:
    tally = calibrate_trace(sampled(40, 30), 40, delta, 5e-2)
    assert len(tally.missed) <= allowed(tally.runs, delta), tally
    assert not tally.faults, tally
    if delta == 0.5:
        # A t-interval is exact for normal samples: one that never missed would be padded.
        assert len(tally.missed) >= 5, tally


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.5, 0.1, 0.01])
def test_coverage_with_fresh_seeds(delta: float) -> None:
    entropy = fresh_entropy()
    tally = calibrate_trace(sampled(entropy, 500), entropy, delta, 5e-2)
    assert len(tally.missed) <= allowed(tally.runs, delta), tally
    assert not tally.faults, tally


@quiet
@pytest.mark.parametrize(
    "values",
    [
        1 / np.arange(1.0, 201.0),
        1 / np.arange(1.0, 201.0) ** 2,
        np.r_[np.ones(9), -np.ones(9), np.zeros(182)],
        np.r_[np.ones(40), np.zeros(160)],
        np.r_[np.ones(100), -np.ones(100)],
    ],
    ids=["1/i", "1/i²", "±1 nine times", "1 forty times", "±1"],
)
def test_coverage_on_skewed_and_cancelling_spectra(values: np.ndarray) -> None:
    f = diagonal(values)
    answers = [trace(f, confidence=0.9, seed=seed, budget=120) for seed in range(12)]
    misses = sum(not answer.lower <= values.sum() <= answer.upper for answer in answers)
    assert misses <= allowed(12, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 16, 32])
def test_small_problems_are_exact(n: int, dtype: torch.dtype) -> None:
    values = np.linspace(-1, 2, n)
    answer = trace(diagonal(values, dtype), rtol=1e-4)
    assert answer.status is Status.CONVERGED
    assert answer.samples == 0 and answer.standard_error == 0
    assert answer.lower <= float(torch.from_numpy(values).to(dtype).double().sum()) <= answer.upper
    assert answer.width <= 1e-3


def test_low_rank_is_exact_through_the_sketch() -> None:
    values = np.r_[np.linspace(1, 9, 12), np.zeros(300)]
    answer = trace(diagonal(values), rtol=1e-8)
    assert answer.status is Status.CONVERGED
    assert answer.value == pytest.approx(values.sum(), rel=1e-12)


def test_multiple_of_the_identity_is_exact_from_the_pilot() -> None:
    answer = trace(diagonal(np.full(500, 0.7)), rtol=1e-8)
    assert answer.status is Status.CONVERGED
    assert answer.samples == 16
    assert answer.value == pytest.approx(350, rel=1e-12)


def test_zero_matrix() -> None:
    answer = trace(diagonal(np.zeros(100)))
    assert (answer.lower, answer.value, answer.upper, answer.status) == (0, 0, 0, Status.CONVERGED)


def test_where_many_probes_are_wanted_every_parameter_gets_one() -> None:
    values = np.random.default_rng(0).standard_normal(100)
    answer = trace(diagonal(values), rtol=1e-6, budget=1000)
    assert answer.status is Status.CONVERGED
    assert answer.value == pytest.approx(values.sum(), abs=1e-11)
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        cut = trace(diagonal(values), rtol=1e-6, budget=200)
    assert cut.cost.gradients <= 200
    assert cut.lower <= values.sum() <= cut.upper


def test_known_eigenvectors_take_their_part_of_the_variance() -> None:
    values = np.r_[100 * np.ones(20), np.random.default_rng(1).uniform(0, 1, 380)]
    basis = torch.eye(400, dtype=torch.float64)[:, :20]
    with_basis = trace(diagonal(values), 5e-3, basis=basis)
    assert with_basis.status is Status.CONVERGED
    assert with_basis.lower <= values.sum() <= with_basis.upper
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        without = trace(diagonal(values), 5e-3)
    assert without.standard_error > 5 * with_basis.standard_error


def test_whole_basis_leaves_nothing_to_sample() -> None:
    item = problem(1, "indefinite", 40)
    answer = trace(item.objective, basis=torch.linalg.qr(item.matrix).Q)
    assert answer.samples == 0
    assert answer.value == pytest.approx(float(item.eigenvalues.sum()), abs=1e-12 * item.norm * 40)


def test_wrong_basis_is_refused() -> None:
    with pytest.raises(UsageError, match="basis"):
        trace(diagonal(np.ones(50)), basis=torch.ones(3, 50))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_scales(scale: float) -> None:
    values = np.random.default_rng(2).uniform(0, 1, 300)
    plain, scaled = trace(diagonal(values)), trace(diagonal(values * scale))
    for a, b in (
        (plain.lower, scaled.lower),
        (plain.upper, scaled.upper),
        (plain.standard_error, scaled.standard_error),
    ):
        assert b / scale == pytest.approx(a, rel=1e-9)


@quiet
def test_stopped_in_the_pilot_there_is_no_interval_yet() -> None:
    answer = trace(diagonal(np.linspace(0, 1, 100)), callback=lambda fraction: fraction > 0.2)
    assert answer.status is Status.BUDGET
    assert answer.samples == 4
    assert answer.to_dict()["lower"] is answer.to_dict()["upper"] is None
    assert answer.value == pytest.approx(50, rel=0.5)


@quiet
def test_callback_sees_progress_and_budget_is_kept() -> None:
    seen: list[float] = []
    answer = trace(diagonal(np.random.default_rng(3).standard_normal(2000)), 1e-3, callback=seen.append, budget=150)
    assert answer.status is Status.BUDGET
    assert len(seen) == answer.samples and all(0 < share <= 1 for share in seen)
    assert answer.cost.gradients <= 150
    tiny = trace(diagonal(np.ones(100)), budget=1)
    assert tiny.status is Status.BUDGET and tiny.samples == 1


def test_same_seed_same_answer() -> None:
    values = np.random.default_rng(4).uniform(0, 1, 200)
    first, second, other = (trace(diagonal(values), seed=seed) for seed in (0, 0, 1))
    assert (first.value, first.lower, first.upper) == (second.value, second.lower, second.upper)
    assert first.value != other.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_against_their_dense_hessian(name: str, dtype: torch.dtype) -> None:
    network, hessian = dense_network(name)
    answer: Trace = trace(network.objective(dtype=dtype), 1e-2, budget=4000)
    slack = network.by_differences * float(hessian.diagonal().abs().sum())
    assert answer.status is Status.CONVERGED
    assert answer.lower - slack <= float(hessian.trace()) <= answer.upper + slack
    assert answer.width <= 1e-2 * abs(answer.value) + 16 * answer.floor


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32), st.floats(1e-6, 1e6))
def test_scaling_f_scales_everything(seed: int, factor: float) -> None:
    item = problem(seed, "indefinite", 60)
    plain, scaled = (trace(quadratic(c * item.matrix), 0.5, 0.9, seed, 4000) for c in (1.0, factor))
    assert plain.samples == scaled.samples
    for a, b in ((plain.lower, scaled.lower), (plain.upper, scaled.upper)):
        assert b == pytest.approx(factor * a, rel=1e-6, abs=1e-9 * factor * item.norm)
