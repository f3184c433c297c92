"""Kernels that are called many times: orthogonalisation, dot products over tensor lists, accumulation.

Each has one operator schema (namespace ``torchflat``), one readable twin in :mod:`torchflat.ops.reference`, and a
compiled kernel where one is built; :func:`backend` says which one runs. All accumulate in float64 whatever the dtypes.
They are not differentiable, and say so rather than return a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchflat.ops.library import backend, compiled_step, describe

__all__ = [
    "axpby_",
    "axpy_",
    "backend",
    "describe",
    "dot",
    "line_squares",
    "norm",
    "normalized_axpby_",
    "normalized_step_",
    "norms",
    "orthogonalize_",
]


def orthogonalize_(basis: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Remove from ``vector``, in place, its components along the orthonormal rows of ``basis``.

    With V = ``basis`` and w = ``vector``: w <- (I - V^T V) w by classical Gram-Schmidt done twice, which leaves
    |V w| at rounding level ("twice is enough"). Products are accumulated in float64 whatever the dtype of the basis.

    Args:
        basis: (k, n), rows contiguous and orthonormal; k may be 0. float64, float32, bfloat16 or float16.
        vector: (n,), contiguous float64; overwritten.

    Returns:
        ``(coefficients, norm)``: the (k,) float64 components that were removed (the sum of both sweeps), and the
        Euclidean norm of what is left as a 0-dim float64 tensor.

    Raises:
        RuntimeError: if shapes, dtypes, devices or strides are not as above, or if autograd would have to follow.

    >>> basis = torch.tensor([[1.0, 0.0, 0.0]])
    >>> vector = torch.tensor([3.0, 0.0, -2.0], dtype=torch.float64)
    >>> coefficients, norm = orthogonalize_(basis, vector)
    >>> coefficients.tolist(), norm.item(), vector.tolist()
    ([3.0], 2.0, [0.0, 0.0, -2.0])
    """
    _refuse_autograd("orthogonalize_", (basis, vector))
    result: Tensor = torch.ops.torchflat.orthogonalize_(basis, vector)
    _mark_changed((vector,))
    return result[:-1], result[-1]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum of the elementwise products over two lists of tensors: sum_i <a_i, b_i>, a 0-dim float64 tensor.

    Products and sums are taken in float64, in a fixed order, with an error that does not grow with the length. The
    tensors of a pair have the same shape and may differ in dtype and strides. Empty lists give 0.

    Raises:
        RuntimeError: if the lists do not pair up, lie on several devices, or autograd would have to follow.

    >>> ones = torch.ones(3, 2)
    >>> dot([ones, ones[0]], [2 * ones, ones[1].double()]).item()
    14.0
    """
    a, b = list(a), list(b)
    if not a and not b:
        return torch.zeros((), dtype=torch.float64)
    _refuse_autograd("dot", (*a, *b))
    result: Tensor = torch.ops.torchflat.dot(a, b)
    return result


def norms(a: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor of a list of k tensors: (k,) float64, on the device of the tensors.

    Raises:
        RuntimeError: if the tensors lie on several devices, or autograd would have to follow.

    >>> norms([torch.tensor([3.0, 4.0]), torch.tensor(-2.0)]).tolist()
    [5.0, 2.0]
    """
    a = list(a)
    if not a:
        return torch.zeros(0, dtype=torch.float64)
    _refuse_autograd("norms", a)
    result: Tensor = torch.ops.torchflat.norms(a)
    return result


