"""Which of two points is flatter: x ⪯ y if f°(x, r) ≤ f°(y, r) for all small r."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.flatness.profiles import Side, at_small_radii, on_range
from torchflat.flatness.variation import Search, Variation
from torchflat.objective import Objective
from torchflat.result import Answer, Cost
from torchflat.spectrum.student import t_quantile

__all__ = ["Comparison", "Verdict", "compare", "is_flat_against"]

# Groups of rows from which the error of sampling the data is told, and the fewest rows for that.
GROUPS = 64
# Losses this close, relative to the larger, are one level.
LEVEL = 1e-2


class Verdict(enum.Enum):
    """Which point is flatter. The value of a member is the sentence that explains it."""

    FLATTER = "the first point is flatter"
    SHARPER = "the first point is sharper"
    EQUIVALENT = "the two points are equally flat, within the tolerance"
    UNDECIDED = "what was found does not decide"

    @property
    def mirrored(self) -> Verdict:
        """The verdict on the same points in the other order.

        >>> Verdict.FLATTER.mirrored
        <Verdict.SHARPER: 'the first point is sharper'>
        """
        return {Verdict.FLATTER: Verdict.SHARPER, Verdict.SHARPER: Verdict.FLATTER}.get(self, self)
