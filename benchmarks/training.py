"""One training run of ``benchmarks.optimizers``, its steps timed, and the curvature where it ended."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cells import Cell, environment, version
from benchmarks.contenders import CONTENDERS, Contender, Loop, Setting
from benchmarks.networks import denoiser_layers
from benchmarks.records import Record
from torchflat import Objective, ops, sharpness
from torchflat.data import denoising, mnist
from torchflat.data.models import digit_classifier
from torchflat.symmetry import Laws, flattest, laws

__all__ = ["QUICK", "TASKS", "Task", "Trainer", "batch_loss", "built", "epochs", "metric"]

Rows = tuple[Tensor, Tensor]
# Not the seeds of the runs: their first weights would be the noise of some images, number by number.
NOISE = {"train": 2001, "test": 2002}
ROUNDS, STEPS_A_ROUND, FIRST_ROUNDS = 12, 5, 2


# What is trained ------------------------------------------------------------------------------------------------------


def digits(split: str, start: int, stop: int) -> Rows:
    images, labels = mnist(split, rows=stop)
    return images[start:].view(-1, 1, 28, 28), labels[start:]


def noisy(split: str, start: int, stop: int) -> Rows:
    inputs, targets = denoising(mnist(split, rows=stop)[0], seed=NOISE[split])
    return inputs[start:], targets[start:]


def errors(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of wrong classes, in percent."""
    return 100 * float((outputs.argmax(1) != targets).double().mean())


