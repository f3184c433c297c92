"""Small networks that use one kind of operator each, with their laws counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SMALL", "Small"]


@dataclass(frozen=True)
class Small:
    """One case. ``counts``: diagonal, full, linear; ``shape``: of a batch, of numbers below ``ids`` if not 0."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    counts: tuple[int, int, int]
    ids: int = 0

    def __str__(self) -> str:
        return self.name

    def example(self) -> Tensor:
        if self.ids:
            return torch.arange(torch.Size(self.shape).numel()).view(self.shape) % self.ids
        return torch.randn(self.shape, dtype=torch.float64)


class Functional(nn.Module):
    """Parameters p0, p1, … of the given shapes, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape) / 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


def _generic(model: nn.Module) -> nn.Module:
    """No gain is 1 and no bias or running mean 0."""
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.normal_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU(), nn.Linear(4, 2))


def linear_neighbours() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.Linear(2, 3))


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2), nn.Flatten(),
    )  # fmt: skip


def linear_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.AvgPool1d(2), nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(4, 2))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1, bias=False)
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(x + self.bn2(self.conv2(y)))
        return self.fc(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        self.c, self.d = nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x).relu(), self.b(x).relu()], -1)
        left, right = self.c(y).chunk(2, -1)
        return self.d(left * torch.sigmoid(right))


class Attention(nn.Module):
    """Two heads of nn.MultiheadAttention on normalised input, in a residual stream that is normalised at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 4)
        self.norm, self.last = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.out(self.last(x))


class Decoder(nn.Module):
    """A block with RMSNorm, grouped-query attention and SwiGLU, embeddings and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 4), nn.Parameter(torch.randn(3, 4))
        self.norm1, self.norm2, self.last = nn.RMSNorm(4, eps=1e-5), nn.RMSNorm(4, eps=1e-5), nn.LayerNorm(4)
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.o, self.up, self.gate = nn.Linear(4, 4, bias=False), nn.Linear(4, 3), nn.Linear(4, 3)
        self.down, self.head = nn.Linear(3, 4), nn.Linear(4, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(2, 3, nonlinearity="relu", batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.b(self.a(self.table(ids)).relu())
        return x @ self.table.weight.T


def _f0(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A hidden layer of ReLUs, squared, by einsum and matmul."""
    return torch.einsum("nh,hk->nk", torch.clamp(x @ a + b, min=0) ** 2, c)


def _f1(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Attention by hand, one head."""
    q, k = x @ a, x @ b
    scores = (q @ k.transpose(-1, -2)) / 1.7
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return ((weights / weights.sum(-1, keepdim=True)) @ (x @ c)) @ d


def _f2(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Rotary positions on queries and keys, of which one pair of channels is all there is."""
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    cos, sin = torch.cos(angle).expand(-1, 2), torch.sin(angle).expand(-1, 2)

    def turned(y: Tensor) -> Tensor:
        return y * cos + torch.cat([-y[..., 1:], y[..., :1]], -1) * sin

    q, k = turned(F.linear(x, a)), turned(F.linear(x, b))
    return torch.softmax(torch.einsum("nid,njd->nij", q, k), -1) @ F.linear(x, c)


def _f3(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Two linear branches multiplied."""
    return F.linear(F.linear(x, a) * F.linear(x, b), c)


def _f4(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Two biases in one place, a slice of the channels with a nonlinearity of its own, and where in place of ReLU."""
    y = F.linear(x, a) + b + c
    y = torch.cat([torch.where(y[:, :2] > 0, y[:, :2], 0.0), torch.tanh(y[:, 2:])], 1)
    return F.linear(y, d)


def _case(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], *counts: int, ids: int = 0) -> Small:
    return Small(name, lambda: _generic(build()), shape, (counts[0], counts[1], counts[2]), ids)


SMALL = [
    _case("mlp", mlp, (4, 3), 9, 0, 0),
    # GL(3) between the first two, ReLU, GL(2) between the last two.
    _case("linear neighbours", linear_neighbours, (4, 3), 4, 6 + 3, 0),
    _case("smooth", smooth, (4, 3), 0, 0, 0),
    _case("lenet", lenet, (2, 1, 8, 8), 7, 0, 0),
    _case("depthwise", depthwise, (2, 2, 5, 5), 12, 0, 0),
    # GL(3) between the convolutions, GL(2) through flatten.
    _case("linear convolutions", linear_convolutions, (2, 2, 7), 0, 6 + 3, 0),
    # The stream from bn0 and bn2 to conv1 and fc, and the inner channels from bn1 to conv2.
    _case("residual", Residual, (2, 2, 4, 4), 6, 0, 0),
    # ReLU channels of a and b; left of c to d, each gated by a right one, which is fixed.
    _case("concatenated", Concatenated, (4, 3), 5 + 2, 0, 0),
    # norm → in_proj, last → out; Q/K and V/O for two heads of two; 1ᵀ of inside (3 + 1) and out_proj (4 + 1), b_K (4).
    _case("attention", Attention, (2, 3, 3), 8, 4 * 3, 13),
    # norm1 → q, k, v; up → down; norm2 → up, gate; last → head. Q/K, V/O over the shared head of two. Only
    # down is not seen by an RMSNorm (3 + 1); b_K (2); tokens − places (4).
    _case("decoder", Decoder, (2, 3), 4 + 3 + 4 + 4, 3 + 3, 4 + 2 + 4, ids=5),
    # b_ih − b_hh.
    _case("recurrent", Recurrent, (2, 4, 2), 3, 0, 3),
    # Mixed where the table is read, and by the inverse where it is multiplied with what b writes.
    _case("tied", Tied, (2, 3), 4, 6, 0, ids=5),
    _case("functional 0", lambda: Functional(_f0, (3, 4), (4,), (4, 2)), (4, 3), 4, 0, 0),
    _case("functional 1", lambda: Functional(_f1, (3, 2), (3, 2), (3, 3), (3, 2)), (2, 4, 3), 0, 3 + 6, 0),
    _case("functional 2", lambda: Functional(_f2, (2, 3), (2, 3), (2, 3)), (2, 4, 3), 1, 0, 0),
    # Each product channel has three factors.
    _case("functional 3", lambda: Functional(_f3, (4, 3), (4, 3), (2, 4)), (4, 3), 8, 0, 0),
    _case("functional 4", lambda: Functional(_f4, (4, 3), (4,), (4,), (2, 4)), (4, 3), 2, 0, 4),
]
