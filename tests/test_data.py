"""The MNIST reader, the denoising data, the small networks, the shipped sample, and the built-in tasks."""

from __future__ import annotations

import gzip
import json
import os
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.torch import load_file

from experiments.make_sample import accuracy, spread_over_classes
from torchflat.audit.task import BUILTIN, Task, load_task
from torchflat.data import denoising, digit_classifier, mnist, read_idx, relu_network, sample_checkpoint, sample_digits
from torchflat.errors import DataError, UsageError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(array: np.ndarray) -> bytes:
    """Write an idx file of bytes, by the format's own description."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_split(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES[split], (images, labels), strict=True):
        (raw / name).write_bytes(idx(array))


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def small_root(tmp_path: Path) -> Path:
    """Two training images, one black with a white last pixel and one grey, labelled 7 and 3; one test image."""
    images = np.zeros((2, 28, 28), np.uint8)
    images[0, 27, 27] = 255
    images[1] = 51
    write_split(tmp_path, "train", images, np.array([7, 3]))
    write_split(tmp_path, "test", np.full((1, 28, 28), 102), np.array([9]))
    return tmp_path


# --- idx files ---------------------------------------------------------------------------------------------------


def test_idx_of_known_bytes(tmp_path: Path) -> None:
    file = tmp_path / "known"
    file.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    array = read_idx(file)
    assert array.dtype == torch.uint8
    assert array.tolist() == [[1, 2, 3], [4, 5, 255]]


@given(arrays(np.uint8, array_shapes(max_dims=4, max_side=5)), st.booleans())
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, zipped: bool) -> None:
    file = tmp_path_factory.mktemp("idx") / ("array.gz" if zipped else "array")
    file.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    assert np.array_equal(read_idx(file).numpy(), array)


GOOD = idx(np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty", b"", "no idx file"),
        ("short-header", GOOD[:6], "truncated"),
        ("cut", GOOD[:-1], "announces 24 bytes, it has 23"),
        ("padded", GOOD + b"\0", "announces 24 bytes, it has 25"),
        ("huge", struct.pack(">HBB4I", 0, 8, 4, *[2**32 - 1] * 4), "truncated"),
        ("floats", b"\0\0\x0d" + GOOD[3:], "starts with 00 00 0d 02"),
        ("page", b"<html>not found</html>", "no idx file"),
        ("cut.gz", gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
        ("plain.gz", GOOD, "cannot be read"),
        ("garbled.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(file)
    message = str(caught.value)
    assert str(file) in message and complaint in message and "\n" not in message


# --- mnist -------------------------------------------------------------------------------------------------------


def test_mnist_reads_torchvision_layout(small_root: Path) -> None:
    images, labels = mnist("train", root=small_root)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.shape == (2, 784) and labels.tolist() == [7, 3]
    assert images[0].nonzero().tolist() == [[783]] and images[0, 783] == 1
    assert torch.equal(images[1], torch.full((784,), 0.2))
    images, labels = mnist("test", root=small_root)
    assert torch.equal(images, torch.full((1, 784), 0.4)) and labels.tolist() == [9]


def test_mnist_reads_gzipped_files(small_root: Path) -> None:
    plain = mnist("train", root=small_root)
    for name in FILES["train"]:
        file = small_root / "MNIST" / "raw" / name
        file.with_name(name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    for one, other in zip(plain, mnist("train", root=small_root), strict=True):
        assert torch.equal(one, other)


def test_mnist_root_defaults_to_the_environment(small_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFLAT_DATA", str(small_root))
    assert mnist("test")[1].tolist() == [9]


def test_mnist_root_wins_over_the_environment(small_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFLAT_DATA", str(small_root / "elsewhere"))
    assert mnist("test", root=small_root)[1].tolist() == [9]


def test_mnist_rows(small_root: Path) -> None:
    images, labels = mnist("train", root=small_root, rows=1)
    assert images.shape == (1, 784) and labels.tolist() == [7]
    for rows in (0, -1, 3):
        with pytest.raises(DataError, match=rf"rows is {rows}: .* 1 to 2"):
            mnist("train", root=small_root, rows=rows)


def test_mnist_unknown_split(small_root: Path) -> None:
    with pytest.raises(UsageError, match="'val'"):
        mnist("val", root=small_root)


def test_mnist_labels_must_match_images(small_root: Path) -> None:
    write_split(small_root, "train", np.zeros((2, 28, 28)), np.array([1, 2, 3]))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte hold arrays of shape \(2, 28, 28\) and \(3,\)"):
        mnist("train", root=small_root)


def test_mnist_truncated_file_is_named(small_root: Path) -> None:
    file = small_root / "MNIST" / "raw" / FILES["test"][0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is truncated"):
        mnist("test", root=small_root)


@pytest.mark.usefixtures("without_torchvision")
def test_missing_mnist_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFLAT_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        mnist("train")
    message = str(caught.value)
    assert str(tmp_path / ".cache" / "torchflat") in message
    assert "set TORCHFLAT_DATA to a folder that holds MNIST/raw/train-images-idx3-ubyte" in message
    assert "install torchvision with network access" in message
    assert "\n" not in message


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, fetch: Callable[[Path], None]) -> None:
    def dataset(root: Path, download: bool) -> None:
        assert download
        fetch(Path(root))

    datasets = types.ModuleType("torchvision.datasets")
    vars(datasets)["MNIST"] = dataset
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_missing_mnist_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = []

    def fetch(root: Path) -> None:
        roots.append(root)
        write_split(root, "test", np.zeros((1, 28, 28)), np.array([4]))

    fake_torchvision(monkeypatch, fetch)
    for _ in range(2):
        assert mnist("test", root=tmp_path)[1].tolist() == [4]
    assert roots == [tmp_path]


@pytest.mark.parametrize("failure", [RuntimeError("no mirror\nanswers"), PermissionError("read-only"), OSError()])
def test_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fetch(root: Path) -> None:
        raise failure

    fake_torchvision(monkeypatch, fetch)
    with pytest.raises(DataError, match="TORCHFLAT_DATA") as caught:
        mnist("test", root=tmp_path)
    message = str(caught.value)
    assert (str(failure).replace("\n", " ") or "OSError") in message and "\n" not in message


# --- denoising ---------------------------------------------------------------------------------------------------


def test_denoising_adds_white_noise_of_the_given_size() -> None:
    images = torch.rand(500, 784, generator=torch.Generator().manual_seed(1))
    noisy, clean = denoising(images, noise=1.25)
    assert torch.equal(clean, images)
    noise = (noisy - clean).double()
    # 392 000 draws: the standard errors are 0.0020 (mean) and 0.0014 (deviation); five of them.
    assert abs(noise.mean().item()) < 0.010 and abs(noise.std().item() - 1.25) < 0.007


def test_denoising_depends_on_the_seed_alone() -> None:
    images = torch.zeros(3, 784)
    state = torch.random.get_rng_state()
    first = denoising(images, seed=5)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(10)
    assert torch.equal(denoising(images, seed=5)[0], first)
    assert not torch.equal(denoising(images, seed=6)[0], first)


def test_denoising_without_noise_is_the_identity() -> None:
    images = torch.rand(2, 784)
    assert torch.equal(denoising(images, noise=0.0)[0], images)


# --- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_identity_network_is_relu_of_its_input(depth: int) -> None:
    x = torch.tensor([[-1.0, 2.0, -3.0]])
    network = relu_network(depth=depth, width=3, bias=True, init="identity")
    # The last layer has no ReLU, so one layer alone is the identity.
    assert torch.equal(network(x), x if depth == 1 else x.relu())


def test_he_network_has_the_variance_of_its_name() -> None:
    torch.manual_seed(0)
    network = relu_network()
    weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
    assert [tuple(w.shape) for w in weights] == [(784, 784)] * 6
    assert sum(p.numel() for p in network.parameters()) == 6 * 614_656
    for weight in weights:
        # The variance of 614 656 normal draws is known to 0.18 % (one standard error).
        assert weight.var().item() == pytest.approx(2 / 784, rel=0.01)


def test_default_network_is_that_of_torch() -> None:
    torch.manual_seed(3)
    network = relu_network(depth=2, width=4, bias=True, init="default")
    torch.manual_seed(3)
    expected = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    for layer, plain in zip((network[0], network[2]), expected, strict=True):
        assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 0}, {"init": "xavier"}])
def test_network_options_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        relu_network(**wrong)  # type: ignore[arg-type]


# --- the shipped sample ------------------------------------------------------------------------------------------


def trained_classifier() -> torch.nn.Module:
    model = digit_classifier()
    model.load_state_dict(load_file(sample_checkpoint()))
    return model


def test_sample_digits_are_what_they_say() -> None:
    images, labels = sample_digits()
    assert images.shape == (2000, 784) and images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [200] * 10
    assert len(images.unique(dim=0)) == 2000
    # The test split opens with 7, 2, 1, 0, 4, and the sample takes the first of every digit.
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_shipped_classifier_reads_the_shipped_digits() -> None:
    images, labels = sample_digits()
    model = trained_classifier()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    measured = accuracy(model, images.view(-1, 1, 28, 28), labels)
    assert measured > 0.97
    with safe_open(sample_checkpoint(), "pt") as file:
        training = json.loads(file.metadata()["training"])
    # A near tie may fall the other way on another machine's arithmetic.
    assert measured == pytest.approx(training["sample_accuracy"], abs=1e-3)
    assert training["test_accuracy"] >= 0.98
    assert training["seed"] == 0 and training["torch"] and training["model"] == "torchflat.data.digit_classifier"


def test_sample_is_small_and_says_its_licence() -> None:
    folder = sample_checkpoint().parent
    shipped = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
    assert set(shipped) == {"README.md", "classifier.safetensors", "digits.npz"}
    assert sum(shipped.values()) <= 400_000
    note = (folder / "README.md").read_text(encoding="utf-8")
    for fact in ("Yann LeCun", "Corinna Cortes", "Attribution-Share Alike 3.0", "experiments.make_sample"):
        assert fact in note


def test_spread_takes_first_and_last_of_every_class() -> None:
    labels = torch.arange(10).repeat(7)
    rows = spread_over_classes(labels, per_class=3)
    assert rows.tolist() == [*range(10), *range(30, 40), *range(60, 70)]


# --- built-in tasks ----------------------------------------------------------------------------------------------


@pytest.fixture
def twenty_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    write_split(tmp_path, "train", images, np.arange(20) % 10)
    monkeypatch.setenv("TORCHFLAT_DATA", str(tmp_path))
    return images


def task_loss(task: Task, model: torch.nn.Module) -> float:
    inputs, targets = task.data
    assert task.loss is not None
    return task.loss(model(inputs), targets).item()


@pytest.mark.parametrize("name", sorted(BUILTIN))
@pytest.mark.usefixtures("twenty_images")
def test_every_builtin_task_loads_and_carries_its_name(name: str) -> None:
    task = load_task(name, {} if name == "digits" else {"rows": 20})
    assert task.name == name and task.description
    assert torch.isfinite(torch.tensor(task_loss(task, task.make_model())))
    assert torch.equal(task.example_input, task.data[0][:1])


def test_digits_task_needs_the_shipped_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFLAT_DATA", raising=False)
    task = load_task("digits")
    model = task.make_model()
    model.load_state_dict(load_file(sample_checkpoint()))
    inputs, labels = task.data
    expected = -model(inputs).log_softmax(1)[torch.arange(2000), labels].double().mean()
    assert task_loss(task, model) == pytest.approx(expected.item(), rel=1e-5)
    # Far below that of guessing, log 10 = 2.30: images, labels and weights belong together.
    assert expected < 0.1


def test_denoiser_task_is_the_mean_over_images_and_pixels(twenty_images: np.ndarray) -> None:
    task = load_task("mnist-denoiser", {"rows": 10, "depth": 2, "noise": 0.5, "seed": 4})
    inputs, targets = task.data
    clean = twenty_images[:10].reshape(10, 784).astype(np.float32) / np.float32(255)
    assert np.array_equal(targets.numpy(), clean)
    assert (inputs - targets).std().item() == pytest.approx(0.5, rel=0.05)
    model = task.make_model()
    assert [tuple(p.shape) for p in model.parameters()] == [(784, 784)] * 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert task_loss(task, model) == pytest.approx(np.square(clean, dtype=np.float64).mean(), rel=1e-5)


@pytest.mark.usefixtures("twenty_images")
def test_tasks_are_the_same_every_time_and_leave_the_random_state() -> None:
    for name, options in (("digits", {}), ("mnist-denoiser", {"rows": 5, "depth": 2})):
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        first = load_task(name, options)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(2)
        second = load_task(name, options)
        for one, other in zip(first.make_model().parameters(), second.make_model().parameters(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(first.data[0], second.data[0])


@pytest.mark.usefixtures("without_torchvision")
def test_task_without_mnist_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFLAT_DATA", str(tmp_path))
    for name in ("mnist-classifier", "mnist-denoiser"):
        with pytest.raises(DataError, match="set TORCHFLAT_DATA to a folder"):
            load_task(name)


# --- with full MNIST at hand -------------------------------------------------------------------------------------


@pytest.fixture
def full_test_split() -> tuple[torch.Tensor, torch.Tensor]:
    if not os.environ.get("TORCHFLAT_DATA"):
        pytest.skip("TORCHFLAT_DATA is not set")
    return mnist("test")


def test_sample_is_an_excerpt_of_the_test_split(full_test_split: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = full_test_split
    rows = spread_over_classes(labels, 200)
    sample_images, sample_labels = sample_digits()
    assert torch.equal(images[rows], sample_images) and torch.equal(labels[rows], sample_labels)


def test_recorded_accuracy_on_the_test_split(full_test_split: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = full_test_split
    assert accuracy(trained_classifier(), images.view(-1, 1, 28, 28), labels) == pytest.approx(0.9880, abs=5e-4)
