"""The largest change of a function on a ball, by random search: what closed forms are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAMPLES = 400
SURVIVORS = 8
# The spread of the samples shrinks by this factor each round.
SHRINK = 0.7
ROUNDS = 40


def largest_change(function: Callable[[Tensor], Tensor], x: Tensor, radius: float, seed: int = 0) -> float:
    """Return a value that |f(x + u) − f(x)| attains with |u| ≤ r, and that is hard to beat in a few dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def changes(points: Tensor) -> Tensor:
        return (torch.func.vmap(function)(x + points) - function(x)).abs()

    best = torch.zeros(SURVIVORS, len(x), dtype=torch.float64)
    spread = 2 * radius
    for _ in range(ROUNDS):
        noise = torch.randn(SURVIVORS, SAMPLES // SURVIVORS, len(x), generator=generator, dtype=torch.float64)
        tried = torch.cat([best, (best[:, None] + spread * noise).flatten(0, 1)])
        norms = torch.linalg.vector_norm(tried, dim=1, keepdim=True)
        tried = tried * (radius / norms.clamp(min=radius))
        best = tried[changes(tried).topk(SURVIVORS).indices]
        spread *= SHRINK
    return float(changes(best).max())
