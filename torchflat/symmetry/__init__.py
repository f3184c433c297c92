"""Couplings, conservation laws, the group action, and the flattest point of an orbit."""

from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.flattest import Certificate, Flattest, flattest
from torchflat.symmetry.group import Group

__all__ = ["Certificate", "Coupling", "Flattest", "Group", "Member", "flattest"]
