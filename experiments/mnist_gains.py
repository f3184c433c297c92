"""*Unique Properties of Flat Minima*, Figure 6 and Table S1: MNIST denoisers trained by SGD and by Adam.

SGD with step ½ can only end where λ₁ ≤ 2/½ (T070); Adam is not bound by that, and its λ₁ is larger. Is its minimum
sharp, or only badly scaled? λ₁ depends on how a network is scaled; λ₁★, the least λ₁ of all its rescalings, does not
(T086, T093). Of the excess log λ₁(Adam)/λ₁(SGD), scaling explains the share that is gone at λ₁★: 1 if the minimum is
only badly scaled, 0 if it is sharp. In the short run of T089, λ₁★ of Adam's network is even the smaller one; but there
SGD had hardly trained, and denoisers of 14 × 14 images, whose losses are nearly alike, show the opposite. These were
pilot runs: what is claimed of scaling, and of what is left after it, was written after them and before the full run.

Intermediate gains: the largest |signal of layer k|/|input|. In a flattest deep linear network of m layers and
end-to-end gain G none exceeds √m·G^{k/m} (Theorem 2, T064). ReLU networks and data that is not white are beyond the
theorem; here it is tried on them. Rescaling changes the gains in between, and leaves G.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.cells import Cells
from experiments.claim import Claim, Outcome, Unreached
from experiments.denoiser import mean_loss, noisy
from experiments.gains import gains
from experiments.minima import SGD_STEP, Orbit, Recipe, flattest_of, grid, objective, reached_at, trained
from torchflat import sharpness
from torchflat.drawing import BLUE, GREY, INK, ORANGE, panels, powers

TITLE = "Unique Properties of Flat Minima, Figure 6 and Table S1: SGD's and Adam's denoisers, their gains, and λ₁★"

# Table S1: mean over four starts, and the spread that is allowed for: 3 % of a loss, since the epochs are not told;
# three standard deviations of λ₁.
TOLD = {"sgd": "SGD", "adam": "Adam"}
PRINTED = {"sgd": {"loss": 2.69e-2, "sharpness": 1.76}, "adam": {"loss": 2.74e-2, "sharpness": 12.9}}

CLAIMS = (
    *(
        Claim(
            f"{name}_loss",
            f"{told}'s loss on training images is {PRINTED[name]['loss'] * 1e2:.2f}·10⁻²",
            "Table S1, T072",
            (0.97 * PRINTED[name]["loss"], 1.03 * PRINTED[name]["loss"]),
            expected=Outcome.NOT_REACHED,
        )
        for name, told in TOLD.items()
    ),
    Claim(
        "sgd_sharpness",
        "λ₁ of SGD's network is 1.76 at that loss",
        "Table S1",
        (1.76 - 3 * 9.4e-3, 1.76 + 3 * 9.4e-3),
        expected=Outcome.NOT_REACHED,
    ),
    Claim(
        "adam_sharpness",
        "λ₁ of Adam's network is 12.9 at that loss",
        "Table S1",
        (12.9 - 3 * 2.2, 12.9 + 3 * 2.2),
        expected=Outcome.NOT_REACHED,
    ),
    Claim("stable", "SGD ends where it is stable: largest λ₁ · step / 2", "Appendix, T070", (0, 1)),
    Claim(
        "sharper",
        "every network of Adam is sharper than every one of SGD: least ratio of λ₁",
        "Table S1",
        (1, math.inf),
    ),
    Claim(
        "rescaled",
        "rescaled, every network of Adam is flatter than what SGD found: largest λ₁★(Adam)/λ₁(SGD)",
        "T089",
        (0, 1),
    ),
    Claim(
        "scaling",
        "Adam's excess of sharpness is for the most part scaling: its share of the mean excess of log λ₁",
        "T089",
        (0.5, math.inf),
    ),
    Claim(
        "still_sharper",
        "nothing is left of it, λ₁★ is even smaller: geometric mean of λ₁★(Adam)/λ₁★(SGD)",
        "T089, a short run",
        (0, 1),
        expected=Outcome.NOT_REPRODUCED,
    ),
    Claim(
        "certified",
        "λ₁★ of the Gauss–Newton matrix is known to 5 %: largest gap between its bounds, over its value",
        "T093",
        (0, 0.05),
    ),
    Claim(
        "bound",
        "at the flattest rescalings no layer's gain exceeds √m·G^{k/m}: largest gain over it",
        "Theorem 2, T064",
        (0, 1),
    ),
    Claim(
        "larger_gains",
        "sharper networks have larger gains in between: mean over seeds of Adam's largest gain over SGD's",
        "Figure 6",
        (1, math.inf),
    ),
    Claim(
        "shrunk", "and rescaling takes Adam's away: largest ratio of the largest gain after and before", "T064", (0, 1)
    ),
    Claim("output", "the gain of the output stays: largest relative change", "T084", (0, 1e-2)),
)


@dataclass(frozen=True)
class Config:
    """The networks, how they are trained, and on how many images and how closely each number is measured."""

    layers: int
    side: int
    rows: int
    epochs: int
    batch: int
    seeds: tuple
    curvature_rows: int
    curvature_rtol: float
    orbit_rows: int
    orbit_rtol: float
    orbit_budget: float
    starts: int
    steps: int


def run(config: Config, cells: Cells) -> dict[str, Any]:
    recipes = grid(config.seeds, config.layers, config.side, config.rows, config.epochs, config.batch)
    folder = cells.folder.parent / "networks"

    def by_recipe(
        what: str, compute: Callable[[Recipe, Path], dict[str, Any]], **settings: Any
    ) -> list[dict[str, Any]]:
        keys = [{"what": what, **dataclasses.asdict(recipe), **settings} for recipe in recipes]
        of_key = {(recipe.optimizer, recipe.seed): recipe for recipe in recipes}
        return cells.map(what, keys, lambda key, scratch: compute(of_key[key["optimizer"], key["seed"]], scratch))

    def trains(recipe: Recipe, scratch: Path) -> dict[str, Any]:
        network, curve = trained(recipe, folder, scratch)
        losses = {split: mean_loss(network, data) for split, data in split_data(recipe)}
        return {"curve": curve, **losses}

    def curvature(recipe: Recipe, scratch: Path) -> dict[str, Any]:
        network, _ = trained(recipe, folder, scratch)
        f = objective(network, recipe, config.curvature_rows)
        answer = sharpness(f, config.curvature_rtol, seed=recipe.seed)
        return {"value": answer.value, "lower": answer.lower, "upper": answer.upper, "status": answer.status.name}

    def orbit(curvature: str) -> Orbit:
        return Orbit(config.orbit_rows, config.orbit_rtol, config.orbit_budget, curvature)

    def amplifies(recipe: Recipe, scratch: Path) -> dict[str, Any]:
        networks = trained(recipe, folder, scratch)[0], flattest_of(recipe, orbit("hessian"), folder, scratch)[0]
        found = [gains(each, config.side**2, config.starts, config.steps, seed=recipe.seed) for each in networks]
        return {when: dataclasses.asdict(each) for when, each in zip(("before", "after"), found, strict=True)}

    def orbits(curvature: str) -> list[dict[str, Any]]:
        settings = dataclasses.asdict(orbit(curvature))
        flattened = functools.partial(flattest_of, orbit=orbit(curvature), folder=folder)
        return by_recipe("orbit", lambda recipe, scratch: flattened(recipe, scratch=scratch)[1], orbit=settings)

    columns = {
        "training": by_recipe("training", trains),
        "sharpness": by_recipe("sharpness", curvature, on=config.curvature_rows, rtol=config.curvature_rtol),
        "orbit": orbits("hessian"),
        "gauss_newton": orbits("gauss_newton"),
        "gains": by_recipe(
            "gains", amplifies, starts=config.starts, steps=config.steps, orbit=dataclasses.asdict(orbit("hessian"))
        ),
    }
    return {
        "layers": config.layers,
        "epochs": config.epochs,
        "networks": [
            {
                "optimizer": recipe.optimizer,
                "seed": recipe.seed,
                **{name: column[i] for name, column in columns.items()},
            }
            for i, recipe in enumerate(recipes)
        ],
    }


def split_data(recipe: Recipe) -> list[tuple[str, Any]]:
    """Return training and test images, each with noise that is drawn once."""
    return [
        ("train", noisy("train", recipe.rows, recipe.side)),
        ("test", noisy("test", None, recipe.side)),
    ]


def measure(data: dict[str, Any]) -> Mapping[str, float | Unreached]:
    sgd, adam = (of(data, name) for name in ("sgd", "adam"))
    before = {name: [row["sharpness"]["value"] for row in of(data, name)] for name in PRINTED}
    hidden, left = excess(data, "before"), excess(data, "value")
    largest = {
        (name, when): [max(row["gains"][when]["largest"]) for row in of(data, name)]
        for name in PRINTED
        for when in ("before", "after")
    }
    return {
        **table(data),
        "stable": max(before["sgd"]) * SGD_STEP / 2,
        "sharper": min(before["adam"]) / max(before["sgd"]),
        "rescaled": max(row["orbit"]["value"] for row in adam) / min(row["orbit"]["before"] for row in sgd),
        "scaling": share_of_scaling(hidden, left, data["epochs"], extrapolated("adam", mean_curve(adam, "loss"))),
        "still_sharper": math.exp(left),
        "certified": max(gap(row["gauss_newton"]) for row in data["networks"]),
        "bound": max(
            gain / limit
            for row in data["networks"]
            for gain, limit in zip(row["gains"]["after"]["largest"], limits(row["gains"]["after"]), strict=True)
        ),
        "larger_gains": statistics.fmean(largest["adam", "before"]) / statistics.fmean(largest["sgd", "before"]),
        "shrunk": max(
            after / each for after, each in zip(largest["adam", "after"], largest["adam", "before"], strict=True)
        ),
        "output": max(
            abs(row["gains"]["after"]["largest"][-1] / row["gains"]["before"]["largest"][-1] - 1)
            for row in data["networks"]
        ),
    }


def of(data: dict[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """Return the networks that one optimizer trained."""
    return [row for row in data["networks"] if row["optimizer"] == optimizer]


def excess(data: dict[str, Any], key: str) -> float:
    """Return the mean log λ₁ of Adam's networks over that of SGD's, as they are or at the flattest rescalings."""
    adam, sgd = (statistics.fmean(math.log(row["orbit"][key]) for row in of(data, name)) for name in ("adam", "sgd"))
    return adam - sgd


def share_of_scaling(hidden: float, left: float, epochs: int, end: str) -> float | Unreached:
    """Return the share of Adam's excess that is gone at the flattest rescalings; not reached where there is none."""
    if hidden > 0:
        return 1 - left / hidden
    return Unreached(f"{epochs} epochs: no excess, Adam's is {math.exp(hidden):.2g} of SGD's", end)


