"""The task and the checkpoint that a command is about."""

from __future__ import annotations

from collections.abc import Sequence

from torchflat.audit.task import Task, load_task
from torchflat.cli.flags import key_values
from torchflat.errors import UsageError

__all__ = ["named"]


def named(task: str | None, options: Sequence[str], checkpoint: str | None, command: str) -> tuple[Task, str | None]:
    """Return the task and the checkpoint; with neither, the digits and the trained network that ship with torchflat.

    Raises:
        UsageError: there is a checkpoint and no task, or the task is wrong.
    """
    if task is None and checkpoint is not None:
        raise UsageError(
            "a checkpoint holds weights only: name its model, loss and data with --task file.py:function "
            f"(torchflat {command} --help)"
        )
    loaded = load_task(task or "digits", key_values(options, "--task-option"))
    if task is None:
        from torchflat.data import sample_checkpoint

        checkpoint = str(sample_checkpoint())
    return loaded, checkpoint
