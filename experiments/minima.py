"""The minima of Figures 6 and 7 of *Unique Properties of Flat Minima*: denoisers trained by SGD and by Adam.

Each is trained once, with new noise in every epoch: Table S1's losses on training and on other images differ by 0.4 %
and 2 %, which noise drawn once does not give. Weights are kept as safetensors, named by optimizer and seed and by all
that they depend on, with the curve of the training beside them; so are those of the flattest point of the orbit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn, optim

from experiments.cells import write_json
from experiments.denoiser import LOSS, Curve, build, fetch, fresh, keep, mean_loss, noisy, train
from torchflat import Objective, symmetry

__all__ = ["OPTIMIZERS", "SGD_STEP", "Orbit", "Recipe", "flattest_of", "grid", "objective", "reached_at", "trained"]

SGD_STEP = 0.5
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=SGD_STEP),
    "adam": lambda parameters: optim.Adam(parameters, lr=3e-4, betas=(0.8, 0.99)),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the weights of a trained network depend on."""

    optimizer: Literal["sgd", "adam"]
    seed: int
    layers: int
    side: int
    rows: int
    epochs: int
    batch: int

    def file(self, folder: Path, what: str = "") -> Path:
        """Return where the weights are kept; ``what`` tells others of the same recipe."""
        text = json.dumps([dataclasses.asdict(self), what], sort_keys=True)
        return folder / f"{self.optimizer}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.safetensors"

    def network(self) -> nn.Sequential:
        """Return the network as it is at the start."""
        return build(self.layers, self.seed, side=self.side)


@dataclasses.dataclass(frozen=True)
class Orbit:
    """On what and how well the flattest point of an orbit is sought."""

    rows: int
    rtol: float
    budget: float
    curvature: str = "hessian"


def grid(seeds: Sequence[int], layers: int, side: int, rows: int, epochs: int, batch: int) -> list[Recipe]:
    """Return the recipes, seed by seed, so that what is cut from the end is seeds."""
    kinds: tuple[Literal["sgd", "adam"], ...] = ("sgd", "adam")
    return [Recipe(kind, seed, layers, side, rows, epochs, batch) for seed in seeds for kind in kinds]


def trained(recipe: Recipe, folder: Path, scratch: Path) -> tuple[nn.Sequential, Curve]:
    """Return the trained network and the curve of its training; train it if it is not in the folder.

    The curve has the loss on the test images too, ``test``, after each epoch.
    """
    network, file = recipe.network(), recipe.file(folder)
    if not file.exists():
        test = noisy("test", None, recipe.side)
        curve = train(
            network,
            OPTIMIZERS[recipe.optimizer](network.parameters()),
            fresh(recipe.rows, recipe.side),
            recipe.epochs,
            recipe.batch,
            recipe.seed,
            scratch,
            f"{recipe.optimizer} {recipe.seed}",
            lambda now: {"test": mean_loss(now, test)},
        )
        write_json(file.with_suffix(".json"), {"recipe": dataclasses.asdict(recipe), "curve": curve})
        keep(network, file)
    fetch(network, file)
    return network, json.loads(file.with_suffix(".json").read_text())["curve"]


def objective(network: nn.Module, recipe: Recipe, rows: int) -> Objective:
    """Return f at the network, over the first training images with noise that is drawn once."""
    inputs, targets = noisy("train", recipe.rows, recipe.side)
    return Objective(network.eval(), LOSS, (inputs[:rows], targets[:rows]), memory="4GiB")


def flattest_of(recipe: Recipe, orbit: Orbit, folder: Path, scratch: Path) -> tuple[nn.Sequential, dict[str, Any]]:
    """Return the flattest network of the trained one's orbit, and what is known of λ₁ at both, over ``orbit.rows``."""
    network, _ = trained(recipe, folder, scratch)
    file = recipe.file(folder, f"flattest {dataclasses.asdict(orbit)}")
    if not file.exists():
        f, example = objective(network, recipe, orbit.rows), noisy("train", recipe.rows, recipe.side)[0][:1]
        with warnings.catch_warnings():
            # The status says it.
            warnings.simplefilter("ignore", UserWarning)
            answer = symmetry.flattest(
                f, symmetry.laws(network, example), orbit.curvature, rtol=orbit.rtol, budget=orbit.budget
            )
        write_json(
            file.with_suffix(".json"),
            {
                "before": answer.history[0]["value"],
                "value": answer.value,
                "upper": answer.recomputed.upper,
                "lower": answer.lower,
                "status": answer.status.name,
                "negative": answer.negative,
                "log_scale": max(float(scales.abs().max()) for scales in answer.log_scales.values()),
                "gradients": answer.cost.gradients,
            },
        )
        network.load_state_dict(answer.state_dict)
        keep(network, file)
    return fetch(network, file), json.loads(file.with_suffix(".json").read_text())


def reached_at(losses: Sequence[float], level: float) -> float:
    """Return the epoch at which the loss would be at the level if it went on as in its last half, a power of the epoch.

    >>> round(reached_at([1 / (epoch + 1) for epoch in range(10)], 0.01))
    100
    """
    places = range(len(losses) // 2, len(losses))
    x = [math.log(place + 1) for place in places]
    y = [math.log(losses[place]) for place in places]
    centre, height = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - centre) ** 2 for a in x)
    slope = math.fsum((a - centre) * (b - height) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
    return math.exp(centre + (math.log(level) - height) / slope) if slope < 0 else math.inf
