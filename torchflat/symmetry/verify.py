"""Whether gradients agree with the laws: random backward passes in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from torchflat.errors import UsageError
from torchflat.objective.state import modules_kept, plain_autograd, random_states_kept
from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.linear import LinearLaw

__all__ = ["TOLERANCE", "gradients", "relative", "relative_sum"]

# In float64 what holds is below 1e-10 even behind a hundred layers; what holds only as ε → 0 is above 1e-8.
TOLERANCE = 1e-8
_PERTURBATION = 0.1

Passes = Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]


def gradients(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    mode: str,
    along: int | None = None,
    points: int = 3,
    seed: int = 0,
) -> Passes:
    """Yield (parameters, gradients) of ⟨random cotangent, output⟩ for random inputs, at the model and at points near.

    The first point is the model's own; at the others parameters and buffers are perturbed by about a tenth. Inputs are
    normal where they are floating, and drawn from the range of the example where they are integers. ``along`` is an axis
    of the output over which cotangents sum to zero, as the gradients of a loss do that shifts along it leave alone.
    """
    try:
        twin = copy.deepcopy(model).double()
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"the model cannot be copied to verify its laws in float64: {error}") from error
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    with random_states_kept(), modules_kept(twin, mode == "train"), _float64(), plain_autograd(torch.device("cpu")):
        torch.manual_seed(seed)
        for point in range(points):
            values = {name: _near(p.detach()) if point else p.detach().clone() for name, p in trained.items()}
            buffers = {name: _scaled(b) if point else b.clone() for name, b in twin.named_buffers()}
            parameters = {name: value.requires_grad_() for name, value in values.items()}
            drawn, named = pytree.tree_map(_random_like, (inputs, dict(keywords)))
            output = functional_call(twin, (parameters, buffers), drawn, named)
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not leaves:
                raise UsageError("the output does not depend on any parameter that requires grad")
            cotangents = [_centred(torch.randn_like(leaf), along) for leaf in leaves]
            found = torch.autograd.grad(leaves, list(parameters.values()), cotangents, materialize_grads=True)
            yield {k: v.detach() for k, v in parameters.items()}, dict(zip(parameters, found, strict=True))


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _near(value: Tensor) -> Tensor:
    size = value.square().mean().sqrt()
    return value + _PERTURBATION * torch.where(size > 0, size, 1.0) * torch.randn_like(value)


def _scaled(value: Tensor) -> Tensor:
    """Keep signs and infinities, because masks and running variances are buffers too; a zero mean may become any."""
    if not value.is_floating_point():
        return value.clone()
    return value * (_PERTURBATION * torch.randn_like(value)).exp() if bool(value.any()) else _near(value)


def _random_like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_complex() or value.is_floating_point():
        return torch.randn(value.shape, dtype=torch.complex128 if value.is_complex() else torch.float64)
    if value.dtype == torch.bool or value.numel() == 0:
        return value
    return torch.randint(int(value.min()), int(value.max()) + 1, value.shape, dtype=value.dtype)


def _centred(value: Tensor, along: int | None) -> Tensor:
    return value if along is None else value - value.mean(along, keepdim=True)


def relative(coupling: Coupling, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensor:
    """Return |θᵀAg| / Σ|θ||Ag| for each number of a coupling, in its shape; 0 where nothing depends on a channel."""
    sizes = Coupling(coupling.name, coupling.size, _weights_only(coupling.members), coupling.kind)
    scale = sizes.product(_absolute(coupling, parameters), _absolute(coupling, gradient))
    return torch.where(scale > 0, coupling.product(parameters, gradient).abs() / scale, 0.0)


def relative_sum(law: LinearLaw, gradient: Mapping[str, Tensor]) -> Tensor:
    """Return |aᵀg| / Σ|a||g| for each number of a linear law, (size,); 0 where nothing depends on it."""
    scale = LinearLaw(law.name, law.size, _weights_only(law.members)).value(_absolute(law, gradient))
    return torch.where(scale > 0, law.value(gradient).abs() / scale, 0.0)


def _weights_only(members: tuple[Member, ...]) -> tuple[Member, ...]:
    return tuple(Member(m.parameter, m.axis, m.index, m.channel, abs(m.exponent)) for m in members)


def _absolute(law: Coupling | LinearLaw, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {member.parameter: tensors[member.parameter].detach().abs() for member in law.members}
