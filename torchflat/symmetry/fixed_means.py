"""Biases that count from a fixed mean: what batch normalisation by its buffers subtracts from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from torchflat.symmetry.calls import arguments, operator
from torchflat.symmetry.forms import Form, same_labels
from torchflat.symmetry.graph import Graph
from torchflat.symmetry.shifts import carried, carries
from torchflat.symmetry.units import Units

__all__ = ["FixedMeans", "fixed_means"]

# Of what a shift passes, these move a bias among others, or to other channels.
_REARRANGED = ("cat", "index", "embedding")


@dataclass(frozen=True)
class FixedMeans:
    """``centres``: the mean that each such bias counts from, by parameter; ``calls``: what subtracts these means."""

    centres: Mapping[str, str] = field(default_factory=dict)
    calls: frozenset[fx.Node] = frozenset()


def fixed_means(graph: Graph) -> FixedMeans:
    """Find the biases that nothing sees but batch normalisations in eval mode, all with the same mean.

    Such a normalisation takes x = (what has no constant part) + b to γ(x − μ)/σ + β. So b may count from μ: where x − μ
    is multiplied by a factor, so are b − μ and the rest of x, and what comes before x has no other way to tell. Of
    several biases that are added before one normalisation the first counts from its mean, the others from 0; their
    differences are conserved by themselves. Channels must be in the order of the normalisation.
    """
    normalisations = [node for node in graph.nodes if _mean(graph, node) is not None]
    centres: dict[str, str] = {}
    calls: set[fx.Node] = set()
    if not normalisations:
        return FixedMeans()
    for bias in graph.nodes:
        if bias.name not in graph.trained or graph.trained[bias.name] in centres or not bias.users:
            continue
        seen = _seen_by(graph, bias)
        means = {str(_mean(graph, node)) for node in seen}
        if len(means) == 1 and not calls.intersection(seen):
            centres[graph.trained[bias.name]] = means.pop()
            calls |= seen
    return FixedMeans(centres, frozenset(calls))


def _mean(graph: Graph, node: fx.Node) -> str | None:
    """Return the buffer that a normalisation subtracts, if it is one that has a fixed mean."""
    if operator(node) != "_native_batch_norm_legit_no_training":
        return None
    mean = arguments(node)[3]
    return graph.buffers.get(mean.name) if isinstance(mean, fx.Node) else None


def _seen_by(graph: Graph, bias: fx.Node) -> set[fx.Node]:
    """Return the normalisations that ``bias`` is added before, channel by channel; empty if anything else sees it."""
    name, value = graph.trained[bias.name], bias.meta["val"]
    twins = [node for node in graph.nodes if node.users and graph.trained.get(node.name) == name]
    if twins != [bias] or value.ndim != 1 or not value.is_floating_point():
        return set()
    units = Units()
    own = units.fresh(value.shape)
    forms: dict[fx.Node, Any] = {bias: own}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if _moves(forms.get(source))]
        if not sources:
            continue
        if _mean(graph, node) is not None and sources == [arguments(node)[0]]:
            if not _by_channel(forms[sources[0]], own):
                return set()
            found.add(node)
        elif operator(node) not in _REARRANGED and all(carries(node, source) for source in sources):
            units.node = node
            forms[node] = carried(units, node, forms)
        else:
            return set()
    return found


def _moves(shift: Any) -> bool:
    """Tell whether a shift of the bias reaches a tensor, or one of several."""
    return any(map(_moves, shift)) if isinstance(shift, list) else isinstance(shift, Form) and bool(shift.terms)


def _by_channel(shift: Form, own: Form) -> bool:
    """Tell whether entry i of the bias is what is added to channel i, and nothing else is."""
    if len(shift.terms) != 1 or shift.shape[1] != own.shape[0]:
        return False
    ((coefficient, labels),) = shift.terms
    ((_, channels),) = own.terms
    expected = channels.view(1, -1, *[1] * (len(shift.shape) - 2)).expand(shift.shape)
    return coefficient == 1 and same_labels(labels, expected)
