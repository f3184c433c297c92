"""Approximate laws are a basis modulo the exact ones, whichever variables were free."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchflat.symmetry import Coupling, Laws, Member, laws
from torchflat.symmetry.modulo import modulo


class Gated(nn.Module):
    """A product of two linear layers, whose factors share a scale that a normalisation takes away as ε goes to 0."""

    def __init__(self, norm: nn.Module, blocks: int = 1) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(4, 5, bias=False) for _ in "ab")
        self.more = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(1, blocks))
        self.norm, self.out = norm, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(F.relu(self.a(x)) * F.relu(self.b(x)))
        for layer in self.more:
            h = self.norm(layer(h))
        return self.out(h)


def exponents(couplings: tuple[Coupling, ...], model: nn.Module) -> Tensor:
    """What each channel multiplies all entries by, as dense rows."""
    tensors = dict(model.named_parameters())
    rows = []
    for coupling in couplings:
        for channel in range(coupling.size):
            z = {coupling.name: torch.eye(coupling.size, dtype=torch.float64)[channel]}
            ones = {name: torch.ones(p.shape, dtype=torch.float64) for name, p in tensors.items()}
            moved = Laws((coupling,)).moved(ones, z)
            rows.append(torch.cat([moved[name].log().reshape(-1) for name in tensors]))
    return torch.stack(rows)


def rank(rows: Tensor) -> int:
    return int(torch.linalg.matrix_rank(rows))


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(5, eps=1e-5), nn.LayerNorm(5, elementwise_affine=False)], ids=["rms", "layer"]
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_scale_that_two_factors_share_is_one_law(norm: nn.Module, blocks: int) -> None:
    torch.manual_seed(0)
    model = Gated(norm, blocks)
    found = laws(model, torch.randn(3, 4))
    # One for each norm: that of the product, and that of each layer before one.
    assert sum(law.laws for law in found.approximate) == blocks
    assert all(found.measured[law.name] > 1e-9 for law in found.approximate)
    exact, approximate = exponents(found.couplings, model), exponents(found.approximate, model)
    assert rank(torch.cat([exact, approximate])) == len(exact) + len(approximate)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_what_is_left_completes_the_known(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str) -> Coupling:
        size, members = int(torch.randint(1, 4, (), generator=generator)), []
        for parameter, axis in (("a", 0), ("a", 1), ("b", 0), ("b", None)):
            if torch.rand((), generator=generator) < 0.6:
                shape = shapes[parameter]
                places = torch.randperm(shape.numel() if axis is None else shape[axis], generator=generator)[:size]
                index = places[:, None] if axis is None else places
                channel = torch.randint(size, (len(places),), generator=generator)
                exponent = float(torch.tensor([-1.0, 0.5, 1.0, 2.0])[torch.randint(4, (), generator=generator)])
                members.append(Member(parameter, axis, index, channel, exponent))
        return Coupling(name, size, tuple(members), "diagonal")

    shapes = {"a": torch.Size((3, 4)), "b": torch.Size((5,))}
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
    known, candidates = [tuple(drawn(f"{kind}{i}") for i in range(3)) for kind in "kc"]
    left = modulo(candidates, known, shapes)
    rows, all_rows = exponents(known, model), exponents((*known, *candidates), model)
    both = torch.cat([rows, exponents(tuple(left), model)]) if left else rows
    assert rank(both) == rank(all_rows) == rank(rows) + sum(coupling.size for coupling in left)
