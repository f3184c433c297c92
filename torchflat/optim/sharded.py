"""Parameters that lie on several processes: their local parts, and norms over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_sharded", "local", "whole_norms"]


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether some of them are DTensors, as FSDP2 and tensor parallelism make them."""
    if set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each tensor that lies here, laid out over the processes as its partner in ``like``."""
    from torch.distributed.tensor import DTensor

    parts = []
    for tensor, partner in zip(tensors, like, strict=True):
        if isinstance(tensor, DTensor) and isinstance(partner, DTensor):
            parts.append(tensor.redistribute(partner.device_mesh, partner.placements).to_local())
        else:
            parts.append(tensor)
    return parts


def whole_norms(norms: Tensor, whole: Sequence[Tensor]) -> Tensor:
    """Return the norms of whole tensors from those of their parts here, (k,): one reduction for each layout."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    norms, layouts = norms.clone(), defaultdict(list)
    for index, tensor in enumerate(whole):
        if isinstance(tensor, DTensor):
            layouts[tensor.device_mesh, tensor.placements].append(index)
    for (mesh, placements), indices in layouts.items():
        # Squares add up over the processes that share a tensor; where each has all of it, they are equal.
        kinds = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
        squares = DTensor.from_local(norms[indices].square(), mesh, kinds, run_check=False)
        norms[indices] = squares.full_tensor().sqrt()
    return norms
