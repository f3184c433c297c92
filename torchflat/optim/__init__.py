"""Training that ends at flat minima: the optimizer and its schedule, and what happens on the way."""

from torchflat.optim.alarms import Alarm, TrackerWarning
from torchflat.optim.normalized_gd import NormalizedGD
from torchflat.optim.power_decay import PowerDecayLR
from torchflat.optim.tracker import Tracker

__all__ = ["Alarm", "NormalizedGD", "PowerDecayLR", "Tracker", "TrackerWarning"]
