"""What a problem with a known answer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.objective import Objective

__all__ = ["Problem", "with_zeros"]


class Problem(ABC):
    """A function f and a point x at which the spectrum of H = ∇²f(x) is known without computing H.

    A subclass is a small frozen dataclass: its fields choose one function and one point. It says in ``source`` where
    its formulas come from, and gives :meth:`objective` and :meth:`eigenvalues`; the other answers follow from these,
    and are overridden where a formula of their own is a better oracle. Whatever else is known about the function
    (curvature of single blocks, and in time its flat points, laws and variation) is one more method here, with a
    default that says "not known".

    Every answer is computed from the formula, never from the function that :meth:`objective` evaluates.
    """

    source: ClassVar[str]

    @abstractmethod
    def objective(self) -> Objective:
        """Return f at x, anew: nothing has been spent on it yet."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues of H, ascending, (n,) float64."""

    def sharpness(self) -> float:
        """Return λ₁, the largest eigenvalue."""
        return float(self.eigenvalues()[-1])

    def trace(self) -> float:
        """Return tr H, the sum of the eigenvalues."""
        return float(self.eigenvalues().sum())

    def block_sharpness(self) -> Mapping[str, float]:
        """Return λ₁ of the diagonal block of H of each module, by the module's name; empty if not known."""
        return {}


def with_zeros(values: Tensor, n: int) -> Tensor:
    """Return the eigenvalues of JᵀJ (n × n), ascending, from those of JJᵀ: the two differ by zeros only.

    >>> with_zeros(torch.tensor([3.0, 0.0, 1.0]), 2), with_zeros(torch.tensor([3.0]), 2)
    (tensor([1., 3.]), tensor([0., 3.]))
    """
    padded = torch.cat([values.flatten(), values.new_zeros(n)])
    return padded.sort().values[-n:]