def squares(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean squared error of a pixel."""
    return float((outputs - targets).double().square().mean())


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, its data, and how it is trained and measured. ``grids`` holds the settings tried, by contender."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[str, int, int], Rows]
    loss: nn.Module
    loss_name: str
    metric: Callable[[Tensor, Tensor], float]
    metric_name: str
    blind_loss: float  # of a network that always answers the same
    rows: int
    held_out: int
    test_rows: int
    epochs: int
    batch: int
    rtol: float  # of λ₁
    orbit_rows: int
    grids: Mapping[str, tuple[Setting, ...]]

    def steps(self, contender: Contender) -> int:
        """Return the number of steps of a run."""
        return round(contender.epochs * self.epochs) * math.ceil(self.rows / self.batch)

    @functools.cached_property
    def training(self) -> Rows:
        """The rows that are trained on, and whose loss is f."""
        return self.data("train", 0, self.rows)

    @functools.cached_property
    def unseen(self) -> Rows:
        """The rows that choose among settings."""
        return self.data("train", self.rows, self.rows + self.held_out)

    @functools.cached_property
    def test(self) -> Rows:
        """The rows of the test metric."""
        return self.data("test", 0, self.test_rows)


def rates(*values: float) -> tuple[Setting, ...]:
    return tuple({"lr": value} for value in values)


def radii(*pairs: tuple[float, float]) -> tuple[Setting, ...]:
    return tuple({"lr": lr, "rho": rho} for lr, rho in pairs)


TASKS = {
    "digits": Task(
        name="digits",
        build=digit_classifier,
        data=digits,
        loss=nn.CrossEntropyLoss(),
        loss_name="cross-entropy, nats",
        metric=errors,
        metric_name="error on test images, %",
        blind_loss=math.log(10),
        rows=10_000,
        held_out=5000,
        test_rows=10_000,
        epochs=8,
        batch=50,
        rtol=2e-2,
        orbit_rows=2000,
        grids={
            "sgd": rates(0.1, 0.3, 1.0),
            "adam": rates(1e-3, 3e-3, 1e-2, 3e-2),
            "sam": radii((0.3, 0.05), (0.3, 0.2), (1.0, 0.05), (1.0, 0.2)),
            "ngd": rates(0.3, 1.0, 3.0),
            "ngd-cooldown": rates(0.3, 1.0, 3.0),
        },
    ),
    "denoiser": Task(
        name="denoiser",
        build=functools.partial(denoiser_layers, 784),
        data=noisy,
        loss=nn.MSELoss(),
        loss_name="squared error of a pixel",
        metric=squares,
        metric_name="squared error of a test pixel",
        blind_loss=0.112,
        rows=4000,
        held_out=2000,
        test_rows=5000,
        epochs=10,
        batch=50,
        rtol=3e-2,
        orbit_rows=400,
        grids={
            "sgd": rates(0.25, 0.5, 1.0, 2.0),
            "adam": rates(1e-4, 3e-4, 1e-3, 3e-3),
            "sam": radii((0.5, 0.05), (0.5, 0.2), (1.0, 0.05), (1.0, 0.2), (2.0, 0.05)),
            "ngd": rates(0.3, 1.0, 3.0, 10.0),
            "ngd-cooldown": rates(0.3, 1.0, 3.0, 10.0),
        },
    ),
}
QUICK = {
    name: dataclasses.replace(
        task,
        build=functools.partial(denoiser_layers, 32) if name == "denoiser" else task.build,
        rows=500,
        held_out=500,
        test_rows=500,
        epochs=2,
        rtol=0.1,
        orbit_rows=100,
        grids={contender: settings[:2] for contender, settings in task.grids.items()},
    )
    for name, task in TASKS.items()
}


# What is measured -----------------------------------------------------------------------------------------------------


class Trainer:
    """Measures cells of the tasks given. The setting says what: a run, the curvature at its end, or times of steps.

    Weights are kept in ``cache``. Seconds are of the processor, not of the clock, so that other work on the machine
    changes them little.
    """

    def __init__(self, tasks: Mapping[str, Task], cache: Path) -> None:
        self.tasks, self.cache = tasks, cache

    def __call__(self, cell: Cell, limit: float | None) -> Record:
        """Measure the cell."""
        task, setting = self.tasks[cell.network], dict(cell.setting)
        what = setting.pop("measure", "run")
        if what == "steps":
            found = self.steps(task)
        elif what == "curvature":
            found = self.curvature(task, cell, setting)
        else:
            found = self.run(task, cell, setting)
        threads = torch.get_num_threads()
        peer = dict([version("pytorch-optimizer")])
        known = environment(threads)
        return {**found, **known, "versions": {**known["versions"], **peer}, "kernels": ops.backend("cpu")}

    def run(self, task: Task, cell: Cell, setting: Setting) -> Record:
        """Train, and tell how it went: losses by epoch, on all training rows at the end, and both metrics."""
        contender = CONTENDERS[cell.method]
        model = built(task, setting["seed"])
        loop = contender.make(model.parameters(), setting, task.steps(contender))
        losses: list[float] = []
        norms: list[float] = []
        began, start = time.perf_counter(), time.process_time()
        for epoch in epochs(task, contender, setting["seed"]):
            values = [loop.step(functools.partial(batch_loss, task, model, rows)) for rows in epoch]
            losses.append(statistics.fmean(values))
            if not math.isfinite(losses[-1]):
                return {"status": "diverged", "value": None, "losses": losses[:-1]}
            norms.append(_gradient_norm(model))
        seconds, wall = time.process_time() - start, time.perf_counter() - began
        self.cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), self._weights(cell))
        return {
            "status": "finished",
            "value": metric(task, model, task.unseen),
            "test": metric(task, model, task.test),
            "train_loss": Objective(model.eval(), task.loss, task.training).value(),
            "losses": losses,
            "gradient_norms": norms,
            "steps": task.steps(contender),
            "gradients": contender.gradients * task.steps(contender),
            "seconds": seconds,
            "wall_seconds": wall,
        }

    def curvature(self, task: Task, cell: Cell, setting: Setting) -> Record:
        """Measure λ₁ on all training rows, λ₁★ on ``orbit_rows`` of them, and how unbalanced the weights are."""
        run = dataclasses.replace(cell, setting=setting)
        if not self._weights(run).exists():
            self.run(task, run, setting)
        model = task.build().eval()
        model.load_state_dict(torch.load(self._weights(run), weights_only=True))
        inputs, targets = task.training
        f = Objective(model, task.loss, (inputs, targets), memory="4GiB")
        start = time.process_time()
        top = sharpness(f, task.rtol, seed=setting["seed"])
        found = laws(model, inputs[:1])
        some = slice(task.orbit_rows)
        g = Objective(model, task.loss, (inputs[some], targets[some]), memory="4GiB")
        orbit = flattest(g, found, rtol=2e-2, budget=200, seed=setting["seed"])
        return {
            "status": top.status.name,
            "value": top.value,
            "lower": top.lower,
            "upper": top.upper,
            "orbit": {
                "rows": g.rows,
                "before": orbit.before.value,
                "value": orbit.value,
                "upper": orbit.recomputed.upper,
                "lower": orbit.lower,
                "status": orbit.status.name,
                "negative": orbit.negative,
                "frozen": len(orbit.frozen),
                "gradients": orbit.cost.gradients,
            },
            "imbalance": imbalance(found, model),
            "norm": float(torch.linalg.vector_norm(f.x.double())),
            "gradients": top.cost.gradients,
            "seconds": time.process_time() - start,
        }

    def steps(self, task: Task) -> Record:
        """Time the steps of all contenders in turn: the median of the rounds, and of their ratios to SGD's."""
        loops: dict[str, tuple[nn.Module, Loop]] = {}
        for name, settings in task.grids.items():
            model = built(task, 0)
            loops[name] = model, CONTENDERS[name].make(model.parameters(), settings[0], task.steps(CONTENDERS[name]))
        rows = torch.arange(task.batch)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(FIRST_ROUNDS + ROUNDS):
            for name, (model, loop) in loops.items():
                start = time.process_time()
                for _ in range(STEPS_A_ROUND):
                    loop.step(functools.partial(batch_loss, task, model, rows))
                times[name].append((time.process_time() - start) / STEPS_A_ROUND)
        counted = {name: each[FIRST_ROUNDS:] for name, each in times.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(each, counted["sgd"], strict=True))
            for name, each in counted.items()
        }
        return {
            "status": "finished",
            "value": None,
            "milliseconds": {name: 1e3 * statistics.median(each) for name, each in counted.items()},
            "ratios": ratios,
        }

    def _weights(self, cell: Cell) -> Path:
        return self.cache / f"{cell.name}.pt"


