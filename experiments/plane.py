"""Paths of optimizers on functions of a few variables, and pictures of functions of two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.optim import Optimizer

from torchflat.drawing import GREY

__all__ = ["levels", "path"]

FAR = 1e6


def path(
    function: Callable[[Tensor], Tensor],
    start: Sequence[float],
    make: Callable[[list[Tensor]], Optimizer],
    steps: int,
) -> list[list[float]]:
    """Return the iterates x_0 … x_steps of an optimizer in float64; fewer if they leave every reasonable region."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    points = [x.detach().tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        function(x).backward()
        optimizer.step()
        points.append(x.detach().tolist())
        if not float(x.detach().abs().max()) < FAR:
            break
    return points


def levels(
    axes: Axes,
    function: Callable[[Tensor], Tensor],
    x: tuple[float, float],
    y: tuple[float, float],
    at: Iterable[float] = (0.01, 0.05, 0.2, 0.5, 1, 2, 4, 8, 16),
    colour: str = GREY,
    width: float = 0.6,
) -> None:
    """Draw level sets of a function of two variables."""
    across, up = torch.linspace(*x, 241, dtype=torch.float64), torch.linspace(*y, 241, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(across, up, indexing="xy")).reshape(2, -1)
    values = torch.vmap(function, in_dims=1)(points).reshape(len(up), len(across))
    axes.contour(
        across.numpy(), up.numpy(), values.numpy(), levels=sorted(at), colors=colour, linewidths=width, alpha=0.7
    )
    axes.set(xlim=x, ylim=y, xlabel="x₁", ylabel="x₂")
    axes.grid(False)
