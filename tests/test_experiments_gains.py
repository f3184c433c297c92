"""Gains by climbing from random inputs, where they are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from experiments.denoiser import build
from experiments.gains import gains, largest_gain
from torchflat.problems import DeepLinear

torch.set_num_threads(1)


def stack(weights: list[Tensor], relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        layers += [nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype), nn.ReLU()]
        layers[-2].weight.data.copy_(weight)
    return nn.Sequential(*(each for each in layers[:-1] if relu or isinstance(each, nn.Linear)))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gains_of_linear_layers_are_spectral_norms() -> None:
    weights = [drawn(1, 6, 4), drawn(2, 5, 6), drawn(3, 3, 5)]
    problem = DeepLinear.white(tuple(weights))
    found = gains(stack(weights, relu=False), 4, starts=5, steps=500, seed=0)
    assert found.largest == pytest.approx(problem.gains(), rel=1e-4)
    # The input of the largest output: the top right singular vector of the product.
    v = torch.linalg.svd(problem.product())[2][0]
    first = float((weights[0] @ v).norm())
    assert found.of_output[0] == pytest.approx(first, rel=1e-2) and first < 0.99 * found.largest[0]


def test_positive_weights_make_relu_invisible() -> None:
    weights = [drawn(1, 4, 4).abs(), drawn(2, 4, 4).abs()]
    found = gains(stack(weights, relu=True), 4, starts=5, steps=500, seed=0)
    assert found.largest == pytest.approx(DeepLinear.white(tuple(weights)).gains(), rel=1e-5)


def test_relu_halves_what_passes() -> None:
    # |relu((x, −x))| = |x|, and the second layer sees |x₁| only.
    first = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    found = gains(stack([first, second], relu=True), 2, starts=5, steps=200, seed=0)
    assert found.largest == pytest.approx([2.0, 2.0], rel=1e-5)


def test_no_random_input_and_none_near_gains_more() -> None:
    network = build(3, 0, side=5)
    x = normalize(torch.randn(5000, 25, generator=torch.Generator().manual_seed(9)), dim=1)
    for end in (1, 3, 5):
        best, at = largest_gain(network[:end], 25, starts=40, steps=1000, seed=0)
        near = normalize(at + 0.05 * x, dim=1)
        with torch.no_grad():
            assert float(network[:end](at[None]).norm() / at.norm()) == pytest.approx(best, rel=1e-5)
            assert float(network[:end](torch.cat([x, near])).norm(dim=1).max()) <= best * (1 + 1e-4)
