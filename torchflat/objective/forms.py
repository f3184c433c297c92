"""vᵀHv group by group, over groups of rows drawn at random: what shows how far chance in the data moves a curvature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.objective.batches import row_count, rows_of, take_rows
from torchflat.objective.graphs import Graphs

__all__ = ["Forms", "group_forms"]


@dataclass(frozen=True)
class Forms:
    """What each group g of rows adds to vᵀHv = Σ sums / Σ weights, in float64 on the CPU, each of shape (groups,).

    The batches of the data are strata. The rows of one fall to its groups at random, so that these are random samples
    of the stratum in whatever order the rows come. A batch that cannot be cut is one group, and counts as one unit.
    """

    weights: Tensor
    sums: Tensor
    units: Tensor
    strata: Tensor
    cut: bool

    @classmethod
    def of(cls, table: Tensor) -> Forms:
        """Read the table of :func:`group_forms`; strata are numbered from 0 on."""
        weights, sums, units, numbers, cut = table.T
        strata = torch.unique(numbers, return_inverse=True)[1]
        return cls(weights, sums, units, strata, bool(cut.all()))

    @property
    def mean(self) -> float:
        """vᵀHv over all the data."""
        return float(self.sums.sum() / self.weights.sum())


def group_forms(graphs: Graphs, vector: Sequence[Tensor], share: float, seed: int, first: int) -> Tensor:
    """Return the columns of :class:`Forms`, of at least ``share`` groups for each row, in one table.

    Every row goes through one graph that is built, used once and dropped: a micro-batch at most is alive at a time.
    Strata get numbers of their own from ``first`` on.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    table: list[tuple[float, ...]] = []
    for stratum, batch in enumerate(graphs.batches, first):
        whole = row_count(batch) is None or not graphs.splittable
        for piece in [batch] if whole else _random_pieces(graphs, batch, share, generator):
            graph = graphs.built(piece, len(table))
            form = float(ops.dot(vector, graph.product(vector)))
            graphs.ledger.charge(products=graph.rows)
            table.append((graph.weight, form, 1 if whole else rows_of(piece), stratum, not whole))
            # Dropped before the next one is built, or two would be alive at once.
            del graph
    return torch.tensor(table, dtype=torch.float64).reshape(-1, 5)


def _random_pieces(graphs: Graphs, batch: Any, share: float, generator: torch.Generator) -> Iterator[Any]:
    """Cut a batch into pieces of random rows: its share of the groups, two at least, none above the micro-batch."""
    rows = rows_of(batch)
    largest = graphs.microbatch or rows
    count = min(rows, max(2, -(-rows // largest), math.ceil(rows * share)))
    for chosen in torch.randperm(rows, generator=generator, device="cpu").tensor_split(count):
        yield take_rows(batch, chosen.sort().values.tolist())
