"""Functions with known answers: what the numbers of every other room are checked against."""

from torchflat.problems.curves import Bilinear, Cubic, Parabola
from torchflat.problems.deep_linear import DeepLinear
from torchflat.problems.determinants import Determinants
from torchflat.problems.factorisation import Factorisation
from torchflat.problems.infinity import EscapingFunction, MaskedProduct, ReluPlateau, SigmoidPair
from torchflat.problems.polyhedral import AbsoluteFactorisation, MaximumOfThree, Polyhedral
from torchflat.problems.problem import Function, Problem
from torchflat.problems.quadratic import Quadratic
from torchflat.problems.registry import PROBLEMS, sines
from torchflat.problems.regression import LinearRegression, SoftmaxRegression
from torchflat.problems.residual import Monomial, Residual, WeightedSquares
from torchflat.problems.samplers import mixed, nudged, random_minimiser
from torchflat.problems.valleys import EquivalentPoints, QuarticTie, ReluProduct, SixthOrderTie, SquareOrAbsolute

__all__ = [
    "PROBLEMS",
    "AbsoluteFactorisation",
    "Bilinear",
    "Cubic",
    "DeepLinear",
    "Determinants",
    "EquivalentPoints",
    "EscapingFunction",
    "Factorisation",
    "Function",
    "LinearRegression",
    "MaskedProduct",
    "MaximumOfThree",
    "Monomial",
    "Parabola",
    "Polyhedral",
    "Problem",
    "Quadratic",
    "QuarticTie",
    "ReluPlateau",
    "ReluProduct",
    "Residual",
    "SigmoidPair",
    "SixthOrderTie",
    "SoftmaxRegression",
    "SquareOrAbsolute",
    "WeightedSquares",
    "mixed",
    "nudged",
    "random_minimiser",
    "sines",
]
