"""The rows of the data, in an order that is the same on every pass.

Whatever the user hands over (tensors, a Dataset, a DataLoader, any re-iterable) becomes a :class:`Batches`: an iterable
of batches with a known number of rows. A DataLoader that shuffles, drops its last batch or subsamples is replaced by
one that visits the same rows in a fixed order: f is a sum over rows, and a sum that changes between two products
has no Hessian.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import data as torch_data

from torchflat.distributed import Team
from torchflat.errors import DataError
from torchflat.objective.state import random_states_kept

__all__ = [
    "Batches",
    "as_batches",
    "checksum",
    "describe",
    "map_tensors",
    "row_count",
    "rows_of",
    "slice_rows",
    "take_rows",
]

Batch = Any

DEFAULT_BATCH = 1024


class Batches:
    """A re-iterable of batches with a known number of rows.

    ``source`` is iterated anew on each pass. ``pick`` returns the given rows without a pass over all of them, where
    the source knows how to; rows that would be copied, at most so many at once.
    """

    def __init__(
        self, source: Iterable[Batch], rows: int, pick: Callable[[Sequence[int], int | None], Batches] | None = None
    ) -> None:
        self.source, self.rows, self._pick = source, rows, pick

    def __iter__(self) -> Iterator[Batch]:
        """Raise a DataError behind the last batch if there were more or fewer rows than on the first pass."""
        seen = 0
        for batch in self.source:
            seen += rows_of(batch)
            yield batch
        if seen != self.rows:
            raise DataError(f"the data changes between passes: {self.rows} rows at first, and now {seen}")

    @property
    def indexed(self) -> bool:
        """Whether rows can be picked without a pass over all of them."""
        return self._pick is not None

    def first(self, rows: int | None = None) -> Batch:
        """Return the first batch, or at most its first ``rows`` rows if it can be cut. Random data draws numbers."""
        batch = next(iter(self))
        count = row_count(batch)
        return batch if rows is None or count is None or count <= rows else slice_rows(batch, 0, rows)

    def sample(self, rows: int) -> Batch:
        """One batch of at most ``rows`` rows, drawn from all the data where that needs no pass over it."""
        batches = self if self._pick is None else self.subset(min(rows, self.rows), seed=0)
        return batches.first(rows)

    def subset(self, size: int, seed: int) -> Batches:
        """``size`` rows drawn without replacement by ``seed``, in their order.

        Raises:
            DataError: the batches cannot be cut into rows.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        return self.take(torch.randperm(self.rows, generator=generator, device="cpu")[:size])

    def take(self, rows: Tensor, at_once: int | None = None) -> Batches:
        """Return the rows with these indices, in the order of the data; in batches of at most ``at_once`` if copied.

        Raises:
            DataError: the batches cannot be cut into rows.
        """
        wanted = rows.sort().values
        if self._pick is not None:
            return self._pick(wanted.tolist(), at_once)
        pieces, offset = [], 0
        with random_states_kept():
            for batch in self:
                count = row_count(batch)
                if count is None:
                    raise DataError("the batches cannot be cut into rows, so no subset of rows can be drawn from them")
                inside = wanted[(wanted >= offset) & (wanted < offset + count)] - offset
                if len(inside):
                    pieces.append(take_rows(batch, inside.tolist()))
                offset += count
        return Batches(pieces, len(wanted))

    def share(self, team: Team, by_row: bool) -> Iterable[Batch]:
        """Return the part of this rank: a contiguous range of rows or, not ``by_row``, every so many-th batch.

        Rows that the source can pick are read by their rank only; any other source is read in full by every rank.
        """
        if team.size == 1:
            return self
        if not by_row:
            return _Again(lambda: itertools.islice(self, team.rank, None, team.size))
        mine = team.share(self.rows)
        if not mine:
            return ()
        if self._pick is not None:
            return self._pick(mine, None)
        return _Again(lambda: self._between(mine.start, mine.stop))

    def _between(self, start: int, stop: int) -> Iterator[Batch]:
        offset = 0
        for batch in self:
            rows = rows_of(batch)
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                yield batch if high - low == rows else slice_rows(batch, low, high)
            offset += rows

    def fingerprint(self) -> str:
        """SHA-256 over the values, shapes and dtypes of every tensor, in order. One pass over the data."""
        digest = hashlib.sha256()
        with random_states_kept():
            for batch in self:
                for tensor in _tensors(batch):
                    values = tensor.detach().cpu().contiguous()
                    digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
                    digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def checksum(batches: Batches, rows: int) -> float:
    """Return a number that differs where the number of rows, or one of the first ``rows`` rows, differs."""
    head = batches.first(rows)
    digest = Batches([head], rows_of(head)).fingerprint()
    return float((int(digest, 16) + batches.rows) % 2**52)


