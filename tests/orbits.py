"""Couplings of small networks, written out by hand, and dense references for what moves along their orbits."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from torchflat import Objective
from torchflat.symmetry import Coupling, Group, Member

__all__ = ["chain", "entries", "full", "hessian", "randomly_moved", "relu_classifier"]


def chain(model: nn.Sequential, kind: str = "diagonal") -> list[Coupling]:
    """Couple each linear layer of a stack to the next one: rows and biases write, columns read."""
    names = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    couplings = []
    for before, after in itertools.pairwise(names):
        size = model.get_submodule(before).weight.shape[0]  # type: ignore[union-attr]
        rows = torch.arange(size)
        members = [Member(f"{before}.weight", 0, rows, rows, 1.0), Member(f"{after}.weight", 1, rows, rows, -1.0)]
        if model.get_submodule(before).bias is not None:  # type: ignore[union-attr]
            members.append(Member(f"{before}.bias", 0, rows, rows, 1.0))
        couplings.append(Coupling(f"{before} → {after}", size, tuple(members), kind))  # type: ignore[arg-type]
    return couplings


def full(size: int, writer: str, writer_axis: int, reader: str, reader_axis: int, name: str = "full") -> Coupling:
    """Mix channels by GL(size)."""
    rows = torch.arange(size)
    members = Member(writer, writer_axis, rows, rows, 1.0), Member(reader, reader_axis, rows, rows, -1.0)
    return Coupling(name, size, members, "full")


def entries(name: str, writers: list[int], readers: list[int], powers: tuple[float, float] = (1.0, 1.0)) -> Coupling:
    """Couple entries of the one tensor ``x`` of a function, one channel for each pair."""
    channels = torch.arange(len(writers))
    members = (
        Member("x", None, torch.tensor(writers)[:, None], channels, powers[0]),
        Member("x", None, torch.tensor(readers)[:, None], channels, -powers[1]),
    )
    return Coupling(name, len(writers), members, "diagonal")


def relu_classifier(
    seed: int = 0, widths: tuple[int, ...] = (4, 6, 5, 3), dtype: torch.dtype = torch.float64
) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """A small ReLU network with biases, and rows of data for it."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)
    X = torch.randn(24, widths[0], generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(widths[-1], (24,), generator=generator)
    return model, (X, labels)


def randomly_moved(f: Objective, couplings: list[Coupling], seed: int, most: float = 1.0) -> Objective:
    """The same function at another point of the orbit, log-scales up to ``most``."""
    group = Group(couplings, f.layout)
    generator = torch.Generator().manual_seed(seed)
    z = most * (2 * torch.rand(group.size, generator=generator, dtype=torch.float64) - 1)
    return f.at(group.act(f.x[None], z)[0])


def hessian(f: Objective) -> Tensor:
    """The dense Hessian, in float64."""
    return f.hvp(torch.eye(f.n, dtype=f.dtype)).double()
