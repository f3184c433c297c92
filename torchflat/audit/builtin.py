"""The tasks that come with torchflat, by the names that ``--task`` knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy, mse_loss

from torchflat.audit.task import Task
from torchflat.data import denoising, digit_classifier, mnist, relu_network, sample_digits

__all__ = ["digits", "mnist_classifier", "mnist_denoiser"]


def digits() -> Task:
    """Return the shipped digits and the network of the shipped checkpoint, mean cross-entropy; needs no other data."""
    return _classification("digits", "2 000 held-out MNIST digits that ship with torchflat", *sample_digits())


def mnist_classifier(rows: int = 10_000) -> Task:
    """Return the same network and loss as :func:`digits` on the first ``rows`` MNIST training images.

    Raises :class:`~torchflat.errors.DataError` where MNIST cannot be had.
    """
    return _classification("mnist-classifier", f"the first {rows} MNIST training images", *mnist("train", rows=rows))


def mnist_denoiser(rows: int = 10_000, depth: int = 6, noise: float = 1.25, seed: int = 0) -> Task:
    """Return the denoising of the first ``rows`` MNIST training images by a bias-free ReLU network, 784 wide.

    The input is the image plus white Gaussian noise of standard deviation ``noise``, the target the image, the loss
    the squared error averaged over images *and* pixels (T072). ``seed`` sets the noise and the weights.

    Raises :class:`~torchflat.errors.DataError` where MNIST cannot be had.
    """
    noisy, clean = denoising(mnist("train", rows=rows)[0], noise=noise, seed=seed)
    with _seeded(seed):
        model = relu_network(depth=depth)
    return Task(
        model=model,
        loss=mse_loss,
        data=(noisy, clean),
        name="mnist-denoiser",
        description=f"the first {rows} MNIST training images, noise of deviation {noise}; mean squared error",
        example_input=noisy[:1],
    )


def _classification(name: str, rows: str, images: torch.Tensor, labels: torch.Tensor) -> Task:
    images = images.view(-1, 1, 28, 28)
    with _seeded(0):
        model = digit_classifier()
    return Task(
        model=model,
        loss=cross_entropy,
        data=(images, labels),
        name=name,
        description=f"{rows}; mean cross-entropy",
        example_input=images[:1],
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` on the CPU inside, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
