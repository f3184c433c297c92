"""Global maxima: of quadratics on a ball, and of one variable on an interval."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["interval_maximum", "quadratic_maximum"]

# Each halves the interval that the multiplier is in: far more than float64 can tell apart.
HALVINGS = 120
GRID = 1001
# Each narrows the interval by GRID / 2.
ROUNDS = 6


def quadratic_maximum(gradient: Tensor, hessian: Tensor, radius: float) -> Tensor:
    """Return max over |u| ≤ r of gᵀu + ½uᵀHu, for g (..., n) and symmetric H (..., n, n), as (...,).

    By strong duality it is the minimum over μ ≥ max{λ₁(H), 0} of ½ gᵀ(μI − H)⁻¹g + ½μr², a convex function of μ whose
    derivative vanishes where |(μI − H)⁻¹g| = r, or else is positive everywhere ("hard case"). With s = μ − max{λ₁, 0}
    the root lies in [0, |g|/r].

    >>> g, H = torch.tensor([1.0, 1.0]).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    >>> round(float(quadratic_maximum(g, H, 0.2)), 12), round(2**0.5 * 0.2 + 0.2**2 / 2, 12)
    (0.302842712475, 0.302842712475)
    """
    values, vectors = torch.linalg.eigh(hessian)
    squares = (vectors.mT @ gradient[..., None])[..., 0] ** 2
    edge = values[..., -1].clamp(min=0)
    gaps = edge[..., None] - values

    def total(s: Tensor, power: int) -> Tensor:
        """Sum gᵢ²/(μ − λᵢ)ᵖ: a component without gradient adds nothing, also where it has no gap."""
        return torch.where(squares == 0, 0.0, squares / (gaps + s[..., None]) ** power).sum(-1)

    low, high = torch.zeros_like(edge), squares.sum(-1).sqrt() / radius
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_long = total(middle, 2) > radius**2
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    bound: Tensor = total(high, 1) + (edge + high) * radius**2
    return 0.5 * bound


def interval_maximum(fn: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Return max over [low, high] of a function that acts elementwise on (GRID,) float64, by ever finer grids.

    >>> round(interval_maximum(lambda t: t - t**3, 0.0, 1.0), 12), round(2 / 27**0.5, 12)
    (0.38490017946, 0.38490017946)
    """
    for _ in range(ROUNDS):
        grid = torch.linspace(low, high, GRID, dtype=torch.float64)
        values = fn(grid)
        best = int(values.argmax())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, GRID - 1)])
    return float(values[best])
