"""Rescalings modulo others: the channels of some couplings that others do not already contain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchflat.symmetry.coupling import Coupling

__all__ = ["modulo"]

# Powers of the entries that are not 0.
_Row = dict[int, float]
# They are small rationals, so that what is as small as this was to vanish.
_ROUNDING = 1e-8


def modulo(
    candidates: Sequence[Coupling], known: Sequence[Coupling], shapes: Mapping[str, torch.Size]
) -> list[Coupling]:
    """Return ``candidates`` with those channels only that neither ``known`` nor other candidates contain.

    A channel multiplies each entry of each parameter by a power of one number: the powers are its row, and rows are
    added where rescalings are done one after the other. Of several candidates the plainest is kept, that of the fewest
    members. A full coupling is kept whole, if one of its channels is new.

    >>> from torchflat.symmetry.coupling import Member
    >>> both, first = torch.arange(2), torch.arange(1)
    >>> each = Coupling("each", 2, (Member("a", 0, both, both, 1.0),), "diagonal")
    >>> one = Coupling("one", 1, (Member("a", 0, first, first, 3.0),), "diagonal")
    >>> [(c.name, c.size, c.members[0].index.tolist()) for c in modulo([each], [one], {"a": torch.Size((2, 5))})]
    [('each', 1, [1])]
    """
    places = _telling((*known, *candidates), shapes)
    basis: dict[int, _Row] = {}
    for coupling in known:
        _new_channels(coupling, places, basis)
    kept: dict[int, Coupling] = {}
    for coupling in sorted(candidates, key=lambda c: len(c.members)):
        new = _new_channels(coupling, places, basis)
        if new:
            kept[id(coupling)] = coupling if coupling.kind == "full" else _restricted(coupling, new)
    return [kept[id(coupling)] for coupling in candidates if id(coupling) in kept]


def _new_channels(coupling: Coupling, places: Mapping[str, Tensor], basis: dict[int, _Row]) -> list[int]:
    """Return the channels whose rows the basis does not span, and add these to it, each under its last entry."""
    return [channel for channel, row in enumerate(_rows(coupling, places)) if _added(row, basis)]


def _added(row: _Row, basis: dict[int, _Row]) -> bool:
    while row := {entry: power for entry, power in row.items() if abs(power) > _ROUNDING}:
        last = max(row)
        if last not in basis:
            basis[last] = row
            return True
        factor = row[last] / basis[last][last]
        for entry, power in basis[last].items():
            row[entry] = row.get(entry, 0.0) - factor * power
    return False


def _telling(couplings: Sequence[Coupling], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Give numbers to the entries of each parameter that tell all rescalings apart, and -1 to the others.

    A sum of functions of one index each is known from its values on the lines through a corner.
    """
    acting = [member for coupling in couplings for member in coupling.members]
    scattered = {member.parameter for member in acting if member.axis is None}
    found, count = {}, 0
    for parameter in dict.fromkeys(member.parameter for member in acting):
        shape = shapes[parameter]
        chosen = torch.full(shape, parameter in scattered)
        for axis in range(len(shape)):
            chosen[tuple(slice(None) if axis == other else 0 for other in range(len(shape)))] = True
        number = int(chosen.sum())
        found[parameter] = torch.full(shape, -1).masked_scatter(chosen, torch.arange(count, count + number))
        count += number
    return found


def _rows(coupling: Coupling, places: Mapping[str, Tensor]) -> list[_Row]:
    """Return the powers of each channel by the number of the entry."""
    rows: list[_Row] = [{} for _ in range(coupling.size)]
    for member in coupling.members:
        entries = member.slices(places[member.parameter])
        told = entries >= 0
        channels = member.channel[:, None].expand(entries.shape)[told]
        for channel, entry in zip(channels.tolist(), entries[told].tolist(), strict=True):
            rows[channel][entry] = rows[channel].get(entry, 0.0) + member.exponent
    return rows


def _restricted(coupling: Coupling, channels: Sequence[int]) -> Coupling:
    """Return a diagonal coupling of some of its channels."""
    number = torch.full((coupling.size,), -1)
    number[list(channels)] = torch.arange(len(channels))
    members = []
    for member in coupling.members:
        chosen = number[member.channel] >= 0
        if bool(chosen.any()):
            members.append(replace(member, index=member.index[chosen], channel=number[member.channel[chosen]]))
    return replace(coupling, size=len(channels), members=tuple(members))
