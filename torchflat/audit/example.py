"""What a task's model is called with, from the task itself or from its data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchflat.audit.task import Task
from torchflat.errors import DataError, LawsError
from torchflat.objective.batches import as_batches, row_count, slice_rows
from torchflat.objective.evaluation import inputs_and_target
from torchflat.objective.state import random_states_kept

__all__ = ["example_input", "inputs"]

# Batch normalisation over one row of a single pixel would divide by zero.
ROWS = 2


def example_input(task: Task, model: nn.Module, data: Any) -> tuple[Any, ...] | dict[str, Any]:
    """Return the task's example for ``model``: its ``example_input`` or two rows of the first batch of ``data``.

    A dict holds keyword arguments, a tuple positional ones. Tensors are on the device of the model, floating ones in
    its dtype.

    Raises:
        LawsError: the batches do not tell what the model takes.
    """
    example = task.example_input
    if example is None:
        try:
            with random_states_kept():
                return _taken(as_batches(data).first(ROWS), model)
        except DataError as error:
            raise LawsError(
                f"what the model takes cannot be told from the data ({error}): set Task.example_input"
            ) from error
    if isinstance(example, dict):
        return dict(_like(example, model))
    return tuple(_like(example if isinstance(example, tuple | list) else (example,), model))


def inputs(model: nn.Module, data: Any, rows: int | None) -> Iterator[tuple[Any, ...] | dict[str, Any]]:
    """Yield what ``model`` is called with for all of ``data``, at most ``rows`` rows at once."""
    with random_states_kept():
        for batch in as_batches(data):
            count = row_count(batch)
            if count is None or rows is None:
                yield _taken(batch, model)
            else:
                for start in range(0, count, rows):
                    yield _taken(slice_rows(batch, start, min(start + rows, count)), model)


def _taken(batch: Any, model: nn.Module) -> tuple[Any, ...] | dict[str, Any]:
    positional, keywords, _ = inputs_and_target(batch)
    return dict(_like(keywords, model)) if keywords else tuple(_like(positional, model))


def _like(example: Any, model: nn.Module) -> Any:
    own = next(model.parameters())

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(own.device, own.dtype if leaf.is_floating_point() else None)

    return pytree.tree_map(moved, example)