def gap(orbit: dict[str, Any]) -> float:
    """Return how far the bounds of λ₁★ are apart, over the value; infinite where there is none from below."""
    return math.inf if orbit["lower"] is None else (orbit["upper"] - orbit["lower"]) / orbit["value"]


def limits(found: dict[str, Any]) -> list[float]:
    """Return √m·G^{k/m} for every layer."""
    m = len(found["largest"])
    return [math.sqrt(m) * found["largest"][-1] ** (k / m) for k in range(1, m + 1)]


def table(data: dict[str, Any]) -> Mapping[str, float | Unreached]:
    """Return the numbers of Table S1: not reached where the loss is not."""
    numbers: dict[str, float | Unreached] = {}
    for name in PRINTED:
        rows = of(data, name)
        loss = statistics.fmean(row["training"]["train"] for row in rows)
        value = statistics.fmean(row["sharpness"]["value"] for row in rows)
        numbers[f"{name}_loss"], numbers[f"{name}_sharpness"] = loss, value
        if not reached(name, loss):
            end = extrapolated(name, mean_curve(rows, "loss"))
            numbers[f"{name}_loss"] = Unreached(f"{data['epochs']} epochs: {loss:.3g}", end)
            numbers[f"{name}_sharpness"] = Unreached(f"{data['epochs']} epochs: λ₁ = {value:.3g}", end)
    return numbers


