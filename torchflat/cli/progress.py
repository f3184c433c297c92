"""What goes to stderr: progress bars on a terminal, and single lines everywhere."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["Bars", "say"]


class Bars:
    """One bar per part of the audit, on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._part = ""
        self._bar: Any = None

    def __call__(self, part: str, line: str, fraction: float | None) -> None:
        """Show how far ``part`` is."""
        if not self._shown:
            return
        if part != self._part:
            self._open(part, fraction is not None)
        self._bar.set_postfix_str(line, refresh=False)
        if fraction is not None:
            self._bar.n = min(1.0, fraction)
        else:
            self._bar.n += 1
        self._bar.refresh()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _open(self, part: str, bounded: bool) -> None:
        from tqdm import tqdm

        if self._bar is not None:
            self._bar.close()
        how_far = "{bar} {percentage:3.0f}%" if bounded else "{n:.0f}"
        self._part = part
        self._bar = tqdm(
            desc=f"{part:12}",
            total=1.0 if bounded else None,
            bar_format="{desc} " + how_far + " {postfix} [{elapsed}]",
            dynamic_ncols=True,
        )


def say(message: str, from_any_process: bool = False) -> None:
    """Print a line about the run itself to stderr; if need be, also in a process that torchrun's rank 0 speaks for."""
    silent = getattr(sys.stderr, "name", "") == os.devnull
    print(f"torchflat: {message}", file=sys.__stderr__ if silent and from_any_process else sys.stderr)
