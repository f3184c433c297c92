"""The readable twins: each kernel's arithmetic in plain torch, on any device.

They define what the compiled kernels must return, and they are what runs where no compiled kernel is present. All of
them accumulate in float64 and hold at most :data:`CHUNK` elements of temporary float64 at once, so that a float32 basis
of many gigabytes is never copied to double precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["CHUNK", "axpby_", "axpy_", "dot", "line_squares", "normalized_axpby_", "norms", "orthogonalize_"]

CHUNK = 1 << 18


def orthogonalize_(basis: Tensor, vector: Tensor) -> Tensor:
    """Classical Gram-Schmidt, twice; returns the k coefficients and the remaining norm as one tensor."""
    check_orthogonalize(basis, vector)
    rows, columns = basis.shape
    coefficients = vector.new_zeros(rows)
    for _ in range(2):
        sweep = vector.new_zeros(rows)
        for span in _spans(columns, rows):
            sweep += basis[:, span].double() @ vector[span]
        for span in _spans(columns, rows):
            vector[span] -= sweep @ basis[:, span].double()
        coefficients += sweep
    return torch.cat([coefficients, torch.linalg.vector_norm(vector).reshape(1)])


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Partial sums over chunks, then a pairwise sum of the partials: the error does not grow with the length."""
    check_lists(a, b, "dot")
    partials = [
        torch.dot(x[span].double(), y[span].double())
        for x, y in zip(map(_flat, a), map(_flat, b), strict=True)
        for span in _spans(x.numel(), 1)
    ]
    return torch.stack(partials).sum() if partials else a[0].new_zeros((), dtype=torch.float64)


def norms(a: list[Tensor]) -> Tensor:
    """Square root of :func:`dot` of each tensor with itself."""
    check_list(a, "norms")
    return torch.stack([dot([each], [each]) for each in a]).sqrt_()


