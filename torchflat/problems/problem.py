"""What a problem with a known answer is."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from torchflat.objective import Objective

__all__ = ["Function", "Problem", "same", "spectral_norm", "with_zeros"]

# How far two numbers that would be equal without rounding may be from each other.
TOLERANCE = 1e-9

Same = TypeVar("Same", bound="Function")


class Problem(ABC):
    """A function f and a point x at which something is known about f: its spectrum, its variation, its flat minima.

    A subclass is a small frozen dataclass: its fields choose one function and one point. It says in ``source`` where
    its formulas come from, gives :meth:`objective`, and overrides what is known; the defaults say "not known" by None.
    An answer is None as well where it is known at other points only.

    Every answer is computed from the formula, never from the function that :meth:`objective` evaluates.
    """

    source: ClassVar[str]

    @property
    def rows(self) -> int:
        """How many rows of data f is a mean over; 1 where there is no data."""
        return 1

    @abstractmethod
    def objective(self) -> Objective:
        """Return f at x, anew: nothing has been spent on it yet."""

    def eigenvalues(self) -> Tensor | None:
        """Return all eigenvalues of H = ∇²f(x), ascending, (n,) float64; None where f has no second derivative."""
        return None

    def sharpness(self) -> float | None:
        """Return λ₁, the largest eigenvalue."""
        values = self.eigenvalues()
        return None if values is None else float(values[-1])

    def trace(self) -> float | None:
        """Return tr H, the sum of the eigenvalues."""
        values = self.eigenvalues()
        return None if values is None else float(values.sum())

    def block_sharpness(self) -> Mapping[str, float]:
        """Return λ₁ of the diagonal block of H of each module, by the module's name; empty if not known."""
        return {}

    def variation(self, radius: float) -> float | None:
        """Return f°(x, r) = max over |u| ≤ r of |f(x + u) − f(x)|, r > 0; None for r that no formula is known for."""
        return None

    def order(self) -> tuple[float, float] | None:
        """Return (p, a) with f°(x, r) = a·rᵖ + o(rᵖ)."""
        return None

    def flat(self) -> bool | None:
        """Say whether x is a flat minimum: f°(x, r) ≤ f°(y, r) for all small r and all y near x with f(y) = f(x)."""
        return None

    def flattest(self) -> Problem | None:
        """Return the same function at a flattest point of the same level."""
        return None

    def conserved(self) -> Tensor | None:
        """Return C(x), what the gradient flow of f keeps; not known to be all that it keeps."""
        return None


@dataclasses.dataclass(frozen=True)
class Function(Problem):
    """A function of a few variables, at a ``point``: what is known about it may be known on its zero level only."""

    point: tuple[float, ...]

    @abstractmethod
    def function(self, x: Tensor) -> Tensor:
        """Return f(x), 0-dim, of x (n,)."""

    def objective(self) -> Objective:
        """Return f as a function of the flat vector, in float64."""
        return Objective.from_function(self.function, torch.tensor(self.point, dtype=torch.float64))

    def at(self: Same, x: Sequence[float] | Tensor) -> Same:
        """Return the same function at another point."""
        return dataclasses.replace(self, point=tuple(map(float, x)))


def same(a: float, b: float) -> bool:
    """Say whether a and b are equal but for rounding.

    >>> same(0.1 + 0.2, 0.3), same(1e-12, 0.0), same(1.0, 1.0001)
    (True, True, False)
    """
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def spectral_norm(A: Tensor) -> float:
    """Return ‖A‖₂, computed in float64.

    >>> spectral_norm(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
    3.0
    """
    return float(torch.linalg.matrix_norm(A.double(), 2))


def with_zeros(values: Tensor, n: int) -> Tensor:
    """Return the eigenvalues of JᵀJ (n × n), ascending, from those of JJᵀ: the two differ by zeros only.

    >>> with_zeros(torch.tensor([3.0, 0.0, 1.0]), 2), with_zeros(torch.tensor([3.0]), 2)
    (tensor([1., 3.]), tensor([0., 3.]))
    """
    padded = torch.cat([values.flatten(), values.new_zeros(n)])
    return padded.sort().values[-n:]
