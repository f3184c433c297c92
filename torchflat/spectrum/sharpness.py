"""λ₁, the largest eigenvalue of ∇²f(x), between two bounds."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Cost, Interval, Status
from torchflat.spectrum.krylov import Bounds, Krylov
from torchflat.spectrum.multilevel import Multilevel, Unsuited
from torchflat.spectrum.power import PowerIteration
from torchflat.spectrum.run import Callback, Run, check_request

__all__ = ["METHODS", "Sharpness", "sharpness"]

METHODS = ("auto", "lanczos", "power", "multilevel")
CERTIFICATES = ("auto", "krylov")
# From here on subsamples and shards cost less than the products that they save; measured on trained networks.
MANY_ROWS, MANY_PARAMETERS, MANY_GRADIENTS = 16_000, 1000, 40
# Share of the probability of a miss for multilevel; the rest is for Lanczos where that is fallen back on.
MULTILEVEL_DELTA = 0.9
# The answer in progress that a callback sees has no vector: it would cost a pass over the Krylov basis.
NO_VECTOR = torch.empty(0)


@dataclass(frozen=True)
class Sharpness(Interval):
    """λ₁ with its interval: ``lower <= λ₁ <= upper`` with probability at least ``confidence``.

    ``lower`` is a Rayleigh quotient on all the data less ``floor``, the measured rounding allowance; it does not depend
    on chance. ``basis`` says what ``upper`` rests on:

    - ``krylov``: a Lanczos run on all the data; it holds over the random start (T090), whatever the Hessian is.
    - ``deflation``: the same for the part of the spectrum that is orthogonal to what was found (T092).
    - ``shards``: that part is bounded by random shards of the rows (T091); it holds over the random starts and the
      draw, if shards scatter like normal variables once rows of outlying curvature are in each.
    - ``none``: there is no upper bound.

    ``residual`` is ‖H v − value·v‖ for the unit ``vector``; a small one proves that an eigenvalue is near, not that it
    is the top one.
    ``steps`` counts products with all the data, and ``history`` has the interval after each look at the run.
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
    start: Sharpness | None = None,
    fresh: float = 1.0,
    certify: str = "auto",
    callback: Callback | None = None,
    krylov: Krylov | None = None,
) -> Sharpness:
    """Find λ₁ = max {vᵀ∇²f(x)v : |v| = 1}, with an interval.

    ``CONVERGED`` means lower ≤ value ≤ upper and upper − lower ≤ rtol·|value| + atol, at the confidence asked for.

    Args:
        f: the objective, at its point.
        rtol: how narrow, relative to the value.
        confidence: probability, over the random start, that ``upper`` holds.
        method: ``"lanczos"``; ``"multilevel"``, which needs far fewer passes over many rows
            (:class:`~torchflat.spectrum.multilevel.Multilevel`); ``"auto"``, one of these by the size of the problem;
            or ``"power"``, the slow textbook iteration, as a cross-check.
        seed: of the random start.
        budget: in full-data gradients; a product costs 2, or 3 where its graph cannot be kept in memory. At least one
            product is taken.
        atol: how narrow, absolutely; 16 times the measured rounding floor unless given.
        start: an earlier answer, at a point near by. The run starts at w + ``fresh``·g with its vector w and a new
            random g, and ``upper`` stays honest: T090's right-hand side is divided by the share of g.
        fresh: how much randomness is in the start. With 0, λ₁ is followed at a handful of products: the answer is
            TRACKED, and has no ``upper``. More than that does not make a bound cheaper than one from scratch.
        certify: ``"krylov"`` forbids bounds that rest on a sample of the rows.
        callback: called with the :class:`Sharpness` known so far after each step; a true return value stops the run.
        krylov: go on with this run (:meth:`Krylov.of`) instead of starting one, and leave it to its owner afterwards;
            for computations that share products.

    Raises:
        UsageError: an argument is out of range.

    Source: T090, T091 and T092 for the upper bound.

    >>> f = Objective.from_function(lambda x: 3 * x[0] ** 2 + x[1] ** 2, torch.zeros(2, dtype=torch.float64))
    >>> answer = sharpness(f)
    >>> round(answer.value, 9), answer.status.name
    (6.0, 'CONVERGED')
    """
    check_request(rtol, confidence, budget, atol)
    if method not in METHODS:
        raise UsageError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if certify not in CERTIFICATES:
        raise UsageError(f"certify={certify!r} is not one of {', '.join(CERTIFICATES)}")
    if (krylov is not None or start is not None) and method not in ("auto", "lanczos"):
        raise UsageError(f"krylov= and start= go with method='lanczos', not {method!r}")
    run = Run(f, rtol, atol, confidence, budget, callback)
    with contextlib.ExitStack() as stack:

        def lanczos(delta: float) -> _Lanczos:
            return _Lanczos(krylov or stack.enter_context(_begun(f, seed, start, fresh)), delta)

        process: Process
        if method == "power":
            process = PowerIteration(f, seed, run.delta)
        elif method == "multilevel" or (method == "auto" and not (krylov or start) and _large(f, run, certify)):
            process = Multilevel(f, run, seed, certify, MULTILEVEL_DELTA * run.delta)
        else:
            process = lanczos(run.delta)
        answer = _solve(f, run, process, lambda: lanczos((1 - MULTILEVEL_DELTA) * run.delta))
    run.warn(answer.status, "sharpness")
    return answer