def reached(optimizer: str, loss: float) -> bool:
    """Say whether a network is where those of Table S1 are."""
    return loss <= 1.03 * PRINTED[optimizer]["loss"]


def extrapolated(optimizer: str, losses: Sequence[float]) -> str:
    """Tell when it would be, going on like that."""
    at = reached_at(losses, PRINTED[optimizer]["loss"])
    return f"{at:.1g} epochs" if at < 1e6 else "never, as it went"


def mean_curve(rows: list[dict[str, Any]], which: str) -> list[float]:
    """Return the mean over networks, by epoch."""
    curves = zip(*([epoch[which] for epoch in row["training"]["curve"]] for row in rows), strict=True)
    return [statistics.fmean(each) for each in curves]


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    return {"mnist_gains": gains_figure(data), "mnist_gains_sharpness": sharpness_figure(data)}


def gains_figure(data: dict[str, Any]) -> Figure:
    """Draw the gains of both, as trained and rescaled."""
    layers = range(1, data["layers"] + 1)
    highest = max(max(row["gains"]["before"]["largest"] + limits(row["gains"]["before"])) for row in data["networks"])
    with panels(10, 7.5, rows=2, columns=2, share_y=True) as (figure, axes):
        places = [(when, name) for when in ("before", "after") for name in TOLD]
        for panel, (when, name) in zip(axes, places, strict=True):
            for row in of(data, name):
                found = row["gains"][when]
                panel.plot(layers, limits(found), "--", color=GREY, linewidth=1, label="√m·G^(k/m)")
                panel.plot(layers, found["largest"], "o-", color=BLUE, linewidth=0.8, label="largest of any input")
                panel.plot(
                    layers,
                    found["of_output"],
                    "s-",
                    color=ORANGE,
                    linewidth=0.8,
                    markersize=4,
                    label="input of the largest output",
                )
            told = {"before": "as trained", "after": "rescaled to λ₁★"}[when]
            panel.set(title=f"{TOLD[name]}, {told}", xticks=list(layers), ylim=(0, 1.05 * highest))
        for panel in axes[2:]:
            panel.set_xlabel("layer k")
        for panel in axes[::2]:
            panel.set_ylabel("|signal of layer k| / |input|")
        once(axes[0])
    return figure


