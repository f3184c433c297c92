"""All conserved numbers of a list of tensors, and the norms of the tensors, from one sweep over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.symmetry import Coupling, Laws, LinearLaw, Member

__all__ = ["Sweep", "Swept"]

# Squares that are held at once, so that they are still in a processor's cache when they are summed.
PIECE = 2**18


@dataclass(frozen=True)
class Swept:
    """What a sweep finds, in float64 on the device of the first tensor.

    ``values`` (size,) are the conserved numbers of all laws in a row, a matrix row by row. ``masses`` has one entry for
    each unit: a channel of a diagonal coupling, Σ|exponent|·|slice|², which is writers plus readers; all of a full
    coupling, tr Σ MMᵀ; a channel of a linear law, √(entries · Σ exponent²·|slice|²), which bounds the sum of sizes.
    ``squares`` (tensors,) are |tensor|².
    """

    values: Tensor
    masses: Tensor
    squares: Tensor

    @property
    def norm(self) -> Tensor:
        """Norm of all tensors taken as one vector."""
        return self.squares.sum().sqrt()


class Sweep:
    """The plan of a sweep, made once: each tensor is squared in pieces, and each piece summed along rows and columns.

    Works on the parameters, on their gradients, and on anything in their shapes. Sums are taken in the tensors' own
    precision, float32 at least, and added up in float64. Full couplings take a product of matrices in float64.

    Args:
        laws: what to evaluate; approximate laws are left out.
        parameters: by name, those of the laws and any others; the order is that of :attr:`Swept.squares`.

    >>> from torchflat.errors import UsageError
    from torchflat.symmetry import Member
    >>> rows = torch.arange(2)
    >>> members = Member("a", 0, rows, rows, 1.0), Member("b", 1, rows, rows, -1.0)
    >>> parameters = {"a": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[1.0, 2.0]])}
    >>> sweep = Sweep(Laws((Coupling("a → b", 2, members, "diagonal"),)), parameters)
    >>> found = sweep(list(parameters.values()))
    >>> found.values.tolist(), found.masses.tolist(), found.squares.tolist()
    ([8.0, -3.0], [10.0, 5.0], [10.0, 5.0])
    """

    def __init__(self, laws: Laws, parameters: Mapping[str, Tensor]) -> None:
        self.laws: tuple[Coupling | LinearLaw, ...] = (*laws.couplings, *laws.linear)
        missing = [m.parameter for law in self.laws for m in law.members if m.parameter not in parameters]
        if missing:
            raise UsageError(f"no parameter is called {missing[0]!r}: take the laws of this model")
        self._number = {name: i for i, name in enumerate(parameters)}
        self._shapes = [parameter.shape for parameter in parameters.values()]
        self._device = next(iter(parameters.values())).device
        # Where in one long vector of sums to find those of squares over all but one axis, by tensor and axis; those of
        # plain entries; and those over single entries, with their places in the flat tensor, squared or not.
        self._squared: dict[int, dict[int, int]] = {}
        self._added: dict[tuple[int, int], int] = {}
        self._picked: list[tuple[int, Tensor, bool, int]] = []
        self._length = 0
        self._full: list[tuple[Coupling, slice, int]] = []
        self.ranges: list[slice] = []
        self._lay_out()
        # Kept: a large block that is asked for anew costs more to map than to fill.
        self._workspace: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._loose = [i for i in range(len(self._shapes)) if i not in self._squared]

    def _lay_out(self) -> None:
        """Give numbers to values, units and sums, and say which sums make up which values and masses."""
        values: list[tuple[Tensor, Tensor, Tensor]] = []
        masses: list[tuple[Tensor, Tensor, Tensor]] = []
        owners: list[int] = []
        unit_of: list[Tensor] = []
        entries: list[Tensor] = []
        start = 0
        for number, law in enumerate(self.laws):
            unit, full = len(owners), isinstance(law, Coupling) and law.kind == "full"
            length = law.size**2 if full else law.size
            self.ranges.append(slice(start, start + length))
            owners += [number] * (1 if full else law.size)
            unit_of.append(torch.full((length,), unit) if full else unit + torch.arange(law.size))
            counts = torch.zeros(1 if full else law.size, dtype=torch.float64)
            if full:
                assert isinstance(law, Coupling)
                self._full.append((law, self.ranges[-1], unit))
            else:
                for member in law.members:
                    channel, weight = member.channel.cpu(), torch.tensor(member.exponent, dtype=torch.float64)
                    square = self._sums(member, squared=True)
                    factor = weight.expand(len(channel))
                    if isinstance(law, LinearLaw):
                        plain = self._sums(member, squared=False)
                        values.append((plain, start + channel, factor))
                        masses.append((square, unit + channel, factor.square()))
                        shape = self._shapes[self._number[member.parameter]]
                        each = shape.numel() // shape[member.axis] if member.axis is not None else member.index.shape[1]
                        counts.index_add_(0, channel, torch.full((len(channel),), float(each)).double())
                    else:
                        values.append((square, start + channel, factor))
                        masses.append((square, unit + channel, factor.abs()))
            entries.append(counts)
            start += length
        self.size, self.units = start, len(owners)
        self._values, self._masses = self._joined(values), self._joined(masses)
        self.owner = torch.tensor(owners, dtype=torch.int64, device=self._device)
        self.unit_of = _joined(unit_of, torch.int64).to(self._device)
        self._entries = _joined(entries, torch.float64).to(self._device)
        self.linear = self._entries > 0

    def _sums(self, member: Member, squared: bool) -> Tensor:
        """Return where the sums over the slices of a member will be found."""
        number = self._number[member.parameter]
        start = self._length
        if member.axis is None:
            self._picked.append((number, member.index.to(self._device), squared, start))
            self._length += len(member.index)
            return start + torch.arange(len(member.index))
        axis = member.axis % len(self._shapes[number])
        if squared:
            start = self._squared.setdefault(number, {}).setdefault(axis, start)
        else:
            start = self._added.setdefault((number, axis), start)
        if start == self._length:
            self._length += self._shapes[number][axis]
        return start + member.index.cpu()

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        sources, targets, weights = zip(*parts, strict=True) if parts else ((), (), ())
        return (
            _joined(sources, torch.int64).to(self._device),
            _joined(targets, torch.int64).to(self._device),
            _joined(weights, torch.float64).to(self._device),
        )

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None]) -> Swept:
        """Sweep over tensors in the shapes and the order of the parameters; None stands for zeros."""
        squares = torch.zeros(len(tensors), dtype=torch.float64, device=self._device)
        sums = torch.zeros(self._length, dtype=torch.float64, device=self._device)
        loose = [i for i in self._loose if tensors[i] is not None]
        if loose:
            norms = torch._foreach_norm([_plain(tensors[i]) for i in loose], 2, torch.float64)
            squares[loose] = torch.stack([norm.to(self._device) for norm in norms]).square()
        for number, places in self._squared.items():
            tensor = tensors[number]
            if tensor is not None:
                found = self._squares(_plain(tensor), list(places))
                squares[number] = found[0].sum(dtype=torch.float64)
                for place, part in zip(places.values(), found, strict=True):
                    sums[place : place + len(part)] = part
        for (number, axis), place in self._added.items():
            tensor = tensors[number]
            if tensor is not None:
                part = _summed(_plain(tensor), axis)
                sums[place : place + len(part)] = part
        for number, index, squared, place in self._picked:
            tensor = tensors[number]
            if tensor is not None:
                tensor = _plain(tensor)
                chosen = tensor.reshape(-1)[index.to(tensor.device)]
                sums[place : place + len(index)] = (chosen.square() if squared else chosen).sum(1)
        return self._assembled(tensors, sums, squares)

    def _squares(self, tensor: Tensor, axes: Sequence[int]) -> list[Tensor]:
        """Return the sums of squares over all but one axis, for each of ``axes``."""
        if tensor.ndim < 2:
            return [tensor.square()]
        pieces = tensor.split(max(1, PIECE // max(1, math.prod(tensor.shape[1:]))))
        key, needed = (tensor.device, tensor.dtype), pieces[0].numel()
        if key not in self._workspace or self._workspace[key].numel() < needed:
            self._workspace[key] = tensor.new_empty(needed)
        sums: list[list[Tensor]] = []
        for piece in pieces:
            workspace = self._workspace[key][: piece.numel()].view(piece.shape)
            squares = torch.mul(piece, piece, out=workspace)
            sums.append([_summed(squares, axis) for axis in axes])
        if len(sums) == 1:
            return sums[0]
        return [
            torch.cat(parts) if axis == 0 else torch.stack(parts).sum(0, dtype=torch.float64)
            for axis, parts in zip(axes, zip(*sums, strict=True), strict=True)
        ]

    def _assembled(self, tensors: Sequence[Tensor | None], sums: Tensor, squares: Tensor) -> Swept:
        values = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        masses = torch.zeros(self.units, dtype=torch.float64, device=self._device)
        for target, (source, place, weight) in ((values, self._values), (masses, self._masses)):
            target.index_add_(0, place, sums[source] * weight)
        masses = torch.where(self.linear, (masses * self._entries).sqrt(), masses)
        for coupling, matrix, unit in self._full:
            grams = self._gram(coupling, tensors)
            values[matrix] = (grams[0] - grams[1]).reshape(-1)
            masses[unit] = grams.diagonal(dim1=1, dim2=2).sum()
        return Swept(values, masses, squares)

    def _gram(self, coupling: Coupling, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Σ MMᵀ over the runs of the writers, and of the readers, (2, size, size)."""
        grams = torch.zeros(2, coupling.size, coupling.size, dtype=torch.float64, device=self._device)
        for member in coupling.members:
            tensor = tensors[self._number[member.parameter]]
            if tensor is not None:
                rows = member.slices(_plain(tensor)).double()
                runs = rows.view(-1, coupling.size, rows.shape[1])
                side = 0 if member.exponent > 0 else 1
                grams[side] += abs(member.exponent) * torch.einsum("rae,rbe->ab", runs, runs).to(self._device)
        return grams

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """Cut values (size,) into those of each law, in the law's own shape, on the CPU."""
        parts = {}
        for law, place in zip(self.laws, self.ranges, strict=True):
            part = values[place].cpu()
            full = isinstance(law, Coupling) and law.kind == "full"
            parts[law.name] = part.view(law.size, law.size) if full else part
        return parts


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.zeros(0, dtype=dtype)


def _plain(tensor: Tensor | None) -> Tensor:
    """Return a real dense tensor of float32 or wider."""
    assert tensor is not None
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.float() if tensor.element_size() < 4 else tensor


def _summed(tensor: Tensor, axis: int) -> Tensor:
    others = [other for other in range(tensor.ndim) if other != axis]
    return tensor.sum(others) if others else tensor
