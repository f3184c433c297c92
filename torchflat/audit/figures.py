"""The figures of a report, drawn with matplotlib in one style. Each function takes the report's dict.

A figure is made without pyplot: nothing global is touched, and no display is needed. :func:`png` renders one at twice
the density of a screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchflat.audit.orbit_figures import balance, drawable
from torchflat.audit.profile_figures import profile
from torchflat.audit.report import eigenvalue_name
from torchflat.drawing import BLUE, GREEN, GREY, INK, ORANGE, logarithmic, nan, panels, png
from torchflat.numerals import shorten

__all__ = ["FIGURES", "blocks", "convergence", "density", "draw", "eigenvalues", "png", "trajectory"]

BLOCKS_SHOWN = 20


def draw(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of the parts that the report has, by name, in the order of :data:`FIGURES`."""
    pairs = report.get("eigenvalues", {"largest": [], "smallest": []})
    points = {
        "convergence": [entry["value"] for entry in report.get("sharpness", {}).get("history", [])],
        "eigenvalues": [row["value"] for row in pairs["largest"] + pairs["smallest"]],
        "density": report.get("density", {}).get("density", []),
        "blocks": [row["value"] for row in report.get("blocks", {}).get("rows", [])],
        "profile": [value or None for value in report.get("variation", {}).get("values", [])],
        "balance": [row["imbalance"] for row in drawable(report.get("laws", {}))],
    }
    least = {"convergence": 2, "eigenvalues": 1, "density": 2, "blocks": 1, "profile": 2, "balance": 1}
    known = {name: sum(value is not None for value in values) for name, values in points.items()}
    return {name: figure(report) for name, figure in FIGURES.items() if known[name] >= least[name]}


def density(report: Mapping[str, Any]) -> Figure:
    """Draw the spectral density on a logarithmic scale, with its standard error; known eigenvalues are ticks."""
    part = report["density"]
    grid, values = part["grid"], [math.nan if value is None else value for value in part["density"]]
    errors = [error or 0.0 for error in part.get("standard_error", [0.0] * len(grid))]
    single = _height_of_one_eigenvalue(report)
    top = max((value for value in values if value > 0), default=1.0)
    floor = min(single / 10, top / 100) if single else top * 1e-6
    with panels(8, 4.2) as (figure, (axes,)):
        for sign, colour, label in ((1, BLUE, "positive"), (-1, ORANGE, "negative")):
            part_of = [sign * x >= 0 for x in grid]
            if not any(part_of) or not any(
                inside and value > floor for inside, value in zip(part_of, values, strict=True)
            ):
                continue
            shown = [max(value, floor) for value in values]
            low = [max(value - error, floor) for value, error in zip(values, errors, strict=True)]
            high = [max(value + error, floor) for value, error in zip(values, errors, strict=True)]
            axes.fill_between(grid, floor, shown, where=part_of, color=colour, alpha=0.14, linewidth=0)
            axes.fill_between(grid, low, high, where=part_of, color=colour, alpha=0.35, linewidth=0)
            axes.plot(
                grid,
                [v if inside else math.nan for v, inside in zip(shown, part_of, strict=True)],
                color=colour,
                label=label,
            )
        axes.axvline(0, color=INK, linewidth=1)
        if single:
            axes.axhline(single, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="height of one eigenvalue")
        if part.get("exact"):
            axes.plot(
                part["exact"],
                [floor] * len(part["exact"]),
                "|",
                color=INK,
                markersize=16,
                markeredgewidth=1.8,
                label="known eigenvalues",
                clip_on=False,
            )
        axes.set(ylim=(floor, 3 * top), xlabel="eigenvalue of the Hessian", ylabel="share per unit")
        axes.set_xlim(grid[0], grid[-1])
        axes.set_title("Spectral density")
        axes.legend(loc="upper right", ncols=2, borderaxespad=0, handlelength=1.4, columnspacing=1.2)
        logarithmic(axes)
        return figure


