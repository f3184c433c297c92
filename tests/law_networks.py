"""Networks whose conservation laws are known by hand: at full size, and small enough to count the laws by numbers.

``NETWORKS[name](small=False)`` returns (model, example_input): a freshly initialised float32 model and the input of one
batch. ``eps`` replaces that of all normalisations. ``PLAIN`` are written in plain functional operations, with
parameters called p0, p1, …
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

__all__ = ["NETWORKS", "PLAIN", "SIZES"]

Example = tuple[nn.Module, Tensor]

# What the formulas of the table are evaluated at, (full, small). Small networks keep every kind of junction of the full
# one; inputs and normalised widths stay large enough not to confine what a layer sees to a subspace.
SIZES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "mlp": ({"widths": (20, 32, 24, 10)}, {"widths": (3, 4, 3, 2)}),
    "lenet": (
        {"image": 28, "channels": (6, 16), "hidden": (120, 84)},
        {"image": 8, "channels": (2, 3), "hidden": (4, 3)},
    ),
    "resnet18": (
        {"layers": (2, 2, 2, 2), "planes": (64, 128, 256, 512)},
        {"layers": (2, 1, 1, 1), "planes": (2, 3, 2, 3)},
    ),
    "resnet50": (
        {"layers": (3, 4, 6, 3), "planes": (64, 128, 256, 512)},
        {"layers": (2, 1), "planes": (2, 2)},
    ),
    "vgg11_bn": (
        {"channels": (64, 128, 256, 256, 512, 512, 512, 512), "hidden": 4096},
        {"channels": (2, 3, 2), "hidden": 3},
    ),
    "mobilenet_v3_small": (
        {
            # (in, expanded, out, squeezed or 0, activation)
            "blocks": (
                (16, 16, 16, 8, "RE"),
                (16, 72, 24, 0, "RE"),
                (24, 88, 24, 0, "RE"),
                (24, 96, 40, 24, "HS"),
                (40, 240, 40, 64, "HS"),
                (40, 240, 40, 64, "HS"),
                (40, 120, 48, 32, "HS"),
                (48, 144, 48, 40, "HS"),
                (48, 288, 96, 72, "HS"),
                (96, 576, 96, 144, "HS"),
                (96, 576, 96, 144, "HS"),
            ),
        },
        {"blocks": ((2, 2, 2, 8, "RE"), (2, 3, 3, 0, "RE"), (3, 4, 3, 8, "HS"))},
    ),
    "densenet121": (
        {"growth": 32, "blocks": (6, 12, 24, 16), "start": 64, "bottleneck": 4},
        {"growth": 2, "blocks": (2, 1), "start": 4, "bottleneck": 2},
    ),
    "vit_b_16": (
        {"image": 224, "patch": 16, "layers": 12, "heads": 12, "width": 768, "hidden": 3072},
        {"image": 4, "patch": 2, "layers": 2, "heads": 2, "width": 4, "hidden": 5},
    ),
    "convnext_tiny": (
        {"widths": (96, 192, 384, 768), "layers": (3, 3, 9, 3)},
        {"widths": (4, 5), "layers": (2, 1)},
    ),
    "gpt_layernorm": (
        {"vocabulary": 300, "context": 24, "layers": 2, "width": 64, "heads": 8, "groups": 2, "head": 8, "hidden": 96},
        {"vocabulary": 7, "context": 4, "layers": 1, "width": 5, "heads": 2, "groups": 1, "head": 3, "hidden": 4},
    ),
    "gpt_rope": (
        {"vocabulary": 300, "context": 24, "layers": 2, "width": 64, "heads": 8, "groups": 2, "head": 8, "hidden": 96},
        {"vocabulary": 6, "context": 4, "layers": 1, "width": 4, "heads": 2, "groups": 1, "head": 4, "hidden": 3},
    ),
    "rnn": ({"inputs": 12, "hidden": 40}, {"inputs": 2, "hidden": 4}),
    "plain1": (
        {"vocabulary": 200, "context": 20, "width": 48, "heads": 4, "head": 10, "hidden": 64, "outputs": 30},
        {"vocabulary": 6, "context": 3, "width": 5, "heads": 2, "head": 2, "hidden": 4, "outputs": 3},
    ),
    "plain2": (
        {"width": 24, "hidden": (20, 18, 16), "outputs": 10},
        {"width": 4, "hidden": (3, 2, 3), "outputs": 2},
    ),
    "plain3": (
        {"inputs": 3, "image": 12, "widths": (8, 6, 10, 7), "outputs": 5},
        {"inputs": 2, "image": 8, "widths": (4, 2, 3, 2), "outputs": 2},
    ),
    "plain4": ({"width": 18, "coded": 12, "hidden": 9}, {"width": 4, "coded": 3, "hidden": 2}),
    "plain5": (
        {"inputs": 14, "rank": 3, "width": 24, "heads": 3, "head": 5, "experts": 4, "hidden": 11, "outputs": 6},
        {"inputs": 3, "rank": 2, "width": 5, "heads": 2, "head": 2, "experts": 3, "hidden": 2, "outputs": 4},
    ),
}


def _mlp(widths: Sequence[int]) -> Example:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(2, widths[0])


def _lenet(image: int, channels: Sequence[int], hidden: Sequence[int]) -> Example:
    kernel, (c1, c2), (h1, h2) = (5, channels, hidden) if image == 28 else (3, channels, hidden)
    side = (image // 2 - kernel + 1) // 2
    model = nn.Sequential(
        *(nn.Conv2d(1, c1, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(c1, c2, kernel), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(
            nn.Linear(c2 * side**2, h1),
            nn.ReLU(),
            nn.Linear(h1, h2),
            nn.ReLU(),
            nn.Linear(h2, 10 if image == 28 else 2),
        ),
    )
    return model, torch.randn(2, 1, image, image)


class _NarrowResNet(ResNet):
    """torchvision's ResNet with other widths, one input channel, a 3×3 stem and perhaps fewer stages."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: Sequence[int], planes: Sequence[int]) -> None:
        self.narrow = list(planes)
        missing = 4 - len(layers)
        super().__init__(block, [*layers, *[0] * missing], num_classes=2)
        self.conv1 = nn.Conv2d(1, planes[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.fc = nn.Linear(planes[-1] * block.expansion, 2)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):  # type: ignore[no-untyped-def]
        index = (64, 128, 256, 512).index(planes)
        if not blocks:
            return nn.Identity()
        if index == 0:
            self.inplanes = self.narrow[0]
        return super()._make_layer(block, self.narrow[index], blocks, stride, dilate)


def _resnet18(layers: Sequence[int], planes: Sequence[int]) -> Example:
    if planes[0] == 64:
        return tv.resnet18(), torch.randn(1, 3, 224, 224)
    return _NarrowResNet(BasicBlock, layers, planes), torch.randn(2, 1, 33, 33)


def _resnet50(layers: Sequence[int], planes: Sequence[int]) -> Example:
    if planes[0] == 64:
        return tv.resnet50(), torch.randn(1, 3, 224, 224)
    return _NarrowResNet(Bottleneck, layers, planes), torch.randn(2, 1, 17, 17)


def _vgg11_bn(channels: Sequence[int], hidden: int) -> Example:
    if len(channels) == 8:
        return tv.vgg11_bn(), torch.randn(1, 3, 224, 224)
    model = VGG(make_layers([channels[0], "M", *channels[1:]], batch_norm=True), dropout=0.0)
    model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
    for i, (a, b) in zip((0, 3, 6), ((channels[-1] * 4, hidden), (hidden, hidden), (hidden, 2)), strict=True):
        model.classifier[i] = nn.Linear(a, b)
    return model, torch.randn(2, 3, 8, 8)


def _mobilenet_v3_small(blocks: Sequence[tuple[int, int, int, int, str]]) -> Example:
    if len(blocks) == 11:
        return tv.mobilenet_v3_small(), torch.randn(1, 3, 224, 224)
    settings = []
    for i, (a, e, b, squeezed, kind) in enumerate(blocks):
        setting = InvertedResidualConfig(a, 3, e, b, bool(squeezed), kind, 2 if i == 0 else 1, 1, 1.0)
        # The constructor rounds to multiples of 8.
        setting.input_channels, setting.expanded_channels, setting.out_channels = a, e, b
        settings.append(setting)
    return MobileNetV3(settings, last_channel=2, num_classes=2, dropout=0.0), torch.randn(2, 3, 16, 16)


def _densenet121(growth: int, blocks: Sequence[int], start: int, bottleneck: int) -> Example:
    if growth == 32:
        return tv.densenet121(), torch.randn(1, 3, 224, 224)
    model = DenseNet(growth, tuple(blocks), start, bn_size=bottleneck, num_classes=2)  # type: ignore[arg-type]
    model.features.conv0 = nn.Conv2d(1, start, 3, stride=2, padding=1, bias=False)
    return model, torch.randn(2, 1, 16, 16)


def _vit_b_16(image: int, patch: int, layers: int, heads: int, width: int, hidden: int) -> Example:
    if width == 768:
        return tv.vit_b_16(), torch.randn(1, 3, 224, 224)
    return VisionTransformer(image, patch, layers, heads, width, hidden, num_classes=3), torch.randn(2, 3, image, image)


def _convnext_tiny(widths: Sequence[int], layers: Sequence[int]) -> Example:
    if widths[0] == 96:
        return tv.convnext_tiny(), torch.randn(1, 3, 224, 224)
    settings = [CNBlockConfig(a, b, n) for a, b, n in zip(widths, [*widths[1:], None], layers, strict=True)]
    model = ConvNeXt(settings, num_classes=2, layer_scale=1.0)
    for parent in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i, conv in enumerate(parent):
            # 3×3 depthwise instead of 7×7.
            if isinstance(conv, nn.Conv2d) and conv.groups > 1:
                parent[i] = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups)
    model.features[0][0] = nn.Conv2d(1, widths[0], 2, stride=2)
    return model, torch.randn(2, 1, 8, 8)


