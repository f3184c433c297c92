"""Couplings, conservation laws, the group action, and the flattest point of an orbit."""

from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.laws import Laws, laws
from torchflat.symmetry.linear import LinearLaw

__all__ = ["Coupling", "Laws", "LinearLaw", "Member", "laws"]
