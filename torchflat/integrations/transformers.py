"""Tracking in a run of the Transformers ``Trainer``: ``trainer.add_callback(TorchflatCallback(trainer))``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torchflat.optim import Tracker, TrackerWarning

__all__ = ["STATE", "TorchflatCallback"]

# In the folder of each checkpoint.
STATE = "torchflat_tracker.pt"


class TorchflatCallback(TrainerCallback):
    """Track a run with a :class:`~torchflat.optim.Tracker`, and log what it finds where the trainer logs.

    It counts optimizer steps, so that accumulated batches make one row. The loss of a row is what the trainer logs
    there, its mean since the time before; with ``logging_steps=1`` that of the step. Each checkpoint folder gets the
    state of the tracker, and a run that is resumed goes on with its history. After the run ``tracker`` is there to
    save, plot, or read.

    Args:
        trainer: where to log, in ``trainer.log``, whenever it logs itself; without it the numbers are in ``tracker``
            only.
        options: those of :class:`~torchflat.optim.Tracker`. ``every`` is ``logging_steps`` unless it is given.
    """

    def __init__(self, trainer: Trainer | None = None, **options: Any) -> None:
        self._trainer, self._options = trainer, options
        self._state: Mapping[str, Any] | None = None
        self._logged = 0
        self._logging = False
        self.tracker: Tracker | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the state that belongs to the step at which a run is resumed."""
        self._release()
        self.tracker = None
        if state.global_step:
            file = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / STATE
            if file.exists():
                self._state = torch.load(file, weights_only=True, map_location="cpu")
            else:
                warnings.warn(
                    f"no {file}: tracking starts anew at step {state.global_step}", TrackerWarning, stacklevel=2
                )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach before the first batch: earlier there may be no optimizer yet."""
        if self.tracker is not None or model is None or optimizer is None:
            return
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        every = max(1, int(args.logging_steps)) if args.logging_steps >= 1 else 1
        self.tracker = Tracker(model, inner, **{"every": every, **self._options})
        if self._state is not None:
            self.tracker.load_state_dict(self._state)
        self._logged = self.tracker.rows

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take over the loss, and log the rows that are new."""
        tracker = self.tracker
        if tracker is None or self._logging or not logs or "loss" not in logs or not tracker.steps:
            return
        tracker.record(loss=float(logs["loss"]))
        tracker.flush()
        rows = list(tracker.since(self._logged))
        self._logged = tracker.rows
        if self._trainer is None or not rows:
            return
        cells = {name: cell for name, cell in rows[-1].items() if isinstance(cell, (int, float))}
        self._logging = True
        try:
            self._trainer.log({f"torchflat/{name}": float(cell) for name, cell in cells.items()})
        finally:
            self._logging = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the tracker beside the checkpoint."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if self.tracker is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(self.tracker.state_dict(), folder / STATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks away."""
        self._release()

    def _release(self) -> None:
        if self.tracker is not None:
            self.tracker.detach()
