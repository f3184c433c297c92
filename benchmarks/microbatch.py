"""Time a product whose graph is rebuilt against the size of the micro-batch's graph: what `objective/plan.py` rests on.

    python -m benchmarks.microbatch [--threads 1] [--rounds 3]

Sizes take turns, round by round, and each goes through the same rows. The table has the least time per row of each size
over the fastest size, for networks whose graphs take from 2 KiB to 5 MiB a row; `*` marks the size that the plan takes.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import torch
from torch import Tensor, nn

from torchflat import Objective
from torchflat.objective.plan import FASTEST_GRAPH, LARGEST_MICROBATCH

MIB = 2**20
SIZES = (4, 16, 32, 64, FASTEST_GRAPH // MIB, 256, 512)
ROWS = 4 * LARGEST_MICROBATCH
Case = tuple[nn.Module, nn.Module, tuple[Tensor, Tensor], float]


class Transformer(nn.Module):
    """Characters, 64 at a time."""

    def __init__(self, width: int = 128, depth: int = 4, context: int = 64, symbols: int = 96) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(symbols, width), nn.Linear(width, symbols)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True) for _ in range(depth)
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits of shape (rows, symbols, places)."""
        hidden = self.embedding(symbols)
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask)
        return self.head(hidden).transpose(1, 2)


def relu(width: int, depth: int) -> nn.Module:
    layers = [each for _ in range(depth) for each in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cases() -> dict[str, Case]:
    """Network, loss, data, and seconds that one round may take for all sizes together."""
    from torchvision.models import resnet18

    residual = resnet18(num_classes=10)
    residual.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    rows, images = torch.rand(ROWS, 784), torch.rand(1024, 1, 32, 32)
    characters = torch.randint(96, (256, 64))
    return {
        "ReLU, 3 x 64": (relu(64, 3), nn.MSELoss(), (rows[:, :64], rows[:, :64]), 5),
        "ReLU, 6 x 784": (relu(784, 6), nn.MSELoss(), (rows, rows), 20),
        "ResNet-18, 32 x 32": (residual, nn.CrossEntropyLoss(), (images, torch.randint(10, (len(images),))), 20),
        "transformer, 4 x 128": (Transformer(), nn.CrossEntropyLoss(), (characters, characters), 20),
    }


def seconds(f: Objective, v: Tensor) -> float:
    start = time.perf_counter()
    f.hvp(v)
    return time.perf_counter() - start


def ratios(case: Case, rounds: int) -> tuple[float, dict[int, float]]:
    """Bytes of a row, and the time of each size in MiB over that of the fastest. Sizes above all rows are left out."""
    model, loss, data, limit = case
    probe = Objective(model.eval(), loss, tuple(part[:64] for part in data))
    v = torch.ones(probe.n) / math.sqrt(probe.n)
    probe.hvp(v)
    each = probe.provenance()["plan"]["bytes_per_row"]
    affordable = int(64 * limit / len(SIZES) / seconds(probe, v))
    sizes = [size for size in SIZES if 1 <= size * MIB // each <= min(affordable, len(data[0]), LARGEST_MICROBATCH)]
    rows = int(max(sizes) * MIB // each)
    cut = tuple(part[:rows] for part in data)
    fs = {size: Objective(model, loss, cut, microbatch=int(size * MIB // each), memory="0B") for size in sizes}
    for f in fs.values():
        f.value()
        f.hvp(v)
    times = [{size: seconds(f, v) for size, f in fs.items()} for _ in range(rounds)]
    least = {size: min(each[size] for each in times) for size in fs}
    return each, {size: least[size] / min(least.values()) for size in fs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {options.threads} threads, least of {options.rounds} rounds\n")
    print("| network | KiB a row | " + " | ".join(f"{size} MiB" for size in SIZES) + " |")
    print("|---|--:" + "|--:" * len(SIZES) + "|")
    for name, case in cases().items():
        each, found = ratios(case, options.rounds)
        taken = max(size for size in found if size <= FASTEST_GRAPH // MIB)
        cells = [f"{found[size]:.2f}{'*' if size == taken else ''}" if size in found else "" for size in SIZES]
        print(f"| {name} | {each / 1024:.1f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
