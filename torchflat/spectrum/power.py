"""Power iteration: the textbook way to a dominant eigenvalue, kept as a cross-check of Lanczos."""

from __future__ import annotations

import math

import torch

from torchflat import ops
from torchflat.objective import Objective
from torchflat.result import Status
from torchflat.spectrum.bounds import growth_upper_bound
from torchflat.spectrum.krylov import MARGIN, REDUCTION_ULPS, Bounds, power_of_two, random_unit_vector
from torchflat.spectrum.run import Run

__all__ = ["PowerIteration"]


class PowerIteration:
    """v ← (H + σI)v / ‖(H + σI)v‖ from a random start u, in units of a power of two near ‖H u‖.

    First with σ = 0. Where that settles on a negative eigenvalue it found λ_min, and starts again from u with
    σ = 1.1·|λ_min|, so that λ₁ is on top. The upper bound rests on how fast ‖(H + σI)ᵏu‖ grew, and on the same event
    for every σ: ⟨v₁,u⟩ is not tiny.
    """

    basis = "krylov"

    def __init__(self, f: Objective, seed: int, delta: float) -> None:
        self._f, self._delta = f, delta
        self._start = random_unit_vector(f.n, seed, "sharpness", f.dtype, f.device)
        self._next, self._shift = self._start, 0.0
        self._log_growth, self._grown = 0.0, 0
        self._unit = 1.0
        self.steps = 0

    @property
    def full(self) -> bool:
        """Never: the iteration keeps two vectors."""
        return False

    def advance(self) -> None:
        """Take one product."""
        self.vector = self._next
        image = self._f.products(self.vector[None])[0].double()
        if self.steps == 0:
            self._unit = power_of_two(float(image.abs().max()))
        image = image / self._unit + self._shift * self.vector.double()
        self._norm, self._value = float(ops.norm([image])), float(ops.dot([self.vector], [image]))
        self.residual = self._unit * float(ops.norm([image - self._value * self.vector.double()]))
        self.steps += 1
        self._grown += 1
        if self._norm > 0:
            self._log_growth += math.log(self._norm)
            self._next = (image / self._norm).to(self._f.dtype)

    def bounds(self, product_error: float) -> Bounds:
        """Bound λ₁ from both sides, with probability at least 1 − δ, rounding included."""
        bound = growth_upper_bound(self._log_growth, self._grown, self._f.n, self._delta) if self._norm > 0 else 0.0
        value, upper = (self._unit * (x - self._shift) for x in (self._value, max(bound, self._value)))
        floor = MARGIN * product_error + REDUCTION_ULPS * torch.finfo(self._f.dtype).eps * self._unit * self._norm
        return Bounds(value, value - floor, upper + floor, floor)

    def status(self, run: Run, bounds: Bounds, over: bool) -> Status | None:
        """Say how the run ends here, or None if it goes on."""
        if not run.narrow_enough(bounds) and self.residual <= run.tolerance(abs(bounds.value), bounds.floor):
            if bounds.value >= 0 or self._shift > 0:
                return Status.NOT_CERTIFIED
            if not over:
                # λ_min is known roughly here, hence the margin.
                self._restart(1.1 * abs(bounds.value) / self._unit)
                return None
        return run.status(bounds, self._unit * self._norm, exhausted=self._norm == 0, over=over)

    def _restart(self, shift: float) -> None:
        self._next, self._shift = self._start, shift
        self._log_growth, self._grown = 0.0, 0
