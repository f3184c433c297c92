"""All conservation laws of a small model from its gradients alone: without looking at what it is made of."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchflat.errors import UsageError
from torchflat.objective.normalisation import PlainNormalisation
from torchflat.parameters import Layout
from torchflat.result import Answer
from torchflat.spectrum.run import NotConvergedWarning
from torchflat.symmetry.sampling import CHUNK, CLEAR_GAP, Draw, Function, Sampler, numerical_rank, sampler

__all__ = ["Discovery", "LawCount", "Products", "discover", "law_count"]

# Gradients at a point, per parameter and at least: enough that units which rarely switch have switched.
GRADIENTS_PER_PARAMETER, LEAST_GRADIENTS = 2, 256
# Batches behind each field of a bracket: two fields must switch the same unit for their bracket to show it.
MIXED = 32
# Points in a row that must rule out nothing. Fewer would do for generic equations; these are not: any n points lie
# in a hyperplane c·x = d, on which (c·x − d)² has no gradient.
IDLE_POINTS = 6
# What rules candidates out at once. Weaker equations would tilt the null space by rounding over their strength, and so
# all idle points decide about them together.
STRONG = 1e-2
# Points that say how large each candidate's derivatives are. Those below this part of the largest stay as they are.
SIZING_POINTS, SMALLEST_UNIT = 2, 0.1
# Directions of gradients below this part of the strongest are not exact enough to use: rounding divided by the three of
# WEAK_DIRECTION, SMALLEST_UNIT² and STRONG must stay far below the tolerance.
WEAK_DIRECTION = 1e-3
# Beyond it the unknowns do not fit a dense factorisation.
LARGEST = 12_000
# Gradients and brackets themselves vanish to rounding.
EXACT = 1e-9
# Vectors by which a span may fail to grow before it counts as complete.
IDLE_BRACKETS = 16


@dataclass(frozen=True)
class Products:
    """Candidates for quadratic laws: term t is Σ x[first]·x[second] over the entries with ``term`` = t."""

    first: Tensor
    second: Tensor
    term: Tensor

    def __len__(self) -> int:
        return int(self.term[-1]) + 1 if len(self.term) else 0

    @classmethod
    def all(cls, n: int) -> Products:
        """Every product of two entries: n(n+1)/2 candidates, so that no quadratic law is missed.

        >>> len(Products.all(3))
        6
        """
        first, second = torch.triu_indices(n, n)
        return cls(first, second, torch.arange(len(first)))

    @classmethod
    def squares(cls, n: int) -> Products:
        """Squares of entries: every law of a diagonal rescaling."""
        return cls(torch.arange(n), torch.arange(n), torch.arange(n))

    @classmethod
    def slices(cls, layout: Layout) -> Products:
        """Squares of entries, and inner products of any two slices of a tensor along any of its axes."""
        squares = cls.squares(layout.n)
        parts, terms = [squares], layout.n
        for shape, own in zip(layout.shapes, torch.arange(layout.n).split(list(layout.sizes)), strict=True):
            for axis in range(len(shape)):
                rows = own.view(shape).movedim(axis, 0).reshape(shape[axis], -1)
                first, second = torch.triu_indices(len(rows), len(rows), 1)
                term = terms + torch.arange(len(first)).repeat_interleave(rows.shape[1])
                parts.append(cls(rows[first].reshape(-1), rows[second].reshape(-1), term))
                terms += len(first)
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("first", "second", "term")))

    def values(self, x: Tensor) -> Tensor:
        """Return all candidates at x, (terms,)."""
        return x.new_zeros(len(self)).index_add(0, self.term, x[self.first] * x[self.second])

    def derivatives(self, x: Tensor, directions: Tensor) -> Tensor:
        """Return the derivatives at x along the rows of ``directions`` (m, n), (m, terms)."""
        moved = x[self.first] * directions[:, self.second] + x[self.second] * directions[:, self.first]
        return directions.new_zeros(len(directions), len(self)).index_add(1, self.term, moved)

    def gradients(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the gradients at x of the combinations ``weights`` (k, terms), (k, n)."""
        each = weights[:, self.term]
        answer = weights.new_zeros(len(weights), len(x)).index_add(1, self.first, each * x[self.second])
        return answer.index_add(1, self.second, each * x[self.first])


