"""Tracking in a Lightning run: ``Trainer(callbacks=[TorchflatCallback()])``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchflat.errors import UsageError
from torchflat.optim import Tracker

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the package of the older name
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.callbacks import Callback

__all__ = ["TorchflatCallback"]


class TorchflatCallback(Callback):
    """Track a run with a :class:`~torchflat.optim.Tracker`, and log what it finds to the loggers of the trainer.

    It counts optimizer steps, so that accumulated batches make one row, with the mean of their losses. A checkpoint
    has the state of the tracker, and a run that is resumed from it goes on with its history. After the run ``tracker``
    is there to save, plot, or read.

    Args:
        module: name of the submodule to find the laws of, such as ``"net"``; default: the one that has all the
            parameters, as a training step may call it and not the LightningModule, or else the LightningModule.
        optimizer: number of the optimizer to listen to, where there are several.
        options: those of :class:`~torchflat.optim.Tracker`. ``every`` is 10 here.

    Raises:
        UsageError: at the start of training, if there is no such module or optimizer.
    """

    def __init__(self, module: str | None = None, optimizer: int = 0, **options: Any) -> None:
        super().__init__()
        self._module, self._optimizer = module, optimizer
        self._options: dict[str, Any] = {"every": 10, **options}
        self._state: Mapping[str, Any] | None = None
        self._loss: Tensor | None = None
        self._logged = 0
        self.tracker: Tracker | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizer, whose state and parameters are those of the checkpoint by now."""
        if not 0 <= self._optimizer < len(trainer.optimizers):
            raise UsageError(f"optimizer={self._optimizer}: this run has {len(trainer.optimizers)}")
        self.tracker = Tracker(self._model(pl_module), trainer.optimizers[self._optimizer], **self._options)
        if self._state is not None:
            self.tracker.load_state_dict(self._state)
        self._logged = self.tracker.rows

    def _model(self, pl_module: LightningModule) -> nn.Module:
        if self._module is not None:
            try:
                return pl_module.get_submodule(self._module)
            except AttributeError as error:
                raise UsageError(f"module={self._module!r}: {error}") from error
        parameters = set(pl_module.parameters())
        whole = [child for child in pl_module.children() if set(child.parameters()) == parameters]
        return whole[0] if whole else pl_module

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add up the losses of the batches that make a step, which come divided by their number."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        part = loss.detach() if scaler is None else loss.detach() / scaler.get_scale()
        self._loss = part if self._loss is None else self._loss + part

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Hand over the loss of the step."""
        if self.tracker is not None and optimizer is self.tracker.optimizer and self._loss is not None:
            self.tracker.record(loss=self._loss)
        self._loss = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rows that are new."""
        self._log_rows(trainer)

    def _log_rows(self, trainer: Trainer) -> None:
        assert self.tracker is not None
        for row in self.tracker.since(self._logged):
            step = int(row.pop("step") or 0)
            metrics = {f"torchflat/{name}": cell for name, cell in row.items() if isinstance(cell, (int, float))}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
        self._logged = self.tracker.rows

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks away, and log the last rows."""
        self._release()
        self._log_rows(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._release()

    def _release(self) -> None:
        if self.tracker is not None:
            self.tracker.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._state = state_dict or None
