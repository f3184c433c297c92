"""What an optimizer has, and how it is set."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from torchflat.errors import UsageError
from torchflat.optim import sharded
from torchflat.optim.history import Cell

__all__ = ["rates", "tracked"]


def tracked(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer moves by the names in the model, and behind it what else requires grad there."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            found[names.get(id(parameter), f"group {i}, parameter {j}")] = parameter
    if not set(found) & set(names.values()):
        raise UsageError("the optimizer has no parameter of this model: give the model whose parameters it moves")
    found |= {name: p for name, p in model.named_parameters() if p.requires_grad and name not in found}
    if sharded.is_sharded(list(found.values())):
        raise UsageError("sharded parameters (FSDP2) are not tracked: train with DistributedDataParallel, or unsharded")
    return found


def rates(optimizer: Optimizer) -> dict[str, Cell]:
    """Return the learning rate; of further groups too, where they differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if len(set(rates)) <= 1:
        return {"lr": rates[0] if rates else None}
    return {("lr" if i == 0 else f"lr/{i}"): rate for i, rate in enumerate(rates)}
