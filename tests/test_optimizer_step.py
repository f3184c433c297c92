"""The C loop that ``benchmarks.optimizer_step`` measures against does what a step does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.optimizer_step import CHUNK, compiled_loop, runs_of, with_gradients
from torchflat.optim import NormalizedGD


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a C compiler"
)
def test_the_c_loop_takes_the_step_of_the_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(n) for n in (1, 33, CHUNK, 2 * CHUNK + 5)]
    ours, loop = with_gradients(tensors), with_gradients(tensors)
    for p, other in zip(ours, loop, strict=True):
        other.grad = p.grad
    NormalizedGD(ours, 0.5, decay=0).step()
    runs = runs_of(loop)
    square = compiled_loop(tmp_path).step(runs, len(runs), 0.5)
    assert len(runs) == 6
    assert square == pytest.approx(sum(p.grad.double().square().sum().item() for p in loop if p.grad is not None))
    for p, other, start in zip(ours, loop, tensors, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-6, atol=1e-7)
        assert not torch.equal(other, start)
