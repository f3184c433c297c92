"""Training that ends at flat minima: the optimizer and its schedule."""

from torchflat.optim.normalized_gd import NormalizedGD
from torchflat.optim.power_decay import PowerDecayLR

__all__ = ["NormalizedGD", "PowerDecayLR"]
