"""Random symmetric matrices of every awkward kind, T090 computed a second time, and counts of misses over many runs."""

from __future__ import annotations

import collections
import functools
import math
import secrets
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from networks import Network, network

from torchflat import Objective, Status, eigenpairs, sharpness, trace
from torchflat.spectrum import NotConvergedWarning
from torchflat.spectrum.eigenpairs import Eigenpairs
from torchflat.spectrum.krylov import random_unit_vector

KINDS = (
    "bulk",
    "cluster 1e-2",
    "cluster 1e-3",
    "indefinite",
    "negative definite",
    "rank-deficient",
    "negative rank-deficient",
    "multiple",
    "zero",
    "tiny",
    "huge",
    "outlier",
)
EPS = 2.0**-52
# A residual-stopped run reports 3.43 here.
TRAP = torch.cat([torch.tensor([3.4673, 3.4308]), torch.linspace(-0.3, 1.5, 200)]).double()


@dataclass(frozen=True)
class Problem:
    """A symmetric matrix and its eigenvalues, ascending. ``repr`` says how to make it again."""

    kind: str
    n: int
    seed: int
    matrix: torch.Tensor
    eigenvalues: np.ndarray

    def __repr__(self) -> str:
        return f"problem({self.seed}, kind={self.kind!r}, n={self.n})"

    @property
    def objective(self) -> Objective:
        return quadratic(self.matrix)

    @property
    def norm(self) -> float:
        return float(np.abs(self.eigenvalues).max())


def quadratic(matrix: torch.Tensor) -> Objective:
    """f(x) = xᵀAx/2 at 0, whose Hessian is A."""
    return Objective.from_function(lambda x: 0.5 * (x @ (matrix @ x)), torch.zeros(len(matrix), dtype=matrix.dtype))


def diagonal(*values: float, dtype: torch.dtype = torch.float64) -> Objective:
    return quadratic(torch.diag(torch.tensor(values, dtype=dtype)))


def allowed(runs: int, delta: float) -> int:
    """More misses than this have a probability below 0.1 % if each has probability δ."""
    return int(scipy.stats.binom.ppf(0.999, runs, delta))


