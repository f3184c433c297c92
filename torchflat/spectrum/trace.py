"""The trace of the Hessian, by Hutch++, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum.krylov import MARGIN, REDUCTION_ULPS, power_of_two, random_unit_vector
from torchflat.spectrum.run import Callback, Run, check_request
from torchflat.spectrum.student import t_quantile

__all__ = ["Trace", "trace"]

SKETCH = 16
PILOT = 16
# Where the probes wanted are more than there are parameters, one product for each of these gives the trace exactly.
LARGEST_EXACT = 1024
# Probes whose rounding is measured.
MEASURED = 2
# What a product costs at most, in gradients.
DEAREST = 3


@dataclass(frozen=True)
class Trace(Interval):
    """tr H with its interval, which holds over the random probes; ``standard_error`` is that of the sampled part."""

    standard_error: float
    samples: int
    status: Status
    floor: float
    cost: Cost
    provenance: Mapping[str, Any]


def trace(
    f: Objective,
    rtol: float = 1e-1,
    confidence: float = 0.99,
    seed: int = 0,
    budget: float = 400.0,
    *,
    basis: Tensor | None = None,
    callback: Callback | None = None,
) -> Trace:
    """Estimate tr ∇²f(x) = tr QᵀHQ + tr (I−QQᵀ)H(I−QQᵀ): the first exactly, the second from random probes (Hutch++).

    Q (n, m) spans where H is large: the image of a few random vectors, and ``basis`` (orthonormal columns, such as
    eigenvectors) if there is one. Probes g are uniform on the sphere of the complement, each giving (n−m)·gᵀHg, and as
    many are taken as make the interval narrow. It is Student's, with the spread of a pilot of 16 (Stein's two stages:
    so it holds although the number of probes depends on the data) or of all probes if that is wider. Where more are
    needed than there are parameters, a product for each gives the trace exactly.

    CONVERGED means that the interval is at most rtol·|value| + 16·floor wide. The coverage is that of a t-interval: as
    stated where many eigenvalues share in what is probed, somewhat less where two or three make up most of it.

    Args:
        f: the objective, at its point.
        rtol: how narrow, relative to the value.
        confidence: probability, over the probes, that the interval holds.
        seed: of the probes.
        budget: in full-data gradients. The sketch is left out where it does not leave room for a pilot.
        basis: orthonormal columns (n, m), independent of the probes.
        callback: called with the share of the probes taken, estimated; a true return value stops the run.

    Raises:
        UsageError: an argument is out of range.

    Source: Meyer, Musco, Musco, Woodruff, *Hutch++: Optimal Stochastic Trace Estimation* (2021).

    >>> f = Objective.from_function(lambda x: (x**2).sum(), torch.zeros(5, dtype=torch.float64))
    >>> round(trace(f).value, 9)
    10.0
    """
    check_request(rtol, confidence, budget)
    if basis is not None and (basis.ndim != 2 or basis.shape[0] != f.n):
        raise UsageError(f"basis must have shape ({f.n}, m), not {tuple(basis.shape)}")
    run = Run(f, rtol, None, confidence, budget, callback)
    if f.n <= SKETCH + PILOT:
        rows = torch.eye(f.n, dtype=f.dtype, device=f.device)
    else:
        known = torch.empty(0, f.n) if basis is None else basis.T
        rows = known.to(f.device, f.dtype).contiguous()
        if budget >= DEAREST * (2 * SKETCH + PILOT + len(rows)):
            rows = _extended(f, seed, rows)
    answer = _estimate(f, run, seed, rows)
    run.warn(answer.status, "trace")
    return answer


def _estimate(f: Objective, run: Run, seed: int, basis: Tensor) -> Trace:
    """Take the part on the span of the rows of ``basis`` exactly, and probe their complement."""
    known = size = 0.0
    for row in basis:
        image = f.products(row[None])[0]
        known += float(ops.dot([row], [image]))
        # The size of what is summed, which may cancel; without squares, so that nothing under- or overflows.
        size += float(image.abs().amax())
    left = f.n - len(basis)
    samples: list[float] = []
    product_error = 0.0

    def answer(status: Status) -> Trace:
        count = len(samples)
        value = known + (math.fsum(samples) / count if samples else 0.0)
        floor = MARGIN * product_error + REDUCTION_ULPS * torch.finfo(f.dtype).eps * max(size, abs(value))
        error, half = _student(samples, run.confidence) if left else (0.0, 0.0)
        half += floor
        return Trace(
            value, value - half, value + half, run.confidence, error, count, status, floor, run.cost, f.provenance()
        )

    if not left:
        return answer(run.status(answer(Status.BUDGET), size, over=True) or Status.BUDGET)
    wanted, before = PILOT, run.cost.gradients
    while True:
        probe = _probe(f, seed, f"trace/probe/{len(samples)}", basis)
        samples.append(left * float(ops.dot([probe], [f.products(probe[None])[0]])))
        if len(samples) <= MEASURED:
            product_error = max(product_error, left * f.rounding_error(probe[None], quadratic=True))
        current = answer(Status.BUDGET)
        if len(samples) == PILOT:
            goal = 0.5 * run.tolerance(abs(current.value), current.floor) - current.floor
            ratio = (0.5 * current.width - current.floor) / goal if goal > 0 else math.inf
            wanted = math.ceil(PILOT * min(max(1.0, ratio**2), LARGEST_EXACT))
            each = (run.cost.gradients - before) / PILOT
            if wanted >= f.n <= LARGEST_EXACT and run.cost.gradients + f.n * each <= run.budget:
                return _estimate(f, run, seed, torch.eye(f.n, dtype=f.dtype, device=f.device))
        over = run.over(min(1.0, len(samples) / wanted))
        status = run.status(current, max(size, abs(current.value)), over=over)
        if status is not None:
            return answer(status)


def _student(samples: list[float], confidence: float) -> tuple[float, float]:
    """Return the standard error of the mean, and how far the mean may be off; infinite before the pilot is complete."""
    if len(samples) < PILOT:
        return math.inf, math.inf
    unit = power_of_two(max(map(abs, samples)))
    values = torch.tensor(samples, dtype=torch.float64) / unit
    pilot, spread = (unit * float(part.std()) for part in (values[:PILOT], values))
    root, freedom = math.sqrt(len(samples)), len(samples) - 1
    half = max(t_quantile(confidence, PILOT - 1) * pilot, t_quantile(confidence, freedom) * spread)
    return spread / root, half / root


def _probe(f: Objective, seed: int, stream: str, basis: Tensor) -> Tensor:
    """Draw a vector uniform on the unit sphere of the complement of the rows of ``basis``."""
    probe = random_unit_vector(f.n, seed, stream, torch.float64, f.device)
    _, norm = ops.orthogonalize_(basis, probe)
    return (probe / norm).to(f.dtype)


def _extended(f: Objective, seed: int, basis: Tensor) -> Tensor:
    """Add to the orthonormal rows of ``basis`` what the images of random vectors span beyond them.

    One vector at a time, and as many as a quarter of the memory budget holds.
    """
    affordable = f.memory.total // (4 * f.n * basis.element_size())
    rows = torch.empty(len(basis) + max(1, min(SKETCH, affordable)), f.n, dtype=f.dtype, device=f.device)
    rows[: len(basis)] = basis
    used = len(basis)
    for index in range(len(rows) - used):
        image = f.products(_probe(f, seed, f"trace/sketch/{index}", basis)[None])[0].double()
        image /= image.abs().amax() or 1.0
        size = float(ops.norm([image]))
        left = float(ops.orthogonalize_(rows[:used], image)[1])
        # What rounding left of an image within the span has no direction of its own.
        if left > 1e3 * torch.finfo(f.dtype).eps * size:
            rows[used] = image / left
            used += 1
    return rows[:used]
