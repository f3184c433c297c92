"""By what each tensor of a graph may be shifted without any effect on the outputs: rules that run backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchflat.symmetry.equations import Equations
from torchflat.symmetry.forms import Form, compact, dependent_axes, narrowed
from torchflat.symmetry.graph import Graph

__all__ = ["MOVES", "Harmless", "Labels", "arguments", "identified", "operator"]

Labels = Tensor | None

MOVES = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice"),
    *("select", "flip", "roll", "split", "split_with_sizes", "unbind", "chunk", "clone", "alias", "detach"),
    *("_to_copy", "contiguous", "lift_fresh_copy"),
)


class Harmless:
    """Backwards through the graph: by what each tensor may be shifted so that no output changes.

    The answer for a tensor is labels of its shape: it may be shifted by any function of the input that is constant
    where labels are equal and zero where they are 0. None means that every shift matters.
    """

    def __init__(self, graph: Graph, along: int | None) -> None:
        self._numbers = Equations()
        self.outputs = graph.outputs
        self._along = along
        self.allowed: dict[fx.Node, Any] = {}
        for node in reversed(graph.nodes):
            if node.op in ("call_function", "placeholder") and node.meta.get("val") is not None:
                self.allowed[node] = self._joined(node)

    def _joined(self, node: fx.Node) -> Any:
        """Return what all users of a tensor allow."""
        value = node.meta["val"]
        if isinstance(value, (list, tuple)):
            parts: dict[int, Labels] = {
                int(arguments(user)[1]): self.allowed[user]
                for user in node.users
                if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem"
            }
            return [
                parts[i] if i in parts else self.fresh(item.shape) if isinstance(item, Tensor) else None
                for i, item in enumerate(value)
            ]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        total: Labels = None
        users = [user for user in node.users if user.op == "call_function"]
        if node in self.outputs:
            total = self.output(value)
            if total is None:
                return None
        for user in users:
            edge = self.edge(user, node)
            if edge is None:
                return None
            total = edge if total is None else identified(total, edge)
        return self.fresh(value.shape) if total is None else compact(total)

    def output(self, value: Tensor) -> Labels:
        """Return by what an output may be shifted."""
        if self._along is None or value.ndim <= self._along:
            return None
        return self.fresh(value.shape, set(range(value.ndim)) - {self._along})

    def edge(self, user: fx.Node, source: fx.Node) -> Labels:
        """Return by what ``source`` may be shifted as far as ``user`` is concerned."""
        places = [i for i, argument in enumerate(arguments(user)) if argument is source]
        if getattr(user.target, "__name__", "") == "getitem":
            same: Labels = self.allowed[source]
            return same
        function = _EDGES.get(operator(user))
        if function is None or len(places) != 1 or source in user.kwargs.values():
            return self._edge_of_cat(user, source) if operator(user) == "cat" else None
        return function(self, user, places[0], self.allowed[user])

    def _edge_of_cat(self, user: fx.Node, source: fx.Node) -> Labels:
        parts, out = list(arguments(user)[0]), self.allowed[user]
        if out is None or parts.count(source) != 1:
            return None
        axis = int(arguments(user)[1]) if len(arguments(user)) > 1 else 0
        sizes = [part.meta["val"].shape[axis] for part in parts]
        part: Tensor = out.split(sizes, axis)[parts.index(source)]
        return part

    def fresh(self, shape: Sequence[int], axes: set[int] | None = None) -> Tensor:
        """Return new labels of ``shape``, equal along all but ``axes``."""
        return self._numbers.fresh(tuple(shape), axes)

    def renewed(self, labels: Tensor) -> Tensor:
        """Return the same pattern in labels that nothing else has."""
        names, inverse = labels.unique(return_inverse=True)
        new = self.fresh(names.shape)
        return compact(torch.where(names == 0, 0, new)[inverse])


Edge = Callable[[Harmless, fx.Node, int, Any], Labels]
_EDGES: dict[str, Edge] = {}


def _edge(*operators: str) -> Callable[[Edge], Edge]:
    def enter(function: Edge) -> Edge:
        _EDGES.update(dict.fromkeys(operators, function))
        return function

    return enter


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a call."""
    return node.args


def operator(node: fx.Node) -> str:
    """Return the name of the ATen operator of a call, without its overload; empty for other calls."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def identified(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a`` with labels merged wherever ``b`` has them equal: shifts that both patterns allow."""
    used = {axis for labels in (a, b) for axis in dependent_axes(labels)}
    still = [axis for axis in range(a.ndim) if axis not in used]
    shape, a, b = a.shape, narrowed(a, still), narrowed(b.expand(a.shape), still)
    names, inverse = torch.cat([torch.zeros(1, dtype=torch.int64), a.reshape(-1), b.reshape(-1)]).unique(
        return_inverse=True
    )
    left, right = inverse[1:].split(a.numel())
    # The patterns are independent: the same label means something else in the other.
    offset = len(names)
    right = torch.where(right == 0, 0, right + offset)
    equations = Equations()
    equations.fresh((2 * offset,))
    equations.zero(Form.of(left) - Form.of(right))
    root = equations.solve().root[left]
    merged: Tensor = names[root].view(a.shape).expand(shape)
    return merged


