"""All conserved numbers of a list of tensors, and the norms of the tensors, from one sweep over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.symmetry import Coupling, Laws, LinearLaw, Member

__all__ = ["Sweep", "Swept"]


@dataclass(frozen=True)
class Swept:
    """What sweeps find, in float64 on the device of the first tensor, a column for each sweep.

    ``values`` (size, sweeps) are the conserved numbers of all laws, one below the other, a matrix row by row.
    ``masses`` has one row for each unit: a channel of a diagonal coupling, Σ|exponent|·|slice|², which is writers plus
    readers; all of a full coupling, tr Σ MMᵀ; a channel of a linear law, √(entries · Σ exponent²·|slice|²), which
    bounds the sum of sizes. ``squares`` (tensors, sweeps) are |tensor|².
    """

    values: Tensor
    masses: Tensor
    squares: Tensor


class Sweep:
    """The plan of a sweep, made once: :func:`torchflat.ops.line_squares` of all matrices, and which sums make up what.

    Works on the parameters, on their gradients, and on anything in their shapes. To :meth:`read` is all that needs the
    tensors; what many readings come to is found at once, which costs much less than one by one. Full couplings take a
    product of matrices in float64.

    Args:
        laws: what to evaluate; approximate laws are left out.
        parameters: by name, those of the laws and any others; the order is that of :attr:`Swept.squares`.

    >>> from torchflat.symmetry import Member
    >>> rows = torch.arange(2)
    >>> members = Member("a", 0, rows, rows, 1.0), Member("b", 1, rows, rows, -1.0)
    >>> parameters = {"a": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[1.0, 2.0]])}
    >>> sweep = Sweep(Laws((Coupling("a → b", 2, members, "diagonal"),)), parameters)
    >>> found = sweep([sweep.read(list(parameters.values()))])
    >>> found.values.T.tolist(), found.masses.T.tolist(), found.squares.T.tolist()
    ([[8.0, -3.0]], [[10.0, 5.0]], [[10.0, 5.0]])
    """

    def __init__(self, laws: Laws, parameters: Mapping[str, Tensor]) -> None:
        self.laws: tuple[Coupling | LinearLaw, ...] = (*laws.couplings, *laws.linear)
        missing = [m.parameter for law in self.laws for m in law.members if m.parameter not in parameters]
        if missing:
            raise UsageError(f"no parameter is called {missing[0]!r}: take the laws of this model")
        self._number = {name: i for i, name in enumerate(parameters)}
        self._shapes = [parameter.shape for parameter in parameters.values()]
        self._device = next(iter(parameters.values())).device
        # A reading is a long vector of sums: of the squares of each matrix, its rows and then its columns; behind them
        # other sums, the squares of tensors that are no such matrices, and the matrices of full couplings with traces.
        squared = {self._number[m.parameter] for law in self.laws for m in law.members if m.axis is not None}
        self._matrices = [number for number in sorted(squared) if len(self._shapes[number]) >= 2]
        self._starts: dict[int, int] = {}
        self._length = 0
        for number in self._matrices:
            self._starts[number] = self._length
            self._length += sum(self._shapes[number][:2])
        self._others: dict[tuple[int, str], tuple[int, int, Callable[[Tensor], Tensor]]] = {}
        self._full: list[Coupling] = []
        self.ranges: list[slice] = []
        self._lay_out()

    def _lay_out(self) -> None:
        """Give numbers to values and units, and say which sums make up values, masses and squares."""
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"values": [], "masses": [], "squares": []}
        owners: list[int] = []
        unit_of: list[Tensor] = []
        entries: list[Tensor] = []
        full_at: list[tuple[int, int]] = []
        start = 0
        for number, law in enumerate(self.laws):
            unit, full = len(owners), isinstance(law, Coupling) and law.kind == "full"
            length, units = (law.size**2, 1) if full else (law.size, law.size)
            self.ranges.append(slice(start, start + length))
            owners += [number] * units
            unit_of.append(torch.full((length,), unit) if full else unit + torch.arange(law.size))
            counts = torch.zeros(units, dtype=torch.float64)
            if isinstance(law, Coupling) and full:
                self._full.append(law)
                full_at.append((start, unit))
            else:
                for member in law.members:
                    channel = member.channel.cpu()
                    weight = torch.full((len(channel),), member.exponent, dtype=torch.float64)
                    square = self._sums(member, squared=True)
                    if isinstance(law, LinearLaw):
                        parts["values"].append((self._sums(member, squared=False), start + channel, weight))
                        parts["masses"].append((square, unit + channel, weight.square()))
                        counts.index_add_(0, channel, torch.full_like(weight, self._entries_of(member)))
                    else:
                        parts["values"].append((square, start + channel, weight))
                        parts["masses"].append((square, unit + channel, weight.abs()))
            entries.append(counts)
            start += length
        self.size, self.units = start, len(owners)
        for number in self._matrices:
            rows = self._starts[number] + torch.arange(self._shapes[number][0])
            parts["squares"].append((rows, torch.full_like(rows, number), torch.ones(len(rows))))
        self._loose = [i for i in range(len(self._shapes)) if i not in self._starts]
        one = torch.ones(len(self._loose), dtype=torch.float64)
        parts["squares"].append((self._length + torch.arange(len(one)), torch.tensor(self._loose), one))
        end = self._length + len(one)
        for law, (value, unit) in zip(self._full, full_at, strict=True):
            entry, one = torch.arange(law.size**2), torch.ones(law.size**2, dtype=torch.float64)
            parts["values"].append((end + entry, value + entry, one))
            parts["masses"].append((end + entry[:1] + law.size**2, torch.tensor([unit]), one[:1]))
            end += law.size**2 + 1
        self.reading = end
        self._plan(parts)
        self.owner = torch.tensor(owners, dtype=torch.int64, device=self._device)
        self.unit_of = _joined(unit_of, torch.int64, self._device)
        self.law_of = self.owner[self.unit_of]
        self._entries = _joined(entries, torch.float64, self._device)
        self.linear = self._entries > 0
        self.any_linear = bool(self.linear.any())

    def _plan(self, parts: Mapping[str, Sequence[tuple[Tensor, Tensor, Tensor]]]) -> None:
        """Settle which sums go where, with which weights, among values, masses and squares."""
        first = {"values": 0, "masses": self.size, "squares": self.size + self.units}
        rows = [(source, first[kind] + place, weight) for kind, part in parts.items() for source, place, weight in part]
        # Most channels follow one another, and to add a run to a run takes a third of the time that indices take. A
        # weight of ±1 rounds nothing, whatever the number of columns: a resumed run cuts stretches elsewhere.
        self._runs: list[tuple[slice, slice, float]] = []
        others: list[tuple[Tensor, Tensor, Tensor]] = []
        for source, place, weight in rows:
            runs = _run(source), _run(place)
            if runs[0] and runs[1] and bool((weight == weight[0]).all()) and abs(weight[0]) == 1:
                self._runs.append((runs[0], runs[1], float(weight[0])))
            else:
                others.append((source, place, weight))
        sources, places, weights = zip(*others, strict=True) if others else ((), (), ())
        self._places = (
            _joined(sources, torch.int64, self._device),
            _joined(places, torch.int64, self._device),
            _joined(weights, torch.float64, self._device),
        )

    def _entries_of(self, member: Member) -> float:
        """Return how many entries a slice of a member has."""
        shape = self._shapes[self._number[member.parameter]]
        return float(member.index.shape[1] if member.axis is None else shape.numel() // shape[member.axis])

    def _sums(self, member: Member, squared: bool) -> Tensor:
        """Return where the sums over the slices of a member will be found."""
        number = self._number[member.parameter]
        if member.axis is None:
            index = member.index.to(self._device)
            name = f"entries {len(self._others)}"
            return self._other(number, name, len(index), _picked(index, squared)) + torch.arange(len(index))
        shape = self._shapes[number]
        axis = member.axis % len(shape)
        if squared and number in self._starts and axis < 2:
            start = self._starts[number] + axis * shape[0]
        else:
            start = self._other(number, f"axis {axis}, {squared}", shape[axis], _along(axis, squared))
        return start + member.index.cpu()

    def _other(self, number: int, name: str, length: int, sums: Callable[[Tensor], Tensor]) -> int:
        """Enter sums of a tensor that are no rows or columns of squares; return where they will be found."""
        if (number, name) not in self._others:
            self._others[number, name] = (self._length, length, sums)
            self._length += length
        return self._others[number, name][0]

    @torch.no_grad()
    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Sum over tensors in the shapes and the order of the parameters; None stands for zeros."""
        parts = self._line_squares(tensors)
        for (number, _), (_, length, sums) in self._others.items():
            parts.append(_zeros(length, self._device) if (t := tensors[number]) is None else sums(_plain(t)))
        if self._loose:
            parts.append(self.squares([tensors[number] for number in self._loose]))
        for coupling in self._full:
            grams = self._gram(coupling, tensors)
            parts += [(grams[0] - grams[1]).reshape(-1), grams.diagonal(dim1=1, dim2=2).sum().view(1)]
        return parts[0] if len(parts) == 1 else _joined(parts, torch.float64, self._device)

    @torch.no_grad()
    def __call__(self, readings: Sequence[Tensor]) -> Swept:
        """Return what readings come to."""
        source, place, weight = self._places
        sizes = [self.size, self.units, len(self._shapes)]
        found = torch.zeros(sum(sizes), len(readings), dtype=torch.float64, device=self._device)
        together = torch.stack(list(readings)).T.contiguous() if readings else found.new_zeros(self.reading, 0)
        for run, to, sign in self._runs:
            found[to].add_(together[run], alpha=sign)
        terms = together.index_select(0, source)
        found.index_add_(0, place, terms.mul_(weight[:, None]))
        values, masses, squares = found.split(sizes)
        if self.any_linear:
            linear = (masses * self._entries[:, None]).sqrt()
            masses = torch.where(self.linear[:, None], linear, masses)
        return Swept(values, masses, squares)

    @torch.no_grad()
    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return |tensor|² of each, (tensors,)."""
        squares = _zeros(len(tensors), self._device)
        for numbers in _by_device(tensors, range(len(tensors))):
            squares[numbers] = ops.norms([_plain(tensors[number]) for number in numbers]).to(self._device).square()
        return squares

    def _line_squares(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the sums of squares along the lines of all matrices, in order."""
        lines: dict[int, Tensor] = {}
        for numbers in _by_device(tensors, self._matrices):
            together = ops.line_squares([_plain(tensors[number]) for number in numbers]).to(self._device)
            if len(numbers) == len(self._matrices):
                return [together]
            lengths = [sum(self._shapes[number][:2]) for number in numbers]
            lines |= dict(zip(numbers, together.split(lengths), strict=True))
        missing = [number for number in self._matrices if number not in lines]
        lines |= {number: _zeros(sum(self._shapes[number][:2]), self._device) for number in missing}
        return [lines[number] for number in self._matrices]

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

    def of_values(self, of_units: Tensor) -> Tensor:
        """Give each value what its unit has, along the first axis."""
        return of_units.index_select(0, self.unit_of) if self._full else of_units

    def size_of_units(self, of_values: Tensor) -> Tensor:
        """Return the Euclidean norm of what the values of each unit have, along the first axis."""
        if not self._full:
            return of_values.abs()
        squares = of_values.new_zeros(self.units, *of_values.shape[1:])
        return squares.index_add_(0, self.unit_of, of_values.square()).sqrt()

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """Cut values (size,) into those of each law, in the law's own shape, on the CPU."""
        parts = {}
        for law, place in zip(self.laws, self.ranges, strict=True):
            part = values[place].cpu()
            full = isinstance(law, Coupling) and law.kind == "full"
            parts[law.name] = part.view(law.size, law.size) if full else part
        return parts