class _Again:
    """An iterable that starts afresh each time."""

    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Batch]:
        return self._start()


def as_batches(data: Any) -> Batches:
    """Turn what the user calls data into :class:`Batches`.

    Raises:
        DataError: there are no rows, the rows of the tensors differ in number, or the data can be iterated only once.
    """
    if _is_row_tensors(data):
        batches = _in_memory(data)
    elif isinstance(data, torch_data.DataLoader):
        batches = _from_loader(data)
    elif type(data) is torch_data.TensorDataset:
        batches = _in_memory(list(data.tensors))
    elif isinstance(data, torch_data.Dataset) and not isinstance(data, torch_data.IterableDataset):
        batches = _ordered(torch_data.DataLoader(data, batch_size=DEFAULT_BATCH), range(_length(data)))
    else:
        batches = _from_iterable(data)
    if batches.rows == 0:
        raise DataError("the data is empty: there is no row to evaluate the loss on")
    return batches


def _is_row_tensors(data: Any) -> bool:
    items = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(items, Tensor):
        return True
    return isinstance(items, tuple | list) and len(items) > 0 and all(isinstance(item, Tensor) for item in items)


def _in_memory(tensors: Any, batch_size: int | None = None) -> Batches:
    rows = row_count(tensors)
    if rows is None:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(tensors))
        raise DataError(f"the tensors of the data must have the same number of rows; their shapes are {shapes}")
    size = batch_size or max(1, rows)
    source = [slice_rows(tensors, start, min(start + size, rows)) for start in range(0, rows, size)]

    def pick(indices: Sequence[int], at_once: int | None) -> Batches:
        if isinstance(indices, range):
            return _in_memory(take_rows(tensors, indices), batch_size)
        count = max(1, len(indices))
        # Batches of equal size: a tiny last one would cost as much overhead as a full one.
        return _copied(tensors, indices, batch_size or -(-count // -(-count // (at_once or count))))

    return Batches(source, rows, pick)


def _copied(tensors: Any, indices: Sequence[int], size: int) -> Batches:
    """Return rows that are copied on each pass, a batch of at most ``size`` at a time: all at once may be much."""
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    source = _Again(lambda: (take_rows(tensors, group) for group in groups))
    return Batches(source, len(indices), lambda chosen, _: _copied(tensors, [indices[row] for row in chosen], size))


def take_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return these rows of a batch whose :func:`row_count` is known; a range of them without a copy."""
    if isinstance(rows, range) and rows.step == 1:
        return slice_rows(batch, rows.start, rows.stop)
    index, total = torch.tensor(rows, dtype=torch.int64, device="cpu"), row_count(batch)
    return _map_rows(
        lambda tensor: tensor[index.to(tensor.device)],
        lambda items: [items[row] for row in rows] if len(items) == total else items,
        batch,
    )


def _from_loader(loader: torch_data.DataLoader[Any]) -> Batches:
    dataset: Any = loader.dataset
    if isinstance(dataset, torch_data.IterableDataset):
        return _from_iterable(loader)
    if loader.batch_sampler is None:
        # The dataset makes whole batches; what the sampler shuffles are these.
        return _from_iterable(_reloaded(loader, batch_size=None, sampler=_visited(loader.sampler, dataset)))
    if type(loader.batch_sampler) is torch_data.BatchSampler:
        return _ordered(loader, _visited(loader.sampler, dataset))
    # A batch sampler of the user's own: its batches, drawn once.
    batches = [list(indices) for indices in _drawn_once(loader.batch_sampler)]
    return Batches(_reloaded(loader, batch_sampler=batches), sum(map(len, batches)))


def _visited(sampler: Any, dataset: Any) -> Sequence[int]:
    """Return the rows that one epoch visits, in order: all of them, unless the sampler draws some."""
    if isinstance(sampler, torch_data.DistributedSampler):
        return range(_length(dataset))
    return sorted(_drawn_once(sampler))


def _drawn_once(sampler: Any) -> list[Any]:
    generators = [getattr(sampler, "generator", None), getattr(getattr(sampler, "sampler", None), "generator", None)]
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    try:
        with random_states_kept():
            torch.manual_seed(0)
            return list(sampler)
    finally:
        for generator, state in states:
            generator.set_state(state)


def _ordered(loader: torch_data.DataLoader[Any], indices: Sequence[int]) -> Batches:
    dataset: Any = loader.dataset
    size = loader.batch_size or DEFAULT_BATCH
    if type(dataset) is torch_data.TensorDataset and loader.collate_fn is torch_data.default_collate:
        # The same batches without a Python call per row.
        tensors = list(dataset.tensors)
        everything = len(indices) == len(dataset) and all(row == index for row, index in enumerate(indices))
        return _in_memory(tensors if everything else take_rows(tensors, list(indices)), size)
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    source = _reloaded(loader, batch_sampler=groups)
    return Batches(source, len(indices), lambda rows, _: _ordered(loader, [indices[row] for row in rows]))


def _reloaded(like: torch_data.DataLoader[Any], **order: Any) -> torch_data.DataLoader[Any]:
    return torch_data.DataLoader(
        like.dataset,
        collate_fn=like.collate_fn,
        num_workers=like.num_workers,
        pin_memory=like.pin_memory,
        timeout=like.timeout,
        worker_init_fn=like.worker_init_fn,
        multiprocessing_context=like.multiprocessing_context if like.num_workers else None,
        prefetch_factor=like.prefetch_factor,
        persistent_workers=like.persistent_workers,
        **order,
    )


def _from_iterable(data: Any) -> Batches:
    if isinstance(data, Iterator):
        raise DataError(
            "data can be iterated only once (a generator or iterator), and curvature needs many passes: "
            "pass list(...) of it, or an object whose __iter__ starts afresh"
        )
    if not (isinstance(data, Iterable) or hasattr(data, "__getitem__")) or isinstance(data, str | bytes):
        raise DataError(
            f"data is a {type(data).__name__}: pass (X, Y) tensors, a Dataset, a DataLoader or a list of batches"
        )
    with random_states_kept():
        return Batches(data, sum(map(rows_of, data)))


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        name = type(dataset).__name__
        raise DataError(f"the dataset {name} has no length: give it __len__, or pass batches") from None


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from _tensors(item)
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from _tensors(item)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """``batch`` with ``function`` applied to each tensor; containers keep their kind, other leaves stay as they are."""
    return _map_rows(function, lambda items: items, batch)


def _map_rows(tensor: Callable[[Tensor], Tensor], column: Callable[[list[Any]], list[Any]], batch: Batch) -> Batch:
    """Apply ``tensor`` to tensors, and ``column`` to lists without any (default_collate makes lists of strings)."""
    if isinstance(batch, Tensor):
        return tensor(batch)
    if isinstance(batch, Mapping):
        items = {key: _map_rows(tensor, column, item) for key, item in batch.items()}
        if not isinstance(batch, MutableMapping):
            return items
        clone = copy.copy(batch)
        clone.update(items)
        return clone
    if isinstance(batch, list) and next(_tensors(batch), None) is None:
        return column(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map_rows(tensor, column, item) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map_rows(tensor, column, item) for item in batch)
    return batch


def row_count(batch: Batch) -> int | None:
    """Count the rows if every tensor of the batch has the same first dimension, else return None."""
    counts = {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(batch)}
    return counts.pop() if len(counts) == 1 else None


def rows_of(batch: Batch) -> int:
    """Count what the batch stands for in the ledger: its rows, or 1 if they cannot be told apart."""
    rows = row_count(batch)
    return 1 if rows is None else rows


def slice_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start:stop`` of a batch whose :func:`row_count` is known."""
    total = row_count(batch)
    return _map_rows(
        lambda tensor: tensor[start:stop], lambda items: items[start:stop] if len(items) == total else items, batch
    )


def describe(batch: Batch) -> str:
    """One line for error messages: shape, dtype and range of each tensor.

    >>> describe((torch.zeros(4, 3), torch.tensor([0, 1, 2, 11])))
    '(4, 3) float32 in [0, 0]; (4,) int64 in [0, 11]'
    """
    return "; ".join(map(_describe_tensor, _tensors(batch))) or f"a {type(batch).__name__} without tensors"


def _describe_tensor(tensor: Tensor) -> str:
    kind = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    countless = tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool
    if countless or tensor.layout is not torch.strided:
        return kind
    values = tensor.double()
    return f"{kind} in [{values.min().item():.6g}, {values.max().item():.6g}]"
