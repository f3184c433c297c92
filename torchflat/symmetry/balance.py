"""Balance: the network of least norm among those that compute the same function, where C = 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchflat.errors import NonFiniteError
from torchflat.parameters import Layout
from torchflat.result import Answer, Status
from torchflat.symmetry.coupling import Coupling
from torchflat.symmetry.group import Group, HasCouplings, couplings_of
from torchflat.symmetry.scaling import least_norm
from torchflat.symmetry.state import state_with

__all__ = ["Balanced", "balance"]

# Σ|C| that rounding leaves, in units of ε·|x|²; and log-scales that are allowed.
ULPS, MAX_LOG_SCALE = 256, 40.0


@dataclass(frozen=True, eq=False)
class Balanced(Answer, Mapping[str, Tensor]):
    """A state_dict whose parameters are balanced: use it as a mapping, or load it into the model.

    ``residual`` is Σ|C| over the channels that could be moved (eigenvalues of C for full couplings), divided by the sum
    of squares of the parameters in couplings, at the tensors that are returned. ``norm`` is the root of that sum, and
    ``norm_before`` what it was; a parameter that counts from a buffer is in it less that buffer. ``frozen`` names
    couplings and channels that were left as they are, and why.
    """

    state_dict: Mapping[str, Tensor] = field(repr=False)
    log_scales: Mapping[str, Tensor] = field(repr=False)
    residual: float
    norm: float
    norm_before: float
    status: Status
    frozen: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.state_dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict)


def balance(
    model: nn.Module, laws: HasCouplings | Sequence[Coupling], rtol: float | None = None, steps: int = 100
) -> Balanced:
    """Return the state_dict of least norm in the orbit, which computes the same and has C = 0; leave the model alone.

    min over g of |g·x|²: convex in the log-scales of diagonal couplings, and along geodesics in full ones, so that
    every start leads there (:func:`~torchflat.symmetry.scaling.least_norm`). For one full coupling it is where
    XᵀX = YYᵀ (T019). A bias that counts from a fixed mean μ enters x as b − μ. Balanced is not flattest: λ₁ may rise
    (T089).

    Args:
        model: any module.
        laws: its couplings, or what has them.
        rtol: Σ|C| to reach, relative to |x|²; by default what rounding in the parameters' precision leaves.
        steps: Newton steps and sweeps at most.

    Channels whose writers or readers are all zero have no least norm at a finite scale; they are frozen and listed.

    Raises:
        NonFiniteError: a parameter holds NaN or infinity.

    >>> from torchflat.symmetry import Member
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    >>> _ = model.load_state_dict({"0.weight": torch.tensor([[8.0]]), "1.weight": torch.tensor([[0.5]])})
    >>> one = torch.arange(1)
    >>> members = Member("0.weight", 0, one, one, 1.0), Member("1.weight", 1, one, one, -1.0)
    >>> answer = balance(model, [Coupling("0 → 1", 1, members, "diagonal")])
    >>> {name: round(float(tensor), 6) for name, tensor in answer.items()}
    {'0.weight': 2.0, '1.weight': 2.0}
    """
    couplings = couplings_of(laws)
    used = {member.parameter for coupling in couplings for member in coupling.members}
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in used}
    layout = Layout(tuple(parameters), tuple(p.shape for p in parameters.values()))
    group = Group(couplings, layout, dict(model.named_buffers()))
    x = torch.cat([p.reshape(-1).double().cpu() for p in parameters.values()] or [torch.empty(0).double()])
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("the parameters hold NaN or infinity: no rescaling balances them")
    offset = group.centred(x)
    group.freeze(offset[None], "the weight")
    eps = max((torch.finfo(p.dtype).eps for p in parameters.values()), default=0.0)
    target = ULPS * eps if rtol is None else rtol
    tolerance = min(target, 1e-12) / 4
    found = least_norm(group, offset[None], group.identity(), MAX_LOG_SCALE, tolerance, steps)
    moved = layout.split(group.move(x, found.z))
    cast = {name: part.to(p.dtype) for (name, p), part in zip(parameters.items(), moved, strict=True)}
    after = group.centred(torch.cat([part.reshape(-1).double().cpu() for part in cast.values()] or [x]))
    residual = _residual(group, after)
    return Balanced(
        state_dict=state_with(model, cast),
        log_scales=group.log_scales(found.z),
        residual=residual,
        norm=float(torch.linalg.vector_norm(after)),
        norm_before=float(torch.linalg.vector_norm(offset)),
        status=Status.CONVERGED if residual <= target else Status.BUDGET,
        frozen=dict(group.frozen),
    )


def _residual(group: Group, x: Tensor) -> float:
    return group.magnitude(group.imbalance(x[None])) / max(float(x @ x), torch.finfo(torch.float64).tiny)
