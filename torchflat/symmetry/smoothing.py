"""The least λ₁ of a model over the orbit, by smoothing: no products, only Gram matrices of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from torchflat.symmetry.lower_model import LowerModel, Smoothed

__all__ = ["minimised"]

# Powers grow from the first by this factor, a warm start begins so many factors below the last; iterations at each.
FIRST_POWER, GROWTH, WARM = 30.0, 4.0, 2
ITERATIONS = 40
# log λ₁ is found to 1/q by the smoothing: changes by this part of it are not worth another step.
ENOUGH = 1e-2


def minimised(model: LowerModel, start: Tensor, power: float, most: float, warm: bool = False) -> Tensor:
    """Return z with log-scales up to ``most`` that minimises the smoothed λ₁ of the model, q rising to ``power``."""
    z, q = start.clone(), min(power, max(FIRST_POWER, power / GROWTH**WARM if warm else 0.0))
    while True:
        z = _descended(functools.partial(_walled, model, power=q, most=most), z, ENOUGH / q)
        if q >= power:
            return model.group.clamped(z, most)
        q = min(q * GROWTH, power)


def _walled(model: LowerModel, z: Tensor, power: float, most: float) -> Smoothed:
    """Add half the square of the distance to the log-scales that are allowed."""
    inside = model.group.clamped(z, most)
    answer, beyond = model.smoothed(z, power), z - inside
    return Smoothed(answer.value + 0.5 * float(beyond @ beyond), answer.gradient + beyond, answer.top)


def _descended(function: Callable[[Tensor], Smoothed], start: Tensor, change: float) -> Tensor:
    z = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [z],
        max_iter=ITERATIONS,
        history_size=20,
        tolerance_grad=change,
        tolerance_change=change,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        answer = function(z.detach())
        z.grad = answer.gradient.clone()
        return answer.value

    solver.step(closure)
    return z.detach()
