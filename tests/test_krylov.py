"""The Lanczos process: its relation, its randomness, its rounding, and what it takes from the memory budget."""

from __future__ import annotations

import errno
import itertools
import math
import tempfile

import numpy as np
import pytest
import torch
from calibration import held, plain_bound, problem, quadratic
from torch import Tensor

from torchflat import Objective
from torchflat.errors import TorchflatError
from torchflat.spectrum.krylov import Krylov, power_of_two, random_unit_vector

CPU = torch.device("cpu")


def symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


def run(f: Objective, steps: int, deflated: Tensor | None = None) -> Krylov:
    krylov = Krylov.of(f, 0, "test", deflated)
    while krylov.steps < steps and not krylov.exhausted:
        krylov.step()
    return krylov


@pytest.mark.parametrize("fixed", [0, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-180, 1e180])
def test_lanczos_relation(fixed: int, scale: float) -> None:
    a = symmetric(30)
    y = torch.linalg.qr(torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q.T[:fixed]
    krylov = run(quadratic(scale * a), 12, y.contiguous() if fixed else None)
    v = krylov.basis
    alphas, betas = (torch.tensor(x, dtype=torch.float64) for x in (krylov.alphas, krylov.betas))
    t = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
    left = (a - y.T @ (y @ a)) @ v.T
    right = v.T @ t * (krylov.scale / scale)
    right[:, -1] += krylov.latest * krylov.betas[-1] * (krylov.scale / scale)
    assert torch.allclose(v @ v.T, torch.eye(12).double(), atol=1e-14)
    assert torch.allclose(y @ v.T, torch.zeros(()).double(), atol=1e-14)
    assert torch.allclose(left, right, atol=1e-12)
    projector = torch.eye(30).double() - y.T @ y
    top = float(torch.linalg.eigvalsh(projector @ a @ projector)[-1])
    assert krylov.ritz()[0][-1] / scale <= top + 1e-12
    assert krylov.upper(0.01) / scale >= top


def test_residuals_are_true() -> None:
    a = symmetric(40)
    krylov = run(quadratic(a), 15)
    values, coefficients = krylov.ritz()
    vectors = krylov.vectors(coefficients)
    residuals = torch.linalg.vector_norm(vectors @ a - values[:, None] * vectors, dim=1)
    assert torch.allclose(residuals, krylov.residuals(), atol=1e-12)
    assert torch.allclose((vectors @ a * vectors).sum(1), values, atol=1e-12)


def test_start_is_uniform_in_the_complement() -> None:
    # Components along any direction of the complement have mean square 1/(n − m), and none along what is deflated.
    n, m, draws = 6, 2, 4000
    f = quadratic(torch.eye(n, dtype=torch.float64))
    y = torch.linalg.qr(symmetric(n)).Q[:m].contiguous()
    starts = torch.stack([Krylov.of(f, seed, "test", y).latest for seed in range(draws)])
    assert (starts @ y.T).abs().max() < 1e-14
    covariance = starts.T @ starts / draws
    expected = (torch.eye(n).double() - y.T @ y) / (n - m)
    # The standard deviation of an entry is below 1/(2 √draws) here.
    assert (covariance - expected).abs().max() < 5 / (2 * math.sqrt(draws))


def test_random_vectors_depend_on_seed_and_stream_only() -> None:
    one = random_unit_vector(50, 0, "a", torch.float64, CPU)
    state = torch.random.get_rng_state()
    assert torch.equal(one, random_unit_vector(50, 0, "a", torch.float64, CPU))
    assert torch.equal(state, torch.random.get_rng_state())
    for other in (
        random_unit_vector(50, 1, "a", torch.float64, CPU),
        random_unit_vector(50, 0, "b", torch.float64, CPU),
    ):
        assert abs(float(one @ other)) < 0.7
    assert float(torch.linalg.vector_norm(one)) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("rank", "steps"), [(0, 1), (1, 2), (5, 6)])
