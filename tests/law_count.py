"""Conservation laws of the small networks of ``law_networks``, counted from gradients and from nothing else."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from law_networks import NETWORKS, SIZES
from law_table import Count
from torch import Tensor, nn

from torchflat.parameters import Layout, select
from torchflat.symmetry.discover import Discovery, Products, discover
from torchflat.symmetry.sampling import Draw, numerical_rank

__all__ = ["Counted", "counted"]


@dataclass(frozen=True)
class Counted:
    """Independent laws, by what they are made of, and the smallest gap that a rank rests on.

    ``squares`` counts laws Σ s x² beyond the linear ones, ``offset`` what linear terms add to these, ``other`` those
    that need products of different entries.
    """

    linear: int
    squares: int
    offset: int
    other: int
    gap: float = field(compare=False, default=0.0)

    @classmethod
    def expected(cls, count: Count, *, approximate: bool) -> Counted:
        """What the table says; approximate laws are made of squares."""
        squares = count.diagonal + count.mixed + approximate * count.approximate
        return cls(count.linear, squares, count.centred, count.full - count.mixed)


def counted(name: str, mode: str, *, eps: float, seed: int = 0) -> Counted:
    """Count the laws of a small network, with generic buffers, in eval mode or with batch statistics."""
    model, example = NETWORKS[name](small=True, eps=eps)
    # Batch statistics of few numbers may hardly vary, and gradients are then huge.
    example = example.repeat(3, *[1] * (example.dim() - 1)) if mode == "train" else example
    inputs = like(example) if example.is_floating_point() else tokens(example, SIZES[name][1]["vocabulary"])
    names = select(model, None)
    layout = Layout(tuple(names), tuple(model.get_parameter(n).shape for n in names))
    set_buffers(model.double().eval(), mode, inputs, torch.Generator().manual_seed(seed))
    points = partial(draw_parameters, copy.deepcopy(model), inputs)
    return by_kind(discover(model, inputs, parameters=points, products=Products.slices(layout), seed=seed))


def by_kind(laws: Discovery) -> Counted:
    """Sort the laws by what they need."""
    squares = torch.arange(len(laws.products)) < laws.n
    linear = laws.restricted(torch.zeros_like(squares))
    plain = laws.restricted(squares, linear=False)
    centred = laws.restricted(squares)
    apart = numerical_rank(torch.cat([linear.gradients(laws.point), plain.gradients(laws.point)]))
    gap = min(laws.gap, linear.gap, plain.gap, centred.gap, apart.gap)
    return Counted(linear.count, apart.rank - linear.count, centred.count - apart.rank, laws.count - centred.count, gap)


def set_buffers(model: nn.Module, mode: str, inputs: Draw, generator: torch.Generator) -> None:
    """Give BatchNorms statistics near to those of data, or none in train mode, where they are the batch's."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    draw_parameters(model, inputs, generator)
    for norm in norms:
        if mode == "train":
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        else:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))


def draw_parameters(model: nn.Module, inputs: Draw, generator: torch.Generator) -> Tensor:
    """Return generic parameters (n,), for which most units switch: layers with a bias are centred on data, roughly."""
    for parameter in model.parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.numel() == parameter.shape[0]:
            parameter.data.copy_(normal.sign() * (0.5 + torch.rand(parameter.shape, generator=generator)))
        else:
            parameter.data.copy_(normal / math.sqrt(parameter[0].numel()))
    handles = [module.register_forward_hook(partial(_centre, generator)) for module in model.modules()]
    with torch.no_grad():
        model(torch.cat([inputs(generator) for _ in range(50)]))
    for handle in handles:
        handle.remove()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def _centre(generator: torch.Generator, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    """Scale and shift a layer with a bias so that its outputs are of order 1 and change sign."""
    if not isinstance(module, nn.Linear | nn.Conv2d | nn.modules.batchnorm._BatchNorm) or module.bias is None:
        return None
    axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1
    rows = output.movedim(axis, 0).flatten(1)
    # A channel may be dead here.
    factor = (0.5 + torch.rand(len(rows), generator=generator)) / rows.std(1).clamp_min(0.1)
    shift = 0.5 * torch.randn(len(rows), generator=generator)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # Rather on than off: a channel that is off on a whole batch has no variance to normalise the next one by.
        shift = 0.2 + 0.8 * torch.rand(len(rows), generator=generator)
    shift -= rows.mean(1) * factor
    module.weight.data *= factor.reshape(-1, *[1] * (module.weight.dim() - 1))
    module.bias.data.mul_(factor).add_(shift)
    return module.forward(*inputs)


def like(example: Tensor) -> Draw:
    """Normal inputs in the shape of the example, at three scales in turn of the dice."""
    scales = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)

    def draw(generator: torch.Generator) -> Tensor:
        chosen = scales[torch.randint(3, (len(example), *[1] * (example.dim() - 1)), generator=generator)]
        return chosen * torch.randn(example.shape, generator=generator, dtype=torch.float64)

    return draw


def tokens(example: Tensor, vocabulary: int) -> Draw:
    """Sequences of any tokens, in the shape of the example."""
    return lambda generator: torch.randint(vocabulary, example.shape, generator=generator)
