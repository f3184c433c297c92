"""From solved equations to couplings: which slices of which parameters each free variable rescales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.equations import Solution
from torchflat.symmetry.forms import Form, dependent_axes
from torchflat.symmetry.units import Units

__all__ = ["couplings"]


@dataclass(frozen=True, eq=False)
class _Slices:
    """Slices of one parameter, by channel: slice ``place`` is multiplied by exp(exponent · z[variable]).

    With a ``centre``, those of parameter − centre are.
    """

    parameter: str
    axis: int | None
    entries: Tensor | None
    place: Tensor
    variable: Tensor
    exponent: Tensor
    centre: str | None

    def pick(self, chosen: Tensor) -> _Slices:
        """Keep some of the records."""
        place, variable, exponent = self.place[chosen], self.variable[chosen], self.exponent[chosen]
        return replace(self, place=place, variable=variable, exponent=exponent)


def couplings(units: Units, solution: Solution, order: Sequence[str]) -> tuple[Coupling, ...]:
    """Return one coupling for all channels that act on the same parameters, and one for each block that may be mixed.

    ``order`` is that of the parameters in the model; couplings come in the order of the first that they act on.
    """
    slices = [
        part
        for name in order
        if name in units.parameters
        for part in _slices(name, units.parameters[name], solution, units.centres.get(name))
    ]
    if not slices:
        return ()
    owner, blocks = _signatures(slices, len(solution.root)), units.mixing.blocks(solution)
    acting = torch.cat([part.variable for part in slices])
    first = torch.full((len(solution.root),), len(acting)).scatter_reduce_(0, acting, torch.arange(len(acting)), "amin")
    variables = acting.unique()
    variables = variables[first[variables].argsort()]
    groups: dict[int, list[int]] = {}
    for variable, key in zip(variables.tolist(), owner[variables].tolist(), strict=True):
        groups.setdefault(key, []).append(variable)
    found: list[Coupling] = []
    for members in groups.values():
        found.extend(_couplings(torch.tensor(members), slices, blocks, len(solution.root)))
    return _named(found, {name: units.parameters[name].shape for name in order if name in units.parameters})


def _slices(name: str, form: Form, solution: Solution, centre: str | None) -> Iterator[_Slices]:
    """Return the records of one parameter, by the axis along which its units vary."""
    shape = form.shape
    tables: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for coefficient, labels in form.terms:
        axes = tuple(dependent_axes(labels)) or ((0,) if shape else ())
        vector = labels.permute(*axes, *[axis for axis in range(len(shape)) if axis not in axes])
        for _ in range(len(axes), len(shape)):
            vector = vector.select(-1, 0)
        where, variable, factor = (torch.cat(parts) for parts in zip(*solution.terms(vector.reshape(-1)), strict=True))
        for axis, record in _whole_first(axes, shape, *_summed(where, variable, factor * coefficient)):
            tables.setdefault(axis, []).append(record)
    for axes, records in tables.items():
        where, variable, exponent = _summed(*(torch.cat(column) for column in zip(*records, strict=True)))
        if not len(where):
            continue
        entries = None
        if len(axes) != 1:
            rest = [axis for axis in range(len(shape)) if axis not in axes]
            number = torch.Size(shape[axis] for axis in axes).numel()
            entries = torch.arange(shape.numel()).view(shape).permute(*axes, *rest).reshape(number, -1)
        yield _Slices(name, axes[0] if entries is None else None, entries, where, variable, exponent, centre)


def _whole_first(
    axes: tuple[int, ...], shape: torch.Size, where: Tensor, variable: Tensor, exponent: Tensor
) -> Iterator[tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]]:
    """File variables that scale a whole parameter under its axis 0, whatever axis they come by: there they cancel."""
    if len(axes) != 1 or axes == (0,):
        yield axes, (where, variable, exponent)
        return
    names, inverse = torch.unique(torch.stack([variable.double(), exponent]), dim=1, return_inverse=True)
    whole = inverse.bincount(minlength=names.shape[1]) == shape[axes[0]]
    part = ~whole[inverse]
    yield axes, (where[part], variable[part], exponent[part])
    for name, power in names[:, whole].T.tolist():
        yield (
            (0,),
            (
                torch.arange(shape[0]),
                torch.full((shape[0],), int(name)),
                torch.full((shape[0],), power, dtype=torch.float64),
            ),
        )


def _summed(where: Tensor, variable: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the exponents of the same variable in the same place, and drop zeros."""
    if not len(where):
        return where, variable, exponent
    base = int(variable.max()) + 1
    pairs, inverse = torch.unique(where * base + variable, return_inverse=True)
    total = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, inverse, exponent)
    pairs, total = pairs[total.abs() > 1e-9], total[total.abs() > 1e-9]
    return pairs // base, pairs % base, total