def _by_device(tensors: Sequence[Tensor | None], numbers: Iterable[int]) -> Iterable[list[int]]:
    """Group the numbers of tensors that there are by where these lie."""
    devices: dict[torch.device, list[int]] = {}
    for number in numbers:
        if (tensor := tensors[number]) is not None:
            devices.setdefault(tensor.device, []).append(number)
    return devices.values()


def _run(index: Tensor) -> slice | None:
    """Return the slice that an index stands for; None if it is no run of consecutive numbers."""
    if not len(index) or not torch.equal(index, torch.arange(int(index[0]), int(index[0]) + len(index))):
        return None
    return slice(int(index[0]), int(index[0]) + len(index))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype, device=device), *(part.to(device, dtype) for part in parts)])


def _zeros(length: int, device: torch.device) -> Tensor:
    return torch.zeros(length, dtype=torch.float64, device=device)


def _plain(tensor: Tensor | None) -> Tensor:
    """Return a real dense tensor of float32 or wider."""
    assert tensor is not None
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.float() if tensor.element_size() < 4 else tensor


def _along(axis: int, squared: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that sums entries, or their squares, over all axes but one."""

    def sums(tensor: Tensor) -> Tensor:
        others = [other for other in range(tensor.ndim) if other != axis]
        terms = tensor.square() if squared else tensor
        return terms.sum(others) if others else terms

    return sums


def _picked(index: Tensor, squared: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that sums entries at the places in each row of ``index``, or their squares."""

    def sums(tensor: Tensor) -> Tensor:
        chosen = tensor.reshape(-1)[index.to(tensor.device)]
        return (chosen.square() if squared else chosen).sum(1)

    return sums
