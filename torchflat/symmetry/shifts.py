"""Shift laws: which parameters may be moved by a constant, because something later does not notice."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from torchflat.symmetry.calls import MOVES, arguments, looks_up_rows, operator, recentred
from torchflat.symmetry.channels import couplings
from torchflat.symmetry.forms import Form, compact
from torchflat.symmetry.graph import Graph
from torchflat.symmetry.harmless import Harmless, identified
from torchflat.symmetry.linear import LinearLaw
from torchflat.symmetry.units import RULES, Units

__all__ = ["carried", "carries", "linear_laws"]

# Where a layer takes what it does nothing with but add it, along axis 1, or along the last ones.
_CHANNEL_BIAS = {
    "convolution": 2,
    "group_norm": 3,
    "_native_batch_norm_legit": 2,
    "_native_batch_norm_legit_functional": 2,
    "_native_batch_norm_legit_no_training": 2,
}
_BIAS = {"linear": 2, "addmm": 0, "layer_norm": 3, "native_layer_norm": 3, **_CHANNEL_BIAS}
_ADDITIVE = (*MOVES, "add", "sub", "neg", "embedding", "index", "mul", "div", "cat")


def linear_laws(graph: Graph, along: int | None) -> tuple[LinearLaw, ...]:
    """Find the linear laws of a graph; ``along`` is the axis along which the loss does not notice a shift of outputs.

    Two kinds of parameters have them. A factor in a product may move where the product's shift is harmless by itself.
    What is only ever added may move together with whatever else is added there, as far as the sum stays harmless: that
    is a linear system, solved as that of the log-scales is.
    """
    harmless = Harmless(graph, along)
    units = Units()
    forms: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        units.node = node
        if node.op == "placeholder":
            forms[node] = _shift_of(graph, harmless, units, node)
        elif node.op == "call_function":
            forms[node] = carried(units, node, forms)
        if isinstance(forms.get(node), Form) and forms[node].terms:
            forms[node] = _checked(units, node, forms[node], harmless)
    found = couplings(units, units.equations.solve(), graph.parameters)
    return tuple(
        LinearLaw(f"Σ {coupling.name.replace(' → ', ' − ')}", coupling.size, coupling.members) for coupling in found
    )


def _shift_of(graph: Graph, harmless: Harmless, units: Units, node: fx.Node) -> Form | None:
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
    if users == {"added"}:
        form = units.fresh(value.shape)
        units.parameters[graph.trained[node.name]] = form
        return form
    form = Form(value.shape)
    if allowed is not None:
        own = torch.where(allowed == 0, 0, units.equations.fresh((int(allowed.max()) + 1,))[allowed])
        form = Form.of(compact(own))
    common = Form(value.shape)
    if users == {"rows"}:
        common = units.fresh(value.shape, {1})
        # Row 0 alone would repeat what is common to all rows.
        form = Form(form.shape, tuple((c, _without_first_row(labels)) for c, labels in form.terms))
    units.parameters[graph.trained[node.name]] = form + common
    return common


def _without_first_row(labels: Tensor) -> Tensor:
    return compact(torch.cat([torch.zeros_like(labels[:1]), labels[1:]]))


def _final_users(node: fx.Node) -> set[str]:
    """Return how a parameter is used behind views: "added", as a table of "rows", or by which operator else."""
    found: set[str] = set()
    for user in node.users:
        name = operator(user)
        if name in (*MOVES, "cat", "neg") or (name == "" and user.op == "call_function"):
            found |= _final_users(user)
        else:
            found.add(
                "added" if name in ("add", "sub") or _is_bias(user, node) else "rows" if looks_up_rows(user) else name
            )
    return found


def carried(units: Units, node: fx.Node, forms: dict[fx.Node, Any]) -> Any:
    """Carry the shift of what was added through sums and views, and end it elsewhere."""
    name, value = operator(node), node.meta.get("val")
    if name == "" and getattr(node.target, "__name__", "") == "getitem":
        return forms[arguments(node)[0]][arguments(node)[1]]
    sources = [source for source in node.all_input_nodes if isinstance(forms.get(source), Form)]
    if any(carries(node, source) for source in sources if forms[source].terms):
        return _sum(units, node, forms)
    return [_still(item) for item in value] if isinstance(value, (list, tuple)) else _still(value)


def _still(value: Any) -> Form | None:
    return Form(value.shape) if isinstance(value, Tensor) else None


def _sum(units: Units, node: fx.Node, forms: dict[fx.Node, Any]) -> Any:
    """Return the shift of a sum or of a view."""
    name, meta = operator(node), node.meta["val"]
    kwargs: dict[str, Any] = {key: forms.get(a) if isinstance(a, fx.Node) else a for key, a in node.kwargs.items()}
    operands: list[Any] = [forms.get(a) if isinstance(a, fx.Node) else a for a in arguments(node)]
    if name in ("add", "sub"):
        factor = float(kwargs.get("alpha", 1)) * (1 if name == "add" else -1)
        left, right = (x if isinstance(x, Form) else Form(torch.Size()) for x in operands[:2])
        return (left + right.scaled(factor)).expand(meta.shape)
    if name == "neg":
        return operands[0].scaled(-1.0)
    if name in ("mul", "div"):
        return operands[0].scaled(float(operands[1]) if name == "mul" else 1 / operands[1])
    if name in _BIAS:
        result, *others = meta if isinstance(meta, (list, tuple)) else [meta]
        added = operands[_BIAS[name]]
        if name in _CHANNEL_BIAS:
            added = added.map(lambda labels: labels.view(-1, *[1] * (result.ndim - 2)))
        added = added.expand(result.shape)
        return [added, *map(_still, others)] if isinstance(meta, (list, tuple)) else added
    if name == "cat":
        operands[0] = [forms[part] for part in operands[0]]
    return _expanded(RULES[name].apply(units, *operands, **kwargs), meta)


def _expanded(form: Any, meta: Any) -> Any:
    if isinstance(meta, (list, tuple)):
        return [_expanded(part, value) for part, value in zip(form, meta, strict=True)]
    return form.expand(meta.shape)


def _checked(units: Units, node: fx.Node, form: Form, harmless: Harmless) -> Form:
    """Demand that a shift is harmless to those users that do not carry it on; return the simplest form of it."""
    edges = [harmless.edge(user, node) for user in node.users if user.op == "call_function" and not carries(user, node)]
    if node in harmless.outputs:
        edges.append(harmless.output(node.meta["val"]))
    if not edges:
        return form
    if any(edge is None for edge in edges):
        units.zero(form)
        return Form(form.shape)
    allowed = functools.reduce(identified, (edge for edge in edges if edge is not None))
    names, inverse = compact(allowed).unique(return_inverse=True)
    pattern = Form.of(compact(torch.where(names == 0, 0, units.equations.fresh((len(names),)))[inverse]))
    units.zero(form - pattern)
    return pattern


def carries(user: fx.Node, source: fx.Node) -> bool:
    """Tell whether :func:`carried` takes a shift of ``source`` to one of ``user``."""
    name = operator(user)
    if recentred(user, source) is not None or (name == "index" and not looks_up_rows(user)):
        return False
    if name in ("mul", "div"):
        return arguments(user)[0] is source and isinstance(arguments(user)[1], (int, float)) and not user.kwargs
    if name in _BIAS:
        return _is_bias(user, source)
    return (name in _ADDITIVE and (name in RULES or name in ("add", "sub", "neg"))) or (
        name == "" and isinstance(arguments(user)[0], fx.Node)
    )


def _is_bias(user: fx.Node, source: fx.Node) -> bool:
    """Tell whether a layer does nothing with ``source`` but add it."""
    place = _BIAS.get(operator(user))
    return [i for i, argument in enumerate(arguments(user)) if argument is source] == [place]
