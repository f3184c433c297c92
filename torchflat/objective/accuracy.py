"""How far products can be trusted: against float64, and against differences of the gradient, on a few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import TorchflatError
from torchflat.objective.evaluation import first_line, out_of_memory

if TYPE_CHECKING:
    from torchflat.objective.objective import Objective

__all__ = ["Accuracy", "exact_rows", "second_derivative_fault"]

# Rows on which products are compared with float64 ones. Rounding averages out over rows, so that few show more of it.
ROUNDING_ROWS = 16
# Rows on which products are compared with differences of the gradient.
DIFFERENCE_ROWS = 4
# Points one rounding away, at which products are compared where there is no float64.
NEIGHBOURS = 2
# Steps of the differences, relative to |x|, in float64: two, because between them a ReLU may switch.
STEPS = (1e-6, 1e-8)
# Differences agree to about eight digits where the second derivative is right, and to none where a term is missing.
TOLERANCE = 1e-2


class Accuracy:
    """What has been measured of one objective, and the twins it was measured on."""

    def __init__(self) -> None:
        # None stands for the objective itself, which must not hold a reference to itself.
        self._sample: Objective | None = None
        self._exact: Objective | None = None
        self._exact_fails = False

    def rounding_error(self, f: Objective, vectors: Tensor, quadratic: bool) -> float:
        """See :meth:`Objective.rounding_error`."""
        if self._sample is None and f.rows > ROUNDING_ROWS:
            self._sample = f.few_rows(ROUNDING_ROWS)
        sample = self._sample or f
        return max(self._error(f, sample, vector, quadratic) for vector in vectors)

    def _error(self, f: Objective, sample: Objective, vector: Tensor, quadratic: bool) -> float:
        exact = self._exact_product(f, sample, vector)
        product = sample.products(vector[None])[0]
        # In place: vectors of this length in float64 are what a product needs most memory for.
        if exact is None:
            errors = _neighbours(sample, product, vector)
        else:
            ops.axpy_([exact], [product], -1.0)
            errors = [exact]
        if quadratic:
            return max(abs(float(ops.dot([error], [vector]))) for error in errors)
        return max(float(ops.norm([error])) for error in errors)

    def _exact_product(self, f: Objective, sample: Objective, vector: Tensor) -> Tensor | None:
        if self._exact_fails:
            return None
        try:
            if self._exact is None:
                self._exact = sample.in_float64()
            return self._exact.products(vector.double()[None])[0]
        except (TorchflatError, RuntimeError, TypeError) as error:
            if out_of_memory(error):
                raise
            self._exact, self._exact_fails = None, True
            why = f"the loss cannot be computed in float64: {first_line(error)}"
            f.note(f"rounding was estimated from points one rounding apart: {why}")
            return None


def _neighbours(sample: Objective, product: Tensor, vector: Tensor) -> list[Tensor]:
    """Twice the changes of ``product`` between points that are one rounding away."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, eps = sample.x, torch.finfo(sample.dtype).eps
    changes = []
    for _ in range(NEIGHBOURS):
        signs = torch.randint(2, (sample.n,), generator=generator, device="cpu").to(x.device) * 2 - 1
        # The factor 3 makes a product round differently also where it does not depend on x.
        near = sample.at(x + eps * signs * x).products(vector[None] / 3)[0].double() * 3
        changes.append(2 * (near - product))
    return changes


def second_derivative_fault(f: Objective) -> str | None:
    """Compare one product with differences of the gradient, both in float64, on a few rows; None if they agree.

    Some kernels have a double backward that lacks a term: in torch 2.14 the fused weight normalisation.
    """
    exact = exact_rows(f, "the second derivative was not checked")
    if exact is None:
        return None
    size = max(1.0, float(ops.norm([exact.x])))
    generator = torch.Generator("cpu").manual_seed(0)
    worst: dict[str, float] = {}
    for relative in STEPS:
        direction = torch.randn(f.n, generator=generator, dtype=torch.float64, device="cpu").to(f.device)
        direction /= torch.linalg.vector_norm(direction)
        fault, gradient_norm = _difference(exact, direction, relative * size)
        scale = float(ops.norm([fault]))
        product = exact.products(direction[None])[0]
        scale += float(ops.norm([product]))
        allowed = TOLERANCE * scale + 1e3 * torch.finfo(torch.float64).eps * gradient_norm / (relative * size)
        errors = map(torch.linalg.vector_norm, f.layout.split(fault.sub_(product)))
        worst = {name: float(e) / scale for name, e in zip(f.layout.names, errors, strict=True) if e > allowed}
        if not worst:
            return None
    names = ", ".join(sorted(worst, key=lambda name: -worst[name])[:3])
    return (
        f"the second derivative that autograd gives is wrong by {max(worst.values()):.0%} in {names}, compared with "
        "differences of the gradient: some kernel there has an incomplete double backward; write it in plain operations"
    )


def exact_rows(f: Objective, otherwise: str) -> Objective | None:
    """Take f to float64 on a few rows; where it cannot be computed so, None, and a note that says ``otherwise``."""
    try:
        exact = f.few_rows(DIFFERENCE_ROWS).in_float64()
        exact.value()
        return exact
    except (TorchflatError, RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        f.note(f"{otherwise}: the loss cannot be computed in float64: {first_line(error)}")
        return None


def _difference(f: Objective, direction: Tensor, step: float) -> tuple[Tensor, float]:
    """Return (∇f(x + s·d) − ∇f(x − s·d)) / 2s, and |∇f| there. In place: vectors in float64 take the most memory."""
    difference = f.at(f.x.add_(direction, alpha=step)).gradient()
    size = float(ops.norm([difference]))
    difference -= f.at(f.x.sub_(direction, alpha=step)).gradient()
    return difference.div_(2 * step), size
