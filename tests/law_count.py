"""Conservation laws of the small networks of ``law_networks``, counted from gradients and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass

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
    gap: float

    @classmethod
    def expected(cls, count: Count, *, approximate: bool) -> Counted:
        """What the table says; approximate laws are made of squares."""
        squares = count.diagonal + count.mixed + approximate * count.approximate
        return cls(count.linear, squares, count.centred, count.full - count.mixed, 0.0)

    def __eq__(self, other: object) -> bool:
        names = ("linear", "squares", "offset", "other")
        return isinstance(other, Counted) and all(getattr(self, name) == getattr(other, name) for name in names)


def counted(name: str, mode: str, *, eps: float, seed: int = 0) -> Counted:
    """Count the laws of a small network, with generic buffers, in eval mode or with batch statistics."""
    model, example = NETWORKS[name](small=True, eps=eps)
    randomise_buffers(model, mode, seed)
    tensors = dict(model.named_parameters())
    names = select(model, None)
    layout = Layout(tuple(names), tuple(tensors[n].shape for n in names))
    inputs = example if example.is_floating_point() else tokens(example, SIZES[name][1]["vocabulary"])
    laws = discover(model, inputs, products=Products.slices(layout), seed=seed)
    return by_kind(laws)


def by_kind(laws: Discovery) -> Counted:
    """Sort the laws by what they need."""
    squares = torch.arange(len(laws.products)) < laws.n
    linear = laws.restricted(torch.zeros_like(squares))
    plain = laws.restricted(squares, linear=False)
    centred = laws.restricted(squares)
    apart = numerical_rank(torch.cat([linear.gradients(laws.point), plain.gradients(laws.point)]))
    gap = min(laws.gap, linear.gap, plain.gap, centred.gap, apart.gap)
    return Counted(linear.count, apart.rank - linear.count, centred.count - apart.rank, laws.count - centred.count, gap)


def randomise_buffers(model: nn.Module, mode: str, seed: int) -> None:
    """Give BatchNorms generic statistics, or none in train mode, where they are the batch's."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            if mode == "eval":
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 2)
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            else:
                module.running_mean = module.running_var = module.num_batches_tracked = None


def tokens(example: Tensor, vocabulary: int) -> Draw:
    """Sequences of any tokens, in the shape of the example."""
    return lambda generator: torch.randint(vocabulary, example.shape, generator=generator)
