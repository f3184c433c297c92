"""What a command says on stdout: text for people, or JSON and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchflat.cli.folder import write_text
from torchflat.errors import UsageError

__all__ = ["check_writable", "show"]


def check_writable(json: str | None) -> None:
    """Find out before the work that the JSON can be written after it.

    Raises:
        UsageError: the file that ``json`` names cannot be written.
    """
    if json is None or json == "-":
        return
    path = Path(json)
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    if new:
        path.unlink()


def show(text: Callable[[], str], content: str, json: str | None) -> None:
    """Print the text, and write the JSON ``content`` to the file that ``json`` names; "-" prints that alone."""
    if json == "-":
        print(content, end="")
        return
    if json is not None:
        write_text(Path(json), content)
    print(text(), end="")
