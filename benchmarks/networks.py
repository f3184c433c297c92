"""The trained networks that ``benchmarks.sharpness`` measures, with their data and losses.

Each is trained once, from fixed seeds, and kept in the cache folder. MNIST is found as :func:`torchflat.data.mnist`
says; the text is the source of Python's standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from torchflat.data import denoising, mnist, relu_network

__all__ = ["NETWORKS", "Network", "Problem"]

Data = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, and the class of each row where there is one
LETTERS = 128


@dataclasses.dataclass(frozen=True)
class Problem:
    """f, the mean of ``loss(model(inputs), targets)`` over the rows; ``batch`` rows at once suit a gradient."""

    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor
    batch: int
    candidates: tuple[int, ...]  # batch sizes worth a try for a product

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.inputs)

    def first(self, rows: int) -> Problem:
        """Restrict to the first rows."""
        return dataclasses.replace(self, inputs=self.inputs[:rows], targets=self.targets[:rows])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut the data into batches."""
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))

    def fingerprint(self) -> str:
        """Tell these weights and rows from others."""
        digest = hashlib.sha256()
        for tensor in (*self.model.state_dict().values(), self.inputs, self.targets):
            digest.update(tensor.reshape(-1).numpy().data)
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Network:
    """How to make a :class:`Problem`. Settings are chosen at ``rows[0]`` rows; the last number of rows is quoted."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int | None], Data]
    loss: nn.Module
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    epochs: int
    training_rows: int
    training_batch: int
    rows: tuple[int, ...]
    batch: int
    candidates: tuple[int, ...]

    def load(self, rows: int, cache: Path, order: str = "given") -> Problem:
        """Return the trained network, in eval mode, and its first rows in an ``order``: given, shuffled or sorted."""
        model = self.build()
        model.load_state_dict(torch.load(self.trained(cache), weights_only=True))
        inputs, targets, classes = self.data(rows)
        if order == "shuffled":
            new = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
        elif order == "sorted":
            assert classes is not None, f"{self.name} has no classes to sort by"
            new = classes.argsort(stable=True)
        if order != "given":
            inputs, targets = inputs[new], targets[new]
        return Problem(model.eval(), self.loss, inputs, targets, self.batch, self.candidates)

    def trained(self, cache: Path) -> Path:
        """Return the file with the trained weights; train and write them if it is missing."""
        file = cache / f"{self.name}.pt"
        if not file.exists():
            weights = self._train().state_dict()
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(weights, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        return file

    def _train(self) -> nn.Module:
        inputs, targets, _ = self.data(self.training_rows)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().train()
        optimizer = self.optimizer(model.parameters())
        order = torch.Generator().manual_seed(1)
        for _ in trange(self.epochs, desc=f"training {self.name}", unit="epoch", disable=None):
            for rows in torch.randperm(len(inputs), generator=order).split(self.training_batch):
                optimizer.zero_grad()
                self.loss(model(inputs[rows]), targets[rows]).backward()
                optimizer.step()
        return model


# (a) the denoiser -----------------------------------------------------------------------------------------------------


def noisy_digits(rows: int | None) -> Data:
    """MNIST with noise of standard deviation 1.25, and without; the noise of a row does not depend on ``rows``."""
    images, labels = mnist()
    noisy, clean = denoising(images)
    return noisy[:rows].clone(), clean[:rows].clone(), labels[:rows]


def denoiser_layers(width: int) -> nn.Module:
    """Six bias-free ReLU layers, 784 in and out and ``width`` between them, He initialised."""
    if width == 784:
        return relu_network()
    sizes = [784, *[width] * 5, 784]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
    return nn.Sequential(*layers[:-1])


DENOISER_OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.5),
    "adam": functools.partial(torch.optim.Adam, lr=3e-4, betas=(0.8, 0.99)),
}


def denoiser(name: str, optimizer: str, epochs: int, training_rows: int, rows: tuple[int, ...], width: int) -> Network:
    return Network(
        name=name,
        build=functools.partial(denoiser_layers, width),
        data=noisy_digits,
        loss=nn.MSELoss(),
        optimizer=DENOISER_OPTIMIZERS[optimizer],
        epochs=epochs,
        training_rows=training_rows,
        training_batch=100,
        rows=rows,
        batch=1000,
        candidates=(100, 500, 1000, 5000),
    )


# (b) ResNet-18 --------------------------------------------------------------------------------------------------------


def digits_for_resnet(rows: int | None) -> Data:
    """MNIST padded to 32×32, in three channels."""
    images, labels = mnist(rows=rows)
    return F.pad(images.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), labels, labels


def resnet_layers() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    return model


def resnet(name: str, epochs: int, training_rows: int, rows: tuple[int, ...]) -> Network:
    return Network(
        name=name,
        build=resnet_layers,
        data=digits_for_resnet,
        loss=nn.CrossEntropyLoss(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        epochs=epochs,
        training_rows=training_rows,
        training_batch=100,
        rows=rows,
        batch=100,
        candidates=(25, 50, 100, 250, 500),
    )


# (c) the transformer --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, length, width) to the same shape."""
        rows, length, width = x.shape
        parts = self.attention(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, width)
        x = x + self.out(mixed)
        return x + self.network(self.norm2(x))


class CharacterTransformer(nn.Module):
    """Letters (rows, length) to the logits of the letter after each, (rows, LETTERS, length)."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """Return the logits, the letters along dimension 1, as ``nn.CrossEntropyLoss`` wants them."""
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)


def library_text(rows: int | None, length: int = 64) -> Data:
    """Rows of ``length`` letters from random places in the standard library's source, and the letters after them."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    text = text.clamp(max=LETTERS - 1).long()  # what is not ASCII becomes one letter
    starts = torch.randint(len(text) - length, (rows or 20_000,), generator=torch.Generator().manual_seed(0))
    places = starts[:, None] + torch.arange(length)
    return text[places], text[places + 1], None


def transformer(name: str, epochs: int, training_rows: int, rows: tuple[int, ...]) -> Network:
    return Network(
        name=name,
        build=CharacterTransformer,
        data=library_text,
        loss=nn.CrossEntropyLoss(),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
        epochs=epochs,
        training_rows=training_rows,
        training_batch=32,
        rows=rows,
        batch=50,
        candidates=(10, 25, 50, 100),
    )


MAIN = (
    denoiser("denoiser_sgd", "sgd", 4, 60_000, (10_000, 60_000), 784),
    denoiser("denoiser_adam", "adam", 4, 60_000, (10_000, 60_000), 784),
    resnet("resnet18", 2, 5_000, (5_000,)),
    transformer("transformer", 1, 10_000, (500,)),
)
QUICK = (
    denoiser("denoiser_sgd_quick", "sgd", 1, 10_000, (1_000,), 784),
    denoiser("denoiser_adam_quick", "adam", 1, 10_000, (1_000,), 784),
    resnet("resnet18_quick", 1, 1_000, (50,)),
    transformer("transformer_quick", 1, 1_000, (20,)),
)
WIDTHS = tuple(denoiser(f"denoiser_width{w}", "adam", 3, 10_000, (5_000,), w) for w in (256, 512, 1024, 2048))
QUICK_WIDTHS = tuple(denoiser(f"denoiser_width{w}_quick", "adam", 3, 5_000, (500,), w) for w in (128, 256))
NETWORKS = {each.name: each for each in (*MAIN, *QUICK, *WIDTHS, *QUICK_WIDTHS)}
