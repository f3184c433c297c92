"""The graph of a model in ATen operators, and its interpretation in units."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, default_decompositions, export
from torch.export.graph_signature import InputKind, OutputKind

from torchflat.errors import LawsError
from torchflat.objective.state import modules_kept, plain_autograd, random_states_kept
from torchflat.symmetry import rules
from torchflat.symmetry.forms import Form
from torchflat.symmetry.units import RULES, Units, Weight

__all__ = ["Graph", "infer", "trace"]

assert rules  # The import fills the table.

_ATEN = torch.ops.aten
# What has a rule of its own stays whole; everything else becomes a few primitives without side effects.
_KEPT = (
    _ATEN.linear.default,
    _ATEN.layer_norm.default,
    _ATEN.group_norm.default,
    _ATEN.rms_norm.default,
    _ATEN.scaled_dot_product_attention.default,
    _ATEN.silu.default,
    _ATEN.leaky_relu.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.upsample_bilinear2d.vec,
    _ATEN.std.correction,
    _ATEN.square.default,
    _ATEN.addmm.default,
)


_CREATORS = ("full", "zeros", "new_zeros", "new_full", "zeros_like", "full_like", "scalar_tensor")


@dataclass(frozen=True, eq=False)
class Graph:
    """An exported program: which inputs are trained parameters, which are numbers that stay, and what is an output.

    ``buffers`` names those of ``fixed`` that are buffers of the model.
    """

    program: ExportedProgram
    trained: Mapping[str, str]
    fixed: Mapping[str, Tensor | None]
    buffers: Mapping[str, str]
    outputs: tuple[fx.Node, ...]

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in order of execution."""
        return list(self.program.graph.nodes)

    @property
    def parameters(self) -> list[str]:
        """The names of the trained parameters, each once however often it is tied."""
        return list(dict.fromkeys(self.trained.values()))

    def shape(self, parameter: str) -> torch.Size:
        """Return the shape of a trained parameter."""
        tensor: Tensor = self.program.state_dict[parameter]
        return tensor.shape


def trace(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], mode: str) -> Graph:
    """Export ``model`` in ``mode`` ("eval" or "train"), and leave it as it was.

    Raises:
        LawsError: torch.export cannot follow the model.
    """
    with modules_kept(model, mode == "train"), random_states_kept(), _slow_attention():
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            program = export(model, inputs, dict(keywords), strict=False)
            table = default_decompositions()
            for operator in _KEPT:
                table.pop(operator, None)
            program = program.run_decompositions(table)
        except TorchErrors as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LawsError(
                f"torch.export cannot follow the model: {said}; write choices that depend on values with torch.where"
            ) from error
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if not torch.equal(buffer, buffers[name]):
                        buffer.copy_(buffers[name])
    # A module that is used twice is exported under the name of its last place.
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = model.named_parameters(remove_duplicate=False)
    trained = {alias: first[id(p)] for alias, p in aliases if p.requires_grad}
    first = {id(buffer): name for name, buffer in model.named_buffers()}
    held = {alias: first[id(buffer)] for alias, buffer in model.named_buffers(remove_duplicate=False)}
    return _graph(program, trained, held)


TorchErrors = (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError)


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention and nn.TransformerEncoderLayer from replacing themselves by one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with plain_autograd(torch.device("cpu")), warnings.catch_warnings():
            # An nn.RNN gathers its weights in a list while it is exported.
            warnings.filterwarnings("ignore", message=".*were assigned during export")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _graph(program: ExportedProgram, names: Mapping[str, str], held: Mapping[str, str]) -> Graph:
    trained: dict[str, str] = {}
    fixed: dict[str, Tensor | None] = {}
    buffers: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.BUFFER and spec.target in held:
            buffers[name] = held[spec.target]
        if spec.kind is InputKind.PARAMETER and spec.target in names:
            trained[name] = names[str(spec.target)]
        elif spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            fixed[name] = program.state_dict[str(spec.target)]
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            # A scalar that the code made is a literal, a scalar buffer is any number.
            value = program.constants[str(spec.target)]
            fixed[name] = value if value.ndim or spec.kind is InputKind.CONSTANT_TENSOR else None
        else:
            fixed[name] = None
    nodes = {node.name: node for node in program.graph.nodes}
    user = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    outputs = tuple(nodes[spec.arg.name] for spec in user if getattr(spec.arg, "name", "") in nodes)
    return Graph(program, trained, fixed, buffers, outputs)


