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

from torchflat.errors import LawsError
from torchflat.objective.state import modules_kept, plain_autograd, random_states_kept
from torchflat.symmetry.coupling import Coupling, Member
from torchflat.symmetry.linear import LinearLaw

__all__ = ["TOLERANCE", "gradients", "noise", "relative"]

# In float64 what holds is below 1e-10 even behind a hundred layers; what holds only as ε → 0 is above 1e-8.
TOLERANCE = 1e-8
_PERTURBATION = 0.1
_FLOOR = 1e-6
_NEXT_TO_ZERO = 1e-30

Passes = Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]


def gradients(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    mode: str,
    along: int | None = None,
    points: int = 3,
    seed: int = 0,
    limit: bool = False,
) -> Passes:
    """Yield (point, gradients) of ⟨random cotangent, output⟩ for random inputs, at the model and at points near.

    A point holds parameters and buffers by name. The first is the model's own; at the others they are perturbed by
    about a tenth. Inputs are
    normal where they are floating, and from the range of the example where they are integers. ``along`` is an axis of
    the output over which cotangents sum to zero, as the gradients of a loss do that shifts along it leave alone.
    ``limit`` takes the ε of all modules that have one next to zero.
    """
    try:
        twin = copy.deepcopy(model).double()
    except (RuntimeError, TypeError) as error:
        raise LawsError(f"the model cannot be copied to verify its laws in float64: {error}") from error
    for module in twin.modules():
        if limit and isinstance(getattr(module, "eps", None), float):
            setattr(module, "eps", _NEXT_TO_ZERO)  # noqa: B010
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    with random_states_kept(), _float64(), plain_autograd(torch.device("cpu")):
        torch.manual_seed(seed)
        for point in range(points):
            values = {name: _near(p.detach()) if point else p.detach().clone() for name, p in trained.items()}
            buffers = {name: _scaled(b) if point else b.clone() for name, b in twin.named_buffers()}
            parameters = {name: value.requires_grad_() for name, value in values.items()}
            drawn, named = pytree.tree_map(_random_like, (inputs, dict(keywords)))
            # Each call by itself, because functional_call forgets the ties of a module that is registered twice.
            with modules_kept(twin, mode == "train"):
                output = functional_call(twin, (parameters, buffers), drawn, named)
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not leaves:
                raise LawsError("the output does not depend on any parameter that requires grad")
            cotangents = [_centred(torch.randn_like(leaf), along) for leaf in leaves]
            found = torch.autograd.grad(leaves, list(parameters.values()), cotangents, materialize_grads=True)
            state = {k: v.detach() for k, v in parameters.items()} | buffers
            yield state, dict(zip(parameters, found, strict=True))


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


def noise(gradient: Mapping[str, Tensor]) -> float:
    """Return a size below which an entry of this gradient may be rounding: a law may say that some are zero.

    Such an entry is what is left of a sum, so that the tensor with the largest entries sets the size.
    """
    sizes = [float(g.detach().double().square().mean().sqrt()) for g in gradient.values() if g.numel()]
    return _FLOOR * max(sizes, default=0.0)


def relative(
    law: Coupling | LinearLaw, point: Mapping[str, Tensor], gradient: Mapping[str, Tensor], floor: float
) -> float:
    """Return the largest |θᵀAg| / Σ|θ||Ag| of a coupling, |aᵀg| / Σ|a||g| of a linear law; 0 where it moves nothing.

    θ are the parameters of the point, less their centres. ``floor`` is added to |g| below the line, as :func:`noise`
    gives it.
    """
    members = tuple(Member(m.parameter, m.axis, m.index, m.channel, abs(m.exponent)) for m in law.members)
    sizes = {m.parameter: gradient[m.parameter].detach().abs() + floor for m in members}
    if isinstance(law, LinearLaw):
        number, scale = law.value(gradient), LinearLaw(law.name, law.size, members).value(sizes)
    else:
        offset = law.centred(point)
        absolute = {m.parameter: offset[m.parameter].detach().abs() for m in members}
        number = law.product(offset, gradient)
        scale = Coupling(law.name, law.size, members, law.kind).product(absolute, sizes)
    return float(torch.where(scale > 0, number.abs() / scale, 0.0).max())
