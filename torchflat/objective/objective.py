"""f, its gradient, and products with its Hessian, over all the data, at one point."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchflat import ops
from torchflat.errors import DataError, LossError, NonFiniteError, ReproducibilityError, UsageError
from torchflat.objective.batches import Batches, as_batches, row_count, slice_rows
from torchflat.objective.evaluation import FunctionTerm, ModelTerm, Term, non_finite
from torchflat.objective.graphs import Graph, Graphs
from torchflat.objective.ledger import Ledger
from torchflat.objective.memory import Memory, parse_bytes
from torchflat.parameters import Layout, select
from torchflat.result import Cost

__all__ = ["Objective"]

# Rows on which float32 products are checked against float64 ones, and on which the preflight probe runs.
SAMPLE_ROWS = 256


class Objective:
    """The loss of a model over data, as a function of the flat vector x of its audited parameters:

        f(x) = Σ loss over rows / Σ weight  +  ½ · weight_decay · |x|²,    x of shape (n,).

    Args:
        model: any ``nn.Module``. It is called, never modified: weights, buffers, flags, ``.grad``, hooks and random
            states are what they were, also after an error or an interruption.
        loss: ``loss(output, target) -> scalar``, a mean over the rows of the batch. ``None`` with ``batch_loss``.
        data: a DataLoader, a Dataset, ``(X, Y)`` tensors, or batches that can be iterated again and again. A batch is
            ``(input, target)`` or a dict whose target is called ``labels``, ``target`` or ``y``. Shuffling and
            ``drop_last`` of a loader are undone: every row counts, once, in a fixed order.
        params: names, wildcards or submodules that make up x (``"!name"`` excludes); default: what requires grad.
        device, dtype: where and how to compute; default: the parameters' own. Half precision is audited in float32.
        mode: ``"eval"`` (default) or ``"train"``.
        microbatch: rows that go through the model at once; default: what the memory budget suggests.
        memory: budget for retained graphs, Krylov vectors and workspace together, such as ``"2GiB"``.
        batch_loss: ``batch_loss(model, batch) -> (sum, weight)``, for losses that are not a mean over rows (tokens).
        weight_decay: coefficient of the L2 term, as in ``torch.optim``.

    Raises:
        UsageError, DataError, LossError, NonFiniteError, ReproducibilityError: each names the cure.

    Example: for linear regression, H = 2 XᵀX / m.

        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> f = Objective(nn.Linear(2, 1, bias=False), nn.MSELoss(), (X, torch.zeros(2, 1)))
        >>> f.n, f.hvp(torch.tensor([1.0, 1.0]))
        (2, tensor([1., 4.]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        data: Any,
        params: str | Iterable[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "eval",
        microbatch: int | None = None,
        memory: str | int = "2GiB",
        *,
        batch_loss: Callable[[nn.Module, Any], tuple[Tensor, float]] | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        names = select(model, params)
        own = dict(model.named_parameters())
        tensors = [own[name].detach() for name in names]
        place = torch.device(device) if device is not None else tensors[0].device
        precision = _working_precision(dtype, tensors)
        term = ModelTerm(model, loss, batch_loss, names, mode, precision, place)
        layout = Layout(tuple(names), tuple(tensor.shape for tensor in tensors))
        x = layout.flatten([tensor.to(place, precision) for tensor in tensors])
        if microbatch is not None and microbatch < 1:
            raise UsageError(f"microbatch={microbatch}: it must be a positive number of rows, or None")
        batches = as_batches(data)
        budget, ledger = Memory(parse_bytes(memory)), Ledger(batches.rows)
        self._assemble(term, batches, layout, x, budget, ledger, microbatch, weight_decay)

    @classmethod
    def from_function(
        cls, fn: Callable[[Tensor], Tensor], x: Tensor, *, memory: str | int = "2GiB", weight_decay: float = 0.0
    ) -> Objective:
        """The objective f = fn at x: ``fn`` maps a (n,) tensor to a scalar; there is no data.

        >>> f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, torch.tensor([2.0, 0.5]))
        >>> f.value(), f.gradient(), f.hvp(torch.eye(2))
        (0.0, tensor([0., 0.]), tensor([[0.5000, 2.0000],
                [2.0000, 8.0000]]))
        """
        if x.ndim != 1 or not x.is_floating_point():
            raise UsageError(f"x must be a real floating vector of shape (n,), not {tuple(x.shape)} {x.dtype}")
        self = cls.__new__(cls)
        x = x.detach().to(_working_precision(None, [x]), copy=True)
        batches, layout = Batches([None], 1), Layout(("x",), (x.shape,))
        term, budget = FunctionTerm(fn, x.dtype, x.device), Memory(parse_bytes(memory))
        self._assemble(term, batches, layout, x, budget, Ledger(1), None, weight_decay)
        return self

    def _assemble(
        self,
        term: Term,
        batches: Batches,
        layout: Layout,
        x: Tensor,
        memory: Memory,
        ledger: Ledger,
        microbatch: int | None,
        weight_decay: float,
        checked: bool = False,
    ) -> None:
        self.layout, self.memory, self.weight_decay = layout, memory, weight_decay
        self._term, self._batches, self._x, self._ledger = term, batches, x, ledger
        parts = layout.split(x)
        leaves = {name: part.requires_grad_() for name, part in zip(layout.names, parts, strict=True)}
        self._graphs = Graphs(term, batches, leaves, memory, ledger, microbatch)
        self._checked = checked
        self._value: float | None = None
        self._gradient: Tensor | None = None
        self._sample_pair: tuple[Objective, Objective] | None = None
        if not torch.isfinite(x).all():
            raise self._graphs.non_finite("the parameters are not finite", None)

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Length of x."""
        return self.layout.n

    @property
    def x(self) -> Tensor:
        """The point, a copy of shape (n,)."""
        return self._x.clone()

    @property
    def rows(self) -> int:
        """Number of rows of the data (1 for a function)."""
        return self._batches.rows

    @property
    def dtype(self) -> torch.dtype:
        return self._term.dtype

    @property
    def device(self) -> torch.device:
        return self._term.device

    @property
    def cost(self) -> Cost:
        """What has been spent so far, here and on everything derived from here, in passes over this data."""
        return self._ledger.cost

    def provenance(self) -> dict[str, Any]:
        """How the numbers were computed: device, precision, which kernels, which graphs, and what to know about it."""
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "ops": ops.backend(self.device),
            "products": self._graphs.path,
            "microbatch": self._graphs.microbatch,
            "memory_bytes": self.memory.total,
            "notes": list(self._term.notes),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the data. One pass over it."""
        return self._batches.fingerprint()

    # What it gives ---------------------------------------------------------------------------------------------------

    def value(self) -> float:
        """f(x), accumulated in float64."""
        if self._value is None:
            total = weight = 0.0
            with self._session():
                for index, batch in enumerate(self._graphs.microbatches()):
                    with torch.no_grad():
                        part, part_weight = self._graphs.evaluate(batch, index)
                    total, weight = total + float(part), weight + part_weight
            self._value = total / self._positive(weight) + self._decay_value()
        return self._value

    def gradient(self) -> Tensor:
        """∇f(x), shape (n,). Costs one gradient the first time, and gives the value for nothing."""
        if self._gradient is None:
            accumulator = torch.zeros(self.n, dtype=torch.float64, device=self.device)
            parts = self.layout.split(accumulator)
            total = weight = 0.0
            with self._session():
                for index, batch in enumerate(self._graphs.microbatches()):
                    value, part_weight, gradients = self._graphs.differentiate(batch, index, create_graph=False)
                    ops.axpy_(parts, list(gradients), 1.0)
                    total, weight = total + float(value), weight + part_weight
            accumulator /= self._positive(weight)
            accumulator += self.weight_decay * self._x
            self._finite(accumulator, "the gradient")
            self._value, self._gradient = total / weight + self._decay_value(), accumulator.to(self.dtype)
        return self._gradient.clone()

    def hvp(self, v: Tensor) -> Tensor:
        """H v for v of shape (n,), or H V for V of shape (n, k), with H = ∇²f(x)."""
        if v.shape[:1] != (self.n,) or v.ndim > 2:
            raise UsageError(f"v must have shape ({self.n},) or ({self.n}, k), not {tuple(v.shape)}")
        rows = v.detach().to(self.device, self.dtype).reshape(self.n, -1).T.contiguous()
        return self.products(rows).T.reshape(v.shape)

    def products(self, vectors: Tensor) -> Tensor:
        """H applied to each row of ``vectors`` (k, n), in one pass over the data; a (k, n) tensor of the same dtype."""
        if not torch.isfinite(vectors).all():
            raise NonFiniteError("the vector that H is applied to holds NaN or infinity")
        accumulator = torch.zeros(vectors.shape, dtype=torch.float64, device=self.device)
        inputs = [self.layout.split(vector) for vector in vectors]
        outputs = [self.layout.split(row) for row in accumulator]

        def work(graph: Graph) -> float:
            for vector, parts in zip(inputs, outputs, strict=True):
                ops.axpy_(parts, graph.product(vector), 1.0)
                self._ledger.charge(products=graph.rows)
            return graph.weight

        accumulator /= self._over_graphs(work, accumulator)
        if self.weight_decay:
            accumulator += self.weight_decay * vectors
        self._finite(accumulator, "the Hessian product")
        return accumulator.to(self.dtype)

    def block_products(self, vectors: dict[tuple[int, ...], Tensor]) -> dict[tuple[int, ...], Tensor]:
        """H_bb v_b for several diagonal blocks b in one pass over the data.

        A block is a tuple of indices into ``layout.names``; its vector has the length of those tensors together.
        """
        layouts = {
            block: Layout(tuple(self.layout.names[i] for i in block), tuple(self.layout.shapes[i] for i in block))
            for block in vectors
        }
        sums = {block: torch.zeros(v.shape, dtype=torch.float64, device=self.device) for block, v in vectors.items()}

        def work(graph: Graph) -> float:
            for block, vector in vectors.items():
                products = graph.product(layouts[block].split(vector), block)
                ops.axpy_(layouts[block].split(sums[block]), products, 1.0)
                self._ledger.charge(products=graph.rows)
            return graph.weight

        weight = self._over_graphs(work, *sums.values())
        for block, vector in vectors.items():
            sums[block] = sums[block] / weight + self.weight_decay * vector
            self._finite(sums[block], "the Hessian product")
        return {block: total.to(self.dtype) for block, total in sums.items()}

    # What comes from it ----------------------------------------------------------------------------------------------

    def at(self, x: Tensor) -> Objective:
        """The same function at another point, of shape (n,)."""
        if x.shape != (self.n,):
            raise UsageError(f"x must have shape ({self.n},), not {tuple(x.shape)}")
        return self._derived(self._term, self._batches, x.detach().to(self.device, self.dtype, copy=True))

    def subset(self, size: int, seed: int = 0) -> Objective:
        """The same function on ``size`` rows drawn without replacement. Its cost is charged here too."""
        if not 1 <= size <= self.rows:
            raise UsageError(f"subset({size}): the data has {self.rows} rows")
        return self._derived(self._term, self._batches.subset(size, seed), self._x)

    def rounding_error(self, vectors: Tensor, quadratic: bool = False) -> float:
        """Largest ‖H v − H₆₄ v‖, or |vᵀ(H − H₆₄)v| if ``quadratic``, over the rows v of ``vectors`` (k, n).

        H₆₄ is computed in float64. Measured on a sample of rows of the data; 0 where the working precision is float64
        already, and for a function of x, which has no second precision.
        """
        if self.dtype == torch.float64 or isinstance(self._term, FunctionTerm):
            return 0.0
        if self._sample_pair is None:
            size = min(self.rows, SAMPLE_ROWS, self._graphs.microbatch or SAMPLE_ROWS)
            sample = self.subset(size) if self._graphs.splittable else self._first_batch()
            exact = sample._derived(self._term.converted(torch.float64), sample._batches, self._x.double())
            self._sample_pair = sample, exact
        sample, exact = self._sample_pair
        vectors = vectors.to(self.dtype)
        error = sample.products(vectors).double() - exact.products(vectors.double())
        return float(((error * vectors).sum(1).abs() if quadratic else torch.linalg.vector_norm(error, dim=1)).max())

    def _first_batch(self) -> Objective:
        first = next(iter(self._batches))
        return self._derived(self._term, Batches([first], row_count(first) or 1), self._x)

    def _derived(self, term: Term, batches: Batches, x: Tensor) -> Objective:
        other = Objective.__new__(Objective)
        ledger = Ledger(batches.rows, self._ledger)
        rows, decay = self._graphs.microbatch, self.weight_decay
        other._assemble(term, batches, self.layout, x, self.memory, ledger, rows, decay, checked=True)
        other._graphs.splittable = self._graphs.splittable
        return other

    # How it goes about it --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        with self._ledger.timed(), self._term.session(), torch.enable_grad():
            if not self._checked:
                self._preflight()
                self._checked = True
            yield

    def _over_graphs(self, work: Callable[[Graph], float], *accumulators: Tensor) -> float:
        """Sum of ``work`` over all graphs; once more from zero if the model's attention had to be exchanged."""
        weight = [0.0]

        def add(graph: Graph) -> None:
            weight[0] += work(graph)

        try:
            with self._session():
                self._graphs.for_each(add)
        except (NotImplementedError, RuntimeError) as error:
            if "is not implemented" not in str(error):
                raise
            self._graphs.clear()
            if not self._term.without_fused_attention():
                what = str(error).strip().splitlines()[0]
                raise LossError(f"the model cannot be differentiated twice: {what}") from error
            for accumulator in accumulators:
                accumulator.zero_()
            return self._over_graphs(work, *accumulators)
        return self._positive(weight[0])

    def _preflight(self) -> None:
        """Evaluate a few rows twice, and in two halves: is the model deterministic, and its loss a mean over rows?"""
        first, again = (next(iter(self._batches), None) for _ in range(2))
        rows = row_count(first) or 0
        if rows > SAMPLE_ROWS:
            first, again = (slice_rows(batch, 0, SAMPLE_ROWS) for batch in (first, again))
            rows = SAMPLE_ROWS
        whole, repeated = self._probe(first), self._probe(again)
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-8
        if not math.isclose(whole, repeated, rel_tol=tolerance, abs_tol=1e-30) and not math.isnan(whole):
            raise ReproducibilityError(
                f"two evaluations on the same rows gave {whole:.9g} and {repeated:.9g}: the model or its data is random "
                "(noise, sampling, augmentation); fix its seed inside forward, or switch it off"
            )
        if rows < 2:
            self._graphs.splittable = rows == 1
            return
        parts = [self._probe(slice_rows(first, *cut)) for cut in ((0, rows // 2), (rows // 2, rows))]
        if abs(whole - sum(parts)) > tolerance * (abs(whole) + abs(parts[0]) + abs(parts[1])):
            self._not_additive(whole, sum(parts))

    def _not_additive(self, whole: float, parts: float) -> None:
        if isinstance(self._term, ModelTerm) and self._term.call.batch_loss is None:
            raise LossError(
                f"the loss is not a mean over rows: {whole:.6g} summed over some rows at once, {parts:.6g} over their two "
                "halves. Use reduction='mean' without class weights or ignored targets, or pass "
                "batch_loss(model, batch) -> (sum, weight) instead"
            )
        self._graphs.splittable = False
        self._term.notes.append("batch_loss is not a sum over rows: batches were kept whole")

    def _probe(self, batch: Any) -> float:
        self._ledger.charge(forwards=row_count(batch) or 1)
        with torch.no_grad():
            return float(self._term(self._graphs.parameters, batch)[0])

    def _positive(self, weight: float) -> float:
        if weight <= 0:
            raise DataError("the weights of the data sum to zero: no row counts")
        return weight

    def _decay_value(self) -> float:
        return 0.5 * self.weight_decay * float(ops.dot([self._x], [self._x]))

    def _finite(self, tensor: Tensor, what: str) -> None:
        if not torch.isfinite(tensor).all():
            raise self._first_non_finite(what)

    def _first_non_finite(self, what: str) -> Exception:
        with self._session():
            for index, batch in enumerate(self._graphs.microbatches()):
                gradients = self._graphs.differentiate(batch, index, create_graph=False)[2]
                named = dict(zip(self.layout.names, gradients, strict=True))
                if not all(torch.isfinite(gradient).all() for gradient in gradients):
                    return non_finite(f"{what}, at the gradient of micro-batch {index}", named)
        return NonFiniteError(f"{what} is not finite in {self.dtype}, though every gradient is: use dtype=torch.float64")


def _working_precision(dtype: torch.dtype | None, tensors: Sequence[Tensor]) -> torch.dtype:
    if dtype is not None:
        if not dtype.is_floating_point:
            raise UsageError(f"dtype={dtype}: curvature needs a real floating dtype")
        return dtype
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
