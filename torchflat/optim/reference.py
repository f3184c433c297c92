"""The readable twin of :class:`torchflat.optim.NormalizedGD`: what a step is, one line for each thing it does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ReferenceNormalizedGD"]


class ReferenceNormalizedGD:
    """Take the steps of :class:`NormalizedGD` with ``norm="global"``, in plain loops. The tests step both side by side.

    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optimizer = ReferenceNormalizedGD([x], lr=2.5)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.tolist()
    [1.5, 2.0]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        decay: float = 0.25,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        self.params = list(params)
        self.lr, self.decay, self.momentum = lr, decay, momentum
        self.weight_decay, self.sign = weight_decay, 1 if maximize else -1
        self.sums = [torch.zeros_like(p) for p in self.params]
        self.k = 0

    @torch.no_grad()
    def step(self) -> None:
        """Set x ← (1 − α_k·weight_decay)·x − α_k·m/|m|, where m ← momentum·m + ∇f, α_k = lr·(k + 1)^(−decay)."""
        pairs = [(p, p.grad, m) for p, m in zip(self.params, self.sums, strict=True) if p.grad is not None]
        if not pairs or not all(grad.isfinite().all() for _, grad, _ in pairs):
            return
        for _, grad, m in pairs:
            m.mul_(self.momentum).add_(grad)
        norm = sum(float(m.abs().double().square().sum()) for _, _, m in pairs) ** 0.5
        alpha = self.lr * (self.k + 1) ** -self.decay
        for p, _, m in pairs:
            p.mul_(1 - alpha * self.weight_decay)
            if norm > 0:
                p.add_(m, alpha=self.sign * alpha / norm)
        self.k += 1
