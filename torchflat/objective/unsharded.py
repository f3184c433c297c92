"""A whole model on every process, from one whose parameters are sharded over them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchflat.errors import UsageError

__all__ = ["unsharded"]

CURE = (
    "audit an ordinary model, loaded with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))"
)


def unsharded(model: nn.Module) -> nn.Module:
    """Return the model itself or, where FSDP2 (``fully_shard``) shards it, a whole copy without its hooks and classes.

    FSDP2 swaps gathered parameters in whenever its hooks run, so that the model cannot be called at another point; the
    copy can. Every process that holds a shard must call this, and gets all parameters, in their own precision.

    Raises:
        UsageError: the model is sharded in another way (FSDP1, tensor parallelism), or cannot be copied.
    """
    if "torch.distributed.tensor" not in sys.modules and "torch.distributed.fsdp" not in sys.modules:
        return model  # Nothing can be sharded by what was never imported.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise UsageError(f"the model is wrapped in FullyShardedDataParallel (FSDP1), which hides it: {CURE}")
    split = [name for name, tensor in model.named_parameters() if isinstance(tensor, DTensor)]
    if not any(isinstance(module, FSDPModule) for module in modules):
        if split:
            raise UsageError(f"{split[0]!r} is a DTensor, and the model is not sharded by fully_shard: {CURE}")
        return model
    clones: dict[int, Any] = {id(m): object.__new__(_without(FSDPModule, type(m))) for m in modules}
    tensors = {id(tensor): _whole(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    memo: dict[int, Any] = {**clones, **tensors}
    for module in modules:
        try:
            vars(clones[id(module)]).update(copy.deepcopy(_attributes(module), memo))
        except (TypeError, NotImplementedError, RuntimeError) as error:
            raise UsageError(f"{type(module).__name__} in the sharded model cannot be copied: {CURE}") from error
    whole: nn.Module = clones[id(model)]
    return whole


def _without(mixin: type, kind: type) -> type:
    """Return the class that the mixin was added to."""
    return next(base for base in kind.__mro__ if not issubclass(base, mixin))


def _whole(tensor: Tensor) -> Tensor:
    # What is not sharded at the moment is copied too: FSDP2 frees the storage of gathered parameters.
    values = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    values = values.detach().clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module without those of FSDP2."""
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("__composable_api")}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        kept = {key: hook for key, hook in attributes[name].items() if not _of("torch.distributed.fsdp", hook)}
        if any(_of("torch.distributed.tensor", hook) for hook in kept.values()):
            raise UsageError(f"{type(module).__name__} is split by tensor parallelism: {CURE}")
        attributes[name] = type(attributes[name])(kept)
    for name in attributes:
        if "state_dict" in name and name.endswith("_hooks"):
            attributes[name] = type(attributes[name])()  # they gather and shard
    attributes["_compiled_call_impl"] = None
    return attributes


def _of(package: str, hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(package)