def _folded(labels: Tensor, axes: set[int]) -> Tensor:
    """Return the pattern of a shift that is the same along ``axes``, which get size 1."""
    if not axes & set(dependent_axes(labels)):
        return narrowed(labels, axes)
    shape = narrowed(labels, axes).shape
    labels = narrowed(labels, set(range(labels.ndim)) - set(dependent_axes(labels)))
    names, inverse = torch.cat([torch.zeros(1, dtype=torch.int64), labels.reshape(-1)]).unique(return_inverse=True)
    own = inverse[1:].view(labels.shape)
    equations = Equations()
    equations.fresh((len(names) - 1,))
    equations.zero(Form.of(own) - Form.of(narrowed(own, axes).expand(own.shape)))
    merged: Tensor = names[equations.solve().root[narrowed(own, axes)]].expand(shape)
    return merged


def _apart(labels: Tensor, rows: set[int]) -> Tensor:
    """Forbid shifts that would have to be the same at different indices of ``rows``."""
    shape, varying = labels.shape, dependent_axes(labels)
    if any(shape[axis] > 1 and axis not in varying for axis in rows):
        return torch.zeros((), dtype=torch.int64).expand(shape)
    labels = narrowed(labels, set(range(labels.ndim)) - set(varying))
    order = sorted(rows) + [axis for axis in range(labels.ndim) if axis not in rows]
    number = torch.Size(labels.shape[axis] for axis in rows).numel()
    matrix = labels.permute(order).reshape(number, -1)
    place = torch.arange(number)[:, None].expand(matrix.shape)
    pairs = torch.stack([matrix.reshape(-1), place.reshape(-1)]).unique(dim=1)[0]
    names, count = pairs.unique(return_counts=True)
    return torch.where(torch.isin(labels, names[count > 1]), 0, labels).expand(shape)


def _shape(node: fx.Node, place: int) -> torch.Size:
    shape: torch.Size = arguments(node)[place].meta["val"].shape
    return shape


