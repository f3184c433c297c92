"""λ₁, the largest eigenvalue of ∇²f(x), between two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum.bounds import growth_upper_bound
from torchflat.spectrum.krylov import MARGIN, Krylov, random_unit_vector
from torchflat.spectrum.run import Callback, Run, check_request

__all__ = ["SOLVERS", "Sharpness", "sharpness"]


@dataclass(frozen=True)
class Sharpness(Interval):
    """λ₁ with its interval: ``lower <= λ₁ <= upper`` with probability at least ``confidence``.

    ``lower`` is a Rayleigh quotient on all the data less ``floor``, the measured rounding allowance; it does not depend on
    chance. ``upper`` holds over the random start, and ``basis`` says what it rests on (krylov, or none). ``residual`` is
    ‖H v − value·v‖ for the unit ``vector``; a small one proves that an eigenvalue is near, not that it is the top one.
    """

    status: Status
    basis: str
    vector: Tensor = field(repr=False)
    residual: float
    floor: float
    steps: int
    cost: Cost
    provenance: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...] = field(default=())

    @property
    def largest_stable_step(self) -> Interval:
        """2/λ₁: gradient descent with a longer step leaves the minimum. Infinite where λ₁ is not positive."""
        value, lower, upper = (2 / bound if bound > 0 else math.inf for bound in (self.value, self.upper, self.lower))
        return Interval(value, lower, upper, self.confidence)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "largest_stable_step": self.largest_stable_step.to_dict()}


def sharpness(
    f: Objective,
    rtol: float = 1e-2,
    confidence: float = 0.99,
    method: str = "auto",
    seed: int = 0,
    budget: float = 400.0,
    *,
    atol: float | None = None,
    callback: Callback | None = None,
    krylov: Krylov | None = None,
) -> Sharpness:
    """λ₁ = max {vᵀ∇²f(x)v : |v| = 1}, with an interval.

    ``CONVERGED`` means lower ≤ value ≤ upper and upper − lower ≤ rtol·|value| + atol, at the confidence asked for.

    Args:
        rtol, atol: how narrow; ``atol`` defaults to 16 times the measured rounding floor.
        confidence: probability, over the random start, that ``upper`` holds.
        method: ``"lanczos"`` (what ``"auto"`` takes) or ``"power"``, the slow textbook iteration, as a cross-check.
        seed: of the random start.
        budget: in full-data gradients; a product costs 2, or 3 where its graph cannot be kept in memory.
        callback: called with the :class:`Sharpness` known so far after each step; a true return value stops the run.
        krylov: go on with this run instead of starting one (``krylov_of``); for computations that share products.

    Raises:
        UsageError: an argument is out of range.

    Source: T090 for the upper bound.

    >>> f = Objective.from_function(lambda x: 3 * x[0] ** 2 + x[1] ** 2, torch.zeros(2, dtype=torch.float64))
    >>> answer = sharpness(f)
    >>> round(answer.value, 9), answer.status.name
    (6.0, 'CONVERGED')
    """
    check_request(rtol, confidence, budget)
    if method not in SOLVERS:
        raise UsageError(f"method={method!r} is not one of {', '.join(SOLVERS)}")
    if krylov is not None and method == "power":
        raise UsageError("krylov= goes with method='lanczos'")
    run = Run(f, rtol, atol, confidence, budget, callback)
    answer = SOLVERS[method](f, run, seed, krylov) if krylov is not None else SOLVERS[method](f, run, seed)
    run.warn(answer.status, "sharpness")
    return answer


def _lanczos(f: Objective, run: Run, seed: int, krylov: Krylov | None = None) -> Sharpness:
    krylov = krylov or Krylov.of(f, seed, "sharpness")
    history: list[Mapping[str, float]] = []
    product_error = 0.0
    measured = False

    def answer(status: Status, with_vector: bool) -> Sharpness:
        values, vectors = krylov.ritz()
        value, bound = float(values[-1]), krylov.upper(run.delta)
        floor = krylov.floor() + MARGIN * product_error
        if krylov.exhausted:
            # What the bound leaves open once the space is exhausted is rounding too.
            floor = max(floor, bound - value)
        vector = krylov.vectors(vectors[:, -1:])[0] if with_vector else torch.empty(0)
        return Sharpness(
            value, value - floor, bound + floor, run.confidence, status, "krylov", vector, float(krylov.residuals()[-1]),
            floor, krylov.steps, run.cost, f.provenance(), tuple(history),
        )  # fmt: skip

    while True:
        if not krylov.steps or not krylov.exhausted:
            krylov.step()
        if not krylov.worth_a_look():
            continue
        current = answer(Status.BUDGET, False)
        if run.narrow_enough(current) and not measured:
            top = krylov.vectors(krylov.ritz()[1][:, -1:])
            product_error = f.rounding_error(torch.cat([krylov.basis[:1], top]))
            measured = True
            current = answer(Status.BUDGET, False)
        history.append({"products": krylov.steps, "value": current.value, "lower": current.lower, "upper": current.upper})
        status = run.status(current, krylov.norm, exhausted=krylov.exhausted, full=krylov.full)
        if status is not None:
            return answer(status, True)


def _power(f: Objective, run: Run, seed: int) -> Sharpness:
    """Power iteration; if the dominant eigenvalue is negative, once more on H shifted by it."""
    shift, spent = 0.0, 0
    while True:
        answer = _power_on_shifted(f, run, seed, shift, spent)
        negative = answer.value + shift < 0 and shift == 0.0
        if answer.status in (Status.BUDGET, Status.INTERRUPTED) or not negative:
            return answer
        # The dominant eigenvalue is λ_min: H + |λ_min| I has λ₁ on top. A margin, because it is known roughly.
        shift, spent = 1.1 * abs(answer.value), answer.steps


def _power_on_shifted(f: Objective, run: Run, seed: int, shift: float, spent: int) -> Sharpness:
    vector = random_unit_vector(f.n, seed, "sharpness", f.dtype, f.device)
    log_growth, steps, history = 0.0, 0, []
    best = -math.inf
    while True:
        image = f.products(vector[None])[0].double() + shift * vector.double()
        steps += 1
        norm = float(ops.norm([image]))
        value = float(ops.dot([vector], [image]))
        residual = math.sqrt(max(0.0, norm * norm - value * value))
        floor = MARGIN * f.rounding_error(vector[None]) if steps == 1 else floor
        allowance = floor + 64 * torch.finfo(f.dtype).eps * norm
        log_growth += math.log(norm) if norm > 0 else -math.inf
        upper = growth_upper_bound(log_growth, steps, f.n, run.delta) if norm > 0 else 0.0
        best = max(best, value)
        basis = "krylov" if upper >= value else "none"
        current = Sharpness(
            value - shift, value - shift - allowance, max(upper, value) - shift + allowance, run.confidence, Status.BUDGET,
            basis, vector, residual, allowance, spent + steps, run.cost, f.provenance(), tuple(history),
        )  # fmt: skip
        history.append({"products": spent + steps, "value": current.value, "lower": current.lower, "upper": current.upper})
        status = run.status(current, norm, exhausted=norm == 0)
        if status is None and residual <= run.rtol * abs(value):
            status = Status.NOT_CERTIFIED
        if status is not None:
            return replace(current, status=status)
        vector = (image / norm).to(f.dtype)


SOLVERS: Mapping[str, Callable[..., Sharpness]] = {"auto": _lanczos, "lanczos": _lanczos, "power": _power}
