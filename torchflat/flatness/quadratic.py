"""The extremes of a quadratic model of f on balls, from a Krylov space whose products are differences of gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchflat.flatness.surface import Surface
from torchflat.spectrum.krylov import Krylov

__all__ = ["QuadraticModel", "ball_maximiser"]


class QuadraticModel:
    """m(u) = gᵀu + ½ uᵀHu on a Krylov space of k dimensions.

    A product is (∇f(x + s·v) − ∇f(x))/s: one gradient, where the Hessian would take two, and it asks no second
    derivative of f. The start of the space is half the gradient and half random.
    """

    def __init__(self, surface: Surface, step: float, seed: int) -> None:
        self._surface = surface

        def product(vector: Tensor) -> Tensor:
            place = surface.place(step * vector, step * (1 + 1e-3))
            return torch.zeros_like(vector) if place is None else (place.gradient - surface.gradient) / step

        start = surface.gradient / surface.slope if surface.slope else None
        self.krylov = Krylov.of(surface.f, seed, "variation", start=start, product=product)

    def extend(self, steps: int) -> None:
        """Take up to so many more products."""
        for _ in range(steps):
            if self.krylov.exhausted or self.krylov.full:
                return
            self.krylov.step()

    def maximisers(self, radius: float, sign: float) -> list[Tensor]:
        """Return where ``sign``·m is largest on the ball, and the same with the top component mirrored, (n,) each."""
        values, rotation = self.krylov.ritz()
        slopes = rotation.T @ self.krylov.components(self._surface.gradient)
        best = ball_maximiser(sign * values, sign * slopes, radius)
        top = int((sign * values).argmax())
        mirrored = best.clone()
        mirrored[top] *= -1
        return [self._offset(rotation @ each) for each in (best, mirrored)]

    def _offset(self, coefficients: Tensor) -> Tensor:
        size = float(torch.linalg.vector_norm(coefficients))
        return self.krylov.vectors(coefficients[:, None])[0] * size if size else torch.zeros_like(self._surface.x)


def ball_maximiser(values: Tensor, slopes: Tensor, radius: float) -> Tensor:
    """Maximise γᵀz + ½ Σ λᵢ zᵢ² over |z| ≤ r; a (k,) tensor.

    z = (μ − Λ)⁻¹γ for the μ ≥ max(λ₁, 0) that gives |z| = r; or |z| < r at μ = 0; or, where γ has no part along the top
    eigenvector (the hard case), μ = λ₁ and as much of that eigenvector as there is room for.

    >>> ball_maximiser(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.5]), 1.0)
    tensor([0.8660, 0.5000], dtype=torch.float64)
    """
    values, slopes = values.double(), slopes.double()
    top = max(0.0, float(values.max()))
    pull = float(torch.linalg.vector_norm(slopes))
    floor = 1e-13 * max(top, float(values.abs().max()), pull / radius)

    def at(mu: float) -> Tensor:
        return slopes / (mu - values)

    low, high = top + floor, top + floor + pull / radius
    z = at(low)
    if floor == 0 or float(torch.linalg.vector_norm(z)) <= radius:
        z = torch.nan_to_num(z)
        room = radius**2 - float(z @ z)
        if float(values.max()) > 0 and room > 0:
            z[int(values.argmax())] += math.copysign(math.sqrt(room), float(z[int(values.argmax())]))
            z *= radius / float(torch.linalg.vector_norm(z))
        return z
    for _ in range(200):
        middle = (low + high) / 2
        if float(torch.linalg.vector_norm(at(middle))) > radius:
            low = middle
        else:
            high = middle
    return at(high)
