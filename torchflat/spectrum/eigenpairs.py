"""Several eigenvalues at the ends of the spectrum, each with an interval, multiple ones included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Interval, Status
from torchflat.spectrum.krylov import MARGIN, Krylov
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
    rtol·max|λ| + atol wide.
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
    """The ``k`` largest, smallest, or largest eigenvalues in magnitude of ∇²f(x), with vectors and intervals.

    A first Krylov run finds Ritz pairs (Y, θ). A second one, from a fresh random start orthogonal to Y, bounds what is
    left, λ₁(PHP) ≤ μ (T090), and with R = HY − Yθ gives (T092, Courant–Fischer) for every i

        θᵢ ≤ λᵢ ≤ λ_max [[θᵢ, ‖R‖₂], [‖R‖₂, μ]].

    If the second run meets an eigenvalue that belongs to the list (a multiple one shows one copy per start), the two
    are merged and the rest is bounded anew.

    Raises:
        UsageError: an argument is out of range.

    >>> f = Objective.from_function(lambda x: x @ torch.diag(torch.tensor([2.0, 2.0, -1.0]).double()) @ x / 2,
    ...                             torch.zeros(3, dtype=torch.float64))
    >>> [round(value, 6) for value in eigenpairs(f, 2).values.tolist()]
    [2.0, 2.0]
    """
    check_request(rtol, confidence, budget)
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
    """The ``top`` largest (descending) and the ``bottom`` smallest (ascending) eigenpairs, from shared runs."""
    search = _Search(f, min(top, f.n), min(bottom, f.n), run, seed, krylov or Krylov.of(f, seed, "eigenpairs"))
    search.find()
    round_ = 0
    while search.status is None:
        round_ += 1
        search.bound_rest(round_)
    return search.answers()


class _Search:
    """Ritz pairs at both ends, the bounds on the rest, and how narrow the intervals are by now."""

    def __init__(self, f: Objective, top: int, bottom: int, run: Run, seed: int, krylov: Krylov) -> None:
        self.f, self.run, self.seed, self.krylov = f, run, seed, krylov
        self.wanted_top, self.wanted_bottom = top, bottom
        self.status: Status | None = None
        self.rest: tuple[float, float] | None = None
        self._coefficients: Tensor | None = None
        self.steps = 0
        self.above, self.below = math.inf, -math.inf
        self.residual_norm = 0.0
        self.floor = 0.0
        self.product_error = 0.0

    @property
    def tolerance(self) -> float:
        atol = 16 * self.floor if self.run.atol is None else self.run.atol
        return self.run.rtol * self.size + atol

    def find(self) -> None:
        """Run the first Krylov process until the wanted Ritz pairs have small residuals."""
        krylov, wanted = self.krylov, self.wanted_top + self.wanted_bottom
        before = krylov.steps
        while True:
            if not krylov.steps:
                krylov.step()
            if krylov.worth_a_look():
                self._look(krylov)
                small = self.residual_norm <= self.tolerance / 8
                if krylov.exhausted or (small and krylov.steps >= wanted) or not self._may_go_on(krylov):
                    break
            krylov.step()
        self.steps += krylov.steps - before
        # Of the first run, T090 bounds all eigenvalues at once; half of δ is for that.
        self.above = krylov.upper(self.run.delta / 2) + self.floor
        self.below = krylov.lower(self.run.delta / 2) - self.floor
        self.product_error = self.f.rounding_error(self.vectors[:1])
        self.floor += MARGIN * self.product_error
        krylov.release()

    def bound_rest(self, round_: int) -> None:
        """Bound the spectrum on the complement of the vectors found, or find what was missed there."""
        if self.vectors.shape[0] >= self.f.n:
            self.rest, self.status = (math.inf, -math.inf), self._settled(Status.CONVERGED)
            return
        krylov = Krylov.of(self.f, self.seed, f"eigenpairs/{round_}", deflated=self.vectors)
        delta = self.run.delta / 2 ** (round_ + 1)
        while True:
            krylov.step()
            self.steps += 1
            if not krylov.worth_a_look():
                continue
            self.floor = max(self.floor, krylov.floor() + MARGIN * self.product_error)
            self.rest = krylov.lower(delta) - self.floor, krylov.upper(delta) + self.floor
            if self.complete and self.widest() <= self.tolerance:
                self.status = self._settled(Status.CONVERGED)
            elif self._missed(krylov):
                self._merge(krylov)
            elif krylov.exhausted:
                self.status = Status.ROUNDING_LIMITED
            elif not self._may_go_on(krylov):
                self.status = Status.BUDGET
            else:
                continue
            krylov.release()
            return

    @property
    def complete(self) -> bool:
        """Whether as many pairs have been found as were asked for."""
        return len(self.values) == min(self.wanted_top + self.wanted_bottom, self.f.n)

    def widest(self) -> float:
        """Width of the widest interval."""
        return max(upper - lower for lower, upper in self._intervals())

    def answers(self) -> tuple[Eigenpairs, Eigenpairs]:
        pairs = [
            Eigenpair(float(value), lower, upper, self.run.confidence, float(residual))
            for value, (lower, upper), residual in zip(self.values, self._intervals(), self.residuals, strict=True)
        ]
        assert self.status is not None
        split = self.top
        return (
            self._answer(tuple(pairs[:split]), self.vectors[:split]),
            self._answer(tuple(pairs[split:]), self.vectors[split:]),
        )

    def _answer(self, pairs: tuple[Eigenpair, ...], vectors: Tensor) -> Eigenpairs:
        assert self.status is not None
        run, provenance = self.run, self.f.provenance()
        return Eigenpairs(pairs, vectors.T, run.confidence, self.status, self.floor, self.steps, run.cost, provenance)

    def _look(self, krylov: Krylov) -> None:
        values, coefficients = krylov.ritz()
        chosen = self._ends(len(values))
        self.values, self.residuals = values[chosen], krylov.residuals()[chosen]
        # R = βₖ v sᵀ has rank one, so its norm is that of the vector of residuals.
        self.residual_norm = math.hypot(*self.residuals.tolist())
        self.size, self.floor = krylov.norm, krylov.floor()
        self._coefficients = coefficients[:, chosen]

    @property
    def vectors(self) -> Tensor:
        """The vectors found, orthonormal rows."""
        if self._coefficients is not None:
            self._vectors = self.krylov.vectors(self._coefficients)
            self._coefficients = None
        return self._vectors

    def _ends(self, available: int) -> list[int]:
        """Indices into ascending values: the top ones descending, then the bottom ones ascending, none twice."""
        self.top = min(self.wanted_top, available)
        bottom = min(self.wanted_bottom, available - self.top)
        return [*range(available - 1, available - 1 - self.top, -1), *range(bottom)]

    def _intervals(self) -> list[tuple[float, float]]:
        intervals = []
        for i, value in enumerate(self.values.tolist()):
            if i < self.top:
                upper = self.above if self.rest is None else min(self.above, self._coupled(value, self.rest[1]))
                intervals.append((value - self.floor, max(upper, value) + self.floor))
            else:
                lower = self.below if self.rest is None else max(self.below, -self._coupled(-value, -self.rest[0]))
                intervals.append((min(lower, value) - self.floor, value + self.floor))
        return intervals

    def _coupled(self, value: float, rest: float) -> float:
        """Top eigenvalue of [[value, ‖R‖], [‖R‖, rest]] (T092)."""
        if not math.isfinite(rest):
            return value
        return 0.5 * (value + rest) + math.hypot(0.5 * (value - rest), self.residual_norm)

    def _missed(self, krylov: Krylov) -> bool:
        """Whether this run has settled on an eigenvalue that belongs between those found."""
        values, residuals = krylov.ritz()[0], krylov.residuals()
        above, below = self._belongs(values)
        ends = ([residuals[-1]] if above.any() else []) + ([residuals[0]] if below.any() else [])
        return bool(ends) and max(ends) <= self.tolerance / 8

    def _belongs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these values belong to the wanted top, and which to the wanted bottom."""
        if not self.complete:
            return torch.full_like(values, self.wanted_top > 0, dtype=torch.bool), torch.full_like(
                values, self.wanted_bottom > 0, dtype=torch.bool
            )
        above = values > self.values[self.top - 1] if self.top else torch.zeros_like(values, dtype=torch.bool)
        below = values < self.values[-1] if self.wanted_bottom else torch.zeros_like(values, dtype=torch.bool)
        return above, below

    def _merge(self, krylov: Krylov) -> None:
        """Rayleigh–Ritz on what both runs found, with products of its own."""
        values, coefficients = krylov.ritz()
        above, below = self._belongs(values)
        indices = torch.arange(len(values))
        chosen = sorted({*indices[above][-self.wanted_top :].tolist(), *indices[below][: self.wanted_bottom].tolist()})
        found = krylov.vectors(coefficients[:, chosen])
        basis = torch.linalg.qr(torch.cat([self.vectors, found]).double().T).Q.T.to(self.f.dtype)
        images = torch.cat([self.f.products(row[None]) for row in basis]).double()
        self.steps += len(basis)
        projected = (basis.double() @ images.T).cpu()
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        keep = self._ends(len(values))
        rotation = rotation[:, keep].T.to(self.f.device)
        self.values, self._vectors = values[keep], (rotation @ basis.double()).to(self.f.dtype)
        remainder = rotation @ images - self.values.to(self.f.device)[:, None] * self._vectors.double()
        # In units of the largest entry: squares of tiny or huge curvature would not be representable.
        unit = float(remainder.abs().max()) or 1.0
        self.residuals = unit * torch.linalg.vector_norm(remainder / unit, dim=1).cpu()
        self.residual_norm = unit * float(torch.linalg.matrix_norm(remainder / unit, 2))

    def _may_go_on(self, krylov: Krylov) -> bool:
        stop = self.run.callback is not None and self.run.callback(self)
        return self.run.affordable() and not krylov.full and not stop

    def _settled(self, status: Status) -> Status:
        return Status.ROUNDING_LIMITED if self.run.rtol * self.size < self.floor else status


def _by_magnitude(top: Eigenpairs, bottom: Eigenpairs, k: int) -> Eigenpairs:
    pairs = top.pairs + bottom.pairs
    order = sorted(range(len(pairs)), key=lambda i: -abs(pairs[i].value))[:k]
    vectors = torch.cat([top.vectors, bottom.vectors], dim=1)[:, order]
    chosen = tuple(pairs[i] for i in order)
    return Eigenpairs(chosen, vectors, top.confidence, top.status, top.floor, top.steps, top.cost, top.provenance)
