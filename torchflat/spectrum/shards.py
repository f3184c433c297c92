"""What random shards of the rows prove about eigenvalues of all the data that have not been found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat.objective import Objective
from torchflat.spectrum.bounds import sampled_mean_upper_bound
from torchflat.spectrum.krylov import Krylov, generator

__all__ = ["COUNT", "Mixture", "Strata", "bound_rest", "close"]

# Shards in a sample: fewer say too little about how shards scatter.
COUNT = 8
# Rows in a shard: at least the first, and as many as the second if that is no more than this share of all rows.
SMALLEST, SMALL, SMALL_SHARE = 32, 250, 1 / 64
# Shards take at most this share of all rows; their runs take some fifteen products.
LARGEST_SHARE = 1 / 3
# A shard's own bound may leave this share of the gap below λ₁ open, or this much of λ₁.
SLACK_OF_GAP, SLACK = 0.25, 2e-3
# Limits between strata differ by this factor; a further stratum costs as much time as so many rows.
LIMITS, OVERHEAD = 2**0.5, 32


class Mixture:
    """H ≈ Σ wᵢHᵢ over samples of the rows, with Σ wᵢ = 1."""

    def __init__(self, parts: list[tuple[float, Objective]]) -> None:
        self._parts = parts

    def product(self, vector: Tensor) -> Tensor:
        """Return Σ wᵢHᵢv for v of shape (n,)."""
        total, *others = (weight * part.products(vector[None])[0] for weight, part in self._parts)
        for other in others:
            total += other
        return total

    def krylov(self, seed: int, stream: str, deflated: Tensor | None = None, start: Tensor | None = None) -> Krylov:
        """Start the Lanczos process on it: at random, or at ``start``."""
        fresh = 1.0 if start is None else 0.0
        return Krylov.of(self._parts[0][1], seed, stream, deflated, start, fresh, self.product)


@dataclass(frozen=True)
class Strata:
    """The rows by how much they can curve the loss, and how many of each stratum go into a shard.

    An eigenvector w of H that was not found has λ = wᵀHw = Σ wᵀHᵢw/N over the rows. Rows of which none reaches more
    than c must be λN/c to lift it to λ, and a sample with the share π of them holds πλN/c on average. Each stratum is
    sampled with the share for which this is 4·log(4/δ) in all shards together: then they show in the shards, unless all
    of them were missed by a chance below δ. Strata of few outlying rows are in every shard in full.
    """

    f: Objective
    strata: tuple[Tensor, ...]
    takes: tuple[int, ...]

    @classmethod
    def of(cls, f: Objective, curvatures: Tensor, sharpness: float, delta: float) -> Strata | None:
        """Choose the strata that cost least; None if that is no saving.

        Args:
            f: the objective on all rows.
            curvatures: how much each row can curve the loss, (rows,).
            sharpness: λ₁, as far as it is known.
            delta: probability of a miss.
        """
        if not sharpness > 0:
            return None
        ascending, order = curvatures.sort()
        share = 4 * math.log(4 / delta) / (COUNT * sharpness * f.rows)
        takes = _cheapest(ascending, share)
        rows = sum(taken for _, taken in takes)
        wanted = max(SMALLEST, min(SMALL, f.rows * SMALL_SHARE))
        factor = max(1.0, wanted / rows)
        if COUNT * factor * rows > LARGEST_SHARE * f.rows:
            return None
        sizes = [size for size, _ in takes]
        return cls(
            f,
            tuple(order.split(sizes)),
            tuple(min(size, math.ceil(factor * taken)) for size, taken in takes),
        )

    @property
    def rows(self) -> int:
        """Rows in a shard."""
        return sum(self.takes)

    @property
    def outlying(self) -> int:
        """Rows that are in every shard."""
        return sum(take for take, stratum in zip(self.takes, self.strata, strict=True) if take == len(stratum))

    def draw(self, rows: int, source: torch.Generator) -> Mixture:
        """Draw a random sample of about so many rows; each stratum has its weight among all rows."""
        parts = []
        for stratum, take in zip(self.strata, self.takes, strict=True):
            count = min(len(stratum), math.ceil(take * rows / self.rows))
            chosen = (
                stratum if take == len(stratum) else stratum[torch.randperm(len(stratum), generator=source)[:count]]
            )
            parts.append((len(stratum) / self.f.rows, self.f.take(chosen)))
        return Mixture(parts)


def _cheapest(ascending: Tensor, share: float) -> list[tuple[int, int]]:
    """Cut sorted curvatures into strata (size, rows taken of it) of least cost, by dynamic programming.

    A stratum of N rows up to c gives ``share``·N·c rows to a shard.
    """
    top = float(ascending[-1])
    limits = [top * LIMITS**-k for k in range(40)]
    ends = sorted({int(torch.searchsorted(ascending, limit, right=True)) for limit in limits} - {0})
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
    for i, end in enumerate(ends):
        options = []
        for j in range(i + 1):
            size = end - (ends[j - 1] if j else 0)
            take = min(size, max(1, math.ceil(share * size * float(ascending[end - 1]))))
            cost, strata = best[j]
            options.append((cost + take + OVERHEAD, [*strata, (size, take)]))
        best.append(min(options))
    return best[-1][1]


def close(value: float, bound: float, below: float) -> bool:
    """Whether a bound on what is left is close enough to the largest Ritz value there, for the gap below λ₁."""
    return bound - value <= max(SLACK_OF_GAP * (below - value), SLACK * abs(below))


def bound_rest(strata: Strata, found: Tensor, below: float, delta: float, seed: int, stream: str) -> Iterator[float]:
    """Bound λ₁(PHP) from above, P = I − YᵀY, with probability at least 1 − δ.

    Yields after each shard: ∞ until the last one has spoken, and for good if one of them shows that the bound will not
    stay below what it should.

    λ₁ is convex, and H is the mean of Hⱼ over random shards j: so λ₁(PHP) is at most the mean of λ₁(PHⱼP) (T091). Each
    of these is bounded by a Lanczos run of its own (T090), all of them together with probability 1 − δ/2, and the mean
    by those that were drawn, with probability 1 − δ/2 (:func:`~torchflat.spectrum.bounds.sampled_mean_upper_bound`).

    Args:
        strata: what to draw from.
        found: Y, (p, n) orthonormal rows, chosen without regard to these shards.
        below: what the bound should stay below: λ₁. A run ends where it leaves a quarter of the gap open.
        delta: probability of a miss.
        seed: of the draw and of the random starts.
        stream: which attempt it is.
    """
    bounds: list[float] = []
    source = generator(seed, f"shards/{stream}")
    for j in range(COUNT):
        with strata.draw(strata.rows, source).krylov(seed, f"shard/{stream}/{j}", deflated=found) as krylov:
            value = -math.inf
            while value < below and not (krylov.exhausted or krylov.full):
                krylov.step()
                value, bound = float(krylov.ritz()[0][-1]), krylov.upper(delta / (2 * COUNT))
                if close(value, bound, below):
                    break
            bounds.append(bound + krylov.floor())
        if value >= below:
            yield math.inf
            return
        yield math.inf if j < COUNT - 1 else sampled_mean_upper_bound(bounds, delta / 2)