def _height_of_one_eigenvalue(report: Mapping[str, Any]) -> float | None:
    """Return the density at the centre of a smoothed eigenvalue that occurs once: 1 / (n width sqrt(2 pi))."""
    width, parameters = report["density"].get("width"), report.get("point", {}).get("parameters")
    return 1 / (parameters * width * math.sqrt(2 * math.pi)) if width and parameters else None


def convergence(report: Mapping[str, Any]) -> Figure:
    """Draw λ₁ with its interval, and the relative width of the interval, against the gradients spent."""
    history = report["sharpness"]["history"]
    # Reports of older versions have no costs there.
    unit = "gradients" if all("gradients" in entry for entry in history) else "products"
    spent = [entry[unit] for entry in history]
    with panels(8, 3.6, columns=2) as (figure, (left, right)):
        _band(left, spent, history)
        left.set(xlabel=f"cost, in {unit}", ylabel="λ₁")
        left.set_title("Interval of λ₁")
        _focus(left, history)
        known = [(entry[unit], width) for entry in history if (width := _relative_width(entry))]
        if known:
            right.plot(*zip(*known, strict=True), color=BLUE, marker="o", markersize=4)
            # Whole decades: else there may be no labelled tick at all.
            powers = [math.log10(width) for _, width in known]
            right.set_ylim(10.0 ** math.floor(min(powers)), 10.0 ** math.ceil(max(powers) + 1e-9))
            logarithmic(right)
        right.set(xlabel=f"cost, in {unit}", xlim=left.get_xlim())
        right.set_title("Width of the interval / |λ₁|")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        return figure


def _relative_width(entry: Mapping[str, Any]) -> float | None:
    lower, value, upper = entry["lower"], entry["value"], entry["upper"]
    if lower is None or upper is None or not value:
        return None
    return float((upper - lower) / abs(value))


def _band(axes: Axes, x: Sequence[float], entries: Sequence[Mapping[str, Any]]) -> None:
    """Draw values as a line with their intervals as a band; a bound that is not known leaves a gap in the band."""
    value, lower, upper = ([nan(entry[key]) for entry in entries] for key in ("value", "lower", "upper"))
    axes.fill_between(x, lower, upper, color=BLUE, alpha=0.22, linewidth=0)
    # A band has no width where only one entry has bounds.
    axes.vlines(x, lower, upper, color=BLUE, alpha=0.5, linewidth=1.5)
    axes.plot(x, value, color=BLUE, marker="o", markersize=4)


def _focus(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    """Limit the scale to what the values span, and twice that above: the first bounds can be far off."""
    values = [entry["value"] for entry in entries if entry["value"] is not None]
    last = entries[-1]
    if not values or last["upper"] is None or last["lower"] is None:
        return
    low, high = min(*values, last["lower"]), max(*values, last["upper"])
    if high > low:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low))


def eigenvalues(report: Mapping[str, Any]) -> Figure:
    """Draw the largest and the smallest eigenvalues with their intervals."""
    pairs = report["eigenvalues"]
    sides = [(pairs["largest"], False), (pairs["smallest"], True)]
    sides = [(rows, smallest) for rows, smallest in sides if rows]
    with panels(8, 3.6, columns=len(sides)) as (figure, both):
        for axes, (rows, smallest) in zip(both, sides, strict=True):
            names = [eigenvalue_name(index, smallest) for index in range(len(rows))]
            if smallest:
                rows, names = rows[::-1], names[::-1]
            colours = [ORANGE if (row["value"] or 0) < 0 else BLUE for row in rows]
            for x, (row, colour) in enumerate(zip(rows, colours, strict=True)):
                _interval(axes, x, row, colour)
            if not smallest:
                _fresh_data(axes, report.get("sharpness", {}).get("sampling"))
            axes.set_title("Smallest eigenvalues" if smallest else "Largest eigenvalues")
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.grid(axis="x", visible=False)
            low, high = axes.get_ylim()
            if low < 0 < high:
                axes.axhline(0, color=INK, linewidth=1)
        return figure


