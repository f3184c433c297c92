"""The loss of one batch as a function of the audited parameters, whatever form the user's pieces have."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torchflat.errors import DataError, LossError, TorchflatError, UsageError
from torchflat.objective.batches import describe, map_tensors, row_count
from torchflat.objective.state import modules_kept, plain_autograd, random_states_kept

__all__ = ["FunctionTerm", "ModelTerm", "Term", "first_line", "inputs_and_target", "note", "out_of_memory", "unwrapped"]

# What makes loss sum and weight of (output -> loss sum and weight, output).
OutputModel = Callable[[Callable[[Any], tuple[Tensor, float]], Any], tuple[Tensor, float]]
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class Term(Protocol):
    """One summand of f: ``(parameters, batch) -> (sum of the loss over the batch, its weight)``.

    ``constants`` are the tensors besides the parameters that live as long as the term, ``notes`` what an answer must
    say about it, and ``verified`` tells whether its second derivative has been checked.
    """

    dtype: torch.dtype
    device: torch.device
    notes: list[str]
    constants: Mapping[str, Tensor]
    verified: bool

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Those of the model, by name, which stay as they are."""

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Make it ready to be evaluated inside the block; nothing stays changed behind it."""

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]:
        """Evaluate."""

    def converted(self, dtype: torch.dtype) -> Term:
        """Make the same term in another precision."""

    def without_fused_kernels(self) -> bool:
        """Switch to kernels that can be differentiated twice; False if that was done before."""


def note(term: Term, text: str) -> None:
    """Add to what an answer must say about the term, once."""
    if text not in term.notes:
        term.notes.append(text)


class FunctionTerm:
    """f given as a function of the flat vector; there is no data."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.function, self.dtype, self.device = function, dtype, device
        self.notes: list[str] = []
        self.constants: Mapping[str, Tensor] = {}
        self.buffers: Mapping[str, Tensor] = {}
        self.verified = True
        self._fused = True

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """See :class:`Term`."""
        with random_states_kept(), plain_autograd(self.device), _plain_kernels(not self._fused):
            yield

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]:
        """See :class:`Term`."""
        return _scalar(self.function(parameters[0]), "the function"), 1.0

    def converted(self, dtype: torch.dtype) -> FunctionTerm:
        """See :class:`Term`."""
        other = copy.copy(self)
        other.dtype, other.notes = dtype, []
        return other

    def without_fused_kernels(self) -> bool:
        """See :class:`Term`."""
        return _switch_fused_off(self)


class ModelTerm:
    """f given as a model with ``loss(output, target)``, a mean over rows, or ``batch_loss(model, batch)``.

    The module itself is never modified: it is called with the audited parameters in place of its own, with detached
    frozen parameters, and with copies of its buffers, all in ``dtype`` on ``device``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        batch_loss: Callable[[nn.Module, Any], tuple[Tensor, float]] | None,
        names: Sequence[str],
        mode: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if (loss is None) == (batch_loss is None):
            raise UsageError("give either loss(output, target) or batch_loss(model, batch), and not both")
        if isinstance(model, torch.jit.ScriptModule):
            raise UsageError(
                "the model is a ScriptModule, whose parameters are out of reach: pass the nn.Module itself"
            )
        self.call = _Call(model, loss, batch_loss)
        self.names = [f"model.{name}" for name in names]
        self.mode, self.dtype, self.device = mode, dtype, device
        self.notes: list[str] = []
        self.verified = False
        self._fused = True
        self._check_mode()
        chosen = set(self.names)
        frozen = {name: p.detach() for name, p in self.call.named_parameters() if name not in chosen}
        buffers = {name: buffer.detach().clone() for name, buffer in self.call.named_buffers()}
        self.constants: Mapping[str, Tensor] = {name: self._moved(tensor) for name, tensor in frozen.items()}
        self._buffers = {name: self._moved(tensor) for name, tensor in buffers.items()}

    def _check_mode(self) -> None:
        if self.mode not in ("eval", "train"):
            raise UsageError(f"mode must be 'eval' or 'train', not {self.mode!r}")
        if self.mode == "eval":
            return
        for name, module in self.call.model.named_modules():
            tracking = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            if tracking or isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UsageError(
                    f"mode='train' is refused: {name} ({type(module).__name__}) mixes the rows of a batch or changes "
                    "its statistics on every pass; use mode='eval'"
                )

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """See :class:`Term`."""
        mine = "model."
        return {name.removeprefix(mine): buffer for name, buffer in self._buffers.items() if name.startswith(mine)}

    def _moved(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """See :class:`Term`."""
        with (
            random_states_kept(),
            modules_kept(self.call, self.mode == "train"),
            plain_autograd(self.device),
            _plain_kernels(not self._fused),
        ):
            yield

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]:
        """See :class:`Term`."""
        total, weight = self._called(parameters, batch, self.call.sum_and_weight)
        if not math.isfinite(weight) or weight < 0:
            raise LossError(f"batch_loss returned the weight {weight}: it must be a finite number >= 0")
        return total, weight

    def output(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Any, Any]:
        """Return what the model gives for a batch, and the batch's target. Only with ``loss(output, target)``."""
        output, target = self._called(parameters, batch, self.call.output_and_target)
        return output, target

    def quadratic(self, parameters: Sequence[Tensor], batch: Any, model: OutputModel) -> tuple[Tensor, float]:
        """Return ``model(ℓ, output)``, where ℓ gives loss sum and weight of the batch for another output."""
        total, weight = self._called(parameters, batch, lambda rows: self.call.of_output(rows, model))
        return total, weight

    def _called(self, parameters: Sequence[Tensor], batch: Any, what: Callable[[Any], tuple[Any, Any]]) -> Any:
        batch = map_tensors(self._moved, batch)
        # Buffers are copied for every call: a forward that counts or averages in them starts from the same ones.
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        tensors = {**self.constants, **buffers, **dict(zip(self.names, parameters, strict=True))}
        try:
            return torch.func.functional_call(self.call, tensors, (what, batch), tie_weights=True)
        except TorchflatError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            failure = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"evaluating the loss failed with {failure} (batch: {describe(batch)})") from error

    def converted(self, dtype: torch.dtype) -> ModelTerm:
        """See :class:`Term`."""
        other = copy.copy(self)
        other.dtype, other.notes, other.verified = dtype, [], True
        other.constants = {name: other._moved(tensor) for name, tensor in self.constants.items()}
        other._buffers = {name: other._moved(tensor) for name, tensor in self._buffers.items()}
        return other

    def without_fused_kernels(self) -> bool:
        """See :class:`Term`."""
        return _switch_fused_off(self)