def infer(graph: Graph, units: Units) -> None:
    """Carry units through the graph."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        units.node = node
        if node.op == "placeholder":
            values[node] = _input(graph, node)
        elif node.op == "call_function":
            values[node] = _call(units, node, values)
        elif node.op == "get_attr":
            values[node] = None
    for node in graph.outputs:
        for form in _forms(values[node]):
            units.zero(units.form(form))
    units.close({name: graph.shape(name) for name in graph.trained.values()})


def _input(graph: Graph, node: fx.Node) -> Form | Weight | Tensor | float | None:
    shape = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else None
    if node.name in graph.trained:
        return Weight(graph.trained[node.name], torch.empty(graph.shape(graph.trained[node.name]), device="meta"))
    value = graph.fixed[node.name]
    if shape is None:
        return None
    if value is not None and not shape and node.meta["val"].is_floating_point():
        return float(value)
    if node.meta["val"].is_floating_point() or node.meta["val"].is_complex():
        return Form(shape)
    return value


def _call(units: Units, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    found_arguments: Any = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    args, kwargs = found_arguments
    if not isinstance(node.target, torch._ops.OpOverload):
        if getattr(node.target, "__name__", "") == "getitem":
            return args[0][args[1]] if args[0] is not None else _pinned(node.meta["val"])
        return _unknown(units, node, args, kwargs)
    known = all(isinstance(values[source], Tensor) for source in node.all_input_nodes)
    if known and not _with_units(node.meta["val"]):
        return node.target(*args, **_on_cpu(kwargs))
    name = node.target._schema.name.removeprefix("aten::")
    found = RULES.get(name)
    viewed = _viewed(node, args, kwargs)
    if viewed is not None:
        return viewed
    forms = [form for value in (*args, *kwargs.values()) for form in _forms(value)]
    if forms and name not in _CREATORS and all(isinstance(form, Form) and not form.terms for form in forms):
        return _pinned(node.meta["val"])
    if not forms and name not in _CREATORS:
        return _pinned(node.meta["val"])
    if found is None:
        return _unknown(units, node, args, kwargs)
    if not found.lazy:
        args, kwargs = _settled(units, args), {key: _settled(units, value) for key, value in kwargs.items()}
    return _finished(units, found.apply(units, *args, **kwargs), node.meta["val"])


def _viewed(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return views of a weight that has no units yet as such, or None if this call is not one."""
    if not args or not isinstance(args[0], Weight) or any(True for _ in _forms((args[1:], list(kwargs.values())))):
        return None
    weight = args[0]
    base = weight.view if weight.view._base is None else weight.view._base
    assert isinstance(node.target, torch._ops.OpOverload)
    if not any(argument.alias_info for argument in node.target._schema.arguments):
        return None
    result = node.target(weight.view, *args[1:], **kwargs)
    views = result if isinstance(result, (list, tuple)) else [result]
    if not all(isinstance(v, Tensor) and v._base is base and 0 not in v.stride() for v in views):
        return None
    found = [Weight(weight.name, view) for view in views]
    return found if isinstance(result, (list, tuple)) else found[0]


def _unknown(units: Units, node: fx.Node, args: Any, kwargs: Any) -> Any:
    forms = list(_forms((args, list(kwargs.values()))))
    if any(not isinstance(form, Form) or form.terms for form in forms):
        units.unknown.setdefault(node.name, _operator(node))
    for form in forms:
        units.zero(units.form(form))
    return _pinned(node.meta.get("val"))


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _finished(units: Units, result: Any, meta: Any) -> Any:
    """Broadcast what a rule returned to the shape of the result, and note which channels it has."""
    if isinstance(meta, (list, tuple)):
        parts = result if isinstance(result, (list, tuple)) else [None] * len(meta)
        return [_finished(units, part, value) for part, value in zip(parts, meta, strict=False)]
    if result is None:
        return _pinned(meta)
    if isinstance(result, float):
        return result
    whole = result.expand(meta.shape)
    units.mixing.fibres(whole, set(range(len(whole.shape))))
    return whole


def _pinned(meta: Any) -> Any:
    if isinstance(meta, (list, tuple)):
        return [_pinned(value) for value in meta]
    return Form(meta.shape) if _with_units(meta) else None


def _with_units(meta: Any) -> bool:
    return isinstance(meta, Tensor) and (meta.is_floating_point() or meta.is_complex())


def _forms(value: Any) -> Iterator[Form | Weight]:
    if isinstance(value, (Form, Weight)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _forms(item)


def _settled(units: Units, value: Any) -> Any:
    if isinstance(value, Weight):
        return units.form(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_settled(units, item) for item in value)
    return value


def _on_cpu(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
