"""Shift laws: which parameters may be moved by a constant, because something later does not notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchflat.symmetry.channels import couplings
from torchflat.symmetry.equations import Equations
from torchflat.symmetry.forms import Form, compact, dependent_axes, narrowed
from torchflat.symmetry.graph import Graph
from torchflat.symmetry.linear import LinearLaw
from torchflat.symmetry.units import RULES, Units

__all__ = ["linear_laws"]

Labels = Tensor | None

_MOVES = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice"),
    *("select", "flip", "roll", "split", "split_with_sizes", "unbind", "chunk", "clone", "alias", "detach"),
    *("_to_copy", "contiguous", "lift_fresh_copy"),
)
_ADDITIVE = (*_MOVES, "add", "sub", "neg", "linear", "convolution", "addmm", "embedding", "mul", "div", "cat")


class _Harmless:
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
                int(user.args[1]): self.allowed[user]  # type: ignore[arg-type]
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
            total = edge if total is None else _identified(total, edge)
        return self.fresh(value.shape) if total is None else compact(total)

    def output(self, value: Tensor) -> Labels:
        if self._along is None or value.ndim <= self._along:
            return None
        return self.fresh(value.shape, set(range(value.ndim)) - {self._along})

    def edge(self, user: fx.Node, source: fx.Node) -> Labels:
        """Return by what ``source`` may be shifted as far as ``user`` is concerned."""
        places = [i for i, argument in enumerate(user.args) if argument is source]
        if getattr(user.target, "__name__", "") == "getitem":
            return self.allowed[source]  # type: ignore[no-any-return]
        function = _EDGES.get(_operator(user))
        if function is None or len(places) != 1 or source in user.kwargs.values():
            return self._edge_of_cat(user, source) if _operator(user) == "cat" else None
        return function(self, user, places[0], self.allowed[user])

    def _edge_of_cat(self, user: fx.Node, source: fx.Node) -> Labels:
        parts, out = list(user.args[0]), self.allowed[user]  # type: ignore[arg-type]
        if out is None or parts.count(source) != 1:
            return None
        axis = int(user.args[1]) if len(user.args) > 1 else 0  # type: ignore[arg-type]
        sizes = [part.meta["val"].shape[axis] for part in parts]
        return out.split(sizes, axis)[parts.index(source)]  # type: ignore[no-any-return]

    def fresh(self, shape: Sequence[int], axes: set[int] | None = None) -> Tensor:
        """Return new labels of ``shape``, equal along all but ``axes``."""
        return self._numbers.fresh(tuple(shape), axes)

    def renewed(self, labels: Tensor) -> Tensor:
        """Return the same pattern in labels that nothing else has."""
        names, inverse = labels.unique(return_inverse=True)
        new = self.fresh(names.shape)
        return compact(torch.where(names == 0, 0, new)[inverse])


Edge = Callable[[_Harmless, fx.Node, int, Any], Labels]
_EDGES: dict[str, Edge] = {}


def _edge(*operators: str) -> Callable[[Edge], Edge]:
    def enter(function: Edge) -> Edge:
        _EDGES.update(dict.fromkeys(operators, function))
        return function

    return enter


def _operator(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def _identified(a: Tensor, b: Tensor) -> Tensor:
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
    return names[root].view(a.shape).expand(shape)


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
    return names[equations.solve().root[narrowed(own, axes)]].expand(shape)


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
    return node.args[place].meta["val"].shape  # type: ignore[union-attr,no-any-return]


def _broadcast(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the pattern for an operand of ``shape`` that is broadcast to that of ``labels``."""
    lead = labels.ndim - len(shape)
    axes = set(range(lead)) | {lead + i for i, n in enumerate(shape) if n == 1 and labels.shape[lead + i] != 1}
    folded = _folded(labels, axes)
    return folded.reshape(tuple(shape))


