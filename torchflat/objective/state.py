"""Run someone else's model and leave no trace: flags, buffers and random states are put back, whatever happens."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["random_states_kept", "training_flags"]


@contextlib.contextmanager
def training_flags(model: nn.Module | None, training: bool) -> Iterator[None]:
    """Set every module's ``training`` flag inside the block, and restore each one's own flag after it.

    The attribute is set directly, because a user's ``train()`` may do more than that.
    """
    changed = [module for module in model.modules() if module.training != training] if model is not None else []
    try:
        for module in changed:
            module.training = training
        yield
    finally:
        for module in changed:
            module.training = not training


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
