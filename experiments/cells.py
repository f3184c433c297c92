"""Pieces of a long run, each kept when it is done, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = ["Cells", "write_json"]

Key = Mapping[str, Any]


class Cells:
    """A folder of finished pieces. A piece is named by its key: everything that its record depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def map(self, what: str, keys: Sequence[Key], compute: Callable[[Key, Path], Any]) -> list[Any]:
        """Return the record of each key, in order; compute those that are not on file, and show the time left.

        ``compute(key, scratch)`` returns plain values for JSON. ``scratch`` is a folder of the piece's own, where it
        may keep what it needs to go on after it was stopped; it is removed when the piece is done.
        """
        left = [key for key in keys if not self._file(key).exists()]
        for key in tqdm(left, desc=what, unit="run", file=sys.stderr, disable=None if left else True):
            scratch = self._file(key).with_suffix("")
            scratch.mkdir(parents=True, exist_ok=True)
            write_json(self._file(key), {"key": dict(key), "record": compute(key, scratch)})
            shutil.rmtree(scratch)
        return [json.loads(self._file(key).read_text())["record"] for key in keys]

    def _file(self, key: Key) -> Path:
        text = json.dumps(dict(key), sort_keys=True)
        told = "-".join(f"{name}={value}" for name, value in key.items())
        slug = re.sub(r"[^\w.=+-]", "_", told)[:80]
        return self.folder / f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def write_json(file: Path, content: Any) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(_laid_out(content, "\n") + "\n")
    part.replace(file)


def _laid_out(content: Any, line: str) -> str:
    """Return JSON with a line for each entry, but for lists that hold no words: a curve is one line."""
    inner = line + " "
    if isinstance(content, Mapping) and content:
        entries = (f"{json.dumps(key)}: {_laid_out(value, inner)}" for key, value in content.items())
        return "{" + inner + f",{inner}".join(entries) + line + "}"
    text = json.dumps(content)
    if isinstance(content, (list, tuple)) and '"' in text:
        return "[" + inner + f",{inner}".join(_laid_out(value, inner) for value in content) + line + "]"
    return text
