"""The folder a report goes to: claimed before the work begins, so that nothing is computed for nothing."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

from torchflat.errors import UsageError

__all__ = ["claim", "discard_if_empty", "fresh", "latest_partial", "write_text"]

PREFIX = "torchflat-audit-"


def claim(folder: Path, force: bool) -> Path:
    """Make ``folder`` and see that it can be written to.

    Raises:
        UsageError: it holds something and ``force`` is not given, or it cannot be written to.
    """
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: name another folder, or overwrite its report with --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".torchflat-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error
    return folder


def fresh(command: str = "audit") -> Path:
    """Make the first of ``torchflat-audit-1``, ``-2``, … that is not there yet; of another command, with its name."""
    for number in itertools.count(1):
        folder = Path(f"torchflat-{command}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot write to {Path.cwd()}: {error.strerror}; name a folder with --out") from error
        return folder
    raise AssertionError("unreachable")


def discard_if_empty(folder: Path) -> None:
    """Remove a folder that nothing was written to, because the audit failed before."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def latest_partial() -> Path:
    """Return the numbered folder with the newest partial report."""
    found = []
    for path in Path().glob(f"{PREFIX}*/report.json"):
        try:
            status = json.loads(path.read_text(encoding="utf-8")).get("status")
        except (OSError, ValueError, AttributeError):
            continue
        if status == "partial":
            found.append(path)
    if not found:
        raise UsageError(f"no folder {PREFIX}N here holds a partial report: name it with --out")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def write_text(path: Path, text: str) -> None:
    """Write a text file, or say in one line why it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
