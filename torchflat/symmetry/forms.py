"""Forms: the log-scales of all entries of a tensor, as sums of variables that labels name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Form", "Term", "compact", "dependent_axes", "joined", "narrowed", "same_labels"]

Term = tuple[float, Tensor]


@dataclass(frozen=True, eq=False)
class Form:
    """Σ coefficient · z[labels] for every entry of a tensor of ``shape``: the log of what the entry is multiplied by.

    Each ``labels`` is an int64 tensor of ``shape`` with the numbers of variables, where 0 stands for the variable that
    is zero. It has stride 0 along the axes it does not depend on, so that a form costs as much memory as it says, and
    the operators that move entries around are applied to the labels as they are. No terms: the entries do not scale.

    >>> channels = Form.of(torch.tensor([[4], [5]]).expand(2, 1000))
    >>> (channels - channels).terms, channels.axes()
    ((), {0})
    """

    shape: torch.Size
    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, labels: Tensor, coefficient: float = 1.0) -> Form:
        """Make the form of one term."""
        return cls(labels.shape, ((coefficient, labels),))

    def axes(self) -> set[int]:
        """Return the axes along which the form may vary."""
        return {axis for _, labels in self.terms for axis in dependent_axes(labels)}

    def map(self, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None) -> Form:
        """Apply an operator that only moves entries; ``shape`` is that of the result, where it is known."""
        if not self.terms:
            probe = torch.empty(self.shape, device="meta")
            return Form(torch.Size(shape) if shape is not None else change(probe).shape)
        terms = tuple((c, compact(change(labels))) for c, labels in self.terms)
        return Form(terms[0][1].shape, terms)

    def expand(self, shape: Sequence[int]) -> Form:
        """Broadcast to ``shape``."""
        return self.map(lambda labels: labels.expand(tuple(shape)), shape)

    def first(self, axes: set[int] | frozenset[int]) -> Form:
        """Keep index 0 along ``axes``, as axes of size 1."""
        return self.map(lambda labels: narrowed(labels, axes))

    def scaled(self, factor: float) -> Form:
        """Multiply by a number: the form of a power."""
        return Form(self.shape, tuple((factor * c, labels) for c, labels in self.terms) if factor else ())

    def __add__(self, other: Form) -> Form:
        shape = torch.broadcast_shapes(self.shape, other.shape)
        total: list[Term] = []
        for c, labels in (*self.expand(shape).terms, *other.expand(shape).terms):
            twin = next((i for i, (_, known) in enumerate(total) if same_labels(known, labels)), None)
            if twin is None:
                total.append((c, labels))
            else:
                total[twin] = (total[twin][0] + c, labels)
        return Form(shape, tuple(term for term in total if term[0]))

    def __sub__(self, other: Form) -> Form:
        return self + other.scaled(-1.0)


def dependent_axes(labels: Tensor) -> list[int]:
    """Return the axes of more than one entry along which the stride is not 0."""
    return [axis for axis in range(labels.ndim) if labels.shape[axis] > 1 and labels.stride(axis) != 0]


def narrowed(labels: Tensor, axes: set[int] | frozenset[int] | Sequence[int]) -> Tensor:
    """Return index 0 along ``axes``, as axes of size 1."""
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """Return the same labels with stride 0 along every axis on which they are constant.

    >>> compact(torch.tensor([[1, 1], [2, 2]])).stride()
    (1, 0)
    """
    shape = labels.shape
    if labels.numel() == 0:
        return labels
    short = narrowed(labels, [axis for axis in range(labels.ndim) if labels.stride(axis) == 0])
    for axis in dependent_axes(short):
        head = short.narrow(axis, 0, 1)
        if bool((short.narrow(axis, 1, 1) == head).all()) and bool((short == head).all()):
            short = head
    return short.contiguous().expand(shape)


def same_labels(a: Tensor, b: Tensor) -> bool:
    """Tell whether two label tensors of the same shape are equal, by what they depend on first."""
    axes = dependent_axes(a)
    if axes != dependent_axes(b):
        return False
    still = [axis for axis in range(a.ndim) if axis not in axes]
    return torch.equal(narrowed(a, still), narrowed(b, still))


def joined(forms: Sequence[Form], join: Callable[[list[Tensor]], Tensor], axes: set[int]) -> Form:
    """Join forms by an operator on lists of tensors that mixes their entries along ``axes`` only, as ``cat`` does.

    Terms of the same coefficient share a term of the result; where a form has none, its entries carry label 0.
    """
    coefficients = sorted({c for form in forms for c, _ in form.terms})
    terms: list[Term] = []
    for coefficient in coefficients:
        columns = [[labels for c, labels in form.terms if c == coefficient] for form in forms]
        for rank in range(max(map(len, columns))):
            parts = [
                column[rank] if rank < len(column) else torch.zeros((), dtype=torch.int64).expand(form.shape)
                for form, column in zip(forms, columns, strict=True)
            ]
            used = axes.union(*(dependent_axes(part) for part in parts))
            still = [axis for axis in range(parts[0].ndim) if axis not in used]
            whole = join([narrowed(part, still) for part in parts])
            size = [forms[0].shape[axis] if axis in still else whole.shape[axis] for axis in range(whole.ndim)]
            terms.append((coefficient, compact(whole.expand(size))))
    if terms:
        return Form(terms[0][1].shape, tuple(terms))
    return Form(join([torch.empty(form.shape, device="meta") for form in forms]).shape)
