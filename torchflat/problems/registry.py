"""The problems that ``torchflat selftest`` and the tests go through, by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchflat.problems.curves import Bilinear, Cubic, Parabola
from torchflat.problems.deep_linear import DeepLinear
from torchflat.problems.determinants import Determinants
from torchflat.problems.factorisation import Factorisation
from torchflat.problems.infinity import MaskedProduct, ReluPlateau, SigmoidPair
from torchflat.problems.polyhedral import AbsoluteFactorisation, MaximumOfThree
from torchflat.problems.problem import Problem
from torchflat.problems.quadratic import Quadratic
from torchflat.problems.regression import LinearRegression, SoftmaxRegression
from torchflat.problems.residual import Monomial, WeightedSquares
from torchflat.problems.valleys import EquivalentPoints, QuarticTie, ReluProduct, SixthOrderTie, SquareOrAbsolute

__all__ = ["PROBLEMS", "sines"]


def sines(rows: int, columns: int, s: float) -> Tensor:
    """Make the theory sheet's test matrix: entries sin(s + 1.3i + 2.7j + 0.5ij), i and j from 0, float64."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(columns, dtype=torch.float64)[None, :]
    return torch.sin(s + 1.3 * i + 2.7 * j + 0.5 * i * j)


def _linspace(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def _outlier(scale: float = 1.0, n: int = 400) -> Tensor:
    return scale * torch.cat([_linspace(0, 1, n - 1), torch.tensor([10.0], dtype=torch.float64)])


def _crowded_top(gap: float, n: int = 400) -> Tensor:
    """Put five eigenvalues at the top, a relative gap apart, above an even spread."""
    return torch.cat([_linspace(-0.2, 0.6, n - 5), 1 - gap * torch.arange(5, dtype=torch.float64)])


def _flattest_three_layers() -> DeepLinear:
    """Make the network of T064, W_k = R_{k+1} diag(2^{1/3}, c_k) R_kᵀ: λ₁ = 6·2^{4/3}, the least for its product."""
    bases = [_rotation(angle) for angle in (0.3, 1.1, -0.7, 2.0)]
    layers = [torch.diag(torch.tensor([2 ** (1 / 3), c], dtype=torch.float64)) for c in (1.4, 0.7, 0.5 / 0.98)]
    return DeepLinear.white(tuple(bases[k + 1] @ layer @ bases[k].T for k, layer in enumerate(layers)))


def _rotation(angle: float) -> Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)


def _flattest(problem: Problem) -> Problem:
    flattest = problem.flattest()
    assert flattest is not None
    return flattest


