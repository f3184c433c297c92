"""Figures of *Implicit regularization of normalized gradient descent*."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.plane import levels
from experiments.valleys import CLARKE, FORMULAS, PLANE, VALLEYS, Valley
from torchflat.drawing import BLUE, GREEN, GREY, INK, ORANGE, logarithmic, panels, powers

__all__ = ["draw"]

# What is smaller is drawn here.
FLOOR = 1e-16
WINDOWS = {
    "product": ((0, 4), (-0.5, 2)),
    "parabola": ((-1, 2.8), (-0.7, 3.2)),
    "ellipse": ((-0.4, 1.6), (-1.3, 1)),
    "hyperbola": ((0.3, 3), (-0.8, 1.9)),
    "cubic": ((-0.1, 1.7), (-0.1, 1.9)),
    "quartic": ((-0.5, 3.6), (-0.9, 0.9)),
}
QUANTITIES = {
    "product": "|x₁² − x₂²|",
    "parabola": "x₁² exp(4x₂)",
    "ellipse": "x₂²/|x₁|⁶",
    "hyperbola": "x₂²|x₁|⁴",
    "cubic": "|1/x₁ − 1/x₂|",
    "quartic": "x₁²",
}


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    return {
        "ngd_trajectories": trajectories(data["plane"]),
        "ngd_quantities": quantities(data["plane"]),
        "ngd_starts": ends_of_starts(data),
        "ngd_steps": steps(data),
    }


def trajectories(plane: dict[str, Any]) -> Figure:
    """Draw both methods over the level sets of the examples in the plane."""
    with panels(13, 8.4, rows=2, columns=3) as (figure, axes):
        for place, (name, (problem, _)) in zip(axes, PLANE.items(), strict=True):
            valley, run = Valley.of(name), plane[name]
            levels(place, problem.function, *WINDOWS[name])
            levels(place, lambda x, F=valley.residuals: F(x)[0], *WINDOWS[name], at=(0,), colour=INK, width=1.2)
            place.plot(
                *zip(*run["normalised"], strict=True),
                ".-",
                color=BLUE,
                linewidth=0.5,
                markersize=3,
                label="normalised steps",
            )
            place.plot(*zip(*run["plain"], strict=True), color=ORANGE, linewidth=3, label="gradient descent")
            place.plot(*run["normalised"][0], "o", color=INK, label="start")
            place.plot(
                *valley.flat.T, "*", color=GREEN, markersize=15, linestyle="none", label="flat minimum", zorder=3
            )
            place.set_title(FORMULAS[name])
        axes[0].legend(loc="upper right")
    return figure


def quantities(plane: dict[str, Any]) -> Figure:
    """Draw c of table 1 along both."""
    with panels(13, 7, rows=2, columns=3) as (figure, axes):
        for place, name in zip(axes, PLANE, strict=True):
            c, every = plane[name]["c"], {"normalised": 1, "plain": 2}
            for method, colour, label in (
                ("normalised", BLUE, "normalised steps"),
                ("plain", ORANGE, "gradient descent"),
            ):
                values = [value if value > FLOOR else math.nan for value in c[method]]
                place.plot([1 + every[method] * k for k in range(len(values))], values, color=colour, label=label)
            logarithmic(place)
            powers(place, "x", 1, 2e3)
            place.set(xlabel="step k + 1", ylabel=f"c = {QUANTITIES[name]}", title=FORMULAS[name])
        axes[0].legend(loc="lower left")
    return figure


def ends_of_starts(data: dict[str, Any]) -> Figure:
    """Draw how far from the flat minima each of the 100 starts ends, along the valley, by example."""
    names = [*VALLEYS, "cubic", "quartic", "absolute 1 1", "absolute 1 2", "absolute 1 0"]
    source = torch.Generator().manual_seed(0)
    with panels(11, 8) as (figure, (place,)):
        for row, name in enumerate(names):
            for method, colour in (("normalised", BLUE), ("plain", ORANGE)):
                runs = [run for run in data["runs"] if run["key"]["problem"] == name and run["key"]["method"] == method]
                if name in VALLEYS and method == "normalised":
                    runs = [run for run in runs if run["key"]["decay"] == 0.25 and run["key"]["lr"] == 1]
                    runs = [run for run in runs if run["key"]["steps"] == data["steps"]]
                for run in runs[:1]:
                    shift = 0.5 * torch.rand(100, generator=source) - 0.25
                    place.plot([max(far, FLOOR) for far in run["along"]], row + shift, ".", color=colour, markersize=4)
        powers(place, "x", FLOOR / 3, 10)
        place.set_yticks(range(len(names)), [FORMULAS[name] for name in names])
        place.invert_yaxis()
        place.set(
            xlabel="distance to the flat minima along the valley (less than 10⁻¹⁶: left edge)",
            title="Where 100 starts end",
        )
        place.grid(axis="y", visible=False)
        place.plot([], [], ".", color=BLUE, label="normalised steps")
        place.plot([], [], ".", color=ORANGE, label="gradient descent")
        place.legend(loc="lower left", markerscale=3)
    return figure


def steps(data: dict[str, Any]) -> Figure:
    """Draw what the length of the steps and its decay do, the trap of the kink, and flat factors."""
    runs = data["runs"]
    with panels(12, 8.4, rows=2, columns=2) as (figure, (exponents, constant, kink, factors)):
        grid = [run for run in runs if run["key"]["problem"] == "product" and run["key"]["steps"] == data["steps"]]
        grid = [run for run in grid if run["key"]["method"] == "normalised" and run["key"]["decay"] > 0]
        lengths = sorted({run["key"]["lr"] for run in grid})
        for lr, colour, mark in zip(lengths, (INK, GREEN, BLUE, ORANGE), "osD^", strict=False):
            line = sorted((run["key"]["decay"], median(run["along"])) for run in grid if run["key"]["lr"] == lr)
            decays, far = zip(*line, strict=True)
            exponents.plot(decays, [max(each, FLOOR) for each in far], f"{mark}-", color=colour, label=f"α = {lr:g}")
        exponents.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
        logarithmic(exponents)
        exponents.set(
            xlabel="exponent q",
            ylabel="median distance along the valley",
            title=f"(x₁x₂ − 1)²: {data['steps']} steps of length α/(k + 1)^q",
        )
        exponents.legend(loc="lower right")

        hovering = [run for run in runs if run["key"]["decay"] == 0 and run["key"]["problem"] == "product"]
        hovering.sort(key=lambda run: run["key"]["lr"])
        for run, colour in zip(hovering, (INK, GREEN, BLUE), strict=False):
            alpha = run["key"]["lr"]
            far = sorted(each / alpha for each in run["distance"])
            constant.plot(range(1, 101), far, color=colour, label=f"α = {alpha:g}")
        constant.axhline(1, color=GREY, linewidth=1, linestyle="--")
        constant.set(
            xlabel="starts, sorted",
            ylabel="distance to the flat minima / α",
            title="(x₁x₂ − 1)²: constant steps, K = 100/α²",
            ylim=(0, 1.1),
        )
        constant.legend(loc="upper left")

        for name, colour, label in (("absolute 1 0", BLUE, "1"), (CLARKE, ORANGE, "0")):
            (run,) = (run for run in runs if run["key"]["problem"] == name)
            far = sorted(max(each, FLOOR) for each in run["along"])
            kink.plot(range(1, 101), far, color=colour, label=f"|·|′(0) = {label}")
        logarithmic(kink)
        kink.set(
            xlabel="starts, sorted",
            ylabel="distance along the valley",
            title="|x₁x₃ − 1| + |x₂x₃|: the kink as a trap",
        )
        kink.legend(loc="upper left")

        imbalance = [end["imbalance"] for end in data["factors"]]
        excess = [max(end["sharpness"] / 6 - 1, FLOOR) for end in data["factors"]]
        factors.plot(imbalance, excess, "o", color=BLUE, markersize=5)
        logarithmic(factors)
        factors.set(
            xlabel="‖XᵀX − YYᵀ‖", ylabel="λ₁ / 2‖M‖₂ − 1", title="½‖XY − M‖²: flat, not balanced", xlim=(0, None)
        )
    return figure


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
