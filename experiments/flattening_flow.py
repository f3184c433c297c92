"""Corollary 5 and Example 11 of *On the geometry of flat minima*: the flow of the conserved quantity flattens.

The flow is ẋ = −∇c, c = ‖C(x)‖²/4. It stays in the level set of f, and λ₁ falls along it at least at the proved rate
until the flat minima are reached (T013–T015, T033). Where all is known in closed form, for f = (x₁x₂ − 1)² from (3, ⅓):
x = (e^θ, e^−θ) with tanh θ = 0.8e^(−4t), λ₁ = 4 cosh 2θ and d log λ₁/dt = −2w, w = (x₁² − x₂²)²/|x|², twice the
proved rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.cells import Cells
from experiments.claim import Claim
from torchflat import Objective
from torchflat.drawing import BLUE, GREEN, INK, ORANGE, logarithmic, panels
from torchflat.problems import Monomial
from torchflat.symmetry import Laws, flow

TITLE = "On the geometry of flat minima, Corollary 5 and Example 11: the flow of the conserved quantity flattens"

PAIR, TRIPLE, MATRICES = "(x₁x₂ − 1)²", "(x₁x₂²x₃³ − 1)²", "½‖XY − M‖²"
LEAST = {PAIR: 4.0, TRIPLE: 12 * 108 ** (1 / 6), MATRICES: 6.0}  # T032, T025

CLAIMS = (
    Claim("oracle", "x₁ at t = 0.1 from (3, ⅓) is 1.820089175", "T015", (1.820089175 - 1e-6, 1.820089175 + 1e-6)),
    Claim("oracle_sharpness", "λ₁ there is 7.229181857", "T015", (7.229181857 - 1e-5, 7.229181857 + 1e-5)),
    Claim("moved", "f stays put: its largest value along all flows, from 0", "Proposition 6, T013", (0, 1e-24)),
    Claim("monotone", "λ₁ never rises: its largest relative rise between two times", "Corollary 5, T015", (0, 1e-6)),
    Claim("rate", "λ₁ falls at least like e^(−wt): least −d log λ₁/dt over w", "Corollary 5, T015", (1, math.inf)),
    Claim(
        "doubled",
        "the proved rate can be doubled: −d log λ₁/dt is 2w exactly here; largest deviation",
        "T015",
        (0, 1e-4),
    ),
    Claim("limit", "every flow ends flat: largest relative excess of λ₁ over its least", "Example 11, T033", (0, 1e-6)),
)


@dataclass(frozen=True)
class Config:
    """Times at which the flows are looked at: from 0 to ``until`` in ``times`` equal parts."""

    until: float
    times: int
    seed: int


def run(config: Config, cells: Cells) -> dict[str, Any]:
    return {name: followed(f, found, config) for name, (f, found) in problems(config.seed).items()}


def problems(seed: int) -> dict[str, tuple[Objective, Laws]]:
    """Return three functions at points of their valleys that are far from flat, with the groups that keep them."""
    source = torch.Generator().manual_seed(seed)
    X = torch.eye(2, dtype=torch.float64) + 0.5 * torch.randn(2, 2, generator=source, dtype=torch.float64)
    M = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    start = torch.cat([X.flatten(), torch.linalg.solve(X, M).flatten()])
    matrices = Objective.from_function(lambda x: 0.5 * ((x[:4].view(2, 2) @ x[4:].view(2, 2) - M) ** 2).sum(), start)
    columns_of_X, rows_of_Y = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[4, 5], [6, 7]])
    return {
        PAIR: (Monomial((3.0, 1 / 3), (1, 1)).objective(), Laws.from_group(B=column(1, 1))),
        TRIPLE: (Monomial((0.5, 2.0, 2.0 ** (-1 / 3)), (1, 2, 3)).objective(), Laws.from_group(B=column(1, 2, 3))),
        MATRICES: (matrices, Laws.from_group(blocks=[(columns_of_X, rows_of_Y)])),
    }


def column(*exponents: int) -> Tensor:
    """Return the group of Πxᵢ^υᵢ whose conserved quantities are υ_n xᵢ² − υᵢx_n²."""
    v = torch.tensor(exponents, dtype=torch.float64)
    return torch.cat([v[-1] * torch.eye(len(v) - 1, dtype=torch.float64), -v[None, :-1]])


def followed(f: Objective, found: Laws, config: Config) -> dict[str, Any]:
    """Follow the flow from time to time."""
    times = [config.until * i / config.times for i in range(config.times + 1)]
    xs, values, sharpnesses, rates = [f.x.tolist()], [f.value()], [], []
    for now, then in pairwise(times):
        answer = flow(f, found, then - now, sharpness_rtol=1e-9)
        f = f.at(answer.x)
        sharpnesses += [answer.before.value] if not sharpnesses else []
        rates += [answer.rates[0]] if not rates else []
        xs.append(f.x.tolist())
        values.append(f.value())
        sharpnesses.append(answer.after.value)
        rates.append(answer.rates[1])
    return {"times": times, "x": xs, "values": values, "sharpness": sharpnesses, "rates": rates}


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    pair = data[PAIR]
    at = min(range(len(pair["times"])), key=lambda i: abs(pair["times"][i] - 0.1))
    w = [(a**2 - b**2) ** 2 / (a**2 + b**2) for a, b in pair["x"]]
    ratios = [-rate / each for rate, each in zip(pair["rates"], w, strict=True) if each > 1e-3]
    rises = [b / a - 1 for run in data.values() for a, b in pairwise(run["sharpness"])]
    return {
        "oracle": pair["x"][at][0],
        "oracle_sharpness": pair["sharpness"][at],
        "moved": max(value for run in data.values() for value in run["values"]),
        "monotone": max(0.0, *rises),
        "rate": min(ratios),
        "doubled": max(abs(ratio - 2) for ratio in ratios),
        "limit": max(data[name]["sharpness"][-1] / least - 1 for name, least in LEAST.items()),
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    with panels(11, 4, columns=2) as (figure, (left, right)):
        for (name, run), colour in zip(data.items(), (BLUE, ORANGE, GREEN), strict=True):
            excess = [value / LEAST[name] - 1 for value in run["sharpness"]]
            left.plot(run["times"], [each if each > 1e-13 else math.nan for each in excess], color=colour, label=name)
        logarithmic(left)
        left.set(xlabel="time of the flow", ylabel="λ₁ / least λ₁ − 1", title="λ₁ falls to its least")
        left.legend()
        pair = data[PAIR]
        exact = [4 * math.cosh(2 * math.atanh(0.8 * math.exp(-4 * t))) for t in pair["times"]]
        w = [(a**2 - b**2) ** 2 / (a**2 + b**2) for a, b in pair["x"]]
        right.plot(pair["times"], exact, color=INK, linewidth=5, alpha=0.2, label="4 cosh 2θ")
        right.plot(pair["times"], pair["sharpness"], color=BLUE, label="λ₁, measured")
        bound = [pair["sharpness"][0]]
        for i, step in enumerate(b - a for a, b in pairwise(pair["times"])):
            bound.append(bound[-1] * math.exp(-step * (w[i] + w[i + 1]) / 2))
        right.plot(pair["times"], bound, "--", color=ORANGE, label="proved: e^(−∫w)")
        right.set(xlabel="time of the flow", ylabel="λ₁", title=f"{PAIR} from (3, ⅓)", xlim=(0, 0.6), ylim=(0, 20))
        right.legend()
    return {"flattening_flow": figure}
