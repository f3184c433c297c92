"""The memory budget: amounts, what graphs are measured to take, and what the process really takes."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from networks import NETWORKS, network
from torch import Tensor, nn

import torchflat
from torchflat import Objective
from torchflat.errors import UsageError
from torchflat.objective.memory import parse_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("amount", "expected"),
    [("0B", 0), (0, 0), ("1 KB", 1000), ("1KiB", 1024), ("0.5GiB", 2**29), ("3 tb", 3 * 10**12), ("17", 17)],
)
def test_amounts(amount: str | int, expected: int) -> None:
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize("amount", ["", "GiB", "-1GiB", "1.2.3MB", "2 apples", "1e3", None, -5])
def test_what_is_no_amount(amount: Any) -> None:
    with pytest.raises(UsageError, match="is no amount of memory: write it like '2GiB'"):
        parse_bytes(amount)


@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_are_as_large_as_what_autograd_saves(name: str) -> None:
    case = network(name)
    f = case.objective()
    f.hvp(torch.ones(f.n))
    parameters = list(f._graphs.parameters)
    own = {p.untyped_storage().data_ptr() for p in [*parameters, *f._term.constants.values()]}
    saved: dict[tuple[int, int], int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
            alive.append(tensor.detach())
        return tensor.detach()

    total = 0
    with f._term.session(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for batch in f._graphs.microbatches():
            saved.clear()
            graph = torch.autograd.grad(
                f._term(parameters, batch)[0], parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            total += sum(saved.values())
            del graph
    # Of the forward pass autograd also saves what only the value depends on.
    assert 0.9 * total <= f.memory.graphs <= total


class _Node(torch.autograd.Function):
    """The identity; its node in the graph can be watched, because it is a Python object."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Node.alive.add(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(_Node.apply(torch.sigmoid(self.first(x)))))


@pytest.mark.parametrize(("memory", "left"), [("0B", 0), ("1GiB", 3)])
def test_graphs_are_freed_without_the_garbage_collector(memory: str, left: int) -> None:
    f = Objective(_Watched(), nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2)), memory=memory, microbatch=3)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            f.hvp(torch.ones(f.n))
            assert len(_Node.alive) == left
        f.value(), f.gradient()
        assert len(_Node.alive) == left
        f.rounding_error(torch.ones(1, f.n))
        del f
        assert len(_Node.alive) == 0
    finally:
        gc.enable()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[], float]]:
    """Look at the resident size all the time; what is given tells how far it went above the start, in MiB."""
    # Once in small: threads, BLAS buffers and modules that are imported late are no matter of the budget.
    torchflat.sharpness(Objective(nn.Linear(512, 64), nn.MSELoss(), (torch.randn(512, 512), torch.randn(512, 64))))
    before = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: (peak - before) / MIB
    finally:
        done.set()
        watcher.join()


def _products(width: int, rows: int, budget: str) -> None:
    """Print how far 20 products and a run of up to 20 Lanczos steps go above what was resident before."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.ReLU())]
    model, data = nn.Sequential(*layers[:-1]), (torch.randn(rows, width), torch.randn(rows, width))
    with _watched() as peak:
        f = Objective(model, nn.MSELoss(), data, memory=budget)
        paths = set()
        for _ in range(20):
            f.hvp(torch.ones(f.n))
            paths.add(f.provenance()["products"])
        steps = []
        torchflat.sharpness(f, rtol=1e-9, budget=1e6, callback=lambda answer: steps.append(answer) or len(steps) == 20)
        paths.add(f.provenance()["products"])
    print(peak(), 4 * f.n / MIB, len(steps), *sorted(paths))


def _samples(width: int, rows: int, budget: str) -> None:
    """Print the same for a run on samples and shards, of a network whose Hessian is uuᵀ ⊗ 2XᵀX/rows."""
    spread = 1 - 0.9 * torch.arange(width).clamp(max=8) / 8
    model = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, 1, bias=False))
    data = torch.randn(rows, width).mul_(spread), torch.zeros(rows, 1)
    with _watched() as peak:
        f = Objective(model, nn.MSELoss(), data, params=["0.weight"], memory=budget, microbatch=250)
        answer = torchflat.sharpness(f, method="multilevel")
    print(peak(), 4 * f.n / MIB, answer.steps, answer.basis)


def _peak(scenario: str, width: int, rows: int, budget: str) -> tuple[float, float, int, set[str]]:
    """Peak above the start, and the parameters, in MiB; steps taken; which paths products took, or the basis."""
    command = [sys.executable, __file__, scenario, str(width), str(rows), budget]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(output[0]), float(output[1]), int(output[2]), set(output[3:])


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident size is read from /proc")


@needs_proc
def test_peak_memory_stays_within_the_budget_and_the_model() -> None:
    peak, model, steps, paths = _peak("products", 256, 1500, "80MiB")
    assert steps == 20 and "mixed" in paths
    assert peak <= 80 + model


@needs_proc
def test_peak_memory_of_samples_and_shards_stays_within_the_budget_and_the_model() -> None:
    peak, model, _, basis = _peak("samples", 400, 20_000, "100MiB")
    assert basis == {"shards"}
    assert peak <= 100 + model


@needs_proc
@pytest.mark.slow
def test_peak_memory_of_the_mnist_network_stays_within_the_budget_and_the_model() -> None:
    peak, model, steps, paths = _peak("products", 784, 10_000, "512MiB")
    assert steps >= 18 and "mixed" in paths
    assert peak <= 512 + model


if __name__ == "__main__":
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    {"products": _products, "samples": _samples}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
