"""Train on MNIST by SGD, Adam, SAM and NormalizedGD, and measure where they end: loss, test metric, λ₁, λ₁★, balance.

    python -m benchmarks.optimizers [--quick] [--network digits denoiser] [--seeds 3] [--out DIR] [--redo]
    python -m benchmarks.optimizers --report     # table and figure of what is on file, nothing measured

Needs MNIST (TORCHFLAT_DATA); SAM is that of ``pip install pytorch-optimizer``, left out if it is not installed.

Networks. ``digits``: the convolutional classifier that ships with torchflat (11 274 parameters, He-uniform as PyTorch
does it), the first 10 000 training images, cross-entropy, 8 epochs in batches of 50. ``denoiser``: six bias-free ReLU
layers 784 wide (3 687 936 parameters, He-normal), the first 4 000 training images with noise of standard deviation
1.25, the mean squared error of a pixel, 10 epochs in batches of 50.

Rules. All have the same epochs, batches and initial weights, seed by seed; no momentum, no weight decay, constant
rates except where it says cool-down: there the rate falls to 0 over the last quarter of the steps. NormalizedGD has its
default decay ¼. SAM, on top of SGD, takes two gradients a step; a second row gives it as many gradients as the others,
in half of the epochs. Each has the best setting of its grid, which is the one with the best metric at the end of the
run of seed 0, on training images that it has not seen (the 5 000 or 2 000 that follow). A setting that loses another
seed, which is to say diverges or ends with a network that always answers the same, gives way to the next best:

    digits    SGD lr 0.1, 0.3, 1; Adam lr 1e-3, 3e-3, 1e-2, 3e-2; SAM lr 0.3, 1 × ρ 0.05, 0.2;
              NormalizedGD lr 0.3, 1, 3, with and without cool-down
    denoiser  SGD lr 0.25, 0.5, 1, 2; Adam lr 1e-4, 3e-4, 1e-3, 3e-3; SAM lr 0.5, 1 × ρ 0.05, 0.2, and lr 2, ρ 0.05;
              NormalizedGD lr 0.3, 1, 3, 10, with and without cool-down

SGD with cool-down takes SGD's best, SAM in half of the epochs SAM's. λ₁ is of the loss on all rows trained on, with an
interval; λ₁★ of the first ``orbit_rows`` of them, by the Hessian, so that it is an upper bound where λ_min < 0.
Every run is one JSON file in ``--cache``, beside the weights, and not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.cells import Cell, Cells
from benchmarks.contenders import CONTENDERS, Setting, installed
from benchmarks.endings import Endings, report
from benchmarks.records import Record
from benchmarks.training import QUICK, TASKS, Task, Trainer
from torchflat.errors import TorchflatError

HERE = Path(__file__).parent


class Contest:
    """All cells of one network: settings are tried, the best runs with every seed, and where it ends is measured."""

    def __init__(self, cells: Cells, task: Task, contenders: Sequence[str], seeds: int) -> None:
        self.cells, self.task, self.contenders, self.seeds = cells, task, contenders, seeds

    def train(self) -> None:
        """Run the grids with seed 0 and the chosen settings with all seeds."""
        for name in self.contenders:
            for setting in self.task.grids.get(name, ()):
                self._measure(name, {**setting, "seed": 0})
        chosen: dict[str, Setting] = {}
        while chosen != (chosen := self._chosen()):  # one that loses a seed gives way to the next
            for name, setting in chosen.items():
                for seed in range(self.seeds):
                    self._measure(name, {**setting, "seed": seed})

    def time_steps(self) -> None:
        """Time the steps of all, in turn."""
        self._measure("all", {"measure": "steps"})

    def measure_ends(self, tuned: bool) -> None:
        """Measure the curvature at the end of the runs of those who have a grid of their own, or of the others."""
        chosen = {name: each for name, each in self._chosen().items() if (CONTENDERS[name].tuned_as is None) is tuned}
        for seed in range(self.seeds):
            for name, setting in chosen.items():
                if seed not in self._endings().lost(self.task.name, name, setting):
                    self._measure(name, {**setting, "seed": seed, "measure": "curvature"})

    def _measure(self, name: str, setting: Setting) -> Record:
        return self.cells.measure(Cell(self.task.name, self.task.rows, name, dict(setting)))

    def _endings(self) -> Endings:
        return Endings(self.cells.all())

    def _chosen(self) -> dict[str, Setting]:
        endings = self._endings()
        found = {name: endings.chosen(self.task.name, name) for name in self.contenders}
        return {name: setting for name, setting in found.items() if setting is not None}


def measure_all(options: argparse.Namespace, tasks: Sequence[Task], folder: Path) -> None:
    """Measure every cell, network by network, and at last the ends of those who are not tuned by themselves."""
    contenders = [name for name in CONTENDERS if installed(name)]
    if len(contenders) < len(CONTENDERS):
        print("not installed, left out: SAM: pip install pytorch-optimizer", file=sys.stderr)
    trainer = Trainer({task.name: task for task in tasks}, folder)
    with tqdm(desc="cells", unit="cell", file=sys.stderr) as bar:

        def execute(cell: Cell, limit: float | None) -> Record:
            bar.set_postfix_str(cell.name)
            record = trainer(cell, limit)
            bar.update()
            return record

        cells = Cells(folder, execute, options.redo)
        contests = [Contest(cells, task, contenders, options.seeds) for task in tasks]
        for contest in contests:
            contest.train()
            contest.time_steps()
            contest.measure_ends(tuned=True)
        for contest in contests:
            contest.measure_ends(tuned=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, small networks, two epochs; a minute")
    parser.add_argument("--network", nargs="+", choices=list(TASKS), default=list(TASKS), help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the table and the figure")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="folder of the cells and the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--redo", action="store_true", help="measure again what is on file")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "optimizers-quick" if options.quick else "optimizers"
    tasks = [task for task in (QUICK if options.quick else TASKS).values() if task.name in options.network]
    if not options.report:
        measure_all(options, tasks, options.cache / name)
    file = options.out / f"{name}.json"
    records = Cells(options.cache / name, lambda cell, limit: {}).all()
    if not records and file.exists():
        records = json.loads(file.read_text())
    print(report(records, file))


if __name__ == "__main__":
    try:
        main()
    except TorchflatError as error:
        sys.exit(str(error))
