"""``torchflat selftest``: check the installation on problems whose answers are known."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from torchflat import ops
from torchflat.errors import NonFiniteError, UsageError
from torchflat.flatness import variation
from torchflat.objective import Objective
from torchflat.ops import reference
from torchflat.optim import NormalizedGD
from torchflat.problems import PROBLEMS, Monomial, Problem
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum import (
    NotConvergedWarning,
    block_sharpness,
    eigenpairs,
    sharpness,
    spectral_density,
    trace,
)

__all__ = ["KERNELS", "ROUNDING_UNITS", "Selftest", "kernel_difference"]

MISSED = 5
CONFIDENCE = 1 - 1e-6
# In gradients. Far more than any check needs, so that a computation that does not end is a miss.
BUDGET = 4000.0
KERNELS = ("orthogonalize_", "dot", "axpy_")
# How far a kernel may be from its twin, in units of rounding of the result: sums may be taken in another order.
ROUNDING_UNITS = 64.0
# Another eigenvalue this close to the top one in magnitude makes power iteration slow.
POWER_RATIO = 0.7
# Sampling error of a density goes with 1/√n: below this many eigenvalues the check could hardly fail.
DENSITY_SIZE = 100
# Where the variation is checked.
RADIUS = 0.05
# From all starts of the sheet they end 1e-13 from the flat minimum, along the valley (T050).
STEPS = 1000
# Fewer rows are not worth sampling.
MULTILEVEL_ROWS = 4000


class Finding(NamedTuple):
    """What a check found: ``known`` should lie between ``lower`` and ``upper``."""

    known: float
    lower: float
    upper: float
    products: float = 0.0
    status: Status | None = None

    @property
    def fault(self) -> str | None:
        """Why this is a miss, or None."""
        if not self.lower <= self.known <= self.upper:
            return f"{self.known:.10g} is outside [{self.lower:.10g}, {self.upper:.10g}]"
        # In float32 an interval can be as wide as rounding demands, and still be right.
        if self.status not in (None, Status.CONVERGED, Status.ROUNDING_LIMITED):
            return f"{self.status.name}: {self.status.value}"
        return None


Measure = Callable[[int, float], Finding]


class Check(NamedTuple):
    """One row of the table: ``measure(seed, rtol)`` looks at ``what`` of ``subject``."""

    subject: str
    what: str
    measure: Measure

    @property
    def label(self) -> str:
        return f"{self.subject} {self.what}"


class Row(NamedTuple):
    """A check that was made; ``fault`` is None unless it missed."""

    check: Check
    finding: Finding | None
    fault: str | None


@dataclasses.dataclass(frozen=True)
class Selftest:
    """Check this installation on problems with known answers.

    Sharpness, eigenvalues, trace, blocks and density are computed for functions whose spectrum is known by a formula:
    what is known must lie in the interval found. The native kernels are held against their reference twins, the cost
    ledger against an independent count, a model must come back as it was, and the optimizer must end at a flat
    minimum. Exits with 5 if anything misses.
    """

    list: bool = False
    """Only say which checks there are."""
    only: Annotated[str | None, tyro.conf.arg(metavar="PATTERN")] = None
    """Only the checks whose row contains this, such as "factorisation", "trace" or "quadratic/* sharpness"."""
    seed: int = 0
    """Draws the random starts of all computations."""
    full: bool = False
    """Ten random starts a check instead of one, and intervals a hundred times as narrow (about a minute)."""

    def run(self) -> int:
        """Make the checks, print the table, and return the exit code."""
        chosen = [check for check in _checks() if _matches(check, self.only)]
        if not chosen:
            raise UsageError(f"--only {self.only!r} matches no check: see torchflat selftest --list")
        if self.list:
            print("\n".join(check.label for check in chosen))
            return 0
        from tqdm import tqdm

        started = time.perf_counter()
        seeds = range(self.seed, self.seed + (10 if self.full else 1))
        rtol = 1e-4 if self.full else 1e-2
        rows = [_made(check, seeds, rtol) for check in tqdm(chosen, desc="selftest", leave=False, disable=None)]
        print("\n".join(_table(rows)))
        missed = [row for row in rows if row.fault is not None]
        for row in missed:
            print(f"missed: {row.check.label}: {row.fault}")
        kernels = " and ".join(device for device in ("cpu", "cuda") if ops.backend(device) == "native") or "no"
        print(
            f"\n{len(rows) - len(missed)} of {len(rows)} checks passed in {time.perf_counter() - started:.1f} s "
            f"(seed {self.seed}, {kernels} native kernels).\n"
            "Each interval holds with probability 1 - 1e-6 over its random start or probes: a\n"
            "miss is a defect, not bad luck. Cost is in Hessian products over all the data."
        )
        return MISSED if missed else 0


def kernel_difference(name: str, device: str) -> float:
    """Return the largest relative difference between an operator as it runs on ``device`` and its reference twin.

    In units of the rounding of the result's dtype, over float64, float32 and bfloat16 inputs of awkward lengths.
    """
    worst = 0.0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        runs, twins = (_kernel_result(name, module, dtype, device) for module in (torch.ops.torchflat, reference))
        for ours, theirs in zip(runs, twins, strict=True):
            if theirs.numel() == 0:
                continue
            size, error = float(theirs.double().abs().max()), float((ours.double() - theirs.double()).abs().max())
            # A comparison with NaN is false, and max() would forget it.
            worst = max(worst, error / (size * torch.finfo(theirs.dtype).eps) if error < math.inf else math.inf)
    return worst


# What is checked ---------------------------------------------------------------------------------------------------


def _checks() -> Iterator[Check]:
    for name, problem in PROBLEMS.items():
        for what, measure in _problem_checks(problem).items():
            yield Check(name, what, measure)
    yield Check("model", "restored", _restored)
    yield Check("ledger", "gradients", _ledger)
    yield Check("optimizer", "flatness", _optimizer)
    for device in ("cpu", "cuda"):
        if ops.backend(device) == "native" and (device == "cpu" or torch.cuda.is_available()):
            for kernel in KERNELS:
                yield Check(f"{device}/{kernel}", "twin", functools.partial(_kernel, kernel, device))


def _problem_checks(problem: Problem) -> dict[str, Measure]:
    checks: dict[str, Measure] = {}
    change = problem.variation(RADIUS)
    if change:
        checks["variation"] = functools.partial(_variation, problem, change)
    spectrum, largest, total = problem.eigenvalues(), problem.sharpness(), problem.trace()
    if spectrum is None or largest is None or total is None:
        return checks
    n = len(spectrum)
    if n >= DENSITY_SIZE:
        # Hundreds of eigenvalues close together: thousands of gradients.
        checks.clear()
    checks["sharpness"] = functools.partial(_sharpness, problem, largest, "lanczos")
    if _power_is_fast(spectrum):
        checks["power"] = functools.partial(_sharpness, problem, largest, "power")
    if problem.rows >= MULTILEVEL_ROWS:
        checks["multilevel"] = functools.partial(_sharpness, problem, largest, "multilevel")
    checks[f"largest {min(3, n)}"] = functools.partial(_eigenpairs, problem, spectrum.flip(0)[:3], "largest")
    checks[f"smallest {min(2, n)}"] = functools.partial(_eigenpairs, problem, spectrum[:2], "smallest")
    checks["trace"] = functools.partial(_trace, problem, total)
    if n >= DENSITY_SIZE:
        checks["density"] = functools.partial(_density, problem, spectrum)
    for block, known in problem.block_sharpness().items():
        checks[f"block {block}"] = functools.partial(_block, problem, block, known)
    return checks


def _power_is_fast(spectrum: Tensor) -> bool:
    sizes = spectrum.abs().sort(descending=True).values
    below = sizes[sizes < (1 - 1e-9) * sizes[0]]
    return bool(spectrum[-1] > -spectrum[0]) and (len(below) == 0 or bool(below[0] <= POWER_RATIO * sizes[0]))


def _sharpness(problem: Problem, known: float, method: str, seed: int, rtol: float) -> Finding:
    answer = sharpness(problem.objective(), rtol, CONFIDENCE, method, seed, budget=BUDGET)
    # Power iteration settles without a proof more often than not; that its interval holds is all it claims.
    status = None if answer.status is Status.NOT_CERTIFIED else answer.status
    return _found(known, answer, answer.cost, status)


def _variation(problem: Problem, known: float, seed: int, rtol: float) -> Finding:
    answer = variation(problem.objective(), [RADIUS], seed=seed, budget=BUDGET)
    value, floor = answer.values[0], answer.floor[0]
    # Attained, and so no larger than what is known but for rounding; and no smaller than its accuracy allows.
    return Finding(known, value * (1 - 1e-12) - floor, value * (1 + answer.accuracy[0]) + floor, 0.0, answer.status)


def _eigenpairs(problem: Problem, known: Tensor, which: str, seed: int, rtol: float) -> Finding:
    answer = eigenpairs(problem.objective(), len(known), which, rtol, CONFIDENCE, seed, budget=BUDGET)
    both = zip(known.tolist(), answer.pairs, strict=True)
    findings = [_found(value, pair, answer.cost, answer.status) for value, pair in both]
    return next((finding for finding in findings if finding.fault), findings[-1])


def _trace(problem: Problem, known: float, seed: int, rtol: float) -> Finding:
    # Sampled numbers cost 1/rtol² probes; as narrow as the others they would always be computed exactly.
    answer = trace(problem.objective(), 10 * rtol, CONFIDENCE, seed, budget=BUDGET)
    return _found(known, answer, answer.cost, answer.status)


def _block(problem: Problem, block: str, known: float, seed: int, rtol: float) -> Finding:
    answer = block_sharpness(problem.objective(), rtol, CONFIDENCE, seed=seed, budget=BUDGET)
    row = next(row for row in answer.rows if row.name == block)
    return _found(known, row, answer.cost, row.status)


def _density(problem: Problem, spectrum: Tensor, seed: int, rtol: float) -> Finding:
    """Compare the share of the density above the median eigenvalue.

    With h the density's kernel integrated from there, a random start gives Σ h(λᵢ)uᵢ², where u² is Dirichlet(½, …, ½):
    it strays from the mean over i like a Gaussian of variance ≤ 1/(4(n/2 + 1)) at most (Marchal and Arbel 2017 for the
    beta law, which h ∈ {0, 1} gives and any other h strays less than). The number of starts depends on what they gave,
    so that each number there may be gets an equal part of the probability of a miss.
    """
    starts = 8
    answer = spectral_density(problem.objective(), starts=starts, seed=seed, budget=BUDGET)
    cut = float(spectrum.median())
    grid, density = (torch.tensor(values, dtype=torch.float64) for values in (answer.grid, answer.density))
    found = float(torch.trapezoid(torch.where(grid > cut, density, 0.0), grid))
    known = float((0.5 * torch.erfc((cut - spectrum) / (math.sqrt(2) * answer.width))).mean())
    reach = math.sqrt(math.log(2 * starts / (1 - CONFIDENCE)) / (2 * (len(spectrum) / 2 + 1) * answer.starts))
    # The grid resolves the cut to one of its steps.
    reach += float(grid[1] - grid[0]) * float(density.max())
    return Finding(known, found - reach, found + reach, answer.cost.products)


def _found(known: float, interval: Interval, cost: Cost, status: Status | None) -> Finding:
    return Finding(known, interval.lower, interval.upper, cost.products, status)


def _kernel(name: str, device: str, seed: int, rtol: float) -> Finding:
    """Compare a kernel with its twin, in units of rounding."""
    difference = kernel_difference(name, device)
    return Finding(0.0, difference - ROUNDING_UNITS, difference + ROUNDING_UNITS)


def _kernel_result(name: str, module: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    if name == "orthogonalize_":
        basis = torch.linalg.qr(draw(10_007, 5).double()).Q.T.contiguous().to(dtype)
        vector = draw(10_007).double()
        return [module.orthogonalize_(basis, vector), vector]
    shapes = ((10_007,), (3, 5, 7), (), (0,))
    a, b = ([draw(*shape) for shape in shapes] for _ in range(2))
    if name == "dot":
        # Of a with itself plus a part of b: no cancellation, so that the relative error means something.
        return [module.dot(a, [x.double() + 0.5 * y for x, y in zip(a, b, strict=True)])]
    module.axpy_(a, b, 0.7)
    return a


def _restored(seed: int, rtol: float) -> Finding:
    """Count what an audit, and a product that fails, left changed about a model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
        model[3].eval()
        model[4].bias.requires_grad_(False)
        model[0].weight.grad = torch.ones(6, 4)
        f = Objective(model, nn.functional.cross_entropy, (torch.randn(20, 4), torch.arange(20) % 3))
        before = _state(model)
        answer = sharpness(f, rtol, CONFIDENCE, seed=seed, budget=BUDGET)
        with contextlib.suppress(NonFiniteError):
            f.hvp(torch.full((f.n,), math.nan))
        after = _state(model)
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    return Finding(0.0, changed, changed, answer.cost.products)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["random state"] = torch.get_rng_state()
    for name, module in model.named_modules():
        state[f"{name}.training"] = torch.tensor(module.training)
    for name, parameter in model.named_parameters():
        state[f"{name}.requires_grad"] = torch.tensor(parameter.requires_grad)
        state[f"{name}.grad"] = torch.zeros(0) if parameter.grad is None else parameter.grad.clone()
    return state


