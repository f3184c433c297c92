"""Gradient graphs of micro-batches: built once, kept while memory allows, differentiated once more for every product.

A product on a retained graph costs two gradients; one whose graph must be rebuilt costs three (design, section 6).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import LossError
from torchflat.objective.batches import Batches, row_count, slice_rows
from torchflat.objective.evaluation import Term, non_finite
from torchflat.objective.ledger import Ledger
from torchflat.objective.memory import Memory, measured_graph

__all__ = ["Graph", "Graphs"]

PROBE_ROWS = 16
LARGEST_MICROBATCH = 4096
# A product needs about as much again as the graph it runs through; two are kept free, one for a graph being rebuilt.
WORKSPACE_GRAPHS = 2
# One graph takes at most this share of the budget, so that the workspace stays small beside what is retained.
GRAPH_SHARE = 1 / 16


@dataclass(eq=False)
class Graph:
    """The gradient of the loss sum of one micro-batch, still attached to the graph that made it."""

    weight: float
    rows: int
    gradients: tuple[Tensor, ...]
    leaves: Sequence[Tensor]
    bytes: int

    def product(self, vectors: Sequence[Tensor], tensors: Sequence[int] | None = None) -> list[Tensor]:
        """H v of this micro-batch's loss sum, restricted on both sides to the tensors with these indices.

        Tensors on which the gradient does not depend get zeros.
        """
        chosen = range(len(self.leaves)) if tensors is None else tensors
        leaves = [self.leaves[i] for i in chosen]
        attached = [(self.gradients[i], v) for i, v in zip(chosen, vectors, strict=True) if self.gradients[i].requires_grad]
        if not attached:
            return [torch.zeros_like(leaf) for leaf in leaves]
        gradients, weights = zip(*attached, strict=True)
        return list(
            torch.autograd.grad(
                gradients, leaves, grad_outputs=weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )


class Graphs:
    """The micro-batches of one objective at one point, each with its gradient graph, retained or rebuilt."""

    def __init__(
        self,
        term: Term,
        batches: Batches,
        leaves: Mapping[str, Tensor],
        memory: Memory,
        ledger: Ledger,
        microbatch: int | None,
    ) -> None:
        self.term, self.batches, self.leaves = term, batches, leaves
        self.memory, self.ledger = memory, ledger
        self.microbatch = microbatch
        self.splittable = True
        self._kept: dict[int, Graph] = {}
        self._count: int | None = None
        self._largest = 0

    @property
    def parameters(self) -> list[Tensor]:
        """The leaves, in order."""
        return list(self.leaves.values())

    @property
    def path(self) -> str:
        """How products run: ``retained``, ``rebuilt``, or ``mixed`` when only some graphs fit into memory."""
        if not self._kept:
            return "rebuilt"
        return "retained" if len(self._kept) == self._count else "mixed"

    def microbatches(self) -> Iterator[Any]:
        """All rows, in pieces of at most ``microbatch``; batches that cannot be cut stay whole."""
        for batch in self.batches:
            rows = row_count(batch) if self.splittable else None
            if rows is None:
                yield batch
                continue
            if self.microbatch is None:
                self.microbatch = self._fitting_rows(batch, rows)
            pieces = -(-rows // self.microbatch)
            for piece in range(pieces):
                # Pieces of equal size: a tiny last one would cost as much overhead as a full one.
                yield slice_rows(batch, piece * rows // pieces, (piece + 1) * rows // pieces)

    def for_each(self, work: Callable[[Graph], None]) -> None:
        """Call ``work`` with every micro-batch's graph once. Those beyond the budget are rebuilt and dropped again."""
        self._drop_beyond_budget()
        if self.path == "retained":
            for graph in self._kept.values():
                work(graph)
            return
        index = -1
        for index, batch in enumerate(self.microbatches()):
            if index not in self._kept:
                graph = self._build(batch, index)
                if self.memory.graphs + graph.bytes > self._room():
                    work(graph)
                    # Dropped before the next one is built, or two would be alive at once.
                    del graph
                    continue
                self._keep(index, graph)
            work(self._kept[index])
        self._count = index + 1

    def clear(self) -> None:
        """Drop every retained graph."""
        self._kept.clear()

    def evaluate(self, batch: Any, index: int) -> tuple[Tensor, float]:
        """Loss sum and weight of one micro-batch."""
        self.ledger.charge(forwards=row_count(batch) or 1)
        total, weight = self.term(self.parameters, batch)
        if not torch.isfinite(total):
            raise self.non_finite(f"the loss of micro-batch {index} is {total.item()}", batch)
        return total, weight

    def differentiate(self, batch: Any, index: int, create_graph: bool) -> tuple[Tensor, float, tuple[Tensor, ...]]:
        """Loss sum, weight and gradient of one micro-batch."""
        total, weight = self.evaluate(batch, index)
        if not total.requires_grad:
            raise LossError(
                "the loss does not depend on the audited parameters: check that the model's output reaches the loss "
                "without .detach(), .item() or torch.no_grad(), and that params= names what the model uses"
            )
        self.ledger.charge(backwards=row_count(batch) or 1)
        gradients = torch.autograd.grad(
            total, self.parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return total.detach(), weight, gradients

    def non_finite(self, what: str, batch: Any) -> Exception:
        """An error that says which parameters and inputs hold NaN or infinity."""
        inputs = batch.items() if isinstance(batch, Mapping) else enumerate(batch if isinstance(batch, tuple | list) else ())
        tensors = {f"batch[{key!r}]": item for key, item in inputs if isinstance(item, Tensor)}
        return non_finite(what, {**self.leaves, **tensors})

    def _build(self, batch: Any, index: int) -> Graph:
        leaves = self.parameters
        with measured_graph(leaves) as size:
            total, weight, gradients = self.differentiate(batch, index, create_graph=True)
        self._largest = max(self._largest, size[0])
        return Graph(weight, row_count(batch) or 1, gradients, leaves, size[0])

    def _keep(self, index: int, graph: Graph) -> None:
        self._kept[index] = graph
        self.memory.graphs += graph.bytes
        weakref.finalize(graph, self.memory.release, graph.bytes)

    def _room(self) -> int:
        return self.memory.room_for_graphs(WORKSPACE_GRAPHS * self._largest)

    def _drop_beyond_budget(self) -> None:
        while self._kept and self.memory.graphs > self._room():
            self._kept.popitem()

    def _fitting_rows(self, batch: Any, rows: int) -> int:
        """Rows whose graph takes its share of the budget, from a graph of a few rows."""
        probe = min(rows, PROBE_ROWS)
        graph = self._build(slice_rows(batch, 0, probe), 0)
        self._largest = 0
        share = int(self.memory.total * GRAPH_SHARE / max(1, graph.bytes / probe))
        return max(1, min(rows, share, LARGEST_MICROBATCH))
