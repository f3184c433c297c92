"""Time a step of NormalizedGD against clipping and SGD, and against a C loop that reads and writes the same bytes.

    python -m benchmarks.optimizer_step [--threads N] [--rounds 15] [--clock wall] [--in-a-row 1]

All run in turn on the same tensors, round by round, so that a busy moment hits all of them, and where the tensors lie
is the same for all; ms are medians over the rounds and ratios are medians of the ratios of each round. `SGD / step`
compares clip_grad_norm_ and SGD, both foreach, with a step; `SGD / C` is what this could be at most, for the loop has
nothing around it: no lists of tensors, no Python. `kernel` is the same by one call of a compiled kernel through the
dispatcher, as on other devices, `lists` the part of that which hands over the tensors (a call on as many empty ones),
and `idle` a step of a torch.optim.Optimizer that looks at its gradients and does nothing. GB/s are those of the C loop.

With `--in-a-row 5` each runs five times before the next has its turn, and the last is timed: as in a loop of its own,
where what fits into a cache is found there. Otherwise each finds what the others left, as after a backward pass.

On a machine that does other work too, `--clock thread` counts the time in which the one thread really ran.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from torchflat import ops
from torchflat.optim import NormalizedGD

LOOP = r"""
#include <math.h>
#include <stdint.h>
struct run { float *x; const float *g; int64_t count; };
double step(const struct run *runs, int64_t count, double length) {
  double square = 0;
#pragma omp parallel for reduction(+ : square) schedule(static)
  for (int64_t r = 0; r < count; ++r) {
    double sums[32] = {0};
    const float *g = runs[r].g;
    int64_t i = 0;
    for (; i + 32 <= runs[r].count; i += 32)
      for (int lane = 0; lane < 32; ++lane) sums[lane] += (double)g[i + lane] * (double)g[i + lane];
    for (; i < runs[r].count; ++i) sums[0] += (double)g[i] * (double)g[i];
    for (int lane = 0; lane < 32; ++lane) square += sums[lane];
  }
  const double factor = -length / sqrt(square);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < runs[r].count; ++i)
      runs[r].x[i] = (float)((double)runs[r].x[i] + factor * (double)runs[r].g[i]);
  return square;
}
"""
CHUNK = 16384  # elements, as in the kernels
BYTES = 4 * 4  # an element: the gradient twice and the parameter once are read, the parameter is written
SIZES: dict[str, Callable[[], list[Tensor]]] = {
    "200 of 64 x 64": lambda: [torch.randn(64, 64) for _ in range(200)],
    "ResNet-18": lambda: [torch.randn(p.shape) for p in torchvision.models.resnet18().parameters()],
    "ViT-B/16": lambda: [torch.randn(p.shape) for p in torchvision.models.vit_b_16().parameters()],
}
SHOWN = ("SGD", "step", "kernel", "lists", "idle", "C")
RATIOS = (("SGD", "step"), ("SGD", "C"), ("step", "C"))
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


class Run(ctypes.Structure):
    """A run of elements of one tensor, as the C loop takes it."""

    _fields_ = (("x", ctypes.c_void_p), ("g", ctypes.c_void_p), ("count", ctypes.c_int64))


class Idle(torch.optim.Optimizer):
    """An optimizer that does no more than every optimizer does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Look at the gradients."""
        grads = [grad for group in self.param_groups for p in group["params"] if (grad := p.grad) is not None]
        assert not any(grad.is_sparse for grad in grads)


def compiled_loop(folder: Path) -> ctypes.CDLL:
    """Compile the C loop for this machine and load it."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the C loop needs a compiler: no `cc` was found")
    (folder / "loop.c").write_text(LOOP)
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "loop.c", "-o", "loop.so", "-lm"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "loop.so"))
    library.step.argtypes = (ctypes.POINTER(Run), ctypes.c_int64, ctypes.c_double)
    library.step.restype = ctypes.c_double
    return library


def with_gradients(tensors: list[Tensor]) -> list[Tensor]:
    """Return parameters of their own with random gradients."""
    params = [tensor.clone().requires_grad_() for tensor in tensors]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def runs_of(params: list[Tensor]) -> ctypes.Array[Run]:
    """Cut parameters and their gradients into runs, which hold only as long as these do."""
    pieces = [
        Run(p.data_ptr() + 4 * start, p.grad.data_ptr() + 4 * start, min(CHUNK, p.numel() - start))
        for p in params
        if p.grad is not None
        for start in range(0, p.numel(), CHUNK)
    ]
    return (Run * len(pieces))(*pieces)


def ways(tensors: list[Tensor], library: ctypes.CDLL) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name, all on the same parameters."""
    params = with_gradients(tensors)
    sgd = torch.optim.SGD(params, lr=1e-6, foreach=True)
    step = NormalizedGD(params, lr=1e-6, decay=0, fused=True).step
    one = torch.ones(1, dtype=torch.float64)
    grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
    empty = [torch.empty(0) for _ in tensors]
    runs = runs_of(params)

    def clip_and_sgd() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        sgd.step()

    def kernel(x: list[Tensor], g: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return ops.normalized_axpby_(x, g, -1e-6 * one, one)

    return {
        "SGD": clip_and_sgd,
        "step": step,
        "C": lambda: library.step(runs, len(runs), 1e-6),
        "idle": Idle(params, {}).step,
        "kernel": lambda: kernel(params, grads),
        "lists": lambda: kernel(empty, empty),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--in-a-row", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    if options.clock == "thread" and options.threads > 1:
        parser.error(f"--clock thread sees one thread only, not {options.threads}")
    if ops.backend("cpu") != "native":
        parser.error(f"no compiled kernels: {ops.describe()['cpu']['reason']}")
    torch.manual_seed(0)
    clock = CLOCKS[options.clock]
    how = f"{options.threads} threads, {options.rounds} rounds, {options.in_a_row} in a row, {options.clock} clock"
    print(f"torch {torch.__version__}, {how}\n")
    columns = ["parameters", *(f"{way} ms" for way in SHOWN), "C GB/s", *(" / ".join(ratio) for ratio in RATIOS)]
    print(f"| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}")
    with tempfile.TemporaryDirectory() as folder:
        library = compiled_loop(Path(folder))
        # Both torch and the loop use OpenMP, each possibly a copy of its own.
        library.omp_set_num_threads(options.threads)
        torch.set_num_threads(options.threads)
        for name, make in SIZES.items():
            tensors = make()
            elements = sum(tensor.numel() for tensor in tensors)
            calls = ways(tensors, library)
            rounds = [
                _round(calls, clock, options.in_a_row)
                for _ in range(3 + options.rounds * (20 if elements < 1e6 else 1))
            ][3:]
            medians = {way: 1e3 * statistics.median(each[way] for each in rounds) for way in calls}
            ratios = [statistics.median(each[above] / each[below] for each in rounds) for above, below in RATIOS]
            times = [f"{medians[way]:.3f}" for way in SHOWN]
            speed = f"{BYTES * elements / medians['C'] / 1e6:.1f}"
            print(f"| {' | '.join([name, *times, speed, *(f'{ratio:.2f}' for ratio in ratios)])} |", flush=True)


def _round(calls: dict[str, Callable[[], object]], clock: Callable[[], float], in_a_row: int) -> dict[str, float]:
    seconds = {}
    for way, call in calls.items():
        for _ in range(in_a_row - 1):
            call()
        start = clock()
        call()
        seconds[way] = clock() - start
    return seconds


if __name__ == "__main__":
    main()
