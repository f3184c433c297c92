"""Bytes to a tree of tensors: safetensors, sharded safetensors, and pickles of ``torch.save``, with no code run.

Tensors are memory-mapped where the format allows it, so that reading costs no memory and untouched parts, such as the
state of an optimizer, no time.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Literal, cast

import torch
from torch import Tensor

from torchflat.errors import CheckpointError, did_you_mean

__all__ = ["FileFormat", "locate", "member_files", "read_tree"]

FileFormat = Literal["safetensors", "torch"]

_INDEX = ".safetensors.index.json"
_ZIP = b"PK\x03\x04"
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # what torch.save wrote first, before it wrote zip archives
_LARGEST_HEADER = 100_000_000  # of a safetensors file, by its specification


def locate(path: Path) -> Path:
    """Return the file to read for ``path``: itself, or the index of the sharded checkpoint in this folder.

    Raises:
        CheckpointError: there is no such file, it is empty, or the folder is no sharded checkpoint.
    """
    if path.is_dir():
        index = path / f"model{_INDEX}"
        if index.is_file():
            return index
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        holds = f"it holds {', '.join(files[:5])}" if files else "it holds no files"
        raise CheckpointError(f"{path} is a folder, not a checkpoint: name a file in it ({holds})")
    if not path.exists():
        if not path.parent.is_dir():
            raise CheckpointError(f"no checkpoint {path}: there is no folder {path.parent}")
        raise CheckpointError(f"no checkpoint {path}{did_you_mean(path.name, os.listdir(path.parent))}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): it was not written to the end")
    return path


def member_files(file: Path) -> list[Path]:
    """Return the files that make up the checkpoint: an index and its shards, by name, or the file alone."""
    return [file, *sorted(_shards(file))] if file.name.endswith(_INDEX) else [file]


def read_tree(file: Path, trust_pickle: bool) -> tuple[FileFormat, object]:
    """Return what ``file`` holds: a dictionary of tensors, or whatever was given to ``torch.save``.

    Raises:
        CheckpointError: the file is no checkpoint, is damaged, or needs a pickle to be trusted.
        OSError: the file cannot be read.
    """
    if file.name.endswith(_INDEX):
        return "safetensors", _read_shards(file)
    with file.open("rb") as stream:
        head = stream.read(32)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the checkpoint: fetch it with 'git lfs pull'")
    if _is_safetensors(head) or (file.suffix == ".safetensors" and not head.startswith((_ZIP, b"\x80"))):
        return "safetensors", _read_safetensors(file)
    return "torch", _read_torch(file, head, trust_pickle)


def _is_safetensors(head: bytes) -> bool:
    """Tell by the length of the header (8 bytes, little-endian) and the header itself, which is a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER


