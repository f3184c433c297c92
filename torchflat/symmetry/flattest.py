"""λ₁★, the least λ₁ over the rescaling orbit, with a bound from below and a certificate."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchflat.errors import LawsError, UsageError
from torchflat.objective import Objective
from torchflat.result import Answer, Cost, Status
from torchflat.spectrum.krylov import Krylov, random_unit_vector
from torchflat.spectrum.run import Callback, Run, check_request
from torchflat.spectrum.sharpness import Sharpness, sharpness
from torchflat.symmetry.certificate import Certificate, balanced_mixture
from torchflat.symmetry.coupling import Coupling
from torchflat.symmetry.group import Group, HasCouplings, couplings_of
from torchflat.symmetry.lower_model import LowerModel
from torchflat.symmetry.smoothing import minimised

__all__ = ["Flattest", "flattest"]

CURVATURES = ("hessian", "gauss_newton")
SPECTRA = ("largest", "norm")
# Products of a run at one point of the orbit, and the share of a random vector in its start.
STEPS, FRESH = 14, 0.1
# A Lanczos run at a point ends where its residual is this share of the tolerance.
SETTLED = 1 / 5
# Shares of the tolerance: for the model to agree with H at its own minimum, and for the last recomputation.
AGREEMENT, RECOMPUTATION = 1 / 4, 1 / 4
# What a fresh run at the model's minimiser finds beyond the model, as a share of the tolerance, makes the search go on.
WRONG = 1 / 2
# The smoothing's power is this over rtol.
SHARPNESS_OF_SMOOTHING = 8.0
# Gradients kept back for the last recomputation, as a share of the budget and at most.
RESERVE = 0.25, 80.0
# The model keeps what is not smaller than this by its largest eigenvalue, in this share of the memory budget.
FAINT, MEMORY_SHARE, MOST_ROWS, LEAST_ROWS = 1e-2, 1 / 4, 96, 12
# What rounding may change f by at another point of the orbit, in units of ε·(|f| + ½λ₁|x|²).
UNCHANGED_ULPS = 4096
# Eigenvectors that the certificate may mix.
CLUSTER = 12
# Eigenvalues of H below zero by less than so many floors are rounding; steps it may take to see that there are none.
ROUNDING, PROOF_STEPS = 4, 60


@dataclass(frozen=True)
class Flattest(Answer):
    """The flattest network found that computes the same function, and what is known of λ₁★.

    ``value`` is λ₁ (or ‖·‖₂), recomputed at the parameters of ``state_dict``, ``recomputed`` its interval there. So
    λ₁★ ≤ recomputed.upper. ``lower`` ≤ λ₁★ bounds λ₁ over all log-scales up to ``max_log_scale`` of what is not frozen;
    None where nothing is proved. ``proof`` names what the bound rests on: that the matrix is positive semidefinite,
    because it is that of Gauss and Newton, of a loss convex in the output (``"gauss_newton"``), or because a Lanczos
    run showed so at the first point (``"semidefinite"``, at the confidence of ``before``).

    ``log_scales`` holds, by coupling, what the point asked for was rescaled by; for a full coupling a symmetric S.
    ``state_dict`` holds the parameters of the objective: load it with ``strict=False``. ``attained`` says whether all
    log-scales are inside the box, so that the least is at a finite point. ``frozen`` gives couplings and channels that
    were left as they are, and why. ``headroom`` is λ₁ of the first point over ``value``, ``negative`` λ_min/λ₁ at the
    point returned, as far as it was seen.

    CONVERGED: recomputed.upper − lower ≤ rtol·value. UNCERTIFIED: the model agrees with H at its own minimum to within
    rtol, but H is not known to be positive semidefinite, and ``lower`` is None.
    """

    value: float
    lower: float | None
    attained: bool
    status: Status
    proof: str | None
    headroom: float
    negative: float
    recomputed: Sharpness
    before: Sharpness
    certificate: Certificate
    log_scales: Mapping[str, Tensor] = field(repr=False)
    state_dict: Mapping[str, Tensor] = field(repr=False)
    frozen: Mapping[str, str]
    max_log_scale: float
    cost: Cost
    history: tuple[Mapping[str, float], ...] = field(default=())

    @property
    def gap(self) -> float:
        """(recomputed.upper − lower)/value; infinite without a lower bound."""
        return math.inf if self.lower is None else (self.recomputed.upper - self.lower) / self.value


def flattest(
    f: Objective,
    laws: HasCouplings | Sequence[Coupling],
    curvature: str = "hessian",
    spectral: str = "largest",
    rtol: float = 1e-2,
    *,
    max_log_scale: float = 8.0,
    confidence: float = 0.99,
    budget: float = 400.0,
    seed: int = 0,
    callback: Callback | None = None,
) -> Flattest:
    """Find the rescaling g that makes λ₁ of H(g·x) = g⁻¹H(x)g⁻¹ least.

    Biases that count from a buffer of f move about it (:meth:`Group.move`); buffers stay, and H moves the same.

    All products come from the one point x (T084). A Lanczos run gives exact products of a whole basis, and these a
    matrix of low rank below H all over the orbit (T093, :class:`LowerModel`). Its λ₁ is minimised without products, by
    quasi-Newton steps on Schatten norms of rising power; a run at its minimiser, started from its top eigenvectors,
    shows what it lacks. When both agree, λ₁ is computed anew by :func:`torchflat.sharpness` at the parameters that are
    returned. If H ⪰ 0, log λ₁ is convex along the orbit (T086), the model's least is below λ₁★, and weak duality makes
    that a bound (:meth:`LowerModel.bound`).

    Args:
        f: the objective, at its point; without weight decay, which rescaling changes.
        laws: the couplings, or what has them.
        curvature: ``"hessian"``, or ``"gauss_newton"`` for the Gauss–Newton matrix, which is positive semidefinite.
        spectral: ``"largest"`` eigenvalue, or ``"norm"``, the largest in size.
        rtol: how near to λ₁★ the value must be, relative to it.
        max_log_scale: bound on log-scales, or on the eigenvalues of S.
        confidence: of the intervals at the first and at the last point.
        budget: in full-data gradients; a product costs 2 or 3.
        seed: of the random starts.
        callback: called after each run with what is known, a dict as in ``history``; a true return value ends the
            search.

    Raises:
        UsageError: an argument is out of range, or a coupling does not fit the parameters.
        LawsError: f has an L2 term, or rescaling by a coupling changes f.

    >>> from torchflat.symmetry import Coupling, Member
    >>> f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, torch.tensor([3.0, 1 / 3], dtype=torch.float64))
    >>> entry = [torch.tensor([[i]]) for i in (0, 1)]
    >>> members = Member("x", None, entry[0], torch.zeros(1).long(), 1.0), Member(
    ...     "x", None, entry[1], torch.zeros(1).long(), -1.0)
    >>> answer = flattest(f, [Coupling("x₀ → x₁", 1, members, "diagonal")])
    >>> round(answer.value, 4), round(answer.headroom, 4), answer.status.name, answer.proof
    (4.0, 4.5556, 'CONVERGED', 'semidefinite')
    """
    check_request(rtol, confidence, budget)
    if rtol <= 0:
        raise UsageError(f"rtol={rtol}: it must be a positive number")
    if curvature not in CURVATURES or spectral not in SPECTRA:
        raise UsageError(
            f"curvature={curvature!r}, spectral={spectral!r}: take one of {', '.join(CURVATURES)} and one of "
            f"{', '.join(SPECTRA)}"
        )
    if not 0 < max_log_scale <= 40:
        raise UsageError(f"max_log_scale={max_log_scale}: it must lie between 0 and 40")
    if f.weight_decay:
        raise LawsError(
            f"f has weight_decay={f.weight_decay}, and rescaling changes the L2 term: take an objective without it"
        )
    h = f.gauss_newton() if curvature == "gauss_newton" else f
    search = _Search(h, Group(couplings_of(laws), f.layout, f.buffers), curvature, spectral, max_log_scale, seed)
    run = Run(f, rtol, None, confidence, budget, callback)
    answer = search.solve(run)
    if answer.status is not Status.UNCERTIFIED:
        run.warn(answer.status, "flattest")
    return answer


class _Search:
    """Model and point, round by round."""

    def __init__(
        self, h: Objective, group: Group, curvature: str, spectral: str, max_log_scale: float, seed: int
    ) -> None:
        self.h, self.group, self.curvature, self.most, self.seed = h, group, curvature, max_log_scale, seed
        self.norm = spectral == "norm"
        # The point to be returned, and the model's minimiser, which bounds λ₁★.
        self.z = self.least = group.identity()
        self.proof: str | None = None
        self.history: list[Mapping[str, float]] = []
        self.products = 0
        self.ends = 0.0, 0.0
        self.rows = int(MEMORY_SHARE * h.memory.total) // (h.n * h.dtype.itemsize)
        self.rows = min(MOST_ROWS, max(LEAST_ROWS, self.rows))

    def solve(self, run: Run) -> Flattest:
        self.power = SHARPNESS_OF_SMOOTHING / run.rtol
        before = self._first(run)
        self.trivial = not (len(self.model.rows) and before.value > 0 and bool(self.group.free.any()))
        settled = self.over = self.trivial
        with self.h.memory.vectors_held(2 * self.rows * self.h.n * self.h.dtype.itemsize):
            recomputed = None if before.value > 0 else before
            while recomputed is None:
                settled = self.trivial or self._settle(run)
                recomputed = self._recomputed(run)
            return self._answer(run, before, recomputed, settled)

    def _settle(self, run: Run) -> bool:
        """Go to the model's minimiser and show the model what it lacks there, until they agree or all is spent."""
        settled, best = False, (math.inf, self.z)
        while not (settled or self.over):
            self.z = minimised(self.model, self.z, self.power, self.most, warm=len(self.history) > 1)
            predicted = self._size(self.model.eigenpairs(self.z)[0])
            found = self._round(run)
            best = min(best, (found, self.z), key=operator.itemgetter(0))
            settled = abs(found - predicted) <= AGREEMENT * run.rtol * found
            self.over = self._over(run)
        if self.proof:
            # What the last run showed costs no product to take into account.
            self.least = minimised(self.model, self.z, self.power, self.most, warm=True)
        self.z = self.least if self.proof and settled else best[1]
        return settled

    def _first(self, run: Run) -> Sharpness:
        """Find λ₁ of the point itself, and begin the model with that run."""
        with Krylov.of(self.h, self.seed, "flattest") as krylov:
            before = sharpness(self.h, 0.1, run.confidence, "lanczos", krylov=krylov, budget=max(run.budget / 4, 1.0))
            if self.curvature == "gauss_newton":
                # Of a loss that is not convex in the output it would not be semidefinite.
                seen = float(krylov.ritz()[0][0])
                self.proof = "gauss_newton" if seen >= -ROUNDING * before.floor else None
            elif self._semidefinite(krylov, run.delta):
                self.proof = "semidefinite"
            definite = self.proof is not None
            self.model = LowerModel(self.group, self.h.dtype, self.h.device, definite, self.norm)
            self._take_up(krylov, run)
        # In the products of a run, zeros come with its rounding.
        probe = random_unit_vector(self.h.n, self.seed, "flattest/probe", self.h.dtype, self.h.device)
        self.group.freeze(self.group.centred(self.h.x)[None], "the weight")
        self.group.freeze(self.h.products(probe[None]), "the curvature")
        return before

    def _semidefinite(self, krylov: Krylov, delta: float) -> bool:
        """Go on with a run until it has seen a negative eigenvalue, or all there are, or enough."""
        while True:
            rounding = ROUNDING * krylov.floor()
            negative = float(krylov.ritz()[0][0]) < -rounding
            if negative or krylov.exhausted:
                # Once exhausted, no further step can tell what the bound leaves open from rounding.
                return not negative
            if krylov.full or krylov.steps >= PROOF_STEPS:
                return krylov.lower(delta) >= -rounding
            krylov.step()

    def _round(self, run: Run) -> float:
        """Run Lanczos at z from the model's top vectors, add what it shows, and return the largest Ritz value."""
        start = self._mixture()
        with Krylov.of(
            self.h, self.seed, f"flattest/{len(self.history)}", start=start, fresh=FRESH, product=self._product
        ) as krylov:
            while not (krylov.exhausted or krylov.full) and krylov.steps < STEPS and run.cost.gradients < run.budget:
                krylov.step()
                size = float(krylov.ritz()[0].abs().max())
                if krylov.steps > 3 and float(krylov.residuals()[-1]) <= SETTLED * run.rtol * size:
                    break
            found = self._size(krylov.ritz()[0].flip(0))
            self._show(krylov, run)
        return found

    def _take_up(self, krylov: Krylov, run: Run) -> None:
        """Add the basis of a run at z, whose products the Lanczos relation knows: H V = V T + β v e."""
        z = self.z
        basis = krylov.basis
        T = torch.diag(torch.tensor(krylov.alphas, dtype=torch.float64))
        off = torch.tensor(krylov.betas[:-1], dtype=torch.float64)
        T = krylov.scale * (T + torch.diag(off, 1) + torch.diag(off, -1))
        products = T.to(basis.device, basis.dtype) @ basis
        if not krylov.exhausted:
            products[-1].add_(krylov.latest, alpha=krylov.betas[-1] * krylov.scale)
        self.products += krylov.steps
        values = krylov.ritz()[0]
        self.ends = float(values[0]), float(values[-1])
        norm = float(values.abs().max())
        self.model.add(self.group.act(basis, z, inverse=True), self.group.act(products, z), z, norm)
        self.history.append(
            {
                "products": self.products,
                "gradients": run.cost.gradients,
                "value": self._size(values.flip(0)),
                "model": self._size(self.model.eigenpairs(z)[0]),
                "log_scale": float(z.abs().max()) if len(z) else 0.0,
            }
        )

    def _product(self, row: Tensor) -> Tensor:
        """g⁻¹H g⁻¹ v, one pass at the fixed point."""
        inner = self.h.products(self.group.act(row[None], self.z, inverse=True))
        return self.group.act(inner, self.z, inverse=True)[0]

    def _mixture(self) -> Tensor | None:
        if not len(self.model.rows):
            return None
        values, vectors = self.model.eigenpairs(self.z)
        weights = (values.abs() / values.abs().max()) ** (self.power / 16)
        chosen = weights > 1e-3
        rows = self.model.vectors(self.z, vectors[:, chosen] * weights[chosen])
        start: Tensor = rows.sum(0)
        return start.div_(torch.linalg.vector_norm(start))

    def _over(self, run: Run) -> bool:
        share, most = RESERVE
        spent = run.cost.gradients > run.budget - min(share * run.budget, most)
        callback = run.callback
        stop = callback is not None and self.h.team.anywhere(lambda: callback(dict(self.history[-1])))
        return spent or stop

    def _size(self, values: Tensor) -> float:
        if not len(values):
            return 0.0
        return float(values.abs().max() if self.norm else values[0])

    def _answer(self, run: Run, before: Sharpness, recomputed: Sharpness, settled: bool) -> Flattest:
        bottom, top = self.ends
        value = max(recomputed.value, -bottom) if self.norm else recomputed.value
        lower = self._lower(recomputed)
        settled = settled and value <= self._size(self.model.eigenpairs(self.z)[0]) * (1 + run.rtol)
        if lower is None:
            status = Status.UNCERTIFIED if settled else Status.BUDGET
        else:
            tight = recomputed.upper - lower <= run.rtol * abs(value) or (self.trivial and recomputed.status.ok)
            status = Status.CONVERGED if tight else Status.BUDGET
        names, parts = self.h.layout.names, self.h.layout.split(self.group.move(self.h.x, self.z))
        return Flattest(
            value=value,
            lower=lower,
            attained=not len(self.z) or float(self.z.abs().max()) < self.most * (1 - 1e-6),
            status=status,
            proof=self.proof,
            headroom=self.history[0]["value"] / value if value else 1.0,
            negative=min(0.0, bottom / top) if top > 0 else 0.0,
            recomputed=recomputed,
            before=before,
            certificate=self._certificate(value, run.rtol),
            log_scales=self.group.log_scales(self.z),
            state_dict={name: part.detach().clone() for name, part in zip(names, parts, strict=True)},
            frozen=dict(self.group.frozen),
            max_log_scale=self.most,
            cost=run.cost,
            history=tuple(self.history),
        )

    def _recomputed(self, run: Run) -> Sharpness | None:
        """Compute λ₁ by products at the point itself; None where that shows the model to be wrong, and it can go on.

        Runs that start from the model's own vectors may miss others that have risen: this one starts at random too.
        """
        moved = self.h.at(self.group.move(self.h.x, self.z))
        self._check_unchanged(moved)
        allowed = math.inf if self.over else (1 + WRONG * run.rtol) * self._size(self.model.eigenpairs(self.z)[0])
        stream = f"flattest/recomputed/{len(self.history)}"
        with Krylov.of(moved, self.seed, stream, start=self._mixture(), fresh=1.0) as krylov:
            while not (krylov.exhausted or krylov.full) and krylov.steps < STEPS:
                krylov.step()
                if self._size(krylov.ritz()[0].flip(0)) > allowed:
                    self._show(krylov, run)
                    return None
            left = max(run.budget - run.cost.gradients, 20.0)
            answer = sharpness(
                moved, RECOMPUTATION * run.rtol, run.confidence, "lanczos", krylov=krylov, budget=left, atol=0.0
            )
            if answer.value > allowed and krylov.steps <= self.rows:
                self._show(krylov, run)
                return None
            values = krylov.ritz()[0]
            self.ends = float(values[0]), float(values[-1])
            self.products += krylov.steps
        return answer

    def _show(self, krylov: Krylov, run: Run) -> None:
        """Let the model take up what a run at z found, and drop what has become faint there."""
        self._take_up(krylov, run)
        self.model.compress(self.z, self.rows, FAINT)

    def _check_unchanged(self, moved: Objective) -> None:
        before, after = self.h.value(), moved.value()
        size = abs(before) + 0.5 * self.history[0]["value"] * float(self.h.x.double().square().sum())
        if abs(after - before) > UNCHANGED_ULPS * torch.finfo(self.h.dtype).eps * size:
            raise LawsError(
                f"the couplings do not leave f unchanged: it is {before:.9g} at x and {after:.9g} at the rescaled x: "
                "give the laws of this model"
            )

    def _lower(self, recomputed: Sharpness) -> float | None:
        if self.trivial:
            # The orbit is this point, or the least is zero or below everywhere in it.
            return recomputed.lower
        if self.proof is None:
            return None
        return self.model.bound(self.least, self.power, self.most) - recomputed.floor

    def _certificate(self, value: float, rtol: float) -> Certificate:
        values, coefficients = self.model.eigenpairs(self.z)
        if not len(values):
            return Certificate((), (), self.model.rows, 0.0)
        # The model of an indefinite matrix may have larger eigenvalues of its own.
        distance = ((values.abs() if self.norm else values) - value).abs()
        chosen = (distance <= max(rtol * abs(value), float(distance.min()))).nonzero().reshape(-1)[:CLUSTER]
        return balanced_mixture(self.group, values[chosen], self.model.vectors(self.z, coefficients[:, chosen]))
