"""Functions with kinks, written so that their derivative at the kink is one of those beside it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["absolute", "largest", "positive_part"]


def absolute(t: Tensor) -> Tensor:
    """Return |t|, elementwise, with derivative +1 at t = 0.

    Autograd takes 0 there, which is no limit of derivatives at points nearby: descent by normalised gradients then
    stays on the kink and drifts to a wrong point (T052b). The others here are for the same reason.

    >>> t = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    >>> torch.autograd.grad(absolute(t).sum(), t)[0]
    tensor([-1.,  1.,  1.])
    """
    return torch.where(t >= 0, t, -t)


def positive_part(t: Tensor) -> Tensor:
    """Return max{t, 0}, elementwise, with derivative 1 at t = 0."""
    return torch.where(t >= 0, t, 0.0)


def largest(values: Tensor) -> Tensor:
    """Return the largest of the values, with the derivative of one of them where several are.

    >>> values = torch.ones(3, requires_grad=True)
    >>> float(torch.autograd.grad(largest(values), values)[0].max())
    1.0
    """
    return values.max(dim=0).values
