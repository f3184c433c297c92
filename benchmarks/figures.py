"""The plot of ``benchmarks.sharpness``: error and interval width over time, and the time of each method."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.records import Records
from torchflat.drawing import BLUE, GREEN, GREY, INK, ORANGE, panels, powers

__all__ = ["draw"]

COLORS = {"torchflat": BLUE, "pyhessian": ORANGE, "curvlinops": GREEN, "hessian-eigenthings": GREY}
KEYS = {"pyhessian": "tol", "curvlinops": "tol", "hessian-eigenthings": "max_iter"}
LEAST = 1e-7


def draw(records: Records, folder: Path) -> None:
    """Write ``<folder>.png`` and ``<folder>.svg``: a row of two panels for each network at its most rows."""
    networks = dict.fromkeys(record["network"] for record in records.all)
    places = [(network, records.sizes(network)[-1]) for network in networks if records.sizes(network)]
    if not places:
        return
    with panels(12, 4 * len(places), rows=len(places), columns=2) as (figure, axes):
        for (network, rows), left, right in zip(places, axes[::2], axes[1::2], strict=True):
            convergence(left, records, network, rows)
            left.set_title(f"{network}, {rows} rows", loc="left")
            bars(right, records, network, rows)
        for suffix in (".png", ".svg"):
            figure.savefig(folder.with_suffix(suffix), dpi=150)


def convergence(panel: Axes, records: Records, network: str, rows: int) -> None:
    """Draw torchflat's error and width along its default run, and each peer's error in the color of its bar."""
    truth, own = records.truth(network, rows), records.find(network, rows, "torchflat")
    if truth is not None and own is not None:
        unit = own["seconds"] / own["gradients"]
        value = truth["value"]
        times = [seconds / unit for seconds, *_ in own["trace"]]
        errors = [max(abs(each / value - 1), LEAST) for _, each, *_ in own["trace"]]
        widths = [math.nan if up is None else (up - low) / abs(value) for _, _, low, up in own["trace"]]
        panel.plot(times, errors, "o-", color=COLORS["torchflat"], label="torchflat, error")
        panel.plot(times, widths, "s--", color=COLORS["torchflat"], label="torchflat, width of the interval")
    for peer, key in KEYS.items():
        runs = [run for run in records.of(network, rows, peer, key) if run["value"] is not None]
        points = sorted((run["gradients"], max(records.error(run), LEAST)) for run in runs)
        if points:
            panel.plot(*zip(*points, strict=True), "D:", color=COLORS[peer])
    panel.axhline(1e-3, color=INK, linewidth=0.8)
    powers(panel, "x", panel.dataLim.x0 / 1.25, 1.25 * panel.dataLim.x1)
    powers(panel, "y", panel.dataLim.y0 / 3, 3 * panel.dataLim.y1)
    panel.set(xlabel="time in gradients", ylabel="relative to λ₁")
    panel.legend()


def bars(panel: Axes, records: Records, network: str, rows: int) -> None:
    """Draw the time to the interval and, inside, to the value; the peers have the value only."""
    settings = {"default": {}, "rtol=0.003": {"rtol": 3e-3}, "rtol=0.001": {"rtol": 1e-3}}
    found = {
        f"torchflat, {name}": records.find(network, rows, "torchflat", **asked) for name, asked in settings.items()
    }
    found |= {peer: records.of_peer(network, rows, peer) for peer in KEYS}
    shown = {name: run for name, run in found.items() if run is not None}
    for place, run in enumerate(shown.values()):
        color = COLORS[run["method"]]
        panel.barh(place, run["gradients"], color=color, alpha=0.4)
        value = records.to_value(run)
        if not math.isinf(value):
            panel.barh(place, value, color=color)
        note = f" > {run['gradients']:.0f}, stopped" if run["status"] == "stopped" else f" {run['gradients']:.0f}"
        panel.text(run["gradients"], place, note, va="center", fontsize=8)
    panel.set_yticks(range(len(shown)), list(shown))
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set(xlabel="time in gradients; pale: to the interval", title="to the value")
