"""λ₁ of every diagonal block of the Hessian, all blocks advancing together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Interval, Status
from torchflat.spectrum.krylov import MARGIN, Krylov
from torchflat.spectrum.run import FLOORS, Callback, Run, check_request

__all__ = ["Block", "BlockSharpness", "block_sharpness"]


@dataclass(frozen=True)
class Block(Interval):
    """λ₁ of H restricted to one block of parameters. ``share`` is the mass there of the top eigenvector of all of H."""

    name: str
    parameters: int
    status: Status
    gradient_norm: float
    share: float | None = None


@dataclass(frozen=True)
class BlockSharpness(Answer):
    """One row per block, in the model's order. All intervals hold together with probability ≥ ``confidence``."""

    rows: tuple[Block, ...]
    confidence: float
    status: Status
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)


def block_sharpness(
    f: Objective,
    rtol: float = 5e-2,
    confidence: float = 0.99,
    by: str = "module",
    seed: int = 0,
    budget: float = 400.0,
    *,
    top: Tensor | None = None,
    callback: Callback | None = None,
) -> BlockSharpness:
    """λ₁(H_bb) for the blocks b of parameters that share a module, or for every tensor (``by="tensor"``).

    Each pass over the data advances every block that is not done by one Lanczos step; a block's product differentiates
    only its own part of the gradient graph. The intervals rest on T090, with the probability of a miss split evenly.
    By interlacing λ₁(H_bb) ≤ λ₁(H). ``top`` (n,), a top eigenvector of H, fills in the shares.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> f = Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    >>> [row.name for row in block_sharpness(f).rows]
    ['0', '1']
    """
    check_request(rtol, confidence, budget)
    run = Run(f, rtol, None, confidence, budget, callback)
    blocks = _blocks(f, by)
    delta = run.delta / len(blocks)
    slices = list(f.layout.slices().values())
    gradient = f.gradient()
    work = {name: _Progress(f, name, indices, seed) for name, indices in blocks.items()}
    status: Status | None = None
    while status is None:
        active = [progress for progress in work.values() if progress.status is None]
        images = f.block_products({progress.indices: progress.vector for progress in active})
        for progress in active:
            progress.advance(images[progress.indices], run, delta)
        done = sum(progress.status is not None for progress in work.values())
        stop = callback is not None and callback(done / len(work))
        if done == len(work):
            status = Status.CONVERGED if all(p.status is Status.CONVERGED for p in work.values()) else Status.ROUNDING_LIMITED
        elif stop or not run.affordable():
            status = Status.BUDGET
    rows = []
    for name, indices in blocks.items():
        parts = torch.cat([gradient[slices[i]] for i in indices])
        share = None if top is None else float(sum(ops.dot([top[slices[i]]], [top[slices[i]]]) for i in indices))
        rows.append(work[name].row(run, delta, float(ops.norm([parts])), share))
    answer = BlockSharpness(tuple(rows), confidence, status, run.cost, f.provenance())
    run.warn(status, "block_sharpness")
    return answer


def _blocks(f: Objective, by: str) -> dict[str, tuple[int, ...]]:
    if by not in ("module", "tensor"):
        raise UsageError(f"by={by!r} is not 'module' or 'tensor'")
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(f.layout.names):
        blocks.setdefault(name.rpartition(".")[0] or name if by == "module" else name, []).append(index)
    return {name: tuple(indices) for name, indices in blocks.items()}


class _Progress:
    """The Lanczos process of one block."""

    def __init__(self, f: Objective, name: str, indices: tuple[int, ...], seed: int) -> None:
        self.f, self.name, self.indices = f, name, indices
        self.size = sum(f.layout.sizes[i] for i in indices)
        self.status: Status | None = None
        self.product_error: float | None = None
        self._image: Tensor | None = None
        self.krylov = Krylov(
            self._next_image, self.size, seed=seed, stream=f"block/{name}", dtype=f.dtype, device=f.device, memory=f.memory
        )

    @property
    def vector(self) -> Tensor:
        """What the block's Hessian is to be applied to next."""
        return self.krylov.latest

    def advance(self, image: Tensor, run: Run, delta: float) -> None:
        self._image = image
        self.krylov.step()
        if not self.krylov.worth_a_look():
            return
        if self._narrow(run, delta) and self.product_error is None:
            self.product_error = self._rounding()
        if self._narrow(run, delta):
            value, _, _, floor = self.bounds(delta)
            limited = run.rtol * max(abs(value), self.krylov.norm) < floor
            self.status = Status.ROUNDING_LIMITED if limited else Status.CONVERGED
        elif self.krylov.exhausted:
            self.status = Status.ROUNDING_LIMITED
        elif self.krylov.full:
            self.status = Status.BUDGET
        if self.status is not None:
            self.krylov.release()

    def bounds(self, delta: float) -> tuple[float, float, float, float]:
        """Value, lower, upper and floor."""
        value, upper = float(self.krylov.ritz()[0][-1]), self.krylov.upper(delta)
        floor = self.krylov.floor() + MARGIN * (self.product_error or 0.0)
        if self.krylov.exhausted:
            floor = max(floor, upper - value)
        return value, value - floor, upper + floor, floor

    def row(self, run: Run, delta: float, gradient_norm: float, share: float | None) -> Block:
        value, lower, upper, _ = self.bounds(delta)
        status = self.status or Status.BUDGET
        return Block(value, lower, upper, run.confidence, self.name, self.size, status, gradient_norm, share)

    def _narrow(self, run: Run, delta: float) -> bool:
        value, lower, upper, floor = self.bounds(delta)
        return upper - lower <= run.rtol * abs(value) + FLOORS * floor

    def _next_image(self, vector: Tensor) -> Tensor:
        assert self._image is not None
        return self._image

    def _rounding(self) -> float:
        """Rounding of this block's products at its Ritz vector, padded with zeros to all parameters."""
        top = self.krylov.vectors(self.krylov.ritz()[1][:, -1:])[0]
        padded = torch.zeros(self.f.n, dtype=self.f.dtype, device=self.f.device)
        slices = list(self.f.layout.slices().values())
        offset = 0
        for i in self.indices:
            padded[slices[i]] = top[offset : offset + self.f.layout.sizes[i]]
            offset += self.f.layout.sizes[i]
        return self.f.rounding_error(padded[None])
