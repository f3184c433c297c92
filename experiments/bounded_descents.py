"""The bounded cases of Corollary 1.3 of *Certifying the absence of spurious local minima at infinity*.

What the gradient flow conserves, and the value of f, which it lowers, bound the norms of the factors (T080–T083). Steps
of size η change what is conserved by O(η) in a given time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.claim import Claim
from experiments.plane import path
from torchflat.drawing import BLUE, GREEN, INK, ORANGE, logarithmic, panels, powers
from torchflat.problems import AbsoluteFactorisation
from torchflat.problems.problem import spectral_norm

__all__ = ["CLAIMS", "draw", "measure", "run"]

Scalar = Callable[[Tensor], Tensor]

CLAIMS = (
    Claim(
        "linear_drift",
        "deep linear networks conserve W₂ᵀW₂ − W₁W₁ᵀ: its drift at a step over that at half the step",
        "Proposition 4.1, T080",
        (1.8, 2.3),
    ),
    Claim("linear_kernel", "… and W₁ on ker Xᵀ: its largest change", "Proposition 4.1, T080", (0, 1e-12)),
    Claim(
        "chain_drift",
        "the sigmoid chain conserves w₁x + e^{w₁x} − x²w₂²/2: the same ratio",
        "Proposition 4.2, T081",
        (1.8, 2.3),
    ),
    Claim("sensing_drift", "matrix sensing conserves XᵀX − YᵀY: the same ratio", "Proposition 4.4, T082", (1.8, 2.3)),
    Claim(
        "sensing_constant",
        "(1/m)Σ⟨Aᵢ, XYᵀ⟩² ≤ k·f + (2/m)Σbᵢ² with k = 2: least k over examples, among them A = b = 1, XYᵀ = 2",
        "Proposition 4.4, T082",
        printed=(0, 2),
        corrected=(4 - 1e-9, 4 + 1e-9),
    ),
    Claim(
        "sensing_bound",
        "… so that ‖X‖_F⁴ + ‖Y‖_F⁴ ≤ r·c₄, with 4f₀ in it: largest share of that along a descent",
        "Proposition 4.4, T082",
        (0, 1),
    ),
    Claim(
        "absolute_drift",
        "‖XYᵀ − M‖₁ conserves XᵀX − YᵀY along its subgradient flow: the same ratio",
        "Proposition 4.5, T083",
        (1.5, 2.7),
    ),
    Claim(
        "absolute_bound",
        "… and ‖X‖₂⁴ + ‖Y‖₂⁴ ≤ ‖X₀ᵀX₀ − Y₀ᵀY₀‖_F² + 2(‖X₀Y₀ᵀ − M‖₁ + ‖M‖₁)², without mn: largest share",
        "Proposition 4.5, T083",
        (0, 1),
    ),
)

# Sizes of X and Y, and how many measurements there are.
ROWS, COLUMNS, RANK, MEASUREMENTS = 4, 3, 2, 40


def run() -> dict[str, Any]:
    source = torch.Generator().manual_seed(0)
    return {
        "linear": deep_linear(source),
        "chain": chain(),
        "sensing": sensing(source),
        "absolute": absolute(source),
    }


def draws(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def descents(f: Scalar, start: Tensor, conserved: Scalar, steps: tuple[float, ...], until: float) -> dict[str, Any]:
    """Descend for a time with steps of several sizes: how far what is conserved drifts; and the first path."""
    drifts = []
    for eta in steps:
        points = path(f, start.tolist(), lambda x, eta=eta: torch.optim.SGD(x, lr=eta), round(until / eta))
        first, last = (conserved(torch.tensor(x, dtype=torch.float64)) for x in (points[0], points[-1]))
        drifts.append(float((last - first).norm()))
        if eta == steps[0]:
            kept = points[:: max(1, len(points) // 200)]
    return {"steps": list(steps), "drift": drifts, "path": kept}


def deep_linear(source: torch.Generator) -> dict[str, Any]:
    """Three layers of width 3 on inputs that span a plane."""
    inputs, targets = draws(source, 3, 2) @ draws(source, 2, 8), draws(source, 3, 8)

    def f(x: Tensor) -> Tensor:
        first, second, third = x.view(3, 3, 3)
        return 0.5 * (third @ second @ first @ inputs - targets).square().sum()

    def conserved(x: Tensor) -> Tensor:
        W = x.view(3, 3, 3)
        return torch.stack([W[i + 1].T @ W[i + 1] - W[i] @ W[i].T for i in (0, 1)])

    answer = descents(f, 0.5 * draws(source, 27), conserved, (4e-3, 2e-3, 1e-3), 4.0)
    outside = torch.eye(3, dtype=torch.float64) - inputs @ torch.linalg.pinv(inputs)
    first = torch.tensor(answer.pop("path"), dtype=torch.float64)[:, :9].view(-1, 3, 3) @ outside
    return {**answer, "kernel": float((first - first[0]).abs().max())}


def chain() -> dict[str, Any]:
    """Three scalar layers with the logistic function between them, one datum (x, y)."""
    x, y = 1.5, 0.8

    def f(w: Tensor) -> Tensor:
        return 0.5 * (w[2] * torch.sigmoid(w[1] * torch.sigmoid(w[0] * x)) - y) ** 2

    def conserved(w: Tensor) -> Tensor:
        return w[0] * x + torch.exp(w[0] * x) - x**2 * w[1] ** 2 / 2

    answer = descents(f, torch.tensor([0.4, -1.2, -0.7], dtype=torch.float64), conserved, (0.2, 0.1, 0.05), 20.0)
    answer.pop("path")
    return answer


def factors(x: Tensor, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return X (rows, rank) and Y (columns, rank) of a flat vector."""
    return x[: rows * rank].view(rows, rank), x[rows * rank :].view(columns, rank)


