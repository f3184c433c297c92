"""Sums, maxima, norms and pooling: what is reduced together must scale alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchflat.symmetry.forms import Form
from torchflat.symmetry.units import Units, rule

__all__: list[str] = []

Axes = int | Sequence[int] | None


def _reduced(u: Units, x: Form, dim: Axes, keepdim: bool) -> Form:
    rank = len(x.shape)
    axes = {dim} if isinstance(dim, int) else set(dim or range(rank))
    axes = {axis % rank for axis in axes} if rank else set()
    first = u.alike(x, axes)
    return first if keepdim else first.map(lambda labels: labels.squeeze(sorted(axes)))


@rule("sum", "mean")
def _sum(u: Units, x: Form, dim: Axes = None, keepdim: bool = False, **_: Any) -> Form:
    return _reduced(u, x, dim, keepdim)


@rule("amax", "amin")
def _amax(u: Units, x: Form, dim: Axes = None, keepdim: bool = False) -> Form:
    return _reduced(u, u.separate(x), dim, keepdim)


@rule("max", "min", "median", "sort")
def _max(u: Units, x: Form, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, Form):
        u.separate(x), u.separate(dim)
        return u.equal(x, dim)
    out = _reduced(u, u.separate(x), dim, keepdim)
    return out if dim is None else (out, None)


@rule("argmax", "argmin")
def _argmax(u: Units, x: Form, dim: Axes = None, keepdim: bool = False) -> None:
    _reduced(u, u.separate(x), dim, keepdim)


@rule("linalg_vector_norm")
def _norm(u: Units, x: Form, order: float = 2.0, dim: Axes = None, keepdim: bool = False, **_: Any) -> Form:
    return _reduced(u, u.separate(x), dim, keepdim)


@rule("std")
def _std(u: Units, x: Form, dim: Axes = None, *_: Any, keepdim: bool = False, **__: Any) -> Form:
    return _reduced(u, u.separate(x), dim, keepdim)


@rule("var")
def _var(u: Units, x: Form, dim: Axes = None, *_: Any, keepdim: bool = False, **__: Any) -> Form:
    return _reduced(u, u.separate(x), dim, keepdim).scaled(2.0)


@rule("var_mean")
def _var_mean(u: Units, x: Form, dim: Axes = None, *_: Any, keepdim: bool = False, **__: Any) -> tuple[Form, Form]:
    out = _reduced(u, u.separate(x), dim, keepdim)
    return out.scaled(2.0), out


@rule("cumsum")
def _cumsum(u: Units, x: Form, dim: int, **_: Any) -> Form:
    return u.alike(x, {dim % len(x.shape)}).expand(x.shape)


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d")
def _max_pool(u: Units, x: Form, *_: Any) -> tuple[Form, None]:
    return _pooled(u, u.separate(x), 2), None


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
def _avg_pool(u: Units, x: Form, *_: Any) -> Form:
    return _pooled(u, x, 2)


@rule(
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d"),
    *("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa"),
)
def _upsample(u: Units, x: Form, *_: Any, **__: Any) -> Form:
    return _pooled(u, x, 2)


def _pooled(u: Units, x: Form, first: int) -> Form:
    """Windows overlap anywhere, so that all places are alike; size 1 along places."""
    return u.alike(x, set(range(first, len(x.shape))))