PROBLEMS: dict[str, Problem] = {
    "quadratic/outlier": Quadratic(_outlier()),
    "quadratic/gap-1e-2": Quadratic(_crowded_top(1e-2)),
    "quadratic/gap-1e-3": Quadratic(_crowded_top(1e-3)),
    "quadratic/indefinite": Quadratic(_linspace(-3, 2, 400)),
    "quadratic/negative": Quadratic(_linspace(-2, -0.1, 200)),
    "quadratic/low-rank": Quadratic(torch.cat([_linspace(1, 10, 10), torch.zeros(190).double()])),
    "quadratic/zero": Quadratic(torch.zeros(50)),
    "quadratic/tiny": Quadratic(_outlier(1e-30, 100)),
    "quadratic/huge": Quadratic(_outlier(1e30, 100)),
    "quadratic/identity": Quadratic(torch.ones(50)),
    "factorisation/sheet": Factorisation(
        torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    ),
    "factorisation/thin": Factorisation(sines(5, 1, 0.3), sines(1, 7, 1.1)),
    "factorisation/wide": Factorisation(sines(3, 6, 0.3), sines(6, 4, 1.1)),
    "factorisation/tall": Factorisation(sines(9, 3, 0.3), sines(3, 8, 1.1)),
    "factorisation/flat": _flattest(Factorisation(sines(3, 2, 0.3), sines(2, 4, 1.1))),
    "monomial/flattest": _flattest(Monomial((1.0, 1.0, 1.0), exponents=(1, 2, 3))),
    "monomial/sharp": Monomial((2.0, 0.5), exponents=(2, 2)),
    "monomial/product": Monomial((2.0, 0.5), exponents=(1, 1)),
    "monomial/quartic": Monomial((2.0, 0.5), exponents=(1, 1), power=4),
    "monomial/absolute": Monomial((2.0, 0.5), exponents=(1, 1), power=1),
    "squares/flattest": WeightedSquares((math.sqrt(0.5), 0.0, 0.0), weights=(2.0, 5.0, -1.0)),
    "squares/sharp": WeightedSquares((0.5, 0.5, math.sqrt(0.75)), weights=(2.0, 5.0, -1.0)),
    "squares/ellipse": WeightedSquares((0.5, 0.5), weights=(1.0, 3.0)),
    "squares/hyperbola": WeightedSquares((1.0, 0.0), weights=(1.0, -2.0)),
    "squares/cone": WeightedSquares((1.0, math.sqrt(2)), weights=(2.0, -1.0), level=0.0, power=1),
    "squares/cone-tip": WeightedSquares((0.0, 0.0), weights=(2.0, -1.0), level=0.0, power=1),
    "curve/parabola": Parabola((0.5, 0.25)),
    "curve/cubic": _flattest(Cubic((1.0, 0.0))),
    "curve/bilinear": Bilinear((1.0, 0.0, 0.5, 0.0), matrix=((2.0, 1.0), (0.0, 3.0))),
    "valley/minimum": SquareOrAbsolute((0.0, 0.0)),
    "valley/quartic-tie": QuarticTie((2.0, 0.0)),
    "valley/sixth-tie": SixthOrderTie((0.0, 0.0, 3.0)),
    "valley/equivalent": EquivalentPoints((0.0, 0.0, 2.0)),
    "valley/relu-active": ReluProduct((0.5, 2.0, 0.0)),
    "valley/relu-edge": ReluProduct((0.0, 0.3, 1.0)),
    "absolute/vector": _flattest(AbsoluteFactorisation((1.0, -2.0, 1.0), ((1.0,), (-2.0,)))),
    "absolute/rank-one": AbsoluteFactorisation.of(sines(2, 1, 0.3), sines(1, 3, 1.1)),
    "absolute/square": AbsoluteFactorisation.of(sines(2, 2, 0.3), sines(2, 2, 1.1)),
    "absolute/maximum": MaximumOfThree((2.0, 0.5, 0.5, 2.0)),
    "determinants/flat": Determinants((0.0, 0.0, 1.0, 0.0, 0.0, 1.0)),
    "determinants/sharp": Determinants((0.0, 0.0, 2.0, 0.0, 0.0, 0.5)),
    "deep-linear/chain": DeepLinear.chain((-2.0, 1.25, 1.0), second_moment=1.7),
    "deep-linear/flattest": _flattest_three_layers(),
    "deep-linear/canonical": _flattest(DeepLinear.white((sines(3, 2, 0.2), sines(3, 3, 0.9), sines(2, 3, 1.7)))),
    "deep-linear/sharp": DeepLinear((sines(4, 3, 0.2), sines(5, 4, 0.9), sines(2, 5, 1.7)), sines(30, 3, 2.1)),
    "infinity/masked": MaskedProduct((0.0, 0.0, 0.0, 0.0)),
    "infinity/relu": ReluPlateau((-1.0, 0.5)),
    "infinity/sigmoid": SigmoidPair((0.0, 0.0), targets=(1.0, -1.0)),
    "regression/linear": LinearRegression(sines(33, 12, 0.4)),
    "regression/softmax": SoftmaxRegression(sines(33, 12, 0.4), classes=4),
    "regression/many-rows": SoftmaxRegression(sines(4000, 20, 0.4) * torch.tensor([3.0] + 19 * [1.0]), classes=2),
}
