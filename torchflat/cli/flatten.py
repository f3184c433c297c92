"""``torchflat flatten``: write the flattest network that computes the same function."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from torchflat.audit.flatten import flatten_checkpoint
from torchflat.audit.options import FlattenOptions
from torchflat.audit.orbit_words import orbit_sentences
from torchflat.audit.report import footer_text, table_lines, wrapped
from torchflat.cli.output import check_writable, show
from torchflat.cli.progress import Bars, say
from torchflat.cli.subject import named
from torchflat.distributed import Team
from torchflat.errors import UsageError
from torchflat.numerals import confidence, count, number, span
from torchflat.result import Status

__all__ = ["Flatten"]

INCONCLUSIVE = 4


@dataclasses.dataclass(frozen=True)
class Flatten:
    """Find the flattest network that computes the same function, by rescaling, and write it as a checkpoint.

    Outputs are compared on the data before anything is written (exit code 5 if they differ). With no checkpoint and no
    task, the small trained network that ships with torchflat is flattened. --task imports and runs the code it names.
    """

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[CKPT]")] = None
    """Weights: safetensors or torch.save, bare or wrapped. Default: the task's own."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Model, loss and data: file.py:function or package.module:function that returns a torchflat.Task, or one of
    digits, mnist-classifier, mnist-denoiser. The code it names is run."""
    task_option: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An argument for the task's function, such as rows=1000."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """File for the checkpoint: .safetensors, or .pt, .pth, .ckpt, .bin for torch.save."""
    force: bool = False
    """Overwrite a file that is there."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write what was found as JSON there too; - prints it, and nothing else."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Flags from a file; what is typed comes first."""
    options: Annotated[FlattenOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=FlattenOptions)

    def run(self) -> int:
        """Find, verify, write, print, and return the exit code; under torchrun, rank 0 alone writes."""
        if self.out is None:
            raise UsageError("name the file for the checkpoint with -o FILE")
        team = Team.of(None)
        with team.interrupted_together():
            found = self._flattened(team, self.out)
            team.on_first(lambda: self._write(found))
        return INCONCLUSIVE if found["orbit"]["status"] == Status.BUDGET.name else 0

    def _flattened(self, team: Team, out: str) -> dict[str, Any]:
        with team.together():
            task, checkpoint = named(self.task, self.task_option, self.checkpoint, "flatten")
        team.on_first(lambda: check_writable(self.json))
        with Bars() as bars:
            return flatten_checkpoint(
                task,
                checkpoint,
                out,
                force=self.force,
                progress=bars,
                command=shlex.join(["torchflat", *sys.argv[1:]]),
                options=self.options,
            )

    def _write(self, found: dict[str, Any]) -> None:
        content = json.dumps(found, indent=2, allow_nan=False) + "\n"
        show(lambda: "".join(f"{line.rstrip()}\n" for line in _text(found)), content, self.json)
        say(f"the checkpoint is in {self.out}")


def _text(found: dict[str, Any]) -> Iterator[str]:
    orbit = found["orbit"]
    name = "λ₁" if found["curvature"] == "hessian" else "λ₁ of Gauss–Newton"
    rows = [
        (label, *span(part["value"], part["lower"], part["upper"]))
        for label, part in ((f"{name} before", orbit["before"]), (f"{name} after", orbit["after"]))
    ]
    yield from table_lines([("", "value", f"interval ({confidence(orbit['confidence'])})"), *rows], right=(1,))
    yield f"headroom {number(orbit['headroom'], 3)}"
    yield ""
    for sentence in orbit_sentences(orbit):
        yield from wrapped(sentence, "·")
    furthest = number(orbit["largest_log_scale"], 3)
    yield from wrapped(f"log-scales up to {furthest} in {count(len(found['laws']['couplings']))} couplings", "·")
    yield from wrapped(f"verified: outputs moved by {number(found['output_error'], 2)} of the largest", "·")
    if orbit["status"] != Status.CONVERGED.name:
        yield from wrapped(f"{orbit['status']}: {Status[orbit['status']].value}", "!")
    for note in found["provenance"]["notes"]:
        yield from wrapped(note, "!")
    yield from footer_text(found)
