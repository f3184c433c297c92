"""Couplings, conservation laws, the group action, and the flattest point of an orbit."""

from torchflat.symmetry.balance import Balanced, balance
from torchflat.symmetry.certificate import Certificate
from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.discover import Discovery, LawCount, discover, law_count
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
    "Discovery",
    "Flattest",
    "Flow",
    "Group",
    "LawCount",
    "Laws",
    "LinearLaw",
    "Member",
    "balance",
    "discover",
    "flattened",
    "flattest",
    "flow",
    "law_count",
    "laws",
]
