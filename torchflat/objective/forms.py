"""f and vᵀHv group by group, over groups of rows drawn at random: what shows how far chance in the data moves them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.distributed import Team
from torchflat.objective.batches import row_count, rows_of, take_rows
from torchflat.objective.graphs import Graphs

__all__ = ["Forms", "deal", "group_forms", "group_values"]

# Groups that the rows of one stratum are dealt to by :func:`deal`. More of them cut the batches into smaller pieces;
# fewer leave less to tell the spread inside the stratum from.
DEALT = 4


@dataclass(frozen=True)
class Forms:
    """What each group g of rows adds to vᵀHv, or to f(x), = Σ sums / Σ weights: float64 on the CPU, of shape (groups,).

    Parts of the data are strata: its batches for vᵀHv, and for f(x) ranges of rows that do not depend on batches. The
    rows of one fall to its groups at random, so that these are random samples of the stratum in whatever order the rows
    come. ``units`` counts the rows of a group. A batch that cannot be cut is one group, and counts as one unit.
    """

    weights: Tensor
    sums: Tensor
    units: Tensor
    strata: Tensor
    cut: bool

    @classmethod
    def of(cls, table: Tensor) -> Forms:
        """Read a table of weight, sum, units, stratum and whether rows were cut; strata are numbered from 0 on."""
        weights, sums, units, numbers, cut = table.T
        strata = torch.unique(numbers, return_inverse=True)[1]
        return cls(weights, sums, units, strata, bool(cut.all()))

    @classmethod
    def merged(cls, pieces: Tensor) -> Forms:
        """Add up the pieces of each group in the table of :func:`group_values`; groups come in their order."""
        groups, index = torch.unique(pieces[:, 0], return_inverse=True)
        table = pieces.new_zeros(len(groups), 5)
        table[:, :3].index_add_(0, index, pieces[:, 1:4])
        table[index, 3:] = pieces[:, 4:]
        return cls.of(table)

    @property
    def mean(self) -> float:
        """vᵀHv, or f(x), over all the data."""
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


def deal(rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """Deal rows to groups at random: the group of each row, (rows,), and the stratum of each group; both int64.

    It depends on nothing but the arguments. Strata are ranges of rows, each dealt to a few groups of its own, so that a
    pass in the order of the data cuts a batch into few pieces. Where there are fewer rows than groups, each is one.

    >>> labels, strata = deal(12, 8, seed=0)
    >>> sorted(labels[:6].tolist()), sorted(labels[6:].tolist()), strata.tolist()
    ([0, 0, 1, 1, 2, 3], [4, 4, 5, 5, 6, 7], [0, 0, 0, 0, 1, 1, 1, 1])
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    count = min(groups, rows)
    ranges = max(1, count // DEALT)
    labels = torch.empty(rows, dtype=torch.int64, device="cpu")
    strata = torch.empty(count, dtype=torch.int64, device="cpu")
    parts = zip(_parts(rows, ranges), _parts(count, ranges), strict=True)
    for stratum, (members, own) in enumerate(parts):
        order = torch.randperm(len(members), generator=generator, device="cpu")
        for group, dealt in zip(own, order.tensor_split(len(own)), strict=True):
            labels[members[0] + dealt] = group
        strata[own] = stratum
    return labels, strata


def _parts(length: int, count: int) -> tuple[Tensor, ...]:
    return torch.arange(length, device="cpu").tensor_split(count)


def group_values(graphs: Graphs, labels: Tensor, strata: Tensor, team: Team) -> Tensor:
    """Evaluate each group's rows of this rank, without gradients: a table for :meth:`Forms.merged`, a line per piece.

    A line has group, weight, Σ loss, units, stratum, and whether rows were cut. Batches that cannot be cut are groups
    and strata of their own, by their number in the data.
    """
    table: list[tuple[float, ...]] = []

    def evaluate(piece: Any, group: int, stratum: int, units: int) -> None:
        total, weight = graphs.evaluate(piece, len(table))
        table.append((group, weight, float(total), units, stratum, graphs.splittable))

    start = team.share(len(labels)).start
    with torch.no_grad():
        for number, batch in enumerate(graphs.batches):
            rows = rows_of(batch)
            if not graphs.splittable:
                whole = team.rank + number * team.size
                evaluate(batch, whole, whole, 1)
                continue
            own = labels[start : start + rows]
            start += rows
            for group in own.unique().tolist():
                for piece, units in _pieces(batch, own == group, graphs.microbatch):
                    evaluate(piece, group, int(strata[group]), units)
    return torch.tensor(table, dtype=torch.float64).reshape(-1, 6)


def _pieces(batch: Any, chosen: Tensor, largest: int | None) -> Iterator[tuple[Any, int]]:
    """Take the chosen rows of a batch in even pieces, none above the micro-batch, and say how many rows each has."""
    rows = chosen.nonzero().reshape(-1)
    if row_count(batch) is None:
        yield batch, 1
        return
    for part in rows.tensor_split(-(-len(rows) // (largest or len(rows)))):
        yield take_rows(batch, part.tolist()), len(part)