def _optimizer(seed: int, rtol: float) -> Finding:
    """Descend on (x₁x₂ − 1)² by normalised steps from a random start, to λ₁ = 4 at the flat minimum ±(1, 1).

    The iterates swing across the valley. Found is λ₁ where the flow would take the last one, at the solution with the
    same C = x₁² − x₂²: there (x₁² + x₂²)² = C² + 4, and λ₁ = 2(x₁² + x₂²).
    """
    f = Monomial((1.0, 1.0), exponents=(1, 1)).function
    x = (4 * torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2).requires_grad_()
    optimizer = NormalizedGD([x], lr=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        f(x).backward()
        optimizer.step()
    first, second = x.tolist()
    found = 2 * math.sqrt((first**2 - second**2) ** 2 + 4)
    return Finding(4.0, found * (1 - 1e-9), found)


def _ledger(seed: int, rtol: float) -> Finding:
    """Compare what an audit says that it spent with what a meter between model and loss counted."""
    count = {"forwards": 0, "backwards": 0, "products": 0}
    rows = 50
    X = torch.linspace(-1, 1, 4 * rows).reshape(rows, 4)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(_Meter.apply(output, count), target)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    f = Objective(model, loss, (X, X[:, :2].sin()), microbatch=20)
    f.gradient()
    sharpness(f, rtol, CONFIDENCE, seed=seed, budget=BUDGET)
    # A product runs through the backward pass once more, on its way down.
    passes = (count["forwards"], count["backwards"] - count["products"], count["products"])
    known, charged = Cost(*(total / rows for total in passes)).gradients, f.cost.gradients
    return Finding(known, charged * (1 - 1e-12), charged * (1 + 1e-12), f.cost.products)


class _Meter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: dict[str, int]) -> Tensor:
        ctx.count = count
        count["forwards"] += len(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _BackwardMeter.apply(gradient, ctx.count), None


class _BackwardMeter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, count: dict[str, int]) -> Tensor:
        ctx.count = count
        count["backwards"] += len(gradient)
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> Any:
        ctx.count["products"] += len(vector)
        return vector, None


