"""λ₁ of all the data in a few passes: found on subsamples, corrected on all rows, bounded by shards."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat import ops
from torchflat.objective import Objective
from torchflat.objective.scores import NoScores
from torchflat.result import Status
from torchflat.spectrum.basis import room_for_rows
from torchflat.spectrum.bounds import coupled_upper_bound
from torchflat.spectrum.krylov import MARGIN, Bounds, Krylov, generator, random_unit_vector
from torchflat.spectrum.run import Run
from torchflat.spectrum.shards import COUNT, Mixture, Strata, bound_rest, close

__all__ = ["Multilevel", "Unsuited"]

FIRST_ROWS = 500
GROWTH = 4
# The largest subsample has this share of the rows: a run on it then costs less than one product with all of them.
LARGEST_SHARE = 1 / 12
# Vectors that are carried up at most, and Lanczos steps on one subsample.
LARGEST_BLOCK = 6
LONGEST_RUN = 40
# The first run ends at this residual, relative to θ: what it leaves is small beside the noise of few rows.
FIRST_RESIDUAL = 0.02
# A gap below θ that is smaller than this, relative to θ, is none: sampling moves eigenvalues by as much.
SMALLEST_GAP = 0.02
# An eigenvalue below this share of θ is clearly not one of its cluster.
CLEAR = 0.85
# Share of the tolerance that the coupling of what was found with the rest may take, and that the value may be off.
COUPLING_SHARE, VALUE_SHARE = 0.5, 0.05
# A vector that is carried up is there three times: as found, turned with the others, and its image.
COPIES = 3
# Blocks of vectors are converted to float64 so many columns at once.
COLUMNS = 2**18
# Steps of the solver for one correction, and corrections with all the data.
CORRECTION_STEPS, CORRECTIONS = 8, 4


class Unsuited(Exception):
    """These data, or this spectrum, cannot be treated in this way; the message says why."""


@dataclass(frozen=True)
class _Block:
    """Ritz pairs on all the data: values (p,) descending, orthonormal rows (p, n), and their images under H."""

    values: Tensor
    vectors: Tensor
    images: Tensor

    @classmethod
    def of(cls, f: Objective, vectors: Tensor, images: Tensor, keep: int) -> _Block:
        """Rayleigh–Ritz on orthonormal rows; the top ``keep`` pairs. They count against the memory budget."""
        projected = _inner(vectors, images)
        values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        chosen = rotation.flip(1)[:, :keep].T
        block = cls(values.flip(0)[:keep], *(_combined(chosen, rows, rows.dtype) for rows in (vectors, images)))
        for rows in (block.vectors, block.images):
            f.memory.keep_vectors(rows, rows.nbytes)
        return block

    @property
    def gram(self) -> Tensor:
        """Inner products of the rows of R = HY − Yθ, (p, p)."""
        total = torch.zeros(len(self.values), len(self.values), dtype=torch.float64, device=self.vectors.device)
        values = self.values.to(self.vectors.device)[:, None]
        for vectors, images in zip(*(rows.split(COLUMNS, 1) for rows in (self.vectors, self.images)), strict=True):
            remainder = images.double() - values * vectors.double()
            total += remainder @ remainder.T
        return total.cpu()

    def remainder(self, mixture: Tensor) -> Tensor:
        """R c for the mixture c of pairs, (n,) in float64."""
        left: Tensor = _combined(mixture[None], self.images)[0]
        return left.sub_(_combined((mixture * self.values)[None], self.vectors)[0])

    def with_another(self, vector: Tensor, f: Objective) -> _Block:
        """Take the product of all the data with one more vector, (n,) float64, and keep as many pairs as before."""
        _, size = ops.orthogonalize_(self.vectors, vector)
        row = (vector / size).to(self.vectors.dtype)[None]
        vectors, images = torch.cat([self.vectors, row]), torch.cat([self.images, f.products(row)])
        return _Block.of(f, vectors, images, len(self.values))

    def turned_from(self, vectors: Tensor) -> float:
        """Return the sine of the largest angle to the space of as many other vectors."""
        overlap = _inner(self.vectors, vectors)
        missing = torch.eye(len(overlap), dtype=torch.float64) - overlap.T @ overlap
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(missing)[-1])))


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows, (p, n) and (q, n), summed in float64: (p, q) on the CPU."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(COLUMNS, 1), right.split(COLUMNS, 1), strict=True):
        total.addmm_(a.double(), b.double().T)
    return total.cpu()


def _combined(coefficients: Tensor, rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Σ cᵢ rowᵢ, computed in float64, for the rows c of ``coefficients`` (q, p): (q, n)."""
    total = torch.empty(len(coefficients), rows.shape[1], dtype=dtype, device=rows.device)
    weights = coefficients.to(rows.device)
    for part, piece in zip(total.split(COLUMNS, 1), rows.split(COLUMNS, 1), strict=True):
        part.copy_(weights @ piece.double())
    return total


