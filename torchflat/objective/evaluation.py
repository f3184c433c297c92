"""The loss of one batch as a function of the audited parameters, whatever form the user's pieces have."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchflat.errors import DataError, LossError, NonFiniteError, TorchflatError, UsageError
from torchflat.objective.batches import describe, map_tensors, row_count
from torchflat.objective.state import random_states_kept, training_flags

__all__ = ["FunctionTerm", "ModelTerm", "Term", "non_finite"]

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class Term(Protocol):
    """One summand of f: ``(parameters, batch) -> (sum of the loss over the batch, its weight)``."""

    dtype: torch.dtype
    device: torch.device
    notes: list[str]

    def session(self) -> contextlib.AbstractContextManager[None]:
        """The block inside which the term may be evaluated; leaves nothing changed behind."""

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]: ...

    def converted(self, dtype: torch.dtype) -> Term:
        """The same term in another precision."""

    def without_fused_attention(self) -> bool:
        """Switch to attention that can be differentiated twice; False if that was done before."""


class FunctionTerm:
    """f given as a function of the flat vector; there is no data."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.function, self.dtype, self.device = function, dtype, device
        self.notes: list[str] = []

    def session(self) -> contextlib.AbstractContextManager[None]:
        return random_states_kept()

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]:
        return _scalar(self.function(parameters[0]), "the function"), 1.0

    def converted(self, dtype: torch.dtype) -> FunctionTerm:
        return FunctionTerm(self.function, dtype, self.device)

    def without_fused_attention(self) -> bool:
        return False


class ModelTerm:
    """f given as a model with ``loss(output, target)`` (a mean over rows) or ``batch_loss(model, batch)`` (sum, weight).

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
        self.call = _Call(_unwrapped(model), loss, batch_loss)
        self.names = [f"model.{name}" for name in names]
        self.mode, self.dtype, self.device = mode, dtype, device
        self.notes: list[str] = []
        self._fused_attention = True
        self._check_mode()
        self._rest = self._frozen_tensors()

    def _check_mode(self) -> None:
        if self.mode not in ("eval", "train"):
            raise UsageError(f"mode must be 'eval' or 'train', not {self.mode!r}")
        if self.mode == "eval":
            return
        for name, module in self.call.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise UsageError(
                    f"mode='train' is refused: {name} ({type(module).__name__}) mixes the rows of a batch and changes "
                    "its statistics on every pass; use mode='eval'"
                )

    def _frozen_tensors(self) -> dict[str, Tensor]:
        chosen = set(self.names)
        rest = {name: p.detach() for name, p in self.call.named_parameters() if name not in chosen}
        rest |= {name: buffer.detach().clone() for name, buffer in self.call.named_buffers()}
        return {name: self._moved(tensor) for name, tensor in rest.items()}

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        attention = contextlib.nullcontext() if self._fused_attention else sdpa_kernel(SDPBackend.MATH)
        with random_states_kept(), training_flags(self.call.model, self.mode == "train"), attention:
            yield

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, float]:
        batch = map_tensors(self._moved, batch)
        tensors = dict(zip(self.names, parameters, strict=True)) | self._rest
        try:
            total, weight = torch.func.functional_call(self.call, tensors, (batch,), tie_weights=True)
        except (TorchflatError, torch.OutOfMemoryError, NotImplementedError):
            raise
        except Exception as error:
            raise DataError(
                f"evaluating the loss failed with {type(error).__name__}: {_first_line(error)} (batch: {describe(batch)})"
            ) from error
        if not math.isfinite(weight) or weight < 0:
            raise LossError(f"batch_loss returned the weight {weight}: it must be a finite number >= 0")
        return total, weight

    def converted(self, dtype: torch.dtype) -> ModelTerm:
        names = [name.removeprefix("model.") for name in self.names]
        call = self.call
        term = ModelTerm(call.model, call.loss, call.batch_loss, names, self.mode, dtype, self.device)
        term._fused_attention = self._fused_attention
        return term

    def without_fused_attention(self) -> bool:
        if not self._fused_attention:
            return False
        self._fused_attention = False
        self.notes.append("fused attention cannot be differentiated twice: its plain form was used")
        return True


class _Call(nn.Module):
    """Makes one module of model and loss, so that parameters can be exchanged for both forms of the loss alike."""

    def __init__(self, model: nn.Module, loss: Any, batch_loss: Any) -> None:
        super().__init__()
        self.model = model
        # A loss that is a module is registered too, so that its class weights follow dtype and device.
        self.loss, self.batch_loss = loss, batch_loss

    def forward(self, batch: Any) -> tuple[Tensor, float]:
        if self.batch_loss is not None:
            return _sum_and_weight(self.batch_loss(self.model, batch))
        inputs, keywords, target = _inputs_and_target(batch)
        output = self.model(*inputs, **keywords)
        if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
            output = output.logits
        rows = row_count(target) or row_count(batch)
        if rows is None:
            raise DataError(f"the rows of a batch cannot be counted ({describe(batch)}): use batch_loss(model, batch)")
        return _scalar(self.loss(output, target), "the loss") * rows, float(rows)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel, which cannot be differentiated twice."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _inputs_and_target(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any], Any]:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0]


def non_finite(where: str, tensors: Mapping[str, Tensor]) -> NonFiniteError:
    """Name the tensors that hold NaN or infinity."""
    bad = [
        f"{name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} entries)"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    return NonFiniteError(f"{where}: {', '.join(bad[:5]) or 'the value overflows or is undefined'} not finite")