def _switch_fused_off(term: FunctionTerm | ModelTerm) -> bool:
    if not term._fused:
        return False
    term._fused = False
    term.notes.append(
        "a fused kernel (attention, cuDNN, weight norm) has no second derivative: its plain form was used"
    )
    return True


@contextlib.contextmanager
def _plain_kernels(wanted: bool) -> Iterator[None]:
    """Attention, RNNs and weight normalisation in their plain forms: the fused ones lack a double backward."""
    with contextlib.ExitStack() as stack:
        if wanted:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(_PlainWeightNorm())
        yield


class _PlainWeightNorm(TorchFunctionMode):
    """w = g·v/|v| in plain operations: the double backward of the fused kernel takes |v| for a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


class _Call(nn.Module):
    """Makes one module of model and loss, so that parameters can be exchanged for both forms of the loss alike."""

    def __init__(self, model: nn.Module, loss: Any, batch_loss: Any) -> None:
        super().__init__()
        self.model = model
        # A loss that is a module is registered too, so that its class weights follow dtype and device.
        self.loss, self.batch_loss = loss, batch_loss

    def forward(self, what: Callable[[Any], tuple[Any, Any]], batch: Any) -> tuple[Any, Any]:
        # Only what is called through the module sees the exchanged parameters.
        return what(batch)

    def output_and_target(self, batch: Any) -> tuple[Any, Any]:
        inputs, keywords, target = inputs_and_target(batch)
        output = self.model(*inputs, **keywords)
        if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
            output = output.logits
        return output, target

    def sum_and_weight(self, batch: Any) -> tuple[Tensor, float]:
        if self.batch_loss is not None:
            return _sum_and_weight(self.batch_loss(self.model, batch))
        return self.of_output(batch, lambda loss, output: loss(output))

    def of_output(self, batch: Any, model: OutputModel) -> tuple[Tensor, float]:
        output, target = self.output_and_target(batch)
        rows = row_count(target) or row_count(batch)
        if rows is None:
            raise DataError(f"the rows of a batch cannot be counted ({describe(batch)}): use batch_loss(model, batch)")
        _refuse_ignored(self.loss, target)
        return model(lambda given: (_scalar(self.loss(given, target), "the loss") * rows, float(rows)), output)


def unwrapped(model: nn.Module) -> nn.Module:
    """Take the module out of torch.compile and DistributedDataParallel, which have no second derivative."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def inputs_and_target(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any], Any]:
    """Take a batch apart: positional inputs of the model, its keyword inputs, and the target of the loss.

    Raises:
        DataError: it is neither a pair nor a dict with a target.
    """
    if isinstance(batch, Mapping):
        keys = [key for key in TARGET_KEYS if key in batch]
        if not keys:
            raise DataError(
                f"the batch is a dict with keys {list(batch)} and none of {list(TARGET_KEYS)}: "
                "rename the target, or use batch_loss(model, batch)"
            )
        return (), {key: item for key, item in batch.items() if key != keys[0]}, batch[keys[0]]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    kind = f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise DataError(f"a batch must be (input, target) or a dict, not a {kind}: use batch_loss(model, batch)")


def _refuse_ignored(loss: Any, target: Any) -> None:
    default = -100 if loss is F.cross_entropy or loss is F.nll_loss else None
    index = getattr(loss, "ignore_index", default)
    if index is None or not isinstance(target, Tensor) or target.is_floating_point():
        return
    ignored = int((target == index).sum())
    if ignored:
        raise LossError(
            f"{ignored} of {target.numel()} targets of a batch are {index}, which the loss leaves out of its mean: "
            "pass batch_loss(model, batch) -> (sum, number of targets that count) instead"
        )


def _sum_and_weight(answer: Any) -> tuple[Tensor, float]:
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise LossError(
            f"batch_loss must return (sum over the batch, weight); it returned a {type(answer).__name__}: "
            "return (loss.sum(), number_of_rows_or_tokens)"
        )
    return _scalar(answer[0], "batch_loss"), float(answer[1])


def _scalar(loss: Any, what: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(f"{what} returned a {type(loss).__name__}, not a tensor: return the loss without .item()")
    if loss.numel() != 1:
        raise LossError(
            f"{what} returned a tensor of shape {tuple(loss.shape)}, not a scalar: use reduction='mean', "
            "or batch_loss(model, batch) that returns (sum, weight)"
        )
    if loss.is_complex():
        raise LossError(f"{what} returned a complex number: return a real scalar")
    return loss.reshape(())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or ["(no message)"])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, which is no fault of the data or the model."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
