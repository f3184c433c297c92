"""The loss of micro-batches as functions of the flat vector x, for the transforms of ``torch.func``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from torchflat.errors import DataError, TorchflatError
from torchflat.objective.batches import rows_of
from torchflat.objective.evaluation import Term, first_line, out_of_memory
from torchflat.objective.graphs import Graphs, NotDifferentiable, finite
from torchflat.objective.normalisation import PlainNormalisation
from torchflat.parameters import Layout

__all__ = ["Scalar", "Transform", "add_transforms"]

Scalar = Callable[[Tensor], Tensor]
Transform = Callable[[Scalar], Tensor]


class _LossSum:
    """The loss sum of one micro-batch at y, of shape (n,); ``weight`` is known once it was evaluated."""

    def __init__(self, term: Term, layout: Layout, batch: Any) -> None:
        self._term, self._layout, self._batch = term, layout, batch
        self.weight = 0.0

    def __call__(self, y: Tensor) -> Tensor:
        with PlainNormalisation():
            total, self.weight = self._term(self._layout.split(y), self._batch)
        return total


def add_transforms(graphs: Graphs, layout: Layout, transform: Transform, gradients: int, sums: Tensor) -> float:
    """Add ``transform`` of each micro-batch's loss sum to ``sums``; return Σ weight.

    ``gradients`` is what one transform costs, in gradients of the same rows.

    Raises:
        NotDifferentiable: an operator has no rule for a transform of torch.func.
        NonFiniteError: a transform holds NaN or infinity.
    """
    weights = 0.0
    for index, batch in enumerate(graphs.microbatches()):
        loss = _LossSum(graphs.term, layout, batch)
        with _transformable():
            numbers = transform(loss)
        rows = gradients * rows_of(batch)
        graphs.ledger.charge(forwards=rows, backwards=rows)
        if not finite(numbers):
            raise graphs.non_finite(f"the derivative of micro-batch {index} holds NaN or infinity", batch)
        sums += numbers
        weights += loss.weight
    return weights


@contextlib.contextmanager
def _transformable() -> Iterator[None]:
    """Name the operator that lacks a rule, whether the error comes bare or as a fault of the model."""
    try:
        yield
    except (DataError, RuntimeError) as error:
        fault = error.__cause__ if isinstance(error, DataError) else error
        if not isinstance(fault, RuntimeError) or isinstance(fault, TorchflatError) or out_of_memory(fault):
            raise
        raise NotDifferentiable(_complaint(first_line(fault))) from fault


def _complaint(said: str) -> str:
    operator = re.search(r"forward AD with (\S+) that", said)
    if operator:
        return f"forward-mode AD of {operator[1]} is not implemented in torch: write it in plain operations"
    if "autograd.Function" in said:
        return (
            "a custom autograd.Function, or an operator of torch.library, has no forward-mode derivative: give the "
            "function setup_context and jvp, or write it in plain operations"
        )
    if "modified by an inplace operation" in said:
        return (
            "torch cannot nest the forward-mode derivatives of an operator of the loss: norms are known to be such, "
            "write (x * x).sum().sqrt() in their place"
        )
    return f"torch.func cannot transform the loss: {said}; write that part in plain operations"
