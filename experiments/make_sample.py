"""Make the files that ship in ``torchflat/data/sample``: 2 000 MNIST test digits and a classifier trained on MNIST.

    python -m experiments.make_sample --out DIR

Reads full MNIST (see :func:`torchflat.data.mnist`), takes a minute on two cores, and prints the accuracy on the test
split. The same machine, torch version and thread count give the same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from torch import nn
from tqdm import trange

from torchflat.data import digit_classifier, mnist
from torchflat.errors import TorchflatError, UsageError

PER_DIGIT = 200
BATCH, PEAK_LR, MOMENTUM, WEIGHT_DECAY = 100, 0.05, 0.9, 5e-4


def spread_over_classes(labels: torch.Tensor, per_class: int) -> torch.Tensor:
    """Return the sorted rows of ``per_class`` members of each of ten classes, evenly spread from first to last.

    Evenly, because the first half of MNIST's test split is easier than the second.
    """
    chosen = []
    for digit in range(10):
        members = (labels == digit).nonzero().flatten()
        chosen.append(members[torch.linspace(0, len(members) - 1, per_class, dtype=torch.float64).round().long()])
    return torch.cat(chosen).sort().values


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> nn.Module:
    """Return a classifier trained by SGD with momentum on shuffled batches, the step falling to zero as a cosine."""
    torch.manual_seed(seed)
    model = digit_classifier()
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in trange(epochs, desc="training", unit="epoch", disable=None):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of ``images`` whose largest logit is at the label."""
    return float((model(images).argmax(1) == labels).double().mean())


def main(out: Path, epochs: int = 12, seed: int = 0, force: bool = False) -> None:
    """Train on the training split, cut the sample out of the test split, and write both.

    Args:
        out: folder that gets digits.npz and classifier.safetensors.
        epochs: passes over the 60 000 training images.
        seed: of the initial weights and the order of the batches.
        force: write over files that are there.
    """
    digits_file, classifier_file = out / "digits.npz", out / "classifier.safetensors"
    if not force and (digits_file.exists() or classifier_file.exists()):
        raise UsageError(f"{out} already holds a sample: give another --out, or --force to write over it")
    out.mkdir(parents=True, exist_ok=True)

    train_images, train_labels = mnist("train")
    test_images, test_labels = mnist("test")
    rows = spread_over_classes(test_labels, PER_DIGIT)
    model = train(train_images.view(-1, 1, 28, 28), train_labels, epochs, seed)

    test_images = test_images.view(-1, 1, 28, 28)
    on_test = accuracy(model, test_images, test_labels)
    on_sample = accuracy(model, test_images[rows], test_labels[rows])
    print(f"accuracy: {on_test:.4f} on the 10 000 test images, {on_sample:.4f} on the {len(rows)} of the sample")

    pixels = (test_images[rows, 0] * 255).round().to(torch.uint8)
    np.savez_compressed(digits_file, images=pixels.numpy(), labels=test_labels[rows].to(torch.uint8).numpy())
    metadata = {
        "model": "torchflat.data.digit_classifier",
        "trained_on": "the 60 000 MNIST training images, pixels in [0, 1]",
        "loss": "mean cross-entropy",
        "optimizer": f"SGD, lr {PEAK_LR} to 0 by cosine, momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}",
        "batch": BATCH,
        "epochs": epochs,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "test_accuracy": on_test,
        "sample_accuracy": on_sample,
        "torch": torch.__version__,
        "made_by": "python -m experiments.make_sample",
    }
    # One entry, because safetensors writes several in an order that changes from run to run.
    save_file(model.state_dict(), classifier_file, metadata={"training": json.dumps(metadata)})
    for file in (digits_file, classifier_file):
        print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except TorchflatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