def _broadcast(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the pattern for an operand of ``shape`` that is broadcast to that of ``labels``."""
    lead = labels.ndim - len(shape)
    axes = set(range(lead)) | {lead + i for i, n in enumerate(shape) if n == 1 and labels.shape[lead + i] != 1}
    folded = _folded(labels, axes)
    return folded.reshape(tuple(shape))


@_edge(*MOVES)
def _move(s: Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    """Put the labels back where the entries came from; entries that got lost may do as they like."""
    if place != 0 or out is None or (isinstance(out, list) and all(part is None for part in out)):
        return None
    shape = _shape(node, 0)
    if operator(node) == "expand":
        return _broadcast(out, shape)
    source = torch.arange(shape.numel()).view(shape)
    if operator(node) in ("view", "_unsafe_view"):
        moved = source.reshape(tuple(arguments(node)[1]))
    else:
        target: Any = node.target
        moved = target(source, *arguments(node)[1:], **node.kwargs)
    labels = torch.full((shape.numel(),), -1)
    for index, part in zip(moved, out, strict=True) if isinstance(out, list) else [(moved, out)]:
        labels[index.reshape(-1)] = 0 if part is None else part.reshape(-1)
    lost = labels == -1
    labels[lost] = s.fresh((int(lost.sum()),))
    return compact(labels.view(shape))


@_edge("add", "sub", "neg")
def _add(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    return None if out is None else _broadcast(out, _shape(node, place))


@_edge("mul", "div")
def _mul(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Multiply by anything that does not vary where the shift must be constant."""
    if out is None or place != 0:
        return None
    other = arguments(node)[1]
    if not isinstance(other, fx.Node):
        return out
    lead = out.ndim - other.meta["val"].ndim
    varies = {lead + i for i, size in enumerate(other.meta["val"].shape) if size != 1}
    return _broadcast(_apart(out, varies) if varies else out, _shape(node, 0))


@_edge("masked_fill")
def _masked_fill(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Let pass: what is masked to −∞ has no weight in a softmax, whatever is added to it."""
    return out if place == 0 and arguments(node)[2] == float("-inf") else None


@_edge("native_dropout")
def _dropout(s: Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    return out[0] if not arguments(node)[1] or not arguments(node)[2] else None


@_edge("sum", "mean")
def _mean(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Each summand may be shifted as the sum may, by numbers of its own."""
    if out is None:
        return None
    shape = _shape(node, 0)
    dims = arguments(node)[1] if len(arguments(node)) > 1 else list(range(len(shape)))
    axes = {int(axis) % len(shape) for axis in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
    kept = out.reshape([1 if axis in axes else size for axis, size in enumerate(shape)])
    number = torch.Size(shape[axis] for axis in axes).numel()
    base = torch.arange(number).view([size if axis in axes else 1 for axis, size in enumerate(shape)])
    return s.renewed(torch.where(kept == 0, 0, kept * number + base))


@_edge("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """softmax(x + c) = softmax(x)."""
    shape = _shape(node, 0)
    return s.fresh(shape, set(range(len(shape))) - {int(arguments(node)[1]) % len(shape)})


@_edge("layer_norm", "native_layer_norm")
def _layer_norm(s: Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    shape, normalized = _shape(node, 0), arguments(node)[1]
    last = len(shape) - len(normalized)
    if place == 0:
        return s.fresh(shape, set(range(last)))
    return _bias(out, place, 3, _shape(node, place))


@_edge("group_norm")
def _group_norm(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    shape, groups = _shape(node, 0), int(arguments(node)[1])
    if place:
        return None
    one = s.fresh((shape[0], groups, 1), {0, 1}).expand(shape[0], groups, shape[1] // groups)
    return one.reshape(shape[0], shape[1], *[1] * (len(shape) - 2)).expand(shape)


@_edge("_native_batch_norm_legit_functional", "_native_batch_norm_legit")
def _batch_norm(s: Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    training = arguments(node)[5] if len(arguments(node)) == 8 else arguments(node)[3]
    return s.fresh(_shape(node, 0), {1}) if training and place == 0 else None


def _bias(out: Any, place: int, where: int, shape: Sequence[int]) -> Labels:
    out = out[0] if isinstance(out, list) else out
    return None if out is None or place != where else _broadcast(out, shape)


def _operand(s: Harmless, pattern: Tensor, shape: Sequence[int], summed: Sequence[int]) -> Tensor:
    """Return labels of a factor from the ``pattern`` over the result, size 1 along ``summed``: each summand alone."""
    number = torch.Size(shape[axis] for axis in summed).numel()
    base = torch.arange(number).view([size if axis in summed else 1 for axis, size in enumerate(shape)])
    pattern = compact(pattern)
    short = narrowed(pattern, set(range(pattern.ndim)) - set(dependent_axes(pattern)))
    return s.renewed(torch.where(short == 0, 0, short * number + base)).expand(tuple(shape))


@_edge("linear")
def _linear(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Wᵢ x may be anything, and something else in every row, so that only what a row allows by itself is left."""
    if out is None or place == 0:
        return None
    if place == 2:
        return _broadcast(out, _shape(node, 2))
    rows = set(range(out.ndim - 1))
    pattern = _folded(_apart(out, rows), rows).reshape(-1, 1)
    return _operand(s, pattern, _shape(node, 1), [1])


@_edge("convolution")
def _convolution(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    if out is None or place == 0 or arguments(node)[6]:
        return None
    rows = set(range(out.ndim)) - {1}
    if place == 2:
        return _folded(out, rows).reshape(-1)
    groups = int(arguments(node)[8])
    pattern = _folded(_apart(out, rows), rows).reshape(groups, -1)
    shape = _shape(node, 1)
    return _operand(s, _apart(pattern, {0}).reshape(-1, *[1] * (len(shape) - 1)), shape, range(1, len(shape)))


@_edge("mm", "bmm")
def _product(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """(…, i, k) @ (…, k, j): a factor meets arbitrary numbers at every index of the other."""
    if out is None:
        return None
    own, other = (out.ndim - 1, out.ndim - 2) if place else (out.ndim - 2, out.ndim - 1)
    pattern = _folded(_apart(out, set(range(out.ndim)) - {own}), {other})
    summed = out.ndim - 2 if place else out.ndim - 1
    return _operand(s, pattern, _shape(node, place), [summed])


@_edge("addmm")
def _addmm(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    if out is None:
        return None
    if place == 0:
        return _broadcast(out, _shape(node, 0))
    other = 0 if place == 2 else 1
    pattern = _folded(_apart(out, {other}), {other})
    return _operand(s, pattern, _shape(node, place), [0 if place == 2 else 1])


@_edge("embedding")
def _embedding(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Every row of the table is a shift of its own."""
    if out is None or place:
        return None
    rows = set(range(out.ndim - 1))
    pattern = _folded(_apart(out, rows), rows).reshape(1, -1)
    return _operand(s, pattern, _shape(node, 0), [0])


@_edge("scaled_dot_product_attention")
def _attention(s: Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Allow the same shift of all keys, which shifts all scores of a query alike."""
    shape = _shape(node, place)
    return s.fresh(shape, set(range(len(shape))) - {len(shape) - 2}) if place == 1 else None
