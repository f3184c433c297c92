"""What can be wrong with the input, as exceptions whose message names the cure.

Each class stands for one kind of fault and carries the exit code that the command line returns for it
(2: how it was called; 3: what it was given; 5: a verification failed). They derive from the built-in exception a
caller would expect, so that ``except ValueError`` in an existing program keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TorchflatError(Exception):
    """Base of all errors that are the input's, not the library's. ``exit_code`` is for the command line."""

    exit_code = 3


class UsageError(TorchflatError, ValueError):
    """The call itself is off: a flag, an option, a configuration, a task's address, an output folder."""

    exit_code = 2


class LawsError(UsageError):
    """The laws of a model cannot be found, or its objective does not obey them: what needs no laws can go on."""


class CheckpointError(TorchflatError, ValueError):
    """The checkpoint is missing, damaged, unsafe to read, or does not fit the model."""


class DataError(TorchflatError, ValueError):
    """The data is empty, changes between passes, or does not fit the model or the loss."""


class LossError(TorchflatError, ValueError):
    """The loss is no scalar mean, does not depend on the parameters, or cannot be differentiated twice."""


class NonFiniteError(TorchflatError, ArithmeticError):
    """A loss, gradient, product or parameter holds NaN or infinity."""


class ReproducibilityError(TorchflatError, RuntimeError):
    """Two evaluations at the same point on the same rows differ: the model or its data is random."""


class VerificationError(TorchflatError, ArithmeticError):
    """What was computed does not pass the check that comes before it is handed out."""

    exit_code = 5


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest of ``choices``, or an empty string where none is near.

    >>> did_you_mean("epoch3.pt", ["epoch03.pt", "log.txt"])
    "; did you mean 'epoch03.pt'?"
    """
    near = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