def _begun(f: Objective, seed: int, start: Sharpness | None, fresh: float) -> Krylov:
    if start is None:
        return Krylov.of(f, seed, "sharpness")
    if not 0 <= fresh < math.inf:
        raise UsageError(f"fresh={fresh}: it must be a number >= 0")
    if start.vector.shape != (f.n,):
        raise UsageError(
            f"start= has a vector of shape {tuple(start.vector.shape)}, and x is ({f.n},): take an answer for the same "
            "parameters"
        )
    # The new random part must not be the one that the earlier answer came from.
    stream = f"sharpness/{hashlib.sha256(start.vector.cpu().numpy().tobytes()).hexdigest()}"
    return Krylov.of(f, seed, stream, start=start.vector.to(f.device, f.dtype), fresh=fresh)


def _large(f: Objective, run: Run, certify: str) -> bool:
    enough = f.rows >= MANY_ROWS and f.n >= MANY_PARAMETERS and run.budget >= MANY_GRADIENTS
    return enough and certify == "auto" and f.divisible


class Process(Protocol):
    """A way to λ₁, step by step."""

    @property
    def steps(self) -> int:
        """Products of all the data taken so far."""

    @property
    def full(self) -> bool:
        """Whether the memory budget has no room for another step."""

    @property
    def basis(self) -> str:
        """What the upper bound rests on."""

    @property
    def residual(self) -> float:
        """‖H v − θ v‖."""

    @property
    def vector(self) -> Tensor:
        """The unit vector that belongs to the value."""

    def advance(self) -> None:
        """Go on to where the bounds are worth a look."""

    def bounds(self, product_error: float) -> Bounds:
        """Bound λ₁ from both sides, products being off by ``product_error``."""

    def status(self, run: Run, bounds: Bounds, over: bool) -> Status | None:
        """Say how the run ends here, or None if it goes on."""


class _Lanczos:
    """The top of a Krylov run, step by step as far as a look at it is worth while."""

    def __init__(self, krylov: Krylov, delta: float) -> None:
        self._krylov, self._delta = krylov, delta
        self._unseen = krylov.steps > 0

    @property
    def steps(self) -> int:
        return self._krylov.steps

    @property
    def full(self) -> bool:
        return self._krylov.full

    @property
    def basis(self) -> str:
        return "krylov" if self._krylov.share else "none"

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

    def bounds(self, product_error: float) -> Bounds:
        return self._krylov.top(self._delta, product_error)

    def status(self, run: Run, bounds: Bounds, over: bool) -> Status | None:
        if self._krylov.share == 0 and self._krylov.settled(run.tolerance(abs(bounds.value), bounds.floor)):
            return Status.TRACKED
        return run.status(bounds, self._krylov.norm, exhausted=self._krylov.exhausted, over=over)


def _solve(f: Objective, run: Run, process: Process, instead: Callable[[], Process]) -> Sharpness:
    """Advance until the interval is narrow, or no further step is possible, affordable or wanted.

    ``instead`` makes the process to go on with where the first one does not suit.
    """
    history: list[Mapping[str, float]] = []
    product_error: float | None = None

    def answer(bounds: Bounds, status: Status, vector: Tensor) -> Sharpness:
        cost = run.cost
        known = {
            "products": process.steps,
            "gradients": cost.gradients,
            "value": bounds.value,
            "lower": bounds.lower,
            "upper": bounds.upper,
        }
        return Sharpness(
            value=bounds.value,
            lower=bounds.lower,
            upper=bounds.upper,
            confidence=run.confidence,
            status=status,
            basis=process.basis,
            vector=vector,
            residual=process.residual,
            floor=bounds.floor,
            steps=process.steps,
            cost=cost,
            provenance=f.provenance(),
            history=(*history, known),
        )

    while True:
        try:
            process.advance()
        except Unsuited as reason:
            f.note(f"sharpness fell back on Lanczos with all the data: {reason}")
            process = instead()
            continue
        bounds = process.bounds(product_error or 0.0)
        current = answer(bounds, Status.BUDGET, NO_VECTOR)
        over = run.over(current) or process.full
        status = process.status(run, bounds, over)
        if status is not None and product_error is None:
            # Once, where the run would end: it takes products in two precisions.
            product_error = f.rounding_error(process.vector[None])
            bounds = process.bounds(product_error)
            status = process.status(run, bounds, over)
        if status is not None:
            return answer(bounds, status, process.vector)
        history.append(current.history[-1])
