"""Gradient graphs of micro-batches: built once, kept while memory allows, differentiated once more for every product.

A product on a retained graph costs two gradients; one whose graph must be rebuilt costs three (design, section 6).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchflat import ops
from torchflat.errors import LossError, NonFiniteError
from torchflat.objective.batches import Batches, row_count, rows_of, slice_rows
from torchflat.objective.evaluation import Term, first_line, out_of_memory
from torchflat.objective.ledger import Ledger
from torchflat.objective.memory import Memory, graph_bytes
from torchflat.objective.plan import PROBE_ROWS, Plan, choose_rows, graphs_that_fit
from torchflat.objective.preflight import SAMPLE_ROWS
from torchflat.objective.scores import RowCurvature

__all__ = ["Graph", "Graphs", "NotDifferentiable", "finite", "non_finite"]

# A product needs about as much again as the graph it runs through; two are kept free, one for a graph being rebuilt.
WORKSPACE_GRAPHS = 2
# Vectors of length n, in float64, that a product and the step of the iteration that asked for it take at their peak:
# six are alive at once, and three more were measured to stay in the allocator's heap.
WORKSPACE_VECTORS = 9


class NotDifferentiable(LossError):
    """A kernel of the model lacks its derivative, or the derivative of its derivative."""


@dataclass(eq=False)
class Graph:
    """The gradient of the loss sum of one micro-batch, still attached to the graph that made it.

    Of each tensor's gradient only its place in the graph is kept; None where it does not depend on the parameters.
    """

    weight: float
    rows: int
    gradients: tuple[GradientEdge | None, ...]
    leaves: Sequence[Tensor]
    bytes: int

    def product(self, vectors: Sequence[Tensor], tensors: Sequence[int] | None = None) -> list[Tensor]:
        """H v of this micro-batch's loss sum, restricted on both sides to the tensors with these indices.

        Tensors on which the gradient does not depend get zeros.
        """
        chosen = range(len(self.leaves)) if tensors is None else tensors
        leaves = [self.leaves[i] for i in chosen]
        edges, weights = [], []
        for i, vector in zip(chosen, vectors, strict=True):
            edge = self.gradients[i]
            if edge is not None:
                edges.append(edge)
                weights.append(vector)
        if not edges:
            return [torch.zeros_like(leaf) for leaf in leaves]
        with _derivative("differentiated twice"):
            products = torch.autograd.grad(
                edges, leaves, grad_outputs=weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        return [_dense(product) for product in products]


class Graphs:
    """The micro-batches of one objective at one point on this rank, each with its gradient graph, kept or rebuilt."""

    def __init__(
        self,
        term: Term,
        batches: Iterable[Any],
        leaves: Mapping[str, Tensor],
        memory: Memory,
        ledger: Ledger,
        microbatch: int | None,
    ) -> None:
        self.term, self.batches, self.leaves = term, batches, leaves
        self.memory, self.ledger = memory, ledger
        self.microbatch = microbatch
        self.limit = microbatch
        self.rows = 0
        self.splittable = True
        self.reason = "as given"
        self._bytes_per_row: float | None = None
        self._planned: tuple[int | None, int | None] = None, None
        self._built_rows, self._built_seconds = 0, 0.0
        self._kept: dict[int, Graph] = {}
        self._count: int | None = None
        self._largest = 0
        self._vectors = WORKSPACE_VECTORS * 8 * sum(leaf.numel() for leaf in leaves.values())
        memory.add_holder(self)

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

    @property
    def plan(self) -> Plan:
        """How passes go through the data, as far as it is known."""
        graphs, planned = self._planned
        rows, reason = (self.microbatch, self.reason) if self.splittable else (None, "batches cannot be cut")
        seconds = self._built_seconds / self._built_rows if self._built_rows else None
        return Plan(rows, reason, self._count or graphs, planned, len(self._kept), self._bytes_per_row, seconds)

    def choose_microbatch(self, batches: Batches) -> None:
        """Set ``microbatch``, from the graph of a few rows of all the data."""
        batch = batches.first()
        largest = rows_of(batch)
        if row_count(batch) is not None:
            batch = slice_rows(batch, 0, min(largest, PROBE_ROWS, self.limit or PROBE_ROWS))
        graph = self._build(batch, 0)
        size = self._bytes_per_row = graph.bytes / max(1, graph.rows)
        self.microbatch, self.reason = choose_rows(size, self.memory.total, self.term.device, self.limit)
        self._largest = int(size * min(self.microbatch, largest))
        self._planned = graphs_that_fit(self.rows, largest, self.microbatch, size, self._room())
        # What is small is slow, and takes little: it would mislead.
        self._largest, self._built_rows, self._built_seconds = 0, 0, 0.0

    def follow(self, other: Graphs) -> None:
        """Take over what was found out about the same function on other rows, or at another point."""
        self.splittable, self.reason, self._bytes_per_row = other.splittable, other.reason, other._bytes_per_row

    def relieve(self) -> str | None:
        """Need less memory, after it ran out; return what was done, or None where nothing is left to do.

        Retained graphs go first, and half of them at most come back; then micro-batches are halved.
        """
        kept = sum(graph.bytes for graph in self._kept.values())
        rows = self.microbatch or self.limit or SAMPLE_ROWS
        if kept:
            self.memory.total = self.memory.vectors + self.memory.graphs - kept // 2
        elif not self.splittable or rows <= 1:
            return None
        else:
            self.limit = rows // 2
            if self.microbatch is not None:
                self.microbatch, self.reason = self.limit, "memory ran out above"
        self.clear()
        if kept:
            return "memory ran out before the budget was spent: fewer graphs were kept"
        return "memory ran out: fewer rows went through the model at once"

    def microbatches(self) -> Iterator[Any]:
        """All rows of this rank, in pieces of at most ``microbatch``; batches that cannot be cut stay whole."""
        for batch in self.batches:
            rows = row_count(batch)
            if rows is None or not self.splittable or self.microbatch is None:
                yield batch
                continue
            pieces = -(-rows // self.microbatch)
            for piece in range(pieces):
                # Pieces of equal size: a tiny last one would cost as much overhead as a full one.
                yield slice_rows(batch, piece * rows // pieces, (piece + 1) * rows // pieces)

    def for_each(self, work: Callable[[Graph, int], None]) -> None:
        """Call ``work`` with every micro-batch's graph once, and its index. Those beyond the budget are rebuilt."""
        self._drop_beyond_budget()
        if self.path == "retained":
            for index, graph in self._kept.items():
                work(graph, index)
            return
        index = -1
        for index, batch in enumerate(self.microbatches()):
            if index not in self._kept:
                graph = self._build(batch, index)
                if self.memory.graphs + graph.bytes > self._room():
                    work(graph, index)
                    # Dropped before the next one is built, or two would be alive at once.
                    del graph
                    continue
                self._keep(index, graph)
            work(self._kept[index], index)
        self._count = index + 1

    def add_values(self) -> tuple[float, float]:
        """Σ loss and Σ weight over all micro-batches."""
        total = weights = 0.0
        with torch.no_grad():
            for index, batch in enumerate(self.microbatches()):
                value, weight = self.evaluate(batch, index)
                total, weights = total + float(value), weights + weight
        return total, weights

    def add_gradients(self, sums: Sequence[Tensor]) -> tuple[float, float]:
        """Add the gradient of Σ loss over all micro-batches to ``sums``; return Σ loss and Σ weight."""
        total = weights = 0.0
        for index, batch in enumerate(self.microbatches()):
            value, weight, gradients = self.differentiate(batch, index, create_graph=False)
            ops.axpy_(sums, list(gradients), 1.0)
            self._refuse_non_finite(f"the gradient of micro-batch {index}", range(len(sums)), gradients)
            total, weights = total + float(value), weights + weight
        return total, weights

    def add_scores(self, score: RowCurvature, scores: Tensor) -> None:
        """Add the score of each row of this rank to ``scores``, in the order of the data."""
        start = 0
        for batch in self.microbatches():
            stop = start + rows_of(batch)
            scores[start:stop] += score(batch)
            self.ledger.charge(forwards=score.evaluations * rows_of(batch))
            start = stop

    def add_products(self, jobs: Sequence[tuple[Sequence[int], Sequence[Tensor], Sequence[Tensor]]]) -> float:
        """For each (tensors, vector, sums) add the product over all micro-batches to ``sums``; return Σ weight."""
        weights = 0.0

        def work(graph: Graph, index: int) -> None:
            nonlocal weights
            for tensors, vector, sums in jobs:
                ops.axpy_(sums, graph.product(vector, tensors), 1.0)
                self.ledger.charge(products=graph.rows)
            weights += graph.weight

        self.for_each(work)
        return weights

    def refuse_non_finite_products(self, jobs: Sequence[tuple[Sequence[int], Sequence[Tensor]]]) -> None:
        """Raise for the first micro-batch whose product of a (tensors, vector) is not finite, and name the tensors."""

        def look(graph: Graph, index: int) -> None:
            for tensors, vector in jobs:
                products = graph.product(vector, tensors)
                self._refuse_non_finite(f"the Hessian product of micro-batch {index}", tensors, products)

        self.for_each(look)

    def _refuse_non_finite(self, what: str, tensors: Sequence[int], values: Sequence[Tensor]) -> None:
        if not all(map(finite, values)):
            names = list(self.leaves)
            named = {names[i]: value for i, value in zip(tensors, values, strict=True)}
            raise non_finite(f"{what} holds NaN or infinity", named)

    def clear(self) -> None:
        """Drop every retained graph."""
        self._kept.clear()
        self._count, self._largest = None, 0

    def drop_one(self) -> bool:
        """Drop a retained graph; say whether there was one."""
        if self._kept:
            self._kept.popitem()
            return True
        return False

    def evaluate(self, batch: Any, index: int) -> tuple[Tensor, float]:
        """Loss sum and weight of one micro-batch."""
        self.ledger.charge(forwards=rows_of(batch))
        total, weight = self.term(self.parameters, batch)
        if not torch.isfinite(total):
            raise self.non_finite(f"the loss of micro-batch {index} is {total.item()}", batch)
        return total, weight

    def differentiate(self, batch: Any, index: int, create_graph: bool) -> tuple[Tensor, float, tuple[Tensor, ...]]:
        """Loss sum, weight and gradient of one micro-batch."""
        total, weight = self.evaluate(batch, index)
        if not total.requires_grad and weight > 0:
            raise LossError(
                "the loss does not depend on the audited parameters: check that the model's output reaches the loss "
                "without .detach(), .item() or torch.no_grad(), and that params= names what the model uses"
            )
        self.ledger.charge(backwards=rows_of(batch))
        if not total.requires_grad:
            return total, weight, tuple(torch.zeros_like(leaf) for leaf in self.leaves.values())
        with _derivative("differentiated"):
            gradients = torch.autograd.grad(
                total, self.parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        return total.detach(), weight, tuple(map(_dense, gradients))

    def non_finite(self, what: str, batch: Any) -> NonFiniteError:
        """Make an error that says which parameters and inputs hold NaN or infinity."""
        items = (
            batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple | list) else ()))
        )
        tensors = {f"batch[{key!r}]": item for key, item in items.items() if isinstance(item, Tensor)}
        return non_finite(what, {**self.leaves, **self.term.constants, **tensors})

    def built(self, batch: Any, index: int) -> Graph:
        """Build the graph of rows that are no micro-batch; it is not kept."""
        self._drop_beyond_budget()
        return self._build(batch, index)

    def _build(self, batch: Any, index: int) -> Graph:
        started = time.perf_counter()
        leaves = self.parameters
        _, weight, gradients = self.differentiate(batch, index, create_graph=True)
        edges = tuple(get_gradient_edge(gradient) if gradient.requires_grad else None for gradient in gradients)
        size = graph_bytes({edge.node for edge in edges if edge is not None}, [*leaves, *self.term.constants.values()])
        self._largest = max(self._largest, size)
        self._built_rows += rows_of(batch)
        self._built_seconds += time.perf_counter() - started
        return Graph(weight, rows_of(batch), edges, leaves, size)

    def _keep(self, index: int, graph: Graph) -> None:
        self.memory.keep_graph(graph, graph.bytes)
        self._kept[index] = graph
        self.memory.tidy(self._workspace)

    @property
    def _workspace(self) -> int:
        return WORKSPACE_GRAPHS * self._largest + self._vectors

    def _room(self) -> int:
        return self.memory.room_for_graphs(self._workspace)

    def _drop_beyond_budget(self) -> None:
        self.memory.tidy(self._workspace)
        self.memory.drop_graphs(self._room(), last=self)


@contextlib.contextmanager
def _derivative(what: str) -> Iterator[None]:
    """Turn what autograd says about a missing derivative into one line."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise NotDifferentiable(f"the loss cannot be {what}: {first_line(error)}") from error


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The extremes are NaN if any entry is, and take one vectorised sweep."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))


def non_finite(where: str, tensors: Mapping[str, Tensor]) -> NonFiniteError:
    """Name the tensors that hold NaN or infinity."""
    bad = [
        f"{name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} entries)"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if not bad:
        return NonFiniteError(f"{where}, though all weights and inputs are finite: it overflows or is undefined there")
    return NonFiniteError(f"{where}; not finite: {', '.join(bad[:5])}")