@dataclass(frozen=True)
class Discovery(Answer):
    """Laws xᵀSx + aᵀx: a basis (k,) of all that vanish along sampled gradients, of which ``count`` are independent.

    A product of two linear laws is a quadratic law that is not independent of them, so k may exceed ``count``.
    Independence is that of the gradients at ``point``, a random one. ``gap`` is the smallest of the ratios of singular
    values that the ranks rest on; where it is below 1e4, ``clear`` is false, and the count is a guess.
    """

    count: int
    gap: float
    n: int
    products: Products = field(repr=False)
    quadratic: Tensor = field(repr=False)
    linear: Tensor = field(repr=False)
    point: Tensor = field(repr=False)

    @property
    def clear(self) -> bool:
        """Whether a gap of 1e4 and more sets the laws apart from what is no law."""
        return self.gap >= CLEAR_GAP

    def values(self, x: Tensor) -> Tensor:
        """Return the conserved numbers at x (n,), in float64, (k,)."""
        x = x.detach().double().cpu()
        return self.quadratic @ self.products.values(x) + self.linear @ x

    def gradients(self, x: Tensor) -> Tensor:
        """Return the gradients of the conserved numbers at x (n,), in float64, (k, n)."""
        x = x.detach().double().cpu()
        return self.products.gradients(x, self.quadratic) + self.linear

    def restricted(self, terms: Tensor | None = None, *, linear: bool = True) -> Discovery:
        """Return the laws made of some of the candidates only: ``terms`` (terms,) is a mask of products, None is all.

        >>> laws = discover(lambda x, batch: (x[0] * x[1] + x[2] + x[3]) * batch, torch.zeros(1), parameters=4)
        >>> laws.count, laws.restricted(torch.zeros(10, dtype=torch.bool)).count
        (2, 1)
        """
        barred = [] if terms is None else [self.quadratic[:, ~terms]]
        barred += [] if linear else [self.linear]
        inside = numerical_rank(torch.cat([self.linear[:, :0], *barred], 1).T, scale=1.0)
        laws = inside.kernel @ self.quadratic, inside.kernel @ self.linear
        return _counted(self.products, *laws, self.point, min(self.gap, inside.gap))


def discover(
    model: nn.Module | Function,
    inputs: Tensor | Draw,
    *,
    parameters: int | Draw | None = None,
    products: Products | None = None,
    seed: int = 0,
) -> Discovery:
    """Find all laws h(x) = xᵀSx + aᵀx, S symmetric, that every gradient flow of every loss on the outputs conserves.

    ∇h(x)·g = 0 for the gradient g of any output at any x, on any input, is linear in (S, a). The equations of enough
    gradients, at enough points x at once, leave a null space: the laws. A field that kills all gradients at one point,
    but belongs to no law, is gone at the next. Each point's gradients are replaced by an orthonormal basis of their
    span, so that large ones do not drown small ones.

    Args:
        model: a module, in the mode it is in, or a function (x, batch) -> outputs of x (n,) and of one batch. Outputs
            have any shape; both take and return float64.
        inputs: an example, of which normal batches are drawn at three scales, or a function of a ``torch.Generator``
            that draws one. They must cover what the model can do: a unit that no input switches on obeys more laws, of
            these inputs and not of the model.
        parameters: number n of parameters, drawn standard normal, or a function of a ``torch.Generator`` that draws
            them, (n,) float64. Of a module, None draws signs, and sizes of about 1/√fan-in. Buffers stay as they are.
        products: candidates for S. None is all of them, n(n+1)/2 unknowns, for n up to about 100.
        seed: of all draws.

    Raises:
        UsageError: too many unknowns, or draws that do not fit the model.
        DataError: the model does not return a float64 tensor.
        NonFiniteError: a gradient holds NaN or infinity.

    >>> hyperbola = discover(lambda x, batch: x[0] * x[1] * batch, torch.zeros(1), parameters=2)
    >>> hyperbola.count, hyperbola.clear
    (1, True)
    """
    generator = torch.Generator().manual_seed(seed)
    source = sampler(model, inputs, parameters, generator)
    if products is None and source.n + _products_of(source.n) > LARGEST:
        raise UsageError(
            f"{source.n} parameters make {_products_of(source.n)} products: give products=, or a smaller model"
        )
    products = Products.all(source.n) if products is None else products
    sizes = torch.stack([_equations(source, products, generator).square().mean(0) for _ in range(SIZING_POINTS)])
    unit = sizes.mean(0).sqrt()
    # Rows are laws in coordinates in which each candidate's equations are of order 1, or below if they are tiny.
    unit = _levelled(unit)
    kernel = torch.eye(len(unit), dtype=torch.float64)
    idle: list[Tensor] = []
    while len(idle) < IDLE_POINTS:
        left = (_equations(source, products, generator) / unit) @ kernel.T
        strong = numerical_rank(left, STRONG, scale=1.0)
        idle = [] if strong.rank else [*idle, left]
        kernel = strong.kernel @ kernel
    final = numerical_rank(torch.cat(idle), scale=1.0)
    kernel = final.kernel @ kernel
    laws = torch.linalg.qr((kernel / unit).T).Q.T
    quadratic, linear = laws.split([len(products), source.n], 1)
    found = _counted(products, quadratic, linear, source.points(generator), final.gap)
    # Directions that were too weak to use must at least not speak against what was found.
    against = _gradients(source, found.point, generator) @ torch.nn.functional.normalize(found.gradients(found.point)).T
    silent = numerical_rank(against.abs().amax(0)[None], scale=1.0)
    answer = dataclasses.replace(found, gap=min(found.gap, silent.gap if not silent.rank else 1.0))
    _warn_unless_clear("discover", answer.gap)
    return answer