def _signatures(slices: Sequence[_Slices], number: int) -> Tensor:
    """Return a key for every variable that says which parameters it acts on, along which axis and how often."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.zeros(number, dtype=torch.int64)
    for part in slices:
        weight = int(torch.randint(-(2**62), 2**62, (), generator=generator))
        keys.index_add_(0, part.variable, weight * (1000 * part.exponent).round().to(torch.int64))
    return keys


def _couplings(variables: Tensor, slices: Sequence[_Slices], blocks: Tensor, number: int) -> Iterator[Coupling]:
    """Split the variables of one signature into blocks that may be mixed, and one diagonal coupling of the rest."""
    channel = torch.full((number,), -1)
    channel[variables] = 0
    own = [part.pick(channel[part.variable] == 0) for part in slices if bool((channel[part.variable] == 0).any())]
    by_block: dict[int, list[int]] = {}
    for variable, key in zip(variables.tolist(), blocks[variables].tolist(), strict=True):
        by_block.setdefault(key, []).append(variable)
    alone: list[int] = []
    for members in by_block.values():
        full = _coupling(torch.tensor(members), own, number, "full") if len(members) > 1 else None
        if full is None:
            alone.extend(members)
        else:
            yield full
    if alone:
        single = torch.tensor(alone)
        diagonal = _coupling(variables[torch.isin(variables, single)], own, number, "diagonal")
        assert diagonal is not None
        yield diagonal


def _coupling(variables: Tensor, slices: Sequence[_Slices], number: int, kind: str) -> Coupling | None:
    """Make a coupling of these variables, or None where ``kind`` is full and no matrix can act."""
    size = len(variables)
    channel = torch.full((number,), -1)
    channel[variables] = torch.arange(size)
    members: list[Member] = []
    for part in slices:
        chosen = channel[part.variable] >= 0
        for exponent in part.exponent[chosen].unique().tolist():
            mine = part.pick(chosen & (part.exponent == exponent))
            if kind == "full":
                runs = _runs(channel[mine.variable], mine.place, size)
                if runs is None or abs(exponent) != 1 or len(mine.place.unique()) < len(mine.place):
                    return None
                members.append(_member(mine, runs, torch.arange(size).repeat(len(runs) // size), exponent))
                continue
            order = channel[mine.variable].argsort(stable=True)
            places, channels = mine.place[order], channel[mine.variable][order]
            for again in _occurrence(places).unique().tolist():
                now = _occurrence(places) == again
                members.append(_member(mine, places[now], channels[now], exponent))
    return Coupling("", size, tuple(members), "full" if kind == "full" else "diagonal")


def _member(part: _Slices, places: Tensor, channels: Tensor, exponent: float) -> Member:
    index = places if part.entries is None else part.entries[places]
    return Member(part.parameter, part.axis, index, channels, float(exponent), part.centre)


def _runs(channels: Tensor, places: Tensor, size: int) -> Tensor | None:
    """Order places to run through all channels again and again; None if some channel has fewer than others."""
    if not len(places) or len(places) % size or bool((channels.bincount(minlength=size) != len(places) // size).any()):
        return None
    order = (channels * (int(places.max()) + 1) + places).argsort()
    return places[order].view(size, -1).T.reshape(-1)


def _occurrence(places: Tensor) -> Tensor:
    """Return how often each place came before."""
    order = places.argsort(stable=True)
    ordered = places[order]
    start = torch.cat([torch.tensor([True]), ordered[1:] != ordered[:-1]])
    position = torch.arange(len(places))
    rank = position - torch.where(start, position, 0).cummax(0).values
    return torch.empty_like(rank).scatter_(0, order, rank)


def _named(found: Sequence[Coupling], shapes: Mapping[str, torch.Size]) -> tuple[Coupling, ...]:
    """Name couplings for what writes and what reads them, and tell those of the same name apart."""
    names = [_name(coupling, shapes) for coupling in found]
    seen: dict[str, int] = {}
    named = []
    for name, coupling in zip(names, found, strict=True):
        seen[name] = seen.get(name, 0) + 1
        unique = f"{name} ({seen[name]})" if seen[name] > 1 else name
        named.append(Coupling(unique, coupling.size, coupling.members, coupling.kind))
    return tuple(named)


def _name(coupling: Coupling, shapes: Mapping[str, torch.Size]) -> str:
    sides = []
    for sign in (1, -1):
        stems = [_stem(member, shapes) for member in coupling.members if member.exponent * sign > 0]
        stems = list(dict.fromkeys(stems))
        sides.append(", ".join(stems if len(stems) <= 3 else [stems[0], f"… ({len(stems)} in all) …", stems[-1]]))
    return " → ".join(sides) if sides[1] else sides[0]


def _stem(member: Member, shapes: Mapping[str, torch.Size]) -> str:
    """Return the name of a parameter's module, with the range of its rows or columns where it is a part of them."""
    module, _, leaf = member.parameter.rpartition(".")
    stem = module if module and leaf in ("weight", "bias") else member.parameter
    if member.axis is None:
        return stem
    low, high = int(member.index.min()), int(member.index.max()) + 1
    if high - low == shapes[member.parameter][member.axis] or len(member.index) != high - low:
        return stem
    return f"{stem}[{':, ' * member.axis}{low}:{high}]"
