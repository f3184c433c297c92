"""The style of all figures, and what they share."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE", "logarithmic", "nan", "panels", "png", "powers", "svg"]

# Okabe and Ito's palette: told apart with any colour vision, and in grey by their lightness.
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#1F2328"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#B4B9C1",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titlepad": 10,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.8,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "text.color": INK,
    "text.parse_math": False,  # names are the user's: a dollar sign is a dollar sign
    "xtick.color": "#565C66",
    "xtick.labelsize": 11,
    "ytick.color": "#565C66",
    "ytick.labelsize": 11,
}


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG with two pixels to each pixel of a 96 dpi screen."""
    return _saved(figure, format="png", dpi=192, metadata={"Software": None})


def svg(figure: Figure) -> bytes:
    """Return the figure as an SVG; the same figure gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "torchflat"}):
        return _saved(figure, format="svg", metadata={"Date": None, "Creator": None})


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names in scripts that the font lacks
        figure.savefig(buffer, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def panels(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    widths: Sequence[float] | None = None,
    share_y: bool = False,
    heights: Sequence[float] | None = None,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Give a figure of ``width`` by ``height`` inches and its panels, and keep the style in force meanwhile."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths, height_ratios=heights, sharey=share_y)
        yield figure, [axes for row in grid for axes in row]


def logarithmic(axes: Axes) -> None:
    """Give the vertical axis whole powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def powers(axes: Axes, which: str, low: float, high: float) -> None:
    """Give the ``x`` or ``y`` axis a logarithmic scale between two values, with more and plainer labels if close."""
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    close = high < 100 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,), numticks=9))
    plain = close and low >= 1e-3 and high <= 1e4
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if plain else _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    """Return 10⁻³, or 2·10⁻³ between the powers."""
    if value <= 0:
        return ""
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**power)
    raised = "10" + str(power).translate(_RAISED)
    return raised if digit == 1 else f"{digit}·{raised}"


def nan(value: float | None) -> float:
    """Return the number, or NaN, which leaves a gap in a line, for one that is not known."""
    return math.nan if value is None else float(value)
