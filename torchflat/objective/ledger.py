"""What has been spent, counted in rows and told in passes over all the data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from torchflat.result import Cost

__all__ = ["Ledger"]


class Ledger:
    """Counts rows that went forward, backward, and through a Hessian product, on all ranks together.

    A rank charges what it does itself; once the ranks have added up what they :meth:`take`, it is booked. What is spent
    on a subset or at another point is also booked in the objective it came from, in that one's passes.
    """

    def __init__(self, rows: int, parent: Ledger | None = None) -> None:
        self.rows = rows
        self.parent = parent
        self._booked = [0, 0, 0]
        self._charged = [0, 0, 0]
        self._seconds = 0.0

    @property
    def cost(self) -> Cost:
        """What has been booked, in passes over ``rows`` rows."""
        forwards, backwards, products = (count / self.rows for count in self._booked)
        return Cost(forwards, backwards, products, self._seconds)

    def charge(self, *, forwards: int = 0, backwards: int = 0, products: int = 0) -> None:
        """Count rows of this rank."""
        self._charged = [a + b for a, b in zip(self._charged, (forwards, backwards, products), strict=True)]

    def take(self) -> list[int]:
        """Return what this rank has charged since the last time."""
        taken, self._charged = self._charged, [0, 0, 0]
        return taken

    def book(self, counts: Sequence[float]) -> None:
        """Enter the counts of all ranks, here and in the objectives this one came from."""
        self._booked = [a + round(b) for a, b in zip(self._booked, counts, strict=True)]
        if self.parent is not None:
            self.parent.book(counts)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds spent inside the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            ledger: Ledger | None = self
            seconds = time.perf_counter() - started
            while ledger is not None:
                ledger._seconds += seconds
                ledger = ledger.parent
