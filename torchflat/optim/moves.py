"""What the step to come does to each parameter: x_p ← x_p − a_p g_p, where the optimizer is one that does only that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from torchflat.optim.normalized_gd import NormalizedGD

__all__ = ["Move", "Moves", "stability_factor"]

OUTSIDE = -1


@dataclass(frozen=True)
class Move:
    """What an optimizer is about to do: by group the rate of SGD, or the length of a NormalizedGD and its norm.

    ``scale`` is the factor of a GradScaler that the optimizer itself takes out, and ``skipped`` is positive where it
    will not move, both on the device.
    """

    rates: tuple[float, ...]
    norms: tuple[str | None, ...]
    scale: Tensor | None
    skipped: Tensor | None


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
        self._tracked = {id(p) for p in parameters.values() if id(p) in owner}

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
        if any(id(p) not in self._tracked for group in optimizer.param_groups for p in group["params"]):
            return "parameters were added to the optimizer, or replaced in it, after the tracker was made"
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
        groups = self._optimizer.param_groups
        settings = [
            (
                tuple(map(id, group["params"])),
                *(float(value) if isinstance(value := group.get(key), Tensor) else value for key in keys),
            )
            for group in groups
        ]
        # One group moves all of its parameters alike, whatever its rate.
        return (settings[0][0], *settings[0][2:]) if len(settings) == 1 else tuple(settings)

    def next(self) -> Move:
        """Return the plain step to come."""
        groups = self._optimizer.param_groups
        rates, norms = [float(group["lr"]) for group in groups], [group.get("norm") for group in groups]
        if type(self._optimizer).step == NormalizedGD.step:
            clock = self.clock()
            rates = [rate * (clock + 1) ** -group["decay"] for rate, group in zip(rates, groups, strict=True)]
        kept = [getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf")]
        scale, skipped = (
            each.to(self._device, torch.float64, copy=True).view(()) if each is not None else None for each in kept
        )
        return Move(tuple(rates), tuple(norms), scale, skipped)

    @torch.no_grad()
    def factors(self, moves: Sequence[Move], squares: Tensor) -> Tensor:
        """Return a_p of each parameter and step, (P, steps) float64, from |g_p|²: 0 for those that are not moved."""
        squares = squares[: self.inside]
        rates = torch.tensor([move.rates for move in moves], dtype=torch.float64, device=self._device).T
        a = rates.index_select(0, self._groups)
        norms = moves[0].norms
        if any(norms):
            a = self._normalized(a, squares, norms)
        for column, move in enumerate(moves):
            if move.skipped is not None:
                a[:, column] = torch.where(move.skipped > 0, 0.0, a[:, column])
        return torch.cat([a, a.new_zeros(len(self._group_of) - self.inside, len(moves))])

    def _normalized(self, lengths: Tensor, squares: Tensor, norms: Sequence[str | None]) -> Tensor:
        """Return α_k/|g|, for the norm that each group asks for."""
        of_group = lengths.new_zeros(len(norms), squares.shape[1]).index_add_(0, self._groups, squares)
        pooled = torch.tensor([[norm == "global"] for norm in norms], device=self._device)
        total = torch.where(pooled, of_group, 0.0).cumsum(0)[-1]
        by = torch.where(pooled, total, of_group).index_select(0, self._groups)
        each = torch.tensor([[norm == "tensor"] for norm in norms], device=self._device)
        by = torch.where(each.index_select(0, self._groups), squares, by)
        moves = (by > 0) & squares.sum(0).isfinite()
        return torch.where(moves, lengths / by.sqrt(), 0.0)

    def edge_rate(self) -> float | None:
        """Return η such that η·λ₁ < 2 is what stability asks for, for steps of SGD; None if no such rule is known."""
        if type(self._optimizer).step != SGD.step:
            return None
        return max(float(group["lr"]) * stability_factor(group) for group in self._optimizer.param_groups)

    def clock(self) -> int:
        """Return k, the number of steps that a NormalizedGD has taken."""
        for state in self._optimizer.state.values():
            if isinstance(state, dict) and "step" in state:
                return int(state["step"])
        return 0


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
