"""Couplings: channels shared by the slices of parameters that write them and those that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torchflat.errors import UsageError

__all__ = ["Coupling", "Member", "centres"]


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one parameter that a coupling acts on: writers have a positive exponent, readers a negative one.

    Slice ``i`` is ``index[i]`` along ``axis``; where ``axis`` is None, ``index`` is (m, e) and its rows are entries of
    the flattened parameter. Slice i belongs to channel ``channel[i]`` of the coupling, and is multiplied by
    exp(exponent · z) where that channel is rescaled by exp(z).

    ``centre`` names a buffer of the parameter's shape that the network subtracts from it, and never uses otherwise:
    then the slices of the difference are what is multiplied. Only a point has one; directions are multiplied as they
    are, whatever the centre.

    >>> reader = Member("fc2.weight", 1, torch.arange(3), torch.arange(3), -1.0)
    >>> reader.slices(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist()
    [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    """

    parameter: str
    axis: int | None
    index: Tensor
    channel: Tensor
    exponent: float
    centre: str | None = None

    def slices(self, tensor: Tensor) -> Tensor:
        """Return the slices of the parameter, or of anything of its shape, as the rows of a matrix (m, e)."""
        if self.axis is None:
            return tensor.reshape(-1)[self.index.to(tensor.device)]
        rows = tensor.index_select(self.axis, self.index.to(tensor.device))
        return rows.movedim(self.axis, 0).reshape(len(self.index), -1)

    def with_slices(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Return a copy of ``tensor`` in which the slices are ``rows`` (m, e)."""
        if self.axis is None:
            return (
                tensor.reshape(-1)
                .index_copy(0, self.index.reshape(-1).to(tensor.device), rows.reshape(-1))
                .view_as(tensor)
            )
        front = tensor.movedim(self.axis, 0)
        changed = front.index_copy(0, self.index.to(tensor.device), rows.reshape(-1, *front.shape[1:]))
        return changed.movedim(0, self.axis).contiguous()


@dataclass(frozen=True, eq=False)
class Coupling:
    """Channels through which parameters can be traded against each other without changing what the network computes.

    ``kind`` tells the group. "diagonal": each channel c by itself by a positive factor exp(z_c), slices of channel c by
    exp(exponent · z_c). "full": all channels are mixed by any invertible matrix. There the slices of a member come as
    one or more runs through all channels in order, exponents are ±1, and a positive definite G acts on a run M (r, e)
    as M ↦ G^exponent M.

    The conserved quantity, with M over all runs of all members:

        diagonal:  C_c = Σ exponent · |slice of channel c|²,  (size,)
        full:      C = Σ exponent · MMᵀ,                      (size, size), symmetric,

    where slices of members with a centre are those of parameter − centre: a bias b before batch normalisation by a
    fixed mean μ, with the filter w and the gain γ, gives C = |w|² + (b − μ)² − γ².

    >>> rows = torch.arange(2)
    >>> coupling = Coupling("a → b", 2, (Member("a", 0, rows, rows, 1.0), Member("b", 1, rows, rows, -1.0)), "diagonal")
    >>> a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    >>> coupling.value({"a": a, "b": b}).tolist()
    [8.0, -3.0]
    """

    name: str
    size: int
    members: tuple[Member, ...]
    kind: Literal["diagonal", "full"]

    @property
    def laws(self) -> int:
        """Number of independent conserved numbers, where no channel is degenerate."""
        return self.size if self.kind == "diagonal" else self.size * (self.size + 1) // 2

    @property
    def centres(self) -> dict[str, str]:
        """By parameter, the buffer from which it counts; empty but for laws of a bias before a fixed mean."""
        return {member.parameter: member.centre for member in self.members if member.centre is not None}

    @property
    def named_kind(self) -> str:
        """``kind``, or "centred" where a parameter counts from a buffer."""
        return "centred" if self.centres else self.kind

    def centred(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``point`` with parameter − centre, in float64, for parameters that have one.

        Raises:
            UsageError: ``point`` does not hold the buffer that is the centre.
        """
        moved = {name: point[name].detach().double() - c for name, c in centres([self], point).items()}
        return {**point, **moved}

    def value(self, point: Mapping[str, Tensor]) -> Tensor:
        """Return C, in float64, at a point: parameters by name, and the buffers that are centres.

        Of a direction, such as a gradient, C is ``product(direction, direction)``, which knows no centre.

        Raises:
            UsageError: ``point`` does not hold the buffer that is the centre.
        """
        offset = self.centred(point)
        return self.product(offset, offset)

    def sides(self, point: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what writers and what readers add to C, which is their difference; each as C itself, and ⪰ 0."""
        members = [tuple(m for m in self.members if sign * m.exponent > 0) for sign in (1, -1)]
        writers, readers = (replace(self, members=part).value(point) for part in members)
        return writers, -readers

    def product(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
        """Return the symmetric bilinear form of C, of directions.

        With θ = :meth:`centred` of the point x, its value at (θ, θ) is C(x), and twice that at (θ, ∇f) is dC/dt,
        hence 0.
        """
        total = torch.zeros(self.size if self.kind == "diagonal" else (self.size, self.size), dtype=torch.float64)
        for member in self.members:
            a = member.slices(left[member.parameter].detach()).double().cpu()
            b = member.slices(right[member.parameter].detach()).double().cpu()
            if self.kind == "diagonal":
                total.index_add_(0, member.channel, (a * b).sum(1), alpha=member.exponent)
            else:
                for first, second in zip(a.split(self.size), b.split(self.size), strict=True):
                    mixed = first @ second.T
                    total += member.exponent / 2 * (mixed + mixed.T)
        return total


def centres(couplings: Iterable[Coupling], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the centre of each parameter that has one, in float64, out of ``tensors`` that hold the buffers.

    Raises:
        UsageError: one is not among them, or couplings disagree on it.
    """
    names: dict[str, str | None] = {}
    for member in (member for coupling in couplings for member in coupling.members):
        if names.setdefault(member.parameter, member.centre) != member.centre:
            raise UsageError(
                f"couplings disagree on the centre of {member.parameter}: {names[member.parameter]} and "
                f"{member.centre}; find the laws of one model"
            )
        if member.centre is not None and member.centre not in tensors:
            raise UsageError(
                f"the law of {member.parameter} counts it from the buffer {member.centre}, which is missing: give the "
                "module, or a state_dict with its buffers"
            )
    return {name: tensors[buffer].detach().double() for name, buffer in names.items() if buffer is not None}
