"""The group of rescalings as it acts on the flat vector x, and on everything of its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.parameters import Layout
from torchflat.symmetry.coupling import Coupling, Member, centres

__all__ = ["Group", "HasCouplings", "couplings_of"]

# Entries of a matrix of rows that are moved at once: what stays in a processor's cache.
PIECE = 2**21
# Squares of writers or readers below this share of the coupling's largest are zero.
NEGLIGIBLE = 1e-30


class HasCouplings(Protocol):
    """Anything that knows the couplings of a network."""

    @property
    def couplings(self) -> Sequence[Coupling]:
        """All of them."""


def couplings_of(laws: HasCouplings | Sequence[Coupling]) -> tuple[Coupling, ...]:
    """Return the couplings, which may come bare."""
    return tuple(laws if isinstance(laws, Sequence) else laws.couplings)


class Group:
    """Rescalings g(z) of the flat vector x, up to rotations, which change no eigenvalue of the Hessian.

    z of shape (k,), float64 on the CPU, holds for each diagonal coupling its log-scales, (size,), and for each full one
    a symmetric S, (size, size), as its upper triangle: entries beside the diagonal times √2, so that the Euclidean norm
    of z is the Frobenius norm of S. A member's slices are multiplied by exp(exponent · z_c), its runs M (size, e) by
    exp(exponent · S). For diagonal couplings alone g(z)x = exp(Bz) ∘ x, where B (n, k) holds the exponents; it is never
    formed. f(g·x) = f(x) makes H(g·x) = g⁻¹H(x)g⁻¹ (T084).

    Where parameters count from ``buffers`` (:attr:`Member.centre`), the group acts about these, c in all: points move
    by x ↦ c + g(z)(x − c), which :meth:`move` does, and :meth:`centred` gives x − c. Derivatives by x and directions
    know no c: :meth:`act` is for these, and H(c + g(x − c)) = g⁻¹H(x)g⁻¹ all the same.

    Couplings that cannot be moved are in ``frozen``, by name, with the reason: a member lies outside the layout, its
    centre is not among the buffers, or there are no writers or no readers. Channels are frozen later by :meth:`freeze`.
    Their coordinates of z stay zero.

    >>> from torchflat.symmetry.coupling import Member
    >>> rows = torch.arange(2)
    >>> members = Member("a", 0, rows, rows, 1.0), Member("b", 0, rows, rows, -1.0)
    >>> layout = Layout(("a", "b"), (torch.Size([2]), torch.Size([2])))
    >>> group = Group([Coupling("a → b", 2, members, "diagonal")], layout)
    >>> group.act(torch.ones(1, 4), torch.tensor([1.0, 2.0]).double().log()).tolist()
    [[1.0, 2.0, 1.0, 0.5]]
    >>> group.imbalance(torch.tensor([[1.0, 2.0, 0.0, 3.0]])).tolist()
    [1.0, -5.0]
    """

    def __init__(
        self, couplings: Sequence[Coupling], layout: Layout, buffers: Mapping[str, Tensor] | None = None
    ) -> None:
        self.layout, buffers = layout, buffers or {}
        self.frozen: dict[str, str] = {}
        self.couplings: list[Coupling] = []
        for coupling in couplings:
            reason = _immovable(coupling, layout, buffers)
            if reason:
                self.frozen[coupling.name] = reason
            else:
                self.couplings.append(coupling)
        lengths = [coupling.laws for coupling in self.couplings]
        self.size = sum(lengths)
        stops = torch.tensor(lengths).cumsum(0).tolist() if lengths else []
        self._ranges = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
        self.free = torch.ones(self.size, dtype=torch.float64)
        self._places = layout.slices()
        self._shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self._centres = centres(self.couplings, buffers)

    @property
    def diagonal(self) -> bool:
        """Whether all couplings are."""
        return all(coupling.kind == "diagonal" for coupling in self.couplings)

    def identity(self) -> Tensor:
        """Return z = 0."""
        return torch.zeros(self.size, dtype=torch.float64)

    # Acting ----------------------------------------------------------------------------------------------------------

    def centred(self, x: Tensor) -> Tensor:
        """Return x − c for a point x, (n,): what the group acts on, and whose C is conserved."""
        return self._from_centres(x, -1.0)

    def move(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the point c + g(z)(x − c), (n,), where f is what it is at x."""
        return self.placed(self.act(self.centred(x)[None], z)[0])

    def placed(self, offset: Tensor) -> Tensor:
        """Return the point that :meth:`centred` takes to ``offset``."""
        return self._from_centres(offset, 1.0)

    def _from_centres(self, x: Tensor, sign: float) -> Tensor:
        moved = x.clone() if self._centres else x
        for name, centre in self._centres.items():
            moved[self._places[name]] += sign * centre.reshape(-1).to(x.device, x.dtype)
        return moved

    def act(self, rows: Tensor, z: Tensor, inverse: bool = False) -> Tensor:
        """Return g(z), or its inverse, applied to each row of ``rows`` (m, n): x − c moves by g, its gradient by g⁻¹.

        A direction moves as x − c does; for points there is :meth:`move`.
        """
        moved = torch.empty_like(rows)
        for place, piece in self.pieces(rows, z, inverse):
            moved[:, place] = piece
        return moved

    def pieces(self, rows: Tensor, z: Tensor, inverse: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield g(z)·rows, or g(z)⁻¹·rows, range of columns by range of columns, so that a few stay in the cache."""
        sign = -1.0 if inverse else 1.0
        factors = self._field(sign * z).to(rows.device, rows.dtype).exp()
        width = max(1, PIECE // max(1, len(rows)))
        mixed = self._mixed(z, sign)
        for name, place in self._places.items():
            if name in mixed:
                part = rows[:, place] * factors[place]
                for move in mixed[name]:
                    part = move(part.view(-1, *self._shapes[name])).flatten(1)
                yield place, part
                continue
            for start in range(place.start, place.stop, width):
                columns = slice(start, min(start + width, place.stop))
                yield columns, rows[:, columns] * factors[columns]

    def imbalance(self, rows: Tensor) -> Tensor:
        """Return C = Σ C(v) over the rows v, (k,), in the coordinates of z: −2C is the gradient of Σ|g(z)⁻¹v|² at 0.

        Of a point, that of v = :meth:`centred` is conserved.
        """
        return self.imbalance_of(rows.square().sum(0, dtype=torch.float64), rows)

    def imbalance_of(self, squares: Tensor, rows: Tensor | None) -> Tensor:
        """Return the same from Σ v∘v, (n,) float64; ``rows`` are needed for full couplings only."""
        parts = []
        for coupling in self.couplings:
            if coupling.kind == "diagonal":
                parts.append(self._masses(coupling, squares, lambda member: member.exponent))
            else:
                assert rows is not None
                parts.append(_packed(self._gram(coupling, rows, lambda member: member.exponent)))
        return torch.cat(parts) * self.free if parts else self.identity()

    def curvature(self, squares: Tensor, z: Tensor) -> Tensor:
        """Apply Bᵀ diag(squares) B to z: a quarter of the second derivative of Σ exp(2(Bz)_p)·squares_p at 0."""
        return self.transposed(squares * self._field(z * self.free).to(squares.device)) * self.free

    def transposed(self, values: Tensor) -> Tensor:
        """Return Bᵀ values, (k,), for values (n,) float64; zero for full couplings."""
        total = self.identity()
        for coupling, place in zip(self.couplings, self._ranges, strict=True):
            if coupling.kind == "diagonal":
                total[place] = self._masses(coupling, values, lambda member: member.exponent)
        return total

    def masses(self, squares: Tensor) -> Tensor:
        """Return the diagonal of Bᵀ diag(squares) B, (k,), up to entries in two members; 0 for full couplings."""
        total = self.identity()
        for coupling, place in zip(self.couplings, self._ranges, strict=True):
            if coupling.kind == "diagonal":
                total[place] = self._masses(coupling, squares, lambda member: member.exponent**2)
        return total

    def grams(self, coupling: Coupling, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ MMᵀ over the runs of a full coupling's writers, and of its readers, (size, size) float64 each."""
        return self._gram(coupling, rows, _writing), self._gram(coupling, rows, _reading)

    def free_part(self, index: int) -> Tensor:
        """Return which coordinates of the coupling with this number can move: 1, or 0 for frozen ones."""
        return self.free[self._ranges[index]]

    # Coordinates -----------------------------------------------------------------------------------------------------

    def matrices(self, z: Tensor) -> list[Tensor]:
        """Return the log-scales of each coupling in its own shape: (size,), or the symmetric S (size, size)."""
        return [
            z[place] if coupling.kind == "diagonal" else _unpacked(z[place], coupling.size)
            for coupling, place in zip(self.couplings, self._ranges, strict=True)
        ]

    def magnitude(self, imbalance: Tensor) -> float:
        """Return Σ|C| over channels; for full couplings over the eigenvalues of C."""
        parts = self.matrices(imbalance)
        return sum(float((p if p.ndim == 1 else torch.linalg.eigvalsh(p)).abs().sum()) for p in parts)

    def packed(self, matrices: Sequence[Tensor]) -> Tensor:
        """Return z for the log-scales of each coupling in its own shape."""
        parts = [m if c.kind == "diagonal" else _packed(m) for c, m in zip(self.couplings, matrices, strict=True)]
        return torch.cat(parts) * self.free if parts else self.identity()

    def log_scales(self, z: Tensor) -> dict[str, Tensor]:
        """Return :meth:`matrices` by the names of the couplings."""
        return {c.name: m for c, m in zip(self.couplings, self.matrices(z), strict=True)}

    def clamped(self, z: Tensor, most: float) -> Tensor:
        """Return the nearest z whose log-scales, or eigenvalues of S, are at most ``most`` in size."""
        if all(coupling.kind == "diagonal" for coupling in self.couplings):
            return z.clamp(-most, most)
        parts = [m.clamp(-most, most) if m.ndim == 1 else _clamped(m, most) for m in self.matrices(z)]
        return self.packed(parts)

    def slack(self, imbalance: Tensor, z: Tensor, most: float) -> float:
        """Bound max ⟨C, z − z'⟩ over |z'| ≤ ``most``, for C = ``imbalance`` at z, which is no longer than that.

        For full couplings z' − z stands for the logarithm that leads from one positive definite matrix to the other,
        whose eigenvalues are at most 2·``most``.
        """
        total = 0.0
        for part, place, coupling in zip(self.matrices(imbalance), self.matrices(z), self.couplings, strict=True):
            if coupling.kind == "diagonal":
                total += float((part.abs() * most + part * place).sum())
            else:
                total += 2 * most * float(torch.linalg.eigvalsh(part).abs().sum())
        return total

    def pulled_back(self, imbalance: Tensor, z: Tensor) -> Tensor:
        """Return d⟨C, ·⟩/dz for C found at g(z): for a full coupling, ⟨C, G⁻¹dG⟩ with G = exp S; C itself otherwise."""
        if self.diagonal:
            return imbalance
        parts = []
        for part, S, coupling in zip(self.matrices(imbalance), self.matrices(z), self.couplings, strict=True):
            if coupling.kind == "diagonal":
                parts.append(part)
                continue
            # dG = exp(S)·φ(dS) elementwise between eigenvectors: G⁻¹dG has entries (e^{λ_b−λ_a} − 1)/(λ_b − λ_a)·dS.
            values, vectors = torch.linalg.eigh(S)
            gaps = values[None, :] - values[:, None]
            ratio = torch.where(gaps.abs() < 1e-8, 1 + gaps / 2, torch.expm1(gaps) / torch.where(gaps == 0, 1.0, gaps))
            inner = vectors.T @ part @ vectors * ratio
            pulled = vectors @ inner @ vectors.T
            parts.append((pulled + pulled.T) / 2)
        return self.packed(parts)

    # Freezing --------------------------------------------------------------------------------------------------------

    def freeze(self, rows: Tensor, what: str) -> None:
        """Freeze what the squares of ``rows`` (m, n) give no finite minimum: writers, readers or both are zero there.

        For a point the row is :meth:`centred`.
        ``what`` says of what they are zero, for the reason.
        """
        squares = rows.square().sum(0, dtype=torch.float64)
        for coupling, place in zip(self.couplings, self._ranges, strict=True):
            if coupling.kind == "full":
                sides = [self._gram(coupling, rows, side).diagonal().sum()[None] for side in (_writing, _reading)]
            else:
                sides = [self._masses(coupling, squares, side) for side in (_writing, _reading)]
            none = [side <= NEGLIGIBLE * (sides[0] + sides[1]).max() for side in sides]
            for dead, words in (
                (none[0] & none[1], f"{what} vanishes in what writes and what reads it"),
                (none[0] & ~none[1], f"{what} vanishes in what writes it: the least is at infinity"),
                (none[1] & ~none[0], f"{what} vanishes in what reads it: the least is at infinity"),
            ):
                chosen = dead.cpu() & (
                    self.free[place] > 0 if coupling.kind == "diagonal" else self.free[place][:1] > 0
                )
                if not bool(chosen.any()):
                    continue
                if coupling.kind == "full":
                    self.free[place] = 0.0
                    self._report(coupling.name, words)
                else:
                    self.free[place] *= (~chosen).double()
                    self._report(coupling.name, f"{_channels(chosen)}: {words}")

    def _report(self, name: str, reason: str) -> None:
        self.frozen[name] = f"{self.frozen[name]}; {reason}" if name in self.frozen else reason

    # Within ----------------------------------------------------------------------------------------------------------

    def _field(self, z: Tensor) -> Tensor:
        """Return Bz, (n,) float64."""
        field = torch.zeros(self.layout.n, dtype=torch.float64)
        parts = dict(zip(self.layout.names, self.layout.split(field), strict=True))
        for coupling, place in zip(self.couplings, self._ranges, strict=True):
            if coupling.kind == "full":
                continue
            for member in coupling.members:
                values = member.exponent * z[place][member.channel.cpu()]
                part, index = parts[member.parameter], member.index.cpu()
                if member.axis is None:
                    part.view(-1).index_add_(0, index.reshape(-1), values.repeat_interleave(index.shape[1]))
                else:
                    line = torch.zeros(part.shape[member.axis], dtype=torch.float64).index_add_(0, index, values)
                    part += line.view(-1, *[1] * (part.ndim - member.axis % part.ndim - 1))
        return field

    def _masses(self, coupling: Coupling, values: Tensor, weight: Callable[[Member], float]) -> Tensor:
        """Return Σ weight · values over the slices of each channel, (size,)."""
        total = torch.zeros(coupling.size, dtype=torch.float64)
        for member in coupling.members:
            if weight(member) == 0:
                continue
            part = values[self._places[member.parameter]].view(self._shapes[member.parameter])
            if member.axis is None:
                sums = part.reshape(-1)[member.index.to(part.device)].sum(1)
            else:
                others = [axis for axis in range(part.ndim) if axis != member.axis % part.ndim]
                sums = (part.sum(others) if others else part)[member.index.to(part.device)]
            total.index_add_(0, member.channel.cpu(), sums.cpu(), alpha=weight(member))
        return total

    def _gram(self, coupling: Coupling, rows: Tensor, weight: Callable[[Member], float]) -> Tensor:
        """Return Σ weight · MMᵀ over all runs M of all rows, (size, size) float64."""
        total = torch.zeros(coupling.size, coupling.size, dtype=torch.float64)
        for member in coupling.members:
            part = rows[:, self._places[member.parameter]].view(-1, *self._shapes[member.parameter])
            if weight(member):
                runs = _runs(member, part, coupling.size).double()
                total += weight(member) * torch.einsum("mrae,mrbe->ab", runs, runs).cpu()
        return total

    def _mixed(self, z: Tensor, sign: float) -> dict[str, list[Callable[[Tensor], Tensor]]]:
        """Return how full couplings move each parameter: functions of (m, *shape)."""
        moves: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        if self.diagonal:
            return moves
        for coupling, S in zip(self.couplings, self.matrices(z), strict=True):
            if coupling.kind == "full":
                for member in coupling.members:
                    matrix = torch.matrix_exp(sign * member.exponent * S)
                    moves.setdefault(member.parameter, []).append(_mixing(member, matrix))
        return moves


def _writing(member: Member) -> float:
    return max(member.exponent, 0.0)


def _reading(member: Member) -> float:
    return max(-member.exponent, 0.0)


def _immovable(coupling: Coupling, layout: Layout, buffers: Mapping[str, Tensor]) -> str | None:
    outside = [member.parameter for member in coupling.members if member.parameter not in layout.names]
    if outside:
        return f"{', '.join(dict.fromkeys(outside))} is not among the parameters of the objective"
    missing = [centre for centre in coupling.centres.values() if centre not in buffers]
    if missing:
        return f"{', '.join(missing)}, which it counts from, is not among the buffers of the objective"
    if not any(map(_writing, coupling.members)):
        return "nothing writes it: the least is at infinity"
    if not any(map(_reading, coupling.members)):
        return "nothing reads it: the least is at infinity"
    for member in coupling.members:
        if len(member.index) and member.axis is not None:
            shape = layout.shapes[layout.names.index(member.parameter)]
            if not -len(shape) <= member.axis < len(shape) or int(member.index.max()) >= shape[member.axis]:
                raise UsageError(
                    f"coupling {coupling.name!r} does not fit {member.parameter} of shape {tuple(shape)}: "
                    "find the laws of this model"
                )
    return None


def _channels(chosen: Tensor) -> str:
    numbers = chosen.nonzero().reshape(-1).tolist()
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"channel {shown}" if len(numbers) == 1 else f"{len(numbers)} channels ({shown})"


def _runs(member: Member, part: Tensor, size: int) -> Tensor:
    """Return the runs (m, runs, size, e) of a member in ``part`` (m, *shape)."""
    index = member.index.to(part.device)
    if member.axis is None:
        slices = part.reshape(len(part), -1)[:, index]
    else:
        axis = member.axis % (part.ndim - 1) + 1
        slices = part.index_select(axis, index).movedim(axis, 1).reshape(len(part), len(index), -1)
    return slices.reshape(len(part), -1, size, slices.shape[-1])


def _mixing(member: Member, matrix: Tensor) -> Callable[[Tensor], Tensor]:
    def move(part: Tensor) -> Tensor:
        moved = matrix.to(part.device, part.dtype) @ _runs(member, part, len(matrix))
        index = member.index.to(part.device)
        if member.axis is None:
            flat = part.reshape(len(part), -1).index_copy(1, index.reshape(-1), moved.reshape(len(part), -1))
            return flat.view_as(part)
        axis = member.axis % (part.ndim - 1) + 1
        front = part.movedim(axis, 1)
        changed = front.index_copy(1, index, moved.reshape(len(part), len(index), *front.shape[2:]))
        return changed.movedim(1, axis).contiguous()

    return move


def _packed(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns] * torch.where(rows == columns, 1.0, 2.0).double().sqrt()


def _unpacked(values: Tensor, size: int) -> Tensor:
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[rows, columns] = values / torch.where(rows == columns, 1.0, 2.0).double().sqrt()
    return matrix + matrix.triu(1).T


def _clamped(matrix: Tensor, most: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    clamped: Tensor = vectors * values.clamp(-most, most) @ vectors.T
    return clamped
