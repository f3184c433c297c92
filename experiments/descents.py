"""Many descents at once with the library's optimizer, and how far from the flat minima they end."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchflat.optim import NormalizedGD
from torchflat.problems import Function, Polyhedral
from torchflat.problems.residual import Residual

__all__ = ["Scalar", "distance", "flat_set", "gradients", "normalized", "plain", "projected", "residuals", "starts"]

Scalar = Callable[[Tensor], Tensor]


def starts(n: int, count: int = 100) -> Tensor:
    """Draw the sheet's starts, (count, n)."""
    return torch.tensor(np.random.default_rng(0).uniform(-2, 2, (count, n)))


def gradients(f: Scalar, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Trace autograd's gradient of f at every row of x, (count, n), into one graph: the same operations, unwrapped."""
    traced: Callable[[Tensor], Tensor] = make_fx(lambda rows: torch.func.vmap(torch.func.grad(f))(rows))(x)
    return traced


def normalized(
    f: Scalar, x: Tensor, steps: int, lr: float = 1.0, decay: float = 0.25, stopped: Tensor | None = None
) -> Tensor:
    """Descend from every row of x: the rows are parameters of their own, each divided by its own norm.

    ``stopped``, (count,) bool, is set where a gradient was exactly 0 on the way.
    """
    x = x.clone()
    gradient = torch.zeros_like(x)
    rows = [row.requires_grad_() for row in x.unbind()]
    for row, share in zip(rows, gradient.unbind(), strict=True):
        row.grad = share
    optimizer = NormalizedGD(rows, lr=lr, decay=decay, norm="tensor")
    compute = gradients(f, x.detach())
    for _ in range(steps):
        gradient.copy_(compute(x.detach()))
        if stopped is not None:
            stopped |= (gradient == 0).all(dim=1)
        optimizer.step()
    return x.detach()


def plain(f: Scalar, x: Tensor, steps: int, lr: float, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Take steps of gradient descent, of size ``lr``, from every row of x; ``watch`` sees k and x before each."""
    x = x.clone().requires_grad_()
    compute = gradients(f, x.detach())
    optimizer = torch.optim.SGD([x], lr=lr)
    for step in range(steps):
        if watch:
            watch(step, x.detach())
        x.grad = compute(x.detach())
        optimizer.step()
    return x.detach()


def projected(residuals: Scalar, x: Tensor) -> Tensor:
    """Move every row to F = 0 by Gauss–Newton steps of least norm: what is left is the error along the valley."""
    values, slopes = torch.func.vmap(residuals), torch.func.vmap(torch.func.jacrev(residuals))
    for _ in range(60):
        x = x - (torch.linalg.pinv(slopes(x)) @ values(x)[:, :, None])[:, :, 0]
    return x


def residuals(problem: Residual | Polyhedral) -> Scalar:
    """Return F of the problem, (k,), as a function of x."""
    return problem.residuals if isinstance(problem, Polyhedral) else lambda x: problem.residual(x)[None]


def flat_set(problem: Function) -> Tensor:
    """Return all changes of signs of the flattest point that are flat minima too, (count, n)."""
    flattest = problem.flattest()
    assert isinstance(flattest, Function)
    signs = itertools.product((1.0, -1.0), repeat=len(flattest.point))
    points = {flattest.at([s * x for s, x in zip(sign, flattest.point, strict=True)]) for sign in signs}
    return torch.tensor([p.point for p in points if p.flat()], dtype=torch.float64)


def distance(x: Tensor, points: Tensor) -> Tensor:
    """Return the distance of every row of x to the nearest of the points."""
    return torch.linalg.vector_norm(x[:, None] - points[None], dim=2).amin(dim=1)