def _read_safetensors(file: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            return {name: archive.get_tensor(name) for name in names or archive.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is a truncated or damaged safetensors file: {error}") from error


def _shards(index: Path) -> dict[Path, list[str]]:
    """Return the names of the tensors in each shard."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: it needs a JSON object with a 'weight_map'") from error
    shards: dict[Path, list[str]] = {}
    for name, shard in pairs:
        # An index comes from elsewhere: it may not lead out of its folder.
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} asks for the shard {shard!r}, which is not a file in its folder")
        shards.setdefault(index.parent / shard, []).append(name)
    return shards


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard, names in _shards(index).items():
        tensors.update(_read_safetensors(shard, names))
    return tensors


def _read_torch(file: Path, head: bytes, trust_pickle: bool) -> object:
    zipped = head.startswith(_ZIP)
    mapped = zipped and _check_archive(file)
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of protocols: what matters of it is in the error
        try:
            return _torch_load(file, weights_only=True, mapped=mapped)
        except Exception as error:  # on bytes that nobody vouches for, torch.load raises whatever they provoke
            refusal = error
        asked = _globals(file, zipped)
        unsafe = _not_allowed(asked or ())
    pickled = zipped or head.startswith(b"\x80")
    if asked is None or not (unsafe or (pickled and isinstance(refusal, pickle.UnpicklingError))):
        if zipped or head.startswith(_LEGACY):
            raise CheckpointError(f"{file} is truncated or damaged: {_first_line(refusal)}") from refusal
        raise CheckpointError(
            f"{file} is no checkpoint: neither safetensors nor written by torch.save (it begins with {head[:12]!r})"
        ) from refusal
    if trust_pickle:
        try:
            return _torch_load(file, weights_only=False, mapped=mapped)
        except Exception as error:  # code of the checkpoint's author ran, and may raise anything
            text = f"{type(error).__name__}: {_first_line(error)}"
            raise CheckpointError(f"{file} is a pickle that cannot be loaded here: {text}") from error
    reason = (
        f"reading it would run code; it asks for {', '.join(unsafe)}"
        if unsafe
        else "torch's safe reader cannot read it"
    )
    raise CheckpointError(
        f"{file} is a pickle, and refused: {reason}. Save model.state_dict() alone, or pass --trust-pickle "
        "(trust_pickle=True) if you trust its author"
    ) from refusal


def _torch_load(file: Path, weights_only: bool, mapped: bool) -> object:
    if mapped and file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
    with file.open("rb") as stream:  # torch.load goes by the suffix if it has a path, and by the content if not
        return torch.load(stream, map_location="cpu", weights_only=weights_only, mmap=False)


def _check_archive(file: Path) -> bool:
    """Verify the checksums, which torch does not look at. Returns whether the tensors can be memory-mapped."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch.save can be told to write no checksums: then all are 0.
            broken = archive.testzip() if any(entry.CRC for entry in entries) else None
    except Exception as error:  # zipfile raises far more than BadZipFile on damaged archives
        raise CheckpointError(f"{file} is truncated or damaged: {_first_line(error)}") from error
    if broken:
        raise CheckpointError(f"{file} is damaged: the checksum of its record {broken} is wrong")
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{file} is a TorchScript archive: read it with torch.jit.load and save its state_dict() with torch.save"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{file} is no checkpoint: a zip archive, but not one written by torch.save")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _globals(file: Path, zipped: bool) -> set[str] | None:
    """Every ``module.name`` that the pickle asks for, by disassembly; None if there is no complete pickle."""
    if zipped:
        with zipfile.ZipFile(file) as archive:
            record = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            return _globals_in(io.BytesIO(archive.read(record)), pickles=1)
    # Mapped, because a damaged pickle may announce a string of any length, which is not to be allocated.
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _globals_in(
            cast(IO[bytes], content), pickles=5
        )  # before torch 1.6: magic number, version, system, object, storages


def _globals_in(stream: IO[bytes], pickles: int) -> set[str] | None:
    found: set[str] = set()
    for count in range(pickles):
        strings: list[str] = [""]
        memo: dict[object, str] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    found.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":  # module and name are the last two strings pushed
                    found.add(".".join(strings[-2:]))
                elif "PUT" in opcode.name or opcode.name == "MEMOIZE":
                    memo[len(memo) if argument is None else argument] = strings[-1]
                elif "GET" in opcode.name:
                    strings.append(memo.get(argument, "?"))
                elif isinstance(argument, str):
                    strings.append(argument)
        except ValueError:
            return found if count else None
    return found


def _not_allowed(names: Collection[str]) -> list[str]:
    """Those of ``names`` that torch's restricted unpickler would refuse.

    torch tells for a checkpoint only, so one is made that asks for just these names; it is disassembled, not run.
    """
    pairs = (name.rpartition(".") for name in sorted(names) if "\n" not in name)
    pickled = b"".join(b"c%s\n%s\n" % (module.encode(), name.encode()) for module, _, name in pairs)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("names/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("names/version", "3\n")
    buffer.seek(0)
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(buffer))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
