"""Numbers of *Implicit regularization of normalized gradient descent* that take one short path each."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from experiments.descents import normalized, starts
from experiments.plane import path
from experiments.valleys import PRODUCT, QUARTIC, TARGET, VALLEYS, factors, gap
from torchflat.optim import NormalizedGD
from torchflat.problems.problem import spectral_norm

__all__ = ["numbers"]


def numbers() -> dict[str, float]:
    """Measure what takes one short path each."""
    one = path(PRODUCT.function, (2.0, 0.7), lambda x: NormalizedGD(x, lr=0.3), 1)[-1]
    slow = path(PRODUCT.function, (2.0, 1.0), lambda x: torch.optim.SGD(x, lr=1e-3), 5000)[-1]
    swings = path(QUARTIC.function, (1e-3, 0.2), lambda x: NormalizedGD(x, lr=0.4, decay=0), 1000)[-1]
    fast = path(PRODUCT.function, (2.0, 0.7), lambda x: NormalizedGD(x, lr=1.0, decay=0.75), 1000)[-1]
    return {
        "law": (one[0] ** 2 - one[1] ** 2) / (2.0**2 - 0.7**2),
        "flow": math.dist(slow, (1.817354021, 0.5502505227)),
        "quartic_rate": -math.log(swings[0] / 1e-3),
        "early": abs(fast[0] ** 2 - fast[1] ** 2),
        "powers": max(power_difference(name) for name in VALLEYS),
        "rotated": max(rotation_difference(name) for name in VALLEYS),
        "nearest": projection_error(),
        "small": small_start_excess(),
    }


def power_difference(name: str) -> float:
    problem = VALLEYS[name]
    ends = [
        normalized(replace(problem, power=power).function, starts(len(problem.point), 5), 40) for power in (2, 4, 1)
    ]
    return max(float((ends[0] - end).abs().max()) for end in ends[1:])


def rotation_difference(name: str) -> float:
    f, start = VALLEYS[name].function, starts(len(VALLEYS[name].point), 5)
    Q, _ = torch.linalg.qr(torch.randn(*2 * start.shape[1:], generator=torch.Generator().manual_seed(0)).double())
    rotated = normalized(lambda x: f(Q.T @ x), start @ Q.T, 40)
    return float((normalized(f, start, 40) @ Q.T - rotated).abs().max())


def projection_error() -> float:
    A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    b, start = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    end = path(lambda x: 0.5 * (A @ x - b).square().sum(), start.tolist(), lambda x: torch.optim.SGD(x, lr=0.1), 2000)
    return float((torch.tensor(end[-1], dtype=torch.float64) - start - torch.linalg.pinv(A) @ (b - A @ start)).norm())


def small_start_excess() -> float:
    start = 0.01 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = path(lambda x: 0.5 * gap(x).square().sum(), start.tolist(), lambda x: torch.optim.SGD(x, lr=0.05), 3000)
    X, Y = factors(torch.tensor(end[-1], dtype=torch.float64))
    return spectral_norm(X) ** 2 + spectral_norm(Y) ** 2 - 2 * spectral_norm(TARGET)
