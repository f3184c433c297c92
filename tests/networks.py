"""Small real networks with data and a loss, each with its dense Hessian by a path of its own.

``network(name)`` makes one in float32. The reference evaluates the loss of all rows at once in float64 and takes its
Hessian by ``torch.func`` or, where that does not get there, by differences of the gradient.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchflat import Objective

__all__ = ["NETWORKS", "Network", "network"]


@dataclasses.dataclass
class Network:
    """One case. ``names`` are the parameters that make up x, in order; ``total`` is f without its L2 term.

    ``by_differences`` is the relative accuracy of the dense Hessian where it comes from differences, and 0 otherwise.
    """

    model: nn.Module
    data: Any
    total: Callable[[nn.Module, Callable[[Any], Any]], Tensor]
    loss: Callable[[Any, Any], Tensor] | None = None
    batch_loss: Callable[[nn.Module, Any], Any] | None = None
    names: list[str] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_differences: float = 0.0

    def __post_init__(self) -> None:
        self.model.eval()
        if self.names is None:
            self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]

    def objective(self, **options: Any) -> Objective:
        """The objective that the tests put to the proof."""
        arguments = {"batch_loss": self.batch_loss, **self.options, **options}
        return Objective(self.model, self.loss, arguments.pop("data", self.data), **arguments)

    def reference(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """f as a function of x, and x, in float64."""
        model = copy.deepcopy(self.model).double().requires_grad_(False)
        own = dict(model.named_parameters())
        shapes = {name: own[name].shape for name in self.names or ()}
        whole = _Whole(model, self.total)
        decay = self.options.get("weight_decay", 0.0)

        def f(x: Tensor) -> Tensor:
            parts = torch.split(x, [shape.numel() for shape in shapes.values()])
            tensors = {f"model.{k}": p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
            tensors |= {name: buffer.clone() for name, buffer in whole.named_buffers()}
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.functional_call(whole, tensors, ()) + 0.5 * decay * (x * x).sum()

        return f, torch.cat([own[name].detach().reshape(-1) for name in shapes])

    def hessian(self) -> Tensor:
        """Dense (n, n), in float64."""
        f, x = self.reference()
        if not self.by_differences:
            return torch.func.jacrev(torch.func.jacrev(f))(x).detach()
        step = 1e-6
        ends = [[self.gradient(f, x + sign * step * unit) for sign in (1, -1)] for unit in torch.eye(len(x)).double()]
        return torch.stack([(above - below) / (2 * step) for above, below in ends])

    @staticmethod
    def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """(n,), in float64."""
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), [x])[0]


class _Whole(nn.Module):
    def __init__(self, model: nn.Module, total: Callable[[nn.Module, Callable[[Any], Any]], Tensor]) -> None:
        super().__init__()
        self.model, self.total = model, total

    def forward(self) -> Tensor:
        return self.total(self.model, _double)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _supervised(model: nn.Module, loss: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor, **more: Any) -> Network:
    def total(model: nn.Module, exact: Callable[[Any], Any]) -> Tensor:
        return loss(model(exact(x)), exact(y))

    return Network(model, (x, y), total, loss=loss, **more)


def _images(rows: int, channels: int, size: int) -> Tensor:
    return torch.randn(rows, channels, size, size)


def linear() -> Network:
    return _supervised(nn.Linear(4, 2), nn.MSELoss(), torch.randn(9, 4), torch.randn(9, 2))


def relu() -> Network:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return _supervised(model, nn.CrossEntropyLoss(), torch.randn(23, 5), torch.randint(3, (23,)))


def conv() -> Network:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    return _supervised(model, F.cross_entropy, _images(11, 1, 6), torch.randint(3, (11,)))


def grouped_conv() -> Network:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten())
    return _supervised(model, nn.MSELoss(), _images(7, 4, 5), torch.randn(7, 16))


def batchnorm() -> Network:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    model(_images(16, 1, 4))  # running statistics unlike those it starts with
    return _supervised(model, nn.CrossEntropyLoss(), _images(10, 1, 4), torch.randint(2, (10,)))


def layernorm() -> Network:
    # torch.func's own Hessian of an affine layer_norm is wrong (torch 2.14): differences say so.
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))
    return _supervised(model, nn.SmoothL1Loss(), torch.randn(8, 4), torch.randn(8, 2), by_differences=1e-8)


class _MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def multihead() -> Network:
    return _supervised(_MultiHead(), nn.CrossEntropyLoss(), torch.randn(9, 5, 4), torch.randint(2, (9,)))


class _FusedAttention(nn.Module):
    """Shapes for which torch takes its flash kernel on the CPU, in float32 and float64 alike."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def fused_attention() -> Network:
    return _supervised(_FusedAttention(), nn.CrossEntropyLoss(), torch.randn(9, 6, 8), torch.randint(2, (9,)))


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = cell(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def gru() -> Network:
    return _supervised(_Recurrent(nn.GRU), nn.CrossEntropyLoss(), torch.randn(9, 4, 2), torch.randint(2, (9,)))


def lstm() -> Network:
    return _supervised(_Recurrent(nn.LSTM), nn.CrossEntropyLoss(), torch.randn(9, 4, 2), torch.randint(2, (9,)))


class _Odd(nn.Module):
    """An unused parameter, a 0-dim one, and one whose gradient is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 2))
        self.scale, self.second = nn.Parameter(torch.tensor(1.3)), nn.Linear(4, 1)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)) * self.scale)


def unused_and_scalar() -> Network:
    model = _Odd()

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch
        return F.mse_loss(model(x), y, reduction="sum") + len(x) * model.shift.sum(), len(x)

    x, y = torch.randn(8, 3), torch.randn(8, 1)

    def total(model: nn.Module, exact: Callable[[Any], Any]) -> Tensor:
        return F.mse_loss(model(exact(x)), exact(y)) + model.shift.sum()

    return Network(model, (x, y), total, batch_loss=batch_loss)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mixer = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        # The mixer is one module used twice.
        return self.head(self.mixer(torch.tanh(self.mixer(self.embedding(tokens).mean(1)))))


def tied() -> Network:
    return _supervised(_Tied(), nn.CrossEntropyLoss(), torch.randint(5, (12, 4)), torch.randint(5, (12,)))


def registered_twice() -> Network:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2))
    return _supervised(model, nn.MSELoss(), torch.randn(8, 3), torch.randn(8, 2))


def frozen() -> Network:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 2))
    names = ["0.weight", "2.weight", "4.weight", "4.bias"]
    options = {"params": ["*.weight", "4"]}
    return _supervised(model, nn.MSELoss(), torch.randn(10, 3), torch.randn(10, 2), names=names, options=options)


@dataclasses.dataclass
class _Output:
    logits: Tensor


class _DictModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> _Output:
        mask = attention_mask.to(self.head.weight.dtype)[..., None]
        return _Output(self.head(torch.tanh((self.embedding(input_ids) * mask).sum(1))))


def dict_batches() -> Network:
    ids, labels = torch.randint(6, (10, 4)), torch.randint(3, (10,))
    mask = (torch.rand(10, 4) < 0.8).long()
    data = [
        {"input_ids": ids[part], "attention_mask": mask[part], "labels": labels[part]}
        for part in (slice(0, 4), slice(4, 8), slice(8, 10))
    ]

    def total(model: nn.Module, exact: Callable[[Any], Any]) -> Tensor:
        return F.cross_entropy(model(ids, mask).logits, labels)

    return Network(_DictModel(), data, total, loss=nn.CrossEntropyLoss())


def tokens() -> Network:
    """A sum over tokens with a weight, of which rows have different numbers."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 6))
    ids = torch.randint(6, (9, 7))
    labels = torch.where(torch.rand(9, 7) < torch.linspace(0.1, 1, 9)[:, None], ids.roll(-1, 1), -100)

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch[0]).flatten(0, 1)
        return F.cross_entropy(logits, batch[1].flatten(), reduction="sum"), (batch[1] != -100).sum()

    def total(model: nn.Module, exact: Callable[[Any], Any]) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    return Network(model, (ids, labels), total, batch_loss=batch_loss)


