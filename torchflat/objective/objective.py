"""f, its gradient, and products with its Hessian, over all the data, at one point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from torchflat import ops
from torchflat.distributed import Bucket, Team
from torchflat.errors import LossError, NonFiniteError, UsageError
from torchflat.objective.accuracy import Accuracy, second_derivative_fault
from torchflat.objective.batches import Batches, as_batches, rows_of
from torchflat.objective.evaluation import FunctionTerm, ModelTerm, Term, note, unwrapped
from torchflat.objective.forms import Forms, deal, group_forms, group_values
from torchflat.objective.functional import Transform, add_transforms
from torchflat.objective.gauss_newton import GaussNewtonTerm
from torchflat.objective.graphs import Graphs, finite
from torchflat.objective.ledger import Ledger
from torchflat.objective.memory import Memory, parse_bytes, return_freed_pages
from torchflat.objective.passes import SAME_DATA, Passes
from torchflat.objective.scores import NoScores, RowCurvature
from torchflat.objective.state import random_states_kept
from torchflat.objective.unsharded import unsharded
from torchflat.parameters import Layout, select
from torchflat.result import Cost

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Objective"]

# Rows that go through a model in float64 at once.
EXACT_ROWS = 64


class Objective:
    """The loss of a model over data, as a function of the flat vector x of its audited parameters.

    f(x) = Σ loss over rows / Σ weight  +  ½ · weight_decay · |x|², with x of shape (n,).

    Args:
        model: any ``nn.Module``. It is called, never modified: weights, buffers, flags, ``.grad``, hooks and random
            states are what they were, also after an error or an interruption. x and the buffers are copied; frozen
            parameters are shared, and must not be trained while the objective is in use.
        loss: ``loss(output, target) -> scalar``, a mean over the rows of the batch. ``None`` with ``batch_loss``.
        data: a DataLoader, a Dataset, ``(X, Y)`` tensors, or batches that can be iterated again and again. A batch is
            ``(input, target)`` or a dict whose target is called ``labels``, ``target`` or ``y``. Shuffling and
            ``drop_last`` of a loader are undone: every row counts, once, in a fixed order. A sampler that draws rows
            (with weights, or some of them) is drawn once.
        params: names, wildcards or submodules that make up x (``"!name"`` excludes); default: what requires grad.
        device, dtype: where and how to compute; default: the parameters' own. Half precision is audited in float32.
        mode: ``"eval"`` (default) or ``"train"``.
        microbatch: rows that go through the model at once; default: what the memory budget suggests.
        memory: budget for retained graphs, Krylov vectors and workspace together, such as ``"2GiB"``.
        batch_loss: ``batch_loss(model, batch) -> (sum, weight)``, for losses that are not a mean over rows (tokens).
        weight_decay: coefficient of the L2 term, as in ``torch.optim``.
        group: processes of torch.distributed among which the rows are split: by default all of them, if it is
            initialised; ``"alone"`` keeps to this process. See below.

    In a group every process makes the same objective, of the same model and the same, whole data, and calls the same
    methods with the same arguments: each evaluates its share of the rows, every pass ends in one reduction, and all get
    the answer that one process would get, up to rounding. Errors are raised on all. ``cost`` counts the work of all,
    and ``team`` is how they meet.

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
        group: ProcessGroup | str | None = None,
    ) -> None:
        if microbatch is not None and microbatch < 1:
            raise UsageError(f"microbatch={microbatch}: it must be a positive number of rows, or None")
        if not math.isfinite(weight_decay):
            raise UsageError(f"weight_decay={weight_decay}: it must be a finite number")
        model = unsharded(unwrapped(model))
        names = select(model, params)
        own = dict(model.named_parameters())
        tensors = [own[name].detach() for name in names]
        place = torch.device(device) if device is not None else tensors[0].device
        precision = _working_precision(dtype, tensors)
        term = ModelTerm(model, loss, batch_loss, names, mode, precision, place)
        layout = Layout(tuple(names), tuple(tensor.shape for tensor in tensors))
        x = layout.flatten([tensor.to(place, precision) for tensor in tensors])
        team = Team.of(group, place)
        with team.together():
            batches = as_batches(data)
        budget, ledger = Memory(parse_bytes(memory)), Ledger(batches.rows)
        self._assemble(team, term, batches, layout, x, budget, ledger, microbatch, weight_decay)
        budget.keep_vectors(self, x.nbytes)

    @classmethod
    def from_function(
        cls, fn: Callable[[Tensor], Tensor], x: Tensor, *, memory: str | int = "2GiB", weight_decay: float = 0.0
    ) -> Objective:
        """Make the objective f = fn at x: ``fn`` maps a (n,) tensor to a scalar; there is no data, and no group.

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
        self._assemble(Team.alone(), term, batches, layout, x, budget, Ledger(1), None, weight_decay)
        budget.keep_vectors(self, x.nbytes)
        return self

    def _assemble(
        self,
        team: Team,
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
        self.team, self.layout, self.memory, self.weight_decay = team, layout, memory, weight_decay
        self._term, self._batches, self._ledger = term, batches, ledger
        with torch.inference_mode(False):
            self._x = x.clone() if x.is_inference() else x
            parts = layout.split(self._x)
            leaves = {name: part.requires_grad_() for name, part in zip(layout.names, parts, strict=True)}
        self._graphs = Graphs(term, batches, leaves, memory, ledger, microbatch)
        self._passes = Passes(team, term, batches, self._graphs, ledger, self._x, microbatch is None, checked)
        self._value: float | None = None
        self._gradient: Tensor | None = None
        self._accuracy = Accuracy()
        if not torch.isfinite(self._x).all():
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
    def buffers(self) -> dict[str, Tensor]:
        """Those of the model by name, as they were when this was made, in its dtype; none for a function."""
        return dict(self._term.buffers)

    @property
    def rows(self) -> int:
        """Number of rows of the data, those of other ranks included (1 for a function)."""
        return self._batches.rows

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of all products."""
        return self._term.dtype

    @property
    def device(self) -> torch.device:
        """Where all is computed."""
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
            "plan": self._graphs.plan.to_dict(),
            "memory_bytes": self.memory.total,
            "processes": self.team.size,
            "notes": list(self._term.notes),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the data, whole also where its rows are split over processes. One pass over it."""
        bucket = Bucket(self.team, same=SAME_DATA)
        with self.team.summed(bucket):
            digest = self._batches.fingerprint()
            bucket.checksum = float(int(digest, 16) % 2**52)
        return digest

    # What it gives ---------------------------------------------------------------------------------------------------

    def value(self) -> float:
        """f(x), accumulated in float64."""
        if self._value is None:
            mean, _ = self._passes.mean(0, lambda sums: self._graphs.add_values())
            self._value = mean + self._decay_value()
        return self._value

    def gradient(self) -> Tensor:
        """∇f(x), shape (n,). Costs one gradient the first time, and gives the value for nothing."""
        if self._gradient is None:
            add = self._graphs.add_gradients
            value, mean = self._passes.mean(self.n, lambda sums: add(self.layout.split(sums)))
            gradient = self._with_decay(mean, self._x)
            if not finite(gradient):
                raise NonFiniteError(f"the gradient overflows in {self.dtype}: use dtype=torch.float64")
            self._value, self._gradient = value + self._decay_value(), gradient
        return self._gradient.clone()

    def hvp(self, v: Tensor) -> Tensor:
        """H v for v of shape (n,), or H V for V of shape (n, k), with H = ∇²f(x)."""
        if v.shape[:1] != (self.n,) or v.ndim > 2:
            raise UsageError(f"v must have shape ({self.n},) or ({self.n}, k), not {tuple(v.shape)}")
        rows = v.detach().to(self.device, self.dtype).reshape(self.n, -1).T.contiguous()
        return self.products(rows).T.reshape(v.shape)

    def products(self, vectors: Tensor) -> Tensor:
        """H applied to each row of ``vectors`` (k, n), in one pass over the data; a (k, n) tensor of the same dtype."""
        self._verify()
        inputs = [self.layout.split(vector) for vector in vectors]
        everything = range(len(self.layout.names))

        def add(sums: Tensor) -> tuple[float, float]:
            _check_finite(vectors)
            rows = map(self.layout.split, sums.view(vectors.shape))
            return 0.0, self._graphs.add_products([(everything, v, row) for v, row in zip(inputs, rows, strict=True)])

        # One vector's share is part of the workspace already.
        with self.memory.vectors_held((vectors.shape[0] - 1) * self.n * 16):
            _, sums = self._passes.mean(vectors.numel(), add, [vectors])
            products = self._with_decay(sums.view(vectors.shape), vectors)
        if not finite(products):
            self._refuse_product([(everything, v) for v in inputs])
        return products

    def block_products(self, vectors: dict[tuple[int, ...], Tensor]) -> dict[tuple[int, ...], Tensor]:
        """H_bb v_b for several diagonal blocks b in one pass over the data.

        A block is a tuple of indices into ``layout.names``; its vector has the length of those tensors together.
        """
        self._verify()
        layouts = {block: self.layout.part(block) for block in vectors}
        inputs = [(block, layouts[block].split(vector)) for block, vector in vectors.items()]
        lengths = [layout.n for layout in layouts.values()]

        def add(sums: Tensor) -> tuple[float, float]:
            for vector in vectors.values():
                _check_finite(vector)
            parts = zip(inputs, sums.split(lengths), strict=True)
            return 0.0, self._graphs.add_products([(block, v, layouts[block].split(s)) for (block, v), s in parts])

        _, sums = self._passes.mean(sum(lengths), add, list(vectors.values()))
        means = zip(vectors.items(), sums.split(lengths), strict=True)
        products = {block: self._with_decay(mean, vector) for (block, vector), mean in means}
        if not all(map(finite, products.values())):
            self._refuse_product(inputs)
        return products

    def quadratic_forms(self, v: Tensor, groups: int = 64, seed: int = 0) -> Forms:
        """vᵀH_g v, for v of shape (n,), of groups g of rows drawn at random by ``seed``, in one pass over the data.

        vᵀHv = Σ sums / Σ weights of what is returned. There are ``groups`` of them at least, as far as there are rows.

        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> f = Objective(nn.Linear(2, 1, bias=False), nn.MSELoss(), (X, torch.zeros(2, 1)))
        >>> sorted(f.quadratic_forms(torch.tensor([1.0, 1.0])).sums.tolist())
        [2.0, 8.0]
        """
        if v.shape != (self.n,):
            raise UsageError(f"v must have shape ({self.n},), not {tuple(v.shape)}")
        v = v.detach().to(self.device, self.dtype)
        self._verify()
        _check_finite(v)
        parts = self.layout.split(v)
        share, first = groups / self.rows, self.team.share(self.rows).start
        table = self._passes.gathered(lambda: group_forms(self._graphs, parts, share, seed, first))
        forms = Forms.of(table)
        if not finite(forms.sums):
            self._refuse_product([(range(len(parts)), parts)])
        forms.sums.add_(forms.weights, alpha=self.weight_decay * float(ops.dot([v], [v])))
        return forms

    def group_values(self, groups: int = 64, seed: int = 0) -> Forms:
        """f(x) by groups of rows drawn at random: Σ loss and Σ weight of each, in one pass over the data forwards.

        f(x) = Σ sums / Σ weights of what is returned, whose sums have the L2 term in them for each weight. Which rows
        make up a group depends on the number of rows, on ``groups`` and on ``seed``, and on nothing else: not on x, the
        model, batches, micro-batches or processes. So the groups of two objectives over the same rows can be paired.
        There are as many as asked for, or one for each row. Only where batches cannot be cut, ``cut`` is false, and
        each batch is a group: these pair up with the same batches.

        Raises:
            UsageError: ``groups`` is not positive.

        >>> X = torch.tensor([[1.0], [2.0], [3.0]])
        >>> f = Objective(nn.Linear(1, 1, bias=False), nn.MSELoss(), (X, 0 * X)).at(torch.ones(1))
        >>> sorted(f.group_values().sums.tolist())
        [1.0, 4.0, 9.0]
        """
        if groups < 1:
            raise UsageError(f"groups={groups}: it must be a positive number")
        labels, strata = deal(self.rows, groups, seed)
        forms = Forms.merged(self._passes.gathered(lambda: group_values(self._graphs, labels, strata, self.team)))
        forms.sums.add_(forms.weights, alpha=self._decay_value())
        return forms

    def transformed(self, transform: Transform, length: int, gradients: int, vectors: Sequence[Tensor] = ()) -> Tensor:
        """``transform(f)``, in float64, by one pass over the data with the transforms of ``torch.func``.

        ``transform`` maps a function φ: (n,) → scalar to ``length`` numbers, and is linear in φ, as derivatives at x
        are: it is applied to the loss sum of each micro-batch, and to the L2 term. ``gradients`` says what that costs,
        for the ledger, and ``vectors`` is what it depends on besides x.

        Raises:
            LossError: an operator of the model lacks a rule for what ``transform`` asks; it is named.
            NonFiniteError: the numbers hold NaN or infinity.

        >>> f = Objective.from_function(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> f.transformed(lambda loss: torch.func.grad(loss)(f.x), length=2, gradients=1)
        tensor([ 3., 12.], dtype=torch.float64)
        """
        self._verify()

        def add(sums: Tensor) -> tuple[float, float]:
            return 0.0, add_transforms(self._graphs, self.layout, transform, gradients, sums)

        _, mean = self._passes.mean(length, add, vectors)
        if self.weight_decay:
            mean += transform(lambda y: 0.5 * self.weight_decay * y.dot(y))
        return mean

    # What comes from it ----------------------------------------------------------------------------------------------

    def at(self, x: Tensor) -> Objective:
        """Take the same function to another point, of shape (n,)."""
        if x.shape != (self.n,):
            raise UsageError(f"x must have shape ({self.n},), not {tuple(x.shape)}")
        return self._derived(self._term, self._batches, x.detach().to(self.device, self.dtype, copy=True))

    def subset(self, size: int, seed: int = 0) -> Objective:
        """Restrict the function to ``size`` rows drawn without replacement. Its cost is charged here too."""
        if not 1 <= size <= self.rows:
            raise UsageError(f"subset({size}): the data has {self.rows} rows")
        with self.team.together():
            batches = self._batches.subset(size, seed)
        return self._derived(self._term, batches, self._x)

    @property
    def divisible(self) -> bool:
        """Whether rows can be drawn from the data at will, without a pass over all of it."""
        self._passes.prepare()
        return self._graphs.splittable and self._batches.indexed

    def take(self, rows: Tensor) -> Objective:
        """Restrict the function to the rows with these indices, (k,) int64. Its cost is charged here too."""
        self._passes.prepare()
        with self.team.together():
            batches = self._batches.take(rows, self._graphs.microbatch)
        return self._derived(self._term, batches, self._x)

    def row_curvatures(self, seed: int = 0) -> Tensor:
        """Estimate how much each row can curve the loss: (rows,) float64, see :class:`RowCurvature`.

        Costs three to five evaluations of the loss.

        Raises:
            NoScores: the rows cannot be told apart at the output of the model.
        """
        if not isinstance(self._term, ModelTerm) or self._term.call.loss is None:
            raise NoScores("rows can be told apart only with loss(output, target)")
        self._passes.prepare()
        if not self._graphs.splittable:
            raise NoScores("the batches cannot be cut into rows")
        score, mine = RowCurvature(self._term, self._graphs.parameters, seed), self.team.share(self.rows)

        def add(sums: Tensor) -> tuple[float, float]:
            self._graphs.add_scores(score, sums[mine.start : mine.stop])
            return 0.0, 0.0

        return self._passes.sum(self.rows, add)[2].cpu()

    def rounding_error(self, vectors: Tensor, quadratic: bool = False) -> float:
        """Largest ‖H v − H₆₄ v‖, or |vᵀ(H − H₆₄)v| if ``quadratic``, over the rows v of ``vectors`` (k, n).

        H₆₄ is computed in float64, on 16 rows of the data. Where the loss cannot be computed in float64
        (it holds constants of another precision), a note says so, and the error is twice the largest change of H v
        between points that are one rounding of x apart. 0 where the working precision is float64 already.
        """
        if self.dtype == torch.float64:
            return 0.0
        return_freed_pages()
        error = self._accuracy.rounding_error(self, vectors.detach().to(self.dtype), quadratic)
        return_freed_pages()
        return error

    def gauss_newton(self) -> Objective:
        """Return a function whose Hessian at x is the Gauss–Newton matrix JᵀH_ℓJ of this one, and weight_decay·I.

        J is the derivative of the model's output, H_ℓ the Hessian of the loss in it: positive semidefinite for convex
        losses, and equal to ∇²f(x) where the network is linear in x or fits exactly. The function has the value of f at
        every x where it is asked (:meth:`at`), and a gradient that is only the L2 term's. Its cost is charged here.

        Raises:
            UsageError: f is not given by a model and ``loss(output, target)``.

        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        >>> f = Objective(model, nn.MSELoss(), (torch.ones(1, 1).double(), torch.zeros(1, 1).double()))
        >>> G = f.at(torch.tensor([2.0, 3.0])).gauss_newton().hvp(torch.eye(2).double())
        >>> G.tolist()
        [[18.0, 12.0], [12.0, 8.0]]
        """
        return self._derived(GaussNewtonTerm(self._term), self._batches, self._x)

    def few_rows(self, size: int) -> Objective:
        """Restrict to about ``size`` rows: a subset, or the first batch if that cannot be cut; itself if small."""
        self._passes.prepare()
        if self.rows <= size:
            return self
        if self._graphs.splittable:
            return self.subset(size)
        with self.team.together(), random_states_kept():
            first = self._batches.first()
        return self._derived(self._term, Batches([first], rows_of(first)), self._x)

    def in_float64(self) -> Objective:
        """Compute the same function at the same point in float64."""
        # Few rows at once: float64 vectors stand beside all that the budget was spent on.
        self._passes.prepare()
        rows = None if self._graphs.microbatch is None else min(EXACT_ROWS, self._graphs.microbatch)
        return self._derived(self._term.converted(torch.float64), self._batches, self._x.double(), rows)

    def note(self, text: str) -> None:
        """Add to the notes of :meth:`provenance`, once."""
        note(self._term, text)

    def _derived(self, term: Term, batches: Batches, x: Tensor, microbatch: int | None = None) -> Objective:
        self._passes.prepare()
        other = Objective.__new__(Objective)
        ledger, rows = Ledger(batches.rows, self._ledger), microbatch or self._graphs.microbatch
        other._assemble(
            self.team, term, batches, self.layout, x, self.memory, ledger, rows, self.weight_decay, checked=True
        )
        other._graphs.follow(self._graphs)
        other._passes.take_share(self._graphs.splittable)
        shared = {id(tensor) for tensor in (self._x, *self._term.constants.values())}
        own = sum(tensor.nbytes for tensor in (x, *term.constants.values()) if id(tensor) not in shared)
        self.memory.keep_vectors(other, own)
        return other

    # How it goes about it --------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Check once for each function that its products are those of the Hessian."""
        if self._term.verified:
            return
        fault = second_derivative_fault(self)
        if fault and self._term.without_fused_kernels():
            self._graphs.clear()
            fault = second_derivative_fault(self)
        return_freed_pages()
        if fault:
            raise LossError(fault)
        self._term.verified = True

    def _refuse_product(self, inputs: Sequence[tuple[Sequence[int], Sequence[Tensor]]]) -> NoReturn:
        """Name the micro-batch and the tensors where a product went wrong."""

        def look() -> None:
            with self.team.together():
                self._graphs.refuse_non_finite_products(inputs)

        self._passes.attempt(look)
        raise NonFiniteError(f"the Hessian product overflows in {self.dtype}: use dtype=torch.float64")

    def _with_decay(self, sums: Tensor, vectors: Tensor) -> Tensor:
        if self.weight_decay:
            sums.add_(vectors, alpha=self.weight_decay)
        return sums.to(self.dtype)

    def _decay_value(self) -> float:
        return 0.5 * self.weight_decay * float(ops.dot([self._x], [self._x]))


def _check_finite(vectors: Tensor) -> None:
    if not finite(vectors):
        raise NonFiniteError("the vector that H is applied to holds NaN or infinity")


def _working_precision(dtype: torch.dtype | None, tensors: Sequence[Tensor]) -> torch.dtype:
    if dtype is not None:
        if not dtype.is_floating_point:
            raise UsageError(f"dtype={dtype}: curvature needs a real floating dtype")
        return dtype
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
