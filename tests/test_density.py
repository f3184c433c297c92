"""The spectral density: a measure of mass one, with the moments of H and the shape of its dense spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration import dense_network, held, problem, quadratic
from networks import NETWORKS

from torchflat import Objective, Status, eigenpairs, spectral_density
from torchflat.errors import UsageError
from torchflat.spectrum import NotConvergedWarning, SpectralDensity

quiet = pytest.mark.filterwarnings("ignore::torchflat.spectrum.NotConvergedWarning")


def diagonal(values: np.ndarray) -> Objective:
    return quadratic(torch.from_numpy(np.diag(values)))


def smoothed(answer: SpectralDensity, values: np.ndarray) -> np.ndarray:
    """The density that the answer estimates, from all eigenvalues."""
    kernel = np.exp(-0.5 * ((np.array(answer.grid)[:, None] - values) / answer.width) ** 2)
    return kernel.mean(1) / (answer.width * np.sqrt(2 * np.pi))


def moment(answer: SpectralDensity, power: int) -> tuple[float, float]:
    """∫ tᵖ φ and a bound on its standard error (as if all points erred the same way)."""
    grid, density, error = map(np.array, (answer.grid, answer.density, answer.standard_error))
    return np.trapezoid(grid**power * density, grid), np.trapezoid(abs(grid) ** power * error, grid)


@quiet
@pytest.mark.parametrize(
    "kind", ["bulk", "cluster 1e-2", "indefinite", "negative definite", "rank-deficient", "multiple"]
)
def test_mass_moments_and_shape(kind: str) -> None:
    item = problem(8, kind, 300)
    answer = spectral_density(item.objective, rtol=1e-3, starts=8, budget=4000)
    mass, _ = moment(answer, 0)
    mean, error = moment(answer, 1)
    assert mass == pytest.approx(1, abs=1e-3)
    assert abs(mean - item.eigenvalues.mean()) <= 4 * error + 1e-3 * item.norm
    second, error = moment(answer, 2)
    assert abs(second - (item.eigenvalues**2).mean() - answer.width**2) <= 4 * error + 1e-3 * item.norm**2
    exact, density = smoothed(answer, item.eigenvalues), np.array(answer.density)
    grid = np.array(answer.grid)
    distance = np.trapezoid(abs(density - exact), grid)
    assert distance <= 3 * np.trapezoid(answer.standard_error, grid) + 1e-3
    assert distance < 0.2
    assert min(answer.density) >= 0


@quiet
def test_standard_error_is_the_size_of_the_error() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    f = diagonal(values)
    ratios = []
    for seed in range(6):
        answer = spectral_density(f, rtol=1e-9, starts=6, seed=seed, budget=4000)
        grid = np.array(answer.grid)
        distance = np.trapezoid(abs(np.array(answer.density) - smoothed(answer, values)), grid)
        ratios.append(distance / np.trapezoid(answer.standard_error, grid))
    # E|z| of a standard normal variable is 0.8.
    assert 0.5 < np.mean(ratios) < 1.3


@quiet
def test_more_starts_shrink_the_error() -> None:
    f = diagonal(np.random.default_rng(1).uniform(-1, 1, 300))
    few, many = (spectral_density(f, rtol=1e-9, starts=starts, budget=4000) for starts in (4, 32))
    assert (few.starts, many.starts) == (4, 32)
    assert moment(many, 0)[0] == pytest.approx(1, abs=1e-3)
    assert moment(many, 1)[1] < 0.6 * moment(few, 1)[1]


@quiet
def test_known_eigenvalues_enter_exactly() -> None:
    values = np.r_[[40.0, 30.0], np.random.default_rng(2).uniform(-1, 1, 298)]
    f = diagonal(values)
    pairs = eigenpairs(f, 2, rtol=1e-8, budget=4000)
    answer = spectral_density(f, known=(pairs.values, pairs.vectors), budget=4000)
    assert answer.exact == pytest.approx((40, 30))
    grid, density = np.array(answer.grid), np.array(answer.density)
    exact = smoothed(answer, values)
    for outlier in (40.0, 30.0):
        near = abs(grid - outlier) < 6 * answer.width
        assert np.trapezoid(density[near], grid[near]) == pytest.approx(1 / 300, rel=1e-2)
        assert np.allclose(density[near], exact[near], atol=1e-3 * exact[near].max())
    without = spectral_density(f, budget=4000)
    assert without.width > 3 * answer.width
    assert moment(answer, 0)[0] == pytest.approx(1, abs=1e-3)


def test_all_eigenvalues_known() -> None:
    item = problem(2, "bulk", 12)
    pairs = eigenpairs(item.objective, 12, rtol=1e-9)
    answer = spectral_density(item.objective, known=(pairs.values, pairs.vectors))
    assert answer.status is Status.CONVERGED
    assert set(answer.standard_error) == {0.0}
    assert np.allclose(answer.density, smoothed(answer, item.eigenvalues), atol=1e-6 * max(answer.density))


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-150])
def test_single_eigenvalue(value: float, n: int) -> None:
    answer = spectral_density(diagonal(np.full(n, value)))
    assert answer.status is Status.CONVERGED
    assert answer.grid[int(np.argmax(answer.density))] == pytest.approx(value, abs=answer.width / 4)
    assert moment(answer, 0)[0] == pytest.approx(1, abs=1e-3)


def test_few_eigenvalues_are_all_computed() -> None:
    item = problem(5, "indefinite", 60)
    pairs = eigenpairs(item.objective, 2)
    for known in (None, (pairs.values, pairs.vectors)):
        answer = spectral_density(item.objective, known=known)
        assert answer.status is Status.CONVERGED
        assert (answer.starts, answer.cost.products, set(answer.standard_error)) == (0, 60, {0.0})
        assert answer.exact == pytest.approx(item.eigenvalues, abs=1e-12)
        assert np.allclose(answer.density, smoothed(answer, item.eigenvalues))


def test_one_parameter() -> None:
    answer = spectral_density(diagonal(np.array([2.0])))
    assert answer.status is Status.CONVERGED
    assert moment(answer, 1)[0] == pytest.approx(2, abs=1e-3)


@quiet
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("steps", [6, 64])
def test_networks_against_their_dense_hessian(name: str, steps: int) -> None:
    network, hessian = dense_network(name)
    values = torch.linalg.eigvalsh(hessian).numpy()
    f = network.objective()
    own = held(f)
    answer = spectral_density(f, rtol=1e-9, starts=4, steps=steps, budget=1e4)
    assert bool(answer.exact) == (f.n <= 2 * steps)
    grid = np.array(answer.grid)
    distance = np.trapezoid(abs(np.array(answer.density) - smoothed(answer, values)), grid)
    # Float32 splits an eigenvalue no wider than rounding, far below the kernel.
    assert distance <= 4 * np.trapezoid(answer.standard_error, grid) + 1e-3
    assert moment(answer, 0)[0] == pytest.approx(1, abs=1e-3)
    assert f.memory.vectors == own


def test_status_and_budget() -> None:
    f = diagonal(np.linspace(-1, 1, 200))
    with pytest.warns(NotConvergedWarning, match="BUDGET") as record:
        answer = spectral_density(f, rtol=1e-9, budget=250)
    assert len(record) == 1
    assert answer.starts == 3 and 130 < answer.cost.gradients <= 250
    assert spectral_density(f, rtol=0.5, budget=250).status is Status.CONVERGED
    seen: list[SpectralDensity] = []

    def stop(answer: SpectralDensity) -> bool:
        seen.append(answer)
        return True

    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        stopped = spectral_density(f, rtol=1e-9, callback=stop)
    assert len(seen) == 1 and stopped.starts == 2


def test_same_seed_same_answer() -> None:
    f = diagonal(np.linspace(-1, 1, 300))
    first, second, other = (spectral_density(f, 0.5, seed=seed).density for seed in (0, 0, 1))
    assert first == second != other


def test_interruption_gives_the_memory_back() -> None:
    matrix, calls = torch.eye(300, dtype=torch.float64), []

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x @ matrix @ x / 2 + (x**4).sum()

    f = Objective.from_function(fn, torch.linspace(0, 1, 300, dtype=torch.float64))
    own = held(f)

    def interrupt(answer: SpectralDensity) -> None:
        calls.append(answer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spectral_density(f, callback=interrupt)
    assert len(calls) == 1 and f.memory.vectors == own


@pytest.mark.parametrize("arguments", [{"starts": 1}, {"steps": 1}, {"rtol": -1.0}, {"budget": 0.0}])
def test_bad_requests(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        spectral_density(diagonal(np.ones(9)), **arguments)  # type: ignore[arg-type]
