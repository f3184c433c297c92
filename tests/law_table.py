"""How many conservation laws each network of ``law_networks`` has, derived by hand.

A law is a conserved number that belongs to a continuous symmetry of the outputs: one that holds for generic parameters
and buffers and for all inputs, exactly, with buffers fixed. ``FORMULAS`` derives the numbers from the sizes, ``TABLE``
holds them at full size as plain numbers. Two counts each: in eval mode, and in train mode, where BatchNorm normalises
over the batch (dropout and stochastic depth are off, or act by a fixed mask).

Kinds, of independent numbers:

- diagonal: one per channel that writers and readers can trade a positive factor for, θᵀAθ with A diagonal;
- centred: the same with an offset, |w|² + (b − μ)² − γ²: A diagonal, and a linear term from a fixed buffer;
- full: r(r+1)/2 for each block of r channels that any invertible matrix may mix;
- linear: aᵀθ, from a constant shift of parameters that the outputs do not see;
- approximate: laws that hold as the eps of normalisations goes to 0, besides those above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["FORMULAS", "TABLE", "Count"]


@dataclass(frozen=True)
class Count:
    """Numbers of independent laws, by kind; ``mixed`` is Σ r, the laws of the full blocks on their diagonals."""

    diagonal: int = 0
    centred: int = 0
    full: int = 0
    linear: int = 0
    approximate: int = 0
    mixed: int = 0

    @property
    def exact(self) -> int:
        """All that hold at any eps."""
        return self.diagonal + self.centred + self.full + self.linear


Counts = tuple[Count, Count]

# Network: in eval mode, in train mode.
TABLE: dict[str, Counts] = {
    "mlp": (Count(diagonal=56), Count(diagonal=56)),
    "lenet": (Count(diagonal=226), Count(diagonal=226)),
    "resnet18": (Count(diagonal=2880, linear=896), Count(diagonal=2880, linear=896, approximate=4800)),
    "resnet50": (Count(diagonal=11456, linear=3840), Count(diagonal=11456, linear=3840, approximate=26560)),
    "vgg11_bn": (
        Count(diagonal=10944, centred=2752),
        Count(diagonal=10944, linear=2752, approximate=2752),
    ),
    "mobilenet_v3_small": (Count(diagonal=1152), Count(diagonal=1152, linear=568, approximate=6056)),
    "densenet121": (Count(diagonal=41760), Count(diagonal=41760, approximate=10304)),
    "vit_b_16": (
        Count(diagonal=19200, full=599040, linear=57821, approximate=1, mixed=18432),
        Count(diagonal=19200, full=599040, linear=57821, approximate=1, mixed=18432),
    ),
    "convnext_tiny": (
        Count(diagonal=14688, linear=67, approximate=23),
        Count(diagonal=14688, linear=67, approximate=23),
    ),
    "gpt_layernorm": (
        Count(diagonal=512, full=288, linear=743, approximate=1, mixed=64),
        Count(diagonal=512, full=288, linear=743, approximate=1, mixed=64),
    ),
    "gpt_rope": (
        Count(diagonal=528, full=144, approximate=1, mixed=32),
        Count(diagonal=528, full=144, approximate=1, mixed=32),
    ),
    "rnn": (Count(diagonal=40, linear=40), Count(diagonal=40, linear=40)),
    "plain1": (
        Count(full=440, linear=627, approximate=1, mixed=80),
        Count(full=440, linear=627, approximate=1, mixed=80),
    ),
    "plain2": (
        Count(diagonal=122, full=300, approximate=1, mixed=24),
        Count(diagonal=122, full=300, approximate=1, mixed=24),
    ),
    "plain3": (Count(diagonal=39, full=21, mixed=6), Count(diagonal=39, full=21, mixed=6)),
    "plain4": (Count(diagonal=10, linear=18), Count(diagonal=10, linear=18)),
    "plain5": (Count(diagonal=71, full=96, linear=25, mixed=33), Count(diagonal=71, full=96, linear=25, mixed=33)),
}


def _triangle(r: int) -> int:
    return r * (r + 1) // 2


def _mlp(widths: Sequence[int]) -> Counts:
    # A hidden unit: row and bias against the next layer's column.
    count = Count(diagonal=sum(widths[1:-1]))
    return count, count


def _lenet(image: int, channels: Sequence[int], hidden: Sequence[int]) -> Counts:
    # A channel or unit each; max-pooling passes a factor, flattening gives a channel one column per place.
    count = Count(diagonal=sum(channels) + sum(hidden))
    return count, count


def _resnet(layers: Sequence[int], planes: Sequence[int], expansion: int, inner: int) -> Counts:
    # A BatchNorm cuts: in eval mode its mean and variance are fixed, so the convolution before it is pinned, and γ and
    # β together are the writers of what follows. Inside a block: the first ``inner`` BatchNorms → the next convolution.
    # The stream: relu acts on it, so channel by channel. Its writers are the last BatchNorm of each block and that of
    # the downsampling shortcut; its readers the first convolutions and the next stage's shortcut, at the end fc.
    streams = [expansion * p for p in planes]
    inside = sum(n * inner * p for n, p in zip(layers, planes, strict=True))
    # The stem's stream is that of stage 1 where stage 1 has no shortcut convolution.
    stem = 0 if expansion == 1 else planes[0]
    shortcuts = streams[1:] if expansion == 1 else streams
    diagonal = stem + sum(streams) + inside
    # The shortcut's β and the block's last β are added: their difference is conserved.
    linear = sum(shortcuts)
    # Batch statistics forget the length of each filter before a BatchNorm: one per normalised channel.
    normalised = planes[0] + inside + sum(n * s for n, s in zip(layers, streams, strict=True)) + sum(shortcuts)
    return Count(diagonal, linear=linear), Count(diagonal, linear=linear, approximate=normalised)


def _resnet18(layers: Sequence[int], planes: Sequence[int]) -> Counts:
    # bn1 → conv2 in each block: 2·64 + 2·128 + 2·256 + 2·512 = 1920; streams 64 + 128 + 256 + 512 = 960.
    # Shortcuts in stages 2, 3, 4: 128 + 256 + 512 = 896. BatchNorm channels: 64 + 4·64 + 5·(128 + 256 + 512) = 4800.
    return _resnet(layers, planes, expansion=1, inner=1)


def _resnet50(layers: Sequence[int], planes: Sequence[int]) -> Counts:
    # bn1 → conv2 and bn2 → conv3: 2·(3·64 + 4·128 + 6·256 + 3·512) = 7552; stem 64 → layer1.0.conv1 and its shortcut;
    # streams 256 + 512 + 1024 + 2048 = 3840, each with a shortcut. BatchNorm channels: 64 + 6·3776 + 3840 = 26560.
    return _resnet(layers, planes, expansion=4, inner=2)


def _vgg11_bn(channels: Sequence[int], hidden: int) -> Counts:
    # BatchNorm's γ, β → the next convolution, the last to 49 columns a channel: 2752; two hidden layers: 8192.
    normalised = sum(channels)
    diagonal = normalised + 2 * hidden
    # These convolutions have a bias. In eval mode γ(w·x + b − μ)/σ + β lets (w, b − μ) be traded against γ; without a
    # bias, -γμ/σ would have to be made up for by β, and that symmetry conserves nothing.
    # In train mode the batch mean takes b away: b itself is conserved, and |w|² as eps → 0.
    return (
        Count(diagonal, centred=normalised),
        Count(diagonal, linear=normalised, approximate=normalised),
    )


def _mobilenet_v3_small(blocks: Sequence[tuple[int, int, int, int, str]]) -> Counts:
    diagonal = linear = 0
    normalised = blocks[0][0] + 6 * blocks[-1][2]
    for i, (width, expanded, out, squeezed, activation) in enumerate(blocks):
        has_expansion = expanded != width
        if activation == "RE":
            # Expansion's γ, β → depthwise filter (a link of its own, pinned on the other side by its BatchNorm), and
            # depthwise's γ, β → projection and, where there is one, fc1 of the squeeze. Hardswish has neither.
            diagonal += expanded * (1 + has_expansion)
        # fc1 → relu → fc2 of the squeeze; hardsigmoid pins the other side of fc2.
        diagonal += squeezed
        # The stream is linear: projections' γ, β → the next expansions, one per channel of a stream. Mixing channels
        # would make γ a matrix. A block that keeps the width adds to the stream there is; but the first one strides.
        if not (i and width == out):
            diagonal += out
        # In train mode a shift of the stream goes through the 1×1 expansions, which have no padding, into batch means:
        # each projection's β is conserved.
        linear += out
        normalised += expanded * (1 + has_expansion) + out
    # The stem and the head are hardswish: nothing. All blocks but the first have an expansion.
    return Count(diagonal), Count(diagonal, linear=linear, approximate=normalised)


def _densenet121(growth: int, blocks: Sequence[int], start: int, bottleneck: int) -> Counts:
    # The concatenated stream is read by BatchNorms only, which pin it in eval mode. Every norm's γ, β → relu → the
    # convolution after it: norm1 has all channels so far, norm2 bottleneck·growth, transitions and norm5 all.
    diagonal, normalised, width = 0, start, start
    for i, layers in enumerate(blocks):
        for _ in range(layers):
            diagonal += width + bottleneck * growth
            # conv1 before norm2; conv2, whose channels are read by the norms of all later layers.
            normalised += bottleneck * growth + growth
            width += growth
        diagonal += width
        if i < len(blocks) - 1:
            # The transition's convolution is averaged, then normalised.
            width //= 2
            normalised += width
    # norm0's γ, β → relu → max → norms: γ² + β² in train mode as eps → 0.
    normalised += start
    return Count(diagonal), Count(diagonal, approximate=normalised)


def _vit_b_16(image: int, patch: int, layers: int, heads: int, width: int, hidden: int) -> Counts:
    positions = (image // patch) ** 2 + 1
    # ln_1 → in_proj and ln_2 → mlp.0 of each layer, ln → head. GELU: nothing.
    diagonal = (2 * layers + 1) * width
    # Per head: (W_q, b_q) against (W_k, b_k), and (W_v, b_v) against W_o.
    full = layers * 2 * heads * _triangle(width // heads)
    # Softmax does not see the key bias: width. LayerNorms do not see the mean over channels of what is written to the
    # stream: one per column of out_proj (width) and of mlp.3 (hidden), one per bias of the two.
    each = width + (width + 1) + (hidden + 1)
    # The same for columns of conv_proj: 3·patch². class_token and pos_embedding[0] are added: width differences, and
    # then one sum over channels; conv_proj's bias is added to all other positions: width, and positions − 1 sums.
    embedding = 3 * patch**2 + (width + 1) + (width + positions - 1)
    # All writers of the stream by one factor.
    count = Count(diagonal, full=full, linear=layers * each + embedding, approximate=1, mixed=2 * layers * width)
    return count, count


def _convnext_tiny(widths: Sequence[int], layers: Sequence[int]) -> Counts:
    # In each block: LayerNorm → first linear layer, and layer_scale against rows and bias of the second; GELU between.
    # The stream: no channel by itself, because the LayerNorm that ends the stage sees all of them.
    # That LayerNorm → the downsampling convolution or the head: each stage's width.
    diagonal = sum(2 * n * w for n, w in zip(layers, widths, strict=True)) + sum(widths)
    # LayerNorm right after a convolution: the sum over channels of the stem's filters, entry by entry, and of its bias;
    # of a depthwise convolution only that of its bias, since its channels see different inputs. The stages' streams
    # are read by depthwise convolutions too, and those see shifts.
    stem = 16 * 3 + 1 if len(widths) == 4 else 4 + 1
    linear = stem + sum(layers)
    # Stem; each depthwise convolution; each stage's stream, its writers against the depthwise filters.
    count = Count(diagonal, linear=linear, approximate=1 + sum(layers) + len(widths))
    return count, count


def _gpt_layernorm(
    vocabulary: int, context: int, layers: int, width: int, heads: int, groups: int, head: int, hidden: int
) -> Counts:
    # norm1 → q, k, v; norm2 → gate, up; up (row and bias) → down; the last norm → head. Nothing through silu.
    diagonal = layers * (2 * width + hidden) + width
    # Per group: all its query heads against the key head, the value head against all its slices of o.
    full = layers * 2 * groups * _triangle(head)
    # Key bias; sums over channels of o and its bias, of down and its bias.
    linear = layers * (groups * head + (heads * head + 1) + (hidden + 1))
    # Sums over channels of each token's and each position's embedding; and any vector may be moved from all tokens to
    # all positions, of which the constant vector is counted already.
    linear += vocabulary + context + width - 1
    count = Count(diagonal, full=full, linear=linear, approximate=1, mixed=2 * layers * groups * head)
    return count, count


def _gpt_rope(
    vocabulary: int, context: int, layers: int, width: int, heads: int, groups: int, head: int, hidden: int
) -> Counts:
    # As above; what commutes with the rotations of queries and keys scales each pair: head/2 per group.
    diagonal = layers * (2 * width + hidden + groups * head // 2) + width
    # Values and outputs only. RMSNorm sees the mean, and there is no bias.
    full = layers * groups * _triangle(head)
    count = Count(diagonal, full=full, approximate=1, mixed=layers * groups * head)
    return count, count


def _rnn(inputs: int, hidden: int) -> Counts:
    # A unit: its rows of W_ih and W_hh and both biases, against its columns of W_hh and of the output layer. The two
    # biases are added: their difference.
    count = Count(diagonal=hidden, linear=hidden)
    return count, count


def _plain1(vocabulary: int, context: int, width: int, heads: int, head: int, hidden: int, outputs: int) -> Counts:
    inner = heads * head
    # Norms without parameters: their readers do not see the sum over inputs of each column of p2, p6, p10.
    readers = 3 * inner + hidden + outputs
    # Key part of p3; sums over the stream's channels of p4, p5, p8, p9; embeddings as in gpt_layernorm.
    writers = inner + (inner + 1) + (hidden + 1) + vocabulary + context + width - 1
    full = 2 * heads * _triangle(head)
    count = Count(full=full, linear=readers + writers, approximate=1, mixed=2 * inner)
    return count, count


def _plain2(width: int, hidden: Sequence[int], outputs: int) -> Counts:
    a, b, c = hidden
    # p4 → p5, p6, p8, p9, p12 and p15 → p16; relu(p5)·p6 → p7: both factors; p9, p10 → p11 (the sigmoid side: nothing);
    # p12, p13 → p14 with the square: weights 1 and −2.
    diagonal = 2 * width + 2 * a + b + c
    # p0, p1 → p2: nothing between.
    count = Count(diagonal, full=_triangle(width), approximate=1, mixed=width)
    return count, count


def _plain3(inputs: int, image: int, widths: Sequence[int], outputs: int) -> Counts:
    c, k, m, n = widths
    # p0, p1 → depthwise p2; p2, p3 → grouped p4; first half of p4, p5 → p6; p6, p7 → transposed p9; p9, p10 → p11.
    # Slopes p8 change no factor. The second half of p4, p5 is averaged and stays linear up to p6.
    count = Count(diagonal=c + c + k + m + n, full=_triangle(k), mixed=k)
    return count, count


def _plain4(width: int, coded: int, hidden: int) -> Counts:
    # p8 → p9: hidden. p2 serves twice, so e and both h have the same factors w; p4 gives the code factor k = p4 + w_i
    # and takes it back as p4 = −k: w_i = 2k for all i and codes. One law with weights p0, p1, p3: 2, p5: 1, p4: −1,
    # p8: −2, p2: 0.
    # p6 − p7: width.
    count = Count(diagonal=hidden + 1, linear=width)
    return count, count


def _plain5(
    inputs: int, rank: int, width: int, heads: int, head: int, experts: int, hidden: int, outputs: int
) -> Counts:
    # p0, p2, p3 → all readers of h; experts' p10, p11 → p12; without softmax a head's query can be traded against its
    # output, beside the blocks of query and key and of value and output.
    diagonal = width + experts * hidden + heads
    # p1 → p2; blocks of each head.
    full = _triangle(rank) + 2 * heads * _triangle(head)
    # Softmax does not see the sum over experts of p8, row by row, and of p9.
    count = Count(diagonal, full=full, linear=width + 1, mixed=rank + 2 * heads * head)
    return count, count


FORMULAS: dict[str, Callable[..., Counts]] = {
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