def built(task: Task, seed: int) -> nn.Module:
    """Return the network with the first weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return task.build().train()


def epochs(task: Task, contender: Contender, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield, epoch by epoch, the rows of the batches; the same for all contenders."""
    order = torch.Generator().manual_seed(1000 + seed)
    for _ in range(round(contender.epochs * task.epochs)):
        yield torch.randperm(task.rows, generator=order).split(task.batch)


def batch_loss(task: Task, model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of some training rows."""
    inputs, targets = task.training
    value: Tensor = task.loss(model(inputs[rows]), targets[rows])
    return value


def metric(task: Task, model: nn.Module, rows: Rows) -> float:
    """Return the task's metric on some rows."""
    inputs, targets = rows
    with torch.no_grad():
        outputs = torch.cat([model.eval()(part) for part in inputs.split(1000)])
    return task.metric(outputs, targets)


def _gradient_norm(model: nn.Module) -> float:
    squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(squares))


def imbalance(found: Laws, model: nn.Module) -> float:
    """Return Σ|C| / Σ(|writers|² + |readers|²) over all channels: from 0, balanced, to 1, one-sided."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sides = [coupling.sides(tensors) for coupling in found.couplings]
    apart = sum(float((writers - readers).abs().sum()) for writers, readers in sides)
    return apart / sum(float((writers + readers).sum()) for writers, readers in sides)