class _Attention(nn.Module):
    """Causal attention in which several query heads share a key and value head."""

    def __init__(self, width: int, heads: int, groups: int, head: int, *, bias: bool, rope: bool) -> None:
        super().__init__()
        self.head, self.rope = head, rope
        self.q = nn.Linear(width, heads * head, bias=bias)
        self.k = nn.Linear(width, groups * head, bias=bias)
        self.v = nn.Linear(width, groups * head, bias=bias)
        self.o = nn.Linear(heads * head, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.rope:
            q, k = _rotated(q), _rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def _rotated(x: Tensor) -> Tensor:
    """Turn the pair (i, i + head/2) at position t by the angle t·100^(−2i/head)."""
    half = x.shape[-1] // 2
    frequencies = 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class _GptBlock(nn.Module):
    def __init__(self, width: int, heads: int, groups: int, head: int, hidden: int, *, rope: bool) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(width, eps=1e-5)) if rope else (lambda: nn.LayerNorm(width))
        self.norm1, self.norm2 = norm(), norm()
        self.attention = _Attention(width, heads, groups, head, bias=not rope, rope=rope)
        self.gate = nn.Linear(width, hidden, bias=not rope)
        self.up = nn.Linear(width, hidden, bias=not rope)
        self.down = nn.Linear(hidden, width, bias=not rope)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class _Gpt(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int,
        width: int,
        heads: int,
        groups: int,
        head: int,
        hidden: int,
        *,
        rope: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = None if rope else nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_GptBlock(width, heads, groups, head, hidden, rope=rope) for _ in range(layers)))
        self.norm = nn.RMSNorm(width, eps=1e-5) if rope else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def _gpt_layernorm(**sizes: int) -> Example:
    return _Gpt(**sizes, rope=False), torch.randint(sizes["vocabulary"], (2, sizes["context"]))


