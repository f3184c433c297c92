"""Normalisations: with ε > 0 they notice the scale of their argument, as ε → 0 they forget it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchflat.symmetry.forms import Form
from torchflat.symmetry.units import Units, Weight, rule

__all__: list[str] = []


def _normalise(u: Units, x: Form, together: set[int], eps: float | None) -> None:
    """Take x to x/|x|, with statistics over the axes ``together``."""
    if u.limit or eps == 0:
        u.alike(u.separate(x), together)
    else:
        u.zero(x)


def _affine(
    u: Units, shape: Sequence[int], gain: Form | None, bias: Form | None, axes: Sequence[int], x: Form | None = None
) -> Form:
    """Return the units of gain · x + bias, all given along ``axes``; by default x has none."""
    sizes = torch.Size(size if axis in axes else 1 for axis, size in enumerate(shape))
    out = x or Form(sizes)
    if gain is not None:
        out = out + u.separate(gain).map(lambda labels: labels.reshape(sizes), sizes)
    if bias is not None:
        out = u.equal(out, bias.map(lambda labels: labels.reshape(sizes), sizes))
    return out.expand(shape)


@rule("layer_norm")
def _layer_norm(
    u: Units,
    x: Form,
    normalized: Sequence[int],
    gain: Form | None = None,
    bias: Form | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Form:
    last = range(len(x.shape) - len(normalized), len(x.shape))
    _normalise(u, x, set(last), eps)
    return _affine(u, x.shape, gain, bias, last)


@rule("native_layer_norm")
def _native_layer_norm(
    u: Units, x: Form, normalized: Sequence[int], gain: Form | None, bias: Form | None, eps: float
) -> tuple[Form, None, None]:
    return _layer_norm(u, x, normalized, gain, bias, eps), None, None


@rule("rms_norm")
def _rms_norm(u: Units, x: Form, normalized: Sequence[int], gain: Form | None = None, eps: float | None = None) -> Form:
    out: Form = _layer_norm(u, x, normalized, gain, None, 1.0 if eps is None else eps)
    return out


@rule("group_norm")
def _group_norm(
    u: Units,
    x: Form,
    groups: int,
    gain: Form | None = None,
    bias: Form | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Form:
    shape = x.shape
    split = x.map(
        lambda labels: labels.reshape(shape[0], groups, shape[1] // groups, *shape[2:]),
        (shape[0], groups, shape[1] // groups, *shape[2:]),
    )
    _normalise(u, split, set(range(2, len(split.shape))), eps)
    return _affine(u, shape, gain, bias, [1])


@rule("_native_batch_norm_legit_functional", "_native_batch_norm_legit")
def _batch_norm(u: Units, x: Form, gain: Form | None, bias: Form | None, *rest: Any) -> tuple[Any, ...]:
    """Statistics of the batch, or those in the buffers, which are what they are: then x must stay too."""
    training, eps = (rest[2], rest[4]) if len(rest) == 5 else (rest[0], rest[2])
    if training:
        _normalise(u, x, set(range(len(x.shape))) - {1}, eps)
    else:
        u.zero(x)
    return _affine(u, x.shape, gain, bias, [1]), None, None, None, None


@rule("_native_batch_norm_legit_no_training", lazy=True)
def _batch_norm_eval(
    u: Units, x: Form | Weight, gain: Form | Weight | None, bias: Form | Weight | None, *_: Any
) -> tuple[Form, None, None]:
    """Take x to γ(x − μ)/σ + β: x must stay, but where a bias in it counts from μ, and x − μ has the units of x."""
    x, bias = u.form(x), None if bias is None else u.form(bias)
    shape, offset = x.shape, None
    if u.node in u.subtracting:
        offset = u.alike(u.separate(x), set(range(len(shape))) - {1})
        if isinstance(gain, Weight) and u.known(gain) is None:
            # What fits, in place of an equation of three terms: γ reads x − μ, and writes what β does.
            out = u.fresh(gain.shape) if bias is None else bias
            u.assign(gain, out - offset.map(lambda labels: labels.reshape(-1), gain.shape))
    else:
        u.zero(x)
    return _affine(u, shape, None if gain is None else u.form(gain), bias, [1], offset), None, None