def sensing(source: torch.Generator) -> dict[str, Any]:
    """Matrix sensing, f = (1/2m)Σ(⟨Aᵢ, XYᵀ⟩ − bᵢ)²."""
    A, b = draws(source, MEASUREMENTS, ROWS, COLUMNS), draws(source, MEASUREMENTS)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return factors(x, ROWS, COLUMNS, RANK)

    def f(x: Tensor) -> Tensor:
        X, Y = split(x)
        return 0.5 * (torch.einsum("mij,ik,jk->m", A, X, Y) - b).square().mean()

    def imbalance(x: Tensor) -> Tensor:
        X, Y = split(x)
        return X.T @ X - Y.T @ Y

    start = draws(source, RANK * (ROWS + COLUMNS))
    answer = descents(f, start, imbalance, (0.02, 0.01, 0.005), 10.0)
    c = float(torch.linalg.eigvalsh(A.flatten(1).T @ A.flatten(1) / MEASUREMENTS)[0])
    c3 = (4 * float(f(start)) + 2 * float(b.square().mean())) / c
    bound = RANK * (float(imbalance(start).square().sum()) + 2 * c3)
    answer["share"] = [
        sum(float(part.norm()) ** 4 for part in split(torch.tensor(x, dtype=torch.float64))) / bound
        for x in answer.pop("path")
    ]
    return {**answer, "constant": max(least_constant(source) for _ in range(200))} | {"example": example_constant()}


def constant(A: Tensor, b: Tensor, product: Tensor) -> float:
    """Return the least k with (1/m)Σ⟨Aᵢ, XYᵀ⟩² ≤ k·f + (2/m)Σbᵢ²."""
    seen = torch.einsum("mij,ij->m", A, product)
    f = 0.5 * (seen - b).square().mean()
    return float((seen.square().mean() - 2 * b.square().mean()) / f)


def least_constant(source: torch.Generator) -> float:
    """Return it for random measurements of a random product."""
    return constant(draws(source, 3, 2, 2), draws(source, 3), draws(source, 2, 2))


def example_constant() -> float:
    """Return it for A = b = 1, XYᵀ = 2."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return constant(one, one.flatten(), 2 * one[0])


def absolute(source: torch.Generator) -> dict[str, Any]:
    """Descend on ‖XY − M‖₁, X (4, 2) and Y (2, 3), by subgradients: Y here is Yᵀ of the statement."""
    M = draws(source, ROWS, COLUMNS)
    start = draws(source, RANK * (ROWS + COLUMNS))
    problem = AbsoluteFactorisation(tuple(start.tolist()), tuple(map(tuple, M.tolist())))

    def imbalance(x: Tensor) -> Tensor:
        X, Y = problem.factors(x)
        return X.T @ X - Y @ Y.T

    answer = descents(problem.function, start, imbalance, (4e-3, 2e-3, 1e-3), 4.0)
    bound = float(imbalance(start).square().sum()) + 2 * (float(problem.function(start)) + float(M.abs().sum())) ** 2
    answer["share"] = [
        sum(spectral_norm(part) ** 4 for part in problem.factors(torch.tensor(x, dtype=torch.float64))) / bound
        for x in answer.pop("path")
    ]
    return answer


def measure(data: dict[str, Any]) -> Mapping[str, float]:
    ratios = {f"{name}_drift": run["drift"][-2] / run["drift"][-1] for name, run in data.items()}
    return {
        **ratios,
        "linear_kernel": data["linear"]["kernel"],
        "sensing_constant": max(data["sensing"]["constant"], data["sensing"]["example"]),
        "sensing_bound": max(data["sensing"]["share"]),
        "absolute_bound": max(data["absolute"]["share"]),
    }


def draw(data: dict[str, Any]) -> Mapping[str, Figure]:
    names = {
        "linear": ("deep linear", BLUE, "o"),
        "chain": ("sigmoid chain", GREEN, "s"),
        "sensing": ("matrix sensing", ORANGE, "D"),
        "absolute": ("‖XYᵀ − M‖₁", INK, "^"),
    }
    with panels(11, 4, columns=2) as (figure, (drift, norms)):
        for name, (label, colour, mark) in names.items():
            run = data[name]
            relative = [step / run["steps"][0] for step in run["steps"]]
            drift.plot(relative, run["drift"], f"{mark}-", color=colour, label=label)
            if "share" in run:
                place = [i / (len(run["share"]) - 1) for i in range(len(run["share"]))]
                norms.plot(place, run["share"], color=colour, label=label)
        powers(drift, "x", 0.2, 1.2)
        logarithmic(drift)
        drift.set(xlabel="step / largest step", ylabel="drift", title="What is conserved drifts", ylim=(1e-4, 1))
        drift.legend(loc="lower right")
        norms.axhline(1, color=INK, linewidth=1, linestyle="--")
        norms.set(xlabel="time, relative", ylabel="norms⁴ / bound", title="Norms stay bounded", ylim=(0, 1.1))
        norms.legend(loc="center right")
    return {"escape_bounded": figure}
