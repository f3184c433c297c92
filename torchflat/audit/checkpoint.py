"""Checkpoints: from a file to the tensors of a given model, running nothing that the file asks for.

A file is read into a tree of dictionaries (``checkpoint_file``), the part of the tree that is the model's state is
found by its keys and shapes (``checkpoint_match``), and its values are checked here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torchflat.audit.checkpoint_file import FileFormat, locate, member_files, read_tree
from torchflat.audit.checkpoint_match import Reading, Target, choose, dtype_name, listed, read_as
from torchflat.errors import CheckpointError, NonFiniteError
from torchflat.result import Answer

__all__ = ["Checkpoint", "find_checkpoints", "load_checkpoint"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint(Answer):
    """Tensors read from a file, under the names of the model they were checked against.

    ``wrappers`` is what was unwrapped, outermost first: names of dictionaries (``"state_dict"``) and prefixes of keys
    (``"module."``). ``ema`` says that these are averaged weights. ``sha256`` is that of the file; of a sharded
    checkpoint, that of the index followed by the shards in the order of their names. ``notes`` are sentences for the
    report: what was left aside, converted, or could have been chosen instead. ``tensors`` may be memory-mapped: keep
    the file in place until :meth:`apply`.
    """

    path: str
    sha256: str
    format: FileFormat
    wrappers: tuple[str, ...]
    ema: bool
    notes: tuple[str, ...]
    tensors: dict[str, Tensor] = dataclasses.field(repr=False)

    def apply(self, model: nn.Module) -> None:
        """Copy the values into the parameters and buffers of ``model``, in place.

        Raises:
            CheckpointError: the tensors do not fit ``model``, which is then unchanged.
        """
        reading = read_as(self.tensors, Target(model))
        if not reading.fits:
            raise CheckpointError(f"{self.path} does not fit the model: {reading.misfit}")
        # Complete by the check above; torch's own strictness would ask for what that check excuses.
        model.load_state_dict(reading.tensors, strict=False)


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, *, key: str | None = None, trust_pickle: bool = False
) -> Checkpoint:
    """Read the checkpoint at ``path`` and check it against ``model``, which is not modified.

    ``path`` is a safetensors file, a file written by ``torch.save``, or a sharded checkpoint (its folder or its
    ``*.safetensors.index.json``). The weights may lie inside dictionaries (``state_dict``, ``model``, ...) and under
    prefixes (``module.``, ``_orig_mod.module.``, ...); tensors beside them are left aside only where they lie outside
    a familiar prefix or belong to an average of the weights. Where plain and averaged weights (EMA) are both there the
    plain ones are taken; ``key`` names another dictionary or prefix. Every parameter and persistent buffer of the
    model must be there, in its shape; of tied tensors one name is enough.

    A pickle is read by torch's restricted unpickler. One that needs more is refused, unless ``trust_pickle``: reading
    it then runs whatever code its author put in.

    Raises:
        CheckpointError: missing, damaged or unsafe file, no tensors, an ambiguous choice, or another architecture.
        NonFiniteError: NaN in a parameter or buffer, or infinity in a parameter.

    >>> import tempfile
    >>> model = nn.Linear(2, 1)
    >>> wrapped = {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}, "epoch": 3}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(wrapped, f"{folder}/last.ckpt")
    ...     checkpoint = load_checkpoint(f"{folder}/last.ckpt", model)
    >>> checkpoint.wrappers, sorted(checkpoint.tensors)
    (('state_dict', 'module.'), ['bias', 'weight'])
    """
    try:
        file = locate(Path(path))
        file_format, tree = read_tree(file, trust_pickle)
        sha256 = _sha256(member_files(file))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    target = Target(model)
    reading, others = choose(tree, target, key, str(path))
    _check_values(reading, target, str(path))
    return Checkpoint(
        path=str(path),
        sha256=sha256,
        format=file_format,
        wrappers=reading.wrappers,
        ema=reading.averaged,
        notes=(*_notes(reading, target), *others),
        tensors=reading.tensors,
    )


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints of a trajectory: those right inside ``folder``, ``epoch2`` before ``epoch10``.

    Files count by suffix (.safetensors, .pt, .pth, .ckpt, .bin), and so does a subfolder that holds a
    ``model.safetensors`` or its index. Shards do not count; a folder that is itself one sharded checkpoint is the
    only one.

    Raises:
        CheckpointError: ``folder`` is not a folder or holds no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if (folder / "model.safetensors.index.json").is_file():
        return [folder]
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            if (entry / "model.safetensors.index.json").is_file():
                found.append(entry)
            elif (entry / "model.safetensors").is_file():
                found.append(entry / "model.safetensors")
        elif entry.suffix in _SUFFIXES and not _SHARD.search(entry.name):
            found.append(entry)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}: none of its entries ends in {', '.join(_SUFFIXES)}")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", str(path))]


def _check_values(reading: Reading, target: Target, path: str) -> None:
    for first, *rest in target.ties:
        for other in rest:
            if not torch.equal(reading.tensors[first], reading.tensors[other]):
                both = f"{first} and {other}"
                raise CheckpointError(
                    f"{path} does not fit the model, in which {both} are tied: they differ in the file"
                )
    faults = []
    for name, value in reading.tensors.items():
        nans, infinities = _nonfinite(value)
        # A mask of -inf is an ordinary buffer; a parameter is never infinite on purpose.
        if nans or (infinities and name in target.parameters):
            faults.append(f"{name} ({nans} NaN and {infinities} infinite of {value.numel()})")
    if faults:
        raise NonFiniteError(f"{path} holds weights that are not finite: {listed(faults)}")


def _nonfinite(tensor: Tensor) -> tuple[int, int]:
    """How many entries are NaN, and how many infinite. Takes no memory unless there are some."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0, 0
    if tensor.element_size() == 1:  # float8, for which torch has no reductions
        tensor = tensor.float()
    if all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())


def _notes(reading: Reading, target: Target) -> Iterator[str]:
    if reading.averaged:
        yield f"these are averaged weights, from {reading.address}"
    if not reading.familiar:
        yield f"taken from {reading.address}"
    if reading.aside:
        yield f"left aside, as no persistent part of the model: {listed(_grouped(reading.aside))}"
    if reading.excused:
        yield f"not in the file, kept as in the model: {listed(reading.excused)}"
    masks = [
        name for name in reading.tensors if name not in target.parameters and any(_nonfinite(reading.tensors[name]))
    ]
    if masks:
        yield f"buffers with infinite entries (masks?): {listed(masks)}"
    casts = Counter(
        f"{dtype_name(value)} in the file, {dtype_name(target.tensors[name])} in the model"
        for name, value in reading.tensors.items()
        if value.dtype != target.tensors[name].dtype
    )
    for cast, count in casts.items():
        yield f"{count} of {len(reading.tensors)} tensors are converted: {cast}"


def _grouped(names: Sequence[str]) -> list[str]:
    """Return the names, those that begin alike as one: ["step", "ema.*"]."""
    counts = Counter(name.partition(".")[0] for name in names)
    return list(dict.fromkeys(f"{first}.*" if counts[first := name.partition(".")[0]] > 1 else name for name in names))


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
