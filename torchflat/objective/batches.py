"""The rows of the data, in an order that is the same on every pass.

Whatever the user hands over (tensors, a Dataset, a DataLoader, any re-iterable) becomes a :class:`Batches`: an iterable
of batches with a known number of rows. A DataLoader that shuffles, drops its last batch or subsamples is replaced by
one that visits the same rows in a fixed order: f is a sum over rows, and a sum that changes between two products
has no Hessian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import data as torch_data

from torchflat.errors import DataError
from torchflat.objective.state import random_states_kept

__all__ = ["Batches", "as_batches", "describe", "map_tensors", "row_count", "slice_rows"]

Batch = Any

DEFAULT_BATCH = 1024


class Batches:
    """A re-iterable of batches with a known number of rows.

    ``source`` is iterated anew on each pass. ``pick`` returns the given rows without a pass over all of them, where
    the source knows how to.
    """

    def __init__(
        self, source: Iterable[Batch], rows: int, pick: Callable[[list[int]], Batches] | None = None
    ) -> None:
        self.source, self.rows, self._pick = source, rows, pick

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.source)

    def subset(self, size: int, seed: int) -> Batches:
        """``size`` rows drawn without replacement by ``seed``, in their order.

        Raises:
            DataError: the batches cannot be cut into rows.
        """
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.randperm(self.rows, generator=generator)[:size].sort().values
        if self._pick is not None:
            return self._pick(wanted.tolist())
        pieces, offset = [], 0
        for batch in self:
            rows = row_count(batch)
            if rows is None:
                raise DataError("the batches cannot be cut into rows, so no subset of rows can be drawn from them")
            inside = wanted[(wanted >= offset) & (wanted < offset + rows)] - offset
            if len(inside):
                pieces.append(_take(batch, inside))
            offset += rows
        return Batches(pieces, len(wanted))

    def fingerprint(self) -> str:
        """SHA-256 over the values, shapes and dtypes of every tensor, in order. One pass over the data."""
        digest = hashlib.sha256()
        for batch in self:
            for tensor in _tensors(batch):
                values = tensor.detach().cpu().contiguous()
                digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def as_batches(data: Any) -> Batches:
    """Turn what the user calls data into :class:`Batches`.

    Raises:
        DataError: there are no rows, the rows of the tensors differ in number, or the data can be iterated only once.
    """
    if _is_row_tensors(data):
        batches = _in_memory(data)
    elif isinstance(data, torch_data.DataLoader):
        batches = _from_loader(data)
    elif isinstance(data, torch_data.TensorDataset):
        batches = _in_memory(data.tensors)
    elif isinstance(data, torch_data.Dataset) and not isinstance(data, torch_data.IterableDataset):
        batches = _ordered(data, torch_data.DataLoader(data, batch_size=DEFAULT_BATCH), range(_length(data)))
    else:
        batches = _from_iterable(data)
    if batches.rows == 0:
        raise DataError("the data is empty: there is no row to evaluate the loss on")
    return batches


def _is_row_tensors(data: Any) -> bool:
    items = list(data.values()) if isinstance(data, Mapping) else data
    return isinstance(items, tuple | list) and len(items) > 0 and all(isinstance(item, Tensor) for item in items)


def _in_memory(tensors: Any) -> Batches:
    counts = {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(tensors)}
    if len(counts) != 1 or None in counts:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(tensors))
        raise DataError(f"the tensors of the data must have the same number of rows; their shapes are {shapes}")
    return Batches([tensors], counts.pop(), lambda rows: _in_memory(_take(tensors, torch.tensor(rows))))


def _take(batch: Batch, rows: Tensor) -> Batch:
    return map_tensors(lambda tensor: tensor[rows.to(tensor.device)], batch)


def _from_loader(loader: torch_data.DataLoader[Any]) -> Batches:
    if isinstance(loader.dataset, torch_data.IterableDataset):
        return _from_iterable(loader)
    if loader.batch_sampler is None:
        return _from_iterable(loader)
    sampler = loader.sampler
    if type(loader.batch_sampler) is torch_data.BatchSampler:
        rows = _length(loader.dataset)
        everything = isinstance(sampler, torch_data.SequentialSampler) or (
            isinstance(sampler, torch_data.RandomSampler) and not sampler.replacement and sampler.num_samples == rows
        )
        return _ordered(loader.dataset, loader, range(rows) if everything else sorted(_drawn_once(sampler)))
    # A batch sampler of the user's own: its batches, drawn once.
    batches = [list(indices) for indices in _drawn_once(loader.batch_sampler)]
    return Batches(_reloaded(loader, loader.dataset, batch_sampler=batches), sum(map(len, batches)))


def _drawn_once(sampler: Iterable[Any]) -> list[Any]:
    with random_states_kept():
        torch.manual_seed(0)
        return list(sampler)


def _ordered(dataset: Any, like: torch_data.DataLoader[Any], indices: Iterable[int]) -> Batches:
    indices = list(indices)
    size = like.batch_size or DEFAULT_BATCH
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    source = _reloaded(like, dataset, batch_sampler=groups)
    return Batches(source, len(indices), lambda rows: _ordered(dataset, like, [indices[row] for row in rows]))


def _reloaded(like: torch_data.DataLoader[Any], dataset: Any, batch_sampler: Any) -> torch_data.DataLoader[Any]:
    return torch_data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=like.collate_fn,
        num_workers=like.num_workers,
        pin_memory=like.pin_memory,
        worker_init_fn=like.worker_init_fn,
        multiprocessing_context=like.multiprocessing_context if like.num_workers else None,
        persistent_workers=like.persistent_workers,
    )


def _from_iterable(data: Any) -> Batches:
    try:
        first = iter(data)
    except TypeError:
        raise DataError(
            f"data is a {type(data).__name__}: pass (X, Y) tensors, a Dataset, a DataLoader or a list of batches"
        ) from None
    if first is data:
        raise DataError(
            "data can be iterated only once (a generator or iterator), and curvature needs many passes: "
            "pass list(...) of it, or an object whose __iter__ starts afresh"
        )
    return Batches(data, sum(row_count(batch) or 1 for batch in data))


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise DataError(f"the dataset {type(dataset).__name__} has no length: give it __len__, or pass batches") from None


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
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, item) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(function, item) for item in batch)
    return batch


def row_count(batch: Batch) -> int | None:
    """Number of rows if every tensor of the batch has the same first dimension, else None."""
    counts = {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(batch)}
    return counts.pop() if len(counts) == 1 else None


def slice_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start:stop`` of a batch whose :func:`row_count` is known."""
    return map_tensors(lambda tensor: tensor[start:stop], batch)


def describe(batch: Batch) -> str:
    """One line for error messages: shape, dtype and range of each tensor.

    >>> describe((torch.zeros(4, 3), torch.tensor([0, 1, 2, 11])))
    '(4, 3) float32 in [0, 0]; (4,) int64 in [0, 11]'
    """
    return "; ".join(map(_describe_tensor, _tensors(batch))) or f"a {type(batch).__name__} without tensors"


def _describe_tensor(tensor: Tensor) -> str:
    kind = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        return kind
    return f"{kind} in [{tensor.min().item():.6g}, {tensor.max().item():.6g}]"
