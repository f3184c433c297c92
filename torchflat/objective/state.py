"""Run someone else's model and leave no trace: attributes, flags and random states are put back, whatever happens."""

from __future__ import annotations

import contextlib
import operator
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["modules_kept", "plain_autograd", "random_states_kept"]


@contextlib.contextmanager
def modules_kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Set every module's ``training`` flag inside the block, and put back all that its modules hold after it.

    That is more than the flags: ``functional_call`` leaves its own tensors in a module that is registered twice, an RNN
    caches its flat weights, and a user's forward may count its calls or keep its activations.
    """
    saved = [(module, _Attributes(vars(module))) for module in model.modules()]
    try:
        for module, _ in saved:
            # Not by train(), because a user's own train() may do more than set the flag.
            module.training = training
        yield
    finally:
        for module, attributes in saved:
            attributes.put_back(vars(module))


class _Attributes:
    """What the attributes of a module were bound to, and what their lists and dicts held."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.bound = attributes.copy()
        self.dicts = [(held, held.copy()) for held in attributes.values() if isinstance(held, dict)]
        self.lists = [(held, held.copy()) for held in attributes.values() if isinstance(held, list)]

    def put_back(self, attributes: dict[str, Any]) -> None:
        _put_back(attributes, self.bound)
        for held, content in self.dicts:
            _put_back(held, content)
        for items, saved in self.lists:
            if len(items) != len(saved) or any(map(operator.is_not, items, saved)):
                items[:] = saved


def _put_back(current: dict[Any, Any], saved: dict[Any, Any]) -> None:
    # Only what differs is touched: an interruption in the middle finds a whole module.
    for key in current.keys() - saved.keys():
        del current[key]
    for key, value in saved.items():
        if key not in current or current[key] is not value:
            current[key] = value


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put back the random states of torch (all devices in use), Python, and numpy if it is loaded."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def plain_autograd(device: torch.device) -> Iterator[None]:
    """Switch autograd on, and autocast and compiled forwards off, whatever surrounds the call.

    A compiled forward has no double backward, and autocast would compute in another precision than the one reported.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        # Where dynamo was never imported nothing can be compiled, and importing it takes seconds.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
