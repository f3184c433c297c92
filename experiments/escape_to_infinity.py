"""*Certifying the absence of spurious local minima at infinity*: where descent escapes, and where it cannot.

Figure 1 is gradient descent on f = (x₁y₁ − 1)² + (x₂y₁ − 1)² + (x₂y₂ − 1)². It has no spurious local minimum but one at
infinity: along (t, −1/t, 1/t, −t) f falls to 1, above its least value 0 (T073, T074). Figures 2 and 3 and Example 4.3
are functions of two variables. In the bounded cases of Corollary 1.3 what the flow conserves bounds the norms
(:mod:`experiments.bounded_descents`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import bounded_descents
from experiments.cells import Cells, Key
from experiments.claim import Claim
from experiments.descents import plain
from experiments.plane import levels, path
from torchflat import eigenpairs, variation
from torchflat.drawing import BLUE, INK, ORANGE, panels, powers
from torchflat.optim import Tracker
from torchflat.optim.escape import escape
from torchflat.problems import MaskedProduct, ReluPlateau, SigmoidPair
from torchflat.symmetry import Laws

TITLE = "Certifying the absence of spurious local minima at infinity: Figures 1–3, Example 4.3, Corollary 1.3"

MASKED = MaskedProduct((0.0,) * 4)
PLATEAU, PAIR, SYMMETRIC = (
    ReluPlateau((-1.0, 0.5)),
    SigmoidPair((4.0, 1.5), (1.0, -3.0)),
    SigmoidPair((0.0, 0.0), (1.0, -1.0)),
)
CRITICAL = ((1.5, 1.5, 1 / 1.5, 1 / 1.5), (1.5, 0, 1 / 1.5, -1 / 1.5), (1.5, -1.5, 0, -1 / 1.5), (0, 0, 0, 0))
# Rows of history that the search for an escape sees, and starts that are drawn.
ROWS, DRAWN = 1000, 30

CLAIMS = (
    Claim(
        "critical",
        "Example 1.1: f = 0, 2, 2, 3 at its critical points, with gradient 0: largest deviation",
        "Example 1.1, T073",
        (0, 1e-12),
    ),
    Claim(
        "saddles",
        "… the last three are strict saddles: largest of their λ_min",
        "Example 1.1, T073",
        (-math.inf, -0.01),
    ),
    Claim(
        "share",
        "Figure 1: share of starts in [−1, 1]⁴ that are stuck (3 of 10 in print)",
        "Figure 1, T074",
        printed=(0.3, 0.3),
        corrected=(0.07, 0.11),
    ),
    Claim("alternating", "… of those whose signs alternate", "T074", (0.35, 0.5)),
    Claim("others", "… and of the others", "T074", (0.02, 0.05)),
    Claim(
        "limit",
        "… the value that f tends to there, extrapolated, median",
        "Figure 1, T074",
        printed=(2, 2),
        corrected=(0.95, 1.05),
    ),
    Claim(
        "growth",
        "|x| grows there like k^¼: exponent over the last three quarters of the steps, median",
        "T074",
        (0.2, 0.3),
    ),
    Claim(
        "halt",
        "with constant steps η the drift halts where λ₁ ≈ 2x₁² = 2/η: median |x₁|√η in the end",
        "T075",
        (0.9, 1.1),
    ),
    Claim("solved", "… and none is solved on the way", "T075", (0, 0)),
    Claim("found", "the tracker's search for escapes finds those that are stuck: share", "T074", (0.95, 1)),
    Claim("false", "… and says so of those that are solved: share", "T074", (0, 0.01)),
    Claim(
        "alarms",
        "Tracker on the first starts: those with an alarm that are not stuck, or stuck without",
        "T074",
        (0, 0),
    ),
    Claim(
        "plateau",
        "Figure 2: f° at radius 0.9 about (−1, ½), a setwise local minimum of value 1",
        "Figure 2, T076b",
        (0, 0),
    ),
    Claim(
        "plateau_share",
        "… share of the starts with x₁ < 0 that gradient descent leaves there",
        "Figure 2, T076b",
        (1, 1),
    ),
    Claim(
        "flow_value",
        "Figure 3: f on the flow from (4, 1.5) at time 2 000 is 4.500496",
        "Figure 3, T076",
        (4.500496 - 2e-6, 4.500496 + 2e-6),
    ),
    Claim("flow_place", "… where w₁ = 8.7066", "Figure 3, T076", (8.7046, 8.7086)),
    Claim(
        "best",
        "Example 4.3: the best w₂ at w₁ = 1.7 is tanh 1.7, of value 0.6767836748: larger deviation",
        "Example 4.3, T077",
        (0, 1e-9),
    ),
    Claim(
        "origin",
        "… and its only critical point 0 is a strict saddle: λ_min there",
        "Example 4.3, T077",
        ((1 - math.sqrt(5)) / 4 - 1e-6, (1 - math.sqrt(5)) / 4 + 1e-6),
    ),
    Claim(
        "infimum",
        "… so that descent tends to the infimum ½: largest f after 10 000 steps from 100 starts",
        "Example 4.3, T077",
        (0.5, 0.51),
    ),
    Claim(
        "infimum_alarms",
        "… which the tracker takes for no escape where infimum= is given: alarms",
        "Example 4.3, T077",
        (0, 0),
    ),
    Claim("unknown_alarms", "… and for one where it is not: w₁ grows for ever", "Example 4.3, T077", (1, 1)),
    *bounded_descents.CLAIMS,
)


@dataclass(frozen=True)
class Config:
    """Starts of Figure 1, by seed; steps of size ``step``; how long stuck runs are followed; runs with a tracker."""

    seeds: tuple
    trials: int
    step: float
    steps: int
    long: int
    tracked: int


def run(config: Config, cells: Cells) -> dict[str, Any]:
    shared = {"trials": config.trials, "step": config.step, "steps": config.steps}
    figure1 = cells.map("figure 1", [{"seed": seed, **shared} for seed in config.seeds], descended)
    stuck = [x for batch in figure1 for x, f in zip(batch["ends"], batch["f"], strict=True) if f > 0.5]
    (halted,) = cells.map(
        "edge of stability",
        [{**shared, "first": config.steps, "steps": config.long, "seeds": list(config.seeds)}],
        lambda key, scratch: followed(torch.tensor(stuck, dtype=torch.float64), key),
    )
    for batch in figure1:
        del batch["ends"]
    return {
        "step": config.step,
        "figure1": figure1,
        "halted": halted,
        "tracked": [
            tracked(MASKED.function, x.tolist(), config.step, 3000) for x in starts(config.tracked, config.seeds[0])
        ],
        "critical": [critical(point) for point in CRITICAL],
        "plane": plane(),
        "bounded": bounded_descents.run(),
    }


def starts(count: int, seed: int) -> Tensor:
    """Draw starts from [−1, 1]⁴."""
    return torch.tensor(np.random.default_rng(seed).uniform(-1, 1, (count, 4)))


def descended(key: Key, scratch: Path) -> dict[str, Any]:
    """Descend from all starts of a seed: what becomes of f and |x|, and which runs look like escapes."""
    start = starts(key["trials"], key["seed"])
    every, value = key["steps"] // ROWS, torch.func.vmap(MASKED.function)
    losses, norms = [], []

    def watch(step: int, x: Tensor) -> None:
        if step % every == 0:
            losses.append(value(x))
            norms.append(x.norm(dim=1))

    end = plain(MASKED.function, start, key["steps"], key["step"], watch)
    f, size = torch.stack(losses, dim=1), torch.stack(norms, dim=1)
    found = [escape(*rows, infimum=0.0, stall=0.5) for rows in zip(f.tolist(), size.tolist(), strict=True)]
    thinned = sorted({round(1.06**i) for i in range(int(math.log(ROWS - 1, 1.06)) + 1)})
    return {
        "ends": end.tolist(),
        "f": value(end).tolist(),
        "alternating": (start[:, :-1] * start[:, 1:] < 0).all(dim=1).tolist(),
        "limit": [each and each.limit for each in found],
        "exponent": ((size[:, -1] / size[:, ROWS // 4]).log() / math.log(4)).tolist(),
        "curves": {
            "k": [every * row for row in thinned],
            "f": f[:DRAWN, thinned].tolist(),
            "norm": size[:DRAWN, thinned].tolist(),
        },
    }


def followed(x: Tensor, key: Key) -> dict[str, Any]:
    """Follow stuck runs until their drift halts at the edge of stability."""
    every, sizes, start = key["steps"] // 200, [], x

    def watch(step: int, x: Tensor) -> None:
        if step % every == 0:
            sizes.append(float(x[:, 0].abs().median()))

    end = plain(MASKED.function, start, key["steps"], key["step"], watch)
    return {
        "k": [key["first"] + every * row for row in range(len(sizes))],
        "size": sizes,
        "ends": end[:, 0].abs().tolist(),
        "f": torch.func.vmap(MASKED.function)(end).tolist(),
    }


class Point(nn.Module):
    """A function of one flat x as a module, whose output is its value."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Sequence[float]) -> None:
        super().__init__()
        self.x, self.function = nn.Parameter(torch.tensor(x, dtype=torch.float64)), function

    def forward(self) -> Tensor:
        """Return the value."""
        return self.function(self.x)


