"""The functions of *Implicit regularization of normalized gradient descent*, with their flat minima (T039–T054).

The exponents, weights and matrices are those of the theory sheet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.descents import Scalar, flat_set, normalized, projected, residuals
from torchflat.errors import VerificationError
from torchflat.problems import (
    AbsoluteFactorisation,
    Bilinear,
    Cubic,
    Factorisation,
    Function,
    Monomial,
    Parabola,
    QuarticTie,
    WeightedSquares,
)
from torchflat.problems.residual import Residual

__all__ = [
    "ABSOLUTE",
    "CLARKE",
    "CUBIC",
    "FORMULAS",
    "PLANE",
    "PRODUCT",
    "QUARTIC",
    "TARGET",
    "VALLEYS",
    "Valley",
    "absolute_valley",
    "clarke",
    "factorisations",
    "factors",
    "gap",
]

PRODUCT = Monomial((1.0, 1.0), (1, 1))

# Smooth, with a Lyapunov function of order 2.
VALLEYS: dict[str, Residual] = {
    "product": PRODUCT,
    "parabola": Parabola((0.0, 0.0)),
    "ellipse": WeightedSquares((1.0, 0.0), (1.0, 3.0)),
    "hyperbola": WeightedSquares((1.0, 0.0), (1.0, -2.0)),
    "squares": WeightedSquares((math.sqrt(0.5), 0.0, 0.0, 0.0), (2.0, 5.0, -1.0, 3.0)),
    "bilinear": Bilinear((1.0, 0.0, 0.5, 0.0), ((2.0, 1.0), (0.0, 3.0))),
    "monomial 1 2": Monomial((1.0, 1.0), (1, 2)),
    "monomial 1 1 1": Monomial((1.0, 1.0, 1.0), (1, 1, 1)),
    "monomial 1 2 3": Monomial((1.0, 1.0, 1.0), (1, 2, 3)),
}

CUBIC, QUARTIC = Cubic((1.0, 0.0)), QuarticTie((0.0, 0.0))
ABSOLUTE = {"absolute 1 1": (1.0, 1.0), "absolute 1 2": (1.0, 2.0), "absolute 1 0": (1.0, 0.0)}
CLARKE = "absolute 1 0, 0 on the kink"

FORMULAS = {
    "product": "(x₁x₂ − 1)²",
    "parabola": "(x₂ − x₁²)²",
    "ellipse": "(x₁² + 3x₂² − 1)²",
    "hyperbola": "(x₁² − 2x₂² − 1)²",
    "squares": "(2x₁² + 5x₂² − x₃² + 3x₄² − 1)²",
    "bilinear": "(xᵀAy − 1)²",
    "monomial 1 2": "(x₁x₂² − 1)²",
    "monomial 1 1 1": "(x₁x₂x₃ − 1)²",
    "monomial 1 2 3": "(x₁x₂²x₃³ − 1)²",
    "cubic": "(x₁³ + x₂³ − 1)²",
    "quartic": "x₂² + x₁²x₂⁴",
    "absolute 1 1": "|x₁x₃ − 1| + |x₂x₃ − 1|",
    "absolute 1 2": "|x₁x₃ − 1| + |x₂x₃ − 2|",
    "absolute 1 0": "|x₁x₃ − 1| + |x₂x₃|",
}

# Those of two variables, with starts for a picture.
PLANE: dict[str, tuple[Function, tuple[float, float]]] = {
    "product": (PRODUCT, (3.0, 0.6)),
    "parabola": (VALLEYS["parabola"], (1.4, 2.6)),
    "ellipse": (VALLEYS["ellipse"], (0.3, 0.8)),
    "hyperbola": (VALLEYS["hyperbola"], (2.2, 1.1)),
    "cubic": (CUBIC, (1.1, 0.2)),
    "quartic": (QUARTIC, (3.2, 0.6)),
}

TARGET = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))


@dataclass(frozen=True)
class Valley:
    """A function of n variables, the residuals that vanish in its valley, and its flat minima, (count, n)."""

    function: Scalar
    residuals: Scalar
    flat: Tensor

    @classmethod
    def of(cls, name: str) -> Valley:
        """Return one of the examples."""
        if name in VALLEYS or name == "cubic":
            problem = VALLEYS.get(name, CUBIC)
            flat = flat_set(problem) if name in VALLEYS else torch.full((1, 2), 0.5 ** (1 / 3), dtype=torch.float64)
            return cls(problem.function, residuals(problem), flat)
        if name == "quartic":
            return cls(QUARTIC.function, lambda x: x[1:], torch.zeros(1, 2, dtype=torch.float64))
        absolute, flat = absolute_valley(*ABSOLUTE["absolute 1 0" if name == CLARKE else name])
        return cls(clarke if name == CLARKE else absolute.function, absolute.residuals, flat)


def absolute_valley(a: float, b: float) -> tuple[AbsoluteFactorisation, Tensor]:
    """Make |x₁x₃ − a| + |x₂x₃ − b| and its flat set by T031: ±(at, bt, 1/t), t = 2^¼/√(|a| + |b|)."""
    t = 2**0.25 / math.sqrt(abs(a) + abs(b))
    flat = torch.tensor([[a * t, b * t, 1 / t]], dtype=torch.float64)
    return AbsoluteFactorisation((a, b, 1.0), ((a,), (b,))), torch.cat([flat, -flat])


def clarke(x: Tensor) -> Tensor:
    """Compute |x₁x₃ − 1| + |x₂x₃| with the derivative 0 that autograd gives |·| at 0."""
    return (x[0] * x[2] - 1).abs() + (x[1] * x[2]).abs()


def factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return X and Y, (2, 2), of (8,)."""
    return x[:4].view(2, 2), x[4:].view(2, 2)


def gap(x: Tensor) -> Tensor:
    """Return XY − M, flat, for M = ``TARGET``."""
    X, Y = factors(x)
    return (X @ Y - TARGET).flatten()


def factorisations(seed: int, count: int, steps: int) -> list[Factorisation]:
    """Take Gaussian starts to the end of a normalised descent on ½‖XY − M‖², and on to XY = M."""
    start = torch.tensor(np.random.default_rng(seed).normal(size=(count, 8)))
    x = projected(gap, normalized(lambda x: 0.5 * (gap(x) ** 2).sum(), start, steps))
    if not float(torch.func.vmap(gap)(x).abs().max()) <= 1e-12:
        raise VerificationError("the projection onto XY = M did not converge: take more steps first")
    return [Factorisation(*factors(row)) for row in x]