def _fresh_data(axes: Axes, sampling: Mapping[str, Any] | None) -> None:
    """Draw behind λ₁ where it would lie on fresh data of the same size: wider and paler than any interval."""
    if sampling is None or sampling["lower"] is None or sampling["upper"] is None:
        return
    style: dict[str, Any] = {"color": GREY, "linewidth": 22, "alpha": 0.25, "solid_capstyle": "butt", "zorder": 1}
    axes.plot([0, 0], [sampling["lower"], sampling["upper"]], label="λ₁ on fresh data", **style)
    axes.legend(loc="upper right", handlelength=0.8)


def _interval(axes: Axes, x: float, row: Mapping[str, Any], colour: str) -> None:
    """Draw a number as a dot on the bar of its interval, or as a triangle that points to where it has no bound."""
    lower, upper = nan(row["lower"]), nan(row["upper"])
    axes.plot([x, x], [lower, upper], color=colour, linewidth=8, alpha=0.35, solid_capstyle="butt")
    marker = "^" if row["upper"] is None else "v" if row["lower"] is None else "o"
    axes.plot([x], [nan(row["value"])], marker, color=colour, markersize=5 if marker == "o" else 8)


def blocks(report: Mapping[str, Any]) -> Figure:
    """Draw the sharpest blocks: their own λ₁ with its interval, and their share of the top eigenvector."""
    rows = [row for row in report["blocks"]["rows"] if row["value"] is not None]
    total, rows = len(report["blocks"]["rows"]), sorted(rows, key=lambda row: -row["value"])[:BLOCKS_SHOWN]
    positions = range(len(rows))
    with panels(8, 1.3 + 0.3 * max(len(rows), 3), columns=2, widths=(2.2, 1), share_y=True) as (figure, (left, right)):
        left.barh(positions, [row["value"] for row in rows], height=0.62, color=BLUE)
        for y, row in zip(positions, rows, strict=True):
            left.plot(
                [nan(row["lower"]), nan(row["upper"])], [y, y], color=INK, linewidth=1.6, marker="|", markersize=7
            )
        left.set_yticks(positions, [shorten(row["name"], 32) for row in rows])
        left.invert_yaxis()
        left.set_title("λ₁ of the block" if len(rows) == total else f"λ₁ of the block: {len(rows)} sharpest of {total}")
        right.barh(positions, [100 * nan(row.get("share")) for row in rows], height=0.62, color=GREEN)
        right.set_title("% of top vector")
        right.tick_params(labelleft=False)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.axvline(0, color=INK, linewidth=1)
        return figure


def trajectory(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Draw λ₁ with its interval, and the loss, along a series of checkpoints."""
    unknown = dict.fromkeys(("value", "lower", "upper"))
    entries = [report.get("sharpness", unknown) for report in reports]
    positions = range(len(reports))
    with panels(8, 5, rows=2) as (figure, (above, below)):
        above.plot(positions, [nan(entry["value"]) for entry in entries], color=BLUE, linewidth=1.2)
        for x, entry in zip(positions, entries, strict=True):
            _interval(above, x, entry, BLUE)
        above.set_title("λ₁ with its interval")
        above.set_xlim(-0.4, len(reports) - 0.6)
        above.set_xticks(positions, [])
        below.plot(
            positions,
            [nan(report.get("point", {}).get("loss")) for report in reports],
            color=ORANGE,
            marker="s",
            markersize=4,
        )
        below.set_title("Loss")
        below.set_xlim(-0.4, len(reports) - 0.6)
        every = math.ceil(len(names) / 12)
        below.set_xticks(
            positions[::every], [shorten(name, 18) for name in _stems(names)[::every]], rotation=30, ha="right"
        )
        return figure


def _stems(names: Sequence[str]) -> Sequence[str]:
    """Return the names without their extensions, unless these tell them apart."""
    stems = [PurePath(name).stem for name in names]
    return stems if len(set(stems)) == len(set(names)) else names


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "convergence": convergence,
    "eigenvalues": eigenvalues,
    "density": density,
    "blocks": blocks,
    "profile": profile,
    "balance": balance,
}
