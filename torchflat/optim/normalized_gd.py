"""Normalised gradient descent with slowly decaying steps: x ← x − α_k ∇f/|∇f|."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from torchflat import ops
from torchflat.optim import sharded

__all__ = ["NormalizedGD"]

Norm = Literal["global", "group", "tensor"]
NORMS = ("global", "group", "tensor")
HALVES = (torch.float16, torch.bfloat16)
NONFINITE = "the norm of the gradient is not finite"
# torch.optim renamed it after 2.10.
_check_capture = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)


class NormalizedGD(Optimizer):
    """Step by a given length against the gradient: x ← x − α_k ∇f/|∇f|, with α_k = lr·(k + 1)^(−decay).

    The steps of gradient descent shrink with the gradient, so it stops at the first minimum that it meets. A step of
    given length goes on: it swings across the valley, and the swing pushes it along the valley to where it is flat.
    If near the flat minima some quantity falls by at least ω·α_k^p in each step (a p-d-Lyapunov function, T036), then
    they are reached if α_k → 0 and Σα_k^p diverges, which is to say 0 < decay ≤ 1/p. In most valleys p is 2 and decay
    may be up to ½; in valleys of fourth order p is 4, and it may be up to ¼. The default ¼ is right for both, and its
    steps stay above the noise for longer. The loss ends at the height of a swing of length α_k; let the last steps
    fall to 0 with ``decay=0`` and :class:`PowerDecayLR` to take that away.

    One gradient and no closure: accumulation, GradScaler, DDP, schedulers and resuming work as they do with SGD;
    clipping the norm of the gradient changes nothing, unless there is momentum. Only ``lr`` has another meaning: it is
    the length of the first step. To start with the steps that SGD takes at a rate η, use lr ≈ η·|∇f|.

    The norms of DTensors, such as the parameters of FSDP2 (``fully_shard``), are taken over all processes. With DDP
    each process has the same gradient, and so the same step, if the last backward pass before it is outside of
    ``no_sync``.

    Where all groups have the same α_k, a step changes a conserved quantity Q(x) = xᵀAx of the gradient flow by exactly
    α_k²·Q(∇f/|∇f|), and a linear one not at all (T037); :class:`Tracker` keeps account of it.

    Args:
        params: tensors, dicts that define groups, or pairs (name, tensor).
        lr: length of the first step, a float or a tensor with one element.
        decay: exponent of the decay; 0 for steps of constant length.
        norm: what the gradient is divided by. ``"global"``: its norm over all groups with this setting, which keeps
            every law. Unlike in other optimizers, two groups are then not the same as two optimizers. ``"group"``: the
            norm over its group; laws between parameters of different groups are broken. ``"tensor"``: the norm of each
            tensor; the only laws left are those within one tensor, so that those of rescaling two layers are broken.
        momentum: factor of the past in the running sum of gradients that is normalised in place of the gradient. It
            breaks the quadratic laws.
        weight_decay: decoupled, x ← (1 − α_k·weight_decay)·x before the step. It breaks the laws.
        maximize: step along the gradient instead of against it.
        error_if_nonfinite: raise if the norm of the gradient is not finite. Otherwise such a step moves nothing, does
            not advance k, and warns once.
        foreach: work on lists of tensors at once; default: where ``fused`` does not.
        fused: use the compiled kernels, two sweeps without temporaries; default: if they are built for the device.
        capturable: never read back from the device, for CUDA graphs. Steps with a norm that is not finite still move
            nothing, but neither warn nor raise; nor do compiled steps.
        differentiable: let autograd record the step.

    Raises:
        ValueError: an argument is out of range, or FSDP1 has flattened a parameter.
        RuntimeError: ``fused`` together with ``foreach`` or ``differentiable``.

    Source: T036–T055.

    >>> x = torch.tensor([2.0, 0.7], requires_grad=True)
    >>> optimizer = NormalizedGD([x], lr=0.3)
    >>> before = x.detach()[0] ** 2 - x.detach()[1] ** 2
    >>> ((x[0] * x[1] - 1) ** 2).backward()
    >>> optimizer.step()
    >>> after = x.detach()[0] ** 2 - x.detach()[1] ** 2
    >>> round(float(after / before), 5)
    0.97996
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        decay: float = 0.25,
        norm: Norm = "global",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not decay >= 0.0:
            raise ValueError(f"Invalid decay value: {decay}")
        if norm not in NORMS:
            raise ValueError(f"Invalid norm value: {norm!r}, it must be one of {', '.join(map(repr, NORMS))}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr,
            "decay": decay,
            "norm": norm,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "error_if_nonfinite": error_if_nonfinite,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if self.state:
            self._share_clock()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it shares the count of steps of the others.

        Raises:
            ValueError: FSDP1 has flattened a parameter, so that this process has a part of it of unknown norm; or two
                parameters are the same memory, so that their gradients are only parts of its gradient.
        """
        super().add_param_group(param_group)
        if _same_memory(p for group in self.param_groups for p in group["params"]):
            self.param_groups.pop()
            raise ValueError(
                "two parameters share their memory, so that neither has the gradient of it: tie weights by assigning "
                "the parameter, as in `decoder.weight = encoder.weight`, and not its `.data`"
            )
        if any(getattr(p, "_fsdp_flattened", False) for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(
                "NormalizedGD cannot tell the norm of parameters that FullyShardedDataParallel has flattened: shard "
                "the model with torch.distributed.fsdp.fully_shard instead"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as other optimizers do; each parameter has its own copy of the count of steps."""
        state: dict[str, Any] = super().state_dict()
        for index, kept in state["state"].items():
            if isinstance(kept, dict) and "step" in kept:
                state["state"][index] = {**kept, "step": self._clock.clone()}
        return state

    @property
    def _clock(self) -> Tensor:
        """The count of steps, k."""
        clock: Tensor = self.state[self._first]["step"]
        return clock

    @property
    def _first(self) -> Tensor:
        first: Tensor = next(p for group in self.param_groups for p in group["params"])  # a group may have none
        return first

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return what ``closure`` returns, if one is given to evaluate the model anew.

        Raises:
            RuntimeError: a gradient is sparse, or its norm is not finite and ``error_if_nonfinite`` is set, or
                ``fused`` is and there are no kernels for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._move_plainly():
            return loss
        lots: list[_Share] = []
        clocks: list[Tensor] = []
        for index, group in enumerate(self.param_groups):
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers, clocks)
            if params:
                pool = "global" if group["norm"] == "global" else index
                lots.append(_Share(group, pool, _fused(group, params[0].device), None, params, grads, buffers))
        if any(lot.group["capturable"] or lot.params[0].device.type != "cpu" for lot in lots):
            _check_capture(self)
        if lots and not self._move_at_once(lots, clocks[-1]):
            self._move([share for lot in lots for share in lot.sorted()], clocks[-1])
        return loss

    # torch.compile runs a method of this name while it traces, with empty lists to fill.
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
        clocks: list[Tensor],
    ) -> None:
        """Collect what has a gradient, and the one count of steps, which the states of all parameters share."""
        for p in group["params"]:
            grad = p.grad  # once: each time makes a new object
            if grad is not None:
                if grad.is_sparse:
                    raise RuntimeError("NormalizedGD does not support sparse gradients")
                params.append(p)
                grads.append(grad)
        if not params:
            return
        if "step" not in self.state[params[0]] or "step" not in self.state[self._first]:
            self._share_clock()
        clocks.append(self._clock)
        if group["momentum"]:
            for p in params:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                buffers.append(state["momentum_buffer"])

    def _share_clock(self) -> None:
        """Let the states of all parameters hold one and the same count of steps: the largest that there was, or 0."""
        states = [state for state in self.state.values() if isinstance(state, dict)]  # hooks may add other things
        k = max((float(state["step"]) for state in states if "step" in state), default=0.0)
        device = self._first.device if self.param_groups[0]["capturable"] else "cpu"
        clock = torch.full((), k, dtype=torch.float32, device=device)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = clock

    def _move_plainly(self) -> bool:
        """Take the step without a look at each tensor, if there is no need for one; return whether it is taken."""
        group = self.param_groups[0]
        lot = _Share(group, "global", True, None, group["params"], [], [])
        if len(self.param_groups) > 1 or group["momentum"] or isinstance(group["lr"], Tensor) or not _reads_back([lot]):
            return False
        first = next(iter(group["params"]), None)
        if first is None or "step" not in self.state.get(first, ()):
            return False
        if group["norm"] == "tensor" or not _fused(group, first.device):
            return False
        alpha, beta = lot.factors(self._clock.item())
        norm = ops.normalized_step_(group["params"], alpha, beta)
        if norm is None:
            return False
        if math.isfinite(norm):
            self._clock.add_(1)
        else:
            self._refuse([lot])
        return True

    def _move_at_once(self, lots: Sequence[_Share], clock: Tensor) -> bool:
        """Take the step by one call of a kernel, if that is all there is to it; return whether it is."""
        if len(lots) > 1 or not lots[0].is_plain:
            return False
        reads_back = _reads_back(lots)
        try:
            norm = lots[0].move_at_once(clock.item() if reads_back else clock.to(_wide(clock.device)))
        except RuntimeError:  # tensors to be sorted: the kernel looks at each, and refuses before it changes any
            return False
        if reads_back and not math.isfinite(norm.item()):
            self._refuse(lots)
        else:
            clock += 1 if reads_back else norm.isfinite().to(clock.device)
        return True

    def _move(self, shares: Sequence[_Share], clock: Tensor) -> None:
        """Take the step and advance k; or, if the norm of the gradient is not finite, do neither."""
        reads_back = _reads_back(shares)
        k = clock.item() if reads_back else clock.to(_wide(clock.device))
        directions = [share.grads for share in shares]
        norms = [share.norms(share.grads) for share in shares]
        finite = _total(norms).isfinite()
        if reads_back and not finite:
            self._refuse(shares)
            return
        gates = [None if reads_back else finite.to(norm.device) for norm in norms]
        pools: dict[str | int, list[Tensor]] = {}
        for index, (share, gate) in enumerate(zip(shares, gates, strict=True)):
            if share.buffers:
                directions[index] = share.accumulate(gate)
                norms[index] = share.norms(directions[index])
            pools.setdefault(share.pool, []).append(norms[index])
        totals = {pool: _total(pooled) for pool, pooled in pools.items()}
        for share, toward, norm, gate in zip(shares, directions, norms, gates, strict=True):
            by = norm if share.group["norm"] == "tensor" else totals[share.pool].to(norm.device)
            share.move(toward, share.length(k), by, gate)
        clock += 1 if reads_back else finite.to(clock.device)

    def _refuse(self, shares: Sequence[_Share]) -> None:
        """Raise, where a group asks for it, or warn once, that the gradient gives no direction."""
        if any(share.group["error_if_nonfinite"] for share in shares):
            raise RuntimeError(
                f"{NONFINITE}, so it has no direction. Find the loss that overflowed, or leave such steps out with "
                "`error_if_nonfinite=False`"
            )
        if not self.__dict__.get("_warned", False):
            self._warned = True
            text = f"NormalizedGD: {NONFINITE}: such steps move nothing and do not count. Said once"
            warnings.warn(text, stacklevel=_depth_of_caller())


