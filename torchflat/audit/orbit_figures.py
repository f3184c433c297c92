"""The figure of the imbalance of each coupling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from torchflat.drawing import BLUE, GREEN, INK, panels, powers
from torchflat.numerals import shorten

__all__ = ["SHOWN", "balance", "drawable"]

SHOWN = 20


def drawable(laws: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the couplings that have ratios, the least balanced first where not all can be shown."""
    known = (row for row in laws.get("couplings", []) if row["ratios"] and row["imbalance"] is not None)
    rows = [row for row in known if row["ratios"][0] > 0]
    if len(rows) <= SHOWN:
        return rows
    worst = sorted(rows, key=lambda row: -row["imbalance"])[:SHOWN]
    return [row for row in rows if any(row is one for one in worst)]


def balance(report: Mapping[str, Any]) -> Figure:
    """Draw |writers|/|readers| over the channels of each coupling, from least to largest, and its imbalance."""
    rows, total = drawable(report["laws"]), len(report["laws"]["couplings"])
    positions = range(len(rows))
    with panels(8, 1.5 + 0.3 * max(len(rows), 3), columns=2, widths=(2.2, 1), share_y=True) as (figure, (left, right)):
        for y, row in zip(positions, rows, strict=True):
            low, first, middle, third, high = row["ratios"]
            left.plot([low, high], [y, y], color=BLUE, linewidth=1.6, marker="|", markersize=7)
            left.plot([first, third], [y, y], color=BLUE, linewidth=9, alpha=0.35, solid_capstyle="butt")
            left.plot([middle], [y], "o", color=BLUE, markersize=5)
        left.axvline(1, color=INK, linewidth=1)
        ends = [end for row in rows for end in (row["ratios"][0], row["ratios"][-1])]
        powers(left, "x", min(*ends, 0.5) / 1.2, max(*ends, 2) * 1.2)
        left.xaxis.set_major_formatter("{x:g}")
        left.set_yticks(positions, [shorten(row["name"], 32) for row in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        left.set_title("|writers| / |readers|" + ("" if len(rows) == total else f": {len(rows)} of {total}"))
        right.barh(positions, [row["imbalance"] for row in rows], height=0.62, color=GREEN)
        right.set(xlim=(0, 1.02), xticks=(0, 0.5, 1))
        right.set_title("imbalance")
        right.tick_params(labelleft=False)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        return figure
