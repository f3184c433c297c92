"""What happens to a network while it is trained: balance, norms, sharpness, and alarms where theory says to look."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.objective.evaluation import first_line, unwrapped
from torchflat.optim import history
from torchflat.optim.account import Account
from torchflat.optim.alarms import Alarm, Watch, warn
from torchflat.optim.follower import Follower
from torchflat.optim.history import Cell, Columns
from torchflat.optim.moves import Moves
from torchflat.optim.rows import rates, tracked
from torchflat.optim.stretch import Seen, Travelled, work_out
from torchflat.optim.sweep import Sweep
from torchflat.symmetry import Laws, laws

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Tracker"]

VERSION = 1
# Steps that are worked out together, and what their sums may take in bytes.
STRETCH, STRETCH_BYTES = 64, 2**24


class Tracker:
    """Record balance, norms, loss and sharpness along training, and raise an alarm where something is amiss.

    It listens to the steps of the optimizer, so that it counts steps, not batches, whatever the training loop is. A row
    of the history says how things are at x_k, before step k, which is the k-th since the tracker was made:

    - ``step``, ``loss``, ``lr``; ``parameter_norm`` |x|, ``gradient_norm`` |∇f|;
    - ``length`` |x_{k+1} − x_k|, and ``sum_length`` Σα, ``sum_length_squared`` Σα² of the steps up to k, that included;
    - ``balance/NAME`` |C(x)|, ``imbalance/NAME`` Σ|C|/(writers + readers), from 0, balanced, to 1, and ``drift/NAME``
      |C(x) − C(x₀)| of each coupling; for a linear law ℓ only ``drift``;
    - ``unexplained/NAME``: the largest |Q(x) − Q(x₀) − Σα²Q(ĝ)| over what rounding may do. A plain step changes Q by
      α²Q(ĝ) and nothing else does (T037), so that above 1 something else has moved the parameters;
    - ``sharpness`` λ₁, ``sharpness_status``, and ``edge`` η·λ₁, with η = α/|∇f| for steps of given length and η/(1 + μ)
      with momentum: a quadratic is stable below 2.

    Alarms are of four kinds. ``law``: as above; for SGD and :class:`NormalizedGD` without momentum and weight decay,
    while the drift is recorded for any optimizer, and ``refused`` says what has no account and why. ``edge``: η·λ₁ is
    at 2, where steps of given length are driven. ``escape``: norms grow while the loss stalls above ``infimum``
    (:func:`~torchflat.optim.escape.escape`, T073–T083). ``nonfinite``: a loss, gradient or parameter is not finite.

    What is trained is not touched, random numbers, gradients, modes and buffers included. A step costs one sweep over
    the gradients, and a row one over the parameters. Rows are worked out ``stretch`` steps at a time (:meth:`flush`),
    64 or fewer, so that an alarm may come as much later, and training on another device is not held up.

    Args:
        model: also within DistributedDataParallel or torch.compile.
        optimizer: any. A step with a closure is measured when the closure was first called.
        laws: from :func:`torchflat.symmetry.laws`; by default found at the first step.
        example_input: what the model takes, to find the laws with; by default what it is first called with.
        objective: f for λ₁, or a function that makes it, for models with statistics in buffers. A few hundred rows do.
        every: steps from row to row. Whatever it is, the account is kept at each step.
        sharpness_every: steps from one λ₁ to the next, at least; 100 where there is an objective.
        sharpness_share: of the time, at most, that goes into λ₁.
        measure_steps: find the lengths of steps that are not plain, with a copy of the parameters; else only those of
            plain ones are known.
        infimum: of the loss; a loss that stalls there is no escape.
        stall: share of what the loss has above the infimum that must remain in the end for it to stall.
        product_bound: by coupling (or one number for all), a bound on ‖XYᵀ‖_F of a full coupling of two parameters, as
            long as f does not rise. Where norms are bounded by it and the conserved C (T082, T083), ``norm_bound`` is
            recorded, and there is no alarm below.
        log: called with each :class:`Alarm`; by default a :class:`TrackerWarning` is issued.

    Raises:
        UsageError: an argument is out of range, parameters are sharded, or none is tracked.

    >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Tracker(model, optimizer) as tracker:
    ...     for _ in range(3):
    ...         loss = model(torch.randn(8, 3)).square().mean()
    ...         tracker.record(loss=loss)
    ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> tracker.history["step"], tracker.history["drift/0 → 2"][0], max(tracker.history["unexplained/0 → 2"]) < 1
    ([0, 1, 2], 0.0, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        laws: Laws | None = None,
        example_input: Any = None,
        objective: Objective | Callable[[], Objective] | None = None,
        every: int = 1,
        sharpness_every: int | None = None,
        sharpness_share: float = 0.15,
        measure_steps: bool = False,
        infimum: float = 0.0,
        stall: float = 0.5,
        product_bound: float | Mapping[str, float] | None = None,
        log: Callable[[Alarm], object] | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every={every}: it must be a positive number of steps")
        if sharpness_every is not None and objective is None:
            raise UsageError("sharpness_every= needs objective=, the function whose λ₁ is meant")
        self.model, self.optimizer, self.every = unwrapped(model), optimizer, every
        self._history = Columns()
        self._watch = Watch(infimum, stall, product_bound)
        self.steps = 0
        self.stretch = STRETCH
        self._log = log or warn
        self._parameters = tracked(self.model, optimizer)
        self._follower = None
        if objective is not None:
            self._follower = Follower(objective, 100 if sharpness_every is None else sharpness_every, sharpness_share)
        self._laws, self._example = laws, example_input
        self._autocast: torch.dtype | None = None
        self._account: Account | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._moves = Moves(optimizer, self._parameters)
        self._setting: tuple[Any, ...] | None = None
        self._plain = False
        self._pending: list[Seen] = []
        self._travelled = Travelled()
        self._loss: Tensor | float | None = None
        self._loss_comes_first: bool | None = None
        self._measured = False
        self._measures_steps = measure_steps
        self._before: list[Tensor] = []
        self._written = 0
        self._first_call = model.register_forward_pre_hook(self._called, with_kwargs=True)
        self._hooks = [
            self._first_call,
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def history(self) -> Columns:
        """The rows so far, as columns."""
        self.flush()
        return self._history

    @property
    def alarms(self) -> list[Alarm]:
        """What was said, in order."""
        self.flush()
        return self._watch.alarms

    @property
    def rows(self) -> int:
        """Number of rows that have been worked out."""
        return self._history.rows

    def since(self, index: int) -> Iterator[dict[str, Cell]]:
        """Yield what is known of each row from this one on, as far as they have been worked out."""
        return map(self._history.row, range(index, self.rows))

    @property
    def refused(self) -> Mapping[str, str]:
        """Which laws have a drift only, because steps were not plain, by name, with the reason."""
        return {} if self._account is None else self._account.refused

    # Attaching -------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Take all hooks away, and work out the last rows; what was recorded stays."""
        self._remove_hooks()
        self.flush()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_hooks()
        if error is None:
            self.flush()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the model is called with, once, and the precision that it computes in."""
        if torch.compiler.is_compiling():
            return  # what is traced here are no tensors; and nothing may break the graph
        self._first_call.remove()
        device = next(iter(self._parameters.values())).device.type
        if torch.is_autocast_enabled(device):
            self._autocast = torch.get_autocast_dtype(device)
        if self._example is None and self._laws is None:
            names = inspect.signature(self.model.forward).parameters
            self._example = {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._measured = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._measure()
            return None

        def watched() -> Any:
            loss = closure()
            if not self._measured:
                if self._loss is None and isinstance(loss, (Tensor, float)):
                    self._loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
                self._measure()
            return loss

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pending and self._pending[-1].open:
            last = self._pending[-1]
            last.open = False
            if self._before:
                moved = torch._foreach_sub(self._tensors(), self._before)
                last.length = torch.stack(torch._foreach_norm(moved, 2, torch.float64)).norm()
                self._before = []
        self.steps += 1

    # Measuring -------------------------------------------------------------------------------------------------------

    def record(self, *, loss: Tensor | float) -> None:
        """Enter the loss at x_k, before step k or after it: the first call decides which, for all of them."""
        if self._loss_comes_first is None:
            self._loss_comes_first = self.steps == 0
        loss = loss.detach().clone() if isinstance(loss, Tensor) else loss
        if self._loss_comes_first:
            self._loss = loss
        elif (self.steps - 1) % self.every == 0:
            if self._pending:
                self._pending[-1].loss = loss
            else:
                self._history["loss"][-1] = float(loss)
                self._say(self._watch.look(self._history.row(-1), self._history))

    def flush(self) -> None:
        """Work out the rows of all steps that have ended, and say what is amiss.

        This is done by itself after every ``stretch`` steps, as one by one it would take much longer, and wherever the
        history or the alarms are asked for.
        """
        if self._account is None:
            return
        ended = [each for each in self._pending if not each.open]
        self._pending = [each for each in self._pending if each.open]
        alarms: list[Alarm] = []
        inside = list(self._parameters)[: self._moves.inside]
        for row in work_out(self._account, self._moves, ended, self._travelled) if ended else ():
            bound = self._watch.bound(self._account.sweep.laws, row, inside)
            if bound is not None:
                row["norm_bound"] = bound
            self._history.add(row)
            alarms += self._watch.look(row, self._history)
        self._say(alarms)

    def _say(self, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            self._log(alarm)

    def _tensors(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]

    def _measure(self) -> None:
        """Look at x_k and its gradient."""
        self._measured = True
        account = self._account or self._begin()
        self._pending = [each for each in self._pending if not each.open]  # a step that failed
        # The first row at once, as that is where most is said.
        if self._pending and (self.steps - self._pending[0].step >= self.stretch or not self._history.rows):
            self.flush()
        setting = self._moves.setting()
        if setting != self._setting:
            self.flush()
            account.look(self._moves)
            self._setting, self._plain = setting, self._moves.refusal() is None
        plain = self._plain
        recorded = self.steps % self.every == 0
        if plain or recorded or self._measures_steps:
            gradients = [parameter.grad for parameter in self._parameters.values()]
            seen = Seen(
                step=self.steps,
                x=account.sweep.read(list(self._parameters.values())) if recorded else None,
                g=account.sweep.read(gradients) if plain else None,
                squares=account.sweep.squares(gradients) if recorded and not plain else None,
                move=self._moves.next() if plain else None,
                rates=rates(self.optimizer) if recorded else {},
                edge_rate=None if plain else self._moves.edge_rate(),
                loss=self._loss,
                reading=self._follower.measure(self.steps, self._parameters) if recorded and self._follower else None,
            )
            self._pending.append(seen)
            if self._measures_steps:
                self._before = [tensor.clone() for tensor in self._tensors()]
        self._loss = None

    def _begin(self) -> Account:
        """Find the laws, and open their account."""
        if self._laws is None:
            self._laws = self._found()
        self._example = None
        account = Account(Sweep(self._laws, self._parameters), self._parameters)
        if self._autocast is not None:
            account.coarser(self._autocast)
        if self._loaded:
            account.load_state_dict(self._loaded)
        self._account = account
        self.stretch = max(1, min(STRETCH, STRETCH_BYTES // max(16 * account.sweep.reading, 1)))
        return account

    def _found(self) -> Laws:
        try:
            if self._example is None:
                raise UsageError("the model was not called before its first step: give example_input=")
            return laws(self.model, self._example, mode="train" if self.model.training else "eval")
        except (UsageError, RuntimeError) as error:  # whatever torch cannot export or differentiate still trains
            reason = first_line(error)
            alarm = Alarm(self.steps, "untracked", "laws", f"no laws were found, and no balance is tracked: {reason}")
            self._watch.alarms.append(alarm)
            self._log(alarm)
            return Laws(())

    # Keeping ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on as if it had not ended: tensors, numbers and words.

        Its ``account`` has Q(x₀) and Σα²Q(ĝ) of each law, against which an audit checks the checkpoint that it is saved
        with: ``torch.save({"model": model.state_dict(), "tracker": tracker.state_dict()}, path)``.
        """
        return {
            "version": VERSION,
            "steps": self.steps,
            "history": {name: list(column) for name, column in self.history.items()},
            "travelled": self._travelled.sums,
            "loss": None if self._loss is None else float(self._loss),
            "loss_comes_first": self._loss_comes_first,
            "watch": self._watch.state_dict(),
            "follower": self._follower and self._follower.state_dict(),
            "parameter_norm": float(ops.norm(self._tensors())),
            "names": list(self._parameters),
            "account": self._loaded if self._account is None else self._account.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: of the same laws, which are found anew, at the parameters that belong to it.

        Raises:
            UsageError: the state is of another version, or, at the next step at the latest, of other laws.
        """
        if state.get("version") != VERSION:
            raise UsageError(f"the state has version {state.get('version')!r}, and this is {VERSION}")
        self.steps, self._loss = state["steps"], state["loss"]
        self._travelled, self._pending = Travelled(state["travelled"]), []
        self._loss_comes_first = state["loss_comes_first"]
        self._history.clear()
        self._history.update({name: list(column) for name, column in state["history"].items()})
        self._watch.load_state_dict(state["watch"])
        if self._follower and state["follower"]:
            self._follower.load_state_dict(state["follower"])
        self._loaded = state["account"]
        self._setting = None  # whether steps are plain is seen anew
        if self._account is not None and self._loaded:
            self._account.load_state_dict(self._loaded)

    def save(self, path: str | Path) -> None:
        """Write the history to a file that ends in ``.csv`` or ``.jsonl`` (:mod:`torchflat.optim.history`)."""
        history.save(self.history, path)

    def figure(self) -> Figure:
        """Draw loss and norms, the drift of each law, and λ₁ against the edge of stability."""
        from torchflat.optim.tracking_figure import tracking  # needs matplotlib

        return tracking(self.history)

    def plot(self, path: str | Path) -> None:
        """Write the figure to a file, in the format of its suffix."""
        self.figure().savefig(path, dpi=192)

    def tensorboard(self, target: Any) -> None:
        """Write the rows that were not yet written to a SummaryWriter, or to one that is made for a folder.

        Raises:
            UsageError: TensorBoard is not installed, and ``target`` is a folder.
        """
        self.flush()
        history.tensorboard(self.since(self._written), target)
        self._written = self.rows