def tracked(function: Callable[[Tensor], Tensor], x: Sequence[float], step: float, steps: int, **options: Any) -> Any:
    """Descend with a tracker: what f is in the end, and which alarms of escape there were."""
    model = Point(function, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=step)
    with Tracker(model, optimizer, laws=Laws(()), every=4, log=lambda _: None, **options) as tracker:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            tracker.record(loss=loss)
            optimizer.step()
    alarms = [str(alarm) for alarm in tracker.alarms if alarm.kind == "escape"]
    return {"start": list(x), "f": float(loss.detach()), "alarms": alarms}


def critical(point: Sequence[float]) -> dict[str, float]:
    f = MASKED.at(point).objective()
    return {
        "f": f.value(),
        "gradient": float(f.gradient().norm()),
        "least": float(eigenpairs(f, 1, which="smallest", rtol=1e-6).values[0]),
    }


def plane() -> dict[str, Any]:
    """Look at the functions of two variables."""
    box = torch.tensor(np.random.default_rng(0).uniform(-2, 2, (100, 2)))
    left, symmetric = box[box[:, 0] < 0], torch.func.vmap(SYMMETRIC.function)
    best = SYMMETRIC.at((1.7, 0.0)).best_factor()
    return {
        "plateau": {
            "variation": variation(PLATEAU.objective(), radii=[0.5, 0.9]).values,
            "f": torch.func.vmap(PLATEAU.function)(plain(PLATEAU.function, left, 1000, 0.01)).tolist(),
            "paths": [descent(PLATEAU.function, x) for x in ((-1.5, 1.5), (-0.5, -1.0), (0.3, 1.7), (1.8, -0.6))],
        },
        "pair": {
            "flow": path(PAIR.function, PAIR.point, lambda x: torch.optim.SGD(x, lr=0.5), 4000)[::20],
            "paths": [descent(PAIR.function, x) for x in ((4.0, 1.5), (1.0, 3.5), (-2.0, 0.5), (0.5, -1.0))],
        },
        "symmetric": {
            "best": [*best.point, best.objective().value()],
            "least": float(eigenpairs(SYMMETRIC.objective(), 1, which="smallest", rtol=1e-8).values[0]),
            "f": symmetric(plain(SYMMETRIC.function, box, 10_000, 0.1)).tolist(),
            "known": tracked(SYMMETRIC.function, (1.0, 0.5), 0.1, 4000, infimum=0.5)["alarms"],
            "unknown": tracked(SYMMETRIC.function, (1.0, 0.5), 0.1, 4000)["alarms"],
            "paths": [descent(SYMMETRIC.function, x) for x in ((0.2, 2.0), (-0.3, 1.5), (2.0, -1.5), (-1.5, 0.7))],
        },
    }


