"""Gloo processes that run scenarios together, and what they are to agree on."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

import torchflat

# A rank that waits for the others in vain is a failure after so many seconds.
PATIENCE = 60


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


@contextlib.contextmanager
def started(size: int) -> Iterator[Ranks]:
    """So many processes, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(size, Path(folder))
        try:
            yield ranks
        finally:
            ranks.close()


def agree(ranks: Ranks, scenario: Callable[..., Any], *arguments: Any, rtol: float = 1e-5, atol: float = 1e-6) -> Any:
    """Every rank returns the same bits, which are to rounding those of this one process; return them."""
    answers = ranks(scenario, *arguments)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=0)
    torch.testing.assert_close(answers[0], scenario(*arguments), rtol=rtol, atol=atol)
    return answers[0]


def raised(answers: list[Any], kind: type[BaseException], *needles: str) -> None:
    for answer in answers:
        assert isinstance(answer, kind), answer
        for needle in needles:
            assert needle in str(answer)


class Digits(Dataset):  # type: ignore[type-arg]
    """Rows by index, with a count of those that were read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(29, 4, generator=generator), torch.randn(29, 1, generator=generator)
        self.read = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        return self.x[index], self.y[index]
