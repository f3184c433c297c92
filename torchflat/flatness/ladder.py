"""Radii at which f° is worth knowing: from where rounding shows to where the loss has changed by its own size."""

from __future__ import annotations

import math

from torch import Tensor

from torchflat.flatness.quadratic import QuadraticModel
from torchflat.flatness.surface import Surface

__all__ = ["geometric", "ladder", "rising_above"]

# Where the loss has no size of its own (it is zero), the ladder ends at this share of |x|.
REACH = 0.25
# Distance, in roundings of |x|, within which x may be taken to lie.
ROUNDINGS = 10.0
# Looks for either end.
LOOKS = 12
# From one look for curvature to the next.
STRIDE = 1.5


def ladder(surface: Surface, model: QuadraticModel, count: int, clearance: float, steps: float) -> list[float]:
    """Return ``count`` radii in geometric progression.

    The last is where the largest change in some promising directions is about |f(x)|, or a quarter of |x| where f(x)
    drowns in rounding; the first is where that change is ``clearance`` times the rounding of f, and no less than
    ``steps`` times that of x, below which an offset loses its direction.
    """
    size = surface.size or 1.0
    noise, level = surface.noise(surface.x), abs(surface.level)
    smallest = steps * surface.eps * size
    # A loss that some roundings of x would make is zero, whatever one draw of them shows.
    rounded, _ = _highest(surface, model, ROUNDINGS * surface.eps * size)
    far = _reaching(surface, model, level, size) if level > clearance * max(noise, rounded) else REACH * size
    for _ in range(LOOKS):
        if not math.isnan(_highest(surface, model, far)[0]):
            break
        far /= 4
    near = far
    for _ in range(LOOKS):
        lower = max(near / 10, smallest)
        height, offset = _highest(surface, model, lower)
        noise = max(noise, surface.noise(surface.x + offset))
        if height < clearance * noise:
            break
        near = lower
        if near == smallest:
            break
    near = min(near, far / 4)
    return geometric(near, far, count)


def rising_above(surface: Surface, model: QuadraticModel, slope: float, radius: float) -> float | None:
    """Return a radius, no less than the one given, within which f changes by more than ``slope`` times it.

    None if none was found before |x|, or before f ceases to be finite.
    """
    for _ in range(LOOKS):
        height, _ = _highest(surface, model, radius)
        if height > slope * radius:
            return radius
        radius *= STRIDE
        if math.isnan(height) or radius > surface.size:
            break
    return None


def geometric(low: float, high: float, count: int) -> list[float]:
    """Return ``count`` radii from ``low`` to ``high`` in geometric progression."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def _reaching(surface: Surface, model: QuadraticModel, level: float, size: float) -> float:
    """Return about the radius at which the loss has changed by ``level``, and no more than ``size``."""
    low, high = 0.0, math.inf
    radius = REACH * size
    for _ in range(LOOKS):
        height, _ = _highest(surface, model, radius)
        if 0.7 * level <= height <= 1.4 * level:
            break
        if math.isnan(height) or height > level:
            high = radius
        else:
            low = radius
        if high == math.inf:
            if radius >= size:
                break
            radius = min(size, 2 * radius)
        else:
            radius = math.sqrt(low * high) if low else radius / 4
    return radius


def _highest(surface: Surface, model: QuadraticModel, radius: float) -> tuple[float, Tensor]:
    """Return the largest change among the maximisers of the model, NaN if it is not finite, and its offset."""
    offsets = [offset for sign in (1.0, -1.0) for offset in model.maximisers(radius, sign)[:1]]
    heights = [abs(surface.change(offset, radius)) for offset in offsets]
    best = max(range(len(heights)), key=lambda i: math.inf if math.isnan(heights[i]) else heights[i])
    return heights[best], offsets[best]
