"""Random global minimisers of deep linear networks, and random moves between them: all keep the product T.

The sheet names the moves of its source (S104–S106, T066) without their formulas: these do what each is used for.
Weights are W₁ … W_m, layer k maps width k − 1 to width k, and T = W_m⋯W₁.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.problems.deep_linear import multiplied

__all__ = ["mixed", "nudged", "random_minimiser"]

Weights = tuple[Tensor, ...]


def random_minimiser(product: Tensor, depth: int, generator: torch.Generator) -> Weights:
    """Draw m square layers with the given product: all Gaussian but one, drawn at random too, that makes up for them.

    W_j = (W_m⋯W_{j+1})⁻¹ T (W_{j−1}⋯W₁)⁻¹, entries of the others N(0, 1/d), T (d, d). These networks are far from
    flat: λ₁ is many times the least.

    >>> generator = torch.Generator().manual_seed(0)
    >>> W1, W2, W3 = random_minimiser(torch.diag(torch.tensor([3.0, 1.0])), 3, generator)
    >>> (W3 @ W2 @ W1).round(decimals=9).abs().tolist()
    [[3.0, 0.0], [0.0, 1.0]]
    """
    size = len(product)
    if product.shape != (size, size) or depth < 1:
        raise UsageError(f"give a square product and a depth of 1 or more, not {tuple(product.shape)} and {depth}")
    weights = [_gaussian(size, generator) / size**0.5 for _ in range(depth)]
    j = int(torch.randint(depth, (), generator=generator))
    before, after = multiplied(weights[:j], size), multiplied(weights[j + 1 :], size)
    weights[j] = torch.linalg.solve(after, torch.linalg.solve(before, product.double(), left=False))
    return tuple(weights)


def mixed(weights: Sequence[Tensor], size: float, generator: torch.Generator) -> Weights:
    """Change the basis between any two layers: W_k ← G_kW_kG_{k−1}⁻¹, G_k = I + εN_k, N_k Gaussian, G_0 = G_m = I.

    ε is ``size``, relative to the layers. Any widths.
    """
    moved = [w.double() for w in weights]
    for k, width in enumerate(map(len, moved[:-1])):
        change = torch.eye(width, dtype=torch.float64) + size * _gaussian(width, generator)
        moved[k], moved[k + 1] = change @ moved[k], torch.linalg.solve(change, moved[k + 1], left=False)
    return tuple(moved)


def nudged(weights: Sequence[Tensor], size: float, generator: torch.Generator) -> Weights:
    """Move all layers but one, drawn, by εN, N Gaussian, and let that one make up for it; square, invertible layers.

    ε is ``size``.
    """
    layers = [w.double() for w in weights]
    width = len(layers[0])
    product = multiplied(layers, width)
    j = int(torch.randint(len(layers), (), generator=generator))
    moved = [w + size * _gaussian(width, generator) for w in layers]
    before, after = multiplied(moved[:j], width), multiplied(moved[j + 1 :], width)
    moved[j] = torch.linalg.solve(after, torch.linalg.solve(before, product, left=False))
    return tuple(moved)


def _gaussian(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, size, generator=generator, dtype=torch.float64)
