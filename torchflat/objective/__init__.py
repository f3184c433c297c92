"""f, ∇f and H·V over data at a point."""

from torchflat.objective.objective import Objective

__all__ = ["Objective"]
