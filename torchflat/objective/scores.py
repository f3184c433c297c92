"""How much each row of the data can curve the loss, from a few forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import TorchflatError
from torchflat.objective.batches import row_count
from torchflat.objective.evaluation import ModelTerm, first_line, out_of_memory

__all__ = ["NoScores", "RowCurvature"]

# Length of a random step, relative to |x|: long enough for second differences in float32, short enough to stay local.
STEP = 1e-2
# Probes: a row with few outputs has a Gauss–Newton matrix of low rank, on which single probes scatter most.
PROBES, PROBES_FOR_FEW, FEW_OUTPUTS = 2, 4, 8


class NoScores(TorchflatError):
    """The rows cannot be told apart at the output of the model; the message says why."""


class RowCurvature:
    """Estimates tr Gᵢ + ‖Rᵢ‖_F for each row i.

    The Hessian of a row's loss ℓ(z(x)) is Gᵢ + Rᵢ, with Gᵢ = Jᵢᵀ ∇²ℓ Jᵢ and Rᵢ = Σ ∂ℓ/∂z ∇²z. With Gaussian steps d, d'

        tr Gᵢ = E (Jᵢd)ᵀ∇²ℓ(Jᵢd),      ‖Rᵢ‖_F² = E (∇ℓ · ∇²z[d, d'])²,

    where Jᵢd and ∇²z[d, d'] are differences of the outputs. tr Gᵢ bounds the curvature of a row also where its loss and
    its gradient are zero. All rows meet the same steps.
    """

    def __init__(self, term: ModelTerm, parameters: Sequence[Tensor], seed: int) -> None:
        self._term, self._seed = term, seed
        self._here = [parameter.detach() for parameter in parameters]
        self._moved: list[list[Tensor]] = []
        size = math.hypot(*(float(torch.linalg.vector_norm(p, dtype=torch.float64)) for p in self._here))
        self._step = STEP * max(1.0, size) / math.sqrt(sum(p.numel() for p in self._here))

    @property
    def evaluations(self) -> int:
        """How often each row goes through the model, the two derivatives of its loss left out."""
        return 1 + len(self._moved)

    def __call__(self, batch: Any) -> Tensor:
        """Return one number for each row of the batch, (rows,) float64 on the CPU.

        Raises:
            NoScores: the output is no tensor with these rows, or the loss cannot be differentiated twice by it.
        """
        base, target = self._output(self._here, batch)
        rows = row_count(batch)
        if rows is None or base.ndim == 0 or base.shape[0] % rows:
            raise NoScores(f"the output of the model, {tuple(base.shape)}, does not have the rows of its input")
        if not self._moved:
            self._draw(PROBES if base.numel() >= FEW_OUTPUTS * rows else PROBES_FOR_FEW)
        *changes, both = [self._output(there, batch)[0] - base for there in self._moved]
        z = base.requires_grad_()
        slope = _derivative(self._term.call.loss(z, target) * rows, z)
        traces = [_by_row(change * _derivative((slope * change).sum(), z), rows).abs() for change in changes]
        rest = _by_row(slope.detach() * (both - changes[0] - changes[1]), rows).abs()
        return (torch.stack(traces).mean(dim=0) + rest).cpu() / self._step**2

    def _draw(self, probes: int) -> None:
        """Take x to x + dₖ for each probe, and to x + d₁ + d₂."""
        generator = torch.Generator().manual_seed(self._seed)

        def gaussian(like: Tensor) -> Tensor:
            return self._step * torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

        self._moved = [[p + gaussian(p) for p in self._here] for _ in range(probes)]
        first, second = self._moved[:2]
        self._moved.append([a + b - p for a, b, p in zip(first, second, self._here, strict=True)])

    def _output(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, Any]:
        with torch.no_grad():
            output, target = self._term.output(parameters, batch)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise NoScores(f"the output of the model is a {type(output).__name__}, not one real tensor")
        return output, target


def _derivative(value: Tensor, z: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(z)
    try:
        return torch.autograd.grad(value, z, create_graph=True)[0]
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise NoScores(f"the loss cannot be differentiated twice by the output: {first_line(error)}") from error


def _by_row(values: Tensor, rows: int) -> Tensor:
    return values.detach().reshape(rows, -1).sum(dim=1, dtype=torch.float64)
