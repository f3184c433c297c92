"""The optimizers that ``benchmarks.optimizers`` compares, each as a loop that takes one step at a time."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchflat.optim import NormalizedGD, PowerDecayLR

__all__ = ["CONTENDERS", "Contender", "Loop", "Setting", "installed"]

Setting = Mapping[str, Any]
COOL = 0.25  # share of the steps in which a cool-down takes the rate to 0


class OneGradient:
    """An optimizer, and a scheduler if there is one, as an ordinary training loop uses them."""

    def __init__(self, optimizer: Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Take one step; return the loss before it. Do not move if that is not finite."""
        self.optimizer.zero_grad()
        value = loss()
        if torch.isfinite(value):
            value.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        return value.item()


class TwoGradients:
    """SAM: the gradient at x makes a step up to x + ρ∇f/|∇f|, and the gradient there the step from x."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Take one step; return the loss before it. Do not move if that is not finite."""
        self.optimizer.zero_grad()
        value = loss()
        if torch.isfinite(value):
            value.backward()
            self.optimizer.first_step(zero_grad=True)
            loss().backward()
            self.optimizer.second_step()
        return value.item()


Loop = OneGradient | TwoGradients
Make = Callable[[Iterable[Tensor], Setting, int], Loop]


def sgd(parameters: Iterable[Tensor], setting: Setting, steps: int) -> Loop:
    return OneGradient(torch.optim.SGD(parameters, setting["lr"]))


def sgd_cooldown(parameters: Iterable[Tensor], setting: Setting, steps: int) -> Loop:
    return cooled(torch.optim.SGD(parameters, setting["lr"]), 0.0, steps)


def adam(parameters: Iterable[Tensor], setting: Setting, steps: int) -> Loop:
    return OneGradient(torch.optim.Adam(parameters, setting["lr"]))


def sam(parameters: Iterable[Tensor], setting: Setting, steps: int) -> Loop:
    from pytorch_optimizer import SAM

    return TwoGradients(SAM(parameters, torch.optim.SGD, rho=setting["rho"], lr=setting["lr"]))


def ngd(parameters: Iterable[Tensor], setting: Setting, steps: int) -> Loop:
    return OneGradient(NormalizedGD(parameters, setting["lr"]))


def ngd_cooldown(parameters: Iterable[Tensor], setting: Setting, steps: int) -> Loop:
    return cooled(NormalizedGD(parameters, setting["lr"], decay=0), 0.25, steps)


def cooled(optimizer: Optimizer, exponent: float, steps: int) -> Loop:
    return OneGradient(optimizer, PowerDecayLR(optimizer, exponent, max(1, round(COOL * steps)), steps))


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train. ``tuned_as`` names the contender whose best setting it takes, if it has no grid of its own."""

    label: str
    make: Make
    gradients: int = 1  # a step
    epochs: float = 1.0  # share of the epochs
    tuned_as: str | None = None


CONTENDERS = {
    "sgd": Contender("SGD", sgd),
    "adam": Contender("Adam", adam),
    "sam": Contender("SAM", sam, gradients=2),
    "ngd": Contender("NormalizedGD", ngd),
    "ngd-cooldown": Contender("NormalizedGD, cool-down", ngd_cooldown),
    "sgd-cooldown": Contender("SGD, cool-down", sgd_cooldown, tuned_as="sgd"),
    "sam-half": Contender("SAM, half the epochs", sam, gradients=2, epochs=0.5, tuned_as="sam"),
}


def installed(name: str) -> bool:
    """Whether the contender can run."""
    return CONTENDERS[name].make is not sam or importlib.util.find_spec("pytorch_optimizer") is not None
