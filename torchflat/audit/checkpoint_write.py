"""Checkpoints that are written: whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchflat.audit.report import write_whole
from torchflat.errors import UsageError

__all__ = ["refuse_output", "write_checkpoint"]

PICKLED = (".pt", ".pth", ".ckpt", ".bin")


def refuse_output(path: Path, force: bool) -> None:
    """See, before the work begins, that a checkpoint can be written to ``path``.

    Raises:
        UsageError: its suffix is unknown, its folder is missing, or it exists and ``force`` is not given.
    """
    if path.suffix not in (".safetensors", *PICKLED):
        raise UsageError(f"{path}: the suffix tells the format: name it .safetensors, or one of {', '.join(PICKLED)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: make it, or name another")
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(f"{path} is there already: name another file, or overwrite it with --force")


def write_checkpoint(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors, or with torch.save, by the suffix of ``path``.

    Raises:
        UsageError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        data = save(tensors)
    else:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
    try:
        write_whole(path, data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another file") from error
