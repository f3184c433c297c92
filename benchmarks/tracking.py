"""What tracking costs, as a share of the training that it watches: ``python -m benchmarks.tracking``.

The MNIST denoiser (six bias-free ReLU layers, 784 wide) is trained by SGD at batches of 100. Balance is timed step by
step: two copies of the network take the same steps in turn, one of them tracked, so that a busy moment hits both. What
was read is worked out once in 64 steps, so that 64 are taken together; the share is the median over such stretches of
tracked/plain − 1. Sharpness is timed over one run, with λ₁ of the first rows every 100 steps: the share is the time
within the follower over that of the whole run. MNIST is found as :func:`torchflat.data.mnist` says.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchflat import Objective
from torchflat.data import denoising, mnist, relu_network
from torchflat.optim import NormalizedGD, Tracker

BATCH, EVERY = 100, 100
MOST_BALANCE, MOST_SHARPNESS = 0.05, 0.15
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5),
    "NormalizedGD": lambda params: NormalizedGD(params, lr=0.5),
    "Adam": lambda params: torch.optim.Adam(params, lr=3e-4),
}


class Training:
    """One network under training, a step at a time."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, optimizer: str, noisy: Tensor, clean: Tensor) -> None:
        torch.manual_seed(0)
        self.model, self.loss = relu_network(), nn.MSELoss()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.noisy, self.clean, self.steps = noisy, clean, 0

    def step(self) -> float:
        """Take a step, and return its seconds."""
        rows = torch.arange(self.steps * BATCH, (self.steps + 1) * BATCH) % len(self.noisy)
        x, y = self.noisy[rows], self.clean[rows]
        start = self.clock()
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.optimizer.step()
        self.steps += 1
        return self.clock() - start


def balance(optimizer: str, data: tuple[Tensor, Tensor], stretches: int) -> None:
    plain, tracked = (Training(optimizer, *data) for _ in range(2))
    with Tracker(tracked.model, tracked.optimizer) as tracker:
        for training in (plain, tracked):
            for _ in range(3):  # the laws are found at the first step
                training.step()
        times = []
        for _ in range(stretches):
            spent = {plain: 0.0, tracked: 0.0}
            for index in range(tracker.stretch):
                for training in (plain, tracked) if index % 2 else (tracked, plain):
                    spent[training] += training.step()
            times.append((spent[plain] / tracker.stretch, spent[tracked] / tracker.stretch))
    share = statistics.median(b / a for a, b in times) - 1
    least = min(b for _, b in times) / min(a for a, _ in times) - 1
    a, b = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    verdict = "met" if share <= MOST_BALANCE else "MISSED"
    print(
        f"balance every step, {optimizer:13} {a:7.1f} ms plain {b:7.1f} ms tracked  share {100 * share:5.1f} % "
        f"(of the fastest stretches {100 * least:.1f} %), at most {100 * MOST_BALANCE:.0f} %: {verdict}"
    )


def sharpness(data: tuple[Tensor, Tensor], rows: int, steps: int) -> None:
    training = Training("SGD", *data)
    objective = Objective(training.model, training.loss, (data[0][:rows], data[1][:rows]))
    # All of the time that it asks for, to see what it costs; within a share it would wait, and keep the share.
    for limit in (float("inf"), MOST_SHARPNESS):
        training = Training("SGD", *data)
        start = time.perf_counter()
        with Tracker(
            training.model, training.optimizer, objective=objective, sharpness_every=EVERY, sharpness_share=limit
        ) as tracker:
            for _ in range(steps):
                training.step()
        total = time.perf_counter() - start
        spent = tracker._follower.spent if tracker._follower else 0.0
        known = sum(value is not None for value in tracker.history["sharpness"])
        share = spent / total
        verdict = "" if limit > 1 else f", at most {100 * limit:.0f} %: {'met' if share <= limit else 'MISSED'}"
        print(
            f"λ₁ of {rows} rows every {EVERY} of {steps} steps, sharpness_share={limit:g}: {known} readings, "
            f"{100 * share:.1f} % of the run{verdict}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stretches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="count seconds of the processor, on a busy machine")
    options = parser.parse_args()
    if options.cpu:
        Training.clock = staticmethod(time.process_time)
    torch.set_num_threads(options.threads)
    images, _ = mnist(rows=10_000)
    data = denoising(images)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for optimizer in OPTIMIZERS:
        balance(optimizer, data, options.stretches)
    if options.steps:
        sharpness(data, options.rows, options.steps)


if __name__ == "__main__":
    main()
