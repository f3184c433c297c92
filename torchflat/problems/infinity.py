"""Functions on which descent can run to infinity, or onto a plateau, above the infimum."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchflat.problems.kinks import positive_part
from torchflat.problems.problem import Function

__all__ = ["EscapingFunction", "MaskedProduct", "ReluPlateau", "SigmoidPair"]


@dataclass(frozen=True)
class EscapingFunction(Function):
    """f with a path along which it tends to a value ``stuck`` above ``infimum``, or that it takes on a plateau."""

    @abstractmethod
    def infimum(self) -> float:
        """Return inf f."""

    @abstractmethod
    def stuck(self) -> float:
        """Return the value that descent can be left with."""

    @abstractmethod
    def escaped(self, t: float) -> EscapingFunction:
        """Return the same function at a point of the path: f tends to the stuck value as t → ∞."""


@dataclass(frozen=True)
class MaskedProduct(EscapingFunction):
    """f(x, y) = (x₁y₁ − 1)² + (x₂y₁ − 1)² + (x₂y₂ − 1)²: a rank-one product with one entry left out.

    f is 0 on (t, t, 1/t, 1/t), 2 at (t, 0, 1/t, −1/t) and (t, −t, 0, −1/t), 3 at 0: these three are strict saddles.
    Descent can follow (t, −1/t, 1/t, −t), where f = (1 + 1/t²)². C = |x|² − |y|². The point is x₁, x₂, y₁, y₂.
    """

    source: ClassVar[str] = "T073, T074"

    def function(self, x: Tensor) -> Tensor:
        """Return f."""
        return (x[0] * x[2] - 1) ** 2 + (x[1] * x[2] - 1) ** 2 + (x[1] * x[3] - 1) ** 2

    def eigenvalues(self) -> Tensor | None:
        """Return ±(√5 + 1), ±(√5 − 1), at 0."""
        if any(self.point):
            return None
        sizes = torch.tensor([math.sqrt(5) - 1, math.sqrt(5) + 1], dtype=torch.float64)
        return torch.cat([-sizes.flip(0), sizes])

    def infimum(self) -> float:
        """Return 0."""
        return 0.0

    def stuck(self) -> float:
        """Return 1; the source says 2."""
        return 1.0

    def escaped(self, t: float) -> MaskedProduct:
        """Take (t, −1/t, 1/t, −t)."""
        return self.at((t, -1 / t, 1 / t, -t))

    def conserved(self) -> Tensor:
        """Return x₁² + x₂² − y₁² − y₂²."""
        a, b, c, d = self.point
        return torch.tensor(a**2 + b**2 - c**2 - d**2, dtype=torch.float64)


@dataclass(frozen=True)
class ReluPlateau(EscapingFunction):
    """f(x) = (x₂ max{x₁, 0} − 1)²: 1 on x₁ < 0, where f° = 0 up to r = |x₁|. C = x₁² − x₂² for x₁ > 0."""

    source: ClassVar[str] = "T076b"

    def function(self, x: Tensor) -> Tensor:
        """Return f."""
        return (x[1] * positive_part(x[0]) - 1) ** 2

    def eigenvalues(self) -> Tensor | None:
        """Return zeros on the plateau."""
        return torch.zeros(2, dtype=torch.float64) if self.point[0] < 0 else None

    def variation(self, radius: float) -> float | None:
        """Return 0 on the plateau, up to its edge."""
        return 0.0 if radius <= -self.point[0] else None

    def flat(self) -> bool | None:
        """Say yes on the plateau."""
        return True if self.point[0] < 0 else None

    def infimum(self) -> float:
        """Return 0."""
        return 0.0

    def stuck(self) -> float:
        """Return 1."""
        return 1.0

    def escaped(self, t: float) -> ReluPlateau:
        """Take (−t, 0)."""
        return self.at((-t, 0.0))

    def conserved(self) -> Tensor:
        """Return x₁² − x₂², which on the plateau is kept as everything is."""
        return torch.tensor(self.point[0] ** 2 - self.point[1] ** 2, dtype=torch.float64)


@dataclass(frozen=True)
class SigmoidPair(EscapingFunction):
    """f(w) = ½[(w₂σ(w₁) − a)² + (w₂σ(−w₁) − b)²], σ the logistic function, with targets a > 0 > b.

    f tends to b²/2 as w₁ → ∞, w₂ → a, and to a²/2 as w₁ → −∞, w₂ → b; the smaller is the infimum. For fixed w₁ the best
    w₂ is (aσ(w₁) + bσ(−w₁))/(σ(w₁)² + σ(−w₁)²): for (1, −1) that is tanh w₁, with f = 1/(1 + tanh²(w₁/2)), and 0 is the
    only critical point, a strict saddle.
    """

    source: ClassVar[str] = "T076, T077"

    targets: tuple[float, float]

    def function(self, x: Tensor) -> Tensor:
        """Return f."""
        first, second = self.targets
        return 0.5 * ((x[1] * torch.sigmoid(x[0]) - first) ** 2 + (x[1] * torch.sigmoid(-x[0]) - second) ** 2)

    def eigenvalues(self) -> Tensor | None:
        """Return (1 ± √(1 + (a − b)²))/4, at 0."""
        root = math.hypot(1, self.targets[0] - self.targets[1])
        return None if any(self.point) else torch.tensor([(1 - root) / 4, (1 + root) / 4], dtype=torch.float64)

    def infimum(self) -> float:
        """Return min{a², b²}/2."""
        return min(target**2 for target in self.targets) / 2

    def stuck(self) -> float:
        """Return max{a², b²}/2."""
        return max(target**2 for target in self.targets) / 2

    def escaped(self, t: float) -> SigmoidPair:
        """Take w₁ = ±t, on the side of the larger value, and the best w₂ there."""
        first, second = self.targets
        return self.at((t if abs(first) <= abs(second) else -t, 0.0)).best_factor()

    def best_factor(self) -> SigmoidPair:
        """Return the same function at the same w₁ and the best w₂."""
        up, down = 1 / (1 + math.exp(-self.point[0])), 1 / (1 + math.exp(self.point[0]))
        best = (self.targets[0] * up + self.targets[1] * down) / (up**2 + down**2)
        return self.at((self.point[0], best))
