"""All examples of *Implicit regularization of normalized gradient descent*: where steps of given length end.

The steps are x_{k+1} = x_k − α_k ∇f/|∇f| with α_k = α/(k + 1)^q, the starts a hundred draws from [−2, 2]ⁿ. "Along the
valley" is the distance to the flat minima after Gauss–Newton steps of least norm onto f = 0, which take away the swing
across it, of length α_k (T050).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.cells import Cells, Key
from experiments.claim import Claim
from experiments.descents import distance, normalized, plain, projected, starts
from experiments.ngd_figures import draw, median
from experiments.ngd_numbers import numbers
from experiments.plane import path
from experiments.valleys import ABSOLUTE, CLARKE, PLANE, QUARTIC, VALLEYS, Valley, factorisations
from torchflat.optim import NormalizedGD
from torchflat.problems import AbsoluteFactorisation, Function

__all__ = ["CLAIMS", "TITLE", "Config", "draw", "measure", "run"]

TITLE = "Implicit regularization of normalized gradient descent: all examples"

# Where gradient descent ends: median distance to the flat minima (T051).
PLAIN = {"product": 0.444, "parabola": 0.741, "ellipse": 0.489, "hyperbola": 0.485}
# Median distance along the valley after 10 000 steps on the product, by α and q (T053).
SHORT = {(0.3, 0.25): 6.6e-5, (0.3, 0.4): 0.145, (0.3, 0.5): 0.304, (0.1, 0.25): 0.19}
# a and b of Example 4.8: no sum of their entries with signs vanishes.
LEFT, RIGHT = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.5, 0.7], dtype=torch.float64)

CLAIMS = (
    Claim(
        "law",
        "one step of length 0.3 from (2, 0.7) on (x₁x₂ − 1)² takes x₁² − x₂² to 0.9799554566 of it",
        "Example 1.1, T037",
        (0.97995545655, 0.97995545665),
    ),
    Claim(
        "flow",
        "gradient descent with step 10⁻³ from (2, 1) ends within 10⁻³ of the flow's end, (1.817354021, 0.5502505227)",
        "Example 1.1, T038",
        (0, 1e-3),
    ),
    Claim(
        "near",
        "nine smooth valleys, α = 1, q = ¼: every start ends a step from the flat minima; largest distance over α_K",
        "Table 1, T050",
        (0, 1.05),
    ),
    Claim("along", "… and along the valley at them; largest distance", "Table 1, T050", (0, 1e-6)),
    Claim("flat", "… so that λ₁ there is the least: largest relative excess", "Table 1, T030–T043", (0, 1e-6)),
    Claim(
        "plain",
        "gradient descent (0.01) ends flat from few starts: most of 100 within 10⁻², product, parabola, ellipse",
        "§1, T051",
        (0, 4),
    ),
    Claim(
        "plain_median",
        "… its median distance is 0.444, 0.741, 0.489, 0.485 (with the hyperbola); largest deviation",
        "T051",
        (0, 6e-4),
    ),
    Claim(
        "kept",
        "gradient descent keeps c in all examples of the plane but 4.1: largest relative change, step 5·10⁻³",
        "Table 1",
        (0, 0.05),
    ),
    Claim(
        "lowered",
        "normalised steps lower c: largest c along the valley after 1 000 steps over c at the start",
        "Table 1",
        (0, 1e-3),
    ),
    Claim(
        "cubic",
        "Example 4.3: starts that end at one of three points, the flat one, (1, 0) and (0, 1)",
        "Example 4.3, T041, T050b",
        (100, 100),
    ),
    Claim(
        "cubic_flat",
        "… and at the flat one, which most starts with x₁x₂ > 0 do",
        "Example 4.3, T050b",
        (57, 61),
    ),
    Claim(
        "quartic",
        "Example 4.1 (p = 4), α = 1, q = 1/6: starts that end within 10⁻³ of 0 along the valley",
        "Example 4.1, T039",
        (96, 100),
    ),
    Claim("quartic_fast", "… and with q = ½ > ¼", "(2), T036, T039", (0, 3)),
    Claim(
        "quartic_rate",
        "constant steps 0.4 there: log x₁ falls by 3.20513 in 1 000 steps, as by x₁ → x₁(1 − α⁴/8)",
        "T039",
        (3.20513 - 5e-6, 3.20513 + 5e-6),
    ),
    Claim(
        "early",
        "q = ¾ > ½ stops early on the product: |x₁² − x₂²| left from (2, 0.7), at least 3.51 − ζ(1.5)",
        "(2), T036, T037",
        (3.51 - 2.6123753487, 3.51),
    ),
    Claim(
        "short",
        "shorter steps or faster decay leave more to do: largest |log₂| of the medians over 6.6e-5, 0.145, 0.304, 0.19",
        "T053",
        (0, 1),
    ),
    Claim(
        "hover",
        "constant steps hover within α of the flat minima: largest distance over α, α²K = 100",
        "Figure 6(a), T036",
        (0, 1.05),
    ),
    Claim(
        "absolute",
        "|x₁x₃ − a| + |x₂x₃ − b|, α = 1, q = 0.4: starts within 1.2·10⁻² along the valley, fewer of (a, b) "
        "= (1, 1), (1, 2)",
        "Example 4.7, T045, T050b",
        (95, 100),
    ),
    Claim("absolute_zero", "… within 10⁻² for (a, b) = (1, 0)", "Example 4.7, T045, T052b", (100, 100)),
    Claim(
        "attractor",
        "‖xyᵀ − abᵀ‖₁: starts that end where |x|² − |y|² can rise as well as fall",
        "Example 4.8, T046",
        (100, 100),
    ),
    Claim(
        "stopped",
        "trap 1: starts on the product that meet a gradient of exactly 0, where the step would be 0/0",
        "T052",
        (70, 90),
    ),
    Claim(
        "kink",
        "trap 2: with autograd's derivative 0 of |·| at 0, starts for (1, 0) that end on the kink x₂ = 0",
        "T052b",
        (10, 30),
    ),
    Claim("kink_far", "… the least distance of these from the flat minima", "T052b", (0.01, 0.5)),
    Claim(
        "powers",
        "f, f² and √f give the same iterates: largest difference in 40 steps",
        "Lemma 3.14, T049",
        (0, 1e-9),
    ),
    Claim("rotated", "so does a rotation, which rotates them", "Proposition 3.37, T055", (0, 1e-9)),
    Claim("nearest", "gradient descent on ½|Ax − b|² ends at x₀ + A⁺(b − Ax₀): distance", "§2.2, T047", (0, 1e-9)),
    Claim(
        "small",
        "½‖XY − M‖², M = diag(3, 1), from entries of size 0.01: gradient descent ends with λ₁ of 6 (flat), to",
        "§2.2, T048",
        (0, 1e-6),
    ),
    Claim(
        "factors",
        "normalised steps on it from N(0, 1): median excess of λ₁ over 2‖M‖₂, relative",
        "T054",
        (0, 1e-6),
    ),
    Claim("factors_most", "… and its quantile of 95 %", "T054", (0, 0.01)),
    Claim("unbalanced", "… yet XᵀX ≠ YYᵀ: median ‖XᵀX − YYᵀ‖_F", "T054", (0.1, math.inf)),
)


@dataclass(frozen=True)
class Config:
    """Steps of the descents, and of those whose numbers the sheet gives for 10 000; what the figures show."""

    steps: int
    long: int
    lengths: tuple
    exponents: tuple
    constants: tuple
    hovering: tuple
    factorisations: int


def run(config: Config, cells: Cells) -> dict[str, Any]:
    keys = [key(name, config.steps) for name in VALLEYS]
    keys += [key(name, 1000, lr=0.01, method="plain") for name in PLAIN]
    keys += [
        key("product", config.steps, lr, decay) for lr, decay in itertools.product(config.lengths, config.exponents)
    ]
    keys += [key("product", config.long, lr, decay) for lr, decay in ((1.0, 0.25), *SHORT)]
    keys += [key("product", round(100 / lr**2), lr, 0.0) for lr in config.constants]
    keys += [key(name, 10_000, 0.1, 0.0) for name in config.hovering]
    keys += [key("cubic", config.long), *(key("quartic", config.long, decay=q) for q in (1 / 6, 0.5))]
    keys += [key(name, config.long, decay=0.4) for name in (*ABSOLUTE, CLARKE)]
    keys = list({tuple(each.items()): each for each in keys}.values())
    batches = [{"seed": seed} for seed in range(config.factorisations)]
    return {
        "steps": config.steps,
        "long": config.long,
        "runs": cells.map("descents", keys, lambda k, _: {"key": dict(k), **descended(k)}),
        "plane": {name: trajectories(problem, start) for name, (problem, start) in PLANE.items()},
        "attractor": attracted(config.long),
        "factors": list(itertools.chain(*cells.map("factorisations", batches, factorised))),
        "numbers": numbers(),
    }


def key(problem: str, steps: int, lr: float = 1.0, decay: float = 0.25, method: str = "normalised") -> dict[str, Any]:
    return {"problem": problem, "method": method, "lr": lr, "decay": decay, "steps": steps}


def descended(key: Key) -> dict[str, Any]:
    """Descend from all starts, and say how far from the flat minima they end, as they are and along the valley."""
    valley = Valley.of(key["problem"])
    start, stopped = starts(valley.flat.shape[1]), torch.zeros(100, dtype=torch.bool)
    if key["method"] == "plain":
        x = plain(valley.function, start, key["steps"], key["lr"])
    else:
        x = normalized(valley.function, start, key["steps"], key["lr"], key["decay"], stopped)
    end = projected(valley.residuals, x)
    return {
        "points": x.tolist(),
        "ends": end.tolist(),
        "distance": distance(x, valley.flat).tolist(),
        "along": distance(end, valley.flat).tolist(),
        "stopped": int(stopped.sum()),
    }


def trajectories(problem: Function, start: tuple[float, float]) -> dict[str, Any]:
    """Follow both methods from one start; c at each iterate, and at the end of the normalised steps in the valley."""
    steps = path(problem.function, start, lambda x: NormalizedGD(x, lr=1.0, decay=decay_of(problem)), 1000)
    slow = path(problem.function, start, lambda x: torch.optim.SGD(x, lr=5e-3), 2000)[::2]
    valley = Valley.of(next(name for name, (each, _) in PLANE.items() if each is problem))
    (end,) = projected(valley.residuals, torch.tensor(steps[-1:], dtype=torch.float64))
    return {
        "normalised": steps,
        "plain": slow,
        "c": {"normalised": [regulariser(problem, x) for x in steps], "plain": [regulariser(problem, x) for x in slow]},
        "c_end": regulariser(problem, end.tolist()),
    }


def decay_of(problem: Function) -> float:
    """Return an exponent of the steps below 1/p."""
    return 1 / 6 if problem is QUARTIC else 0.25


def regulariser(problem: Function, x: list[float]) -> float:
    """Return c of table 1, x₁² for Example 4.1, which has no conserved quantity; infinity where it has a pole."""
    conserved = problem.at(x).conserved()
    c = x[0] ** 2 if conserved is None else float(conserved.abs().sum())
    return c if math.isfinite(c) else math.inf


def attracted(steps: int) -> dict[str, Any]:
    """Descend on ‖xyᵀ − abᵀ‖₁, whose valley is (at, b/t), and say where |x|² − |y|² can rise as well as fall.

    A step of length α at signs Λ adds α²(|Λy|² − |Λᵀx|²)/(|Λy|² + |Λᵀx|²) to it (T037): it rises at t where
    t⁴ < |Λb|²/|Λᵀa|². Beyond the least and the largest of these over Λ it can move one way only, inwards.
    """
    problem = AbsoluteFactorisation.of(LEFT[:, None], RIGHT[None])
    end = projected(problem.residuals, normalized(problem.function, starts(5), steps, decay=0.4))
    signs = problem.signs().view(-1, len(LEFT), len(RIGHT))
    turns = (signs @ RIGHT).square().sum(1) / (LEFT @ signs).square().sum(1)
    scales = (end[:, : len(LEFT)] / LEFT).mean(1).abs()
    return {"t": scales.tolist(), "between": [float(turns.min()) ** 0.25, float(turns.max()) ** 0.25]}


def factorised(key: Key, scratch: Path) -> list[dict[str, float]]:
    """Take 25 Gaussian starts to the end of a descent on ½‖XY − M‖²."""
    ends = factorisations(key["seed"], 25, 2000)
    return [{"sharpness": end.sharpness(), "imbalance": float(end.conserved().norm())} for end in ends]


def found(data: dict[str, Any], problem: str, steps: int, *rest: Any, **more: Any) -> dict[str, Any]:
    """Return the record of a run."""
    wanted = key(problem, steps, *rest, **more)
    return next(run for run in data["runs"] if run["key"] == wanted)


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    smooth = {name: found(data, name, data["steps"]) for name in VALLEYS}
    stuck = {name: found(data, name, 1000, lr=0.01, method="plain") for name in PLAIN}
    cubic, quartic = found(data, "cubic", data["long"]), found(data, "quartic", data["long"], decay=1 / 6)
    absolute = [within(found(data, name, data["long"], decay=0.4)["along"], 1.2e-2) for name in ABSOLUTE]
    short = [median(found(data, "product", data["long"], *each)["along"]) / far for each, far in SHORT.items()]
    hovering = [run for run in data["runs"] if run["key"]["decay"] == 0]
    corners = distance(torch.tensor(cubic["ends"]).double(), torch.eye(2).double())
    kink = found(data, CLARKE, data["long"], decay=0.4)
    on_kink = [far for x, far in zip(kink["points"], kink["along"], strict=True) if x[1] == 0]
    low, high = data["attractor"]["between"]
    slack = data["long"] ** -0.4
    excess = sorted(end["sharpness"] / 6 - 1 for end in data["factors"])
    paths = data["plane"]
    return {
        **data["numbers"],
        "near": max(max(run["distance"]) for run in smooth.values()) * data["steps"] ** 0.25,
        "along": max(max(run["along"]) for run in smooth.values()),
        "flat": max(sharpness_excess(name, run["ends"]) for name, run in smooth.items()),
        "plain": max(within(stuck[name]["distance"], 1e-2) for name in ("product", "parabola", "ellipse")),
        "plain_median": max(abs(median(run["distance"]) - PLAIN[name]) for name, run in stuck.items()),
        "kept": max(drift(paths[name]["c"]["plain"]) for name in paths if name != "quartic"),
        "lowered": max(each["c_end"] / each["c"]["normalised"][0] for each in paths.values()),
        "cubic": within(cubic["along"], 1e-2) + int((corners < 1e-2).sum()),
        "cubic_flat": within(cubic["along"], 1e-3),
        "quartic": within(quartic["along"], 1e-3),
        "quartic_fast": within(found(data, "quartic", data["long"], decay=0.5)["along"], 1e-3),
        "short": max(abs(math.log2(ratio)) for ratio in short),
        "hover": max(max(run["distance"]) / run["key"]["lr"] for run in hovering),
        "absolute": min(absolute[:2]),
        "absolute_zero": within(found(data, "absolute 1 0", data["long"], decay=0.4)["along"], 1e-2),
        "attractor": sum(low - slack <= t <= high + slack for t in data["attractor"]["t"]),
        "stopped": found(data, "product", data["long"])["stopped"],
        "kink": len(on_kink),
        "kink_far": min(on_kink, default=math.nan),
        "factors": median(excess),
        "factors_most": excess[math.ceil(0.95 * len(excess)) - 1],
        "unbalanced": median([end["imbalance"] for end in data["factors"]]),
    }


def within(distances: list[float], radius: float) -> int:
    return sum(far <= radius for far in distances)


def drift(c: list[float]) -> float:
    """Return how far c moves from where it starts, relative to that."""
    return max(abs(each / c[0] - 1) for each in c)


def sharpness_excess(name: str, ends: list[list[float]]) -> float:
    problem = VALLEYS[name]
    return max(problem.at(x).sharpness() for x in ends) / problem.flattest().sharpness() - 1