def test_space_is_exhausted_after_as_many_steps_as_distinct_eigenvalues(rank: int, steps: int) -> None:
    a = torch.diag(torch.tensor([1.0, -2.0, 3.0, 4.5, 0.5][:rank] + [0.0] * (40 - rank), dtype=torch.float64))
    krylov = run(quadratic(a), 40)
    assert krylov.exhausted
    assert steps <= krylov.steps <= steps + 1
    assert krylov.upper(0.01) == pytest.approx(max(a.diagonal().tolist()), abs=1e-10)


def test_whole_space_gives_all_eigenvalues_exactly() -> None:
    a = symmetric(25)
    krylov = run(quadratic(a), 25)
    values = torch.linalg.eigvalsh(a)
    assert krylov.exhausted and not krylov.full
    assert torch.allclose(krylov.ritz()[0], values, atol=1e-12)
    assert krylov.upper(1e-9) == float(krylov.ritz()[0][-1])
    assert krylov.lower(1e-9) == pytest.approx(float(krylov.ritz()[0][0]), abs=1e-14)


def test_lower_mirrors_upper() -> None:
    a = symmetric(60)
    krylov, mirrored = run(quadratic(a), 10), run(quadratic(-a), 10)
    assert krylov.lower(0.1) == -mirrored.upper(0.1)


def test_bounds_never_widen() -> None:
    # With a multiple eigenvalue 0 on top, the plain bound falls to a few times the rounding error, and grows again.
    item = problem(7, "negative rank-deficient", 200)
    krylov, uppers, lowers = Krylov.of(item.objective, 0, "test"), [], []
    for _ in range(50):
        krylov.step()
        assert not krylov.exhausted
        uppers.append(krylov.upper(0.01))
        lowers.append(krylov.lower(0.01))
    slack = 8 * torch.finfo(torch.float64).eps * krylov.norm  # to which Ritz values are known
    assert all(after <= before + slack for before, after in itertools.pairwise(uppers))
    assert all(after >= before - slack for before, after in itertools.pairwise(lowers))
    plain = plain_bound(krylov.ritz()[0].numpy(), sum(math.log(krylov.scale * b) for b in krylov.betas), 200, 0.01)
    assert uppers[-1] < 0.1 * plain


def test_a_refuted_bound_is_dropped() -> None:
    item = problem(3, "outlier", 100)
    for seed in range(200):
        krylov = Krylov.of(item.objective, seed, "test")
        latest = []
        while not krylov.exhausted and krylov.steps < 40:
            krylov.step()
            latest.append(krylov.upper(0.9))
        if min(latest[:-1]) < item.eigenvalues[-1] - 1e-3:
            break
    assert latest[-1] >= item.eigenvalues[-1] - krylov.floor()


def test_floor_covers_the_rounding_of_float32_products() -> None:
    a = symmetric(80, dtype=torch.float32)
    exact = torch.linalg.eigvalsh(a.double())
    krylov = run(quadratic(a), 80)
    assert 0 < krylov.floor() < 1e-3 * krylov.norm
    assert abs(float(krylov.ritz()[0][-1] - exact[-1])) <= krylov.floor()


def test_looks_overshoot_by_three_percent_at_most() -> None:
    f = quadratic(torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64)))
    krylov, looks = Krylov.of(f, 0, "test"), []
    while krylov.steps < 200:
        krylov.step()
        if krylov.worth_a_look():
            looks.append(krylov.steps)
    assert all(after <= before * 1.04 + 1 for before, after in itertools.pairwise(looks))


def test_memory_is_accounted_for_and_given_back() -> None:
    f = quadratic(symmetric(50))
    own = held(f)
    with Krylov.of(f, 0, "test") as krylov:
        for _ in range(7):
            krylov.step()
        assert f.memory.vectors - own == 8 * 50 * 8
        values = krylov.ritz()[0]
    assert f.memory.vectors == own
    assert krylov._basis._rows.untyped_storage().nbytes() == 0
    krylov.release()
    assert f.memory.vectors == own
    assert torch.equal(krylov.ritz()[0], values)


