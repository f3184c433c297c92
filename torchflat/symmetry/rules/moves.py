"""Operators that move entries around: the same operator moves the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchflat.symmetry.forms import Form, compact, dependent_axes, joined, narrowed
from torchflat.symmetry.units import Units, rule

__all__: list[str] = []


@rule("view", "_unsafe_view", "reshape")
def _reshape(u: Units, x: Form, shape: Sequence[int]) -> Form:
    # Not the operator itself, which refuses to copy.
    return x.map(lambda labels: labels.reshape(tuple(shape)))


@rule(
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "flip", "roll", "diagonal"),
    *("movedim", "narrow", "repeat", "flatten", "unflatten", "unfold", "swapaxes", "tile", "repeat_interleave"),
    *("broadcast_to",),
)
def _move(u: Units, x: Form, *args: Any, **kwargs: Any) -> Form:
    assert u.node is not None
    move = u.node.target
    return x.map(lambda labels: move(labels, *args, **kwargs))  # type: ignore[operator]


@rule("split", "split_with_sizes", "unbind", "chunk")
def _split(u: Units, x: Form, *args: Any, **kwargs: Any) -> tuple[Form, ...]:
    assert u.node is not None
    pieces = u.node.target(torch.empty(x.shape, device="meta"), *args, **kwargs)  # type: ignore[operator]
    terms = [(c, u.node.target(labels, *args, **kwargs)) for c, labels in x.terms]  # type: ignore[operator]
    return tuple(
        Form(piece.shape, tuple((c, compact(parts[i])) for c, parts in terms)) for i, piece in enumerate(pieces)
    )


@rule("as_strided")
def _as_strided(u: Units, x: Form, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Form:
    assert u.node is not None
    source = u.node.args[0].meta["val"]  # type: ignore[union-attr]

    def move(labels: Tensor) -> Tensor:
        laid_out = torch.empty_strided(source.shape, source.stride(), dtype=torch.int64).copy_(labels)
        return laid_out.as_strided(tuple(size), tuple(stride), offset or 0)

    return x.map(move, size)


@rule("cat")
def _cat(u: Units, parts: Sequence[Form], dim: int = 0) -> Form:
    # Empty tensors of shape (0,) may be joined with anything.
    parts = [part for part in parts if part.shape != (0,)] or list(parts)
    axis = dim % len(parts[0].shape)
    return joined(parts, lambda labels: torch.cat(labels, axis), {axis})


@rule("stack")
def _stack(u: Units, parts: Sequence[Form], dim: int = 0) -> Form:
    axis = dim % (len(parts[0].shape) + 1)
    raised = [part.map(lambda labels: labels.unsqueeze(axis)) for part in parts]
    return joined(raised, lambda labels: torch.cat(labels, axis), {axis})


@rule("select_scatter", "slice_scatter")
def _scatter(u: Units, x: Form, source: Form, *args: Any, **kwargs: Any) -> Form:
    assert u.node is not None
    move = u.node.target

    def join(labels: list[Tensor]) -> Tensor:
        return move(labels[0].contiguous(), labels[1].contiguous(), *args, **kwargs)  # type: ignore[operator,no-any-return]

    return joined([x, source], join, set(range(len(x.shape))))


@rule("index", "_unsafe_index")
def _index(u: Units, x: Form, indices: Sequence[Any]) -> Form:
    """Where the indices are constants, entries are moved; otherwise any entry may be asked for."""
    if all(isinstance(index, Tensor) for index in indices if index is not None):
        known = tuple(slice(None) if index is None else index for index in indices)
        return x.map(lambda labels: labels[known])
    asked = {axis for axis, index in enumerate(indices) if index is not None}
    x = u.alike(x, asked)
    assert u.node is not None
    return _constant_along(x, asked, u.node.meta["val"].shape)


@rule("index_select", "gather")
def _index_select(u: Units, x: Form, dim: int, index: Tensor | None, **_: Any) -> Form:
    assert u.node is not None
    axis = dim % len(x.shape)
    if isinstance(index, Tensor):
        move = u.node.target
        return x.map(lambda labels: move(labels, axis, index))  # type: ignore[operator]
    u.separate(x)
    return u.alike(x, {axis} if "select" in str(u.node.target) else set(range(len(x.shape))))


def _constant_along(x: Form, asked: set[int], shape: torch.Size) -> Form:
    """Replace the axes ``asked``, of size 1, by those of the index: where they were if neighbours, else first."""
    kept = [axis for axis in range(len(x.shape)) if axis not in asked]
    new = len(shape) - len(kept)
    neighbours = max(asked) - min(asked) + 1 == len(asked)
    before = kept[: min(asked)] if neighbours else []
    sizes = [x.shape[axis] for axis in before] + [1] * new + [x.shape[axis] for axis in kept[len(before) :]]
    return x.map(lambda labels: labels.reshape(sizes))


@rule("constant_pad_nd")
def _pad(u: Units, x: Form, pad: Sequence[int], value: float = 0.0) -> Form | None:
    """Zeros scale as anything does: along axes on which the units vary they get units of their own."""
    if value:
        u.zero(x)
        return None
    padded = {len(x.shape) - 1 - i // 2 for i, size in enumerate(pad) if size}

    def move(labels: Tensor) -> Tensor:
        varying = [axis for axis in range(labels.ndim) if axis in padded and axis in dependent_axes(labels)]
        still = [axis for axis in range(labels.ndim) if axis not in dependent_axes(labels)]
        sizes = [size if len(x.shape) - 1 - i // 2 in varying else 0 for i, size in enumerate(pad)]
        short = torch.constant_pad_nd(narrowed(labels, still), sizes, -1)
        holes = short == -1
        short[holes] = u.equations.fresh((int(holes.sum()),))
        shape = [
            labels.shape[axis] + sum(pad[2 * (labels.ndim - 1 - axis) :][:2]) if axis in padded else labels.shape[axis]
            for axis in range(labels.ndim)
        ]
        return short.expand(shape)

    return x.map(move)


@rule("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "scalar_tensor")
def _constant(u: Units, *args: Any, **_: Any) -> Form | float | None:
    """Zeros scale as anything does; a scalar is as good as a literal."""
    assert u.node is not None
    name, shape = str(u.node.target), u.node.meta["val"].shape
    value = 0.0 if "zeros" in name else (args[0] if "scalar" in name else args[1] if "new" not in name else args[2])
    if not shape:
        return float(value)
    return u.fresh(shape) if value == 0 else None


@rule("view_as_complex")
def _view_as_complex(u: Units, x: Form) -> Form:
    last = len(x.shape) - 1
    return u.alike(u.separate(x), {last}).map(lambda labels: labels.squeeze(-1))


@rule("view_as_real")
def _view_as_real(u: Units, x: Form) -> Form:
    return x.map(lambda labels: labels.unsqueeze(-1).expand(*labels.shape, 2))
