"""Sums of products: linear layers, matrix products, convolutions, embeddings.

All summands of an entry of the result must scale alike, and the result scales as they do. A weight that has no units
yet is given those that fit: W[o, i] carries y_o − x_i with new y. That is a label for each row and column, and none for
each entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchflat.symmetry.forms import Form
from torchflat.symmetry.units import Units, Weight, rule

__all__ = ["contract"]

Layout = Callable[[Tensor], Tensor]


def contract(u: Units, x: Form, w: Form | Weight, summed: set[int], to: Layout, back: Layout) -> Form:
    """Return the units of Σ x·w over the axes ``summed``, which the result keeps with size 1.

    ``x`` lies in the space of all indices, with size 1 where it does not depend on one; ``to`` brings w there, and
    ``back`` undoes it. Along the axes summed both may be mixed, by matrices inverse to each other, and along an axis
    that only one of them has, that one and the result.
    """
    shape = to(torch.empty(w.shape, device="meta")).shape
    if isinstance(w, Weight):
        known = u.known(w)
        if known is None:
            absent = {axis for axis, size in enumerate(shape) if size == 1}
            y = u.fresh(shape, set(range(len(shape))) - summed)
            known = u.assign(w, (y - x.first(absent)).map(back))
        w = known
    w = w.map(to, shape)
    for one, other in ((x, w), (w, x)):
        own = {axis for axis, size in enumerate(other.shape) if size == 1} - summed
        for term in one.terms:
            part = Form(one.shape, (term,))
            u.mixing.fibres(part, summed if summed & part.axes() else own)
    product = x + w
    first = product.first(summed)
    u.zero(product - first)
    return u.simple(first)


def _same(labels: Tensor) -> Tensor:
    return labels


def _product(u: Units, a: Form | Weight, b: Form | Weight) -> Form:
    """Return the units of (…, i, k) @ (…, k, j)."""
    if isinstance(a, Weight) and u.known(a) is None:
        if isinstance(b, Weight) and u.known(b) is None:
            # A[i, k] + B[k, j] can only be the same for all k if A is a sum of its rows' and its columns' units.
            outer = u.fresh(a.shape, set(range(a.view.ndim - 1)))
            a = u.assign(a, outer + u.fresh(a.shape, set(range(a.view.ndim)) - {a.view.ndim - 2}))
        else:
            flipped = _product(u, _transposed(u.form(b)), _turned(a))
            return _transposed(flipped)
    x = u.form(a).map(lambda labels: labels.unsqueeze(-1))
    k = len(x.shape) - 2
    total = contract(u, x, b, {k}, lambda labels: labels.unsqueeze(-3), lambda labels: labels.squeeze(-3))
    return total.map(lambda labels: labels.squeeze(k))


def _transposed(form: Form) -> Form:
    return form.map(lambda labels: labels.mT)


def _turned(weight: Weight) -> Weight:
    return Weight(weight.name, weight.view.mT)


@rule("mm", "bmm", "matmul", lazy=True)
def _matmul(u: Units, a: Form | Weight, b: Form | Weight, *_: Any) -> Form:
    return _product(u, a, b)


@rule("mv", lazy=True)
def _mv(u: Units, a: Form | Weight, b: Form | Weight) -> Form:
    column = u.form(b).map(lambda labels: labels.unsqueeze(-1))
    return _product(u, a, column).map(lambda labels: labels.squeeze(-1))


@rule("dot")
def _dot(u: Units, a: Form, b: Form) -> Form:
    return contract(u, a, b, {0}, _same, _same).map(lambda labels: labels.squeeze(0))


@rule("addmm", "baddbmm", "addmv", lazy=True)
def _addmm(u: Units, c: Form | Weight, a: Form | Weight, b: Form | Weight, **scales: Any) -> Form:
    total = _mv(u, a, b) if len(b.shape) == 1 else _product(u, a, b)
    return u.equal(total, u.form(c))


@rule("linear", lazy=True)
def _linear(u: Units, x: Form | Weight, w: Form | Weight, bias: Form | Weight | None = None) -> Form:
    """y[…, o] = Σᵢ x[…, i] W[o, i] + b[o]."""
    x = u.form(x).map(lambda labels: labels.unsqueeze(-2))
    rank = len(x.shape)
    total = contract(
        u,
        x,
        w,
        {rank - 1},
        lambda labels: labels.view(*[1] * (rank - 2), *labels.shape),
        lambda labels: labels.reshape(w.shape),
    )
    total = total.map(lambda labels: labels.squeeze(-1))
    return total if bias is None else u.equal(total, u.form(bias))


@rule("convolution", lazy=True)
def _convolution(
    u: Units,
    x: Form | Weight,
    w: Form | Weight,
    bias: Form | Weight | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Form:
    """y[n, g·o, …] = Σ over c and the kernel of x[n, g·c, …] W[g·o, c, …] + b; all places are alike."""
    x = u.form(x)
    kernel = len(x.shape) - 2
    x = u.alike(x, set(range(2, len(x.shape))))
    batch, channels = x.shape[0], x.shape[1]
    x = x.map(lambda labels: labels.reshape(batch, groups, 1, channels // groups, *[1] * kernel))

    def to(labels: Tensor) -> Tensor:
        if transposed:
            grouped = labels.reshape(1, groups, channels // groups, *labels.shape[1:])
            return grouped.transpose(2, 3)
        return labels.reshape(1, groups, -1, *labels.shape[1:])

    def back(labels: Tensor) -> Tensor:
        return (labels.transpose(2, 3) if transposed else labels).reshape(w.shape)

    total = contract(u, x, w, set(range(3, 4 + kernel)), to, back)
    out = total.map(lambda labels: labels.reshape(batch, -1, *[1] * kernel))
    if bias is None:
        return out
    return u.equal(out, u.form(bias).map(lambda labels: labels.view(1, -1, *[1] * kernel)))


@rule("embedding", lazy=True)
def _embedding(u: Units, w: Form | Weight, ids: Tensor | None, *_: Any) -> Form:
    """y[…, d] = W[ids[…], d]: any row may be asked for, so that rows are alike."""
    if isinstance(w, Weight) and u.known(w) is None:
        w = u.assign(w, u.fresh(w.shape, {1}))
    row = u.alike(u.form(w), {0})
    return row.map(lambda labels: labels[0])
