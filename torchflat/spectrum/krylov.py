"""The Lanczos process: a random start, full reorthogonalisation, and scalars in float64."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from torchflat.objective import Objective
from torchflat.objective.memory import Memory
from torchflat.spectrum.basis import Basis
from torchflat.spectrum.bounds import polynomial_upper_bound

__all__ = ["MARGIN", "REDUCTION_ULPS", "Bounds", "Krylov", "generator", "power_of_two", "random_unit_vector"]

# No run takes more steps.
LARGEST_BASIS = 1024
# Rounding in orthogonalisation and in T, in units of ε·‖T‖. Independent of n, because sums are taken in float64.
REDUCTION_ULPS = 64
# Products were seen to err in directions outside the Krylov space too: margin on what is measured inside it.
MARGIN = 4


def generator(seed: int, stream: str) -> torch.Generator:
    """Make a source of randomness on the CPU.

    ``stream`` names its purpose, so that two computations with one seed do not share their randomness.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_unit_vector(n: int, seed: int, stream: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw a vector uniform on the unit sphere, the same for the same seed and stream on every device."""
    vector = torch.randn(n, generator=generator(seed, stream), dtype=torch.float64)
    vector /= torch.linalg.vector_norm(vector)
    return vector.to(device, dtype)


def power_of_two(amplitude: float) -> float:
    """Return a power of two near ``amplitude``, as a unit in which squares neither over- nor underflow; 1 for zero."""
    if amplitude == 0:
        return 1.0
    return 2.0 ** min(max(math.frexp(amplitude)[1], -1000), 1000)


class Bounds(NamedTuple):
    """An eigenvalue between two bounds, both moved outwards by the rounding allowance ``floor``."""

    value: float
    lower: float
    upper: float
    floor: float


class Krylov:
    """Lanczos on a symmetric operator restricted to the complement of ``deflated``.

    After k steps, with V the (k, n) rows of :attr:`basis` and T = tridiag(β, α, β),

        P H Vᵀ = Vᵀ T + βₖ v eₖᵀ,      P = I − YᵀY,   Y = deflated (m, n) orthonormal rows.

    The start u is uniform on the unit sphere of that complement, of dimension n − m: what :meth:`upper` rests on. Or
    it is w + b·g, normalised, for a given unit vector ``start`` w, with g uniform there and b = ``fresh``. Whatever w
    is, P(|⟨v₁,u⟩| ≤ s) is then at most what a uniform start has for s/b, so that T090 holds with its right-hand side
    divided by b. With b = 0 nothing bounds the spectrum from outside.

    Numbers are kept in units of a power of two near ‖H u‖, so that neither tiny nor huge curvature under- or overflows.

    The rows count against the memory budget until :meth:`release`, which leaving a ``with`` block calls; what it cannot
    hold is kept on disk (:class:`~torchflat.spectrum.basis.Basis`).
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        n: int,
        *,
        seed: int,
        stream: str,
        dtype: torch.dtype,
        device: torch.device,
        memory: Memory,
        deflated: Tensor | None = None,
        start: Tensor | None = None,
        fresh: float = 1.0,
    ) -> None:
        self._product, self._memory = product, memory
        self.n, self.dtype, self.device = n, dtype, device
        self._fixed = 0 if deflated is None else deflated.shape[0]
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.scale = 1.0
        self.rounding = 0.0
        self.exhausted = False
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._best: dict[tuple[str, float], float] = {}
        self._capacity = min(self.dimension, LARGEST_BASIS)
        self._basis = Basis(n, self._fixed + self._capacity, dtype, device, memory)
        for row in deflated if deflated is not None else ():
            self._basis.append(row)
        # In one dimension every start is the same, and two of them may cancel.
        given = start if self.dimension > 1 else None
        self.share = 1.0
        if given is None or fresh:
            vector = random_unit_vector(n, seed, stream, torch.float64, device)
            _, norm = self._basis.orthogonalise(vector)
            vector /= norm
        else:
            vector = torch.zeros(n, dtype=torch.float64, device=device)
        if given is not None:
            vector.mul_(fresh).add_(given)
            _, norm = self._basis.orthogonalise(vector)
            vector /= norm
            self.share = fresh / norm
        self._basis.append(vector)

    @classmethod
    def of(
        cls,
        f: Objective,
        seed: int,
        stream: str,
        deflated: Tensor | None = None,
        start: Tensor | None = None,
        fresh: float = 1.0,
        product: Callable[[Tensor], Tensor] | None = None,
    ) -> Krylov:
        """Make the process for H = ∇²f(x), or for another ``product`` in the same place, precision and memory."""
        return cls(
            product or (lambda row: f.products(row[None])[0]),
            f.n,
            seed=seed,
            stream=stream,
            dtype=f.dtype,
            device=f.device,
            memory=f.memory,
            deflated=deflated,
            start=start,
            fresh=fresh,
        )

    def __enter__(self) -> Krylov:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def steps(self) -> int:
        """Number of products taken."""
        return len(self.alphas)

    @property
    def dimension(self) -> int:
        """Dimension of the space that the start was drawn from."""
        return self.n - self._fixed

    @property
    def full(self) -> bool:
        """Whether as many steps were taken as a run may have."""
        return self.steps == self._capacity and not self.exhausted

    @property
    def basis(self) -> Tensor:
        """The k Lanczos vectors, as rows, all of them in memory."""
        return self._basis.combined(torch.eye(self.steps, dtype=torch.float64), self._fixed)

    @property
    def latest(self) -> Tensor:
        """The vector that the next step takes the product of."""
        return self._basis.latest

    @property
    def norm(self) -> float:
        """‖T‖, in the units of H."""
        return self.scale * max(map(abs, self._ritz_values()), default=0.0)

    def step(self) -> None:
        """Take one product, and with it one more row of T; not to be called once the space is exhausted or full."""
        residual = self._product(self.latest).double()
        if not self.alphas:
            self.scale = power_of_two(float(residual.abs().max()))
        residual /= self.scale
        coefficients, norm = self._basis.orthogonalise(residual)
        self._measure_rounding(coefficients[self._fixed : -1])
        self.alphas.append(coefficients[-1])
        self._eigen = None
        size = max(abs(self.alphas[-1]), norm, *self.betas[-1:])
        noise = max(self.rounding, 4 * torch.finfo(self.dtype).eps * size)
        # A residual below rounding has no direction of its own: the space is invariant as far as can be seen.
        self.exhausted = self.steps == self.dimension or norm <= noise
        self.betas.append(max(norm, noise))
        if not self.exhausted and not self.full:
            self._basis.append(residual.div_(norm))

    def worth_a_look(self) -> bool:
        """Whether to diagonalise T now: at every step at first, and later often enough to overshoot by 3 % at most."""
        return self.exhausted or self.full or self.steps % max(1, self.steps // 32) == 0

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return T's eigenvalues, ascending, in units of H, and its eigenvectors as columns (float64, on the CPU)."""
        if self._eigen is None:
            t = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
            off = torch.tensor(self.betas[:-1], dtype=torch.float64)
            self._eigen = torch.linalg.eigh(t + torch.diag(off, 1) + torch.diag(off, -1))
        values, vectors = self._eigen
        return values * self.scale, vectors

    def vectors(self, coefficients: Tensor) -> Tensor:
        """Return the rows Σ cᵢ vᵢ for the columns c of ``coefficients`` (k, m): a (m, n) tensor of unit rows."""
        rows = self._basis.combined(coefficients, self._fixed)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        return rows.div_(norms.to(self.dtype))

    def components(self, vector: Tensor) -> Tensor:
        """⟨vᵢ, vector⟩ for the k Lanczos vectors, (k,) float64 on the CPU."""
        removed, _ = self._basis.orthogonalise(vector.double().clone())
        return torch.tensor(removed[self._fixed : self._fixed + self.steps], dtype=torch.float64)

    def residuals(self) -> Tensor:
        """‖H y − θ y‖ for every Ritz pair, ascending in θ: βₖ times the last components, and the measured rounding."""
        left = self.betas[-1] * self.ritz()[1][-1]
        return self.scale * torch.hypot(left, torch.full_like(left, self.rounding))

    def settled(self, tolerance: float) -> bool:
        """Whether an eigenvalue is as near to the top Ritz value θ as a quarter of it: |λ − θ| ≤ min(r, r²/gap)."""
        values, residual = self.ritz()[0], float(self.residuals()[-1])
        gap = float(values[-1] - values[-2]) if len(values) > 1 else 0.0
        return self.exhausted or min(residual, residual**2 / gap if gap else math.inf) <= tolerance / 4

    def upper(self, delta: float) -> float:
        """Bound the largest eigenvalue of P H P from above, with probability at least 1 − δ (T090), less rounding.

        The bound can grow from one step to the next. As all of them rest on one event, the smallest that was asked for
        so far is returned.
        """
        return self.scale * self._bound("upper", self._ritz_values(), delta)

    def lower(self, delta: float) -> float:
        """Bound the smallest eigenvalue of P H P from below in the same way."""
        return -self.scale * self._bound("lower", [-value for value in self._ritz_values()], delta)

    def floor(self) -> float:
        """Return the rounding allowance that this run measured: T's off-diagonal noise, and ε·‖T‖ for reductions."""
        return MARGIN * self.scale * self.rounding + REDUCTION_ULPS * torch.finfo(self.dtype).eps * self.norm

    def top(self, delta: float, product_error: float) -> Bounds:
        """Bound the largest eigenvalue of P H P from both sides, rounding included.

        ``product_error`` is how far products are off (:meth:`Objective.rounding_error`), which the run cannot see.
        """
        value, upper = float(self.ritz()[0][-1]), self.upper(delta)
        floor = self.floor() + MARGIN * product_error
        if self.exhausted:
            # No further step can tell an eigenvalue that the bound leaves open from rounding.
            floor = max(floor, upper - value)
        return Bounds(value, value - floor, upper + floor, floor)

    def release(self) -> None:
        """Give the basis back to the memory budget. T, and all that rests on it, stays."""
        self._basis.release()

    def _bound(self, end: str, ritz: list[float], delta: float) -> float:
        if self.share == 0:
            return math.inf
        complete = self.steps == self.dimension or 0.0 in self.betas
        log_couplings = -math.inf if complete else sum(map(math.log, self.betas))
        latest = polynomial_upper_bound(ritz, log_couplings, self.dimension, delta * self.share)
        best = self._best[end, delta] = min(latest, self._best.get((end, delta), math.inf))
        # Clearly below a Ritz value, it shows that in this run, one of a share δ of all, the event has failed.
        refuted = self.scale * best < self.scale * max(ritz) - self.floor()
        return latest if refuted else max(best, max(ritz))

    def _ritz_values(self) -> list[float]:
        return (self.ritz()[0] / self.scale).tolist() if self.alphas else []

    def _measure_rounding(self, coefficients: list[float]) -> None:
        # In exact arithmetic ⟨vᵢ, H vₖ⟩ is zero for i < k − 1 and βₖ₋₁ for i = k − 1. What is left is the rounding of
        # products and dots, seen inside the space for nothing.
        if coefficients:
            noise = [*coefficients[:-1], coefficients[-1] - self.betas[-1]]
            self.rounding = max(self.rounding, math.sqrt(sum(value * value for value in noise)))
