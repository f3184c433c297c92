"""The least norm in an orbit: min over z of Σ|g(z)v|², where C = 0. It generalises the balancing of matrices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchflat.symmetry.group import Group

__all__ = ["Balance", "least_norm"]

# One Newton step changes no log-scale by more.
LONGEST_STEP = 2.0
CG_STEPS = 60
# Rounding of F, relative: near the least, steps change it by less.
ROUNDING = 1e-14
# What a step in a full coupling costs by itself, relative to the writers and readers: where they lack directions, it
# would go to infinity in these.
PROXIMAL = 1e-6


class Balance(NamedTuple):
    """Σ|g(z)v|² = ``value`` at z, where C/value = ``imbalance``.

    ``residual`` is the sum of its absolute values, less those of log-scales that would leave the box (``held``).
    """

    z: Tensor
    value: float
    imbalance: Tensor
    residual: float
    held: Tensor


def least_norm(group: Group, rows: Tensor, start: Tensor, most: float, tolerance: float, steps: int = 60) -> Balance:
    """Minimise F(z) = Σ|g(z)v|² over the rows v of ``rows`` (m, n), log-scales up to ``most``, from z = ``start``.

    F is a sum of exponentials of linear functions of the diagonal log-scales, hence convex: Newton steps, their linear
    systems Bᵀdiag(a)B solved by conjugate gradients, with a line search. In a full coupling it is convex along
    geodesics, and the least for the one G, with A = Σ MMᵀ over the writers and B over the readers, is the geometric
    mean

        G² = A^{-½} (A^½ B A^½)^½ A^{-½};

    a small multiple of I is added to both, which keeps G from directions in which nothing changes, and leaves alone
    where the steps end. The two take turns until Σ|C| ≤ ``tolerance``·F, C = ∇F/2; the best point is returned.
    """
    z, squares = start.clone(), rows.square().sum(0, dtype=torch.float64) if group.diagonal else None
    best: Balance | None = None
    for step in range(steps + 1):
        current = _measured(group, rows, squares, z, most)
        if best is None or current.residual < best.residual:
            best = current
        if current.residual <= tolerance or step == steps:
            break
        after = _newton(group, rows, squares, current)
        if not group.diagonal:
            after = _geometric_means(group, rows, after, most)
        after = group.clamped(after, most)
        if torch.equal(after, z):
            break
        z = after
    assert best is not None
    return best


def _moved_squares(group: Group, rows: Tensor, squares: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor | None]:
    if squares is not None:
        return group.act(squares[None], 2 * z)[0], None
    moved = group.act(rows, z)
    return moved.square().sum(0, dtype=torch.float64), moved


def _measured(group: Group, rows: Tensor, squares: Tensor | None, z: Tensor, most: float) -> Balance:
    moved, vectors = _moved_squares(group, rows, squares, z)
    value = float(moved.sum())
    imbalance = group.imbalance_of(moved, vectors) / max(value, 1e-300)
    held = ((z >= most) & (imbalance < 0)) | ((z <= -most) & (imbalance > 0))
    return Balance(z, value, imbalance, group.magnitude(imbalance * ~held), held)


def _newton(group: Group, rows: Tensor, squares: Tensor | None, current: Balance) -> Tensor:
    """Take one damped Newton step in the diagonal log-scales."""
    is_diagonal = group.packed([torch.full_like(m, float(m.ndim == 1)) for m in group.matrices(group.identity())])
    free = is_diagonal * ~current.held
    gradient = current.imbalance * free
    if not bool(gradient.any()):
        return current.z
    moved, _ = _moved_squares(group, rows, squares, current.z)
    direction = _conjugate_gradients(group, moved / current.value, -gradient / 2, free)
    direction *= min(1.0, LONGEST_STEP / float(direction.abs().max()))
    slope, length = 2 * float(gradient @ direction), 1.0
    for _ in range(30):
        z = current.z + length * direction
        if float(_moved_squares(group, rows, squares, z)[0].sum()) <= current.value * (
            1 + 1e-4 * length * slope + ROUNDING
        ):
            return z
        length /= 2
    return current.z


def _conjugate_gradients(group: Group, squares: Tensor, right: Tensor, free: Tensor) -> Tensor:
    """Solve Bᵀdiag(squares)B x = ``right`` in the free coordinates, to the accuracy that a Newton step is worth."""
    scale = group.masses(squares).clamp(min=1e-300)
    tolerance = min(0.1, math.sqrt(float(right.abs().sum()))) * float((right / scale.sqrt()).norm())
    x, residual = torch.zeros_like(right), right.clone()
    preconditioned = residual / scale
    direction, product = preconditioned.clone(), float(residual @ preconditioned)
    for _ in range(CG_STEPS):
        if math.sqrt(max(product, 0.0)) <= tolerance:
            break
        image = group.curvature(squares, direction) * free
        bend = float(direction @ image)
        if bend <= 0:
            break
        x += product / bend * direction
        residual -= product / bend * image
        preconditioned = residual / scale
        product, before = float(residual @ preconditioned), product
        direction = preconditioned + product / before * direction
    return x


def _geometric_means(group: Group, rows: Tensor, z: Tensor, most: float) -> Tensor:
    """Balance one full coupling after the other, each exactly."""
    for index, coupling in enumerate(group.couplings):
        parts = group.matrices(z)
        if coupling.kind == "full" and bool(group.free_part(index).all()):
            writers, readers = group.grams(coupling, group.act(rows, z))
            G = torch.matrix_exp(parts[index])
            # One step changes no log-scale by more than LONGEST_STEP: without directions it could go anywhere.
            square = _logarithm(_geometric_mean(writers, readers), 2 * LONGEST_STEP)
            parts[index] = _logarithm(G @ torch.matrix_exp(square) @ G, 2 * most) / 2
            z = group.packed(parts)
    return z


def _geometric_mean(writers: Tensor, readers: Tensor) -> Tensor:
    """Return A^{-½} (A^½ B A^½)^½ A^{-½}, both plus a small multiple of I."""
    size = len(writers)
    little = PROXIMAL * (writers.trace() + readers.trace()) / (2 * size) * torch.eye(size, dtype=torch.float64)
    writers, readers = writers + little, readers + little
    root, inverse = _power(writers, 0.5), _power(writers, -0.5)
    return inverse @ _power(root @ readers @ root, 0.5) @ inverse


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    power: Tensor = vectors * values.clamp(min=1e-300) ** exponent @ vectors.T
    return power


def _logarithm(matrix: Tensor, most: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    logarithm: Tensor = vectors * values.clamp(min=1e-300).log().clamp(-most, most) @ vectors.T
    return logarithm
