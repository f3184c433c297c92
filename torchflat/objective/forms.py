"""vᵀHv group by group, over groups of rows drawn at random: what shows how far chance in the data moves a curvature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import DataError
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

    @property
    def mean(self) -> float:
        """vᵀHv over all the data."""
        return float(self.sums.sum() / self.weights.sum())


def group_forms(graphs: Graphs, vector: Sequence[Tensor], groups: int, seed: int) -> Forms:
    """Return the forms of ``groups`` groups at least, as far as there are rows; for :meth:`Objective.quadratic_forms`.

    Every row goes through one graph that is built, used once and dropped: a micro-batch at most is alive at a time.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    table: list[tuple[float, float, int, int]] = []
    seen, cut = 0, True
    for stratum, batch in enumerate(graphs.batches):
        seen += rows_of(batch)
        whole = row_count(batch) is None or not graphs.splittable
        cut = cut and not whole
        for piece in [batch] if whole else _random_pieces(graphs, batch, groups, generator):
            graph = graphs.built(piece, len(table))
            form = float(ops.dot(vector, graph.product(vector)))
            graphs.ledger.charge(products=graph.rows)
            table.append((graph.weight, form, 1 if whole else rows_of(piece), stratum))
            # Dropped before the next one is built, or two would be alive at once.
            del graph
    if seen != graphs.batches.rows:
        raise DataError(f"the data changes between passes: {graphs.batches.rows} rows at first, and now {seen}")
    weights, sums, units, strata = (torch.tensor(column, dtype=torch.float64) for column in zip(*table, strict=True))
    return Forms(weights, sums, units, strata.long(), cut)


def _random_pieces(graphs: Graphs, batch: Any, groups: int, generator: torch.Generator) -> Iterator[Any]:
    """Cut a batch into pieces of random rows: its share of the groups, two at least, none above the micro-batch."""
    rows = rows_of(batch)
    largest = graphs.microbatch or rows
    count = min(rows, max(2, -(-rows // largest), -(-rows * groups // graphs.batches.rows)))
    for chosen in torch.randperm(rows, generator=generator, device="cpu").tensor_split(count):
        yield take_rows(batch, chosen.sort().values.tolist())
