"""The spectral density of the Hessian, by stochastic Lanczos quadrature around eigenvalues known exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Status
from torchflat.spectrum.krylov import Krylov, power_of_two
from torchflat.spectrum.run import Callback, Run, check_request

__all__ = ["SpectralDensity", "spectral_density"]

GRID = 512
# A Gauss quadrature with m nodes resolves about 1/m of the range; a narrower kernel would show its nodes, not H.
RESOLVED = 1.5
NARROWEST = 1 / 200


@dataclass(frozen=True)
class SpectralDensity(Answer):
    """φ(t) = (1/n) Σ exp(−(t−λᵢ)²/2w²)/(w√2π) on ``grid``, with w = ``width``; its integral is 1.

    ``standard_error`` is that of the average over the random starts, pointwise. ``exact`` are eigenvalues that enter
    exactly. CONVERGED means that ∫ standard_error ≤ rtol.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    standard_error: tuple[float, ...]
    width: float
    exact: tuple[float, ...]
    starts: int
    steps: int
    status: Status
    cost: Cost
    provenance: Mapping[str, Any]


def spectral_density(
    f: Objective,
    rtol: float = 5e-2,
    starts: int = 8,
    steps: int = 32,
    seed: int = 0,
    budget: float = 400.0,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    callback: Callback | None = None,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of ∇²f(x), smoothed by a Gaussian as narrow as ``steps`` nodes resolve.

    Each random start u gives the Gauss quadrature of its spectral measure: Ritz values θᵢ with weights ⟨e₁,sᵢ⟩². The
    average over starts is the density; more starts are taken until its standard error integrates to ``rtol`` (two at
    least, ``starts`` at most). ``known`` = (values (m,), orthonormal vectors (n, m)) enters exactly, and starts are
    then drawn from the complement: outliers do not blur the bulk. Where H has no more columns than two starts take
    products, all eigenvalues are computed instead, and ``exact`` holds them.

    Source: Golub and Meurant, *Matrices, Moments and Quadrature* (1994); Ghorbani, Krishnan, Xiao (2019).

    >>> f = Objective.from_function(lambda x: (x**2).sum(), torch.zeros(5, dtype=torch.float64))
    >>> answer = spectral_density(f)
    >>> round(answer.grid[max(range(512), key=answer.density.__getitem__)], 2)
    2.0
    """
    check_request(rtol, 0.5, budget)
    if starts < 2 or steps < 2:
        raise UsageError(f"starts={starts}, steps={steps}: at least 2 of each are needed for a standard error")
    run = Run(f, rtol, None, 0.5, budget, callback)
    values, vectors = known if known is not None else (torch.empty(0, dtype=torch.float64), None)
    rules: list[tuple[Tensor, Tensor]] = []
    if f.n <= 2 * steps:
        # One product for each parameter costs no more than the two starts that are needed at least.
        return _combined([], _eigenvalues(f), f, run)
    left = f.n - len(values)
    while True:
        rules.append(_quadrature(f, seed, len(rules), steps, vectors))
        if len(rules) < 2 and left > 1:
            run.affordable()  # notes what one start costs
            continue
        answer = _combined(rules, values, f, run)
        over = run.over(answer) or len(rules) == starts
        if over or answer.status.ok:
            break
    run.warn(answer.status, "spectral_density")
    return answer


def _eigenvalues(f: Objective) -> Tensor:
    """Return all eigenvalues, ascending, from n products."""
    hessian = f.products(torch.eye(f.n, dtype=f.dtype, device=f.device)).double().cpu()
    unit = power_of_two(float(hessian.abs().max()))
    values: Tensor = torch.linalg.eigvalsh((hessian + hessian.T) / (2 * unit))
    return unit * values


def _quadrature(f: Objective, seed: int, index: int, steps: int, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the spectral measure of one random start."""
    deflated = vectors.T.contiguous() if vectors is not None else None
    if deflated is not None and len(deflated) == f.n:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    with Krylov.of(f, seed, f"density/{index}", deflated) as krylov:
        while krylov.steps < steps and not krylov.exhausted and not krylov.full:
            krylov.step()
    nodes, coefficients = krylov.ritz()
    return nodes, coefficients[0] ** 2


def _combined(rules: list[tuple[Tensor, Tensor]], values: Tensor, f: Objective, run: Run) -> SpectralDensity:
    inner = torch.cat([nodes for nodes, _ in rules]) if rules else values[:0]
    ends = torch.cat([values, inner])
    low, high = float(ends.min()), float(ends.max())
    span = float(inner.max() - inner.min()) if len(inner) else 0.0
    nodes = max((len(nodes) for nodes, _ in rules), default=0)
    size = max(abs(low), abs(high))
    width = max(span * RESOLVED / max(nodes, 1), (high - low) * NARROWEST, 1e-3 * size) or 1.0
    grid = torch.linspace(low - 4 * width, high + 4 * width, GRID, dtype=torch.float64)
    density = _smoothed(grid, values, torch.full_like(values, 1 / f.n), width)
    error = torch.zeros_like(grid)
    if rules:
        share = len(values) / f.n
        samples = torch.stack([(1 - share) * _smoothed(grid, *rule, width) for rule in rules])
        density = density + samples.mean(0)
        error = samples.std(0) / math.sqrt(len(rules)) if len(rules) > 1 else error
    total_error = float(torch.trapezoid(error, grid))
    return SpectralDensity(
        grid=tuple(grid.tolist()),
        density=tuple(density.tolist()),
        standard_error=tuple(error.tolist()),
        width=width,
        exact=tuple(values.tolist()),
        starts=sum(len(nodes) > 0 for nodes, _ in rules),
        steps=nodes,
        status=Status.CONVERGED if total_error <= run.rtol else Status.BUDGET,
        cost=run.cost,
        provenance=f.provenance(),
    )


def _smoothed(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    kernel = torch.exp(-0.5 * ((grid[:, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return kernel @ weights
