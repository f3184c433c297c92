"""Balanced is not flat, and flat is not balanced: *On the geometry of flat minima*, sections 4 and 5.

Of all factors XY = M those of least norm are balanced, XᵀX = YYᵀ (T019); the flat ones only have ‖X‖₂ = ‖Y‖₂ (T025).
Theorems 2 and 3 as printed say that a flat minimum has a maximal (sub)gradient or eigenvector v with C(v) = 0: two
functions show that it need not. What holds is that 0 is in the convex hull of these C (T016, T018). In a trained
network the least λ₁ of all rescalings is far below λ₁ of the balanced one (T089).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call

from experiments.cells import Cells, Key
from experiments.claim import Claim
from experiments.valleys import factorisations, gap
from torchflat import Objective, eigenpairs, sharpness, symmetry, variation
from torchflat.data import denoising, mnist, sample_digits
from torchflat.drawing import BLUE, GREEN, INK, ORANGE, logarithmic, panels
from torchflat.problems import Determinants, Factorisation, MaximumOfThree

TITLE = "On the geometry of flat minima: balanced against flat, and where Theorems 2 and 3 fail as printed"

OPTIMIZERS = {"SGD": 1000, "Adam": 2000}  # with the seeds of their noise
FLATTEST_OF_THREE = MaximumOfThree((2.0, 0.5, 0.5, 2.0))
CIRCLE = Determinants((0.0, 0.0, 1.0, 0.0, 0.0, 1.0))
# Radius at which the Lipschitz modulus of the maximum of three is measured.
SMALL = 1e-4

CLAIMS = (
    Claim(
        "inside",
        "½‖XY − M‖², X = diag(√3, t), Y = diag(√3, 1/t): λ₁ = 2‖M‖₂ for 1/√3 ≤ t ≤ √3; largest relative deviation",
        "Example 5, T025, T026",
        (0, 1e-6),
    ),
    Claim(
        "outside",
        "… and larger beyond: at t = 2 it is 7 (14 without ½)",
        "Example 5, T026",
        (7 - 1e-6, 7 + 1e-6),
    ),
    Claim(
        "gap",
        "… where at t = 1.5 ‖XᵀX − YYᵀ‖_F = t² − 1/t² ≠ 0, flat all the same",
        "Example 5, T026",
        (1.5**2 - 1.5**-2 - 1e-9, 1.5**2 - 1.5**-2 + 1e-9),
    ),
    Claim("least", "the least λ₁ over GL(2), as it is found from t = 3: 2‖M‖₂ = 6", "T025, T088", (6 - 1e-3, 6 + 1e-3)),
    Claim("descended", "normalised steps end flat: median of λ₁/2‖M‖₂ − 1", "T054", (0, 1e-6)),
    Claim("descended_gap", "… not balanced: median ‖XᵀX − YYᵀ‖_F", "T054", (0.1, math.inf)),
    Claim(
        "modulus",
        "max{|x₁x₂ − 1|, |x₃x₄ − 1|, |x₁x₄ − 4|/10}: lip f at (2, ½, ½, 2) is √17/2",
        "Theorem 2, T016",
        (math.sqrt(17) / 2 * 0.999, math.sqrt(17) / 2 * 1.001),
    ),
    Claim(
        "strict",
        "… the least of its orbit: that of others near over it, least",
        "Theorem 2, T016",
        (1 + 1e-4, math.inf),
    ),
    Claim(
        "single_gradient",
        "… with a maximal subgradient v that has C(v) = 0: least |C(v)|",
        "Theorem 2, Corollary 6, T016",
        printed=(0, 1e-6),
        corrected=(3.75 - 1e-9, 3.75 + 1e-9),
    ),
    Claim("hull_gradient", "… and 0 in the convex hull of these C: distance", "T016", (0, 1e-9)),
    Claim(
        "flat_vectors",
        "½det(x₁, x₂)² + ½det(x₁, x₃)² + ⅛(det(x₂, x₃) − 1)²: (0, e₁, e₂) is flat; least λ₁ of its orbit over λ₁ there",
        "Theorem 3, T018",
        (1 - 1e-6, math.inf),
    ),
    Claim(
        "single_vector",
        "… with a unit top eigenvector v that has C(v) = 0: least ‖C(v)‖_F",
        "Theorem 3, Corollary 7, T018",
        printed=(0, 1e-6),
        corrected=(math.sqrt(0.5) - 1e-4, math.sqrt(0.5) + 1e-4),
    ),
    Claim("hull_vector", "… and 0 the C of a mixture of them: ‖·‖_F", "T018", (0, 1e-6)),
    Claim("learned", "denoisers learn: larger loss over that of the mean image", "T072", (0, 1)),
    Claim("same", "trained denoisers compute the same balanced or flattest: largest change", "T084", (0, 1e-4)),
    Claim("balanced", "… balanced: largest Σ|C|/|x|²", "T019, T089", (0, 1e-5)),
    Claim("SGD_headroom", "SGD: λ₁/λ₁★, some of it is scaling", "T089", (1.1, math.inf)),
    Claim("Adam_headroom", "Adam: λ₁/λ₁★, some of it is scaling", "T089", (1.1, math.inf)),
    Claim("SGD_balanced", "SGD: λ₁ of the balanced network over λ₁★: balanced is not flat", "T089", (1.1, math.inf)),
    Claim("Adam_balanced", "Adam: λ₁ of the balanced network over λ₁★: balanced is not flat", "T089", (1.1, math.inf)),
    Claim(
        "unbalanced",
        "flat is not balanced: least |x|² of the flattest networks over that of the balanced",
        "T089",
        (1.01, math.inf),
    ),
)


@dataclass(frozen=True)
class Config:
    """The denoiser that is trained, on how many digits, and how λ₁★ is looked for."""

    data: str
    depth: int
    width: int
    epochs: int
    batch: int
    rows: int
    rtol: float
    budget: float
    factorisations: int


def run(config: Config, cells: Cells) -> dict[str, Any]:
    network = {name: getattr(config, name) for name in ("data", "depth", "width", "epochs", "batch", "rows", "rtol")}
    keys = [{"optimizer": name, "budget": config.budget, **network} for name in OPTIMIZERS]
    (ends,) = cells.map("factorisations", [{"batches": config.factorisations}], descended)
    return {
        "example": example(),
        "descended": ends,
        "maximum": maximum(),
        "determinants": determinants(),
        "networks": dict(zip(OPTIMIZERS, cells.map("networks", keys, trained_network), strict=True)),
    }


# Factorisation -------------------------------------------------------------------------------------------------------


def factorisation(t: float) -> Factorisation:
    """Return factors of diag(3, 1) that share the larger singular value equally and the smaller one as t : 1/t."""
    first = math.sqrt(3)
    return Factorisation(
        *(torch.diag(torch.tensor(pair, dtype=torch.float64)) for pair in ((first, t), (first, 1 / t)))
    )


def example() -> dict[str, Any]:
    """Follow λ₁ and the imbalance along t, and look for the least λ₁ from a sharp point."""
    ts = [1.5, 2.0, *torch.logspace(-0.5, 0.5, 61, dtype=torch.float64).tolist()]
    problems = [factorisation(t) for t in ts]
    start = torch.cat([problems[-1].X.flatten(), problems[-1].Y.flatten()])
    columns_of_X, rows_of_Y = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[4, 5], [6, 7]])
    group = symmetry.Laws.from_group(blocks=[(columns_of_X, rows_of_Y)])
    f = Objective.from_function(lambda x: 0.5 * gap(x).square().sum(), start)
    return {
        "t": ts,
        "sharpness": [sharpness(problem.objective(), rtol=1e-8).value for problem in problems],
        "imbalance": [float(problem.conserved().norm()) for problem in problems],
        "least": symmetry.flattest(f, group, rtol=1e-4).value,
    }


def descended(key: Key, scratch: Path) -> list[dict[str, float]]:
    """Take 25 Gaussian starts a batch to the end of a normalised descent."""
    ends = [end for seed in range(key["batches"]) for end in factorisations(seed, 25, 2000)]
    return [{"sharpness": end.sharpness(), "imbalance": float(end.conserved().norm())} for end in ends]


# Counterexamples -----------------------------------------------------------------------------------------------------


def maximum() -> dict[str, Any]:
    """Measure lip f near the flat minimum of T016, and C of the maximal subgradients there."""
    ts = [0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25]
    points = [FLATTEST_OF_THREE.at((2 * t, 0.5 / t, 0.5 * t, 2 / t)) for t in ts]
    slopes = [variation(point.objective(), radii=[SMALL]).values[0] / SMALL for point in points]
    subgradients = FLATTEST_OF_THREE.maximal_subgradients()
    return {"t": ts, "slopes": slopes, "C": [float(FLATTEST_OF_THREE.at(v).conserved()) for v in subgradients]}


def determinants() -> dict[str, Any]:
    """Measure λ₁ on the orbit of T018's flat minimum under SL(2), and C on its top eigenspace."""
    source = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(50):
        g = torch.matrix_exp(traceless(0.5 * torch.randn(2, 2, generator=source, dtype=torch.float64)))
        x = (torch.tensor(CIRCLE.point, dtype=torch.float64).view(3, 2) @ g.T).flatten()
        moved.append(sharpness(CIRCLE.at(x).objective(), rtol=1e-6).value)
    top = eigenpairs(CIRCLE.objective(), 2, rtol=1e-8)
    first, second = (vector.double() for vector in top.vectors.T)
    angles = torch.linspace(0, math.pi, 181, dtype=torch.float64)
    single = [float(conserved(torch.cos(angle) * first + torch.sin(angle) * second).norm()) for angle in angles]
    mixed = (conserved(first) + conserved(second)) / 2
    return {"values": list(map(float, top.values)), "moved": moved, "single": single, "mixed": float(mixed.norm())}


