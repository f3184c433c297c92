"""Passes over the data: checked before the first one, tried again where something gives way, one reduction each."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from torchflat.distributed import Bucket, Team
from torchflat.errors import DataError
from torchflat.objective.batches import Batches, checksum
from torchflat.objective.evaluation import Term, note, out_of_memory
from torchflat.objective.graphs import Graphs, NotDifferentiable
from torchflat.objective.ledger import Ledger
from torchflat.objective.preflight import preflight

__all__ = ["SAME_DATA", "Passes"]

# Rows by which it is told, before the first pass, that two processes were given different data.
CHECKED_ROWS = 16
SAME_DATA = "the data, which every process is handed whole,"
# What autograd says of kernels that have a plain form which it can differentiate twice.
FUSED_KERNEL_SIGNS = ("is not implemented", "cudnn")

Result = TypeVar("Result")
# What adds up over the rows of a rank: it adds to its argument, in float64, and returns its Σ loss and Σ weight.
Addition = Callable[[Tensor], tuple[float, float]]


class Passes:
    """Passes over the data of one objective, on all ranks of its team.

    Before the first one, the loss is checked and the micro-batch chosen, unless ``checked``. A pass that meets a fused
    kernel without a second derivative, or runs out of memory, is tried again with plain kernels, or with fewer graphs
    and smaller micro-batches, if those were not asked for (``automatic``).
    """

    def __init__(
        self,
        team: Team,
        term: Term,
        batches: Batches,
        graphs: Graphs,
        ledger: Ledger,
        x: Tensor,
        automatic: bool,
        checked: bool,
    ) -> None:
        self._team, self._term, self._batches, self._graphs, self._ledger = team, term, batches, graphs, ledger
        self._x, self._automatic, self._checked = x, automatic, checked

    def prepare(self) -> None:
        """Run the checks and choose the micro-batch, unless that has been done."""
        if not self._checked:
            self.attempt(lambda: None)

    def attempt(self, work: Callable[[], Result]) -> Result:
        """Return what ``work`` does in a session; again if a fused kernel gives way, or if memory can be spared."""
        while True:
            try:
                with self._session():
                    return work()
            except NotDifferentiable as error:
                fused = any(sign in str(error).lower() for sign in FUSED_KERNEL_SIGNS)
                if not fused or not self._term.without_fused_kernels():
                    raise
                self._graphs.clear()
                if self._automatic:
                    # Plain kernels keep more for the backward pass.
                    self._graphs.microbatch, self._checked = None, False
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                relief = self._graphs.relieve()
                hopeless = functools.partial(operator.is_, relief, None)
                if self._team.anywhere(hopeless):
                    raise
                note(self._term, str(relief))

    def take_share(self, splittable: bool) -> None:
        """Leave this rank its share of the rows, or of the batches if these cannot be cut."""
        self._graphs.splittable = splittable
        self._graphs.batches = self._batches.share(self._team, splittable)
        self._graphs.rows = len(self._team.share(self._batches.rows))

    def mean(self, length: int, add: Addition, vectors: Sequence[Tensor] = ()) -> tuple[float, Tensor]:
        """Return Σ loss / Σ weight and sums / Σ weight over the rows of all ranks; see :meth:`sum`."""
        total, weight, sums = self.sum(length, add, vectors)
        if weight <= 0:
            raise DataError("the weights of the data sum to zero: no row counts")
        return total / weight, sums.div_(weight)

    def sum(self, length: int, add: Addition, vectors: Sequence[Tensor] = ()) -> tuple[float, float, Tensor]:
        """Return Σ loss, Σ weight and sums (length,) over the rows of all ranks, in one reduction; book what it cost.

        ``add`` adds what belongs to the rows of this rank to its argument, the sums in float64, and returns its Σ loss
        and Σ weight. ``vectors`` is what it reads besides x.
        """
        return self.attempt(lambda: self._sum(length, add, vectors))

    def gathered(self, rows: Callable[[], Tensor]) -> Tensor:
        """Return the tables (k, columns) that all ranks make, one below the other; book what they cost."""
        return self.attempt(lambda: self._gathered(rows))

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        with self._ledger.timed(), self._term.session():
            if not self._checked:
                self._check()
            yield

    def _check(self) -> None:
        """Every rank does this on the same sample of all the data, and then takes its share of the rows."""
        team, graphs, limit = self._team, self._graphs, self._graphs.limit
        bucket = Bucket(team, numbers=1, same=SAME_DATA)
        with team.summed(bucket):
            bucket.checksum = checksum(self._batches, CHECKED_ROWS) if team.size > 1 else 0.0
            splittable = preflight(self._term, graphs.parameters, self._batches, limit, self._ledger)
            bucket.numbers = [float(splittable)]
        splittable = bucket.numbers[0] == team.size
        self.take_share(splittable)
        if splittable and graphs.microbatch is None:
            with team.together():
                graphs.choose_microbatch(self._batches)
        spent = self._ledger.take()
        self._ledger.book(team.on_first(lambda: spent))
        self._checked = True

    def _sum(self, length: int, add: Addition, vectors: Sequence[Tensor]) -> tuple[float, float, Tensor]:
        bucket = Bucket(self._team, length, 5, self._term.device, "the point x, or a vector that H is applied to,")
        try:
            with self._team.summed(bucket):
                bucket.checksum = self._point_checksum + self._team.checksum(vectors)
                try:
                    bucket.numbers[:2] = add(bucket.sums)
                finally:
                    bucket.numbers[2:] = self._ledger.take()
        finally:
            total, weight, *spent = bucket.numbers
            self._ledger.book(spent)
        return total, weight, bucket.sums

    def _gathered(self, rows: Callable[[], Tensor]) -> Tensor:
        tables: list[Tensor] = []

        def add(counts: Tensor) -> tuple[float, float]:
            tables.append(rows())
            counts[self._team.rank] = len(tables[0])
            return 0.0, 0.0

        counts = self._sum(self._team.size, add, ())[2].long().tolist()
        start, table = sum(counts[: self._team.rank]), tables[0]
        bucket = Bucket(self._team, sum(counts) * table.shape[1], device=self._term.device)
        with self._team.summed(bucket):
            bucket.sums.view(-1, table.shape[1])[start : start + len(table)] = table
        return bucket.sums.view(-1, table.shape[1]).cpu()

    @functools.cached_property
    def _point_checksum(self) -> float:
        return self._team.checksum([self._x])
