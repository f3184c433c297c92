"""Random pairs of points at zero loss, of which the theory says which is flatter, and counts of what compare() says."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from torchflat import Objective, Verdict, compare
from torchflat.problems.deep_linear import DeepLinear
from torchflat.problems.factorisation import Factorisation
from torchflat.problems.residual import Monomial
from torchflat.problems.samplers import mixed

KINDS = ("factorisation", "deep linear", "monomial", "ReLU network")
# How far apart: by an orthogonal change of variables, which changes nothing; within about 1 %; and far.
GAPS = ("equal", "near", "far")
SIZES = {"near": 3e-3, "far": 0.4}


@dataclass(frozen=True)
class Pair:
    """Two objectives and their λ₁, from formulas or dense matrices; ``equal`` where a symmetry of f° connects them."""

    kind: str
    gap: str
    first: Objective
    second: Objective
    sharpness: tuple[float, float]

    @property
    def truth(self) -> Verdict:
        """At zero residual f°(x, r) = λ₁r²/2 + o(r²), so that λ₁ decides unless it is the same."""
        if self.gap == "equal":
            return Verdict.EQUIVALENT
        return Verdict.FLATTER if self.sharpness[0] < self.sharpness[1] else Verdict.SHARPER

    @property
    def difference(self) -> float:
        """Of the two λ₁, relative to the larger."""
        return abs(self.sharpness[0] - self.sharpness[1]) / max(self.sharpness)


def pairs(seed: int, count: int) -> Iterator[Pair]:
    """Draw so many pairs, of all kinds and gaps in turn."""
    return (pair(seed, i) for i in range(count))


def pair(seed: int, i: int) -> Pair:
    """Draw the pair at place ``i`` of those that ``seed`` gives."""
    source = torch.Generator().manual_seed(int(np.random.default_rng([seed, i]).integers(2**62)))
    return MAKERS[KINDS[i % len(KINDS)]](source, GAPS[i // len(KINDS) % len(GAPS)])


def _normal(*shape: int, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def _rotation(size: int, source: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(_normal(size, size, source=source)).Q
    return q


def _change(size: int, gap: str, source: torch.Generator) -> Tensor:
    """An orthogonal matrix, or one plus a random matrix of the size of the gap."""
    if gap == "equal":
        return _rotation(size, source)
    return torch.eye(size, dtype=torch.float64) + SIZES[gap] * _normal(size, size, source=source) / size**0.5


def _factorisation(source: torch.Generator, gap: str) -> Pair:
    rows, rank, columns = (int(torch.randint(2, 6, (), generator=source)) for _ in range(3))
    X, Y = _normal(rows, rank, source=source), _normal(rank, columns, source=source)
    g = _change(rank, gap, source)
    both = Factorisation(X, Y), Factorisation(X @ g, torch.linalg.solve(g, Y))
    return _of_one_function("factorisation", gap, *both)


def _deep_linear(source: torch.Generator, gap: str) -> Pair:
    depth, width = int(torch.randint(2, 4, (), generator=source)), int(torch.randint(2, 5, (), generator=source))
    sizes = [3, *(width for _ in range(depth - 1)), 2]
    weights = tuple(_normal(b, a, source=source) / a**0.5 for a, b in itertools.pairwise(sizes))
    inputs = _normal(12, 3, source=source)
    if gap == "equal":
        q = _rotation(width, source)
        other = (q @ weights[0], weights[1] @ q.T, *weights[2:])
    else:
        other = mixed(weights, SIZES[gap] / width**0.5, source)
    return _of_one_function("deep linear", gap, DeepLinear(weights, inputs), DeepLinear(other, inputs))


def _monomial(source: torch.Generator, gap: str) -> Pair:
    exponents = tuple(int(each) for each in torch.randint(1, 4, (3,), generator=source))
    logs = 0.4 * _normal(3, source=source)
    powers = torch.tensor(exponents, dtype=torch.float64)

    def on_level(logs: Tensor) -> Monomial:
        return Monomial(tuple((logs - powers * (logs @ powers) / (powers @ powers)).exp().tolist()), exponents)

    first = on_level(logs)
    if gap == "equal":
        flip = [i for i, exponent in enumerate(exponents) if exponent % 2 == 0]
        point = list(first.point)
        odd = [i for i in range(3) if i not in flip]
        for i in flip or odd[:2] if len(odd) > 1 else flip:
            point[i] = -point[i]
        return _of_one_function("monomial", gap, first, Monomial(tuple(point), exponents))
    return _of_one_function("monomial", gap, first, on_level(logs + SIZES[gap] * _normal(3, source=source)))


def _network(source: torch.Generator, gap: str) -> Pair:
    """A ReLU network that made its own targets, and the same function with its hidden neurons rescaled, or permuted."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    inputs = _normal(16, 3, source=source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_normal(*parameter.shape, source=source) / 3**0.5)
        f = Objective(model, nn.functional.mse_loss, (inputs, model(inputs)))
    w1, b1, w2, b2 = f.layout.split(f.x)
    if gap == "equal":
        order = torch.randperm(5, generator=source)
        moved = [w1[order], b1[order], w2[:, order], b2]
    else:
        scale = (SIZES[gap] * _normal(5, source=source)).exp()
        moved = [scale[:, None] * w1, scale * b1, w2 / scale, b2]
    g = f.at(f.layout.flatten(moved))
    return Pair("ReLU network", gap, f, g, (_dense(f), _dense(g)))


