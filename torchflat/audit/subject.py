"""What is measured: the weights of a checkpoint in the model of a task, as an objective, and where it all came from."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchflat.audit.checkpoint import Checkpoint, load_checkpoint
from torchflat.audit.options import Setting
from torchflat.audit.task import Task
from torchflat.objective import Objective
from torchflat.result import Answer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["load_weights", "objective", "peak_memory", "picked", "provenance"]


def load_weights(path: str | Path | None, model: nn.Module, setting: Setting) -> Checkpoint | None:
    """Copy the weights of the checkpoint into ``model``; None leaves it as it is."""
    if path is None:
        return None
    checkpoint = load_checkpoint(path, model, key=setting.key, trust_pickle=setting.trust_pickle)
    checkpoint.apply(model)
    return checkpoint


def objective(task: Task, model: nn.Module, data: Any, setting: Setting, group: ProcessGroup | str | None) -> Objective:
    """Return the task's objective for this model and data, on the rows that were chosen."""
    f = Objective(
        model,
        task.loss,
        data,
        params=setting.params or task.params,
        device=setting.device,
        dtype=setting.torch_dtype,
        microbatch=setting.microbatch,
        memory=setting.memory,
        batch_loss=task.batch_loss,
        weight_decay=task.weight_decay,
        group=group,
    )
    return f if setting.rows is None else f.subset(setting.rows, setting.seed)


def provenance(
    task: Task, checkpoint: Checkpoint | None, f: Objective, setting: Setting, command: str | None
) -> dict[str, Any]:
    """Return what is needed to repeat the measurement, as far as it is known before it."""
    from torchflat import __version__

    return {
        "torchflat": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "seed": setting.seed,
        "command": command,
        "config": setting.to_dict(),
        "task": task.name or None,
        "checkpoint": checkpoint and picked(checkpoint, "path", "sha256", "format", "wrappers"),
        "data": {"rows": f.rows, "sha256": f.fingerprint()},
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "notes": [*(checkpoint.notes if checkpoint else ()), *_cautions(f, setting)],
    }


def _cautions(f: Objective, setting: Setting) -> list[str]:
    notes = ["the model was audited in eval mode"]
    if setting.rows is not None:
        notes.append(f"a random subset of {f.rows} rows was audited: all numbers are about these rows")
    return notes


def peak_memory() -> int | None:
    """Peak resident memory of the process in bytes, where the system tells it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def picked(answer: Answer, *keys: str) -> dict[str, Any]:
    """Return some fields of an answer as plain values."""
    values = answer.to_dict()
    return {key: values[key] for key in keys}
