"""The figure of a training run that was tracked: loss and norms, drift of the laws, and λ₁ at the edge of stability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchflat.drawing import BLUE, GREEN, GREY, INK, ORANGE, nan, panels, powers
from torchflat.numerals import shorten

__all__ = ["tracking"]

# Laws that get a line of their own, those that drift most; the others are drawn in grey.
SHOWN = 6
STYLES = ("-", (0, (4, 2)))
# A scale shows no more than this below its top.
DEEPEST = 1e-8

Columns = Mapping[str, Sequence[Any]]


def tracking(history: Columns) -> Figure:
    """Draw the columns of ``Tracker.history`` against the step."""
    steps = history["step"]
    drifts = [name for name in history if name.startswith("drift/") and _positive(history[name])]
    edges = [name for name in ("edge", "sharpness") if any(value is not None for value in history.get(name, ()))]
    rows = 1 + bool(drifts) + bool(edges)
    with panels(8, 1 + 2.7 * rows, rows=rows) as (figure, axes):
        _course(axes[0], steps, history)
        if drifts:
            _drifts(axes[1], steps, history, drifts)
        if edges:
            _edge(axes[-1], steps, history, edges[0])
        for each in axes:
            each.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
            each.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes[-1].set_xlabel("step")
        return figure


def _course(axes: Axes, steps: Sequence[int], history: Columns) -> None:
    for name, colour, label, style in (
        ("loss", BLUE, "loss", "-"),
        ("gradient_norm", ORANGE, "|∇f|", "-"),
        ("parameter_norm", GREEN, "|x|", "-"),
        ("norm_bound", GREEN, "bound of |x|", STYLES[1]),
        ("sum_length", GREY, "path length Σα", STYLES[1]),
    ):
        if _positive(history.get(name, ())):
            _line(axes, steps, history[name], color=colour, label=label, linestyle=style)
    names = ("loss", "gradient_norm", "parameter_norm", "norm_bound", "sum_length")
    axes.set_title("Loss and norms")
    _scaled(axes, [value for name in names for value in map(nan, history.get(name, ()))])
    _legend(axes)


def _drifts(axes: Axes, steps: Sequence[int], history: Columns, names: Sequence[str]) -> None:
    """Draw |C(x) − C(x₀)| of each law, those that drift most with a name."""
    largest = sorted(names, key=lambda name: -max(filter(math.isfinite, map(nan, history[name])), default=0.0))
    chosen = [name for name in names if name in largest[:SHOWN]]
    for name in names:
        if name not in chosen:
            _line(axes, steps, history[name], color=GREY, linewidth=0.8, alpha=0.7)
    styles = itertools.product(STYLES, (BLUE, ORANGE, GREEN))
    for name, (style, colour) in zip(chosen, styles, strict=False):
        label = shorten(name.removeprefix("drift/"), 24)
        _line(axes, steps, history[name], color=colour, linestyle=style, linewidth=1.6, label=label)
    more = len(names) - len(chosen)
    axes.set_title("Drift of each law, |C(x) − C(x₀)|" + (f": {more} smaller ones in grey" if more else ""))
    _scaled(axes, [value for name in names for value in map(nan, history[name])])
    _legend(axes)


def _edge(axes: Axes, steps: Sequence[int], history: Columns, name: str) -> None:
    """Draw η·λ₁ with the limit 2, or λ₁ alone where no η is known; what did not settle is hollow."""
    rows = [
        (step, value, status)
        for step, value, status in zip(steps, history[name], history["sharpness_status"], strict=True)
        if value is not None and math.isfinite(value)
    ]
    axes.plot([row[0] for row in rows], [row[1] for row in rows], color=BLUE, linewidth=1.6)
    for settled, face, label in ((True, BLUE, "settled"), (False, "white", "not settled: at least this")):
        part = [row for row in rows if (row[2] != "BUDGET") == settled]
        if part:
            x, y = [row[0] for row in part], [row[1] for row in part]
            axes.plot(x, y, "o", color=BLUE, markerfacecolor=face, markersize=5, label=label)
    values = [row[1] for row in rows]
    if name == "edge":
        axes.axhline(2, color=INK, linewidth=1.2, linestyle=STYLES[1], label="edge of stability: 2")
        values.append(2.0)
    if min(values) > 0 and max(values) > 20 * min(values):
        _scaled(axes, values)
    else:
        axes.set_ylim(min(0.0, 1.1 * min(values)), 1.2 * max(values))
    axes.set_title("η·λ₁" if name == "edge" else "λ₁")
    _legend(axes)


def _scaled(axes: Axes, values: Sequence[float]) -> None:
    """Give the vertical axis a logarithmic scale for the values that it can show."""
    known = [value for value in values if 0 < value < math.inf]
    if known:
        top = max(known)
        powers(axes, "y", max(min(known), DEEPEST * top) / 1.5, 1.5 * top)


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.8, borderaxespad=0)


def _line(axes: Axes, steps: Sequence[int], values: Sequence[Any], **style: Any) -> None:
    """Draw what is known and positive; a few values are marked, as a line may have gaps."""
    shown = [value if value > 0 else math.nan for value in map(nan, values)]
    axes.plot(steps, shown, **style, marker="o" if len(steps) < 20 else None, markersize=3)


def _positive(values: Sequence[Any]) -> bool:
    return any(value is not None and math.isfinite(value) and value > 0 for value in values)
