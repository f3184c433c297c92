"""Two and three processes give the answers of one, fail together, and never wait for each other in vain."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import network
from torch import Tensor, nn

import torchflat
from torchflat import Objective
from torchflat.distributed import Team
from torchflat.errors import DataError, NonFiniteError, UsageError

# A rank that waits for the others in vain is a failure after so many seconds.
PATIENCE = 60


# Processes that run scenarios -----------------------------------------------------------------------------------------


class Ranks:
    """Gloo processes, started once, that each call what they are told to."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "meeting"), there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, scenario: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``scenario`` returned, or the error it raised, on each rank."""
        for pipe in self.pipes:
            pipe.send((scenario, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                pytest.fail(f"rank {rank} is still waiting in {scenario.__name__}{arguments}")
            answers.append(pipe.recv())
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    while True:
        scenario, arguments = pipe.recv()
        try:
            answer = scenario(*arguments)
        except BaseException as error:
            answer = error
            if not isinstance(error, torchflat.errors.TorchflatError | KeyboardInterrupt):
                traceback.print_exc()
        pipe.send(answer)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(request.param, Path(folder))
        yield started
        started.close()


def agree(ranks: Ranks, scenario: Callable[..., Any], *arguments: Any, rtol: float = 1e-5, atol: float = 1e-6) -> Any:
    """Every rank returns the same bits, which are to rounding those of this one process; return them."""
    answers = ranks(scenario, *arguments)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=0)
    torch.testing.assert_close(answers[0], scenario(*arguments), rtol=rtol, atol=atol)
    return answers[0]


# The same answers -----------------------------------------------------------------------------------------------------

NETWORKS = ["relu", "conv", "batchnorm", "multihead", "tokens", "dict_batches", "weight_decay", "unused_and_scalar"]


def basics(name: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    f = network(name).objective(**options)
    v = torch.randn(f.n, 2, generator=torch.Generator().manual_seed(1)).to(f.dtype)
    answers = {"value": f.value(), "gradient": f.gradient(), "hvp": f.hvp(v), "again": f.hvp(v)}
    blocks = {(i,): torch.ones(size, dtype=f.dtype) for i, size in enumerate(f.layout.sizes)}
    products = f.block_products(blocks)
    answers["blocks"] = torch.cat([products[block] for block in blocks])
    answers["moved"] = f.at(1.01 * f.x).gradient()
    answers["rows"] = f.rows
    answers["sha"] = [float(int(digit, 16)) for digit in f.fingerprint()]
    return answers


@pytest.mark.parametrize("name", NETWORKS)
def test_value_gradient_and_products_are_those_of_one_process(ranks: Ranks, name: str) -> None:
    agree(ranks, basics, name, {})
