"""*Unique Properties of Flat Minima*, Figure 7: what sections of the loss show of SGD's and Adam's denoisers.

Along the segment between a network of SGD and one of Adam, the flatter of the two looks sharper in all 16 pairs of the
paper: a picture can deceive (Lemma 2, T058). Along the direction of its own largest curvature each shows what it is.
Beside the pictures stands what ``torchflat.compare`` says of the pair, as trained and at the flattest rescalings.

The networks are those of ``mnist_gains``: taken from its folder, and trained there where they are missing. Networks of
one seed have the same start and stay near each other; those of different seeds do not. The radii and the budget of
``compare``, the reach of the sections and what is expected were settled after runs with 14 × 14 images.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments.cells import Cells
from experiments.claim import Claim, Outcome, Unreached
from experiments.minima import Orbit, Recipe, flattest_of, grid, objective, trained
from experiments.mnist_gains import PRINTED, TOLD, extrapolated, once, reached, share_of_scaling
from torchflat import Objective, Verdict, compare, sharpness
from torchflat.drawing import BLUE, GREEN, GREY, ORANGE, logarithmic, panels

TITLE = "Unique Properties of Flat Minima, Figure 7: sections of the loss between and around SGD's and Adam's denoisers"

# Places on the segment, SGD's network at 0 and Adam's at 1; and how far to each side of an end one looks.
STEPS = 40
PLACES = [i / STEPS for i in range(-STEPS // 4, STEPS + STEPS // 4 + 1)]
LOOK = STEPS // 10
SECTION = 20  # places to each side of a network along its sharpest direction

CLAIMS = (
    Claim(
        "deceived",
        "share of pairs in which the flatter one looks sharper along the segment, a tenth of it to each side",
        "Figure 7, for networks of the losses of Table S1",
        (1, 1),
        expected=Outcome.NOT_REACHED,
    ),
    Claim(
        "sharpest",
        "share of pairs in which the loss rises more along the sharpest direction of the sharper one",
        "Figure 7",
        (1, 1),
    ),
    Claim("compare", "share of pairs in which compare() calls the one of smaller λ₁ flatter", "T002, T006", (1, 1)),
    Claim(
        "scaling",
        "the excess of f°(r) of Adam's is for the most part scaling: its share of the mean excess of log f°, largest r",
        "T089",
        (0.5, math.inf),
    ),
)


@dataclass(frozen=True)
class Config:
    """The networks as ``mnist_gains`` has them, with their folder, and on how many images they are looked at."""

    networks: str
    layers: int
    side: int
    rows: int
    epochs: int
    batch: int
    seeds: tuple
    orbit_rows: int
    orbit_rtol: float
    orbit_budget: float
    section_rows: int
    reach: float
    compare_rows: int
    compare_radii: tuple
    compare_budget: float


def run(config: Config, cells: Cells) -> dict[str, Any]:
    recipes = grid(config.seeds, config.layers, config.side, config.rows, config.epochs, config.batch)
    orbit = Orbit(config.orbit_rows, config.orbit_rtol, config.orbit_budget)
    folder = Path(config.networks)
    of_key = {(recipe.optimizer, recipe.seed): recipe for recipe in recipes}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("networks", "seeds")}

    def as_trained(recipe: Recipe, rows: int, scratch: Path) -> Objective:
        return objective(trained(recipe, folder, scratch)[0], recipe, rows)

    def rescaled(recipe: Recipe, rows: int, scratch: Path) -> Objective:
        return objective(flattest_of(recipe, orbit, folder, scratch)[0], recipe, rows)

    def around(key: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
        recipe = of_key[key["optimizer"], key["seed"]]
        f = as_trained(recipe, config.section_rows, scratch)
        top = sharpness(f, 0.02, method="lanczos")
        return {
            "losses": [row["loss"] for row in trained(recipe, folder, scratch)[1]],
            "sharpness": top.value,
            "section": along(f, config.reach / SECTION * top.vector, range(-SECTION, SECTION + 1)),
        }

    def between(key: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
        ends = of_key["sgd", key["sgd"]], of_key["adam", key["adam"]]
        f, g = (as_trained(recipe, config.section_rows, scratch) for recipe in ends)
        few = config.compare_rows
        return {
            "losses": along(f, g.x - f.x, PLACES),
            "distance": float((g.x - f.x).double().norm()),
            "as_trained": told(*(as_trained(recipe, few, scratch) for recipe in ends), config),
            "rescaled": told(*(rescaled(recipe, few, scratch) for recipe in ends), config),
        }

    alone = [{"optimizer": recipe.optimizer, "seed": recipe.seed, **settings} for recipe in recipes]
    # Pairs of the first seeds come first, as those are the ones that stay when seeds are cut.
    order = sorted(((s, a) for s in config.seeds for a in config.seeds), key=max)
    pairs = [{"sgd": s, "adam": a, **settings} for s, a in order]
    looks = cells.map("networks", alone, around)
    return {
        "epochs": config.epochs,
        "reach": config.reach,
        "networks": [
            {"optimizer": key["optimizer"], "seed": key["seed"], **look} for key, look in zip(alone, looks, strict=True)
        ],
        "pairs": [
            {"sgd": s, "adam": a, **found}
            for (s, a), found in zip(order, cells.map("pairs", pairs, between), strict=True)
        ],
    }


def along(f: Objective, direction: Tensor, places: Sequence[float]) -> list[float]:
    """Return f at x + t·direction."""
    return [f.at(torch.add(f.x, direction, alpha=t)).value() for t in places]


def told(f: Objective, g: Objective, config: Config) -> dict[str, Any]:
    """Return what compare() says of f's point and g's."""
    with warnings.catch_warnings():
        # Whether the budget was enough is in the verdict.
        warnings.simplefilter("ignore", UserWarning)
        answer = compare(f, g, radii=config.compare_radii, budget=config.compare_budget)
    return {
        "verdict": answer.verdict.name,
        "reason": answer.reason,
        "radii": list(answer.radii),
        "profiles": [list(answer.first.values), list(answer.second.values)],
    }


def measure(data: dict[str, Any]) -> Mapping[str, float | Unreached]:
    network = {(row["optimizer"], row["seed"]): row for row in data["networks"]}
    pairs = [(pair, network["sgd", pair["sgd"]], network["adam", pair["adam"]]) for pair in data["pairs"]]
    deceived = [(a["sharpness"] > b["sharpness"]) != (looks(pair)[0] > looks(pair)[1]) for pair, a, b in pairs]
    rises = [(a["sharpness"] > b["sharpness"]) == (rise(a) > rise(b)) for _, a, b in pairs]
    right = [pair["as_trained"]["verdict"] == flatter(a["sharpness"], b["sharpness"]).name for pair, a, b in pairs]
    return {
        "deceived": statistics.fmean(deceived) if at_the_ends(data) else unreached(data, sum(deceived)),
        "sharpest": statistics.fmean(rises),
        "compare": statistics.fmean(right),
        "scaling": share_of_scaling(
            excess(data, "as_trained"), excess(data, "rescaled"), data["epochs"], ends(data)["adam"]
        ),
    }


def looks(pair: dict[str, Any]) -> tuple[float, float]:
    """Return how steeply the loss rises to both sides of the two ends of the segment."""
    losses = pair["losses"]
    first, second = (
        (losses[end - LOOK] + losses[end + LOOK]) / 2 - losses[end] for end in (PLACES.index(0.0), PLACES.index(1.0))
    )
    return first, second


def excess(data: dict[str, Any], when: str) -> float:
    """Return the mean log f°(r) of Adam's over that of SGD's, at the largest radius."""
    ends = (pair[when]["profiles"] for pair in data["pairs"])
    return statistics.fmean(math.log(second[-1] / first[-1]) for first, second in ends)


def rise(network: dict[str, Any]) -> float:
    """Return the rise of the loss at the ends of the section along the sharpest direction."""
    section = network["section"]
    return float((section[0] + section[-1]) / 2 - section[SECTION])


def flatter(first: float, second: float) -> Verdict:
    return Verdict.FLATTER if first < second else Verdict.SHARPER


def at_the_ends(data: dict[str, Any]) -> bool:
    """Say whether the networks are where those of the paper are."""
    return all(reached(row["optimizer"], row["section"][SECTION]) for row in data["networks"])


def unreached(data: dict[str, Any], deceived: int) -> Unreached:
    """Tell what the pairs showed all the same."""
    return Unreached(
        f"{data['epochs']} epochs: {deceived} of {len(data['pairs'])} pairs deceive",
        "; ".join(f"{TOLD[name]} {end}" for name, end in ends(data).items()),
    )


def ends(data: dict[str, Any]) -> dict[str, str]:
    """Tell when the networks of each optimizer would be where those of the paper are."""
    curves = {name: [row["losses"] for row in data["networks"] if row["optimizer"] == name] for name in PRINTED}
    return {
        name: extrapolated(name, [statistics.fmean(epoch) for epoch in zip(*losses, strict=True)])
        for name, losses in curves.items()
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    with panels(12, 4.5, columns=2) as (figure, (segments, directions)):
        same = {True: (GREEN, "same start"), False: (GREY, "different starts")}
        for pair in sorted(data["pairs"], key=lambda pair: pair["sgd"] == pair["adam"]):
            colour, label = same[pair["sgd"] == pair["adam"]]
            segments.plot(PLACES, pair["losses"], color=colour, linewidth=1, label=label)
        for end in (0, 1):
            segments.axvline(end, color=GREY, linewidth=0.8)
        logarithmic(segments)
        segments.set(
            xlabel="place on the segment: 0 SGD's, 1 Adam's",
            ylabel="loss per pixel",
            title="Between SGD's and Adam's networks",
            xlim=(PLACES[0], PLACES[-1]),
        )
        once(segments, loc="upper center")
        lengths = [data["reach"] * i / SECTION for i in range(-SECTION, SECTION + 1)]
        for network in data["networks"]:
            colour = {"sgd": BLUE, "adam": ORANGE}[network["optimizer"]]
            rises = [loss - network["section"][SECTION] for loss in network["section"]]
            directions.plot(lengths, rises, color=colour, linewidth=1.2, label=TOLD[network["optimizer"]])
        directions.set(
            xlabel="distance from the network",
            ylabel="rise of the loss per pixel",
            title="Along the sharpest direction",
        )
        directions.xaxis.set_major_locator(MaxNLocator(5))
        once(directions)
    return {"mnist_sections": figure}
