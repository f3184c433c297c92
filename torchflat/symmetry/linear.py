"""Linear laws: sums of parameters that no gradient changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat.symmetry.coupling import Member

__all__ = ["LinearLaw"]


@dataclass(frozen=True, eq=False)
class LinearLaw:
    """Directions a in which parameters can be shifted by a constant without any effect: aᵀθ is conserved.

    The conserved numbers are ℓ_c = Σ exponent · (sum of the entries of each slice of channel c), (size,): the
    exponent of a member is a weight here. Conserved by plain gradient steps of any size, up to rounding.

    >>> columns = Member("w", 1, torch.arange(3), torch.arange(3), 1.0)
    >>> LinearLaw("1ᵀw", 3, (columns,)).value({"w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}).tolist()
    [5.0, 7.0, 9.0]
    """

    name: str
    size: int
    members: tuple[Member, ...]

    @property
    def laws(self) -> int:
        """Number of independent conserved numbers."""
        return self.size

    def value(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return ℓ, in float64, of the parameters, or of anything in their shapes: that of a gradient is zero."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for member in self.members:
            slices = member.slices(tensors[member.parameter].detach()).double().cpu()
            total.index_add_(0, member.channel, slices.sum(1), alpha=member.exponent)
        return total
