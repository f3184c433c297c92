"""Time every kernel against its torch twin, and against what one would write in plain float32 torch.

    python -m benchmarks.kernels [--device cpu] [--threads 1] [--rounds 15]

The three run in turn, round by round, so that a busy moment hits all of them; ms are medians over the rounds and the
ratio is the median of the ratios of each round. GB/s counts the bytes that the compiled kernel has to move.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

from torchflat import ops
from torchflat.ops import reference


@dataclass(frozen=True)
class Case:
    """One row of the table: three ways to do the same thing, and the bytes that it takes."""

    kernel: str
    size: str
    bytes: int
    native: Callable[[], object]
    twin: Callable[[], object]
    plain: Callable[[], object]


def orthogonalization(n: int, k: int, dtype: torch.dtype, device: str) -> Case:
    basis = (torch.randn(k, n, device=device) / n**0.5).to(dtype)
    vector = torch.randn(n, device=device, dtype=torch.float64)
    basis32, vector32 = basis.float(), vector.float()

    def plain() -> Tensor:
        for _ in range(2):
            vector32.sub_((basis32 @ vector32) @ basis32)
        return vector32.norm()

    return Case(
        "orthogonalize_",
        f"n={n:,} k={k} {str(dtype).removeprefix('torch.')}",
        3 * basis.nbytes + 5 * vector.nbytes,
        lambda: torch.ops.torchflat.orthogonalize_(basis, vector),
        lambda: reference.orthogonalize_(basis, vector),
        plain,
    )


def lists(name: str, x: list[Tensor]) -> Iterator[Case]:
    elements = sum(each.numel() for each in x)
    size = f"{name}: {len(x)} tensors, {elements / 1e6:.1f} M float32"
    y = [each.clone() for each in x]
    wide = [each.double() for each in x]
    yield Case(
        "dot",
        size,
        8 * elements,
        lambda: torch.ops.torchflat.dot(x, y),
        lambda: reference.dot(x, y),
        lambda: torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(x, y, strict=True)]).sum(),
    )
    yield Case(
        "norm = dot(x, x)",
        size,
        4 * elements,
        lambda: torch.ops.torchflat.dot(x, x),
        lambda: reference.dot(x, x),
        lambda: torch.stack(torch._foreach_norm(x)).norm(),
    )
    yield Case(
        "axpy_ into float64",
        size,
        20 * elements,
        lambda: torch.ops.torchflat.axpy_(wide, x, 1e-3),
        lambda: reference.axpy_(wide, x, 1e-3),
        lambda: torch._foreach_add_(y, x, alpha=1e-3),
    )
    alpha, beta = (torch.full((1,), factor, dtype=torch.float64, device=x[0].device) for factor in (1e-3, 0.999))

    def shrink_and_add() -> None:
        torch._foreach_mul_(y, 0.999)
        torch._foreach_add_(y, x, alpha=1e-3)

    def step() -> None:
        torch._foreach_mul_(y, 0.999)
        torch._foreach_add_(y, x, alpha=1e-3 / torch.stack(torch._foreach_norm(x)).norm().item())

    yield Case(
        "norms",
        size,
        4 * elements,
        lambda: torch.ops.torchflat.norms(x),
        lambda: reference.norms(x),
        lambda: torch.stack(torch._foreach_norm(x)),
    )
    yield Case(
        "axpby_",
        size,
        12 * elements,
        lambda: torch.ops.torchflat.axpby_(y, x, alpha, beta),
        lambda: reference.axpby_(y, x, alpha, beta),
        shrink_and_add,
    )
    yield Case(
        "normalized_axpby_",
        size,
        16 * elements,
        lambda: torch.ops.torchflat.normalized_axpby_(y, x, alpha, beta),
        lambda: reference.normalized_axpby_(y, x, alpha, beta),
        step,
    )


def cases(device: str) -> Iterator[Case]:
    yield orthogonalization(3_700_000, 20, torch.float32, device)
    yield orthogonalization(3_700_000, 5, torch.float32, device)
    yield orthogonalization(3_700_000, 20, torch.float64, device)
    yield orthogonalization(3_700_000, 20, torch.bfloat16, device)
    yield orthogonalization(20_000, 20, torch.float32, device)
    resnet = torchvision.models.resnet18()
    yield from lists("ResNet-18", [torch.randn(p.shape, device=device) for p in resnet.parameters()])
    yield from lists("small", [torch.randn(64, 10, device=device) for _ in range(200)])
    yield from lists("tiny", [torch.randn(3, device=device)])


def milliseconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def keep_freed_memory() -> None:
    """Keep glibc from returning memory: page faults cost the twins up to 5x, and their clean-up is paid by the next."""
    if sys.platform.startswith("linux"):
        trim_threshold, mmap_threshold = -1, -3
        for option in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if ops.backend(options.device) != "native":
        parser.error(f"no compiled kernels for {options.device}: {ops.describe()[options.device]['reason']}")
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {options.rounds} rounds\n")
    print("| kernel | size | native ms | twin ms | twin / native | plain float32 ms | plain / native | GB/s |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for case in cases(options.device):
        ways = (case.native, case.twin, case.plain)
        for way in ways:
            milliseconds(way, options.device)
        rounds = [tuple(milliseconds(way, options.device) for way in ways) for _ in range(options.rounds)]
        native, twin, plain = map(statistics.median, zip(*rounds, strict=True))
        over_twin = statistics.median(each[1] / each[0] for each in rounds)
        over_plain = statistics.median(each[2] / each[0] for each in rounds)
        print(
            f"| {case.kernel} | {case.size} | {native:.3f} | {twin:.3f} | {over_twin:.2f} | {plain:.3f} "
            f"| {over_plain:.2f} | {case.bytes / native / 1e6:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
