"""λ₁, the largest eigenvalue of ∇²f(x), between two bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum.krylov import Bounds, Krylov
from torchflat.spectrum.power import PowerIteration
from torchflat.spectrum.run import Callback, Run, check_request

__all__ = ["METHODS", "Sharpness", "sharpness"]

METHODS = ("auto", "lanczos", "power")
# The answer in progress that a callback sees has no vector: it would cost a pass over the Krylov basis.
NO_VECTOR = torch.empty(0)


@dataclass(frozen=True)
class Sharpness(Interval):
    """λ₁ with its interval: ``lower <= λ₁ <= upper`` with probability at least ``confidence``.

    ``lower`` is a Rayleigh quotient on all the data less ``floor``, the measured rounding allowance; it does not depend
    on chance. ``upper`` holds over the random start, and ``basis`` says what it rests on (krylov). ``residual`` is
    ‖H v − value·v‖ for the unit ``vector``; a small one proves that an eigenvalue is near, not that it is the top one.
    ``steps`` counts products, and ``history`` has the interval after each look at the run.
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
        """Return the fields and the largest stable step as plain Python values."""
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
    """Find λ₁ = max {vᵀ∇²f(x)v : |v| = 1}, with an interval.

    ``CONVERGED`` means lower ≤ value ≤ upper and upper − lower ≤ rtol·|value| + atol, at the confidence asked for.

    Args:
        f: the objective, at its point.
        rtol: how narrow, relative to the value.
        confidence: probability, over the random start, that ``upper`` holds.
        method: ``"lanczos"`` (what ``"auto"`` takes) or ``"power"``, the slow textbook iteration, as a cross-check.
        seed: of the random start.
        budget: in full-data gradients; a product costs 2, or 3 where its graph cannot be kept in memory. At least one
            product is taken.
        atol: how narrow, absolutely; 16 times the measured rounding floor unless given.
        callback: called with the :class:`Sharpness` known so far after each step; a true return value stops the run.
        krylov: go on with this run (:meth:`Krylov.of`) instead of starting one, and leave it to its owner afterwards;
            for computations that share products.

    Raises:
        UsageError: an argument is out of range.

    Source: T090 for the upper bound.

    >>> f = Objective.from_function(lambda x: 3 * x[0] ** 2 + x[1] ** 2, torch.zeros(2, dtype=torch.float64))
    >>> answer = sharpness(f)
    >>> round(answer.value, 9), answer.status.name
    (6.0, 'CONVERGED')
    """
    check_request(rtol, confidence, budget, atol)
    if method not in METHODS:
        raise UsageError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if krylov is not None and method == "power":
        raise UsageError("krylov= goes with method='lanczos'")
    run = Run(f, rtol, atol, confidence, budget, callback)
    with contextlib.ExitStack() as stack:
        process: _Lanczos | PowerIteration
        if method == "power":
            process = PowerIteration(f, seed)
        else:
            process = _Lanczos(krylov or stack.enter_context(Krylov.of(f, seed, "sharpness")))
        answer = _solve(f, run, process)
    run.warn(answer.status, "sharpness")
    return answer


class _Lanczos:
    """The top of a Krylov run, step by step as far as a look at it is worth while."""

    def __init__(self, krylov: Krylov) -> None:
        self._krylov = krylov
        self._unseen = krylov.steps > 0

    @property
    def steps(self) -> int:
        return self._krylov.steps

    @property
    def full(self) -> bool:
        return self._krylov.full

    @property
    def residual(self) -> float:
        return float(self._krylov.residuals()[-1])

    @property
    def vector(self) -> Tensor:
        return self._krylov.vectors(self._krylov.ritz()[1][:, -1:])[0]

    def advance(self) -> None:
        looked, self._unseen = not self._unseen, False
        if looked:
            self._krylov.step()
            while not self._krylov.worth_a_look():
                self._krylov.step()

    def bounds(self, delta: float, product_error: float) -> Bounds:
        return self._krylov.top(delta, product_error)

    def status(self, run: Run, bounds: Bounds, over: bool) -> Status | None:
        return run.status(bounds, self._krylov.norm, exhausted=self._krylov.exhausted, over=over)


def _solve(f: Objective, run: Run, process: _Lanczos | PowerIteration) -> Sharpness:
    """Advance until the interval is narrow, or no further step is possible, affordable or wanted."""
    history: list[Mapping[str, float]] = []
    product_error: float | None = None

    def answer(bounds: Bounds, status: Status, vector: Tensor) -> Sharpness:
        known = {"products": process.steps, "value": bounds.value, "lower": bounds.lower, "upper": bounds.upper}
        return Sharpness(
            value=bounds.value,
            lower=bounds.lower,
            upper=bounds.upper,
            confidence=run.confidence,
            status=status,
            basis="krylov",
            vector=vector,
            residual=process.residual,
            floor=bounds.floor,
            steps=process.steps,
            cost=run.cost,
            provenance=f.provenance(),
            history=(*history, known),
        )

    while True:
        process.advance()
        bounds = process.bounds(run.delta, product_error or 0.0)
        current = answer(bounds, Status.BUDGET, NO_VECTOR)
        over = run.over(current) or process.full
        status = process.status(run, bounds, over)
        if status is not None and product_error is None:
            # Once, where the run would end: it takes products in two precisions.
            product_error = f.rounding_error(process.vector[None])
            bounds = process.bounds(run.delta, product_error)
            status = process.status(run, bounds, over)
        if status is not None:
            return answer(bounds, status, process.vector)
        history.append(current.history[-1])