def descent(function: Callable[[Tensor], Tensor], x: tuple[float, float]) -> list[list[float]]:
    return path(function, x, lambda params: torch.optim.SGD(params, lr=0.1), 2000)[::5]


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    rows = [
        (f, alternating, limit, exponent)
        for batch in data["figure1"]
        for f, alternating, limit, exponent in zip(
            batch["f"], batch["alternating"], batch["limit"], batch["exponent"], strict=True
        )
    ]
    stuck, solved = [row for row in rows if row[0] > 0.5], [row for row in rows if row[0] <= 0.5]
    limits = [limit for _, _, limit, _ in stuck if limit is not None]
    critical, symmetric, pair = data["critical"], data["plane"]["symmetric"], data["plane"]["pair"]
    w1, w2, value = symmetric["best"]
    return {
        "critical": max(abs(c["f"] - f) + c["gradient"] for c, f in zip(critical, (0, 2, 2, 3), strict=True)),
        "saddles": max(c["least"] for c in critical[1:]),
        "share": len(stuck) / len(rows),
        "alternating": share(row[0] > 0.5 for row in rows if row[1]),
        "others": share(row[0] > 0.5 for row in rows if not row[1]),
        "limit": statistics.median(limits) if limits else math.nan,
        "growth": statistics.median(row[3] for row in stuck),
        "halt": statistics.median(data["halted"]["ends"]) * data["step"] ** 0.5,
        "solved": sum(not f > 0.5 for f in data["halted"]["f"]),
        "found": len(limits) / len(stuck),
        "false": share(row[2] is not None for row in solved),
        "alarms": sum(bool(run["alarms"]) != (run["f"] > 0.5) for run in data["tracked"]),
        "plateau": max(data["plane"]["plateau"]["variation"]),
        "plateau_share": share(f == 1 for f in data["plane"]["plateau"]["f"]),
        "flow_value": PAIR.at(pair["flow"][-1]).objective().value(),
        "flow_place": pair["flow"][-1][0],
        "best": max(abs(w2 - math.tanh(w1)), abs(value - 0.6767836748)),
        "origin": symmetric["least"],
        "infimum": max(symmetric["f"]),
        "infimum_alarms": len(symmetric["known"]),
        "unknown_alarms": len(symmetric["unknown"]),
        **bounded_descents.measure(data["bounded"]),
    }