class Multilevel:
    """The top eigenvectors of H from nested subsamples and few products with all the data.

    1. Lanczos on a subsample of some hundred rows; its top Ritz vectors start a run on a sample that is four times as
       large, and so on, until they are as close to those of all the data as the tolerance asks for.
    2. One product of all the data with each of a few of them, Y: Rayleigh–Ritz gives θ ≤ λ₁ and R = HY − Yθ.
    3. Random shards bound what is orthogonal to Y (:func:`~torchflat.spectrum.shards.bound_rest`), or a run on all the
       data does if ``certify`` is ``"krylov"``. T092 joins the two.
    4. While that is too wide because of R: one more vector, (H_S − θ)⁻¹R on the subsample S (Davidson), and one
       product of all the data with it.
    """

    full = False

    def __init__(self, f: Objective, run: Run, seed: int, certify: str, delta: float) -> None:
        self._f, self._run, self._seed, self._certify, self._delta = f, run, seed, certify, delta
        self.steps = 0
        self.basis = "none"
        self._first = min(FIRST_ROWS, max(1, f.rows // GROWTH))
        affordable = room_for_rows(f.memory, f.n) // 2 // (COPIES * f.n * torch.finfo(f.dtype).bits // 8)
        self._widest = max(1, min(LARGEST_BLOCK, affordable))
        self._rest = math.inf
        self._floor = 0.0
        # The value on a sample and its vector, until there is a block on all the data.
        self._guess: tuple[float, Tensor] | None = None
        self._block: _Block
        self._gram: Tensor
        self._phases = self._work()

    def advance(self) -> None:
        """Go on to the next point at which the bounds may have changed.

        Raises:
            Unsuited: there is none.
        """
        next(self._phases)

    def bounds(self, product_error: float) -> Bounds:
        """Bound λ₁ from both sides, with probability at least 1 − δ, rounding included; by nothing, from samples."""
        if self._guess is not None:
            return Bounds(self._guess[0], -math.inf, math.inf, self._floor)
        value = float(self._block.values[0])
        upper = math.inf if self._rest == math.inf else coupled_upper_bound(self._block.values, self._gram, self._rest)
        floor = self._floor + MARGIN * product_error
        return Bounds(value, value - floor, upper + floor, floor)

    def status(self, run: Run, bounds: Bounds, over: bool) -> Status | None:
        """Say how the run ends here, or None if it goes on."""
        return run.status(bounds, abs(bounds.value), over=over)

    @property
    def vector(self) -> Tensor:
        """The unit vector that the value belongs to."""
        return (self._block.vectors[0] if self._guess is None else self._guess[1]).clone()

    @property
    def residual(self) -> float:
        """‖H v − θ v‖; infinite where it is not known."""
        return math.sqrt(float(self._gram[0, 0])) if self._guess is None else math.inf

    def _work(self) -> Iterator[None]:
        strata = (yield from self._strata()) if self._certify == "auto" else None
        sample, vectors, p, more = yield from self._found(strata)
        self._set(_Block.of(self._f, vectors[:p], self._f.products(vectors[:p]), p), p)
        yield
        yield from self._bound(strata, "first")
        if self._gap <= 0 and more > p:
            images = torch.cat([self._block.images, self._f.products(vectors[p:])])
            self._set(_Block.of(self._f, torch.cat([self._block.vectors, vectors[p:]]), images, more), more - p)
            yield from self._bound(strata, "second")
        if self._gap <= 0:
            raise Unsuited("shards leave open whether all that curves most was found")
        del vectors
        first, rest, gap = self._block.vectors, self._rest, self._gap
        coupling = math.sqrt(float(torch.linalg.eigvalsh(self._gram)[-1]))
        for _ in range(CORRECTIONS):
            self._set(self._block.with_another(self._correction(sample), self._f), 1)
            turned = self._block.turned_from(first)
            # A unit vector w orthogonal to the block now has a part a ≤ turned in the block that the rest was bounded
            # for, and wᵀHw ≤ a²θ + 2a‖R‖ + (1 − a²)μ.
            self._rest = rest + turned**2 * gap + 2 * turned * coupling
            yield
        raise Unsuited("corrections did not narrow the interval")

    @property
    def _gap(self) -> float:
        return float(self._block.values[0]) - self._rest

    def _bound(self, strata: Strata | None, attempt: str) -> Iterator[None]:
        """Bound what is orthogonal to the vectors found, from shards or from a run on all the data."""
        block = self._block
        if strata is not None:
            # The two attempts share the probability of a miss.
            for rest in bound_rest(strata, block.vectors, float(block.values[0]), self._delta / 2, self._seed, attempt):
                self._rest, self.basis = rest, "none" if rest == math.inf else "shards"
                yield
            return
        with Krylov.of(self._f, self._seed, "multilevel/rest", deflated=block.vectors) as krylov:
            while not (krylov.exhausted or krylov.full):
                krylov.step()
                self.steps += 1
                value, bound = float(krylov.ritz()[0][-1]), krylov.upper(self._delta)
                self._rest, self.basis = bound + krylov.floor(), "deflation"
                yield
                if close(value, bound, float(block.values[0])):
                    return

    def _set(self, block: _Block, steps: int) -> None:
        self._block, self._gram, self._guess = block, block.gram, None
        self.steps += steps

    def _strata(self) -> Generator[None, None, Strata]:
        """Sort the rows by how much they can curve the loss, on the scale of λ₁ of a few of them."""
        try:
            curvatures = self._f.row_curvatures(self._seed)
        except NoScores as error:
            raise Unsuited(str(error)) from error
        with self._run_on(self._draw(None, self._first, 0), "scale", 1) as krylov:
            scale, vector = float(krylov.ritz()[0][-1]), self._top(krylov, 1)[0]
        self._guess = scale, vector
        yield
        strata = Strata.of(self._f, curvatures, scale, self._delta)
        if strata is None:
            raise Unsuited(f"shards that prove something would take too many of the {self._f.rows} rows")
        return strata

    def _found(self, strata: Strata | None) -> Generator[None, None, tuple[Mixture, Tensor, int, int]]:
        """Find the top vectors on growing samples, and pause after each.

        Returns the largest sample, the vectors found on it as orthonormal rows, how many of them are to be taken to all
        the data, and how many if that turns out to be too few.
        """
        size, level = self._first, 0
        sample = self._draw(strata, size, level)
        with self._run_on(sample, "0", 1) as krylov:
            noise = self._noise(krylov, strata)
            p, largest = self._plan(krylov, noise, strata)
            more = p if strata is None else self._more(krylov, p)
            vectors = self._top(krylov, more)
        self._f.memory.keep_vectors(vectors, vectors.nbytes)
        self._guess = float(krylov.ritz()[0][-1]), vectors[0]
        yield
        while size < largest:
            level, size = level + 1, min(size * GROWTH, largest)
            sample = self._draw(strata, size, level)
            start = vectors[:p].sum(dim=0) / math.sqrt(p)
            with self._run_on(sample, str(level), p, noise / math.sqrt(size) / 2, start) as krylov:
                vectors[:p] = self._top(krylov, p)
            self._orthonormalise(vectors)
            self._guess = float(krylov.ritz()[0][-1]), vectors[0]
            yield
        return sample, vectors, p, more

    def _draw(self, strata: Strata | None, rows: int, level: int) -> Mixture:
        source = generator(self._seed, f"multilevel/rows/{level}")
        if strata is not None:
            return strata.draw(rows, source)
        return Mixture([(1.0, self._f.take(torch.randperm(self._f.rows, generator=source)[:rows]))])

    def _run_on(
        self, sample: Mixture, stream: str, p: int, residual: float | None = None, start: Tensor | None = None
    ) -> Krylov:
        """Take Lanczos steps until the top ``p`` pairs have settled to ``residual``."""
        krylov = sample.krylov(self._seed, f"multilevel/{stream}", start=start)
        while krylov.steps < LONGEST_RUN and not (krylov.exhausted or krylov.full):
            krylov.step()
            wanted = FIRST_RESIDUAL * krylov.norm if residual is None else residual
            if krylov.steps > p and float(krylov.residuals()[-p:].max()) <= wanted:
                break
        self._floor = krylov.floor()
        return krylov

    def _noise(self, krylov: Krylov, strata: Strata | None) -> float:
        """Return σ, where ‖(H_S − H)v‖ ≈ σ/√S for samples of S rows, from a second sample."""
        vector = self._top(krylov, 1)[0]
        image = self._draw(strata, self._first, -1).product(vector).double()
        _, left = ops.orthogonalize_(vector[None], image)
        return float(left) * math.sqrt(self._first / 2)

    def _plan(self, krylov: Krylov, noise: float, strata: Strata | None) -> tuple[int, int]:
        """Choose how many vectors to carry up, and to how many rows, by what all of it costs in full products."""
        values, residuals = krylov.ritz()[0].flip(0).tolist(), krylov.residuals().flip(0).tolist()
        top, rows = values[0], self._f.rows
        tolerance = self._run.tolerance(abs(top), krylov.floor())
        plans = []
        for p in range(1, min(self._widest, len(values) - 1) + 1):
            # Shards are small samples, in which the next eigenvalue stands higher.
            raised = values[p] + residuals[p] + (noise**2 / (strata.rows * abs(top)) if strata else 0.0)
            gap = (top - raised) / abs(top)
            if gap <= SMALLEST_GAP:
                continue
            coupling = noise**2 / (COUPLING_SHARE * tolerance * gap * abs(top))
            enough = max(coupling, noise**2 / (VALUE_SHARE * tolerance * abs(top)))
            largest = math.ceil(max(self._first, min(enough, LARGEST_SHARE * rows)))
            corrections = int(coupling > largest)
            # Measured on trained networks: steps until T090 leaves a part of the gap.
            steps = 9 + 2.3 / math.sqrt(gap)
            bounding = steps * (COUNT * strata.rows / rows if strata else 1.0)
            plans.append((p + corrections + (p + 6) * largest / rows + bounding, p, largest))
        if not plans:
            raise Unsuited("too many eigenvalues crowd at the top")
        _, p, largest = min(plans)
        return p, largest

    def _more(self, krylov: Krylov, p: int) -> int:
        """Return how many vectors to go on with where ``p`` were too few: up to the next clear gap."""
        values = krylov.ritz()[0].flip(0).tolist()
        last = max(p, min(self._widest, len(values) - 1))
        clear = [q for q in range(p + 1, last + 1) if values[q] <= CLEAR * values[0]]
        return clear[0] if clear else last

    def _top(self, krylov: Krylov, p: int) -> Tensor:
        rows = krylov.vectors(krylov.ritz()[1][:, -p:].flip(1))
        self._orthonormalise(rows)
        return rows

    def _orthonormalise(self, rows: Tensor) -> None:
        """Make the rows orthonormal, in place, one after the other."""
        for i, row in enumerate(rows):
            vector = row.double()
            _, left = ops.orthogonalize_(rows[:i], vector)
            if float(left) <= torch.finfo(row.dtype).eps:
                # It lay in the span of those before it.
                vector = random_unit_vector(len(row), self._seed, f"multilevel/{i}", torch.float64, row.device)
                _, left = ops.orthogonalize_(rows[:i], vector)
            row.copy_(vector.div_(left))

    def _correction(self, sample: Mixture) -> Tensor:
        """Solve (H_S − θ)t = −R c on the complement, for the mixture c of pairs that the upper bound rests on."""
        block = self._block
        mixture = torch.linalg.eigh(torch.diag(block.values) + self._gram / self._gap)[1][:, -1]
        theta = float(mixture @ (block.values * mixture))
        missing = block.remainder(mixture)
        missing = missing.div_(torch.linalg.vector_norm(missing)).to(self._f.dtype)
        with (
            self._f.memory.vectors_held(missing.nbytes),
            sample.krylov(self._seed, "multilevel/correction", block.vectors, missing) as krylov,
        ):
            while krylov.steps < CORRECTION_STEPS and not (krylov.exhausted or krylov.full):
                krylov.step()
            values, rotation = krylov.ritz()
            coefficients: Tensor = rotation @ (rotation[0] / (values - theta))
            return krylov.vectors(coefficients[:, None])[0].double()
