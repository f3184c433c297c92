"""Figures of flatness profiles r ↦ f°(x, r): one point's, and two points' held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchflat.drawing import BLUE, GREEN, GREY, INK, ORANGE, nan, panels, powers
from torchflat.flatness.profiles import CURVED

__all__ = ["comparison", "profile"]

# The scale begins at the rounding floor, and no further below the smallest value than this.
DEEPEST = 1e-5


def profile(report: Mapping[str, Any]) -> Figure:
    """Draw f° against r, the rounding floor below it, and what gradient and curvature alone would give."""
    part, radii, values = report["variation"], *_known(report["variation"])
    sharpness = report.get("sharpness", {}).get("value")
    with panels(8, 4.8) as (figure, (axes,)):
        axes.plot(radii, values, color=BLUE, marker="o", markersize=5, label="largest change within r", zorder=3)
        _floor(axes, part)
        _reference(axes, radii, [part["gradient_norm"] * r for r in radii], ORANGE, "gradient alone: |∇f| r")
        if sharpness is not None and sharpness > 0:
            _reference(axes, radii, [sharpness * r * r / 2 for r in radii], GREEN, "curvature alone: ½ λ₁ r²")
        for key, style, label in (
            ("curvature_radius", (0, (1, 2)), "curvature shows: 2|∇f|/λ₁"),
            ("doubling_radius", (0, (6, 3)), "change = the loss itself"),
        ):
            radius = part.get(key)
            if radius is not None and radii[0] / 2 < radius < 2 * radii[-1]:
                axes.axvline(radius, color=GREY, linewidth=1.4, linestyle=style, label=label)
        axes.set(xlabel="distance r from the point", ylabel="change of the loss")
        axes.set_title("Flatness profile")
        floors = [low for low in part["floor"] if low]
        powers(axes, "x", radii[0] / 1.2, radii[-1] * 1.2)
        powers(axes, "y", max(min(floors, default=0) / 2, DEEPEST * values[0]), 2 * values[-1])
        figure.legend(loc="outside lower left", ncols=3, handlelength=2)
        return figure


def comparison(content: Mapping[str, Any]) -> Figure | None:
    """Draw the profiles of A and B with their errors, and below their ratio with its error and the tolerance.

    None where fewer than two radii have values that a logarithmic scale can show.
    """
    if any(len(_known(content[side]["variation"])[0]) < 2 for side in ("first", "second")):
        return None
    radii, tolerance = content["radii"], content["tolerance"]
    first, second = content["first"]["variation"], content["second"]["variation"]
    with panels(8, 6.6, rows=2, heights=(1.5, 1)) as (figure, (above, below)):
        for name, part, colour in (("A", first, BLUE), ("B", second, ORANGE)):
            shown, values = _known(part)
            errors = [low + share * value for low, share, value in zip(*_columns(part), strict=True)]
            low = [max(value - error, 0.0) for value, error in zip(values, errors, strict=False)]
            high = [value + error for value, error in zip(values, errors, strict=False)]
            above.fill_between(shown, low, high, color=colour, alpha=0.25, linewidth=0)
            above.plot(shown, values, color=colour, marker="o", markersize=5, label=f"{name}: largest change within r")
            _reference(above, shown, [part["gradient_norm"] * r for r in shown], colour, f"{name}: gradient alone")
        highest = [max(a, b) for a, b in zip(first["values"], second["values"], strict=False)]
        lowest = [min(a, b) for a, b in zip(first["values"], second["values"], strict=False)]
        powers(above, "y", min(value for value in lowest if value > 0) / 2, 2 * max(highest))
        above.set_title("Flatness profiles of A and B")
        above.set_ylabel("change of the loss")
        _ratio(below, radii, content, second["values"], tolerance)
        _shade_curved(below, radii, first, second)
        figure.legend(loc="outside lower left", ncols=3, handlelength=2)
        for axes in (above, below):
            powers(axes, "x", radii[0] / 1.2, max(first["radii"][-1], second["radii"][-1]) * 1.2)
        below.set_xlabel("distance r from the point")
        return figure


def _ratio(
    axes: Axes, radii: Sequence[float], content: Mapping[str, Any], base: Sequence[float], tolerance: float
) -> None:
    """Draw A/B: one plus difference over the value of B, within the error of the difference."""
    rows = [
        (r, 1 + d / b, e / b)
        for r, d, e, b in zip(radii, content["differences"], content["errors"], base, strict=False)
        if b > 0
    ]
    shown, ratio, error = ([row[i] for row in rows] for i in range(3))
    low, high = ([max(a + sign * e, 1e-3) for a, e in zip(ratio, error, strict=True)] for sign in (-1, 1))
    axes.axhspan(1 - tolerance, 1 + tolerance, color=GREY, alpha=0.3, linewidth=0, label="tolerance")
    axes.axhline(1, color=INK, linewidth=1)
    axes.fill_between(shown, low, high, color=BLUE, alpha=0.25, linewidth=0, label="error")
    axes.plot(shown, ratio, color=BLUE, marker="o", markersize=5)
    axes.set_title("A / B: below 1, A is flatter")
    axes.set_ylabel("ratio")
    least, most = min([*low, 1 - 2 * tolerance]), max([*high, 1 + 2 * tolerance])
    if most > 3 * least:
        powers(axes, "y", least / 1.2, most * 1.2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(least - 0.1 * (most - least), most + 0.1 * (most - least))


def _shade_curved(axes: Axes, radii: Sequence[float], first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Shade the radii at which the profiles of both are above twice the gradient's share."""
    curved = [
        r
        for i, r in enumerate(radii)
        if all(part["values"][i] > CURVED * part["gradient_norm"] * r for part in (first, second))
    ]
    if curved:
        low, high = curved[0], curved[-1]
        axes.axvspan(low / 1.05, high * 1.05, color=GREEN, alpha=0.12, linewidth=0, label="curvature shows in both")


def _known(part: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return radii and values, without those that a logarithmic scale cannot show."""
    known = [(r, value) for r, value in zip(part["radii"], part["values"], strict=True) if value]
    return [r for r, _ in known], [value for _, value in known]


def _columns(part: Mapping[str, Any]) -> tuple[list[float], list[float], list[float]]:
    rows = [
        (nan(low), nan(share), value)
        for low, share, value in zip(part["floor"], part["accuracy"], part["values"], strict=True)
        if value
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _floor(axes: Axes, part: Mapping[str, Any]) -> None:
    rows = [(r, low) for r, low in zip(part["radii"], part["floor"], strict=True) if low]
    if rows:
        shown, floor = [r for r, _ in rows], [low for _, low in rows]
        axes.fill_between(shown, 0, floor, color=GREY, alpha=0.35, linewidth=0, label="rounding")


def _reference(axes: Axes, radii: Sequence[float], values: Sequence[float], colour: str, label: str) -> None:
    if any(value > 0 for value in values):
        axes.plot(radii, values, color=colour, linewidth=1, linestyle=(0, (4, 2)), label=label, zorder=2)
