"""Figure 1 of *On the geometry of flat minima*: normalised steps end at the flattest point of a valley of fourth order.

f(x) = x₂² + x₁²x₂⁴ vanishes on the axis x₂ = 0, and λ₁ = 2 everywhere on it: the second derivative cannot tell its
minima apart. The fourth order can: f°((x₁, 0), r) = r² + x₁²r⁴ + …, so that 0 is the flattest (T029). The caption
speaks of gradient descent with step lengths (k + 1)^(−1/6). Read as lengths |x_{k+1} − x_k|, which is normalised
gradient descent, it ends near 0; read as step sizes, which multiply the gradient, it diverges (T035).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.cells import Cells
from experiments.claim import Claim
from experiments.plane import levels, path
from torchflat import Verdict, compare
from torchflat.drawing import BLUE, INK, ORANGE, logarithmic, panels
from torchflat.optim import NormalizedGD, PowerDecayLR
from torchflat.problems import QuarticTie

TITLE = "On the geometry of flat minima, Figure 1: normalised steps in a valley of fourth order"

LIMIT = (0.04400969, 0.25994868)  # of 1 000 steps, T035

CLAIMS = (
    Claim(
        "distance",
        "normalised steps of length (k + 1)^(−1/6) from (3.2, 0.6) end at (0.04400969, 0.25994868) after 1 000",
        "Figure 1, T035",
        (0, 1e-7),
    ),
    Claim(
        "escape",
        "gradient descent with step sizes (k + 1)^(−1/6), as the caption can be read, stays within |x| ≤ 10",
        "Figure 1, caption, T035",
        printed=(0, 10),
        corrected=(1e6, math.inf),
    ),
    Claim("flatter", "compare() finds 0 flatter than the point of the valley at the start", "T029", (1, 1)),
    Claim("tie", "λ₁ is the same at both", "T029", (0, 1e-9)),
)


@dataclass(frozen=True)
class Config:
    """Start, number of steps, and exponent of the steps."""

    start: tuple
    steps: int
    exponent: float


def run(config: Config, cells: Cells) -> dict[str, Any]:
    f = QuarticTie((0.0, 0.0))
    normalised = path(f.function, config.start, lambda x: NormalizedGD(x, lr=1.0, decay=config.exponent), config.steps)

    def plain(x: list[torch.Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(x, lr=1.0)
        schedule = PowerDecayLR(optimizer, exponent=config.exponent)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    sharp = f.at((config.start[0], 0.0))
    answer = compare(f.objective(), sharp.objective())
    return {
        "normalised": normalised,
        "plain": path(f.function, config.start, plain, config.steps),
        "verdict": answer.verdict.name,
        "sharpness": [f.sharpness(), sharp.sharpness()],
    }


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    first, second = data["sharpness"]
    return {
        "distance": math.dist(data["normalised"][-1], LIMIT),
        "escape": max(math.hypot(*point) for point in data["plain"]),
        "flatter": float(data["verdict"] == Verdict.FLATTER.name),
        "tie": abs(first - second),
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    f = QuarticTie((0.0, 0.0)).function
    with panels(10, 4, columns=2) as (figure, (left, right)):
        levels(left, f, (-0.5, 3.5), (-1.2, 1.2))
        left.plot(*zip(*data["normalised"], strict=True), ".-", color=BLUE, linewidth=0.5, markersize=3)
        left.plot([-0.5, 3.5], [0, 0], color=INK, linewidth=1)
        left.plot(*data["normalised"][0], "o", color=ORANGE)
        left.set_title("1 000 steps of length (k + 1)^(−1/6)")
        for key, colour, label in (("normalised", BLUE, "lengths: normalised"), ("plain", ORANGE, "sizes: plain")):
            right.plot([math.hypot(*point) for point in data[key]], color=colour, label=label)
        right.set(
            xlabel="step k", ylabel="|x|", title="Two readings of “step length”", ylim=(1e-2, 1e6), xlim=(-10, 1000)
        )
        logarithmic(right)
        right.legend()
    return {"flat_gd": figure}
