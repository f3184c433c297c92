"""How flat f is around a point: how much it can change within a distance, and which of two points is flatter."""

from torchflat.flatness.derivatives import DerivativeNorm, derivative_norm
from torchflat.flatness.level import LevelDistance, level_distance
from torchflat.flatness.order import Order
from torchflat.flatness.preorder import Comparison, FlatAgainst, compare, is_flat_against
from torchflat.flatness.profiles import Verdict
from torchflat.flatness.variation import Variation, variation

__all__ = [
    "Comparison",
    "DerivativeNorm",
    "FlatAgainst",
    "LevelDistance",
    "Order",
    "Variation",
    "Verdict",
    "compare",
    "derivative_norm",
    "is_flat_against",
    "level_distance",
    "variation",
]
