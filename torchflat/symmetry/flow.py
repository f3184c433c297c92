"""The flow ẋ = −∇c of c = ‖C(x)‖²/4, which stays in the orbit, and along which the loss gets flatter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Status
from torchflat.spectrum.run import NotConvergedWarning
from torchflat.spectrum.sharpness import Sharpness, sharpness
from torchflat.symmetry.coupling import Coupling
from torchflat.symmetry.group import Group, HasCouplings, couplings_of

__all__ = ["Flow", "flow"]

# A step may change the length by these factors.
SHRINK, GROW, SAFETY = 0.2, 4.0, 0.9
# Error of C by rounding, relative to |x|²: a flow that starts near C = 0 cannot be followed more accurately.
ROUNDING = 2.0**-48


@dataclass(frozen=True)
class Flow(Answer):
    """The point that the flow reaches, and how flat f is there.

    ``energies`` holds c = ‖C‖²/4 at ``times``: it falls. ``rates`` are d log λ₁/dt = 2⟨C(v), C(x)⟩ at both ends, v a
    unit top eigenvector: negative where the flow flattens (T014, T015), and where λ₁ is multiple, that of one vector.
    ``before`` and ``after`` are λ₁ at both ends.
    """

    x: Tensor = field(repr=False)
    times: tuple[float, ...]
    energies: tuple[float, ...]
    before: Sharpness
    after: Sharpness
    rates: tuple[float, float]
    status: Status
    cost: Cost


def flow(
    f: Objective,
    laws: HasCouplings | Sequence[Coupling],
    t: float,
    rtol: float = 1e-8,
    steps: int = 10_000,
    *,
    sharpness_rtol: float = 1e-3,
    seed: int = 0,
) -> Flow:
    """Follow ẋ = −∇c, c = ‖C(x)‖²/4, from f's point for the time ``t``.

    A diagonal coupling's slices move by −exponent·C_c·slice, a full one's runs by −exponent·C·M. So the
    flow moves along the orbit, and f stays put. (Slices of a parameter that counts from a buffer of f are those of the
    difference.) It is integrated on the group: each stage of a commutator-free Runge–Kutta method of order 4 acts by an
    element of it, so that f changes by rounding only, whatever the step. The step is halved and doubled to keep the
    error of C below ``rtol`` of its first size.

    Args:
        f: the objective, at its point.
        laws: the couplings, or what has them; coefficients of C are their exponents.
        t: how long, at least 0.
        rtol: of the integration.
        steps: at most; then the status is BUDGET.
        sharpness_rtol: of λ₁ at both ends.
        seed: of the random starts for that.

    Raises:
        UsageError: ``t`` is negative, or no coupling can be moved.

    >>> import torch
    >>> from torchflat.symmetry import Member
    >>> x = torch.tensor([3.0, 1 / 3], dtype=torch.float64)
    >>> f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, x)
    >>> zero = torch.zeros(1).long()
    >>> members = [Member("x", None, torch.tensor([[i]]), zero, (-1.0) ** i) for i in (0, 1)]
    >>> answer = flow(f, [Coupling("x₀ → x₁", 1, tuple(members), "diagonal")], 0.1, sharpness_rtol=1e-9)
    >>> round(float(answer.x[0]), 7), round(answer.before.value, 5), round(answer.after.value, 5)
    (1.8200892, 18.22222, 7.22918)
    """
    if not t >= 0:
        raise UsageError(f"t={t}: it must be a number >= 0")
    group = Group(couplings_of(laws), f.layout, f.buffers)
    if not group.couplings:
        raise UsageError(f"no coupling can be moved: {'; '.join(group.frozen.values()) or 'there is none'}")
    spent = f.cost
    before = sharpness(f, sharpness_rtol, seed=seed)
    offset, times, energies = _integrated(group, group.centred(f.x.double().cpu()), t, rtol, steps)
    moved = f.at(group.placed(offset).to(f.device, f.dtype))
    after = sharpness(moved, sharpness_rtol, seed=seed)
    status = Status.CONVERGED if times[-1] >= t else Status.BUDGET
    if not status.ok:
        warnings.warn(f"flow: {status.name}: {status.value}", NotConvergedWarning, stacklevel=2)
    rates = (_rate(group, f.x, before.vector), _rate(group, moved.x, after.vector))
    return Flow(moved.x, times, energies, before, after, rates, status, f.cost - spent)


def _rate(group: Group, x: Tensor, v: Tensor) -> float:
    return 2 * float(group.imbalance(v[None].double()) @ group.imbalance(group.centred(x.double())[None]))


def _integrated(
    group: Group, x: Tensor, t: float, rtol: float, steps: int
) -> tuple[Tensor, tuple[float, ...], tuple[float, ...]]:
    def energy(y: Tensor) -> float:
        C = group.imbalance(y[None])
        return 0.25 * float(C @ C)

    times, energies = [0.0], [energy(x)]
    size = float(group.imbalance(x[None]).norm())
    length = min(t, 0.1 / size) if size else t
    allowed = 15 * (rtol * size + ROUNDING * float(x @ x))
    for _ in range(steps):
        left = t - times[-1]
        if left <= 0 or size == 0:
            break
        length = min(length, left)
        half = _step(group, _step(group, x, length / 2), length / 2)
        whole = group.imbalance(_step(group, x, length)[None])
        error = float((group.imbalance(half[None]) - whole).norm()) / allowed
        if error <= 1:
            x = half
            times.append(t if length == left else times[-1] + length)
            energies.append(energy(x))
        length *= min(GROW, max(SHRINK, SAFETY * max(error, 1e-12) ** -0.2))
    if size == 0:
        times, energies = [0.0, t], energies * 2
    return x, tuple(times), tuple(energies)


def _step(group: Group, x: Tensor, h: float) -> Tensor:
    """Take one step of the commutator-free method of order 4 (Celledoni, Marthinsen and Owren 2003)."""

    def field(y: Tensor) -> Tensor:
        return -h * group.imbalance(y[None])

    def moved(y: Tensor, z: Tensor) -> Tensor:
        return group.act(y[None], z)[0]

    k1 = field(x)
    second = moved(x, k1 / 2)
    k2 = field(second)
    k3 = field(moved(x, k2 / 2))
    k4 = field(moved(second, k3 - k1 / 2))
    middle = moved(x, (3 * k1 + 2 * k2 + 2 * k3 - k4) / 12)
    return moved(middle, (-k1 + 2 * k2 + 2 * k3 + 3 * k4) / 12)
