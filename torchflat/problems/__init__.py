"""Functions with known answers: what the numbers of every other room are checked against."""

from torchflat.problems.deep_linear import DeepLinear
from torchflat.problems.factorisation import Factorisation
from torchflat.problems.problem import Problem
from torchflat.problems.quadratic import Quadratic
from torchflat.problems.registry import PROBLEMS, sines
from torchflat.problems.regression import LinearRegression, SoftmaxRegression
from torchflat.problems.residual import Monomial, WeightedSquares

__all__ = [
    "PROBLEMS",
    "DeepLinear",
    "Factorisation",
    "LinearRegression",
    "Monomial",
    "Problem",
    "Quadratic",
    "SoftmaxRegression",
    "WeightedSquares",
    "sines",
]