@_edge(*_MOVES)
def _move(s: _Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    """Put the labels back where the entries came from; entries that got lost may do as they like."""
    if place != 0 or out is None or (isinstance(out, list) and all(part is None for part in out)):
        return None
    shape = _shape(node, 0)
    if _operator(node) == "expand":
        return _broadcast(out, shape)
    source = torch.arange(shape.numel()).view(shape)
    if _operator(node) in ("view", "_unsafe_view"):
        moved = source.reshape(tuple(node.args[1]))  # type: ignore[arg-type]
    else:
        moved = node.target(source, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    labels = torch.full((shape.numel(),), -1)
    for index, part in zip(moved, out, strict=True) if isinstance(out, list) else [(moved, out)]:
        labels[index.reshape(-1)] = 0 if part is None else part.reshape(-1)
    lost = labels == -1
    labels[lost] = s.fresh((int(lost.sum()),))
    return compact(labels.view(shape))


@_edge("add", "sub", "neg")
def _add(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    return None if out is None else _broadcast(out, _shape(node, place))


@_edge("mul", "div")
def _mul(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Times anything that does not vary where the shift must be constant."""
    if out is None or place != 0:
        return None
    other = node.args[1]
    if not isinstance(other, fx.Node):
        return out
    lead = out.ndim - other.meta["val"].ndim
    varies = {lead + i for i, size in enumerate(other.meta["val"].shape) if size != 1}
    return _broadcast(_apart(out, varies) if varies else out, _shape(node, 0))


@_edge("masked_fill")
def _masked_fill(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """What is masked to −∞ has no weight in a softmax, whatever is added to it."""
    return out if place == 0 and node.args[2] == float("-inf") else None


@_edge("native_dropout")
def _dropout(s: _Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    return out[0] if not node.args[1] or not node.args[2] else None  # type: ignore[no-any-return]


@_edge("sum", "mean")
def _mean(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Each summand may be shifted as the sum may, by numbers of its own."""
    if out is None:
        return None
    shape = _shape(node, 0)
    dims = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    axes = {int(axis) % len(shape) for axis in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}  # type: ignore[union-attr,arg-type]
    kept = out.reshape([1 if axis in axes else size for axis, size in enumerate(shape)])
    number = torch.Size(shape[axis] for axis in axes).numel()
    base = torch.arange(number).view([size if axis in axes else 1 for axis, size in enumerate(shape)])
    return s.renewed(torch.where(kept == 0, 0, kept * number + base))


@_edge("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """softmax(x + c) = softmax(x)."""
    shape = _shape(node, 0)
    return s.fresh(shape, set(range(len(shape))) - {int(node.args[1]) % len(shape)})  # type: ignore[arg-type]


@_edge("layer_norm", "native_layer_norm")
def _layer_norm(s: _Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    shape, normalized = _shape(node, 0), node.args[1]
    last = len(shape) - len(normalized)  # type: ignore[arg-type]
    if place == 0:
        return s.fresh(shape, set(range(last)))
    return _bias(out, place, 3, _shape(node, place))


@_edge("group_norm")
def _group_norm(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    shape, groups = _shape(node, 0), int(node.args[1])  # type: ignore[arg-type]
    if place:
        return None
    one = s.fresh((shape[0], groups, 1), {0, 1}).expand(shape[0], groups, shape[1] // groups)
    return one.reshape(shape[0], shape[1], *[1] * (len(shape) - 2)).expand(shape)


@_edge("_native_batch_norm_legit_functional", "_native_batch_norm_legit")
def _batch_norm(s: _Harmless, node: fx.Node, place: int, out: Any) -> Labels:
    training = node.args[5] if len(node.args) == 8 else node.args[3]
    return s.fresh(_shape(node, 0), {1}) if training and place == 0 else None


def _bias(out: Any, place: int, where: int, shape: Sequence[int]) -> Labels:
    out = out[0] if isinstance(out, list) else out
    return None if out is None or place != where else _broadcast(out, shape)


def _operand(s: _Harmless, pattern: Tensor, shape: Sequence[int], summed: Sequence[int]) -> Tensor:
    """Return labels of a factor from the ``pattern`` over the result, size 1 along ``summed``: each summand alone."""
    number = torch.Size(shape[axis] for axis in summed).numel()
    base = torch.arange(number).view([size if axis in summed else 1 for axis, size in enumerate(shape)])
    pattern = compact(pattern)
    short = narrowed(pattern, set(range(pattern.ndim)) - set(dependent_axes(pattern)))
    return s.renewed(torch.where(short == 0, 0, short * number + base)).expand(tuple(shape))


@_edge("linear")
def _linear(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Wᵢ x may be anything, and something else in every row, so that only what a row allows by itself is left."""
    if out is None or place == 0:
        return None
    if place == 2:
        return _broadcast(out, _shape(node, 2))
    rows = set(range(out.ndim - 1))
    pattern = _folded(_apart(out, rows), rows).reshape(-1, 1)
    return _operand(s, pattern, _shape(node, 1), [1])


@_edge("convolution")
def _convolution(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    if out is None or place == 0 or node.args[6]:
        return None
    rows = set(range(out.ndim)) - {1}
    if place == 2:
        return _folded(out, rows).reshape(-1)
    groups = int(node.args[8])  # type: ignore[arg-type]
    pattern = _folded(_apart(out, rows), rows).reshape(groups, -1)
    shape = _shape(node, 1)
    return _operand(s, _apart(pattern, {0}).reshape(-1, *[1] * (len(shape) - 1)), shape, range(1, len(shape)))


@_edge("mm", "bmm")
def _product(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """(…, i, k) @ (…, k, j): a factor meets arbitrary numbers at every index of the other."""
    if out is None:
        return None
    own, other = (out.ndim - 1, out.ndim - 2) if place else (out.ndim - 2, out.ndim - 1)
    pattern = _folded(_apart(out, set(range(out.ndim)) - {own}), {other})
    summed = out.ndim - 2 if place else out.ndim - 1
    return _operand(s, pattern, _shape(node, place), [summed])


@_edge("addmm")
def _addmm(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    if out is None:
        return None
    if place == 0:
        return _broadcast(out, _shape(node, 0))
    own, other = (1, 0) if place == 2 else (0, 1)
    pattern = _folded(_apart(out, {other}), {other})
    return _operand(s, pattern, _shape(node, place), [0 if place == 2 else 1])


@_edge("embedding")
def _embedding(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """Every row of the table is a shift of its own."""
    if out is None or place:
        return None
    rows = set(range(out.ndim - 1))
    pattern = _folded(_apart(out, rows), rows).reshape(1, -1)
    return _operand(s, pattern, _shape(node, 0), [0])


@_edge("scaled_dot_product_attention")
def _attention(s: _Harmless, node: fx.Node, place: int, out: Labels) -> Labels:
    """The same shift of all keys shifts all scores of a query alike."""
    shape = _shape(node, place)
    return s.fresh(shape, set(range(len(shape))) - {len(shape) - 2}) if place == 1 else None


def linear_laws(graph: Graph, along: int | None) -> tuple[LinearLaw, ...]:
    """Find the linear laws of a graph; ``along`` is the axis along which the loss does not notice a shift of outputs.

    Two kinds of parameters have them. A factor in a product may move where the product's shift is harmless by itself.
    What is only ever added may move together with whatever else is added there, as far as the sum stays harmless: that
    is a linear system, solved as that of the log-scales is.
    """
    harmless = _Harmless(graph, along)
    units = Units()
    forms: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        units.node = node
        if node.op == "placeholder":
            forms[node] = _shift_of(graph, harmless, units, node)
        elif node.op == "call_function":
            forms[node] = _carried(units, node, forms)
        if isinstance(forms.get(node), Form) and forms[node].terms:
            forms[node] = _checked(units, node, forms[node], harmless)
    found = couplings(units, units.equations.solve(), graph.parameters)
    return tuple(
        LinearLaw(f"Σ {coupling.name.replace(' → ', ' − ')}", coupling.size, coupling.members) for coupling in found
    )


def _shift_of(graph: Graph, harmless: _Harmless, units: Units, node: fx.Node) -> Form | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    # A tied parameter may come in under several names, of which usually one is used.
    twins = [
        other for other in graph.nodes if other.users and graph.trained.get(other.name) == graph.trained.get(node.name)
    ]
    if node.name not in graph.trained or twins != [node]:
        return Form(value.shape)
    allowed = harmless.allowed[node]
    users = _final_users(node)
    if users and all(operator == "added" for operator in users):
        form = units.fresh(value.shape)
        units.parameters[graph.trained[node.name]] = form
        return form
    form = Form(value.shape)
    if allowed is not None:
        own = torch.where(allowed == 0, 0, units.equations.fresh((int(allowed.max()) + 1,))[allowed])
        form = Form.of(compact(own))
    common = Form(value.shape)
    if users == {"embedding"}:
        common = units.fresh(value.shape, {1})
        # Row 0 alone would repeat what is common to all rows.
        form = Form(form.shape, tuple((c, _without_first_row(labels)) for c, labels in form.terms))
    units.parameters[graph.trained[node.name]] = form + common
    return common


def _without_first_row(labels: Tensor) -> Tensor:
    return compact(torch.cat([torch.zeros_like(labels[:1]), labels[1:]]))


def _final_users(node: fx.Node) -> set[str]:
    """Return how a parameter is used behind views: "added", or by which operator else."""
    found: set[str] = set()
    for user in node.users:
        name = _operator(user)
        if name in (*_MOVES, "cat", "neg") or (name == "" and user.op == "call_function"):
            found |= _final_users(user)
        elif name in ("add", "sub") or (name in ("linear", "convolution") and list(user.args).index(node) == 2):
            found.add("added")
        elif name == "addmm" and list(user.args).index(node) == 0:
            found.add("added")
        else:
            found.add(name)
    return found


def _carried(units: Units, node: fx.Node, forms: dict[fx.Node, Any]) -> Any:
    """Carry the shift of what was added through sums and views, and end it elsewhere."""
    name, value = _operator(node), node.meta.get("val")
    if name == "" and getattr(node.target, "__name__", "") == "getitem":
        return forms[node.args[0]][node.args[1]]  # type: ignore[index]
    sources = [source for source in node.all_input_nodes if isinstance(forms.get(source), Form)]
    if any(_carries(node, source) for source in sources if forms[source].terms):
        carried = _sum(units, node, forms)
        if carried is not None:
            return carried
    if isinstance(value, (list, tuple)):
        return [Form(item.shape) if isinstance(item, Tensor) else None for item in value]
    return Form(value.shape) if isinstance(value, Tensor) else None


def _sum(units: Units, node: fx.Node, forms: dict[fx.Node, Any]) -> Any:
    """Return the shift of a sum or of a view; None where this is neither."""
    name = _operator(node)
    shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else None
    operands = [forms.get(a) if isinstance(a, fx.Node) else a for a in node.args]
    if name in ("add", "sub"):
        factor = float(node.kwargs.get("alpha", 1)) * (1 if name == "add" else -1)  # type: ignore[arg-type]
        left, right = (x if isinstance(x, Form) else Form(torch.Size()) for x in operands[:2])
        return (left + right.scaled(factor)).expand(shape)  # type: ignore[arg-type]
    if name == "neg":
        return operands[0].scaled(-1.0)
    if name in ("mul", "div"):
        if not isinstance(operands[1], (int, float)) or node.kwargs:
            return None
        return operands[0].scaled(float(operands[1]) if name == "mul" else 1 / operands[1])
    if name in ("linear", "convolution", "addmm"):
        bias = 0 if name == "addmm" else 2
        rest = [x for i, x in enumerate(operands) if i != bias and isinstance(x, Form)]
        if any(x.terms for x in rest) or not isinstance(operands[bias] if len(operands) > bias else None, Form):
            return None
        form = operands[bias]
        if name == "convolution":
            form = form.map(lambda labels: labels.view(1, -1, *[1] * (len(shape) - 2)))  # type: ignore[arg-type]
        return form.expand(shape)
    rule = RULES[name]
    kwargs = {key: forms.get(a) if isinstance(a, fx.Node) else a for key, a in node.kwargs.items()}
    if name == "cat":
        operands[0] = [forms[part] for part in node.args[0]]  # type: ignore[union-attr]
    return _expanded(rule.apply(units, *operands, **kwargs), node.meta["val"])


def _expanded(form: Any, meta: Any) -> Any:
    if isinstance(meta, (list, tuple)):
        return [_expanded(part, value) for part, value in zip(form, meta, strict=True)]
    return form.expand(meta.shape)


def _checked(units: Units, node: fx.Node, form: Form, harmless: _Harmless) -> Form:
    """Demand that a shift is harmless to those users that do not carry it on; return the simplest form of it."""
    edges = [
        harmless.edge(user, node) for user in node.users if user.op == "call_function" and not _carries(user, node)
    ]
    if node in harmless.outputs:
        edges.append(harmless.output(node.meta["val"]))
    if not edges:
        return form
    if any(edge is None for edge in edges):
        units.zero(form)
        return Form(form.shape)
    allowed = edges[0]
    for edge in edges[1:]:
        allowed = _identified(allowed, edge)
    names, inverse = compact(allowed).unique(return_inverse=True)
    pattern = Form.of(compact(torch.where(names == 0, 0, units.equations.fresh((len(names),)))[inverse]))
    units.zero(form - pattern)
    return pattern


def _carries(user: fx.Node, source: fx.Node) -> bool:
    """Tell whether :func:`_sum` takes a shift of ``source`` to one of ``user``."""
    name = _operator(user)
    if name in ("mul", "div"):
        return user.args[0] is source and isinstance(user.args[1], (int, float)) and not user.kwargs
    if name in ("linear", "convolution", "addmm"):
        return [i for i, argument in enumerate(user.args) if argument is source] == [0 if name == "addmm" else 2]
    return (name in _ADDITIVE and (name in RULES or name in ("add", "sub", "neg"))) or (
        name == "" and isinstance(user.args[0], fx.Node)
    )
