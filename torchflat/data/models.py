"""The two small networks that the shipped checkpoint, the built-in tasks and the experiments use."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from torchflat.errors import UsageError

__all__ = ["digit_classifier", "relu_network"]


def digit_classifier() -> nn.Module:
    """Return the network of the shipped checkpoint: (N, 1, 28, 28) digits to (N, 10) logits, 11 274 parameters.

    Two 5x5 convolutions of stride 2 (8 and 16 channels) with ReLU and one linear layer: layers enough to have
    rescaling couplings, few enough to audit in seconds.

    >>> sum(p.numel() for p in digit_classifier().parameters())
    11274
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, kernel_size=5, stride=2, padding=2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            linear=nn.Linear(16 * 7 * 7, 10),
        )
    )


def relu_network(depth: int = 6, width: int = 784, bias: bool = False, init: str = "he") -> nn.Sequential:
    """Return ``depth`` linear layers, all ``width`` wide, with ReLU between them and none after the last.

    ``init`` sets the weights: ``"he"`` normal with variance 2 / width, ``"identity"``, or ``"default"`` for what
    ``nn.Linear`` does; the first two set biases to zero. Draws from torch's global random state.

    >>> import torch
    >>> network = relu_network(depth=3, width=2, init="identity")
    >>> network(torch.tensor([[1.0, -1.0]])).tolist()
    [[1.0, 0.0]]
    """
    if depth < 1 or width < 1:
        raise UsageError(f"depth is {depth} and width {width}: both must be at least 1")
    if init not in ("he", "identity", "default"):
        raise UsageError(f"init is {init!r}: use 'he', 'identity' or 'default'")
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=bias)
        if init == "he":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        elif init == "identity":
            nn.init.eye_(linear.weight)
        if bias and init != "default":
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
