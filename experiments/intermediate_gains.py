"""*Unique Properties of Flat Minima*, Figure 3 and Theorems 1 to 4: flat and sharp deep linear networks.

Of all stacks of m layers with the product T, σ = ‖T‖₂, on white data, none has λ₁ below 2mσ^{2(1 − 1/m)} (Theorem 1).
At the flattest no layer amplifies an input by more than √m·σ^{k/m} (Theorem 2), and the top singular pair (v, u) of T
goes through them coupled: r_{k+1} = W_k⋯W₁v is parallel to q_k = W_{k+1}ᵀ⋯W_mᵀu (Theorem 3). For a flattest network it
is enough that all layers have the norm σ^{1/m} (Theorem 4). Sharp networks are drawn at random; flat ones come from
them by changes of basis between the layers, which keep the product, where each that lowers λ₁ is taken (T066, T067).

Such a search ends at an excess ε over the least λ₁, and what the theorems say of the flattest then holds nearly. By
T060 λ₁ is at least 2Σ|P_kx|²|q_k|² for unit x, P_k = W_{k−1}⋯W₁: so the gain of layer k times |q_{k+1}| is no more than
√(m(1 + ε))·σ^{1 − 1/m}. And with x = v, |r_k|²|q_k|² = σ^{2(1 − 1/m)}e^{t_k}: Σe^{t_k} ≤ m(1 + ε), while Πe^{t_k} is
Π cos⁻²(r_{k+1}, q_k) ≥ 1. So Σ(e^{t_k} − 1 − t_k) ≤ mε, and every cosine is at least (1 + ε)^{−m/2}.

The moves of the search were chosen after first runs, in which others got stuck, and so was what is expected of the
number of draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import trange

from experiments.cells import Cells
from experiments.claim import Claim, Outcome, Unreached
from torchflat.drawing import BLUE, GREY, INK, ORANGE, logarithmic, panels
from torchflat.problems import PROBLEMS, DeepLinear, mixed, random_minimiser

TITLE = "Unique Properties of Flat Minima, Figure 3 and Theorems 1 to 4: gains and coupling in deep linear networks"

NEAR, CLOSE = 0.1, 0.01  # excess over the least λ₁

CLAIMS = (
    Claim(
        "least", "no network is below 2mσ^{2(1 − 1/m)}: least λ₁ met, over it", "Theorem 1, T061", (1 - 1e-9, math.inf)
    ),
    Claim(
        "attained",
        "W_k = Σ^{1/m} between the singular vectors attains it: λ₁ over it",
        "(27), T061",
        (1 - 1e-9, 1 + 1e-9),
    ),
    Claim("found", "the search comes within 1 % of it from every start: largest excess", "Figure 3, T067", (0, CLOSE)),
    Claim(
        "draws",
        "median number of draws until it is within 10 % (with moves of the library's own: the source's are not known)",
        "T067",
        (1700, 7500),
        expected=Outcome.NOT_REPRODUCED,
    ),
    Claim(
        "gains",
        "its networks keep every gain of layer k below √m·σ^{k/m}, nearly: largest over its bound",
        "Theorem 2, Figure 3, T064",
        (0, 1),
    ),
    Claim(
        "sharp_gains",
        "random networks do not: median over starts of their largest gain over it",
        "Figure 3",
        (1, math.inf),
    ),
    Claim(
        "norms",
        "|r_k||q_k| = σ^{1 − 1/m} for all k, nearly: largest Σ(e^t − 1 − t) over its bound mε",
        "Theorem 3, T064",
        (0, 1),
    ),
    Claim(
        "coupling",
        "r_{k+1} ∥ q_k, nearly: largest (1 + ε)^{−m/2} over the cosine",
        "Theorem 3, T064",
        (0, 1),
    ),
    Claim("loose", "in random networks they are not coupled: median of the least cosine", "Figure 3", (0, 0.5)),
    Claim("enough", "layers of norm σ^{1/m} are flattest: largest relative excess", "Theorem 4, T065", (0, 1e-9)),
    Claim(
        "needed",
        "but need not be of that norm: ‖W₁‖₂/σ^{1/3} in a flattest network of T064",
        "converse of Theorem 4, T065",
        (1.4 / 2 ** (1 / 3) - 1e-9, 1.4 / 2 ** (1 / 3) + 1e-9),
    ),
)


@dataclass(frozen=True)
class Config:
    """Size and number of the layers, length of the moves, number of candidates, and seeds."""

    size: int
    layers: int
    move: float
    draws: int
    seeds: tuple


def run(config: Config, cells: Cells) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "seeds"}
    keys = [{"seed": seed, **settings} for seed in config.seeds]
    return {
        "layers": config.layers,
        "draws": config.draws,
        "searches": cells.map("searches", keys, lambda key, _: search(config, key["seed"])),
        "enough": [equal_norms(config, seed) for seed in config.seeds],
        "converse": looked_at(PROBLEMS["deep-linear/flattest"]),
    }


def search(config: Config, seed: int) -> dict[str, Any]:
    """Draw a network, and take every drawn move that lowers λ₁."""
    source = torch.Generator().manual_seed(seed)
    product = torch.randn(config.size, config.size, generator=source, dtype=torch.float64)
    weights = random_minimiser(product, config.layers, source)
    start = DeepLinear.white(weights)
    least = start.least_sharpness()
    assert least is not None
    best = start.sharpness()
    lowered = [(0, best / least)]
    for draw in trange(1, config.draws + 1, desc=f"seed {seed}", unit="draw", leave=False, disable=None):
        candidate = mixed(weights, config.move, source)
        value = DeepLinear.white(candidate).sharpness()
        if value < best:
            weights, best = candidate, value
            lowered.append((draw, best / least))
    canonical = start.flattest()
    assert canonical is not None
    return {
        "lowered": thinned(lowered),
        "within": {str(excess): first_within(lowered, excess) for excess in (NEAR, CLOSE)},
        "start": looked_at(start),
        "end": looked_at(DeepLinear.white(weights)),
        "canonical": looked_at(canonical),
    }


def looked_at(problem: Any) -> dict[str, Any]:
    """Return λ₁ over its least, and gains and coupling in units of what they are at the flattest."""
    m, sigma = len(problem.weights), float(torch.linalg.matrix_norm(problem.product(), 2))
    pairs = problem.coupling()
    return {
        "ratio": problem.sharpness() / problem.least_sharpness(),
        "gains": [gain / sigma ** (k / m) for k, gain in enumerate(problem.gains(), start=1)],
        "outer": [float(q.norm()) / sigma ** (1 - k / m) for k, (_, q) in enumerate(pairs, start=1)],
        "norms": [float(r.norm() * q.norm()) / sigma ** (1 - 1 / m) for r, q in pairs],
        "cosines": [float(cosine_similarity(r, q, dim=0)) for (_, q), (r, _) in itertools.pairwise(pairs)],
        "layers": [float(torch.linalg.matrix_norm(w, 2)) / sigma ** (1 / m) for w in problem.weights],
    }


def equal_norms(config: Config, seed: int) -> float:
    """Return λ₁ over its least for random layers whose norms are σ^{1/m}: equal, and their top pairs aligned."""
    source = torch.Generator().manual_seed(seed)

    def rotation() -> Tensor:
        drawn = torch.randn(config.size, config.size, generator=source, dtype=torch.float64)
        turned: Tensor = torch.linalg.qr(drawn)[0]
        return turned

    bases = [rotation() for _ in range(config.layers + 1)]
    weights = []
    for before, after in itertools.pairwise(bases):
        values = 1.3 * torch.rand(config.size, generator=source, dtype=torch.float64)
        values[0] = 1.3
        weights.append(after * values @ before.T)
    return looked_at(DeepLinear.white(tuple(weights)))["ratio"]


def first_within(lowered: list[tuple[int, float]], excess: float) -> int | None:
    return next((draw for draw, ratio in lowered if ratio <= 1 + excess), None)


def thinned(lowered: list[tuple[int, float]], points: int = 200) -> list[tuple[int, float]]:
    """Keep the first, the last, and what is between at even distances."""
    stride = max(1, len(lowered) // points)
    return [*lowered[:-1:stride], lowered[-1]]


def measure(data: dict[str, Any]) -> Mapping[str, float | Unreached]:
    searches, m = data["searches"], data["layers"]
    starts, ends = [each["start"] for each in searches], [each["end"] for each in searches]
    within = [each["within"][str(NEAR)] for each in searches]
    return {
        "least": min(each["ratio"] for each in (*starts, *ends, data["converse"])),
        "attained": max((each["canonical"]["ratio"] for each in searches), key=lambda ratio: abs(ratio - 1)),
        "found": max(each["ratio"] for each in ends) - 1,
        "draws": statistics.median(data["draws"] + 1 if draws is None else draws for draws in within),
        "gains": max(
            gain * outer / math.sqrt(m * each["ratio"])
            for each in ends
            for gain, outer in zip(each["gains"][:-1], each["outer"][1:], strict=True)
        ),
        "sharp_gains": statistics.median(max(each["gains"]) for each in starts) / math.sqrt(m),
        "norms": max(spread(each["norms"]) / (m * (each["ratio"] - 1)) for each in ends),
        "coupling": max(each["ratio"] ** (-m / 2) / min(each["cosines"]) for each in ends),
        "loose": statistics.median(min(each["cosines"]) for each in starts),
        "enough": max(abs(ratio - 1) for ratio in data["enough"]),
        "needed": data["converse"]["layers"][0],
    }


def spread(norms: list[float]) -> float:
    """Return Σ(a − 1 − log a) over a = norm²."""
    return math.fsum(norm**2 - 1 - 2 * math.log(norm) for norm in norms)


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    layers = list(range(1, data["layers"] + 1))
    with panels(14, 4.2, columns=3) as (figure, (descent, gains, cosines)):
        for search in data["searches"]:
            draws, ratios = zip(*search["lowered"], strict=True)
            descent.plot([draw / 1000 for draw in draws], [ratio - 1 for ratio in ratios], color=BLUE, linewidth=1)
        for excess in (NEAR, CLOSE):
            descent.axhline(excess, color=GREY, linewidth=0.8, linestyle="--")
        logarithmic(descent)
        descent.set(xlabel="draws, thousands", ylabel="λ₁ / least λ₁ − 1", title="Greedy search")
        for which, colour, marker in (("start", ORANGE, "s"), ("end", BLUE, "o")):
            for search in data["searches"]:
                gains.plot(layers, search[which]["gains"], marker + "-", color=colour, linewidth=0.8, markersize=4)
                cosines.plot(
                    layers[:-1], search[which]["cosines"], marker + "-", color=colour, linewidth=0.8, markersize=4
                )
        gains.axhline(math.sqrt(data["layers"]), color=INK, linewidth=1, linestyle="--")
        gains.annotate("√m", (layers[-3], math.sqrt(data["layers"])), (0, 3), textcoords="offset points")
        logarithmic(gains)
        gains.set(xlabel="layer k", ylabel="gain / σ^(k/m)", title="Largest gains", xticks=layers)
        cosines.set(xlabel="layer k", ylabel="cosine of r and q", title="Coupling", xticks=layers[:-1])
        cosines.set_ylim(-0.05, 1.05)
        for marker, colour, label in (("s", ORANGE, "random"), ("o", BLUE, "after the search")):
            cosines.plot([], [], marker + "-", color=colour, linewidth=0.8, markersize=4, label=label)
        cosines.legend(loc="center", bbox_to_anchor=(0.5, 0.7))
    return {"intermediate_gains": figure}