@dataclass(frozen=True)
class _Share:
    """What one group has; :meth:`sorted` on one device, as real tensors, and ``whole`` the DTensors they are parts of.

    Shares of the same ``pool`` are divided by the norm of all of them.
    """

    group: dict[str, Any]
    pool: str | int
    fused: bool
    whole: list[Tensor] | None
    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]

    @property
    def is_plain(self) -> bool:
        """Whether one call of a kernel does the whole step, if there are no other shares and nothing to sort."""
        usual = self.fused and not self.buffers and self.group["norm"] != "tensor"
        return usual and not sharded.is_sharded(self.params)

    def sorted(self) -> list[_Share]:
        """Return a share for each device, with real tensors, and with local parts for DTensors."""
        lists, whole = [self.params, self.grads, self.buffers], None
        if sharded.is_sharded(self.params):
            whole = self.params
            lists = [sharded.local(tensors, whole) if tensors else [] for tensors in lists]
        if any(dtype.is_complex for dtype in {p.dtype for p in self.params}):
            lists[1] = [grad.resolve_conj() for grad in lists[1]]
            lists = [[torch.view_as_real(each) if each.is_complex() else each for each in tensors] for tensors in lists]
        devices = {each.device for each in lists[0]}
        if len(devices) == 1:
            return [_Share(self.group, self.pool, self.fused, whole, *lists)]
        shares = []
        for device in sorted(devices, key=str):
            here = [index for index, each in enumerate(lists[0]) if each.device == device]
            parts = [[tensors[index] for index in here] if tensors else [] for tensors in lists]
            whole_here = whole and [whole[index] for index in here]
            shares.append(_Share(self.group, self.pool, _fused(self.group, device), whole_here, *parts))
        return shares

    def length(self, k: float | Tensor) -> float | Tensor:
        """Return α_k, a 0-dim tensor if ``lr`` or ``k`` is one."""
        lr: float | Tensor = self.group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(_wide(lr.device)).reshape(())
        length: float | Tensor = lr * (k + 1) ** -self.group["decay"]
        return length

    def factors(self, k: Any) -> tuple[Any, Any]:
        """Return what multiplies the normalized gradient, and what the parameters: numbers if ``k`` is one."""
        length = self.length(k)
        return length if self.group["maximize"] else -length, 1 - length * self.group["weight_decay"]

    def move_at_once(self, k: float | Tensor) -> Tensor:
        """Take the step, if the norm of the gradient, which is returned, is finite."""
        alpha, beta = self.factors(k)
        device = self.params[0].device
        return ops.normalized_axpby_(self.params, self.grads, _factor(alpha, device), _factor(beta, device))

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the norm of each tensor, of the whole one where it is a part: (k,) float64."""
        wide = _wide(tensors[0].device)
        own = ops.norms(tensors) if self.fused else torch.stack(torch._foreach_norm(tensors, 2, wide))
        return own if self.whole is None else sharded.whole_norms(own, self.whole)

    def accumulate(self, finite: Tensor | None) -> list[Tensor]:
        """Add the gradients to the sums of the past and return these; with ``finite``, add only if it is true."""
        momentum = self.group["momentum"]
        if finite is not None:
            for buffer, grad in zip(self.buffers, self.grads, strict=True):
                buffer.copy_(torch.where(finite, momentum * buffer + grad, buffer))
        else:
            torch._foreach_mul_(self.buffers, momentum)
            torch._foreach_add_(self.buffers, self.grads)
        if self.group["differentiable"]:  # autograd keeps what the next step overwrites
            return [buffer.clone() for buffer in self.buffers]
        return self.buffers

    def move(self, directions: list[Tensor], length: float | Tensor, by: Tensor, finite: Tensor | None) -> None:
        """Move by ``length`` along what is divided by ``by``; nowhere if that is 0 or ``finite`` is not true."""
        # A number is put on the CPU, and not on what may be the default device.
        length = torch.as_tensor(length, dtype=by.dtype, device=length.device if isinstance(length, Tensor) else "cpu")
        if length.device.type != "cpu":  # those of the CPU go to any device, unasked
            length = length.to(by.device)
        goes = by > 0 if finite is None else (by > 0) & finite
        alpha = torch.where(goes, length / torch.where(goes, by, 1.0), 0.0)
        alpha = alpha if self.group["maximize"] else -alpha
        beta = None
        if self.group["weight_decay"]:
            beta = 1 - length * self.group["weight_decay"]
            beta = beta if finite is None else torch.where(finite, beta, 1.0)
        if self.fused:
            step = _fused_normalizedgd
        elif self.group["differentiable"] or self.group["foreach"] is False:
            step = _single_tensor_normalizedgd
        else:
            step = _multi_tensor_normalizedgd
        if finite is not None and not self.fused:  # 0 times infinity would be NaN
            directions = [torch.where(finite, direction, 0.0) for direction in directions]
        if not self.fused:
            # A length over the norm of tiny gradients may exceed what float16, or even float32, can hold.
            directions = [each.float() if each.dtype in HALVES else each for each in directions]
            largest = min(torch.finfo(each.dtype).max for each in directions)
            alpha = alpha.clamp(-largest, largest)
        step(self.params, directions, alpha, beta)


def _same_memory(params: Iterable[Tensor]) -> bool:
    """Whether two of the parameters are the same memory, as far as plain tensors show theirs."""
    plain = {
        id(p): (p.device, p.data_ptr())
        for p in params
        if type(p) in (Tensor, nn.Parameter) and p.layout is torch.strided and p.device.type != "meta" and p.numel()
    }
    return len(set(plain.values())) < len(plain)


def _depth_of_caller() -> int:
    """Return the ``stacklevel`` of the line that called the optimizer, whatever hooks or schedulers wrap it."""
    depth, frame = 0, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "torchflat"):
        depth, frame = depth + 1, frame.f_back
    return depth


def _reads_back(shares: Sequence[_Share]) -> bool:
    """Whether numbers may come back from the device, so that Python knows them."""
    return not (torch.compiler.is_compiling() or any(share.group["capturable"] for share in shares))


def _fused(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the compiled kernels do the step."""
    if group["fused"]:
        if not (torch.compiler.is_compiling() or _has_kernels(device.type)):  # which cannot be traced
            raise RuntimeError(f"`fused=True` needs compiled kernels for {device.type}: see `torchflat doctor`")
        return True
    free = group["fused"] is None and group["foreach"] is None and not group["differentiable"]
    return free and not torch.compiler.is_compiling() and _has_kernels(device.type)


