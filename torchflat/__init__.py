"""torchflat: how sharp is the minimum that a network was trained to, in numbers that carry an interval."""

from torchflat.objective import Objective

__version__ = "0.1.0"

__all__ = ["Objective"]
