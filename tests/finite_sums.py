"""Sums over rows that are hard on subsamples: rare rows of high curvature and no gradient, clusters, sorted classes."""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from torchflat import Objective, Status, sharpness
from torchflat.spectrum import NotConvergedWarning

KINDS = (
    "plain",
    "cluster",
    "multiple",
    "one row",
    "rare rows",
    "some rows",
    "heavy tails",
    "sorted classes",
    "softmax",
    "network",
    "rare rows in a network",
)
EPS = 2.0**-52


@dataclass(frozen=True)
class FiniteSum:
    """An objective over rows, and the largest eigenvalue of its dense Hessian. ``repr`` says how to make it again."""

    kind: str
    seed: int
    objective: Objective
    sharpness: float

    def __repr__(self) -> str:
        return f"finite_sum({self.seed}, kind={self.kind!r})"


def finite_sum(seed: int, kind: str | None = None, rows: int | None = None) -> FiniteSum:
    """One of :data:`KINDS`, of 2 000 to 20 000 rows, all from ``seed``."""
    rng = np.random.default_rng(seed)
    drawn, many = KINDS[rng.integers(len(KINDS))], round(math.exp(rng.uniform(math.log(2000), math.log(20000))))
    kind, rows = kind or drawn, rows or many
    if kind == "softmax":
        return _softmax(kind, seed, rng, rows)
    if "network" in kind:
        return _network(kind, seed, rng, rows)
    return _regression(kind, seed, rng, rows)


def finite_sums(entropy: int, count: int, kind: str | None = None) -> Iterator[FiniteSum]:
    for seed in np.random.SeedSequence(entropy).generate_state(count, np.uint64):
        yield finite_sum(int(seed), kind)


def _regression(kind: str, seed: int, rng: np.random.Generator, rows: int) -> FiniteSum:
    """Least squares: H = (2/N) Σ xᵢxᵢᵀ. Rows of the rare kinds are fitted exactly, so that they have no gradient."""
    n = int(rng.integers(20, 150))
    scales = np.arange(1, n + 1) ** -rng.uniform(0.3, 1.5)
    scales[: min(n, 4)] = 1 - 0.02 * rng.random(min(n, 4)) if kind == "cluster" else scales[: min(n, 4)]
    scales = np.round(scales, 1) + 0.05 if kind == "multiple" else scales
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    x = rng.standard_normal((rows, n))
    if kind == "heavy tails":
        x *= np.sqrt(3 / rng.chisquare(3, (rows, 1)))
    x = x * scales @ basis.T
    weights = rng.standard_normal(n)
    noise = rng.standard_normal(rows)
    if kind == "sorted classes":
        classes = np.sort(rng.integers(10, size=rows))
        x += rng.standard_normal((10, n))[classes] * 0.5
    if kind in ("one row", "rare rows", "some rows"):
        count = {"one row": 1, "rare rows": int(rng.integers(2, 12)), "some rows": max(1, rows // 50)}[kind]
        hidden = basis @ np.r_[np.zeros(n - 1), 1]
        size = rng.uniform(0.5, 3) * (x @ basis[:, scales.argmax()]).var() * rows / count
        # Outliers in the last rows.
        x[-count:] = math.sqrt(size) * hidden
        noise[-count:] = 0
    y = x @ weights + noise
    model = nn.Linear(n, 1, bias=False).double()
    model.weight.data.copy_(torch.from_numpy(weights)[None])
    truth = float(np.linalg.eigvalsh(2 / rows * x.T @ x)[-1])
    data = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    return FiniteSum(kind, seed, Objective(model, mse_loss, data), truth)


def _softmax(kind: str, seed: int, rng: np.random.Generator, rows: int) -> FiniteSum:
    n, classes = int(rng.integers(5, 20)), int(rng.integers(2, 8))
    labels = np.sort(rng.integers(classes, size=rows))
    x = torch.from_numpy(rng.standard_normal((rows, n)) + rng.standard_normal((classes, n))[labels])
    model = nn.Linear(n, classes, bias=False).double()
    model.weight.data.copy_(torch.from_numpy(0.3 * rng.standard_normal((classes, n))))
    p = torch.softmax(x @ model.weight.data.T, dim=1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("ikl,ia,ib->kalb", inner, x, x).reshape(n * classes, n * classes) / rows
    f = Objective(model, cross_entropy, (x, torch.from_numpy(labels)))
    return FiniteSum(kind, seed, f, float(torch.linalg.eigvalsh(hessian)[-1]))


def _network(kind: str, seed: int, rng: np.random.Generator, rows: int) -> FiniteSum:
    """A small tanh network, not trained, so that its Hessian is indefinite."""
    rows = min(rows, 3000)
    inputs, hidden, outputs = int(rng.integers(3, 8)), int(rng.integers(3, 8)), int(rng.integers(1, 4))
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()
    for parameter in model.parameters():
        parameter.data.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape))))
    x = torch.from_numpy(rng.standard_normal((rows, inputs)))
    x[-3:] *= 8 if kind.startswith("rare") else 1
    y = torch.from_numpy(rng.standard_normal((rows, outputs)))
    if kind.startswith("rare"):
        y[-3:] = model(x[-3:]).detach()
    return FiniteSum(kind, seed, Objective(model, mse_loss, (x, y)), _dense(model, x, y))


def _dense(model: nn.Module, x: Tensor, y: Tensor) -> float:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return mse_loss(torch.func.functional_call(model, tensors, (x,)), y)

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    hessian = torch.func.hessian(value)(flat)
    return float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])


@dataclass
class Tally:
    """What a row of runs showed, by what the upper bounds rested on."""

    runs: collections.Counter[str]
    misses: collections.Counter[str]
    missed: list[str]
    faults: list[str]
    fallbacks: int = 0


def calibrate_multilevel(given: Iterable[FiniteSum], delta: float, rtol: float, certify: str = "auto") -> Tally:
    """Run ``method="multilevel"``; a miss is λ₁ outside the interval at any step, the last one included."""
    tally = Tally(collections.Counter(), collections.Counter(), [], [])
    for item in given:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            answer = sharpness(
                item.objective, rtol, 1 - delta, "multilevel", item.seed % 2**32, 4000.0, certify=certify
            )
        slack = 64 * EPS * abs(item.sharpness)
        tally.runs[answer.basis] += 1
        tally.fallbacks += any("fell back" in note for note in answer.provenance["notes"])
        if not all(e["lower"] - slack <= item.sharpness <= e["upper"] + slack for e in answer.history):
            tally.misses[answer.basis] += 1
            tally.missed.append(repr(item))
        if answer.status is not Status.CONVERGED or answer.width > rtol * abs(answer.value) + 16 * answer.floor:
            tally.faults.append(f"{item!r}: {answer.status.name}, width {answer.width}")
    return tally