def _gpt_rope(**sizes: int) -> Example:
    return _Gpt(**sizes, rope=True), torch.randint(sizes["vocabulary"], (2, sizes["context"]))


class _Rnn(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(inputs, hidden, nonlinearity="relu", batch_first=True)
        self.out = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


def _rnn(inputs: int, hidden: int) -> Example:
    return _Rnn(inputs, hidden), torch.randn(2, 4, inputs)


class _Plain(nn.Module):
    """A function of the input and of parameters called p0, p1, …"""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape) / math.sqrt(math.prod(shape[1:]) or 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


def _plain1(
    vocabulary: int, context: int, width: int, heads: int, head: int, hidden: int, outputs: int, eps: float = 1e-5
) -> Example:
    """Attention with packed projections; the norms subtract the mean and have no parameters."""

    def norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    def function(t, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10):  # type: ignore[no-untyped-def]
        x = p0[t] + p1
        q, k, v = (torch.matmul(norm(x), p2) + p3).view(*t.shape, 3, heads, head).unbind(2)
        s = torch.einsum("bihe,bjhe->bhij", q, k) / math.sqrt(head)
        s = (s - s.amax(-1, keepdim=True)).exp()
        s = s / s.sum(-1, keepdim=True)
        x = x + torch.einsum("bhij,bjhe->bihe", s, v).reshape(*t.shape, heads * head) @ p4 + p5
        y = norm(x) @ p6 + p7
        x = x + (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))) @ p8 + p9
        return norm(x) @ p10

    inner = heads * head
    shapes = [(vocabulary, width), (context, width), (width, 3 * inner), (3 * inner,), (inner, width), (width,)]
    shapes += [(width, hidden), (hidden,), (hidden, width), (width,), (width, outputs)]
    return _Plain(function, *shapes), torch.randint(vocabulary, (2, context))


