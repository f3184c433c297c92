"""The conservation laws of a network: found on its graph, verified by its gradients, and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchflat.errors import LawsError, UsageError, did_you_mean
from torchflat.symmetry.channels import couplings as couplings_of
from torchflat.symmetry.coupling import Coupling, Member, centres
from torchflat.symmetry.fixed_means import FixedMeans, fixed_means
from torchflat.symmetry.graph import Graph, infer, trace
from torchflat.symmetry.linear import LinearLaw
from torchflat.symmetry.modulo import modulo
from torchflat.symmetry.shifts import linear_laws
from torchflat.symmetry.state import state_with
from torchflat.symmetry.units import Units
from torchflat.symmetry.verify import TOLERANCE, gradients, noise, relative

__all__ = ["Laws", "laws"]

Tensors = Mapping[str, Tensor]
Law = Coupling | LinearLaw

# A tenth of a percent: ε in the code cannot be taken away, and is small against variances of order 1.
_LIMIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Laws:
    """Quantities that gradient flow conserves on any data, and the rescalings of the parameters that belong to them.

    ``couplings`` and ``linear`` hold exactly. ``approximate``, a basis of what there is besides, do so only as the ε of
    normalisations goes to 0. ``measured`` says by how much gradients of this network, on normal inputs, contradict
    them, relative to what they are made of: about ε over the smallest variance that is normalised. Near 1 they do not
    hold here at all, as in a network at its initialisation whose activations have a variance below ε.
    ``unknown`` names the operators without a rule that stopped the inference at the places it names, and ``dropped``
    the laws that the graph promised and a gradient contradicted, which is a defect of a rule.
    """

    couplings: tuple[Coupling, ...]
    linear: tuple[LinearLaw, ...] = ()
    approximate: tuple[Coupling, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> dict[str, int]:
        """Number of independent conserved numbers by kind, of those that hold exactly.

        Diagonal ones in which a bias counts from a fixed mean have a kind of their own, "centred".
        """
        total = {"diagonal": 0, "centred": 0, "full": 0, "linear": sum(law.laws for law in self.linear)}
        for coupling in self.couplings:
            total[coupling.named_kind] += coupling.laws
        return total

    @property
    def _exact(self) -> list[Law]:
        return [*self.couplings, *self.linear]

    def __getitem__(self, name: str) -> Coupling:
        """Return the coupling of that name.

        Raises:
            UsageError: there is none.
        """
        for coupling in self.couplings:
            if coupling.name == name:
                return coupling
        raise UsageError(f"no coupling is called {name!r}{did_you_mean(name, [c.name for c in self.couplings])}")

    def values(self, model: nn.Module | Tensors | Tensor) -> dict[str, Tensor]:
        """Return all conserved numbers by name, in float64, of a model, or of a state_dict.

        Where a bias counts from a buffer (``Coupling.centres``), that is the one of the same model or state_dict.

        Raises:
            UsageError: the tensors given lack that buffer.
        """
        tensors = _tensors(model)
        return {law.name: law.value(tensors) for law in self._exact}

    def drift(self, before: nn.Module | Tensors | Tensor, after: nn.Module | Tensors | Tensor) -> dict[str, Tensor]:
        """Return how much every conserved number changed: to first order in the step, gradients leave it alone."""
        old, new = self.values(before), self.values(after)
        return {name: new[name] - old[name] for name in old}

    def residuals(
        self, model: nn.Module | Tensors | Tensor, gradient: Tensors | Tensor | None = None
    ) -> dict[str, float]:
        """Return |θᵀAg| / Σ|θ||Ag| of each law, the largest of its numbers; without ``gradient``, that in ``.grad``.

        θ are the parameters of the model or state_dict, less the buffers of it that they count from.
        """
        if gradient is None:
            if not isinstance(model, nn.Module):
                raise UsageError("residuals: give the gradients, or a module that has them in .grad")
            gradient = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
        tensors, g = _tensors(model), _tensors(gradient)
        floor = noise(g)
        return {law.name: relative(law, tensors, g, floor) for law in self._exact}

    def act(self, model: nn.Module, log_scales: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """Return the state_dict of the network moved along its orbit, which computes the same function.

        Buffers stay. A bias b that counts from a buffer μ goes to μ + exp(exponent · z)(b − μ).

        Args:
            model: left as it is.
            log_scales: for a diagonal coupling z of shape (size,), which multiplies the slices of channel c by
                exp(exponent · z_c); for a full one a symmetric S (size, size), which takes each run M of a member to
                exp(exponent · S) M. By name, those not named staying; or one vector of them all, in order, full ones
                as size² entries.

        Raises:
            UsageError: a name is unknown, a shape does not fit, or S is not symmetric.
        """
        return state_with(model, self.moved(_tensors(model), log_scales))

    def moved(self, tensors: Mapping[str, Tensor], log_scales: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """Do what :meth:`act` does to tensors by name, and return new ones for those that change.

        Raises:
            UsageError: as there, or the tensors lack a buffer that a parameter counts from.
        """
        scales = self._by_name(log_scales)
        result = dict(tensors)
        offsets = centres([self[name] for name in scales], tensors)
        for parameter, centre in offsets.items():
            result[parameter] = tensors[parameter].double() - centre
        for name, z in scales.items():
            for member in self[name].members:
                rows = member.slices(result[member.parameter])
                result[member.parameter] = member.with_slices(
                    result[member.parameter], _scaled(self[name], member, rows, z.to(rows))
                )
        for parameter, centre in offsets.items():
            result[parameter] = (result[parameter] + centre).to(tensors[parameter].dtype)
        return result

    def _by_name(self, log_scales: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
        if isinstance(log_scales, Tensor):
            sizes = [c.size if c.kind == "diagonal" else c.size**2 for c in self.couplings]
            if log_scales.numel() != sum(sizes):
                raise UsageError(f"log_scales has {log_scales.numel()} entries; these laws take {sum(sizes)}")
            parts = log_scales.reshape(-1).split(sizes)
            return {
                c.name: part if c.kind == "diagonal" else part.view(c.size, c.size)
                for c, part in zip(self.couplings, parts, strict=True)
            }
        for name, z in log_scales.items():
            coupling = self[name]
            expected = (coupling.size,) if coupling.kind == "diagonal" else (coupling.size, coupling.size)
            if tuple(z.shape) != expected:
                raise UsageError(f"the log-scales of {name!r} have shape {tuple(z.shape)}; it takes {expected}")
            if z.ndim == 2 and not torch.allclose(z, z.T):
                raise UsageError(f"the log-scales of {name!r} are not symmetric: take (S + S.T) / 2")
        return dict(log_scales)

    @classmethod
    def from_group(
        cls,
        B: Tensor | None = None,
        blocks: Sequence[tuple[Tensor, Tensor]] = (),
        names: Sequence[str] | None = None,
    ) -> Laws:
        """Make laws of a function of one flat x, called "x" in :meth:`values`, from a group that is known.

        Args:
            B: (n, k): the function stays where every x_p is multiplied by exp((Bz)_p), for all z (k,). Column i
                conserves Σ_p B[p, i] x_p².
            blocks: (writers, readers), index matrices (r, e) into x: the function stays where x[writers] ↦
                G x[writers] and x[readers] ↦ G⁻ᵀ x[readers], for all invertible G. Conserved: x[writers] x[writers]ᵀ −
                x[readers] x[readers]ᵀ.
            names: of the columns, then of the blocks.

        >>> found = Laws.from_group(B=torch.tensor([[1.0], [-1.0]]))
        >>> found.values(torch.tensor([2.0, 1.0]))["law 1"].tolist()
        [3.0]
        """
        number = (0 if B is None else B.shape[1]) + len(blocks)
        if names is None:
            names = [f"law {i + 1}" for i in range(number)]
        if len(names) != number or len(set(names)) != number:
            raise UsageError(f"names: {len(names)} given, {len(set(names))} different; the group has {number} parts")
        found = []
        for i, column in enumerate(() if B is None else B.T):
            members = tuple(
                Member("x", None, places[:, None], torch.zeros(len(places), dtype=torch.int64), float(exponent))
                for exponent in column[column != 0].unique()
                for places in [(column == exponent).nonzero()[:, 0]]
            )
            found.append(Coupling(names[i], 1, members, "diagonal"))
        for name, sides in zip(names[number - len(blocks) :], blocks, strict=True):
            size = len(sides[0])
            members = tuple(
                Member("x", None, index, torch.arange(size), exponent)
                for index, exponent in zip(sides, (1.0, -1.0), strict=True)
            )
            found.append(Coupling(name, size, members, "full"))
        return cls(tuple(found))

    def degenerate(self, model: nn.Module | Tensors | Tensor) -> dict[str, Tensor]:
        """Return by coupling the channels of which one side is zero: a dead unit, a zero row, a gain that began at 0.

        Such a channel has its law, but rescaling it does nothing, or has no best scale.
        """
        tensors = _tensors(model)
        found = {}
        for coupling in self.couplings:
            sides = [side if side.ndim == 1 else side.diagonal() for side in coupling.sides(tensors)]
            empty = (sides[0] == 0) | (sides[1] == 0)
            if bool(empty.any()):
                found[coupling.name] = empty.nonzero()[:, 0]
        return found

    def describe(self) -> str:
        """Return a table of the laws in words: what is coupled, how many channels, what is conserved."""
        rows = [("law", "kind", "channels", "laws", "")]
        for coupling in self.couplings:
            counted = ", ".join(f"{parameter} − {centre}" for parameter, centre in coupling.centres.items())
            note = f"with {counted}" if counted else ""
            rows.append((coupling.name, coupling.named_kind, str(coupling.size), str(coupling.laws), note))
        for law in self.linear:
            rows.append((law.name, "linear", str(law.size), str(law.laws), ""))
        for coupling in self.approximate:
            note = f"as ε → 0; here to {self.measured[coupling.name]:.0e}"
            rows.append((coupling.name, coupling.named_kind, str(coupling.size), str(coupling.laws), note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for name, residual in self.dropped.items():
            lines.append(f"dropped: {name}: a gradient contradicts it (residual {residual:.1e})")
        for place, operator in self.unknown.items():
            lines.append(f"no rule for {operator} (at {place}): what it touches was taken to be fixed")
        return "\n".join(lines)


def _scaled(coupling: Coupling, member: Member, rows: Tensor, z: Tensor) -> Tensor:
    if coupling.kind == "diagonal":
        return rows * (member.exponent * z[member.channel.to(z.device)]).exp()[:, None]
    matrix = torch.linalg.matrix_exp(member.exponent * z)
    return torch.cat([matrix @ run for run in rows.split(coupling.size)])


def _tensors(model: nn.Module | Tensors | Tensor) -> Mapping[str, Tensor]:
    if isinstance(model, nn.Module):
        return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {"x": model} if isinstance(model, Tensor) else model


def laws(
    model: nn.Module,
    example_input: Any,
    mode: Literal["eval", "train"] = "eval",
    loss: Callable[..., Tensor] | nn.Module | None = None,
    points: int = 3,
    seed: int = 0,
) -> Laws:
    """Find the conservation laws of a network on its graph, and verify each with random backward passes in float64.

    A law is a rescaling of the parameters, by channel or by an invertible matrix, that leaves every output as it is
    whatever the input, with buffers fixed. Each entry of every tensor of the exported ATen graph gets an unknown
    log-scale, each operator its rule says which equations these obey, inputs, buffers and outputs are pinned to 0, and
    the solutions are the group. A bias that nothing sees but batch normalisation with a fixed mean is rescaled about
    that mean.

    Args:
        model: left as it is. Parameters that do not require grad are taken for constants.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        mode: "eval", or "train", where batch normalisation uses the statistics of the batch.
        loss: ``torch.nn.functional.cross_entropy`` or an ``nn.CrossEntropyLoss``, which do not notice a shift of all
            logits: then the sum of the last layer's rows is conserved too. Without it, laws are those of any loss.
        points: number of backward passes, the first at the model itself, the others at perturbed parameters.
        seed: of inputs, cotangents and perturbations.

    Raises:
        UsageError: ``mode`` is neither; ``loss`` is another.
        LawsError: the model cannot be exported, or copied; nothing requires grad.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(laws(model, torch.zeros(1, 3)).describe())
    law    kind      channels  laws
    0 → 2  diagonal  4         4
    """
    if mode not in ("eval", "train"):
        raise UsageError(f"mode={mode!r}: laws are those of mode='eval' or of mode='train'")
    inputs, keywords = _arguments(example_input)
    if not any(p.requires_grad for p in model.parameters()):
        raise LawsError("no parameter requires grad, so that nothing can be conserved: unfreeze those that are trained")
    along = _class_axis(loss)
    graph = trace(model, inputs, keywords, mode)
    means = fixed_means(graph)
    scalings, unknown = _inferred(graph, means, limit=False)
    shapes = {name: graph.shape(name) for name in graph.parameters}
    approximate = _beyond(_inferred(graph, means, limit=True)[0], scalings, shapes)
    exact: list[Law] = [*scalings, *linear_laws(graph, along)]

    def residuals(promised: Sequence[Law], limit: bool) -> dict[str, float]:
        passes = gradients(model, inputs, keywords, mode, along, points, seed, limit) if promised else ()
        return _largest(promised, passes)

    measured = residuals([*exact, *approximate], limit=False)
    in_limit = residuals(approximate, limit=True)
    dropped = {law.name: measured[law.name] for law in exact if not measured[law.name] <= TOLERANCE}
    # Where ε stands in the code and not in a module it stays, and the law is judged by what is left of it.
    dropped |= {name: residual for name, residual in in_limit.items() if not residual <= _LIMIT_TOLERANCE}
    held = [law for law in exact if law.name not in dropped]
    return Laws(
        tuple(law for law in held if isinstance(law, Coupling)),
        tuple(law for law in held if isinstance(law, LinearLaw)),
        tuple(law for law in approximate if law.name not in dropped),
        unknown,
        dropped,
        {law.name: measured[law.name] for law in approximate if law.name not in dropped},
    )


def _largest(promised: Sequence[Law], passes: Iterable[tuple[Tensors, Tensors]]) -> dict[str, float]:
    """Return the largest relative residual of each law."""
    largest = {law.name: 0.0 for law in promised}
    for point, gradient in passes:
        floor = noise(gradient)
        for law in promised:
            largest[law.name] = max(largest[law.name], relative(law, point, gradient, floor))
    return largest


def _class_axis(loss: Callable[..., Tensor] | nn.Module | None) -> int | None:
    """Return the axis of the output along which the loss is a function of differences only."""
    if loss is None:
        return None
    if loss is nn.functional.cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        return 1
    raise UsageError(
        f"loss={loss!r}: only the softmax cross-entropy has laws of its own; leave it out for those of any loss"
    )


def _arguments(example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def _inferred(graph: Graph, means: FixedMeans, limit: bool) -> tuple[tuple[Coupling, ...], Mapping[str, str]]:
    units = Units(limit, means.centres, means.calls)
    infer(graph, units)
    return couplings_of(units, units.equations.solve(), graph.parameters), units.unknown


def _beyond(limit: Sequence[Coupling], exact: Sequence[Coupling], shapes: Mapping[str, torch.Size]) -> list[Coupling]:
    """Return a basis of what is in ``limit`` modulo ``exact``, which it contains."""
    known, in_limit = {_signature(coupling) for coupling in exact}, {_signature(coupling) for coupling in limit}
    more = [coupling for coupling in limit if _signature(coupling) not in known]
    if not known <= in_limit:
        # Other variables are free in the limit, so that an exact law may be a sum of several.
        more = modulo(more, exact, shapes)
    names = {coupling.name for coupling in exact}
    return [replace(c, name=f"{c.name} (ε → 0)") if c.name in names else c for c in more]


def _signature(coupling: Coupling) -> tuple[Any, ...]:
    return (
        coupling.kind,
        coupling.size,
        tuple(
            (m.parameter, m.axis, m.exponent, m.centre, m.index.sum().item(), m.index.numel()) for m in coupling.members
        ),
    )
