"""Normalisations by the statistics of their input, in operations whose derivatives torch nests rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainNormalisation"]


class PlainNormalisation(TorchFunctionMode):
    """Inside the block, layer, instance and batch normalisation are (h − mean)/√(var + ε), written out.

    The forward derivatives of torch's own kernels, and their double backward, take the mean and the variance that the
    kernel saved for constants when they are differentiated in turn (torch 2.14). So gradients of directional
    derivatives are wrong, and so are third derivatives, while ∇f and H·v are right. Running averages are not updated.

    Of two entries that differ by 2d, the first becomes φ(d) = d/√(d² + ε), and φ″(1) = −3/√32 where ε = 1:

    >>> def slope(d):
    ...     pair = lambda d: F.layer_norm(torch.stack([d, -d]), (2,), eps=1.0)[0]
    ...     return torch.func.jvp(pair, (d,), (torch.ones(()),))[1]
    >>> with PlainNormalisation():
    ...     round(float(torch.func.grad(slope)(torch.ones(()))) * 32**0.5, 4)
    -3.0
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.reshape(-1, *[1] * (x.ndim - 2)) for tensor in tensors]


# Names and defaults are torch's.


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _scaled(_normalised(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    return _scaled(_normalised(input, (0, *range(2, input.ndim)), eps), *_by_channel(input, weight, bias))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats=False, eps=eps)
    return _scaled(_normalised(input, tuple(range(2, input.ndim)), eps), *_by_channel(input, weight, bias))


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


_PLAIN: Mapping[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.ops.aten.layer_norm.default: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.ops.aten.batch_norm.default: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    torch.ops.aten.instance_norm.default: _torch_instance_norm,
}
