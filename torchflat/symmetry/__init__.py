"""Couplings, conservation laws, the group action, and the flattest point of an orbit."""

from torchflat.symmetry.balance import Balanced, balance
from torchflat.symmetry.certificate import Certificate
from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.flattened import flattened
from torchflat.symmetry.flattest import Flattest, flattest
from torchflat.symmetry.flow import Flow, flow
from torchflat.symmetry.group import Group
from torchflat.symmetry.laws import Laws, laws
from torchflat.symmetry.linear import LinearLaw

__all__ = [
    "Balanced",
    "Certificate",
    "Coupling",
    "Flattest",
    "Flow",
    "Group",
    "Laws",
    "LinearLaw",
    "Member",
    "balance",
    "flattened",
    "flattest",
    "flow",
    "laws",
]
