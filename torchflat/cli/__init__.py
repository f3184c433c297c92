"""The ``torchflat`` command: pick the subcommand, run it, and turn what happens into an exit code.

0 done; 1 a gate tripped; 2 how it was called; 3 what it was given; 4 inconclusive or budget spent; 5 a verification
failed; 70 internal error; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from torchflat.cli.launch import joined
from torchflat.cli.progress import say
from torchflat.errors import TorchflatError, UsageError, did_you_mean

__all__ = ["COMMANDS", "main"]

INTERNAL_ERROR = 70
INTERRUPTED = 130

# Imported when asked for, so that `torchflat --help` is quick. Each module has a dataclass of this name with run().
COMMANDS = {
    "audit": ("Audit", "measure how sharp a checkpoint is, and write a report"),
    "compare": ("Compare", "say which of two checkpoints is flatter"),
    "laws": ("Laws", "show which rescalings leave a network's function as it is"),
    "flatten": ("Flatten", "write the flattest network that computes the same function"),
    "selftest": ("Selftest", "check this installation on problems with known answers"),
    "doctor": ("Doctor", "show what this installation has, and what it lacks"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: the process's own), and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["audit"], ["compare"], ["flatten"]):
        with joined():
            return _run(arguments)
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except TorchflatError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left, as `head` does; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            say("error: out of memory: lower --memory, or set --microbatch")
            return 3
        with tempfile.NamedTemporaryFile("w", prefix="torchflat-", suffix=".log", delete=False) as log:
            log.write(f"torchflat {' '.join(arguments)}\n\n")
            traceback.print_exc(file=log)
        message = f"{type(error).__name__}: {error}"
        say(f"internal error: {message}; the traceback is in {log.name}; please report it", from_any_process=True)
        return INTERNAL_ERROR


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        from torchflat import __version__

        print(f"torchflat {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"{name!r} is not a command{did_you_mean(name, COMMANDS)}; see torchflat --help")
    from torchflat.cli.flags import parse

    kind = getattr(importlib.import_module(f"torchflat.cli.{name}"), COMMANDS[name][0])
    return int(parse(kind, name, arguments[1:]).run())


def _overview() -> str:
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: torchflat COMMAND [...]",
            "",
            "How sharp is the minimum that a network was trained to, in numbers that carry an interval.",
            "",
            *lines,
            "",
            "torchflat COMMAND --help tells the flags of a command. torchflat audit, with nothing else,",
            "audits the small trained network that ships with the package.",
        ]
    )
