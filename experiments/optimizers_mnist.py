"""SGD, Adam, SAM and NormalizedGD on MNIST: loss, balance and sharpness along training.

Networks, batches and first weights are those of ``python -m benchmarks.optimizers``, and each optimizer has the setting
that came out best there. The conserved quantities C compare, channel by channel, the weights that write it with those
that read it. Gradient flow keeps them; a step of length α along the unit vector u changes them by α²C(u) and by nothing
else (T037). Near a flat minimum of the papers' examples that takes |C| down, and λ₁ with it. The flat points of a
network are not its balanced ones (T089), so that nothing says it does so here. SAM takes its gradient elsewhere and
Adam rescales it: neither has such a law.

λ₁ is of the loss on some of the training rows. Curves are means over the seeds, bands go from the least to the largest.
SAM takes two gradients a step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer

from benchmarks.contenders import CONTENDERS, installed
from benchmarks.endings import LOOKS, Endings
from benchmarks.training import TASKS, Task, batch_loss, built, epochs, metric
from experiments.cells import Cells, Key
from experiments.claim import Claim, Outcome
from torchflat import Objective
from torchflat.drawing import logarithmic, panels
from torchflat.errors import UsageError
from torchflat.optim import Tracker

TITLE = "SGD, Adam, SAM and NormalizedGD on MNIST: loss, balance and sharpness along training"

SETTINGS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "optimizers.json"
KINDS = ("balance", "drift", "unexplained")
PLAIN, OTHERS = ("sgd", "ngd", "ngd-cooldown"), ("sgd", "adam", "sam")

CLAIMS = (
    Claim(
        "plain",
        "steps along the gradient change C by Σα²C(u) alone: largest difference, in units of what rounding may do",
        "Implicit regularization of NGD, T037",
        (0, 1),
    ),
    Claim(
        "sam", "SAM's steps change C otherwise: the same difference, at the least of the seeds", "T037", (1, math.inf)
    ),
    Claim("adam", "SGD moves C less than Adam: drift with SGD over that with Adam", "T013, T080", (0, 1)),
    # In a network balanced is not flat (T089); declared after a quick run, in which |C| grew with every optimizer.
    Claim(
        "balance",
        "normalised steps balance: |C| at the end over that at the start, NormalizedGD",
        "Implicit regularization of NGD, T036–T038",
        (0, 1),
        expected=Outcome.NOT_REPRODUCED,
    ),
    # Declared after python -m benchmarks.optimizers, where SAM had ended flattest, and after a quick run.
    Claim(
        "flattest",
        "normalised steps end flattest: λ₁ with NormalizedGD over the least with SGD, Adam, SAM",
        "Implicit regularization of NGD, Table 1",
        (0, 1),
        expected=Outcome.NOT_REPRODUCED,
    ),
    Claim("sam_flatter", "SAM ends flatter than SGD: λ₁ with SAM over that with SGD", "what SAM is for", (0, 1)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of ``benchmarks.optimizers``, and how it is followed: each ``every`` steps."""

    network: str
    contenders: tuple[str, ...]
    rows: int
    epochs: int
    every: int
    sharpness_rows: int
    seeds: tuple[int, ...]


def run(config: Config, cells: Cells) -> dict[str, Any]:
    missing = [name for name in config.contenders if not installed(name)]
    if missing:
        raise UsageError("SAM is not installed: pip install pytorch-optimizer")
    keys = [
        {
            "network": config.network,
            "contender": name,
            "setting": chosen(config.network, name),
            "seed": seed,
            "rows": config.rows,
            "epochs": config.epochs,
            "every": config.every,
            "sharpness_rows": config.sharpness_rows,
        }
        for seed in config.seeds
        for name in config.contenders
    ]
    runs = [{**key, **record} for key, record in zip(keys, cells.map("runs", keys, followed), strict=True)]
    task = TASKS[config.network]
    return {"loss": task.loss_name, "metric": task.metric_name, "every": config.every, "runs": runs}


def chosen(network: str, contender: str) -> dict[str, Any]:
    """Return the setting that the benchmark found to be best."""
    setting = Endings(json.loads(SETTINGS.read_text())).chosen(network, contender)
    if setting is None:
        raise UsageError(
            f"{SETTINGS.name} has no setting of {contender} on {network}: run python -m benchmarks.optimizers"
        )
    return setting


