"""Time Hessian-vector products of one process against several that share the rows, one thread each.

    python -m benchmarks.processes [--processes 2] [--rounds 5] [--rows 4000] [--width 784] [--depth 6]

On a ReLU network of `depth` layers, graphs retained. One process and the team of all run in turn, round by round, so
that a busy moment hits both; a speedup is the median over the rounds. Where other programs share the cores, the second
one, in processor time of rank 0 instead of time on the clock, tells what a quiet machine would come near to. Target for
2 processes on 2 cores: 1.7.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from torchflat import Objective


def seconds(f: Objective, v: torch.Tensor) -> tuple[float, float]:
    """One product, on the clock and in processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    f.hvp(v)
    return time.perf_counter() - clock, time.process_time() - processor


def member(rank: int, settings: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=settings.processes)
    torch.manual_seed(0)
    layers = [(nn.Linear(settings.width, settings.width), nn.ReLU()) for _ in range(settings.depth)]
    model = nn.Sequential(*(layer for pair in layers for layer in pair))
    data = torch.rand(settings.rows, settings.width), torch.rand(settings.rows, settings.width)
    team = Objective(model, nn.MSELoss(), data, memory="16GiB")
    alone = Objective(model, nn.MSELoss(), data, memory="16GiB", group="alone")
    v = torch.randn(team.n)
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "team": []}
    for _ in range(settings.rounds + 1):  # the first one builds the graphs
        if rank == 0:
            times["alone"].append(seconds(alone, v))
        dist.barrier()
        times["team"].append(seconds(team, v))
    if rank == 0:
        for index, kind in enumerate(("clock", "processor")):
            one, all_ = ([pair[index] for pair in times[name][1:]] for name in ("alone", "team"))
            speedup = statistics.median(a / b for a, b in zip(one, all_, strict=True))
            print(
                f"{kind:9}  1 process {1e3 * statistics.median(one):6.0f} ms  "
                f"{settings.processes} processes {1e3 * statistics.median(all_):6.0f} ms  speedup {speedup:.2f}"
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 2), ("rounds", 5), ("rows", 4000), ("width", 784), ("depth", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(member, (settings, f"{folder}/meeting"), nprocs=settings.processes)


if __name__ == "__main__":
    main()