def _equations(source: Sampler, products: Products, generator: torch.Generator) -> Tensor:
    """Return what (S, a) must satisfy at one random point, as rows (r, terms + n)."""
    x = source.points(generator)
    gradients = _gradients(source, x, generator)
    size = _levelled(gradients.square().mean(0).sqrt())
    # Directions too weak to be exact are left out: what they would rule out, others at other points do.
    directions = torch.nn.functional.normalize(numerical_rank(gradients / size, WEAK_DIRECTION).span * size)
    return torch.cat([products.derivatives(x, directions), directions], 1)


def _levelled(sizes: Tensor) -> Tensor:
    """Replace sizes that may be rounding by the largest, so that dividing by them does not blow it up."""
    return torch.where(sizes > SMALLEST_UNIT * sizes.max(), sizes, sizes.max())


def _gradients(source: Sampler, x: Tensor, generator: torch.Generator) -> Tensor:
    return source.gradients(x, max(GRADIENTS_PER_PARAMETER * source.n, LEAST_GRADIENTS), generator)


def _counted(products: Products, quadratic: Tensor, linear: Tensor, point: Tensor, gap: float) -> Discovery:
    independent = numerical_rank(products.gradients(point, quadratic) + linear)
    return Discovery(independent.rank, min(gap, independent.gap), len(point), products, quadratic, linear, point)


@dataclass(frozen=True)
class LawCount(Answer):
    """``count`` = n − dimension of the Lie algebra of the gradient fields at a random point.

    ``dimensions`` has the dimension of the span of the gradients, then with brackets of two, of three, …; the last two
    are equal unless ``complete`` is false, when ``count`` is an upper bound. ``gap`` and ``clear`` as in
    :class:`Discovery`.
    """

    count: int
    gap: float
    n: int
    dimensions: tuple[int, ...]
    complete: bool

    @property
    def clear(self) -> bool:
        """Whether a gap of 1e4 and more sets the laws apart from what is no law, with all brackets taken."""
        return self.complete and self.gap >= CLEAR_GAP


