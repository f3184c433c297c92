"""The denoiser of *Unique Properties of Flat Minima*: ReLU layers as wide as the image, trained on noisy MNIST (T072).

Bias-free linear layers of equal widths with ReLU between them and none after the last, white Gaussian noise of standard
deviation 1.25, squared error as the mean over images *and* pixels. The noise of an image is drawn once (:func:`noisy`),
or anew in each epoch (:func:`fresh`). Where a run has to be short, images are averaged down to ``side`` × ``side``
pixels, and the layers are as wide as that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchflat.audit.checkpoint import load_checkpoint
from torchflat.audit.checkpoint_write import write_checkpoint
from torchflat.data import denoising, mnist, relu_network

__all__ = ["BLIND", "LOSS", "NOISE", "SIDE", "Curve", "build", "fetch", "fresh", "keep", "mean_loss", "noisy", "train"]

SIDE, NOISE = 28, 1.25
LOSS = nn.MSELoss()
BLIND = 0.112  # the loss of a network that answers 0, all 784 pixels (T072)
# Not the seeds of the networks, which would make the noise of some images their first weights, number by number.
_NOISE_SEEDS = {"train": 1001, "test": 1002}
_FRESH_SEED, _ORDER_SEED = 2001, 1_000_003

Curve = list[dict[str, float]]
Data = tuple[Tensor, Tensor]


def build(layers: int, seed: int, init: str = "he", side: int = SIDE) -> nn.Sequential:
    """Return the network, with weights of :func:`torchflat.data.relu_network` that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return relu_network(layers, side**2, init=init)


@functools.lru_cache(maxsize=2)
def noisy(split: str, rows: int | None = None, side: int = SIDE) -> Data:
    """Return the first ``rows`` noisy images of a split, and the clean ones, (rows, side²) each.

    They are shared by all who ask: leave them as they are.
    """
    images = mnist(split, rows=rows)[0]
    if side != SIDE:
        images = nn.functional.adaptive_avg_pool2d(images.view(-1, 1, SIDE, SIDE), side).flatten(1)
    return denoising(images, NOISE, _NOISE_SEEDS[split])


def fresh(rows: int | None = None, side: int = SIDE) -> Callable[[int], Data]:
    """Return what gives the training rows of :func:`noisy` with new noise for every epoch."""
    clean = noisy("train", rows, side)[1]
    return lambda epoch: denoising(clean, NOISE, _FRESH_SEED + epoch)


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data | Callable[[int], Data],
    epochs: int,
    batch: int,
    seed: int,
    scratch: Path,
    progress: str = "training",
    look: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> Curve:
    """Train in place and return one row an epoch: ``loss``, the mean over its steps, and what ``look`` saw at its end.

    ``data`` is the rows, or gives those of each epoch; ``seed`` gives their order. The state is kept in ``scratch``
    after each epoch, and a run that was stopped goes on from there to the same end, bit for bit. It ends early where
    the loss is no longer finite, which its last row shows. ``optimizer.step`` is given a closure, as optimizers with
    several gradients a step need it.
    """
    of_epoch = data if callable(data) else lambda _: data
    file = scratch / "training.pt"
    curve: Curve = []
    if file.exists():
        state = torch.load(file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        curve = state["curve"]
    steps = math.ceil(len(of_epoch(0)[0]) / batch)
    bar = tqdm(total=epochs * steps, initial=len(curve) * steps, desc=progress, unit="step", leave=False, disable=None)
    with bar:
        while len(curve) < epochs and (not curve or math.isfinite(curve[-1]["loss"])):
            inputs, targets = of_epoch(len(curve))
            order = torch.Generator().manual_seed(_ORDER_SEED * (seed + 1) + len(curve))
            losses: list[float] = []
            for rows in torch.randperm(len(inputs), generator=order).split(batch):
                losses.append(_step(network, optimizer, inputs[rows], targets[rows]))
                bar.update()
                if not math.isfinite(losses[-1]):
                    break
            curve.append({"loss": math.fsum(losses) / len(losses), **(look(network) if look else {})})
            bar.set_postfix_str(f"loss {curve[-1]['loss']:.3g}")
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return curve


def mean_loss(network: nn.Module, data: Data, batch: int = 1000) -> float:
    """Return f, the mean over all rows."""
    inputs, targets = data
    with torch.no_grad():
        parts = zip(inputs.split(batch), targets.split(batch), strict=True)
        total = sum(float(LOSS(network(x), y)) * len(x) for x, y in parts)
    return total / len(inputs)


def keep(network: nn.Module, file: Path) -> None:
    """Write the weights as safetensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(file, network.state_dict())


def fetch(network: nn.Module, file: Path) -> nn.Module:
    """Load weights that :func:`keep` wrote, and return the network."""
    load_checkpoint(file, network).apply(network)
    return network


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = LOSS(network(inputs), targets)
        loss.backward()
        return loss

    loss: Tensor = optimizer.step(closure)
    return float(loss.detach())
