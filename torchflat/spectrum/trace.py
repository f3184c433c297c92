"""The trace of the Hessian, by Hutch++, with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.objective import Objective
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum.krylov import MARGIN, random_unit_vector
from torchflat.spectrum.run import Callback, Run, check_request
from torchflat.spectrum.student import t_quantile

__all__ = ["Trace", "trace"]

SKETCH = 16
PILOT = 16
# Where the probes wanted are more than there are parameters, one product for each of these gives the trace exactly.
LARGEST_EXACT = 1024


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
    """tr ∇²f(x) = tr QᵀHQ + tr (I−QQᵀ)H(I−QQᵀ): the first exactly, the second from random probes (Hutch++).

    Q (n, m) spans where H is large: the image of a few random vectors, and of ``basis`` (orthonormal columns, such as
    eigenvectors) if there is one. Probes g are uniform on the sphere of the complement, each giving (n−m)·gᵀHg. A pilot
    of 16 tells how many are needed (Stein's two stages), so that the t-interval with the pilot's variance holds although the
    number of probes depends on the data. If n is no larger than that, the trace is exact.

    CONVERGED means that the interval is at most rtol·|value| + atol wide.

    Source: Meyer, Musco, Musco, Woodruff, *Hutch++: Optimal Stochastic Trace Estimation* (2021).

    >>> f = Objective.from_function(lambda x: (x**2).sum(), torch.zeros(5, dtype=torch.float64))
    >>> round(trace(f).value, 9)
    10.0
    """
    check_request(rtol, confidence, budget)
    run = Run(f, rtol, None, confidence, budget, callback)
    if f.n <= SKETCH + PILOT:
        rows = torch.eye(f.n, dtype=f.dtype, device=f.device)
    else:
        streams = [f"trace/sketch/{i}" for i in range(SKETCH)]
        sketch = torch.stack([random_unit_vector(f.n, seed, stream, f.dtype, f.device) for stream in streams])
        if basis is not None:
            sketch = torch.cat([sketch - (sketch @ basis) @ basis.T, basis.T])
        rows = _range(f.products(sketch))
    answer = _sampled(f, run, seed, rows)
    run.warn(answer.status, "trace")
    return answer


def _sampled(f: Objective, run: Run, seed: int, basis: Tensor) -> Trace:
    """The part on the span of the rows of ``basis``, exact, and the part on their complement, sampled."""
    images = f.products(basis) if len(basis) else basis
    known = float(ops.dot([basis], [images]))
    size = float(torch.linalg.vector_norm(images.double(), dim=1).sum())
    left = f.n - len(basis)
    wanted = PILOT if left else 0
    samples: list[float] = []
    spread = reach = floor = 0.0
    status = None
    while len(samples) < wanted and status is None:
        probe = _probe(f, seed, len(samples), basis)
        samples.append(left * float(ops.dot([probe], [f.products(probe[None])[0]])))
        if len(samples) == 1:
            floor = MARGIN * left * f.rounding_error(probe[None], quadratic=True)
        if len(samples) == PILOT:
            spread = statistics.stdev(samples)
            reach = t_quantile(run.confidence, PILOT - 1) * spread
            goal = 0.5 * run.rtol * abs(known + sum(samples) / PILOT) + floor
            wanted = max(PILOT, math.ceil((reach / goal) ** 2)) if reach > 0 else PILOT
            if wanted >= f.n <= LARGEST_EXACT:
                identity = torch.eye(f.n, dtype=f.dtype, device=f.device)
                return _sampled(f, run, seed, identity)
        if len(samples) < wanted:
            stop = run.callback is not None and run.callback(len(samples) / wanted)
            status = Status.BUDGET if stop or not run.affordable() else None
    value = known + (sum(samples) / len(samples) if samples else 0.0)
    floor += 8 * torch.finfo(f.dtype).eps * (size + abs(value))
    unknown = len(samples) < PILOT and left > 0
    error, half = (math.inf, math.inf) if unknown else (x / math.sqrt(max(1, len(samples))) for x in (spread, reach))
    half += floor
    if status is None:
        status = Status.CONVERGED if run.rtol * abs(value) >= floor or abs(value) <= floor else Status.ROUNDING_LIMITED
    return Trace(
        value, value - half, value + half, run.confidence, error, len(samples), status, floor, run.cost, f.provenance()
    )


def _probe(f: Objective, seed: int, index: int, basis: Tensor) -> Tensor:
    """A vector uniform on the unit sphere of the complement of the rows of ``basis``."""
    probe = random_unit_vector(f.n, seed, f"trace/probe/{index}", torch.float64, f.device)
    norm = ops.orthogonalize_(basis, probe)[1]
    return (probe / norm).to(f.dtype)


def _range(images: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of ``images``; none where these vanish."""
    if not images.any():
        return images[:0]
    _, values, right = torch.linalg.svd(images.double() / images.abs().max(), full_matrices=False)
    return right[values > values[0] * torch.finfo(images.dtype).eps].to(images.dtype).contiguous()
