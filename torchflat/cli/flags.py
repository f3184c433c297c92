"""Flags from the command line and from a TOML file, which are the same flags."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro

from torchflat.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["key_values", "parse"]

Command = TypeVar("Command")


def parse(kind: type[Command], name: str, arguments: Sequence[str]) -> Command:
    """Read the flags of one command; tyro explains what is wrong, with exit code 2.

    ``--config FILE.toml`` stands for the flags it holds, ``top = 3`` for ``--top 3``; what is typed comes first.
    """
    arguments = list(arguments)
    for file in _values_of(arguments, "--config"):
        arguments = [*arguments, *_flags(Path(file), kind, arguments)]
    return tyro.cli(kind, prog=f"torchflat {name}", args=arguments)


def key_values(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """``["rows=500"]`` as ``{"rows": "500"}``.

    >>> key_values(["rows=500", "path=a=b"], "--task-option")
    {'rows': '500', 'path': 'a=b'}
    """
    for pair in pairs:
        if not pair.partition("=")[0].isidentifier() or "=" not in pair:
            raise UsageError(f"{flag} {pair}: write it as name=value")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _values_of(arguments: Sequence[str], flag: str) -> list[str]:
    following = [after for before, after in pairwise(arguments) if before == flag]
    return following + [item.partition("=")[2] for item in arguments if item.startswith(f"{flag}=")]


def _flags(file: Path, kind: type[Any], typed: Sequence[str]) -> list[str]:
    known = _names(kind)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {file} is not TOML: {error}") from error
    flags: list[str] = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"the configuration {file} has {key!r}, which is no flag{did_you_mean(name, known)}")
        flag = f"--{name.replace('_', '-')}"
        given = {item.partition("=")[0] for item in typed}
        if flag in given or f"--no-{flag[2:]}" in given or (name == "out" and "-o" in given):
            continue
        flags += _tokens(flag, value, repeated=known[name])
    return flags


def _names(kind: type[Any]) -> dict[str, bool]:
    """Names of the flags, and whether a flag is repeated for each of its values."""
    names: dict[str, bool] = {}
    for field in dataclasses.fields(kind):
        nested: Any = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            names |= _names(nested)
        else:
            names[field.name] = "UseAppendAction" in str(field.type)
    return names


def _tokens(flag: str, value: Any, repeated: bool) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        return [token for key, item in value.items() for token in (flag, f"{key}={item}")]
    if isinstance(value, list):
        return [token for item in value for token in (flag, str(item))] if repeated else [flag, *map(str, value)]
    return [flag, str(value)]