def norm(a: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of a list of tensors taken as one vector: ``sqrt(dot(a, a))``, a 0-dim float64 tensor.

    >>> norm([torch.tensor([3.0]), torch.tensor(4.0)]).item()
    5.0
    """
    total: Tensor = torch.linalg.vector_norm(norms(a))
    return total


def line_squares(a: Sequence[Tensor]) -> Tensor:
    """Squared norms of the rows and of the columns of each matrix in a list, from one read of it: float64.

    For each tensor (r, c, ...) the squares of its entries are summed over all but the first axis, (r,), and over all
    but the second, (c,); the answer has these in a row. The compiled kernel computes in float64; the twin sums float32
    squares in float32, in pieces.

    Raises:
        RuntimeError: if a tensor has less than two axes, they lie on several devices, or autograd would have to follow.

    >>> line_squares([torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0]])]).tolist()
    [5.0, 9.0, 0.0, 1.0, 13.0]
    """
    a = list(a)
    if not a:
        return torch.zeros(0, dtype=torch.float64)
    _refuse_autograd("line_squares", a)
    result: Tensor = torch.ops.torchflat.line_squares(a)
    return result


def axpy_(y: Sequence[Tensor], x: Sequence[Tensor], alpha: float = 1.0) -> None:
    """Add in place over two lists: ``y_i += alpha * x_i``, computed in float64 and rounded to the dtype of ``y_i``.

    The tensors of a pair have the same shape and may differ in dtype: float32 gradients add into float64 sums without a
    copy. Strides may be any. Tensors of ``y`` must not overlap each other, nor ``x_i`` unless it is the same tensor.

    Raises:
        RuntimeError: if the lists do not pair up, lie on several devices, or autograd would have to follow.

    >>> total = torch.zeros(2, dtype=torch.float64)
    >>> axpy_([total], [torch.tensor([1.0, 2.0])], alpha=0.5)
    >>> total.tolist()
    [0.5, 1.0]
    """
    y, x = list(y), list(x)
    if not y and not x:
        return
    _refuse_autograd("axpy_", (*y, *x))
    torch.ops.torchflat.axpy_(y, x, alpha)
    _mark_changed(y)


def axpby_(y: Sequence[Tensor], x: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> None:
    """Scale and add in place over two lists: ``y_i <- beta * y_i + alpha_i * x_i``, as :func:`axpy_` does.

    ``alpha`` is (k,) or (1,), ``beta`` (1,), both float64 and on the device of the tensors, so that nothing is read
    back from it. Where ``alpha_i`` is 0, ``x_i`` is left out, whatever it holds: infinities and NaN do not get through.

    Raises:
        RuntimeError: as :func:`axpy_`, or if ``alpha`` or ``beta`` is not as above.

    >>> y = torch.tensor([1.0, 2.0])
    >>> axpby_([y], [torch.tensor([10.0, 10.0])], torch.tensor([0.5]).double(), torch.tensor([2.0]).double())
    >>> y.tolist()
    [7.0, 9.0]
    """
    y, x = list(y), list(x)
    if not y and not x:
        return
    _refuse_autograd("axpby_", (*y, *x, alpha, beta))
    torch.ops.torchflat.axpby_(y, x, alpha, beta)
    _mark_changed(y)


def normalized_axpby_(y: Sequence[Tensor], x: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> Tensor:
    """Scale and add a step of given length over two lists: ``y_i <- beta * y_i + alpha * x_i / |x|``; return ``|x|``.

    |x| is the norm of all ``x_i`` taken as one vector, a 0-dim float64 tensor. Where it is 0, y only shrinks by
    ``beta``; where it is not finite, nothing changes. The two sweeps need no temporaries and read nothing back from the
    device. ``alpha`` and ``beta`` are (1,), float64 and on the device of the tensors.

    Raises:
        RuntimeError: as :func:`axpby_`.

    >>> y = torch.tensor([1.0, 2.0])
    >>> one = torch.ones(1, dtype=torch.float64)
    >>> normalized_axpby_([y], [torch.tensor([3.0, 4.0])], 10 * one, one).item()
    5.0
    >>> y.tolist()
    [7.0, 10.0]
    """
    y, x = list(y), list(x)
    if not y and not x:
        return torch.zeros((), dtype=torch.float64)
    _refuse_autograd("normalized_axpby_", (*y, *x, alpha, beta))
    norm: Tensor = torch.ops.torchflat.normalized_axpby_(y, x, alpha, beta)
    _mark_changed(y)
    return norm


def normalized_step_(params: list[Tensor], alpha: float, beta: float) -> float | None:
    """Do :func:`normalized_axpby_` to parameters with their gradients, without the dispatcher; return the norm.

    The dispatcher takes longer to hand over some hundred small tensors than the step takes. This looks at plain ones
    only: dense real tensors of the CPU, each with a gradient in the same order in memory. Where there is another, or no
    compiled kernel, or a mode or torch.compile is watching, nothing changes and None is returned: take the general way.
    Where the norm is not finite, nothing changes either.

    Raises:
        RuntimeError: if autograd would have to follow.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> with torch.no_grad():
    ...     print(normalized_step_([p], -1.0, 1.0))  # there is no gradient
    None
    """
    if compiled_step is None or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    if torch.is_grad_enabled():
        _refuse_autograd("normalized_step_", [*params, *(p.grad for p in params if p.grad is not None)])
    norm = compiled_step(params, alpha, beta)
    if norm is not None and math.isfinite(norm):
        _mark_changed(params)
    return norm


def _refuse_autograd(name: str, tensors: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"torchflat.ops.{name} is not differentiable: call it under torch.no_grad(), or detach")


def _mark_changed(tensors: Sequence[Tensor]) -> None:
    # Kernels write behind autograd's back; without this, a graph that saved one of the tensors would use it changed.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
