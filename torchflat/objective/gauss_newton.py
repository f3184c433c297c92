"""The Gauss–Newton matrix JᵀH_ℓJ as the Hessian of a function of its own, so that whatever takes products works."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import LossError, UsageError
from torchflat.objective.evaluation import ModelTerm, Term, note

__all__ = ["GaussNewtonTerm"]


class GaussNewtonTerm:
    """ℓ(o₀) + ½ (o − o₀)ᵀH_ℓ(o − o₀) with o the output at the parameters, o₀ its value, H_ℓ = ∇²ℓ(o₀).

    There the value is that of the loss, the gradient is zero, and the Hessian is JᵀH_ℓJ with J = ∂o/∂parameters: what
    curves the network itself is multiplied by o − o₀ = 0.
    """

    def __init__(self, term: Term) -> None:
        if not isinstance(term, ModelTerm) or term.call.loss is None:
            raise UsageError(
                "the Gauss–Newton matrix needs a model and loss(output, target), and this objective is given as one "
                "function: use curvature='hessian'"
            )
        self.base = term
        self.dtype, self.device, self.notes = term.dtype, term.device, list(term.notes)
        self.constants: Mapping[str, Tensor] = term.constants
        self.verified = True
        note(self, "products are those of the Gauss–Newton matrix")

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """See :class:`Term`."""
        return self.base.buffers

    def session(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`Term`."""
        return self.base.session()

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]:
        """See :class:`Term`."""
        return self.base.quadratic(parameters, batch, _quadratic)

    def converted(self, dtype: torch.dtype) -> GaussNewtonTerm:
        """See :class:`Term`."""
        other = copy.copy(self)
        other.base, other.dtype, other.notes = self.base.converted(dtype), dtype, []
        other.constants = other.base.constants
        return other

    def without_fused_kernels(self) -> bool:
        """See :class:`Term`."""
        return self.base.without_fused_kernels()


def _quadratic(loss: Any, output: Any) -> tuple[Tensor, float]:
    """Return the quadratic model of ``loss(output) -> (sum, weight)`` about the output's value."""
    if not isinstance(output, Tensor):
        raise LossError(
            f"the Gauss–Newton matrix needs a model whose output is one tensor, not a {type(output).__name__}: "
            "use curvature='hessian'"
        )
    fixed = output.detach()
    if not torch.is_grad_enabled() or not output.requires_grad:
        total, weight = loss(fixed)
        return total.detach(), weight
    fixed.requires_grad_()
    total, weight = loss(fixed)
    (slope,) = torch.autograd.grad(total, fixed, create_graph=True, materialize_grads=True)
    change = output - fixed.detach()
    if not slope.requires_grad:
        # A loss that is linear in the output has no curvature: zero, and attached to the parameters.
        return total.detach() + 0 * (change * change).sum(), weight
    (bent,) = torch.autograd.grad(
        slope, fixed, grad_outputs=change, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return total.detach() + 0.5 * (change * bent).sum(), weight
