"""What ships inside the package: 2 000 MNIST test digits, and a small classifier that was trained without them."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import numpy as np
import torch

__all__ = ["sample_checkpoint", "sample_digits"]


def sample_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(images, labels)``: images (2000, 784) float32 in [0, 1], labels (2000,) int64, 200 of each digit.

    They are MNIST *test* digits, spread evenly over that split: :func:`sample_checkpoint` has not seen them.

    >>> images, labels = sample_digits()
    >>> labels.bincount().tolist()
    [200, 200, 200, 200, 200, 200, 200, 200, 200, 200]
    """
    with np.load(_shipped("digits.npz"), allow_pickle=False) as arrays:
        images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    return images.flatten(1).to(torch.float32).div_(255), labels.to(torch.int64)


def sample_checkpoint() -> Path:
    """Return the path of the trained :func:`~torchflat.data.digit_classifier`, a safetensors file.

    How it was trained is in the file's metadata.
    """
    return _shipped("classifier.safetensors")


def _shipped(name: str) -> Path:
    return Path(str(importlib.resources.files(__name__) / name))