def share(said: Iterable[bool]) -> float:
    return statistics.fmean(map(float, said))


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    return {"escape_figure1": figure1(data), "escape_plane": figures2_3(data["plane"])} | bounded_descents.draw(
        data["bounded"]
    )


def figure1(data: dict[str, Any]) -> Figure:
    """Draw loss and norm from the first thirty starts, and where the drift of the stuck ones halts."""
    curves, halted, step = data["figure1"][0]["curves"], data["halted"], data["step"]
    with panels(13, 4, columns=3) as (figure, (loss, norm, edge)):
        for run, f in enumerate(curves["f"]):
            stuck = f[-1] > 0.5
            colour, width = (ORANGE, 2.5) if stuck else (BLUE, 1.2)
            loss.plot(curves["k"][1:], f[1:], color=colour, linewidth=width)
            norm.plot(curves["k"][1:], curves["norm"][run][1:], color=colour, linewidth=width)
        for place in (loss, norm):
            powers(place, "x", curves["k"][1], curves["k"][-1])
        loss.axhline(1, color=INK, linewidth=1, linestyle="--")
        loss.set(xlabel="step k", ylabel="f", title="Thirty starts: stuck at 1, not 2", ylim=(0, 2.2))
        powers(norm, "y", 1, 1.5 * max(row[-1] for row in curves["norm"]))
        norm.set(xlabel="step k", ylabel="|x|", title="Norm")
        norm.plot([], [], color=ORANGE, linewidth=2.5, label="stuck")
        norm.plot([], [], color=BLUE, linewidth=1.2, label="solved")
        k = curves["k"][len(curves["k"]) // 2 :]
        scale = 1.3 * max(row[-1] for row in curves["norm"])
        norm.plot(k, [scale * (each / k[-1]) ** 0.25 for each in k], color=INK, linestyle="--", label="k^¼")
        norm.legend(loc="upper left")
        edge.plot(halted["k"], halted["size"], color=ORANGE, label="median of the stuck")
        edge.axhline(step**-0.5, color=INK, linewidth=1, linestyle="--", label="2x₁² = 2/η")
        powers(edge, "x", halted["k"][0], halted["k"][-1])
        edge.set(xlabel="step k", ylabel="|x₁|", title="The drift halts at the edge", ylim=(0, 1.2 * step**-0.5))
        edge.legend(loc="lower right")
    return figure


def figures2_3(plane: dict[str, Any]) -> Figure:
    """Draw descents on the functions of two variables over their level sets."""
    shown = (
        (PLATEAU, "plateau", "Figure 2: a plateau at f = 1", (-2, 2), (-2, 2)),
        (PAIR, "pair", "Figure 3: f → ½ or 9/2", (-8, 10), (-4.5, 4.5)),
        (SYMMETRIC, "symmetric", "Example 4.3: f → ½ both ways", (-8, 8), (-2.5, 2.5)),
    )
    with panels(13, 4.3, columns=3) as (figure, axes):
        for place, (problem, name, title, x, y) in zip(axes, shown, strict=True):
            levels(place, problem.function, x, y, at=(0.05, 0.2, 0.52, 0.6, 0.75, 1, 1.5, 2, 3, 4, 4.6, 6, 8, 12))
            for run in plane[name]["paths"]:
                spurious = problem.at(run[-1]).objective().value() > problem.infimum() + 0.3
                colour = ORANGE if spurious else BLUE
                place.plot(*zip(*run, strict=True), ".-", color=colour, markersize=3, linewidth=1.5)
                place.plot(*run[0], "o", color=colour, markeredgecolor=INK, markersize=8)
            place.set_title(title)
        for place, names in ((axes[1], "w₁ w₂"), (axes[2], "w₁ w₂")):
            place.set(**dict(zip(("xlabel", "ylabel"), names.split(), strict=True)))
        axes[0].plot([], [], color=ORANGE, label="above the infimum")
        axes[0].plot([], [], color=BLUE, label="to the infimum")
        axes[0].legend(loc="lower left")
    return figure