# How it is run and shown -------------------------------------------------------------------------------------------


def _matches(check: Check, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(check.label, f"*{pattern}*")


def _made(check: Check, seeds: range, rtol: float) -> Row:
    finding, products = None, 0.0
    for seed in seeds:
        try:
            with warnings.catch_warnings():
                # The row says the same.
                warnings.simplefilter("ignore", NotConvergedWarning)
                finding = check.measure(seed, rtol)
        except Exception as error:  # whatever breaks is what a self-test is there to show
            first_line = str(error).partition("\n")[0]
            return Row(check, None, f"{type(error).__name__}: {first_line} (seed {seed})")
        products += finding.products
        finding = finding._replace(products=products)
        if finding.fault:
            return Row(check, finding, f"{finding.fault} (seed {seed})")
    return Row(check, finding, None)


def _table(rows: list[Row]) -> Iterator[str]:
    layout = "{:21} {:11} {:>11} {:>26} {:>5} {}"
    yield layout.format("problem", "what", "known", "interval found", "cost", "")
    yield "-" * 80
    subject = None
    for check, finding, fault in rows:
        shown = check.subject if check.subject != subject else ""
        subject = check.subject
        mark = "✗" if fault else "✓"
        if finding is None:
            yield layout.format(shown, check.what, "", "failed", "", mark)
            continue
        interval = f"[{finding.lower:.5g}, {finding.upper:.5g}]"
        cost = f"{finding.products:.0f}" if finding.products else ""
        yield layout.format(shown, check.what, f"{finding.known:.5g}", interval, cost, mark)
    yield "-" * 80
