"""Commands run in this process: their exit code, and what they say."""

from __future__ import annotations

import pytest

from torchflat.cli import main


def run(*arguments: object) -> int:
    """The exit code, also where the flag parser leaves by itself."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leave:
        return int(leave.code or 0)


def one_line(capsys: pytest.CaptureFixture[str], *needles: str) -> None:
    """What was said on stderr is one clear line that holds these words, and no traceback."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    for needle in needles:
        assert needle in lines[0]
