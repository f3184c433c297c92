"""*Unique Properties of Flat Minima in Deep Networks*, Figures 1 and 2 and Lemma 2: networks of scalars.

The loss σ²(w_m⋯w_1 − τ)² of a chain of scalars vanishes on a surface, the valley. Its one curvature there, λ₁, is least
where all |w_k| are equal (T057). Seen along the segment between two minima, the flatter one may look sharper, or the
sharper one flatter: with two layers both always look the same, with three the picture deceives (Lemma 2, T058).
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
from torchflat import Objective, sharpness, symmetry
from torchflat.drawing import BLUE, GREEN, INK, ORANGE, panels, powers

TITLE = "Unique Properties of Flat Minima, Figures 1, 2 and Lemma 2: valleys of scalar networks"

MINIMA = {"w1": (1.0, 1.0, 1.0), "w2": (0.25, 2.0, 2.0), "w3": (4.0, 0.5, 0.5)}

CLAIMS = (
    Claim(
        "least",
        "the least λ₁ with m = 3, σ² = 1.7, τ = −2.5 is 2mσ²|τ|^{2(1 − 1/m)} = 34.6088 (the print omits |·|)",
        "(11)–(13), T057",
        None,
        corrected=(34.608824, 34.608826),
    ),
    Claim(
        "equal", "at the flattest point all |w_k| are |τ|^{1/m}: largest relative deviation", "(12), T057", (0, 1e-5)
    ),
    Claim("points", "the flattest points are 2^{m − 1} in number", "(12), T057", (4, 4)),
    Claim("w1", "λ₁ at w¹ = (1, 1, 1)", "T058", (6 - 1e-9, 6 + 1e-9)),
    Claim("w2", "λ₁ at w² = (¼, 2, 2)", "T058", (33 - 1e-8, 33 + 1e-8)),
    Claim("w3", "λ₁ at w³ = (4, ½, ½)", "T058", (16.125 - 1e-8, 16.125 + 1e-8)),
    Claim(
        "honest",
        "curvature at w² over that at w¹ along their segment: the sharper looks sharper",
        "T058",
        (3.121951220 / 1.219512195 - 1e-6, 3.121951220 / 1.219512195 + 1e-6),
    ),
    Claim(
        "deceptive",
        "curvature at w³ over that at w¹ along their segment: the sharper looks flatter",
        "Figure 2, T058",
        (0.3289473684 / 0.8421052632 - 1e-6, 0.3289473684 / 0.8421052632 + 1e-6),
    ),
    Claim(
        "pairs",
        "share of random pairs of three layers, on one sheet, whose picture Lemma 2 foretells",
        "Lemma 2, T058",
        (1, 1),
    ),
    Claim("two", "largest relative difference of the two curvatures, two layers", "Figure 1, T058", (0, 1e-8)),
)


@dataclass(frozen=True)
class Config:
    """The network of the valley, and how many random pairs are looked at."""

    layers: int
    second_moment: float
    product: float
    pairs: int
    seed: int


def run(config: Config, cells: Cells) -> dict[str, Any]:
    source = torch.Generator().manual_seed(config.seed)
    starts = [minimum(config.layers, config.product, source) for _ in range(16 * 2 ** (config.layers - 1))]
    flattest = [flattened(start, config.second_moment) for start in starts]
    pairs = {
        str(layers): [
            {"minima": [w, v], "curvatures": along(w, v)}
            for w, v in (
                (positive_minimum(layers, source), positive_minimum(layers, source)) for _ in range(config.pairs)
            )
        ]
        for layers in (2, 3)
    }
    return {
        "product": config.product,
        "flattest": flattest,
        "sharpness": {name: sharpness(chain(w), rtol=1e-10).value for name, w in MINIMA.items()},
        "segments": {name: along(MINIMA["w1"], MINIMA[name]) for name in ("w2", "w3")},
        "profiles": {name: profile(MINIMA["w1"], MINIMA[name]) for name in ("w2", "w3")},
        "pairs": pairs,
    }


def minimum(layers: int, product: float, source: torch.Generator) -> list[float]:
    """Return a random point of the valley, on any of its sheets."""
    w = torch.rand(layers - 1, generator=source, dtype=torch.float64) * 2 + 0.3
    w *= torch.randint(0, 2, (layers - 1,), generator=source) * 2 - 1
    return [*w.tolist(), product / float(w.prod())]


def positive_minimum(layers: int, source: torch.Generator) -> list[float]:
    """Return a random minimum of product 1 on the sheet of (1, …, 1): segments to other sheets leave the valley far."""
    w = minimum(layers, 1.0, source)
    return [abs(each) for each in w]


def chain(weights: tuple[float, ...] | list[float], second_moment: float = 1.0) -> Objective:
    """Return the loss σ²(Πw − τ)² at a point of its valley."""
    w = torch.tensor(weights, dtype=torch.float64)
    product = w.prod()
    return Objective.from_function(lambda x: second_moment * (x.prod() - product) ** 2, w)


def flattened(start: list[float], second_moment: float) -> dict[str, Any]:
    """Minimise λ₁ over the rescalings of a minimum."""
    f = chain(start, second_moment)
    ones = torch.eye(len(start), dtype=torch.float64)
    answer = symmetry.flattest(f, symmetry.Laws.from_group(B=ones[:, 1:] - ones[:, :-1]), rtol=1e-8)
    (weights,) = answer.state_dict.values()
    return {"start": start, "value": answer.value, "weights": weights.tolist()}


def along(w: tuple[float, ...] | list[float], v: tuple[float, ...] | list[float]) -> list[float]:
    """Return the curvature of the loss at both minima along the segment between them."""
    direction = torch.tensor(v, dtype=torch.float64) - torch.tensor(w, dtype=torch.float64)
    direction /= direction.norm()
    return [float(direction @ chain(end).hvp(direction)) for end in (w, v)]


def profile(w: tuple[float, ...], v: tuple[float, ...]) -> list[float]:
    f, ends = chain(w), torch.tensor([w, v], dtype=torch.float64)
    return [f.at(torch.lerp(*ends, t)).value() for t in torch.linspace(-0.1, 1.1, 121, dtype=torch.float64)]


def foretold(w: list[float], v: list[float]) -> bool:
    """Say whether Lemma 2 has the first look sharper: Σ v/w > Σ w/v."""
    return sum(b / a for a, b in zip(w, v, strict=True)) > sum(a / b for a, b in zip(w, v, strict=True))


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    flattest, sharp = data["flattest"], data["sharpness"]
    size = abs(data["product"]) ** (1 / len(flattest[0]["weights"]))
    right = [
        foretold(*pair["minima"]) == (pair["curvatures"][0] > pair["curvatures"][1]) for pair in data["pairs"]["3"]
    ]
    return {
        "least": max(row["value"] for row in flattest),
        "equal": max(abs(abs(w) / size - 1) for row in flattest for w in row["weights"]),
        "points": len({tuple(math.copysign(1, w) for w in row["weights"]) for row in flattest}),
        **sharp,
        "honest": data["segments"]["w2"][1] / data["segments"]["w2"][0],
        "deceptive": data["segments"]["w3"][1] / data["segments"]["w3"][0],
        "pairs": sum(right) / len(right),
        "two": max(abs(a / b - 1) for a, b in (pair["curvatures"] for pair in data["pairs"]["2"])),
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    with panels(13, 4, columns=3) as (figure, (valley, pictures, pairs)):
        w = torch.logspace(-1, 1, 200, dtype=torch.float64)
        for sign, colour in ((1, BLUE), (-1, GREEN)):
            valley.plot(sign * w, sign / w, color=colour)
            valley.plot(sign, sign, "o", color=ORANGE)
        valley.set(xlim=(-4, 4), ylim=(-4, 4), xlabel="w₁", ylabel="w₂", title="Two layers: the valley w₁w₂ = 1")
        valley.annotate("flattest", (1, 1), (1.5, 1.5))
        valley.annotate("flattest", (-1, -1), (-3.6, -1.9))

        place = torch.linspace(-0.1, 1.1, 121)
        for name, colour, label in (("w2", BLUE, "to (¼, 2, 2), λ₁ = 33"), ("w3", ORANGE, "to (4, ½, ½), λ₁ = 16")):
            pictures.plot(place, data["profiles"][name], color=colour, label=label)
        pictures.axvline(0, color=INK, linewidth=1)
        pictures.axvline(1, color=INK, linewidth=1)
        pictures.set(
            xlabel="place on the segment from (1, 1, 1), λ₁ = 6",
            ylabel="loss",
            title="Three layers: what a segment shows",
        )
        pictures.set_ylim(0, 1.5 * max(data["profiles"]["w3"][10:111] + data["profiles"]["w2"][10:111]))
        pictures.legend(loc="upper center")

        for layers, colour in (("3", ORANGE), ("2", BLUE)):
            first, second = zip(*(pair["curvatures"] for pair in data["pairs"][layers]), strict=True)
            pairs.plot(first, second, ".", color=colour, markersize=4, label=f"{layers} layers")
        powers(pairs, "x", 1e-3, 1e2)
        powers(pairs, "y", 1e-3, 1e2)
        pairs.set(xlabel="curvature at one end", ylabel="curvature at the other", title="Random pairs of minima")
        pairs.legend(loc="upper left", markerscale=3)
    return {"scalar_networks": figure}