def followed(key: Key, scratch: Path) -> dict[str, Any]:
    """Train once, and return what the tracker saw every so many steps, with the mean loss of the steps in between."""
    task = dataclasses.replace(TASKS[key["network"]], rows=key["rows"], epochs=key["epochs"])
    contender, every = CONTENDERS[key["contender"]], key["every"]
    model = built(task, key["seed"])
    loop = contender.make(model.parameters(), key["setting"], task.steps(contender))
    losses: list[float] = []
    with tracker(task, model, loop.optimizer, key) as tracked:
        for epoch in epochs(task, contender, key["seed"]):
            losses += [loop.step(functools.partial(batch_loss, task, model, rows)) for rows in epoch]
    history = tracked.history
    columns = {kind: [history[name] for name in history if name.startswith(f"{kind}/")] for kind in KINDS}
    return {
        "gradients": [contender.gradients * step for step in history["step"]],
        "losses": [fmean(losses[i : i + every]) for i in range(0, len(losses), every)],
        "balance": [math.hypot(*row) for row in zip(*columns["balance"], strict=True)],
        "drift": [math.hypot(*row) for row in zip(*columns["drift"], strict=True)],
        "unexplained": [max(row) for row in zip(*columns["unexplained"], strict=True)],
        "sharpness": history["sharpness"],
        "metric": metric(task, model, task.test),
    }


def tracker(task: Task, model: nn.Module, optimizer: Optimizer, key: Key) -> Tracker:
    inputs, targets = (each[: key["sharpness_rows"]] for each in task.training)
    return Tracker(
        model,
        getattr(optimizer, "base_optimizer", optimizer),  # SAM's own step() is never called
        example_input=inputs[:1],
        objective=Objective(model, task.loss, (inputs, targets)),
        every=key["every"],
        sharpness_every=key["every"],
        sharpness_share=math.inf,
        log=lambda alarm: None,
    )


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    runs = data["runs"]

    def mean(name: str, contender: str, at: int = -1) -> float:
        return fmean(run[name][at] for run in runs if run["contender"] == contender)

    return {
        "plain": max(max(run["unexplained"]) for run in runs if run["contender"] in PLAIN),
        "sam": min(max(run["unexplained"]) for run in runs if run["contender"] == "sam"),
        "adam": mean("drift", "sgd") / mean("drift", "adam"),
        "balance": mean("balance", "ngd") / mean("balance", "ngd", 0),
        "flattest": mean("sharpness", "ngd") / min(mean("sharpness", other) for other in OTHERS),
        "sam_flatter": mean("sharpness", "sam") / mean("sharpness", "sgd"),
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    with panels(14, 4.6, columns=3) as (figure, (losses, balance, sharp)):
        for name in dict.fromkeys(run["contender"] for run in data["runs"]):
            runs = [run for run in data["runs"] if run["contender"] == name]
            test = fmean(run["metric"] for run in runs)
            curve(losses, name, runs, [run["losses"] for run in runs], f"{CONTENDERS[name].label}: {test:.3g}")
            curve(balance, name, runs, [[each / run["balance"][0] for each in run["balance"]] for run in runs])
            curve(sharp, name, runs, [run["sharpness"] for run in runs])
        for axes in (losses, balance, sharp):
            axes.set(xlabel="gradients of a batch", xlim=(0, None))
        for axes in (losses, sharp):
            logarithmic(axes)
        losses.set(ylabel=data["loss"], title="Training loss")
        figure.legend(title=f"{data['metric']}, at the end", loc="outside lower center", ncols=len(losses.lines))
        balance.set(ylabel="|C| over that at the start", title="Imbalance of the channels")
        sharp.set(ylabel="λ₁", title="Sharpness")
    return {"optimizers_mnist": figure}


def curve(axes: Axes, name: str, runs: list[dict[str, Any]], values: list[list[float]], label: str = "") -> None:
    """Draw the mean over the seeds and the band that they fill."""
    places, (color, _) = runs[0]["gradients"], LOOKS[name]
    dashes = "--" if name == "ngd-cooldown" else "-"  # it lies on ngd for three quarters of the way
    at_each = list(zip(*values, strict=True))
    axes.fill_between(places, [min(each) for each in at_each], [max(each) for each in at_each], color=color, alpha=0.15)
    axes.plot(places, [fmean(each) for each in at_each], dashes, color=color, label=label)