def _dense(f: Objective) -> float:
    return float(torch.linalg.eigvalsh(f.hvp(torch.eye(f.n, dtype=torch.float64)))[-1])


def _of_one_function(kind: str, gap: str, first: object, second: object) -> Pair:
    f, x = first.objective(), second.objective().x  # type: ignore[attr-defined]
    return Pair(kind, gap, f, f.at(x), (first.sharpness(), second.sharpness()))  # type: ignore[attr-defined]


MAKERS: dict[str, Callable[[torch.Generator, str], Pair]] = {
    "factorisation": _factorisation,
    "deep linear": _deep_linear,
    "monomial": _monomial,
    "ReLU network": _network,
}


@dataclass(frozen=True)
class Judgement:
    """What compare() said of a pair, and what is wrong with it, if anything."""

    said: str
    wrong: str | None
    mirrored: bool
    clear: bool
    undecided: bool
    gradients: float


def judge(pair: Pair, mirror: bool = True) -> Judgement:
    """Compare the pair, in both orders if asked."""
    answer = compare(pair.first, pair.second)
    verdict = answer.verdict
    strict = verdict in (Verdict.FLATTER, Verdict.SHARPER)
    fails = verdict is not pair.truth if strict else pair.difference > answer.tolerance
    name = f"{pair.kind}, {pair.gap}, λ₁ {pair.sharpness[0]:.9g} and {pair.sharpness[1]:.9g}: {verdict.name}"
    return Judgement(
        said=f"{pair.kind}, {pair.gap}: {verdict.name}",
        wrong=f"{name} by {answer.decided_by}" if fails and verdict is not Verdict.UNDECIDED else None,
        mirrored=not mirror or compare(pair.second, pair.first).verdict is verdict.mirrored,
        clear=pair.difference > 0.05,
        undecided=verdict is Verdict.UNDECIDED,
        gradients=answer.cost.gradients,
    )


@dataclass(frozen=True)
class Tally:
    """Counts of many judgements."""

    said: collections.Counter[str]
    wrong: list[str]
    not_mirrored: int
    clear: int
    clear_undecided: int


def tally(judgements: Iterable[Judgement]) -> Tally:
    """Count."""
    all_of_them = list(judgements)
    clear = [each for each in all_of_them if each.clear]
    return Tally(
        said=collections.Counter(each.said for each in all_of_them),
        wrong=[each.wrong for each in all_of_them if each.wrong is not None],
        not_mirrored=sum(not each.mirrored for each in all_of_them),
        clear=len(clear),
        clear_undecided=sum(each.undecided for each in clear),
    )
