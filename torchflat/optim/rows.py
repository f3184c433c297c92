"""What a row of the history says, and of which parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchflat.errors import UsageError
from torchflat.optim import sharded
from torchflat.optim.account import Account
from torchflat.optim.history import Cell
from torchflat.optim.sweep import Swept
from torchflat.symmetry import Coupling

__all__ = ["measured", "rates", "tracked", "unscaled"]


def measured(account: Account, x: Swept, gradients: Tensor, length: Tensor | None) -> dict[str, Cell]:
    """Return norms, the length of the step if it is known, and how balanced each law is: all read back at once.

    ``gradients`` holds the squared norm of each one.
    """
    inside = account.moves.inside
    norms = [squares[:inside].sum().sqrt() for squares in (x.squares, gradients)]
    norms.append(torch.full_like(norms[0], math.nan) if length is None else length)
    numbers = torch.cat([torch.stack(norms), account.statistics(x).T.flatten()]).tolist()
    cells: dict[str, Cell] = {"parameter_norm": numbers[0], "gradient_norm": numbers[1]}
    cells["length"] = None if length is None else numbers[2]
    for number, law in enumerate(account.sweep.laws):
        balance, imbalance, drift, unexplained = numbers[3 + 4 * number : 7 + 4 * number]
        if isinstance(law, Coupling):
            cells |= {f"balance/{law.name}": balance, f"imbalance/{law.name}": imbalance}
        cells[f"drift/{law.name}"] = drift
        if law.name not in account.refused:
            cells[f"unexplained/{law.name}"] = unexplained
    return cells


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


def unscaled(g: Swept, optimizer: Optimizer) -> Swept:
    """Take out the factor of a GradScaler, where the optimizer does that itself in its step."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return g
    square = scale.to(g.squares.device, torch.float64) ** 2
    return Swept(g.values / square, g.masses / square, g.squares / square)


def rates(optimizer: Optimizer) -> dict[str, Cell]:
    """Return the learning rate; of further groups too, where they differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if len(set(rates)) <= 1:
        return {"lr": rates[0] if rates else None}
    return {("lr" if i == 0 else f"lr/{i}"): rate for i, rate in enumerate(rates)}
