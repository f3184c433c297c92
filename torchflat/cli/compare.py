"""``torchflat compare``: which of two checkpoints is flatter."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from torchflat.audit.comparison import compare_checkpoints
from torchflat.audit.comparison_report import ComparisonReport
from torchflat.audit.options import CompareOptions
from torchflat.cli.flags import key_values
from torchflat.cli.folder import claim, discard_if_empty, fresh
from torchflat.cli.output import check_writable, show
from torchflat.cli.progress import Bars, say
from torchflat.distributed import Team
from torchflat.errors import UsageError
from torchflat.flatness import Verdict

__all__ = ["Compare"]

UNDECIDED = 4


@dataclasses.dataclass(frozen=True)
class Compare:
    """Say which of two checkpoints is flatter: A, B, neither, or that it could not be decided (exit code 4).

    Their flatness profiles, the largest change of the loss within each distance, are held against each other on the
    same data and loss. --task imports and runs the code it names. Under torchrun the processes share the rows.
    """

    first: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
    """Weights of the first point: safetensors or torch.save, bare or wrapped."""
    second: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B")]
    """Weights of the second point."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Model, loss and data: file.py:function or package.module:function that returns a torchflat.Task, or one of
    digits, mnist-classifier, mnist-denoiser. The code it names is run."""
    task_option: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An argument for the task's function, such as rows=1000."""
    task2: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Task of B, where its architecture is another one; with the same data and loss."""
    task2_option: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An argument for the function of --task2; without --task2, for a second call of --task."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Folder for the report. Default: a fresh numbered one."""
    force: bool = False
    """Overwrite a report that is there."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the report as JSON there too; - prints it, and nothing else."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Flags from a file; what is typed comes first."""
    options: Annotated[CompareOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompareOptions)

    def run(self) -> int:
        """Compare, write, print, and return the exit code; under torchrun, rank 0 alone writes."""
        team = Team.of(None)
        with team.interrupted_together():
            if self.task is None:
                raise UsageError(
                    "checkpoints hold weights only: name their model, loss and data with --task file.py:function "
                    "(torchflat compare --help)"
                )
            team.on_first(lambda: check_writable(self.json))
            folder = team.on_first(lambda: claim(Path(self.out), self.force) if self.out else fresh("compare"))
            try:
                report = self._compared(self.task)
                team.on_first(lambda: self._write(report, folder))
            finally:
                if team.first:
                    discard_if_empty(folder)
        return UNDECIDED if report.verdict is Verdict.UNDECIDED else 0

    def _compared(self, task: str) -> ComparisonReport:
        other = self.task2 or (task if self.task2_option else None)
        with Bars() as bars:
            return compare_checkpoints(
                task,
                self.first,
                self.second,
                second_task=other,
                task_options=key_values(self.task_option, "--task-option"),
                second_task_options=key_values(self.task2_option, "--task2-option"),
                progress=bars,
                command=shlex.join(["torchflat", *sys.argv[1:]]),
                options=self.options,
            )

    def _write(self, report: ComparisonReport, folder: Path) -> None:
        report.save(folder, force=True)
        show(report.text, report.to_json(), self.json)
        say(f"the report is in {folder / 'compare.html'}")
