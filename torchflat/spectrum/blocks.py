"""λ₁ of every diagonal block of the Hessian, all blocks advancing together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Interval, Status
from torchflat.spectrum.krylov import Bounds, Krylov
from torchflat.spectrum.run import Callback, Run, check_request

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
    """Find λ₁(H_bb) for the blocks b of parameters that share a module, or for every tensor (``by="tensor"``).

    Each pass over the data advances every block that is not done by one Lanczos step; a block's product differentiates
    only its own part of the gradient graph. The intervals rest on T090, with the probability of a miss split evenly.
    By interlacing λ₁(H_bb) ≤ λ₁(H). A block that is zero to rounding, beside the largest one, is CONVERGED.
    ``top`` (n,), a top eigenvector of H, fills in the shares.

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
    with contextlib.ExitStack() as stack:
        work = [_Progress(f, name, indices, run, delta, seed, stack) for name, indices in blocks.items()]
        over = False
        while not over and (active := [progress for progress in work if progress.status is None]):
            images = f.block_products({progress.indices: progress.krylov.latest for progress in active})
            for progress in active:
                progress.advance(images[progress.indices])
            over = run.over(sum(progress.status is not None for progress in work) / len(work))
        for progress in work:
            progress.finish()
        largest = max(progress.krylov.norm for progress in work)
        for progress in work:
            progress.compare(largest)
    rows = []
    for progress in work:
        ranges = [slices[i] for i in progress.indices]
        norm = float(ops.norm([gradient[part] for part in ranges]))
        share = None if top is None else float(ops.dot([top[part] for part in ranges], [top[part] for part in ranges]))
        rows.append(progress.row(norm, share))
    statuses = {row.status for row in rows}
    status = next(s for s in (Status.BUDGET, Status.ROUNDING_LIMITED, Status.CONVERGED) if s in statuses)
    answer = BlockSharpness(tuple(rows), confidence, status, run.cost, f.provenance())
    run.warn(status, "block_sharpness")
    return answer


def _blocks(f: Objective, by: str) -> dict[str, tuple[int, ...]]:
    if by not in ("module", "tensor"):
        raise UsageError(f"by={by!r} is not 'module' or 'tensor'")
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(f.layout.names):
        if f.layout.sizes[index]:
            blocks.setdefault(name.rpartition(".")[0] or name if by == "module" else name, []).append(index)
    return {name: tuple(indices) for name, indices in blocks.items()}


class _Progress:
    """The Lanczos process of one block, which is handed its products from outside."""

    def __init__(
        self,
        f: Objective,
        name: str,
        indices: tuple[int, ...],
        run: Run,
        delta: float,
        seed: int,
        stack: contextlib.ExitStack,
    ) -> None:
        self.f, self.name, self.indices, self.run, self.delta = f, name, indices, run, delta
        self.size = sum(f.layout.sizes[i] for i in indices)
        self.status: Status | None = None
        self.product_error: float | None = None
        self._image = torch.empty(0)
        self.krylov = stack.enter_context(
            Krylov(
                lambda vector: self._image,
                self.size,
                seed=seed,
                stream=f"block/{name}",
                dtype=f.dtype,
                device=f.device,
                memory=f.memory,
            )
        )

    @property
    def bounds(self) -> Bounds:
        """The block's λ₁, as far as it is known."""
        return self.krylov.top(self.delta, self.product_error or 0.0)

    def advance(self, image: Tensor) -> None:
        """Take one step; ``image`` is the product with the latest vector."""
        self._image = image
        self.krylov.step()
        if self.krylov.worth_a_look() and self._ended() is not None:
            self._measure()
            self.status = self._ended()
            if self.status is not None:
                self.krylov.release()

    def finish(self) -> None:
        """Settle for what is known."""
        if self.status is None:
            self._measure()
            self.status = self.run.status(self.bounds, self.krylov.norm, over=True)

    def compare(self, largest: float) -> None:
        """Judge what rounding left open by the size of the largest block: beside it, this one may be zero."""
        if self.status is Status.ROUNDING_LIMITED and self.run.narrow_enough(self.bounds):
            self.status = self.run.settled(largest, self.bounds.floor)

    def row(self, gradient_norm: float, share: float | None) -> Block:
        """Return the line of the table."""
        assert self.status is not None
        value, lower, upper, _ = self.bounds
        return Block(value, lower, upper, self.run.confidence, self.name, self.size, self.status, gradient_norm, share)

    def _ended(self) -> Status | None:
        krylov = self.krylov
        return self.run.status(self.bounds, krylov.norm, exhausted=krylov.exhausted, over=krylov.full)

    def _measure(self) -> None:
        """Measure, once, how far this block's products are off at its Ritz vector, padded to all parameters."""
        if self.product_error is None:
            top = self.krylov.vectors(self.krylov.ritz()[1][:, -1:])[0]
            padded = torch.zeros(self.f.n, dtype=self.f.dtype, device=self.f.device)
            slices = list(self.f.layout.slices().values())
            parts = torch.split(top, [self.f.layout.sizes[i] for i in self.indices])
            for i, part in zip(self.indices, parts, strict=True):
                padded[slices[i]] = part
            self.product_error = self.f.rounding_error(padded[None])