def line_squares(a: list[Tensor]) -> Tensor:
    """Square in pieces that stay in a cache, each summed along both axes in its own precision, float32 at least."""
    check_lines(a)
    width = max((x.shape[1:].numel() for x in a), default=1)
    pieces: dict[torch.dtype, Tensor] = {}
    lines = []
    for x in a:
        x = x.detach().float() if x.element_size() < 4 else x.detach()
        if x.dtype not in pieces:
            pieces[x.dtype] = x.new_empty(max(CHUNK, width))
        columns = x.new_zeros(x.shape[1], dtype=torch.float64)
        for part in x.split(max(1, CHUNK // max(1, x.shape[1:].numel()))):
            squares = torch.mul(part, part, out=pieces[x.dtype][: part.numel()].view(part.shape))
            squares = squares.flatten(2).sum(2) if squares.ndim > 2 else squares
            lines.append(squares.sum(1).double())
            columns += squares.sum(0)
        lines.append(columns)
    return torch.cat(lines)


def axpy_(y: list[Tensor], x: list[Tensor], alpha: float) -> None:
    """``y += alpha * x``, computed in float64 and rounded to the dtype of ``y`` at the end."""
    check_lists(y, x, "axpy_")
    for target, source in zip(y, x, strict=True):
        _blend(target, source, alpha, 1.0)


def axpby_(y: list[Tensor], x: list[Tensor], alpha: Tensor, beta: Tensor) -> None:
    """``y = beta * y + alpha * x``, computed and rounded as in :func:`axpy_`; an ``alpha`` of 0 leaves ``x`` out."""
    check_axpby(y, x, alpha, beta, len(y), "axpby_")
    for target, source, factor in zip(y, x, alpha.expand(len(y)).tolist(), strict=True):
        _blend(target, source, factor, beta.item())


def normalized_axpby_(y: list[Tensor], x: list[Tensor], alpha: Tensor, beta: Tensor) -> Tensor:
    """:func:`axpby_` with ``alpha`` divided by the norm of all ``x``, which it returns; without ``x`` if that is 0."""
    check_axpby(y, x, alpha, beta, 1, "normalized_axpby_")
    norm = dot(x, x).sqrt_()
    if norm.isfinite():
        axpby_(y, x, alpha / norm if norm > 0 else torch.zeros_like(alpha), beta)
    return norm


def _blend(y: Tensor, x: Tensor, alpha: float, beta: float) -> None:
    target, source = _flat(y), _flat(x)
    for span in _spans(target.numel(), 1):
        part = target[span].double().mul_(beta)
        target[span] = part.add_(source[span], alpha=alpha) if alpha else part
    if target.data_ptr() != y.data_ptr():
        y.detach().copy_(target.view_as(y))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _spans(length: int, rows: int) -> Iterator[slice]:
    width = max(1, CHUNK // max(1, rows))
    return (slice(start, start + width) for start in range(0, length, width))


def check_orthogonalize(basis: Tensor, vector: Tensor) -> None:
    """Raise RuntimeError unless the shapes, dtypes, strides and devices are those that the kernels take."""
    torch._check(
        basis.dim() == 2 and vector.dim() == 1 and basis.size(1) == vector.size(0),
        lambda: (
            f"orthogonalize_: basis must be (k, n) and vector (n,), got {tuple(basis.shape)} and {tuple(vector.shape)}"
        ),
    )
    torch._check(
        vector.dtype == torch.float64,
        lambda: f"orthogonalize_: vector must be float64: use vector.double(), got {vector.dtype}",
    )
    torch._check(
        (basis.size(0) == 0 or basis.size(1) <= 1 or basis.stride(1) == 1) and vector.is_contiguous(),
        lambda: "orthogonalize_: the rows of basis and the vector must be contiguous: use .contiguous()",
    )
    torch._check(
        basis.device == vector.device,
        lambda: f"orthogonalize_: basis and vector are on different devices, {basis.device} and {vector.device}",
    )
    _check_floating(basis)


def check_lists(a: list[Tensor], b: list[Tensor], name: str) -> None:
    """Raise RuntimeError unless the two lists pair up in length, shape and device, and hold floating point."""
    torch._check(
        len(a) == len(b) and len(a) > 0,
        lambda: f"{name}: the lists must have the same length, at least 1, got {len(a)} and {len(b)}",
    )
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        _check_pair(left, right, a[0].device, f"{name}: pair {index}")


def check_list(a: list[Tensor], name: str) -> None:
    """Raise RuntimeError unless the list is not empty, lies on one device, and holds floating point."""
    check_lists(a, a, name)


def check_lines(a: list[Tensor]) -> None:
    """:func:`check_list`, and each tensor must have two axes or more."""
    check_list(a, "line_squares")
    for tensor in a:
        torch._check(
            tensor.dim() >= 2,
            lambda shape=tuple(tensor.shape): f"line_squares: tensors must have two axes or more, got {shape}",  # type: ignore[misc]
        )


def check_axpby(y: list[Tensor], x: list[Tensor], alpha: Tensor, beta: Tensor, alphas: int, name: str) -> None:
    """:func:`check_lists`; ``alpha`` and ``beta`` must be float64 of length 1 there, or ``alpha`` of ``alphas``."""
    check_lists(y, x, name)
    for which, factor, longest in (("alpha", alpha, alphas), ("beta", beta, 1)):
        torch._check(
            factor.dim() == 1
            and factor.size(0) in (1, longest)
            and factor.dtype == torch.float64
            and factor.device == y[0].device
            and factor.is_contiguous(),
            lambda which=which, factor=factor, longest=longest: (  # type: ignore[misc]
                f"{name}: {which} must be contiguous float64 of length 1{f' or {longest}' if longest > 1 else ''} "
                f"on {y[0].device}, got {factor.dtype} {tuple(factor.shape)} on {factor.device}"
            ),
        )


def _check_pair(left: Tensor, right: Tensor, device: torch.device, where: str) -> None:
    torch._check(
        left.shape == right.shape,
        lambda: f"{where} has different shapes, {tuple(left.shape)} and {tuple(right.shape)}",
    )
    torch._check(
        left.device == device and right.device == device,
        lambda: f"{where} is on another device: must be on {device}, got {left.device} and {right.device}",
    )
    _check_floating(left)
    _check_floating(right)


def _check_floating(tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16),
        lambda: f"torchflat.ops: tensors must be floating point: use .double() or .float(), got {tensor.dtype}",
    )