def _plain2(width: int, hidden: Sequence[int], outputs: int, eps: float = 1e-5) -> Example:
    """Two linear maps in a row, then relu·linear, sigmoid·linear and relu² side by side between norms by the length."""

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain

    def function(x, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16):  # type: ignore[no-untyped-def]
        x = (x @ p0 + p1) @ p2 + p3
        y = norm(x, p4)
        x = x + (torch.relu(y @ p5) * (y @ p6)) @ p7 + (torch.sigmoid(y @ p8) * (y @ p9 + p10)) @ p11
        x = x + torch.relu(y @ p12 + p13).square() @ p14
        return norm(x, p15) @ p16

    a, b, c = hidden
    shapes = [(width, width), (width,), (width, width), (width,), (width,)]
    shapes += [(width, a), (width, a), (a, width), (width, b), (width, b), (b,), (b, width)]
    shapes += [(width, c), (c,), (c, width), (width,), (width, outputs)]
    return _Plain(function, *shapes), torch.randn(2, width)


def _plain3(inputs: int, image: int, widths: Sequence[int], outputs: int) -> Example:
    """Depthwise, grouped, pointwise and transposed convolutions; half of the channels stay linear between two."""
    c, k, m, n = widths

    def function(x, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12):  # type: ignore[no-untyped-def]
        x = F.leaky_relu(F.conv2d(x, p0, p1, padding=1), 0.1)
        x = F.relu(F.conv2d(x, p2, p3, padding=1, groups=c))
        a, b = F.conv2d(x, p4, p5, groups=2).split(k, dim=1)
        x = torch.cat([F.max_pool2d(F.relu(a), 2), F.avg_pool2d(b, 2)], dim=1)
        x = F.prelu(F.conv2d(x, p6, p7), p8)
        x = F.relu(F.conv_transpose2d(x, p9, p10, stride=2))
        return x.mean((2, 3)) @ p11 + p12

    shapes = [(c, inputs, 3, 3), (c,), (c, 1, 3, 3), (c,), (2 * k, c // 2, 3, 3), (2 * k,)]
    shapes += [(m, 2 * k, 1, 1), (m,), (m,), (m, n, 2, 2), (n,), (n, outputs), (outputs,)]
    return _Plain(function, *shapes), torch.randn(2, inputs, image, image)


def _plain4(width: int, coded: int, hidden: int) -> Example:
    """A layer used twice, a decoder that is the encoder transposed, and two biases added at the same place."""

    def function(x, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9):  # type: ignore[no-untyped-def]
        e = torch.relu(x @ p0 + p1)
        h = torch.relu(e @ p2 + p3)
        h = torch.relu(h @ p2 + p3 + e)
        code = torch.relu(h @ p4 + p5)
        return code @ p4.T + p6 + torch.relu(h @ p8) @ p9 + p7

    shapes = [(width, width), (width,), (width, width), (width,), (width, coded), (coded,), (width,), (width,)]
    return _Plain(function, *shapes, (width, hidden), (hidden, width)), torch.randn(2, width)


def _plain5(
    inputs: int, rank: int, width: int, heads: int, head: int, experts: int, hidden: int, outputs: int
) -> Example:
    """A low-rank correction, attention without softmax, and a softmax-gated mixture of experts."""

    def function(x, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12):  # type: ignore[no-untyped-def]
        h = torch.relu(x @ p0 + (x @ p1) @ p2 + p3)
        q, k, v = ((h @ p).view(*h.shape[:2], heads, head) for p in (p4, p5, p6))
        s = torch.einsum("bihe,bjhe->bhij", q, k) / x.shape[1]
        y = torch.einsum("bhij,bjhe->bihe", s, v).flatten(2) @ p7
        g = torch.softmax(h @ p8 + p9, dim=-1)
        u = torch.relu(torch.einsum("btw,wem->btem", h, p10) + p11)
        return y + torch.einsum("btem,emo,bte->bto", u, p12, g)

    inner = heads * head
    shapes = [(inputs, width), (inputs, rank), (rank, width), (width,)]
    shapes += [(width, inner), (width, inner), (width, inner), (inner, outputs), (width, experts), (experts,)]
    shapes += [(width, experts, hidden), (experts, hidden), (experts, hidden, outputs)]
    return _Plain(function, *shapes), torch.randn(2, 4, inputs)


_BUILDERS: dict[str, Callable[..., Example]] = {
    "mlp": _mlp,
    "lenet": _lenet,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "vgg11_bn": _vgg11_bn,
    "mobilenet_v3_small": _mobilenet_v3_small,
    "densenet121": _densenet121,
    "vit_b_16": _vit_b_16,
    "convnext_tiny": _convnext_tiny,
    "gpt_layernorm": _gpt_layernorm,
    "gpt_rope": _gpt_rope,
    "rnn": _rnn,
    "plain1": _plain1,
    "plain2": _plain2,
    "plain3": _plain3,
    "plain4": _plain4,
    "plain5": _plain5,
}


def _network(name: str) -> Callable[..., Example]:
    def build(small: bool = False, seed: int = 0, eps: float | None = None) -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if eps is None or name not in ("plain1", "plain2"):
                model, example = _BUILDERS[name](**SIZES[name][small])
            else:
                model, example = _BUILDERS[name](**SIZES[name][small], eps=eps)
        for module in model.modules():
            if eps is not None and hasattr(module, "eps"):
                module.eps = eps
        return model, example

    return build


NETWORKS: dict[str, Callable[..., Example]] = {name: _network(name) for name in _BUILDERS}
PLAIN = tuple(name for name in NETWORKS if name.startswith("plain"))
