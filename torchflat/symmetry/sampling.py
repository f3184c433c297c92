"""Gradients of the outputs of a model at random points, on random inputs, and ranks with the gap they rest on."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchflat.errors import DataError, NonFiniteError, UsageError
from torchflat.parameters import Layout, select

__all__ = ["CHUNK", "CLEAR_GAP", "Draw", "Function", "Rank", "Sampler", "numerical_rank", "sampler"]

# Two neighbouring singular values this far apart leave no doubt where the rank ends.
CLEAR_GAP = 1e4
# What vanishes does so to about 1e-9 of what does not, where gradients are kept down to 1e-6 of their size.
TOLERANCE = 1e-6
# A number this close to the tolerance might belong to either side.
MARGIN = 10.0
# An example is redrawn at these scales: small inputs leave units of one kind always on or always off.
SCALES = (0.3, 1.0, 4.0)
# Gradients taken at once; they share a forward pass.
CHUNK = 64

Function = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Rank:
    """``rank`` singular values do not vanish.

    ``gap`` is the ratio of the last of these to the next, or to rounding; where one of the two is within a factor of 10
    of the tolerance that divides them, that factor.
    """

    rank: int
    gap: float
    right: Tensor

    @property
    def span(self) -> Tensor:
        """Orthonormal rows (rank, n) that span the rows of the matrix."""
        return self.right[: self.rank]

    @property
    def kernel(self) -> Tensor:
        """Orthonormal rows (n − rank, n) that the matrix takes to 0."""
        return self.right[self.rank :]


def numerical_rank(matrix: Tensor, tolerance: float = TOLERANCE, scale: float = 0.0) -> Rank:
    """Count the singular values of ``matrix`` (m, n) above ``tolerance`` times the largest, or ``scale`` if larger.

    >>> numerical_rank(torch.diag(torch.tensor([3.0, 1.0, 1e-14], dtype=torch.float64))).rank
    2
    >>> numerical_rank(torch.full((3, 2), 1e-16, dtype=torch.float64), scale=1.0).rank
    0
    """
    n = matrix.shape[1]
    if len(matrix) > 2 * n:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, values, right = torch.linalg.svd(matrix, full_matrices=True)
    largest = max([scale, *values[:1].tolist()])
    rank = int((values > tolerance * largest).sum())
    rounding = max(largest * max(n, 1) * torch.finfo(matrix.dtype).eps, torch.finfo(matrix.dtype).tiny)
    if not largest:
        return Rank(0, math.inf, right)
    above = float(values[rank - 1]) if rank else largest
    below = max([rounding, *values[rank : rank + 1].tolist()])
    distance = min(above / (tolerance * largest), tolerance * largest / below)
    return Rank(rank, above / below if distance > MARGIN else distance, right)


@dataclass(frozen=True)
class Sampler:
    """A function of (x, batch), and how to draw points x (n,) and batches. All in float64."""

    function: Function
    n: int
    layout: Layout
    points: Draw
    batches: Draw

    def stack(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` batches, (count, *batch)."""
        return torch.stack([self.batches(generator) for _ in range(count)])

    def gradients(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return the directions of the gradients of single outputs at x: at least ``count`` unit rows, (m, n).

        Outputs that depend on no parameter give 0.

        Raises:
            NonFiniteError: one of them holds NaN or infinity.
        """
        outputs = self.function(x, self.batches(generator)).numel()
        batches = self.stack(-(-count // outputs), generator)

        def rows(batch: Tensor) -> Tensor:
            jacobian: Tensor = torch.func.jacrev(lambda y: self.function(y, batch).reshape(-1))(x)
            return jacobian

        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            try:
                answer = torch.func.vmap(rows, chunk_size=max(1, CHUNK // outputs))(batches)
            except RuntimeError:
                # Some operators, recurrent layers among them, cannot be batched: the same rows, one batch at a time.
                answer = torch.stack([rows(batch) for batch in batches])
        answer = answer.reshape(-1, self.n)
        if not bool(answer.isfinite().all()):
            raise NonFiniteError("a gradient at a random point holds NaN or infinity: give parameters= a narrower draw")
        lengths = torch.linalg.vector_norm(answer, dim=1, keepdim=True).clamp_min(torch.finfo(answer.dtype).tiny)
        directions: Tensor = answer / lengths
        return directions.detach()


def sampler(
    model: nn.Module | Function, inputs: Tensor | Draw, parameters: int | Draw | None, generator: torch.Generator
) -> Sampler:
    """Make the sampler of a module or a function; see :func:`torchflat.symmetry.discover` for the arguments."""
    batches = inputs if callable(inputs) else _like(inputs)
    if isinstance(model, nn.Module):
        function, layout = _functional(model)
    elif parameters is None:
        raise UsageError("of a function, say how many parameters it has: parameters=n, or a way to draw them")
    else:
        function, layout = model, None
    if parameters is None:
        assert layout is not None
        points = _fan_in(layout)
    else:
        points = parameters if callable(parameters) else _normal(parameters)
    x = points(generator)
    if x.dtype != torch.float64 or x.dim() != 1:
        raise UsageError(f"parameters= draws {x.dtype} {tuple(x.shape)}: float64 vectors of shape (n,) are needed")
    layout = layout or Layout(("x",), (x.shape,))
    if len(x) != layout.n:
        raise UsageError(f"parameters= draws {len(x)} numbers, but the model has {layout.n} parameters")
    output = function(x, batches(generator))
    if not isinstance(output, Tensor) or output.dtype != torch.float64:
        found = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"the model returns {found}, where one float64 tensor is needed: cast its inputs and constants")
    return Sampler(function, layout.n, layout, points, batches)


def _functional(model: nn.Module) -> tuple[Function, Layout]:
    """Make the outputs a function of the flat vector of the parameters that require grad, on a float64 copy."""
    model = copy.deepcopy(model).double()
    names = select(model, None)
    own = dict(model.named_parameters())
    layout = Layout(tuple(names), tuple(own[name].shape for name in names))

    def function(x: Tensor, batch: Tensor) -> Tensor:
        tensors = dict(zip(names, layout.split(x), strict=True))
        output: Tensor = torch.func.functional_call(model, tensors, (batch,))
        return output

    return function, layout


def _normal(n: int) -> Draw:
    return lambda generator: torch.randn(n, generator=generator, dtype=torch.float64)


def _fan_in(layout: Layout) -> Draw:
    """Entries of random sign and of size (½ … 1½)/√fan-in: none is near 0, where laws degenerate."""

    def draw(generator: torch.Generator) -> Tensor:
        parts = []
        for shape in layout.shapes:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
            signs = torch.randint(2, shape, generator=generator) * 2 - 1
            sizes = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
            parts.append((signs * sizes / math.sqrt(fan_in)).reshape(-1))
        return torch.cat(parts)

    return draw


def _like(example: Tensor) -> Draw:
    if not example.is_floating_point():
        raise UsageError(f"inputs= is {example.dtype}: give a function that draws such a batch from a torch.Generator")

    def draw(generator: torch.Generator) -> Tensor:
        scales = torch.tensor(SCALES, dtype=torch.float64)
        chosen = scales[torch.randint(len(SCALES), (), generator=generator)]
        return chosen * torch.randn(example.shape, generator=generator, dtype=torch.float64)

    return draw