def spectrum(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    bulk = rng.uniform(-0.5, 0.5, n) + 0.3 * rng.standard_normal(n)
    if kind.startswith("cluster"):
        bulk = rng.uniform(-0.3, 0.9, n)
        size = min(n, 4)
        bulk[:size] = 1 - float(kind.split()[1]) * np.arange(size)
    elif kind == "negative definite":
        bulk = -rng.uniform(0.1, 2, n)
    elif kind.endswith("rank-deficient"):
        bulk = rng.uniform(0.1, 2, n) * (rng.random(n) < 0.25)
        bulk = -bulk if kind.startswith("negative") else bulk
    elif kind == "multiple":
        bulk = np.round(bulk, 1)
    elif kind == "zero":
        bulk = np.zeros(n)
    elif kind == "tiny":
        bulk *= 1e-150
    elif kind == "huge":
        bulk *= 1e150
    elif kind == "outlier":
        bulk = 0.05 * rng.standard_normal(n)
        bulk[0] = 1.0
    return bulk


def problem(seed: int, kind: str | None = None, n: int | None = None, largest: int = 400) -> Problem:
    """One of :data:`KINDS`, of a size up to ``largest``, all from ``seed``."""
    rng = np.random.default_rng(seed)
    drawn_kind, drawn_n = KINDS[rng.integers(len(KINDS))], round(math.exp(rng.uniform(math.log(2), math.log(largest))))
    kind, n = kind or drawn_kind, n or drawn_n
    eigenvalues = spectrum(kind, n, rng)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    matrix = (basis * eigenvalues) @ basis.T
    matrix = (matrix + matrix.T) / 2
    return Problem(kind, n, seed, torch.from_numpy(matrix), np.linalg.eigvalsh(matrix))


def problems(entropy: int, count: int, largest: int = 400, kind: str | None = None) -> Iterator[Problem]:
    for seed in np.random.SeedSequence(entropy).generate_state(count, np.uint64):
        yield problem(int(seed), kind, largest=largest)


@functools.cache
def dense_network(name: str) -> tuple[Network, torch.Tensor]:
    """A small real network, and its dense Hessian in float64 by a path of its own."""
    made = network(name)
    return made, made.hessian()


def held(f: Objective) -> int:
    """Bytes of vectors that f keeps for itself, its float64 twin for measuring rounding included."""
    f.hvp(f.x)
    f.rounding_error(f.x[None])
    return f.memory.vectors


def sampled(entropy: int, count: int) -> Iterator[Problem]:
    """Larger problems, in coordinates in which they are diagonal, for estimates from isotropic random vectors."""
    for seed in np.random.SeedSequence(entropy).generate_state(count, np.uint64):
        rng = np.random.default_rng(seed)
        kind = KINDS[rng.integers(len(KINDS))]
        eigenvalues = np.sort(spectrum(kind, 250, rng))
        yield Problem(kind, 250, int(seed), torch.from_numpy(np.diag(eigenvalues)), eigenvalues)


def fresh_entropy() -> int:
    return secrets.randbits(64)


def plain_bound(ritz: np.ndarray, log_couplings: float, n: int, delta: float) -> float:
    """T090 by bisection, as it is written on the sheet."""
    top = ritz.max()
    target = log_couplings + math.log(math.sqrt(2 * n / math.pi) / delta)
    if target == -math.inf:
        return float(top)
    low, high = 0.0, math.exp(target / len(ritz))
    for _ in range(200):
        middle = 0.5 * (low + high)
        with np.errstate(divide="ignore"):
            low, high = (middle, high) if np.log(top - ritz + middle).sum() < target else (low, middle)
    return float(top + high)


def plain_lanczos(matrix: np.ndarray, start: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Ritz values and Σ log βⱼ after 1, 2, … steps of Lanczos with full reorthogonalisation, as in a textbook."""
    n, norm = len(matrix), np.abs(matrix).max() or 1.0
    basis, alphas, betas, vector = np.zeros((0, n)), [], [], start / np.linalg.norm(start)
    for step in range(1, n + 1):
        basis = np.vstack([basis, vector])
        image = matrix @ vector / norm
        alphas.append(vector @ image)
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        beta = float(np.linalg.norm(image))
        done = step == n or beta < 10 * EPS
        ritz = np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
        betas.append(beta)
        yield norm * ritz, -math.inf if done else sum(math.log(norm * b) for b in betas)
        if done:
            return
        vector = image / beta


def plain_steps(given: Problem, delta: float, rtol: float, seed: int, floor: float) -> int:
    """The step at which T090 first meets the tolerance (16 floors, 2 of them in the interval), from the same start."""
    start = random_unit_vector(given.n, seed, "sharpness", torch.float64, torch.device("cpu")).numpy()
    for ritz, log_couplings in plain_lanczos(given.matrix.numpy(), start):
        width = plain_bound(ritz, log_couplings, given.n, delta) - ritz[-1]
        if width <= rtol * abs(ritz[-1]) + 14 * floor:
            break
    return len(ritz)


@dataclass
class Tally:
    """What a row of runs showed. ``missed`` and ``faults`` hold what is needed to repeat them."""

    entropy: int
    runs: int
    statuses: collections.Counter[str]
    missed: list[str]
    faults: list[str]
    worst_step_ratio: float = 0.0

    def __str__(self) -> str:
        return f"entropy {self.entropy}: {len(self.missed)}/{self.runs} missed {self.missed}, faults {self.faults}"


def calibrate_sharpness(
    given: Iterable[Problem], entropy: int, delta: float, rtol: float, *, method: str = "lanczos", compare: bool = True
) -> Tally:
    """Run :func:`sharpness` on each problem; a miss is λ₁ outside the interval at any step, the last one included.

    So a run that a smaller budget had cut anywhere is counted too. Faults: CONVERGED without meeting the tolerance, or,
    with ``compare``, more than 1.5 times the steps of the plain computation.
    """
    tally = Tally(entropy, 0, collections.Counter(), [], [])
    for item in given:
        seed = item.seed % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            answer = sharpness(item.objective, rtol, 1 - delta, method, seed, 4000.0)
        truth = float(item.eigenvalues[-1])
        slack = 8 * EPS * item.norm  # of the truth itself
        tally.runs += 1
        tally.statuses[answer.status.name] += 1
        if not all(e["lower"] - slack <= truth <= e["upper"] + slack for e in answer.history):
            tally.missed.append(repr(item))
        if answer.status is Status.CONVERGED:
            meets = answer.upper - answer.lower <= rtol * abs(answer.value) + 16 * answer.floor
            if not meets or not answer.lower <= answer.value <= answer.upper or answer.floor > rtol * item.norm:
                tally.faults.append(f"{item!r}: {answer.status.name} with width {answer.width}")
        elif method == "lanczos":
            tally.faults.append(f"{item!r}: {answer.status.name}")
        if compare:
            plain = plain_steps(item, delta, rtol, seed, answer.floor)
            tally.worst_step_ratio = max(tally.worst_step_ratio, answer.steps / plain)
            if answer.steps > min(item.n, 1.5 * plain):
                tally.faults.append(f"{item!r}: {answer.steps} steps, {plain} in the plain computation")
    return tally


def calibrate_eigenpairs(
    given: Iterable[Problem], entropy: int, delta: float, k: int, which: str, budget: float = math.inf
) -> Tally:
    """A miss is any of the k eigenvalues outside its interval."""
    tally = Tally(entropy, 0, collections.Counter(), [], [])
    for item in given:
        count = min(k, item.n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            answer = eigenpairs(item.objective, count, which, 1e-2, 1 - delta, item.seed % 2**32, budget)
        tally.runs += 1
        tally.statuses[answer.status.name] += 1
        if not holds(answer, item, which):
            tally.missed.append(repr(item))
        width = max(pair.width for pair in answer.pairs)
        if budget < math.inf and answer.status is Status.BUDGET:
            continue
        if answer.status is not Status.CONVERGED or width > 1e-2 * item.norm + 16 * answer.floor:
            tally.faults.append(f"{item!r}: {answer.status.name} with width {width}")
    return tally


def holds(answer: Eigenpairs, item: Problem, which: str) -> bool:
    """Whether every interval contains the eigenvalue that it stands for."""
    slack = 8 * EPS * item.norm
    if which == "magnitude":
        # Each end has its own order; the answer says by sign of rank which end a pair came from.
        return all(
            np.any((p.lower - slack <= item.eigenvalues) & (item.eigenvalues <= p.upper + slack)) for p in answer.pairs
        )
    truth = item.eigenvalues[::-1] if which == "largest" else item.eigenvalues
    return all(p.lower - slack <= t <= p.upper + slack for p, t in zip(answer.pairs, truth, strict=False))


def calibrate_trace(given: Iterable[Problem], entropy: int, delta: float, rtol: float) -> Tally:
    """A miss is the trace outside its interval."""
    tally = Tally(entropy, 0, collections.Counter(), [], [])
    for item in given:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            answer = trace(item.objective, rtol, 1 - delta, item.seed % 2**32, 200.0)
        tally.runs += 1
        tally.statuses[answer.status.name] += 1
        slack = 64 * EPS * float(np.abs(item.eigenvalues).sum())
        if not answer.lower - slack <= float(item.eigenvalues.sum()) <= answer.upper + slack:
            tally.missed.append(repr(item))
        if answer.status is Status.CONVERGED and answer.width > rtol * abs(answer.value) + 16 * answer.floor:
            tally.faults.append(f"{item!r}: CONVERGED with width {answer.width}")
    return tally
