"""What the step to come does to each parameter: x_p ← x_p − a_p g_p, where the optimizer is one that does only that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from torchflat.optim.normalized_gd import NormalizedGD

__all__ = ["Moves", "stability_factor"]

OUTSIDE = -1


class Moves:
    """Reads the factors a_p of plain steps off an optimizer: a rate for SGD, a length over a norm for NormalizedGD.

    Args:
        optimizer: any; those of other classes, and momentum or weight decay, are refused with the reason.
        parameters: by name; those that the optimizer does not have come last, and are not moved.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self._optimizer = optimizer
        owner = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._group_of = [owner.get(id(p), OUTSIDE) for p in parameters.values()]
        self._device = next(iter(parameters.values())).device
        inside = [group for group in self._group_of if group != OUTSIDE]
        self._groups = torch.tensor(inside, dtype=torch.int64, device=self._device)
        self._names = list(parameters)

    @property
    def inside(self) -> int:
        """Number of parameters that the optimizer has."""
        return len(self._groups)

    def refusal(self) -> str | None:
        """Say why the steps are not plain ones; None if they are."""
        optimizer = self._optimizer
        if type(optimizer).step not in (SGD.step, NormalizedGD.step):
            return f"{type(optimizer).__name__} does not take plain steps against the gradient"
        for name, words in (("momentum", "momentum"), ("weight_decay", "weight decay")):
            if any(group[name] for group in optimizer.param_groups):
                return f"{words} was used"
        return None

    def refusal_of(self, members: Sequence[str]) -> str | None:
        """Say why these parameters do not all move by one common factor of their gradients; None if they do."""
        groups = {self._group_of[self._names.index(name)] for name in members}
        if OUTSIDE in groups:
            missing = next(name for name in members if self._group_of[self._names.index(name)] == OUTSIDE)
            return f"{missing} is not among the parameters of the optimizer"
        kinds = [self._optimizer.param_groups[group] for group in groups]
        norm = {kind.get("norm") for kind in kinds}
        if "tensor" in norm and len(set(members)) > 1:
            return 'norm="tensor" divides each of its parameters by another number'
        if "group" in norm and len(kinds) > 1:
            return 'norm="group" divides its parameters by different numbers'
        if len({(float(kind["lr"]), kind.get("decay", 0.0), kind["maximize"]) for kind in kinds}) > 1:
            return "its parameters are in groups with different learning rates"
        return None

    def setting(self) -> tuple[Any, ...]:
        """Return what refusals depend on, so that they need to be asked for only where it changes."""
        keys = ("lr", "decay", "norm", "momentum", "weight_decay", "maximize")
        settings = [tuple(group.get(key) for key in keys) for group in self._optimizer.param_groups]
        # One group moves all of its parameters alike, whatever its rate.
        return tuple(each[1:] for each in settings) if len(settings) == 1 else tuple(settings)

    @torch.no_grad()
    def factors(self, squares: Tensor) -> Tensor:
        """Return a_p of each parameter, (P,) float64, from the |g_p|², (P,): 0 for those that are not moved."""
        groups = self._optimizer.param_groups
        squares = squares[: self.inside]
        if type(self._optimizer).step == SGD.step:
            a = self._of_groups([float(group["lr"]) for group in groups])
        else:
            a = self._normalized(squares)
        found_inf = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None:
            a = torch.where(found_inf.to(self._device) > 0, 0.0, a)
        return torch.cat([a, a.new_zeros(len(self._group_of) - self.inside)])

    def _normalized(self, squares: Tensor) -> Tensor:
        """Return α_k/|g|, for the norm that each group asks for."""
        groups = self._optimizer.param_groups
        clock = self.clock()
        lengths = self._of_groups([float(group["lr"]) * (clock + 1) ** -group["decay"] for group in groups])
        of_group = torch.zeros(len(groups), dtype=torch.float64, device=self._device)
        of_group.index_add_(0, self._groups, squares)
        pooled = torch.tensor([group["norm"] == "global" for group in groups], device=self._device)
        total = torch.where(pooled, of_group, 0.0).sum()
        by = torch.where(pooled[self._groups], total, of_group[self._groups])
        if any(group["norm"] == "tensor" for group in groups):
            each = torch.tensor([group["norm"] == "tensor" for group in groups], device=self._device)
            by = torch.where(each[self._groups], squares, by)
        moves = (by > 0) & squares.sum().isfinite()
        return torch.where(moves, lengths / by.sqrt(), 0.0)

    def rate(self, factors: Tensor | None) -> float | None:
        """Return the largest η such that η·λ₁ < 2 is what stability asks for; None where no such rule is known."""
        if factors is not None:
            return float(factors.max())
        if type(self._optimizer).step == SGD.step:
            return max(float(group["lr"]) * stability_factor(group) for group in self._optimizer.param_groups)
        return None

    def clock(self) -> int:
        """Return k, the number of steps that a NormalizedGD has taken."""
        for state in self._optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        return 0

    def _of_groups(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self._device)[self._groups]


def stability_factor(group: Mapping[str, Any]) -> float:
    """Return s such that x ← x − a·(heavy ball) is stable on a quadratic while s·a·λ₁ < 2.

    With momentum μ and dampening τ that is (1 − τ)/(1 + μ), and (1 − τ)(1 + 2μ)/(1 + μ) with Nesterov's.

    >>> stability_factor({"momentum": 0.9}), stability_factor({})
    (0.5263157894736842, 1.0)
    """
    momentum = float(group.get("momentum", 0.0))
    if not momentum:
        return 1.0
    scale = (1 - float(group.get("dampening", 0.0))) / (1 + momentum)
    return scale * (1 + 2 * momentum) if group.get("nesterov") else scale