def sharpness_figure(data: dict[str, Any]) -> Figure:
    """Draw the training curves, and λ₁ beside λ₁★."""
    with panels(12, 4.5, columns=2) as (figure, (left, right)):
        colours = {"sgd": BLUE, "adam": ORANGE}
        losses: list[float] = []
        for name, colour in colours.items():
            for which, style, label in (("loss", "-", "training, new noise"), ("test", ":", "test images")):
                curve = mean_curve(of(data, name), which)
                losses += curve
                left.plot(range(1, len(curve) + 1), curve, style, color=colour, label=f"{TOLD[name]}, {label}")
            left.axhline(PRINTED[name]["loss"], color=colour, linewidth=0.8, linestyle="--")
        left.set(xlabel="epoch", ylabel="loss per pixel", title="Training; dashed: the ends in Table S1")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        powers(left, "y", 0.02, 1.2 * max(losses))
        left.legend()

        rows = [*of(data, "sgd"), *of(data, "adam")]
        places = [place + (row["optimizer"] == "adam") for place, row in enumerate(rows)]
        for place, row in zip(places, rows, strict=True):
            name, (sharp, flat) = row["optimizer"], (row["orbit"][key] for key in ("before", "value"))
            right.plot([place] * 2, [sharp, flat], color=GREY, linewidth=1, zorder=1)
            right.plot(place, sharp, "o", color=colours[name], label=f"{TOLD[name]}: λ₁")
            right.plot(place, flat, "o", color=colours[name], markerfacecolor="white", label=f"{TOLD[name]}: λ₁★")
        stable = 2 / SGD_STEP
        right.axhline(stable, color=INK, linewidth=0.8, linestyle="--")
        right.annotate("2/step of SGD", (places[0] - 0.4, stable), (0, 4), textcoords="offset points")
        right.set_xticks(places, [str(row["seed"]) for row in rows])
        right.set(xlabel="seed", ylabel="curvature of the loss per pixel", title="λ₁, and the least over rescalings")
        values = [row["orbit"][key] for row in rows for key in ("before", "value")]
        powers(right, "y", 0.6 * min(values), 4 * max(values))
        right.set_xlim(places[0] - 0.5, places[-1] + 0.5)
        once(right, ncols=2, loc="upper left")
    return figure


def once(axes: Axes, **options: Any) -> None:
    """Give each label one line in the legend."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(entries.values(), entries.keys(), **options)
