"""Several eigenvalues, multiple and clustered ones included, all in their intervals at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from calibration import (
    KINDS,
    allowed,
    calibrate_eigenpairs,
    dense_network,
    diagonal,
    fresh_entropy,
    held,
    holds,
    problem,
    problems,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS

from torchflat import Status, eigenpairs
from torchflat.errors import UsageError
from torchflat.spectrum import Eigenpairs, NotConvergedWarning
from torchflat.spectrum.eigenpairs import extremal
from torchflat.spectrum.krylov import Krylov
from torchflat.spectrum.run import Run

quiet = pytest.mark.filterwarnings("ignore::torchflat.spectrum.NotConvergedWarning")
WHICH = ("largest", "smallest", "magnitude")


def check(answer: Eigenpairs, matrix: torch.Tensor, slack: float = 0.0) -> None:
    """Vectors are orthonormal, and values and residuals are what they say."""
    v, a = answer.vectors.double(), matrix.double()
    precision = torch.finfo(answer.vectors.dtype).eps
    assert v.shape == (len(a), len(answer.pairs))
    assert torch.allclose(v.T @ v, torch.eye(len(answer.pairs)).double(), atol=50 * precision)
    unit = float(a.abs().max())
    residuals = unit * torch.linalg.vector_norm((a @ v - v * answer.values) / unit, dim=0)
    slack += 2 * answer.floor
    for pair, residual in zip(answer.pairs, residuals.tolist(), strict=True):
        assert pair.residual == pytest.approx(residual, abs=slack)
        assert pair.lower <= pair.value <= pair.upper
        assert pair.confidence == answer.confidence


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_joint_intervals_on_a_fixed_subset(delta: float, which: str) -> None:
    tally = calibrate_eigenpairs(problems(30, 20, largest=100), 30, delta, 4, which)
    assert len(tally.missed) <= allowed(tally.runs, delta), tally
    assert not tally.faults, tally


@pytest.mark.parametrize("budget", [10.0, 30.0, 60.0, 90.0])
def test_joint_intervals_of_runs_cut_by_the_budget(budget: float) -> None:
    tally = calibrate_eigenpairs(problems(31, 20, largest=100), 31, 0.5, 4, "largest", budget)
    assert len(tally.missed) <= allowed(tally.runs, 0.5), tally
    assert tally.statuses["BUDGET"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_joint_intervals_with_fresh_seeds(delta: float, which: str) -> None:
    entropy = fresh_entropy()
    tally = calibrate_eigenpairs(problems(entropy, 300), entropy, delta, 5, which)
    assert len(tally.missed) <= allowed(tally.runs, delta), tally
    assert not tally.faults, tally


# Known answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, which: str) -> None:
    item = problem(9, kind, 40)
    answer = eigenpairs(item.objective, 5, which, 1e-3, 1 - 1e-9, budget=40000)
    assert answer.status is Status.CONVERGED
    assert len(answer.pairs) == 5
    assert holds(answer, item, which)
    assert max(pair.width for pair in answer.pairs) <= 1e-3 * item.norm + 16 * answer.floor
    if item.norm:
        check(answer, item.matrix)
    if which == "magnitude":
        expected = np.sort(np.abs(item.eigenvalues))[::-1][:5]
        assert np.abs(answer.values.numpy()) == pytest.approx(expected, abs=1e-3 * item.norm)


def test_multiple_eigenvalues_appear_as_often_as_they_are() -> None:
    values = [4.0, 4.0, 4.0, 2.0, 2.0, *np.linspace(-3, 1, 30)]
    f = diagonal(*values)
    top, bottom = eigenpairs(f, 6, budget=4000), eigenpairs(diagonal(*(-v for v in values)), 4, "smallest", budget=4000)
    assert top.values.tolist() == pytest.approx([4, 4, 4, 2, 2, 1], abs=0.04)
    assert bottom.values.tolist() == pytest.approx([-4, -4, -4, -2], abs=0.04)
    check(top, torch.diag(torch.tensor(values)))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_identity(which: str, k: int) -> None:
    answer = eigenpairs(diagonal(*([2.0] * 7)), k, which, rtol=1e-6)
    assert answer.values.tolist() == pytest.approx([2.0] * k, abs=1e-12)
    check(answer, 2 * torch.eye(7))


@pytest.mark.parametrize("which", WHICH)
def test_all_of_them(which: str) -> None:
    item = problem(3, "indefinite", 12)
    answer = eigenpairs(item.objective, 12, which, rtol=1e-10)
    assert sorted(answer.values.tolist()) == pytest.approx(item.eigenvalues.tolist(), abs=1e-9 * item.norm)
    order = {"largest": lambda v: -v, "smallest": lambda v: v, "magnitude": lambda v: -abs(v)}[which]
    assert answer.values.tolist() == sorted(answer.values.tolist(), key=order)
    check(answer, item.matrix)


@pytest.mark.parametrize("n", [51, 120])
def test_copies_that_are_met_half_way_are_not_taken_over_half_settled(n: int) -> None:
    # Ten distinct eigenvalues, each many times: every copy of the wanted ones takes a run of its own.
    values = np.round(np.random.default_rng(n).uniform(-1, 1, n), 1)
    for which in WHICH:
        answer = eigenpairs(diagonal(*values), 5, which, budget=4000)
        assert answer.status is Status.CONVERGED
        assert max(pair.width for pair in answer.pairs) <= 1e-2 + 16 * answer.floor


def test_zero_matrix() -> None:
    answer = eigenpairs(diagonal(*([0.0] * 9)), 3)
    assert answer.values.tolist() == [0, 0, 0]
    assert all(pair.width == 0 for pair in answer.pairs)
    assert answer.status is Status.CONVERGED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_against_their_dense_hessian(name: str, dtype: torch.dtype) -> None:
    network, hessian = dense_network(name)
    truth = torch.linalg.eigvalsh(hessian)
    slack = network.by_differences * float(truth.abs().max())
    f = network.objective(dtype=dtype)
    own = held(f)
    for which, expected in (("largest", truth.flip(0)), ("smallest", truth)):
        answer = eigenpairs(f, 3, which, budget=4000)
        assert answer.status is Status.CONVERGED
        for pair, value in zip(answer.pairs, expected.tolist(), strict=False):
            assert pair.lower - slack <= value <= pair.upper + slack
        check(answer, hessian, 10 * slack)
    assert f.memory.vectors == own


# Both ends, shared runs -----------------------------------------------------------------------------------------------


def test_extremal_takes_over_a_run_and_releases_it() -> None:
    item = problem(2, "indefinite", 80)
    f = item.objective
    own = held(f)
    krylov = Krylov.of(f, 0, "sharpness")
    for _ in range(10):
        krylov.step()
    before = f.cost.products
    top, bottom = extremal(f, 3, 2, Run(f, 1e-2, None, 0.99, 4000.0, None), 0, krylov)
    assert f.memory.vectors == own
    assert (len(top.pairs), len(bottom.pairs)) == (3, 2)
    assert holds(top, item, "largest") and holds(bottom, item, "smallest")
    assert top.steps == f.cost.products - before
    everything = torch.cat([top.vectors, bottom.vectors], dim=1)
    assert torch.allclose(everything.T @ everything, torch.eye(5).double(), atol=1e-12)


def test_one_at_an_end_takes_no_second_run() -> None:
    item = problem(4, "bulk", 120)
    f = item.objective
    one, two = eigenpairs(f, 1), eigenpairs(f, 2)
    assert one.steps < two.steps
    assert holds(one, item, "largest") and holds(two, item, "largest")


@quiet
def test_callback_counts_products_and_can_stop() -> None:
    for last in (1, 4, 20, 30):
        item = problem(6, "cluster 1e-3", 90)
        f, seen = item.objective, []
        own = held(f)

        def stop(steps: int, seen: list[int] = seen, last: int = last) -> bool:
            seen.append(steps)
            return steps >= last

        answer = eigenpairs(f, 4, callback=stop)
        assert answer.status is Status.BUDGET
        assert seen == sorted(seen) and seen[-1] == answer.steps >= last > (seen[-2] if len(seen) > 1 else 0)
        assert f.memory.vectors == own
        assert holds(answer, item, "largest")
        assert len(answer.pairs) == min(4, answer.steps)


def test_budget_is_kept_and_warned_about_once() -> None:
    with pytest.warns(NotConvergedWarning, match="BUDGET") as record:
        answer = eigenpairs(problem(6, "cluster 1e-3", 90).objective, 4, budget=30)
    assert len(record) == 1
    assert answer.cost.gradients <= 30


@quiet
def test_tolerance_below_rounding_ends() -> None:
    for atol, expected in ((None, Status.ROUNDING_LIMITED), (0.0, Status.ROUNDING_LIMITED)):
        answer = eigenpairs(diagonal(*([1.0] * 6), *np.linspace(0, 0.9, 20)), 3, rtol=0, atol=atol, budget=4000)
        assert answer.status is expected
        assert len(answer.pairs) == 3
        assert all(pair.lower <= 1 <= pair.upper and pair.width < 1e-9 for pair in answer.pairs)


def test_same_seed_same_answer() -> None:
    item = problem(7, "multiple", 50)
    answers = [eigenpairs(item.objective, 4, seed=seed) for seed in (1, 1, 2)]
    assert answers[0].pairs == answers[1].pairs != answers[2].pairs
    assert torch.equal(answers[0].vectors, answers[1].vectors)


@pytest.mark.parametrize(("k", "which"), [(0, "largest"), (5, "largest"), (1, "top")])
def test_bad_requests(k: int, which: str) -> None:
    with pytest.raises(UsageError):
        eigenpairs(diagonal(1.0, 2.0, 3.0, 4.0), k, which)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from(WHICH))
def test_contract(seed: int, k: int, which: str) -> None:
    item = problem(seed, largest=30)
    answer = eigenpairs(item.objective, min(k, item.n), which, 1e-3, 1 - 1e-9, budget=40000)
    assert answer.status is Status.CONVERGED
    assert len(answer.pairs) == min(k, item.n)
    assert holds(answer, item, which)
    ranked = [-v if which == "largest" else v if which == "smallest" else -abs(v) for v in answer.values.tolist()]
    assert all(a <= b for a, b in itertools.pairwise(ranked))
