"""Orthonormal vectors of a Krylov space: in memory as far as the budget goes, and behind that in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import TorchflatError
from torchflat.objective.graphs import WORKSPACE_VECTORS
from torchflat.objective.memory import Memory

__all__ = ["Basis", "room_for_rows"]

# Rows may take this share of the memory budget, and what other vectors and a product leave; the rest is for graphs.
SHARE = 1 / 2
# Rows come back from the file so many bytes at once, or one row.
CHUNK = 16 * 2**20


def room_for_rows(memory: Memory, n: int) -> int:
    """Bytes that more vectors of length n may take; none if negative."""
    return int(min(SHARE * memory.total, memory.total - memory.vectors - WORKSPACE_VECTORS * 8 * n))


class Basis:
    """Orthonormal rows of length n, that are appended one by one and never change.

    Those in memory count against the budget until :meth:`release`. The others are read back from a file of the system's
    temporary folder (``TMPDIR``) whenever a vector is orthogonalised: a small budget costs time, not digits.
    """

    def __init__(self, n: int, most: int, dtype: torch.dtype, device: torch.device, memory: Memory) -> None:
        self.n, self.dtype, self.device, self._memory = n, dtype, device, memory
        self._row_bytes = n * torch.finfo(dtype).bits // 8
        affordable = room_for_rows(memory, n) // self._row_bytes
        # Reserved once; on the CPU rows cost nothing until they are written.
        self._rows = torch.empty(min(most, max(1, affordable)), n, dtype=dtype, device=device)
        self._file: BinaryIO | None = None
        self._held = self._filed = 0
        self._counted = [0]
        # An error may drop a basis that nobody released.
        weakref.finalize(self, _forget, memory, self._counted).atexit = False
        self.latest = self._rows[:0]

    def __len__(self) -> int:
        return self._held + self._filed

    def append(self, row: Tensor) -> None:
        """Write one more row, (n,).

        Raises:
            TorchflatError: there is no room for it on the disk.
        """
        if self._held < len(self._rows):
            self._rows[self._held] = row
            self.latest = self._rows[self._held]
            self._held += 1
            self._memory.vectors += self._row_bytes
            self._counted[0] += self._row_bytes
            return
        self.latest = row.to(self.dtype)
        buffer = bytearray(self._row_bytes)
        torch.frombuffer(buffer, dtype=self.dtype).copy_(self.latest)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="torchflat-")  # noqa: SIM115
                weakref.finalize(self, self._file.close).atexit = False
            self._file.seek(self._filed * self._row_bytes)
            self._file.write(buffer)
        except OSError as error:
            raise TorchflatError(
                f"the memory budget holds {self._held} of the vectors, and the next one could not be written to "
                f"{tempfile.gettempdir()} ({error.strerror}): raise memory=, or point TMPDIR to a disk with room"
            ) from error
        self._filed += 1

    def orthogonalise(self, vector: Tensor) -> tuple[list[float], float]:
        """Remove from ``vector`` (n,) float64, in place, its components along the rows; return them, and what is left.

        By Gram–Schmidt done twice (:func:`torchflat.ops.orthogonalize_`), over all blocks if there are several.
        """
        removed = torch.zeros(len(self), dtype=torch.float64)
        left = torch.zeros(())
        for _ in range(2 if self._filed else 1):
            start = 0
            for block in self._blocks():
                coefficients, left = ops.orthogonalize_(block, vector)
                removed[start : start + len(block)] += coefficients.cpu()
                start += len(block)
        return removed.tolist(), float(left)

    def combined(self, coefficients: Tensor, first: int) -> Tensor:
        """Return Σ cᵢ vᵢ over the rows from ``first`` on, for the columns c of ``coefficients``: a (m, n) tensor."""
        weights = coefficients.T.to(self.device, self.dtype)
        total = torch.zeros(len(weights), self.n, dtype=self.dtype, device=self.device)
        start = -first
        for block in self._blocks():
            skip, stop = max(0, -start), min(len(block), weights.shape[1] - start)
            if skip < stop:
                total.addmm_(weights[:, start + skip : start + stop], block[skip:stop])
            start += len(block)
        return total

    def release(self) -> None:
        """Give all of it back; no rows are left."""
        _forget(self._memory, self._counted)
        # A slice of the rows would keep all of them alive.
        self._rows = self.latest = torch.empty(0, self.n, dtype=self.dtype, device=self.device)
        self._held = self._filed = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _blocks(self) -> Iterator[Tensor]:
        yield self._rows[: self._held]
        if self._file is None:
            return
        count = max(1, CHUNK // self._row_bytes)
        buffer = bytearray(min(count, self._filed) * self._row_bytes)
        self._file.seek(0)
        for start in range(0, self._filed, count):
            rows = min(count, self._filed - start)
            chunk = memoryview(buffer)[: rows * self._row_bytes]
            self._file.readinto(chunk)  # type: ignore[attr-defined]
            yield torch.frombuffer(chunk, dtype=self.dtype).view(rows, self.n).to(self.device)


def _forget(memory: Memory, counted: list[int]) -> None:
    memory.vectors -= counted[0]
    counted[0] = 0
