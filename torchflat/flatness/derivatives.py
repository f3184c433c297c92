"""‖f⁽ᵏ⁾(x)‖, how large the k-th derivative is along the direction where it is largest (T006, T007, T028)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import LossError, UsageError
from torchflat.objective import Objective
from torchflat.objective.accuracy import exact_rows
from torchflat.objective.functional import Scalar
from torchflat.result import Answer, Cost, Status
from torchflat.spectrum.krylov import random_unit_vector
from torchflat.spectrum.run import Callback, Run, check_request

__all__ = ["DerivativeNorm", "derivative_norm"]

# Beyond it one image costs a thousand gradients and more.
HIGHEST_ORDER = 8
# Images that the default budget pays for.
IMAGES = 1000
# A climb is screened by this many steps, or until its residual is this small, relative to its value.
SCREENING_STEPS, SCREENING_RTOL = 20, 1e-2
# A value may fall by so many roundings of the image and still count as level.
LEVEL_ULPS = 16
# What ∇(Df·v) may be off H·v in float64, at a point this far away relative to |x|: H may vanish at the point itself.
AGREEMENT, NEARBY = 1e-6, 1e-2
# The search has no confidence to state; a run asks for one.
NO_CONFIDENCE = 0.5

Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DerivativeNorm(Answer):
    """``value`` = |Dᵏf(x)[v, …, v]| at the unit ``vector`` v, (n,): the largest that was found, and so a lower bound.

    ``sign`` is that of the derivative there: Dᵏf(x)[v, …, v] = sign·value. ``residual`` is
    ‖Dᵏf(x)[v, …, v, ·] − sign·value·v‖, which vanishes at a local maximum, and proves nothing about a global one.
    ``reached`` has Dᵏf(x)[v, …, v] at the end of each climb, before the best was refined: where many agree, the maximum
    is more likely the global one. ``steps`` counts images Dᵏf(x)[v, …, v, ·].
    """

    value: float
    k: int
    vector: Tensor = field(repr=False)
    sign: int
    residual: float
    status: Status
    steps: int
    reached: tuple[float, ...]
    cost: Cost
    provenance: Mapping[str, Any]


def derivative_norm(
    f: Objective,
    k: int,
    seed: int = 0,
    starts: int = 8,
    rtol: float = 1e-4,
    budget: float | None = None,
    callback: Callback | None = None,
) -> DerivativeNorm:
    """Maximise |Dᵏf(x)[v, …, v]| over unit vectors v: ‖f⁽ᵏ⁾(x)‖, the norm of the k-th derivative as a symmetric form.

    Where the derivatives below the k-th vanish, f°(x, r) = ‖f⁽ᵏ⁾(x)‖ rᵏ/k! + o(rᵏ). Whether they do is not asked here,
    nor whether f is smooth: Dᵏf(x) is what automatic differentiation makes of f at x, on its own side of every kink.

    For k ≥ 3 the maximisation is not convex, has local maxima in general, and is NP-hard. So ``value`` is attained by
    ``vector``, a lower bound on the norm; several random starts make it likely to be the norm, and nothing here bounds
    it from above. CONVERGED says that the best of them is stationary: residual ≤ rtol·value. The error of the value is
    of the order of rtol²·value where the maximum is strict.

    From each start, shifted power steps v ← (±Dᵏf(x)[v, …, v, ·] + α·v)/‖…‖ climb, upwards for both signs of an even
    form; for odd k, v and −v take the opposite values. A large enough shift makes every step go up (Kolda and Mayo);
    the one used adapts, going by the curvature of the form along the last step, and up where the value would fall.

    One image Dᵏf(x)[v, …, v, ·] costs (k + 1)·2ᵏ⁻² gradients: 3, 8, 20, 48 for k = 2 … 5; and 1 for k = 1.

    Args:
        f: the objective, at its point. Its operators must support forward-mode AD, unless k = 1.
        k: the order of the derivative, 1 to 8.
        seed: of the random starts.
        starts: how many. Each is screened by 20 steps at most, or 40 for even k, and the best is refined.
        rtol: how small the residual is to be, relative to the value.
        budget: in full-data gradients; default: that of 1000 images.
        callback: called with the largest value so far after each step; a true return value stops the run.

    Raises:
        UsageError: an argument is out of range.
        LossError: an operator has no forward-mode derivative; it is named. Or that derivative cannot be differentiated
            in turn, which is seen on a few rows: ∇(Df·v) is not H·v there.
        NonFiniteError: a derivative holds NaN or infinity.

    Source: Kolda, Mayo, *Shifted Power Method for Computing Tensor Eigenpairs* (2011), and *An Adaptive Shifted Power
    Method for Computing Generalized Tensor Eigenpairs* (2014).

    >>> x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    >>> fourth = derivative_norm(Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 4, x), k=4)
    >>> round(fourth.value, 6), fourth.sign, fourth.status.name
    (96.0, 1, 'CONVERGED')
    """
    if k not in range(1, HIGHEST_ORDER + 1):
        raise UsageError(f"k={k}: it must be an integer from 1 to {HIGHEST_ORDER}; the cost of a step doubles with k")
    if starts < 1:
        raise UsageError(f"starts={starts}: it must be a positive number")
    budget = float(IMAGES * _gradients(k)) if budget is None else budget
    check_request(rtol, NO_CONFIDENCE, budget)
    if k > 1:
        _refuse_wrong_nesting(f, seed)
    search = _Search(f, k, Run(f, rtol, None, NO_CONFIDENCE, budget, callback))
    best, status = search.from_starts(starts, seed)
    answer = DerivativeNorm(
        value=best.value,
        k=k,
        vector=best.vector.to(f.dtype),
        sign=best.sign,
        residual=best.residual,
        status=status,
        steps=search.images,
        reached=tuple(search.reached),
        cost=search.run.cost,
        provenance=f.provenance(),
    )
    search.run.warn(status, "derivative_norm")
    return answer


def _gradients(k: int) -> int:
    """Count what one image costs, in gradients.

    A weight W moves to W + Σ tᵢ·V, an activation has 2ᵐ coefficients in the m = k − 1 variables tᵢ, and their product
    takes 2ᵐ + m·2ᵐ⁻¹ matrix products; the pass backwards takes twice as many, as it does in a gradient.
    """
    return ((k + 1) << (k - 1)) // 2


def _image(x: Tensor, v: Tensor, k: int, loss: Scalar) -> Tensor:
    """Return Dᵏloss(x)[v, …, v, ·]: the gradient in x of dᵏ⁻¹/dtᵏ⁻¹ loss(x + t·v) at t = 0."""
    # Nested dual numbers: univariate Taylor arithmetic (jets) would grow with k² and not with 2ᵏ, but torch has no
    # jets, and a rule for each operator would have to be written here; forward-mode rules exist, and k is small.
    # Backwards last, and over x: in v, the gradient of Dᵏ[v, …, v] would take one level more.
    for _ in range(k - 1):
        loss = functools.partial(_slope, loss, v)
    image: Tensor = torch.func.grad(loss)(x)
    return image


def _slope(loss: Scalar, v: Tensor, x: Tensor) -> Tensor:
    slope: Tensor = torch.func.jvp(loss, (x,), (v,))[1]
    return slope


def _refuse_wrong_nesting(f: Objective, seed: int) -> None:
    """Compare ∇(Df·v) with H·v: some forward-mode rules of torch (of det and solve in 2.14) lack a derivative."""
    exact = exact_rows(f, "derivatives of derivatives were not checked")
    if exact is None:
        return
    v = random_unit_vector(f.n, seed, "derivative/check", torch.float64, f.device)
    near = exact.at(exact.x + NEARBY * max(1.0, float(ops.norm([exact.x]))) * v)
    image = near.transformed(functools.partial(_image, near.x, v, 2), f.n, _gradients(2), [v])
    product = near.products(v[None])[0]
    size, fault = float(ops.norm([product])), float(ops.norm([image - product]))
    rounding = torch.finfo(torch.float64).eps / AGREEMENT * float(ops.norm([near.gradient()]))
    if fault > AGREEMENT * (size + rounding):
        raise LossError(
            f"the gradient of a directional derivative is off H·v by {fault:.2g}, where that is {size:.2g}: torch "
            "lacks a derivative of the forward-mode rule of some operator of the loss; write that in plain operations"
        )


class _Search:
    """Climbs from random starts, of which the best is refined."""

    def __init__(self, f: Objective, k: int, run: Run) -> None:
        self.f, self.k, self.run = f, k, run
        self.images = 0
        self.reached: list[float] = []
        self._x = f.x
        self._highest = 0.0

    def from_starts(self, starts: int, seed: int) -> tuple[_Climb, Status]:
        """Screen all starts and refine the best."""
        best: _Climb | None = None
        for index in range(starts):
            start = random_unit_vector(self.f.n, seed, f"derivative/{index}", self.f.dtype, self.f.device)
            for climb in self._climbs(start.double()):
                over = self._go(climb, SCREENING_RTOL, SCREENING_STEPS)
                self.reached.append(climb.sign * climb.value)
                if best is None or climb.value > best.value:
                    best = climb
                if over:
                    return best, Status.BUDGET
        assert best is not None
        over = self._go(best, self.run.rtol, math.inf)
        if best.residual <= self.run.rtol * best.value:
            return best, Status.CONVERGED
        return best, Status.BUDGET if over else Status.ROUNDING_LIMITED

    def _climbs(self, start: Tensor) -> Iterator[_Climb]:
        """From a start, to where the form is largest and, for even k, to where it is smallest."""
        image, eps = self._image(start), torch.finfo(self.f.dtype).eps
        value = float(ops.dot([start], [image]))
        ahead = 1 if value >= 0 else -1
        self._highest = max(self._highest, abs(value))
        for sign in (ahead, -ahead) if self.k % 2 == 0 else (ahead,):
            yield _Climb(self._image, start, image, sign, eps)

    def _go(self, climb: _Climb, rtol: float, steps: float) -> bool:
        """Climb until settled or stuck, or for so many steps; tell whether the run is over."""
        while not (climb.stuck or climb.steps >= steps):
            # Below zero a climb may creep towards zero for ever; it is left where it is slow beside the best.
            if climb.residual <= rtol * (climb.value if climb.value > 0 else self._highest):
                break
            climb.advance()
            self._highest = max(self._highest, climb.value)
            if self.run.over(self._highest):
                return True
        return False

    def _image(self, v: Tensor) -> Tensor:
        self.images += 1
        if self.k == 1:
            return self.f.gradient().double()
        v = v.to(self.f.dtype)
        transform = functools.partial(_image, self._x, v, self.k)
        return self.f.transformed(transform, self.f.n, _gradients(self.k), [v])


class _Climb:
    """Shifted power steps on the sphere, by which ``value`` = ``sign``·Dᵏf(x)[v, …, v] never falls; v is ``vector``.

    With the image g = sign·Dᵏf(x)[v, …, v, ·] and its tangent part t = g − value·v, a step v ← (g + α·v)/‖…‖ is
    (t + pull·v)/‖…‖ with pull = value + α. The first is a plain power step, α = 0.
    """

    def __init__(self, form: Form, vector: Tensor, image: Tensor, sign: int, eps: float) -> None:
        self._form, self.sign, self._eps = form, sign, eps
        self.vector, image = vector, sign * image
        self.value = float(ops.dot([vector], [image]))
        self._tangent = image - self.value * vector
        self._pull = self.value
        self.steps, self.stuck = 0, False

    @property
    def residual(self) -> float:
        """‖t‖, zero at a stationary point."""
        return float(ops.norm([self._tangent]))

    def advance(self) -> None:
        """Try one step, for one image, and take it unless the value falls."""
        self.steps += 1
        trial = self._tangent + self._pull * self.vector
        trial /= float(ops.norm([trial]))
        image = self.sign * self._form(trial)
        value = float(ops.dot([trial], [image]))
        if value < self.value - LEVEL_ULPS * self._eps * float(ops.norm([image])):
            # Doubled often enough, it passes (k − 1) times the norm of the form, beyond which every step goes up.
            self._pull = 2 * max(abs(self._pull), self.residual)
            self.stuck = self.residual <= self._eps * self._pull
            return
        step, tangent = trial - self.vector, image - value * trial
        bend, length = -float(ops.dot([step], [tangent - self._tangent])), float(ops.dot([step], [step]))
        self.vector, self.value, self._tangent = trial, value, tangent
        # Towards a maximum the form bends down, and this is Newton's step for the curvature seen (Barzilai, Borwein).
        self._pull = bend / length if bend > 0 else max(value, self.residual)
        self.stuck = length == 0