def law_count(
    model: nn.Module | Function,
    inputs: Tensor | Draw,
    *,
    parameters: int | Draw | None = None,
    depth: int = 4,
    seed: int = 0,
) -> LawCount:
    """Count all independent laws of any form, polynomial or not, that hold for every loss on the outputs.

    A function is conserved by all gradient flows if and only if it is constant along the gradient fields gᵢ of single
    outputs, hence along their brackets [gᵢ, gⱼ] = Hⱼgᵢ − Hᵢgⱼ, and so on: near a generic point there are n − dim of
    them, dim the dimension of the Lie algebra that the fields generate (Frobenius). Brackets [g, [g, …]] of random
    fields are added, one level after the other by nested forward derivatives, until a level adds nothing.

    Arguments and errors are those of :func:`discover`. ``depth`` bounds the levels, each of which costs three times the
    one before. Brackets of three fields take third derivatives, which torch has to get right; layer, instance and batch
    normalisation, where it does not (torch 2.14), are written out (:class:`PlainNormalisation`).

    >>> law_count(lambda x, batch: (x[0] * x[1] - 1) ** 2 * batch, torch.zeros(1), parameters=2).count
    1
    """
    generator = torch.Generator().manual_seed(seed)
    source = sampler(model, inputs, parameters, generator)
    x = source.points(generator)
    gradients = _gradients(source, x, generator)
    span = numerical_rank(gradients, EXACT)
    while span.rank < source.n:
        gradients = torch.cat([gradients, source.gradients(x, len(gradients), generator)])
        grown = numerical_rank(gradients, EXACT)
        if grown.rank == span.rank:
            break
        span = grown
    dimensions, gap = [span.rank], span.gap
    for level in range(1, depth + 1):
        while span.rank < source.n:
            brackets = _brackets(source, x, level, source.n - span.rank + IDLE_BRACKETS, generator)
            grown = numerical_rank(torch.cat([span.span, brackets]), EXACT)
            gap = min(gap, grown.gap)
            if grown.rank == span.rank:
                break
            span = grown
        dimensions.append(span.rank)
        if dimensions[-1] == dimensions[-2]:
            break
    complete = dimensions[-1] in (source.n, dimensions[-2])
    answer = LawCount(source.n - span.rank, gap, source.n, tuple(dimensions), complete)
    _warn_unless_clear("law_count", answer.gap if complete else 0.0)
    return answer


def _brackets(source: Sampler, x: Tensor, level: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` brackets at x, each of ``level`` + 1 random gradient fields of length 1 there, (count, n)."""
    batches = torch.stack(
        [torch.stack([source.stack(MIXED, generator) for _ in range(level + 1)]) for _ in range(count)]
    )
    shape = source.function(x, batches[0, 0, 0]).shape
    weights = torch.randn(count, level + 1, MIXED, *shape, generator=generator, dtype=torch.float64)

    def one(batches: Tensor, weights: Tensor) -> Tensor:
        def gradient_field(i: int) -> Callable[[Tensor], Tensor]:
            def mixture(y: Tensor) -> Tensor:
                with PlainNormalisation():
                    outputs: Tensor = torch.func.vmap(lambda batch: source.function(y, batch))(batches[i])
                return (weights[i] * outputs).sum()

            gradient: Callable[[Tensor], Tensor] = torch.func.grad(mixture)
            # Brackets that cancel are then as small as rounding, beside which those that do not are of order 1.
            length = torch.linalg.vector_norm(gradient(x)).clamp_min(torch.finfo(x.dtype).tiny)
            return lambda y: gradient(y) / length

        bracket = gradient_field(0)
        for i in range(1, level + 1):
            bracket = _bracket(gradient_field(i), bracket)
        return bracket(x)

    with sdpa_kernel(SDPBackend.MATH):
        answer: Tensor = torch.func.vmap(one, chunk_size=CHUNK)(batches, weights)
    return answer.detach()


def _bracket(v: Callable[[Tensor], Tensor], w: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return [v, w] = Dw·v − Dv·w."""

    def field(x: Tensor) -> Tensor:
        along_v, along_w = v(x), w(x)
        first: Tensor = torch.func.jvp(w, (x,), (along_v,))[1]
        second: Tensor = torch.func.jvp(v, (x,), (along_w,))[1]
        return first - second

    return field


def _warn_unless_clear(what: str, gap: float) -> None:
    if gap < CLEAR_GAP:
        text = f"{what}: singular values are only {gap:.1e} apart where the rank was cut: draw other inputs or points"
        warnings.warn(text, NotConvergedWarning, stacklevel=3)


def _products_of(n: int) -> int:
    return n * (n + 1) // 2
