"""What has been spent, counted in rows and told in passes over all the data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from torchflat.result import Cost

__all__ = ["Ledger"]


class Ledger:
    """Counts rows that went forward, backward, and through a Hessian product.

    What is spent on a subset or at another point is also charged to the objective it came from, in that one's passes.
    """

    def __init__(self, rows: int, parent: Ledger | None = None) -> None:
        self.rows = rows
        self.parent = parent
        self._forwards = self._backwards = self._products = 0
        self._seconds = 0.0

    @property
    def cost(self) -> Cost:
        """What has been charged, in passes over ``rows`` rows."""
        rows = self.rows
        return Cost(self._forwards / rows, self._backwards / rows, self._products / rows, self._seconds)

    def charge(self, *, forwards: int = 0, backwards: int = 0, products: int = 0) -> None:
        """Count rows, here and in the objectives this one came from."""
        self._forwards += forwards
        self._backwards += backwards
        self._products += products
        if self.parent is not None:
            self.parent.charge(forwards=forwards, backwards=backwards, products=products)

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