def weight_decay() -> Network:
    case = relu()
    return dataclasses.replace(case, options={"weight_decay": 0.3})


class _Skew(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.T


def parametrized() -> Network:
    layer = torch.nn.utils.parametrize.register_parametrization(nn.Linear(3, 3), "weight", _Skew())
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 1))
    return _supervised(model, nn.MSELoss(), torch.randn(8, 3), torch.randn(8, 1))


def weight_norm() -> Network:
    # The double backward of the fused kernel is wrong (torch 2.14), in autograd and in torch.func.
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1))
    return _supervised(model, nn.MSELoss(), torch.randn(8, 3), torch.randn(8, 1), by_differences=1e-8)


class _Counting(nn.Module):
    """Changes its buffers in place and anew, and uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.ones(2))
        self.latest: Tensor | None = None
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.layer(x)) * self.average
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        self.latest = out
        self.history.append(out)
        return out


def counting() -> Network:
    # torch.func refuses modules that change their buffers in place.
    return _supervised(_Counting(), nn.MSELoss(), torch.randn(8, 3), torch.randn(8, 2), by_differences=1e-8)


_MAKERS = (
    linear, relu, conv, grouped_conv, batchnorm, layernorm, multihead, fused_attention, gru, lstm, unused_and_scalar,
    tied, registered_twice, frozen, dict_batches, tokens, weight_decay, parametrized, weight_norm, counting,
)  # fmt: skip


def network(name: str, seed: int = 0) -> Network:
    """The network of this name, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]()


NETWORKS: dict[str, Callable[[], Network]] = {maker.__name__: maker for maker in _MAKERS}
