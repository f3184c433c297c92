"""How much each layer of a network can amplify an input: the intermediate gains of *Unique Properties of Flat Minima*.

A bias-free ReLU network s is positively homogeneous, s(tx) = t·s(x) for t ≥ 0, so that the largest |s(x)|/|x| is that
on the unit sphere. There |s|² is climbed from many random inputs by x ← y/|y|, y = ∇½|s|² + a|s|²x: for a linear s this
is a power iteration on sᵀs with a shift. The largest gains are often where a neuron just begins to pay, at an edge that
steps of one length jump over; so a grows, and the steps become shorter, but not summable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

__all__ = ["Gains", "gains", "largest_gain"]

SHIFT, STEPS_TO_DOUBLE = 1.0, 10  # a at first, and when it is twice as large


@dataclass(frozen=True)
class Gains:
    """By layer, after its ReLU: the largest gain of any input found, and that of the input whose output is largest."""

    largest: list[float]
    of_output: list[float]


def gains(network: nn.Sequential, size: int, starts: int, steps: int, seed: int) -> Gains:
    """Find the largest gain from the input, a vector of ``size``, to every layer of a bias-free ReLU network."""
    linear = [place for place, layer in enumerate(network) if isinstance(layer, nn.Linear)]
    # What a layer hands on is what comes before the next one.
    signals = [network[:end] for end in (*linear[1:], len(network))]
    found = [largest_gain(signal, size, starts, steps, seed) for signal in signals]
    top = found[-1][1]
    with torch.no_grad():
        of_output = [float(signal(top[None]).norm()) for signal in signals]
    # The input of the largest output is one more start for every layer.
    return Gains([max(gain, other) for (gain, _), other in zip(found, of_output, strict=True)], of_output)


def largest_gain(signal: nn.Module, size: int, starts: int, steps: int, seed: int) -> tuple[float, Tensor]:
    """Return max |signal(x)| over unit x, as found from ``starts`` random inputs in at most ``steps`` steps, and x."""
    dtype = next(signal.parameters()).dtype
    x = torch.randn(starts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    x = normalize(x, dim=1)
    best, at = -1.0, x[0]
    for step in range(steps):
        x.requires_grad_()
        squares = signal(x).square().sum(1)
        (slope,) = torch.autograd.grad(0.5 * squares.sum(), x)
        x, squares = x.detach(), squares.detach()
        top = int(squares.argmax())
        if float(squares[top]) > best:
            best, at = float(squares[top]), x[top]
        shift = SHIFT * (1 + step / STEPS_TO_DOUBLE)
        x = normalize(slope + shift * squares[:, None] * x, dim=1)
    return best**0.5, at