def traceless(A: Tensor) -> Tensor:
    return A - A.trace() / len(A) * torch.eye(len(A), dtype=A.dtype)


def conserved(v: Tensor) -> Tensor:
    return CIRCLE.at(v).conserved()


# Networks ------------------------------------------------------------------------------------------------------------


def denoiser(depth: int, width: int, seed: int) -> nn.Sequential:
    """Make a ReLU network without biases from 784 pixels to 784, orthogonal at first.

    With He's weights SGD at ½ kills all units of a network that is so narrow.
    """
    torch.manual_seed(seed)
    sizes = [784, *(depth - 1) * [width], 784]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])


def trained_network(key: Key, scratch: Path) -> dict[str, Any]:
    """Train a denoiser, and compare λ₁ of it, of the balanced network and of the flattest that compute the same."""
    images = sample_digits()[0] if key["data"] == "sample" else mnist("train")[0]
    noisy, clean = denoising(images, seed=OPTIMIZERS[key["optimizer"]])
    model = denoiser(key["depth"], key["width"], seed=0)
    losses = train(model, key, noisy, clean)
    rows = noisy[: key["rows"]], clean[: key["rows"]]
    f = Objective(model, F.mse_loss, rows)
    found = symmetry.laws(model, noisy[:2])
    balanced = symmetry.balance(model, found)
    answer = symmetry.flattest(f, found, rtol=key["rtol"], budget=key["budget"])
    flattest = {**model.state_dict(), **answer.state_dict}
    moved = copy.deepcopy(model)
    moved.load_state_dict(dict(balanced))
    with torch.no_grad():
        outputs = [
            functional_call(model, dict(state), noisy[:100]) for state in (model.state_dict(), balanced, flattest)
        ]
    return {
        "losses": losses,
        "variance": float(images.var(0, unbiased=False).mean()),
        "trained": answer.before.value,
        "balanced": sharpness(Objective(moved, F.mse_loss, rows)).value,
        "flattest": answer.value,
        "status": answer.status.name,
        "change": max(float((each - outputs[0]).norm() / outputs[0].norm()) for each in outputs[1:]),
        "residual": balanced.residual,
        "norms": {
            "trained": norm(model.state_dict()),
            "balanced": norm(balanced),
            "flattest": norm(flattest),
        },
    }