@functools.cache  # a question to the dispatcher for each kernel, which would take a tenth of a step
def _has_kernels(device_type: str) -> bool:
    return ops.backend(device_type) == "native"


def _wide(device: torch.device) -> torch.dtype:
    """Return the dtype of norms and lengths on a device: the widest that it has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _total(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of everything whose norms are given, a 0-dim tensor."""
    first, *others = norms
    total: Tensor = torch.linalg.vector_norm(torch.cat([first, *(each.to(first.device) for each in others)]))
    return total


# x ← beta·x + alpha·d for each tensor x and its direction d: alpha is 0-dim or one for each, (k,); beta None means 1.


def _single_tensor_normalizedgd(
    params: list[Tensor], directions: list[Tensor], alpha: Tensor, beta: Tensor | None
) -> None:
    for p, direction, factor in zip(params, directions, alpha.expand(len(params)), strict=True):
        if beta is not None:
            p.mul_(beta)
        p.add_(factor * direction)


def _multi_tensor_normalizedgd(
    params: list[Tensor], directions: list[Tensor], alpha: Tensor, beta: Tensor | None
) -> None:
    if beta is not None:
        torch._foreach_mul_(params, beta)
    factors = alpha if alpha.dim() == 0 else list(alpha)
    torch._foreach_add_(params, torch._foreach_mul(directions, factors))


def _fused_normalizedgd(params: list[Tensor], directions: list[Tensor], alpha: Tensor, beta: Tensor | None) -> None:
    ops.axpby_(params, directions, alpha.reshape(-1), _factor(1.0 if beta is None else beta, alpha.device))


def _factor(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(1)
    return torch.tensor([value], dtype=torch.float64, device=device)
