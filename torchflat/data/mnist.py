"""MNIST as tensors, read from the idx files that torchvision lays down; and the denoising data made from it.

The files are looked for in ``<root>/MNIST/raw/``, plain or gzipped. Reading them takes torch alone; torchvision is
only asked to download what is missing.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import torch

from torchflat.errors import DataError, UsageError

__all__ = ["denoising", "mnist", "mnist_folder", "read_idx"]

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def mnist(
    split: str = "train", root: str | os.PathLike[str] | None = None, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(images, labels)`` of one split: images (N, 784) float32 in [0, 1], labels (N,) int64 in 0..9.

    ``split`` is ``"train"`` (60 000) or ``"test"`` (10 000); ``rows`` keeps the first that many. ``root`` is the folder
    that holds ``MNIST/raw/``; it defaults to the environment variable ``TORCHFLAT_DATA``, and without that to
    ``~/.cache/torchflat``. What is not there is downloaded into it by torchvision.

    Raises :class:`~torchflat.errors.DataError` where MNIST can neither be found nor downloaded, where a file is
    damaged, or where fewer than ``rows`` images are there.
    """
    if split not in _FILES:
        raise UsageError(f"split is {split!r}: use 'train' or 'test'")
    folder, found = mnist_folder(root, split)
    if not found:
        _download(folder)
    image_file, label_file = (_path(folder, name) for name in _FILES[split])
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{image_file} and {label_file} hold arrays of shape {tuple(images.shape)} and {tuple(labels.shape)}, "
            "not (N, 28, 28) and (N,): fetch MNIST again"
        )
    if rows is not None and not 1 <= rows <= len(images):
        raise DataError(f"rows is {rows}: the {split} split of MNIST has 1 to {len(images)} to give")
    # Rows are cut while they are bytes, so that 10 000 rows never hold the memory of 60 000 floats.
    return images[:rows].flatten(1).to(torch.float32).div_(255), labels[:rows].to(torch.int64)


def mnist_folder(root: str | os.PathLike[str] | None = None, split: str | None = None) -> tuple[Path, bool]:
    """Return the folder in which MNIST is looked for, and whether ``split`` (default: both) is there."""
    folder = Path(root or os.environ.get("TORCHFLAT_DATA") or "~/.cache/torchflat").expanduser()
    names = _FILES[split] if split else sum(_FILES.values(), ())
    return folder, all(_path(folder, name).is_file() for name in names)


def denoising(images: torch.Tensor, noise: float = 1.25, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(noisy, clean)``: ``images`` plus white Gaussian noise of standard deviation ``noise``, and ``images``.

    The noise depends on ``seed`` and the shape only; the global random state is left alone.

    >>> noisy, clean = denoising(torch.zeros(1000, 784), noise=1.25)
    >>> round(noisy.std().item(), 2), clean.any().item()
    (1.25, False)
    """
    generator = torch.Generator().manual_seed(seed)
    return images + noise * torch.randn(images.shape, generator=generator, dtype=images.dtype), images


def read_idx(path: str | os.PathLike[str]) -> torch.Tensor:
    """Return the uint8 array in an idx file, gzipped if its name ends in ``.gz``.

    The format: two zero bytes, the type (8 for uint8), the number d of dimensions, d sizes as big-endian 32-bit
    integers, then the entries, last index fastest. Raises :class:`~torchflat.errors.DataError`, naming the file, where
    it cannot be read or is anything else.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch MNIST again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is no idx file of bytes (it starts with {content[:4].hex(' ')}): fetch MNIST again")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    announced = start + math.prod(shape)
    if len(content) != announced:
        raise DataError(
            f"{path} is truncated or damaged: its header announces {announced} bytes, it has {len(content)}; "
            "fetch MNIST again"
        )
    # A bytearray, because torch warns of memory that it may not write to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def _path(folder: Path, name: str) -> Path:
    plain = folder / "MNIST" / "raw" / name
    zipped = plain.with_name(name + ".gz")
    return zipped if zipped.is_file() and not plain.is_file() else plain


def _download(folder: Path) -> None:
    try:
        from torchvision.datasets import MNIST

        MNIST(folder, download=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"MNIST is not in {folder} and cannot be downloaded ({reason}): set TORCHFLAT_DATA to a folder that holds "
            f"MNIST/raw/{_FILES['train'][0]} and its three siblings, or install torchvision with network access"
        ) from error