def train(model: nn.Module, key: Key, noisy: Tensor, clean: Tensor) -> list[float]:
    """Train, and return the mean loss of each epoch."""
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if key["optimizer"] == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, betas=(0.8, 0.99))
    source, losses = torch.Generator().manual_seed(1), []
    for _ in range(key["epochs"]):
        total = 0.0
        for rows in torch.randperm(len(noisy), generator=source).split(key["batch"]):
            loss = F.mse_loss(model(noisy[rows]), clean[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        losses.append(total / len(noisy))
    return losses


def norm(state: Mapping[str, Tensor]) -> float:
    """Return |x|."""
    return math.hypot(*(float(tensor.double().norm()) for tensor in state.values()))


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    example, maximum, determinants, networks = (
        data[name] for name in ("example", "maximum", "determinants", "networks")
    )
    curve = list(zip(example["t"], example["sharpness"], strict=True))
    inside = [value for t, value in curve if 3**-0.5 <= t <= 3**0.5]
    flat = maximum["t"].index(1.0)
    slopes, C = maximum["slopes"], maximum["C"]
    others = [slope for i, slope in enumerate(slopes) if i != flat]
    ratios = {name: {other: run[other] / run["flattest"] for other in run["norms"]} for name, run in networks.items()}
    return {
        "inside": max(abs(value / 6 - 1) for value in inside),
        "outside": curve[1][1],
        "gap": example["imbalance"][0],
        "least": example["least"],
        "descended": statistics.median(end["sharpness"] / 6 - 1 for end in data["descended"]),
        "descended_gap": statistics.median(end["imbalance"] for end in data["descended"]),
        "modulus": slopes[flat],
        "strict": min(others) / slopes[flat],
        "single_gradient": min(map(abs, C)),
        "hull_gradient": max(0.0, min(C), -max(C)),
        "flat_vectors": min(determinants["moved"]) / determinants["values"][0],
        "single_vector": min(determinants["single"]),
        "hull_vector": determinants["mixed"],
        "learned": max(run["losses"][-1] / run["variance"] for run in networks.values()),
        "same": max(run["change"] for run in networks.values()),
        "balanced": max(run["residual"] for run in networks.values()),
        "SGD_headroom": ratios["SGD"]["trained"],
        "Adam_headroom": ratios["Adam"]["trained"],
        "SGD_balanced": ratios["SGD"]["balanced"],
        "Adam_balanced": ratios["Adam"]["balanced"],
        "unbalanced": min((run["norms"]["flattest"] / run["norms"]["balanced"]) ** 2 for run in networks.values()),
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    return {"flat_but_unbalanced": unbalanced(data), "flat_counterexamples": counterexamples(data)}


def counterexamples(data: dict[str, Any]) -> Figure:
    """Draw both functions for which the theorems fail: flat where no single C(v) vanishes."""
    maximum, determinants = data["maximum"], data["determinants"]
    with panels(13, 4, columns=3) as (figure, (slope, gradients, vectors)):
        slope.plot(maximum["t"], maximum["slopes"], "o-", color=BLUE)
        slope.set(xlabel="place t on the orbit", ylabel="lip f", title="Maximum of three: flat at t = 1")
        gradients.plot(range(1, 1 + len(maximum["C"])), maximum["C"], "o", color=BLUE, label="C(v)")
        gradients.axhline(0, color=ORANGE, linestyle="--", label="printed: some C(v) = 0")
        gradients.set_xticks(range(1, 1 + len(maximum["C"])))
        gradients.set(xlabel="maximal subgradient v at t = 1", ylabel="C(v)", title="0 is in the hull only")
        gradients.set(ylim=(-5, 8), xlim=(0.5, len(maximum["C"]) + 0.5))
        gradients.legend(loc="upper left")
        angles = torch.linspace(0, 180, len(determinants["single"])).tolist()
        vectors.plot(angles, determinants["single"], color=BLUE, label="a top eigenvector v")
        vectors.axhline(determinants["mixed"], color=GREEN, label="a mixture of two")
        vectors.set(xlabel="angle of v (degrees)", ylabel="‖C‖", title="Determinants: the same", ylim=(-0.1, 1.1))
        vectors.set_xticks([0, 45, 90, 135, 180])
        vectors.legend(loc="upper left")
    return figure


def unbalanced(data: dict[str, Any]) -> Figure:
    """Draw λ₁ and the imbalance of factors, and λ₁ of the denoisers."""
    example, networks = data["example"], data["networks"]
    with panels(13, 4, columns=3) as (figure, (along, factors, bars)):
        t, value, imbalance = (list(each)[2:] for each in (example["t"], example["sharpness"], example["imbalance"]))
        along.plot(t, value, color=BLUE, label="λ₁")
        along.plot(t, imbalance, color=ORANGE, label="‖XᵀX − YYᵀ‖")
        along.axvspan(3**-0.5, 3**0.5, color=GREEN, alpha=0.12, linewidth=0, label="flat")
        along.set(xlabel="t", title="½‖XY − M‖²: flat along a segment", ylim=(0, 14))
        along.legend(loc="upper center")

        factors.plot(
            [end["imbalance"] for end in data["descended"]],
            [max(end["sharpness"] / 6 - 1, 1e-16) for end in data["descended"]],
            "o",
            color=BLUE,
            markersize=5,
        )
        logarithmic(factors)
        factors.set_ylim(3e-17, 1)
        factors.set(
            xlabel="‖XᵀX − YYᵀ‖",
            ylabel="λ₁ / 2‖M‖₂ − 1",
            title="Where normalised steps end",
            ylim=(3e-17, 1),
            xlim=(0, None),
        )

        looks = (("trained", INK), ("balanced", ORANGE), ("flattest", BLUE))
        for shift, (look, colour) in zip((-0.27, 0, 0.27), looks, strict=True):
            heights = [run[look] for run in networks.values()]
            places = [i + shift for i in range(len(heights))]
            drawn = bars.bar(places, heights, 0.24, color=colour, label=look)
            bars.bar_label(drawn, [f"{height:.2g}" for height in heights], padding=2)
        bars.set_xticks(range(len(networks)), list(networks))
        bars.set(ylabel="λ₁", title="A denoiser, three ways to scale it")
        bars.set_ylim(0, 1.35 * max(run[look] for run in networks.values() for look, _ in looks))
        bars.grid(axis="x", visible=False)
        bars.legend(loc="upper left", ncols=3, columnspacing=1, handlelength=1)
    return figure
