"""What a command says on stdout: text for people, or JSON and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchflat.cli.folder import write_text

__all__ = ["show"]


def show(text: Callable[[], str], content: str, json: str | None) -> None:
    """Print the text, and write the JSON ``content`` to the file that ``json`` names; "-" prints that alone."""
    if json == "-":
        print(content, end="")
        return
    if json is not None:
        write_text(Path(json), content)
    print(text(), end="")