def test_memory_is_given_back_after_an_interruption() -> None:
    f = quadratic(symmetric(50))
    own = held(f)
    with pytest.raises(KeyboardInterrupt), Krylov.of(f, 0, "test") as krylov:
        krylov.step()
        raise KeyboardInterrupt
    assert f.memory.vectors == own


def small_budget(matrix: torch.Tensor, rows: int) -> Objective:
    """xᵀAx/2, with memory for so many Krylov vectors."""
    n = len(matrix)
    return Objective.from_function(
        lambda x: x @ matrix @ x / 2, torch.zeros(n, dtype=matrix.dtype), memory=2 * rows * n * 8
    )


def test_vectors_beyond_the_budget_change_no_more_than_rounding() -> None:
    matrix = symmetric(200)
    f = small_budget(matrix, 20)
    own = held(f)
    with Krylov.of(f, 0, "test") as krylov, Krylov.of(quadratic(matrix), 0, "test") as plain:
        for _ in range(60):
            krylov.step(), plain.step()
        assert f.memory.vectors - own == 20 * 200 * 8
        assert torch.allclose(krylov.ritz()[0], plain.ritz()[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(krylov.basis, plain.basis, rtol=0, atol=1e-9)
        assert torch.allclose(krylov.basis @ krylov.basis.T, torch.eye(60, dtype=torch.float64), atol=1e-13)
        vectors = [run.vectors(run.ritz()[1][:, -3:]) for run in (krylov, plain)]
        torch.testing.assert_close(*vectors, rtol=0, atol=1e-8)
        assert krylov.latest.shape == (200,)
    assert f.memory.vectors == own


def test_a_basis_that_was_not_released_leaves_nothing_behind() -> None:
    f = small_budget(symmetric(60), 2)
    own = held(f)
    krylov = run(f, 20)
    file = krylov._basis._file
    assert file is not None and not file.closed and f.memory.vectors > own
    del krylov
    assert file.closed and f.memory.vectors == own


@pytest.mark.parametrize("fixed", [1, 25])
def test_deflated_vectors_beyond_the_budget(fixed: int) -> None:
    matrix = symmetric(80)
    known = torch.linalg.eigh(matrix)[1][:, -fixed:].T.contiguous()
    with Krylov.of(small_budget(matrix, 20), 0, "test", deflated=known) as krylov:
        while not krylov.exhausted:
            krylov.step()
        left = torch.linalg.eigvalsh(matrix)[:-fixed]
        assert torch.allclose(krylov.ritz()[0], left, atol=1e-9)
        assert float((krylov.basis @ known.T).abs().max()) < 1e-13


def test_a_disk_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    told = r"holds 1 of the vectors.*No space left on device.*raise memory=.*TMPDIR"
    with Krylov.of(small_budget(symmetric(50), 4), 0, "test") as krylov, pytest.raises(TorchflatError, match=told):
        for _ in range(10):
            krylov.step()


@pytest.mark.parametrize("amplitude", [1e-320, 1e-200, 0.3, 1.0, 1e200, 1.7e308])
def test_power_of_two_is_near_and_exact(amplitude: float) -> None:
    unit = power_of_two(amplitude)
    assert math.frexp(unit)[0] == 0.5
    assert 1e-25 <= amplitude / unit <= 1e10
    assert power_of_two(0.0) == 1.0


def test_scaling_by_a_power_of_two_changes_no_digit() -> None:
    item = problem(3, "indefinite", 40)
    small, large = (run(quadratic(c * item.matrix), 12) for c in (1.0, 2.0**300))
    assert np.array_equal(small.ritz()[0].numpy() * 2.0**300, large.ritz()[0].numpy())
    assert small.upper(0.1) * 2.0**300 == large.upper(0.1)
