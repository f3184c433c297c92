"""Steps that fall as a power of their number, and to 0 at the end if wanted, as a scheduler for any optimizer."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["PowerDecayLR"]


class PowerDecayLR(LRScheduler):
    """Set the rate of step k to lr·(k + 1)^(−exponent), and let the last ``cooldown_steps`` steps fall to 0.

    This is the decay that :class:`NormalizedGD` has built in, where the rate of a group has its power law removed with
    ``decay=0``. The cool-down multiplies the rate by min(1, (total_steps − k)/cooldown_steps): steps that stay above
    the noise flatten, and their last swing across the valley, of length α_k, dies out in the cool-down, so that the
    loss converges too (T050: the iterates end up to α_K away from the valley, their projections on it at the flat set).

    Args:
        optimizer: any optimizer of torch; call :meth:`step` after each of its steps.
        exponent: q of the power law; at most 1/p for a p-d-Lyapunov function (T036), so ½ or ¼; 0 for none.
        cooldown_steps: number of steps at the end over which the rate falls linearly.
        total_steps: number of steps of the whole run, for the cool-down, after which the rate is 0.

    Raises:
        ValueError: an argument is out of range, or a group has a ``decay`` of its own that is not 0, which would
            multiply with this one.

    Source: T036, T050.

    >>> import torch
    >>> from torchflat.optim import NormalizedGD
    >>> optimizer = NormalizedGD([torch.zeros(1, requires_grad=True)], lr=1.0, decay=0)
    >>> scheduler = PowerDecayLR(optimizer, exponent=0.5, cooldown_steps=2, total_steps=5)
    >>> rates = []
    >>> for _ in range(6):
    ...     optimizer.step()
    ...     rates.append(round(scheduler.get_last_lr()[0], 3))
    ...     scheduler.step()
    >>> rates
    [1.0, 0.707, 0.577, 0.5, 0.224, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        exponent: float,
        cooldown_steps: int = 0,
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not exponent >= 0:
            raise ValueError(f"exponent must be 0 or more, got {exponent}")
        if cooldown_steps < 0:
            raise ValueError(f"cooldown_steps must be 0 or more, got {cooldown_steps}")
        if cooldown_steps and total_steps is None:
            raise ValueError(f"cooldown_steps={cooldown_steps} needs total_steps, the number of steps of the whole run")
        if total_steps is not None and total_steps < cooldown_steps:
            raise ValueError(f"total_steps must be at least cooldown_steps={cooldown_steps}, got {total_steps}")
        for index, group in enumerate(optimizer.param_groups):
            if group.get("decay", 0) != 0:
                raise ValueError(
                    f"parameter group {index} has decay={group['decay']}, which would multiply with this schedule: "
                    "make the optimizer with decay=0"
                )
        self.exponent, self.cooldown_steps, self.total_steps = exponent, cooldown_steps, total_steps
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group at the present step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, k: int) -> float:
        power: float = (k + 1) ** -self.exponent
        if self.total_steps is None or not self.cooldown_steps:
            return power
        return power * min(1.0, max(0.0, (self.total_steps - k) / self.cooldown_steps))
