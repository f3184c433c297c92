"""*Unique Properties of Flat Minima*, Figures 4 and 5: how sharp SGD leaves a denoiser, by depth, step size and start.

ReLU networks of m layers as wide as the image are trained to take the noise off MNIST, from the identity (Figure 4)
and from He's random weights (Figure 5), with steps η from small to too large. SGD stays only where λ₁ ≤ 2/η (T070), so
that the flattest a network can be, which grows with its depth (T061), says how large a step can be.

The largest stable step of a depth is that up to which every step of the grid ends where it can stay. Beyond it, a run
need not diverge: from the identity, most end with some units dead, or all of them, where the loss is flat again but no
longer low. A network is called untrained where its loss is not finite, or no better than that of the answer 0. What
counts as stable was settled after a quick run, in which nearly every step up to the largest ended with a finite loss.

The sheet has 0.28 as the largest step with which 18 layers of 784 units train from He's weights (T072). The narrower
ones of the quick scale bear a little more, so that the correction only says that it is below 2.25.

The paper does not say for how long it trained, and its losses are below those here (T072): these are sharpnesses early
in training. λ₁ is of the loss on some of the rows that were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments import denoiser
from experiments.cells import Cells, Key
from experiments.claim import Claim
from torchflat import Objective, sharpness
from torchflat.drawing import BLUE, GREY, ORANGE, nan, panels, powers
from torchflat.errors import NonFiniteError, UsageError

TITLE = "Unique Properties of Flat Minima, Figures 4 and 5: sharpness of MNIST denoisers over depth and step size"

STARTS = {"identity": "the identity", "he": "He's weights"}
COLOURS = {"identity": BLUE, "he": ORANGE}
MARKS = {"x": "×: diverges", "_": "–: no better than the answer 0", ".": "•: λ₁ > 2/η"}
# A network trains if its loss is below that of the answer 0 by at least this share: one that died is just below.
BETTER = 0.02

CLAIMS = (
    # A grid of ratio √2 knows a largest step to that factor, so that a line over depths 2 to 18 may tilt by ± 0.16.
    Claim(
        "largest_step",
        "from the identity, the largest stable step falls like 1/m: its slope over m, both in logarithms",
        "Figure 4(a), T070",
        (-1.3, -0.7),
    ),
    Claim(
        "linear",
        "from the identity, the flattest λ₁ of a depth grows linearly with it: R² of a straight line",
        "Figure 4(b), T061",
        (0.9, 1),
    ),
    Claim(
        "he_steps",
        "He's weights bear smaller steps only: largest ratio of the largest stable step to that from the identity",
        "Figure 5(a)",
        (0, 1),
    ),
    Claim(
        "he_sharper",
        "He's weights end sharper: least ratio of the flattest λ₁ of a depth to that from the identity",
        "Figure 5(a)",
        (1, math.inf),
    ),
    Claim(
        "curve_identity",
        "18 layers train from the identity with steps of 2.25: loss at the end over that of the answer 0",
        "Figure 5(b), T072",
        (0, 1 - BETTER),
    ),
    Claim(
        "curve_he",
        "18 layers train from He's weights with steps of 2.25: the largest step with which they do",
        "Figure 5(b), T072",
        (2.25, math.inf),
        corrected=(0, 2.25),
    ),
)

TRAINED_WITH = ("side", "rows", "epochs", "batch", "sharpness_rows", "sharpness_rtol")


@dataclass(frozen=True)
class Config:
    """Depths and step sizes of the tiles, and what each is trained on."""

    depths: tuple[int, ...]
    identity: tuple[float, ...]
    he: tuple[float, ...]
    curve_step: float
    side: int
    rows: int
    epochs: int
    batch: int
    sharpness_rows: int
    sharpness_rtol: float
    seeds: tuple[int, ...]


def run(config: Config, cells: Cells) -> dict[str, Any]:
    """Train seed by seed, so that what is there after a stop is a grid."""
    grids = {"identity": config.identity, "he": config.he}
    if not all(config.curve_step in steps for steps in grids.values()):
        raise UsageError(f"curve_step = {config.curve_step} is not in both grids: add it to identity and he")
    tiles = [
        {"start": start, "depth": depth, "step": step, "seed": seed}
        for seed in config.seeds
        for start, steps in grids.items()
        for depth in config.depths
        for step in steps
    ]
    shared = {name: value for name, value in asdict(config).items() if name in TRAINED_WITH}
    records = cells.map("networks", [{**tile, **shared} for tile in tiles], trained)
    clean = denoiser.noisy("train", config.rows, config.side)[1]
    return {
        "blind": float(clean.double().square().mean()),
        "curve_step": config.curve_step,
        "tiles": [{**tile, **record} for tile, record in zip(tiles, records, strict=True)],
    }


def trained(key: Key, scratch: Path) -> dict[str, Any]:
    """Train one network; return its loss epoch by epoch and at the end, and λ₁ there, all None where not finite."""
    inputs, targets = denoiser.noisy("train", key["rows"], key["side"])
    network = denoiser.build(key["depth"], key["seed"], key["start"], key["side"])
    optimizer = torch.optim.SGD(network.parameters(), key["step"])
    told = f"{key['start']}, {key['depth']} layers, step {key['step']:g}"
    curve = denoiser.train(
        network, optimizer, (inputs, targets), key["epochs"], key["batch"], key["seed"], scratch, told
    )
    losses = [finite(row["loss"]) for row in curve]
    diverged = {"losses": losses, "loss": None, "sharpness": None, "status": None}
    loss = finite(denoiser.mean_loss(network, (inputs, targets)))
    if losses[-1] is None or loss is None:
        return diverged
    some = slice(key["sharpness_rows"])
    try:
        top = sharpness(Objective(network.eval(), denoiser.LOSS, (inputs[some], targets[some])), key["sharpness_rtol"])
    except NonFiniteError:  # on its way there: the loss is still a number, its second derivatives are not
        return diverged
    return {"losses": losses, "loss": loss, "sharpness": top.value, "status": top.status.name}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Tile:
    """What became of all seeds of a depth and a step: λ₁ is their median, None if one diverged."""

    step: float
    sharpness: float | None
    trains: bool

    @property
    def stays(self) -> bool:
        """Whether SGD can stay where it ended (T070)."""
        return self.sharpness is not None and self.step * self.sharpness <= 2


def tiles(data: dict[str, Any], start: str) -> dict[int, list[Tile]]:
    """Return the tiles of each depth, from the smallest step on."""
    found: dict[int, dict[float, list[dict[str, Any]]]] = {}
    for run in sorted(data["tiles"], key=lambda run: (run["depth"], run["step"])):
        if run["start"] == start:
            found.setdefault(run["depth"], {}).setdefault(run["step"], []).append(run)
    return {
        depth: [merged(step, runs, (1 - BETTER) * data["blind"]) for step, runs in row.items()]
        for depth, row in found.items()
    }


def merged(step: float, runs: list[dict[str, Any]], enough: float) -> Tile:
    values = [run["sharpness"] for run in runs]
    trains = all(run["loss"] is not None and run["loss"] <= enough for run in runs)
    return Tile(step, None if None in values else median(values), trains)


def stable(data: dict[str, Any], start: str) -> dict[int, dict[float, float]]:
    """Return λ₁ by step, for each depth, where it trains and stays, with that step and every smaller one."""
    rows = {depth: list(takewhile(lambda tile: tile.stays, row)) for depth, row in tiles(data, start).items()}
    found = {depth: {tile.step: nan(tile.sharpness) for tile in row if tile.trains} for depth, row in rows.items()}
    return {depth: row for depth, row in found.items() if row}


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    identity, he = (stable(data, start) for start in STARTS)
    both = sorted(set(identity) & set(he))
    line = linear_regression([math.log(depth) for depth in identity], [math.log(max(row)) for row in identity.values()])
    deepest = tiles(data, "he")[max(tile["depth"] for tile in data["tiles"])]
    return {
        "largest_step": line.slope,
        "linear": straightness({depth: min(row.values()) for depth, row in identity.items()}),
        "he_steps": max(max(he[depth]) / max(identity[depth]) for depth in both),
        "he_sharper": min(min(he[depth].values()) / min(identity[depth].values()) for depth in both),
        "curve_identity": max(nan(run["loss"]) / data["blind"] for run in curves(data, "identity")),
        "curve_he": max((tile.step for tile in deepest if tile.trains), default=0.0),
    }


def straightness(points: Mapping[int, float]) -> float:
    """Return R² of the line of least squares."""
    xs, ys = list(points), list(points.values())
    slope, offset = linear_regression(xs, ys)
    mean = math.fsum(ys) / len(ys)
    left = math.fsum((slope * x + offset - y) ** 2 for x, y in zip(xs, ys, strict=True))
    return 1 - left / math.fsum((y - mean) ** 2 for y in ys)


def curves(data: dict[str, Any], start: str) -> list[dict[str, Any]]:
    """Return the deepest networks, trained with the step of Figure 5(b)."""
    deepest = max(tile["depth"] for tile in data["tiles"])
    wanted = (start, deepest, data["curve_step"])
    return [tile for tile in data["tiles"] if (tile["start"], tile["depth"], tile["step"]) == wanted]


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    found = {start: stable(data, start) for start in STARTS}
    with panels(14, 4.4, columns=3, widths=(1.3, 1, 1)) as (figure_4, (grid, flattest, largest)):
        draw_tiles(figure_4, grid, data, "identity")
        for start, rows in found.items():
            style, depths = {"color": COLOURS[start], "label": f"from {STARTS[start]}"}, list(rows)
            flattest.plot(depths, [min(row.values()) for row in rows.values()], "o-", **style)
            largest.plot([1 / m for m in depths], [max(row) for row in rows.values()], "o-", **style)
        flattest.set(xlabel="depth m, layers", ylabel="λ₁ of a pixel's loss", title="The flattest of each depth")
        largest.set(xlabel="1/m, m the depth", ylabel="step η", title="The largest stable step")
        for axes in (flattest, largest):
            axes.set(xlim=(0, None), ylim=(0, None))
            axes.legend(loc="upper left")
    with panels(11.5, 4.4, columns=2, widths=(1.2, 1)) as (figure_5, (grid, losses)):
        draw_tiles(figure_5, grid, data, "he")
        for start in STARTS:
            for run in curves(data, start):
                epochs, lost = range(1, len(run["losses"]) + 1), run["losses"][-1] is None
                label = f"from {STARTS[start]}" + (f": diverges in epoch {len(epochs)}" if lost else "")
                losses.plot(epochs, [nan(each) for each in run["losses"]], "o-", color=COLOURS[start], label=label)
        losses.axhline(data["blind"], color=GREY, linestyle="--", label="a network that answers 0")
        losses.set(xlabel="epoch", ylabel="squared error of a pixel", ylim=(0, 2 * data["blind"]))
        losses.set_title(f"{max(tiles(data, 'he'))} layers, η = {data['curve_step']:g}")
        losses.legend()
    return {"mnist_sharpness_4": figure_4, "mnist_sharpness_5": figure_5}


def draw_tiles(figure: Figure, axes: Axes, data: dict[str, Any], start: str) -> None:
    """Draw λ₁ over depth and step: white where it does not train; a mark says how, or that SGD cannot stay."""
    rows = tiles(data, start)
    steps = sorted({tile.step for row in rows.values() for tile in row})
    values = torch.full((len(steps), len(rows)), math.nan)
    used = set()
    for column, row in enumerate(rows.values()):
        for tile in row:
            place = (column + 0.5, steps.index(tile.step) + 0.5)
            if tile.trains:
                values[steps.index(tile.step), column] = nan(tile.sharpness)
            if not (tile.trains and tile.stays):
                mark = "." if tile.trains else "x" if tile.sharpness is None else "_"
                axes.plot(*place, mark, color=ORANGE if tile.trains else GREY, markersize=6)
                used.add(mark)
    low, high = (float(extreme) for extreme in values[values.isfinite()].aminmax())
    image = axes.pcolormesh(values.numpy(), norm=LogNorm(low, high), cmap="cividis_r")
    powers(figure.colorbar(image, ax=axes, label="λ₁ of a pixel's loss").ax, "y", low, high)
    axes.set_xticks([i + 0.5 for i in range(len(rows))], [str(depth) for depth in rows])
    axes.set_yticks([i + 0.5 for i in range(len(steps))], [f"{step:.3g}" for step in steps])
    axes.grid(False)
    meaning = ",  ".join(says for mark, says in MARKS.items() if mark in used)
    axes.set(xlabel=f"depth m, layers\n{meaning}", ylabel="step η", title=f"From {STARTS[start]}")
