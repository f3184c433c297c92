"""Several eigenvalues at the ends of the spectrum, each with an interval, multiple ones included."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Interval, Status
from torchflat.spectrum.krylov import MARGIN, Krylov, power_of_two
from torchflat.spectrum.run import Callback, Run, check_request

__all__ = ["Eigenpair", "Eigenpairs", "eigenpairs", "extremal"]


@dataclass(frozen=True)
class Eigenpair(Interval):
    """An eigenvalue with its interval; ``residual`` is ‖H v − value·v‖ for its unit vector."""

    residual: float


@dataclass(frozen=True)
class Eigenpairs(Answer):
    """Eigenvalues in the order asked for, and their unit vectors as the columns of ``vectors`` (n, k).

    All intervals hold together with probability at least ``confidence``. CONVERGED means that each is at most
    rtol·max|λ| + atol wide. A run that was stopped early may hold fewer pairs than were asked for.
    """

    pairs: tuple[Eigenpair, ...]
    vectors: Tensor = field(repr=False)
    confidence: float
    status: Status
    floor: float
    steps: int
    cost: Cost
    provenance: Mapping[str, Any]

    @property
    def values(self) -> Tensor:
        """The eigenvalues, (k,) float64."""
        return torch.tensor([pair.value for pair in self.pairs], dtype=torch.float64)


def eigenpairs(
    f: Objective,
    k: int,
    which: str = "largest",
    rtol: float = 1e-2,
    confidence: float = 0.99,
    seed: int = 0,
    budget: float = 400.0,
    *,
    atol: float | None = None,
    callback: Callback | None = None,
    krylov: Krylov | None = None,
) -> Eigenpairs:
    """Find the ``k`` largest, smallest, or largest eigenvalues in magnitude of ∇²f(x), with vectors and intervals.

    A first Krylov run finds Ritz pairs (Y, θ). A second one, from a fresh random start orthogonal to Y, bounds what is
    left, λ₁(PHP) ≤ μ (T090), and with R = HY − Yθ gives (T092, Courant–Fischer) for every i

        θᵢ ≤ λᵢ ≤ λ_max [[θᵢ, ‖R‖₂], [‖R‖₂, μ]].

    If the second run meets an eigenvalue that belongs to the list (a multiple one shows one copy per start), the two
    are merged and the rest is bounded anew. By magnitude, pairs are ranked by their values: where the two ends of the
    spectrum agree within their intervals, either may come first.

    Args:
        f: the objective, at its point.
        k: how many, at most n.
        which: ``"largest"``, ``"smallest"`` or ``"magnitude"``.
        rtol: how narrow each interval must be, relative to the largest |λ|.
        confidence: probability, over the random starts, that all intervals hold.
        seed: of the random starts.
        budget: in full-data gradients.
        atol: how narrow, absolutely; 16 times the measured rounding floor unless given.
        callback: called with the number of products taken; a true return value stops the run.
        krylov: a run (:meth:`Krylov.of`) to go on with; its basis is released once the vectors are out of it.

    Raises:
        UsageError: an argument is out of range.

    >>> f = Objective.from_function(lambda x: x @ torch.diag(torch.tensor([2.0, 2.0, -1.0]).double()) @ x / 2,
    ...                             torch.zeros(3, dtype=torch.float64))
    >>> [round(value, 6) for value in eigenpairs(f, 2).values.tolist()]
    [2.0, 2.0]
    """
    check_request(rtol, confidence, budget, atol)
    ends = {"largest": (k, 0), "smallest": (0, k), "magnitude": (k, k)}
    if which not in ends:
        raise UsageError(f"which={which!r} is not one of {', '.join(ends)}")
    if not 1 <= k <= f.n:
        raise UsageError(f"k={k}: there are {f.n} eigenvalues")
    run = Run(f, rtol, atol, confidence, budget, callback)
    top, bottom = extremal(f, *ends[which], run, seed, krylov)
    answer = top if which == "largest" else bottom if which == "smallest" else _by_magnitude(top, bottom, k)
    run.warn(answer.status, "eigenpairs")
    return answer


def extremal(
    f: Objective, top: int, bottom: int, run: Run, seed: int, krylov: Krylov | None = None
) -> tuple[Eigenpairs, Eigenpairs]:
    """Find the ``top`` largest (descending) and ``bottom`` smallest (ascending) eigenpairs, from shared runs.

    All intervals of both answers hold together. ``krylov`` is released on the way.
    """
    search = _Search(f, min(top, f.n), min(bottom, f.n), run, seed)
    with krylov or Krylov.of(f, seed, "eigenpairs") as first:
        status = search.find(first)
    rounds = itertools.count(1)
    while status is None:
        status = search.bound_rest(next(rounds))
    return search.answers(status)


@dataclass
class _Found:
    """Ritz pairs, the top ones descending and then the bottom ones ascending, and what was proved about the rest."""

    values: Tensor
    residuals: Tensor
    # ‖HY − Yθ‖₂ for all of them together.
    remainder: float
    top: int
    # Orthonormal rows; taken from the Krylov basis only when they are needed.
    vectors: Tensor
    # Bounds on the spectrum of H on the complement of the vectors.
    rest: tuple[float, float] = (-math.inf, math.inf)


class _Search:
    """Finds the pairs at both ends, bounds what is left, and knows how wide the intervals are by now."""

    def __init__(self, f: Objective, top: int, bottom: int, run: Run, seed: int) -> None:
        self.f, self.run, self.seed = f, run, seed
        self.wanted_top, self.wanted_bottom = top, bottom
        self.steps = 0
        self.size = self.floor = 0.0
        # What the first run proves about all eigenvalues.
        self.below, self.above = -math.inf, math.inf

    @property
    def wanted(self) -> int:
        """How many pairs were asked for, as far as there are so many."""
        return min(self.wanted_top + self.wanted_bottom, self.f.n)

    @property
    def delta(self) -> float:
        """Probability of a miss that is allowed for either end; half of it goes to the first run."""
        return self.run.delta / ((self.wanted_top > 0) + (self.wanted_bottom > 0))

    @property
    def tolerance(self) -> float:
        return self.run.tolerance(self.size, self.floor)

    def find(self, krylov: Krylov) -> Status | None:
        """Go on with the first run until the wanted pairs have settled; the status, if the search is over here."""
        before = krylov.steps
        while True:
            if krylov.steps and krylov.worth_a_look():
                self.size, self.floor = krylov.norm, krylov.floor()
                over = self.run.over(krylov.steps - before)
                settled = krylov.exhausted or self._has_settled(krylov)
                if over or settled or krylov.full:
                    break
            krylov.step()
        self.steps += krylov.steps - before
        values, coefficients = krylov.ritz()
        chosen, top = self._ends(krylov.steps)
        residuals = krylov.residuals()[chosen]
        vectors = krylov.vectors(coefficients[:, chosen])
        # R = βₖ v sᵀ has rank one, so its norm is that of the vector of residuals.
        self.found = _Found(values[chosen], residuals, math.hypot(*residuals.tolist()), top, vectors)
        self.product_error = self.f.rounding_error(vectors[[0, -1]])
        self.floor += MARGIN * self.product_error
        self.below = krylov.lower(self.delta / 2) - self.floor
        self.above = krylov.upper(self.delta / 2) + self.floor
        return self._narrow() or (Status.BUDGET if over or not settled else None)

    def bound_rest(self, round_: int) -> Status | None:
        """Bound the spectrum on the complement of the vectors found, or find there what was missed."""
        if len(self.found.values) == self.f.n:
            self.found.rest = math.inf, -math.inf
            return self._narrow() or Status.ROUNDING_LIMITED
        # The probabilities of a miss add up to the other half of δ.
        delta = self.delta / (2 * round_ * (round_ + 1))
        with Krylov.of(self.f, self.seed, f"eigenpairs/{round_}", deflated=self.found.vectors) as krylov:
            while True:
                krylov.step()
                self.steps += 1
                if not krylov.worth_a_look():
                    continue
                over = self.run.over(self.steps)
                self.floor = max(self.floor, krylov.floor() + MARGIN * self.product_error)
                self.found.rest = krylov.lower(delta) - self.floor, krylov.upper(delta) + self.floor
                status = self._narrow()
                if status is not None or over:
                    return status or Status.BUDGET
                missed = self._missed(krylov)
                if missed:
                    self._merge(krylov.vectors(krylov.ritz()[1][:, missed]))
                    return None
                if krylov.exhausted or krylov.full:
                    return Status.ROUNDING_LIMITED if krylov.exhausted else Status.BUDGET

    def answers(self, status: Status) -> tuple[Eigenpairs, Eigenpairs]:
        """Return the top and the bottom pairs."""
        found, confidence = self.found, self.run.confidence
        pairs = tuple(
            Eigenpair(value, lower, upper, confidence, residual)
            for value, (lower, upper), residual in zip(
                found.values.tolist(), self._intervals(), found.residuals.tolist(), strict=True
            )
        )
        cost, provenance = self.run.cost, self.f.provenance()
        first, last = (
            Eigenpairs(pairs[part], found.vectors[part].T, confidence, status, self.floor, self.steps, cost, provenance)
            for part in (slice(found.top), slice(found.top, None))
        )
        return first, last

    def _has_settled(self, krylov: Krylov) -> bool:
        if max(self.wanted_top, self.wanted_bottom) == 1:
            # One at an end needs no second run: T090 brackets it.
            values = krylov.ritz()[0]
            above = krylov.upper(self.delta / 2) - float(values[-1]) if self.wanted_top else 0.0
            below = float(values[0]) - krylov.lower(self.delta / 2) if self.wanted_bottom else 0.0
            return krylov.steps >= self.wanted and max(above, below) + 3 * self.floor <= self.tolerance
        chosen, _ = self._ends(krylov.steps)
        remainder = math.hypot(*krylov.residuals()[chosen].tolist())
        return krylov.steps >= self.wanted and remainder <= self.tolerance / 8

    def _ends(self, available: int) -> tuple[list[int], int]:
        """Index ascending values: the top ones descending, then the bottom ones ascending, none twice; and split."""
        top = min(self.wanted_top, available)
        bottom = min(self.wanted_bottom, available - top)
        return [*range(available - 1, available - 1 - top, -1), *range(bottom)], top

    def _narrow(self) -> Status | None:
        """Return the status of a search whose intervals are all there and narrow enough."""
        intervals = self._intervals()
        if len(intervals) < self.wanted or max(upper - lower for lower, upper in intervals) > self.tolerance:
            return None
        return self.run.settled(self.size, self.floor)

    def _intervals(self) -> list[tuple[float, float]]:
        found, floor = self.found, self.floor
        intervals = []
        for i, value in enumerate(found.values.tolist()):
            if i < found.top:
                upper = min(self.above, _coupled(value, found.remainder, found.rest[1]))
                intervals.append((value - floor, max(upper, value) + floor))
            else:
                lower = max(self.below, -_coupled(-value, found.remainder, -found.rest[0]))
                intervals.append((min(lower, value) - floor, value + floor))
        return intervals

    def _missed(self, krylov: Krylov) -> list[int]:
        """Index the Ritz values of this run that belong into the list, once they have settled; else nothing."""
        values, residuals = krylov.ritz()[0], krylov.residuals()
        complete = len(self.found.values) == self.wanted
        least = float(self.found.values[self.found.top - 1]) + self.floor if complete else -math.inf
        most = float(self.found.values[-1]) - self.floor if complete else math.inf
        above = [i for i in reversed(range(len(values))) if values[i] > least][: self.wanted_top]
        below = [i for i in range(len(values)) if values[i] < most][: self.wanted_bottom]
        missed = sorted({*above, *below})
        # Residuals add up by squares, and over several rounds.
        settled = float(residuals[missed].max()) <= self.tolerance / (8 * math.sqrt(self.wanted)) if missed else False
        return missed if settled or krylov.exhausted else []

    def _merge(self, missed: Tensor) -> None:
        """Rayleigh–Ritz on the vectors found and on those that were missed, with products of its own."""
        basis = torch.linalg.qr(torch.cat([self.found.vectors, missed]).double().T).Q.T.to(self.f.dtype)
        images = torch.cat([self.f.products(row[None]) for row in basis]).double()
        self.steps += len(basis)
        # In units of the largest entry: squares of tiny or huge curvature would not be representable.
        unit = power_of_two(float(images.abs().max()))
        images /= unit
        projected = (basis.double() @ images.T).cpu()
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        chosen, top = self._ends(len(values))
        values, rotation = values[chosen], rotation[:, chosen].T.to(self.f.device)
        vectors = (rotation @ basis.double()).to(self.f.dtype)
        remainder = rotation @ images - values.to(self.f.device)[:, None] * vectors.double()
        residuals = unit * torch.linalg.vector_norm(remainder, dim=1).cpu()
        self.found = _Found(
            unit * values, residuals, unit * float(torch.linalg.matrix_norm(remainder, 2)), top, vectors
        )


def _coupled(value: float, remainder: float, rest: float) -> float:
    """Return the top eigenvalue of [[value, remainder], [remainder, rest]] (T092)."""
    if rest == -math.inf:
        return value
    return 0.5 * (value + rest) + math.hypot(0.5 * (value - rest), remainder)


def _by_magnitude(top: Eigenpairs, bottom: Eigenpairs, k: int) -> Eigenpairs:
    pairs = top.pairs + bottom.pairs
    order = sorted(range(len(pairs)), key=lambda i: -abs(pairs[i].value))[:k]
    vectors = torch.cat([top.vectors, bottom.vectors], dim=1)[:, order]
    return dataclasses.replace(top, pairs=tuple(pairs[i] for i in order), vectors=vectors)
