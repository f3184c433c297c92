"""Tracking in stock training runs of other packages, against the packages themselves."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchflat.errors import UsageError
from torchflat.optim import NormalizedGD, Tracker, TrackerWarning

BATCH, ROWS, TOGETHER = 8, 64, 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))


def data() -> TensorDataset:
    source = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(ROWS, 5, generator=source), torch.randn(ROWS, 2, generator=source))


def by_hand(epochs: int, every: int) -> Tracker:
    """The same run in a plain loop, with accumulated batches."""
    model = network()
    optimizer = NormalizedGD(model.parameters(), lr=0.05)
    with Tracker(model, optimizer, every=every) as tracker:
        for _ in range(epochs):
            batches = list(DataLoader(data(), batch_size=BATCH))
            for start in range(0, len(batches), TOGETHER):
                losses = [(model(x) - y).square().mean() / TOGETHER for x, y in batches[start : start + TOGETHER]]
                for loss in losses:
                    loss.backward()
                tracker.record(loss=sum(loss.detach() for loss in losses))
                optimizer.step()
                optimizer.zero_grad()
    return tracker


def same(history: dict[str, list[Any]], expected: dict[str, list[Any]], prefix: str = "") -> None:
    """Compare histories whose laws have names of submodules."""
    assert [name.replace(prefix, "") for name in history] == list(expected)
    for column, other in zip(history.values(), expected.values(), strict=True):
        assert column == pytest.approx(other, rel=1e-6, abs=1e-9)


def test_torchflat_imports_neither_package() -> None:
    code = (
        "import sys, torchflat, torchflat.optim, torchflat.integrations; "
        "found = {name.partition('.')[0] for name in sys.modules}; "
        "sys.exit(bool(found & {'lightning', 'pytorch_lightning', 'transformers'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# Lightning ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Iterator[ModuleType]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lightning.pytorch")
        import torchflat.integrations.lightning as module

        yield module


def lightning_module() -> Any:
    import lightning.pytorch as pl

    class Regression(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()  # many do not call self(...)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return NormalizedGD(self.parameters(), lr=0.05)

    return Regression()


class Memory:
    """What a trainer logs, in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def make(self) -> Any:
        from lightning.pytorch.loggers.logger import DummyLogger

        rows = self.rows

        class Kept(DummyLogger):
            def log_metrics(self, metrics: dict[str, float], step: int | None = None, **_: Any) -> None:
                if any(name.startswith("torchflat/") for name in metrics):
                    rows.append((int(step or 0), dict(metrics)))

        return Kept()


def fit(callback: Any, folder: Path, epochs: int, resume: Path | None = None, logger: Any = False) -> Path:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=TOGETHER,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=logger,
        default_root_dir=folder,
    )
    trainer.fit(
        lightning_module(), DataLoader(data(), batch_size=BATCH), ckpt_path=resume, weights_only=resume and True
    )
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return folder / f"{epochs}.ckpt"


def test_lightning_counts_steps_and_takes_the_mean_loss(lightning: ModuleType, tmp_path: Path) -> None:
    memory = Memory()
    callback = lightning.TorchflatCallback(every=3)
    fit(callback, tmp_path, 2, logger=memory.make())
    assert callback.tracker.steps == 2 * ROWS // BATCH // TOGETHER
    same(callback.tracker.history, by_hand(2, every=3).history)
    assert callback.tracker.alarms == []
    assert [step for step, _ in memory.rows] == [0, 3, 6]
    assert [row["torchflat/loss"] for _, row in memory.rows] == callback.tracker.history["loss"]
    optimizer = callback.tracker.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_lightning_goes_on_from_a_checkpoint(lightning: ModuleType, tmp_path: Path) -> None:
    checkpoint = fit(lightning.TorchflatCallback(every=1), tmp_path, 1)
    callback = lightning.TorchflatCallback(every=1)
    fit(callback, tmp_path, 3, resume=checkpoint)
    same(callback.tracker.history, by_hand(3, every=1).history)


def test_lightning_tracks_a_submodule_and_refuses_what_is_not_there(lightning: ModuleType, tmp_path: Path) -> None:
    callback = lightning.TorchflatCallback(module="net", every=1)
    fit(callback, tmp_path, 1)
    assert "drift/0 → 2" in callback.tracker.history
    with pytest.raises(UsageError, match="module='nett'"):
        fit(lightning.TorchflatCallback(module="nett"), tmp_path, 1)
    with pytest.raises(UsageError, match="optimizer=1"):
        fit(lightning.TorchflatCallback(optimizer=1), tmp_path, 1)


def test_lightning_leaves_no_hooks_after_an_exception(lightning: ModuleType, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    callback = lightning.TorchflatCallback()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback, Fails()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(lightning_module(), DataLoader(data(), batch_size=BATCH))
    assert not callback.tracker.optimizer._optimizer_step_pre_hooks


# Transformers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers() -> Iterator[ModuleType]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        import torchflat.integrations.transformers as module

        yield module


class Regression(nn.Module):
    """Returns its loss with its output, as the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"logits": out} if labels is None else {"loss": (out - labels).square().mean(), "logits": out}


def trainer_of(folder: Path, epochs: int, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(ROWS))

    model = Regression()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=TOGETHER,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    optimizer = NormalizedGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    rows = [{"x": x, "labels": y} for x, y in data()]
    return InOrder(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule))


def test_transformers_counts_steps_and_logs_with_the_trainer(transformers: ModuleType, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 2)
    callback = transformers.TorchflatCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    tracker = callback.tracker
    assert tracker.steps == trainer.state.global_step == 2 * ROWS // BATCH // TOGETHER
    expected = by_hand(2, every=1).history
    history = {name: column for name, column in tracker.history.items() if name != "loss"}
    same(history, {name: column for name, column in expected.items() if name != "loss"}, "net.")
    assert tracker.history["loss"] == pytest.approx(expected["loss"], abs=1e-3)  # the trainer rounds it
    logged = [row for row in trainer.state.log_history if "torchflat/parameter_norm" in row]
    assert [row["torchflat/step"] for row in logged] == tracker.history["step"]
    assert not tracker.optimizer._optimizer_step_pre_hooks


def test_transformers_goes_on_from_a_checkpoint(transformers: ModuleType, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 1)
    trainer.add_callback(transformers.TorchflatCallback())
    trainer.train()
    steps = ROWS // BATCH // TOGETHER
    assert (tmp_path / f"checkpoint-{steps}" / transformers.STATE).exists()
    trainer = trainer_of(tmp_path, 3)
    callback = transformers.TorchflatCallback()
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    expected = by_hand(3, every=1).history
    assert callback.tracker.history["step"] == expected["step"]
    for name in ("parameter_norm", "gradient_norm", "sum_length"):
        assert callback.tracker.history[name] == pytest.approx(expected[name], rel=1e-6)


def test_transformers_says_when_a_checkpoint_has_no_state(transformers: ModuleType, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 1)
    trainer.train()
    trainer = trainer_of(tmp_path, 2)
    trainer.add_callback(transformers.TorchflatCallback())
    with pytest.warns(TrackerWarning, match="tracking starts anew"):
        trainer.train(resume_from_checkpoint=True)
