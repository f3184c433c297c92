"""The state_dict of a model with some of its parameters exchanged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["state_with"]


def state_with(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the model's state_dict with these parameters in it, under all names that a tied one has."""
    owners = {id(p): name for name, p in model.named_parameters()}
    names = {alias: owners[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
    state = {}
    for name, tensor in model.state_dict().items():
        new = parameters.get(names.get(name, ""))
        state[name] = tensor.detach().clone() if new is None else new.detach().to(tensor.device).clone()
    return state
