"""The table of rules: importing this package fills it."""

from torchflat.symmetry.rules import attention, contractions, elementwise, moves, normalisations, reductions

__all__ = ["attention", "contractions", "elementwise", "moves", "normalisations", "reductions"]
