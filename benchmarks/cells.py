"""One measurement, in a process of its own, kept as one JSON file; what is on file is not measured again.

A cell is a network, a number of rows, a method and its setting. Its process loads the network, times a plain gradient
over all rows, solves, and times the gradient again, so that seconds can be told in gradients. Memory is the largest
resident size while it solves less that right after loading.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.methods import METHODS, PEERS, Method, Record, Setting
from benchmarks.networks import NETWORKS, Problem
from torchflat.objective.memory import return_freed_pages

__all__ = ["Cell", "Cells", "in_a_process"]

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_ROWS = 16
GRADIENTS = 21
PROBE_ROWS = 2000
PROBE_MEMORY = 12 << 30


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured. The setting also holds ``threads``, ``processes`` and the ``order`` of the rows, if given."""

    network: str
    rows: int
    method: str
    setting: Setting

    @property
    def name(self) -> str:
        """The name of its file, without suffix."""
        setting = "-".join(f"{key}={value}" for key, value in sorted(self.setting.items())) or "default"
        return re.sub(r"[^\w.=+-]", "_", f"{self.network}-{self.rows}-{self.method}-{setting}")


Execute = Callable[[Cell, float | None], Record]


class Cells:
    """The folder of measured cells. ``execute`` measures one, stopped at a number of gradients if one is given."""

    def __init__(self, folder: Path, execute: Execute, redo: bool = False) -> None:
        self.folder, self._execute, self._redo = folder, execute, redo
        self._new: set[str] = set()

    def measure(self, cell: Cell, limit: float | None = None) -> Record:
        """Return the cell's record: from its file, unless there is none or it tells of a failure."""
        file = self.folder / f"{cell.name}.json"
        if file.exists() and (not self._redo or cell.name in self._new):
            record: Record = json.loads(file.read_text())
            if record["status"] != "failed" or cell.name in self._new:
                return record
        record = {**dataclasses.asdict(cell), **self._execute(cell, limit)}
        self._new.add(cell.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.rename(file)
        return record

    def all(self) -> list[Record]:
        """Return every record on file."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))]


# The parent's side ----------------------------------------------------------------------------------------------------


def in_a_process(cache: Path, threads: int) -> Execute:
    """Return what measures a cell in a fresh process, or in several under ``torchrun``."""

    def execute(cell: Cell, limit: float | None) -> Record:
        module = ["-m", "benchmarks.cells", json.dumps(dataclasses.asdict(cell)), "--cache", str(cache)]
        module += ["--threads", str(threads)] + ([] if limit is None else ["--limit", str(limit)])
        processes = cell.setting.get("processes")
        if processes is not None:
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
                "--no-python",
            ]
            module = [*launcher, sys.executable, *module]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *module], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        for line in reversed(done.stdout.splitlines()):
            if done.returncode == 0 and line.startswith("{"):
                record: Record = json.loads(line)
                return record
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"status": "failed", "error": f"exit code {done.returncode}: {last}", "value": None}

    return execute


# The child's side -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The time that was allowed is over."""


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise :class:`Stopped` inside the block when the time is over."""

    def stop(*_: object) -> None:
        raise Stopped

    if seconds < math.inf:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def gradient_seconds(problem: Problem) -> float:
    """Time the gradient over all rows as one would write it in plain torch; the median over about a second."""
    parameters = list(problem.model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    times: list[float] = []
    while sum(times) < 1 and len(times) < GRADIENTS:
        start = time.perf_counter()
        for inputs, targets in problem.batches(problem.batch):
            loss = problem.loss(problem.model(inputs), targets) * (len(inputs) / problem.rows)
            torch._foreach_add_(total, torch.autograd.grad(loss, parameters))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(cell: Cell, cache: Path, threads: int, limit: float) -> Record:
    """Measure the cell in this process, stopped after ``limit`` gradients' time."""
    method, setting = METHODS[cell.method], cell.setting
    unit_threads = setting.get("threads", threads) if "processes" in setting else threads
    torch.set_num_threads(unit_threads)
    method.load()
    problem = NETWORKS[cell.network].load(cell.rows, cache, setting.get("order", "given"))
    few = problem.first(WARM_UP_ROWS)
    gradient_seconds(few)
    warm_up(method, few, setting)
    gc.collect()
    return_freed_pages()
    loaded = resident()

    with one_at_a_time():
        before = gradient_seconds(problem)
    gc.collect()
    return_freed_pages()
    forget_peak()
    torch.set_num_threads(setting.get("threads", threads))
    start = time.perf_counter()
    try:
        with stopped_after(limit * before):
            if "probe" in setting:
                found = probe(method, problem, threads)
            else:
                found = {"status": "finished", **method.solve(problem, setting)}
    except Stopped:
        found = {"status": "stopped", "value": None}
    seconds = time.perf_counter() - start
    peak = peak_resident() - loaded
    torch.set_num_threads(unit_threads)
    with one_at_a_time():
        after = gradient_seconds(problem)
    unit = (before + after) / 2
    return {
        **found,
        "seconds": seconds,
        "gradient_seconds": [before, after],
        "gradients": seconds / unit,
        "limit_gradients": limit if limit < math.inf else None,
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "problem": problem.fingerprint(),
        **environment(threads),
    }


def warm_up(method: Method, few: Problem, setting: Setting) -> None:
    """Take one product on few rows, so that no one's first-call imports are timed."""
    method.product(few, {"batch": few.rows})()
    for parameter in few.model.parameters():
        parameter.grad = None


def probe(method: Method, problem: Problem, threads: int) -> Record:
    """Find the batch size and the number of threads at which a product takes least time per row.

    A batch size is judged on a part of the data. All rows as one batch count too where the method keeps that graph and
    the largest batch tried says that it fits into memory.
    """

    def seconds(part: Problem, batch: int, threads: int) -> float:
        torch.set_num_threads(threads)
        product = method.product(part, {"batch": batch})
        times = []
        for _ in range(2):
            start = time.perf_counter()
            product()
            times.append((time.perf_counter() - start) * problem.rows / part.rows)
        return min(times)

    tried: list[Record] = []
    bytes_per_row = 0.0
    for batch in (each for each in problem.candidates if each <= problem.rows and problem.rows % each == 0):
        part = problem.first(max(batch, PROBE_ROWS // batch * batch))
        before, _ = resident(), forget_peak()
        tried.append({"batch": batch, "threads": threads, "seconds": seconds(part, batch, threads)})
        bytes_per_row = max(0, peak_resident() - before) / batch
        drop_graphs(problem)
    # A graph that is kept leaves no room behind while a product goes through it: a quarter more.
    fits = method.whole and 1.25 * bytes_per_row * problem.rows < PROBE_MEMORY
    if not tried or (fits and tried[-1]["batch"] < problem.rows):
        tried.append({"batch": problem.rows, "threads": threads, "seconds": seconds(problem, problem.rows, threads)})
        drop_graphs(problem)
    best = min(tried, key=lambda each: each["seconds"])
    if threads > 1:
        part = problem if best["batch"] == problem.rows else problem.first(max(best["batch"], PROBE_ROWS))
        tried.append({"batch": best["batch"], "threads": 1, "seconds": seconds(part, best["batch"], 1)})
    best = min(tried, key=lambda each: each["seconds"])
    return {"status": "finished", "value": None, "tried": tried, "best": {k: best[k] for k in ("batch", "threads")}}


def drop_graphs(problem: Problem) -> None:
    """Free what ``backward(create_graph=True)`` left in the gradients, a reference cycle."""
    for parameter in problem.model.parameters():
        parameter.grad = None
    gc.collect()
    return_freed_pages()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Run the block on every rank in turn, rank 0 first, if there are several."""
    if not torch.distributed.is_initialized():
        yield
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for turn in range(world):
        if turn == rank:
            yield
        torch.distributed.barrier()


# Memory, in bytes. Linux tells both and can forget the peak; elsewhere there is only the peak since the start.


def resident() -> int:
    return status_bytes("VmRSS")


def peak_resident() -> int:
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    file = Path("/proc/self/status")
    if not file.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    match = re.search(rf"{field}:\s+(\d+) kB", file.read_text())
    assert match is not None
    return 1024 * int(match[1])


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def environment(threads: int) -> Record:
    """Return what the numbers depend on."""
    packages = ["torch", "scipy", "numpy", *(peer.distribution for peer in PEERS.values())]
    import torchflat

    return {
        "versions": {"torchflat": torchflat.__version__, **dict(map(version, packages))},
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "default_threads": threads,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> tuple[str, str | None]:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package, None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one cell, and print its record as one line of JSON.")
    parser.add_argument("cell", type=json.loads)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--limit", type=float, default=math.inf)
    options = parser.parse_args()
    several = "WORLD_SIZE" in os.environ
    if several:
        torch.distributed.init_process_group("gloo")
    record = measure(Cell(**options.cell), options.cache, options.threads, options.limit)
    if not several or torch.distributed.get_rank() == 0:
        print(json.dumps(record), flush=True)
    if several:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
