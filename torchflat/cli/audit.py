"""``torchflat audit``: audit a checkpoint, or a folder of them, and write a report."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from torchflat.audit import gates
from torchflat.audit.checkpoint import find_checkpoints
from torchflat.audit.options import Options
from torchflat.audit.report import Report
from torchflat.audit.run import Interrupted, audit
from torchflat.audit.task import Task
from torchflat.cli.folder import claim, discard_if_empty, fresh, latest_partial, write_text
from torchflat.cli.output import check_writable, show
from torchflat.cli.progress import Bars, say
from torchflat.cli.subject import named
from torchflat.distributed import Team
from torchflat.errors import UsageError

__all__ = ["Audit"]

GATE_TRIPPED, INCONCLUSIVE, INTERRUPTED = 1, 4, 130


@dataclasses.dataclass(frozen=True)
class Audit:
    """Measure how sharp a checkpoint is: λ₁ with its interval, the spectrum, every block, and the flatness profile.

    With no checkpoint and no task, the small trained network that ships with torchflat is audited on the digits that
    ship with it. A folder of checkpoints is audited as a trajectory. --task imports and runs the code it names.
    Under torchrun (torchrun --nproc-per-node 2 -m torchflat audit ...) the processes share the rows of the data.
    """

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[CKPT]")] = None
    """Weights to audit: safetensors or torch.save, bare or wrapped; or a folder of checkpoints."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Model, loss and data: file.py:function or package.module:function that returns a torchflat.Task, or one of
    digits, mnist-classifier, mnist-denoiser. The code it names is run."""
    task_option: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An argument for the task's function, such as rows=1000."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """Folder for the report. Default: a fresh numbered one."""
    force: bool = False
    """Overwrite a report that is there."""
    resume: bool = False
    """Go on with the partial report in --out, or in the newest numbered folder that holds one."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the report as JSON there too; - prints it, and nothing else."""
    fail_on: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="GATE")] = ()
    """Exit with 1 if this holds, such as "sharpness.lower > 50": keys of the report, and, or, parentheses."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """Flags from a file; what is typed comes first."""
    options: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)

    def run(self) -> int:
        """Audit, write, print, and return the exit code; under torchrun, rank 0 alone writes."""
        team = Team.of(None)
        with team.interrupted_together():
            with team.together():
                conditions, task, checkpoint, files = self._request()
            team.on_first(lambda: check_writable(self.json))
            folder, earlier = team.on_first(self._folder)
            try:
                if files and files != [Path(str(checkpoint))]:
                    return self._trajectory(team, task, files, folder, conditions)
                return self._single(team, task, checkpoint, folder, earlier, conditions)
            finally:
                if team.first:
                    discard_if_empty(folder)

    def _request(self) -> tuple[Sequence[gates.Gate], Task, str | None, Sequence[Path]]:
        """Return the gates, the task, the checkpoint, and the files in it if it is a folder."""
        conditions = [gates.parse(gate) for gate in self.fail_on]
        task, checkpoint = named(self.task, self.task_option, self.checkpoint, "audit")
        files = find_checkpoints(checkpoint) if checkpoint is not None and Path(checkpoint).is_dir() else []
        return conditions, task, checkpoint, files

    def _single(
        self,
        team: Team,
        task: Task,
        checkpoint: str | None,
        folder: Path,
        earlier: Report | None,
        conditions: Sequence[gates.Gate],
    ) -> int:
        try:
            report = self._audited(task, checkpoint, earlier)
        except Interrupted as interruption:
            partial = interruption.report
            team.on_first(lambda: self._write(partial, folder))
            say(f"interrupted; what was found until then is in {folder}; go on with --resume --out {folder}")
            return INTERRUPTED
        team.on_first(lambda: self._write(report, folder))
        return _exit_code(report, conditions)

    def _folder(self) -> tuple[Path, Report | None]:
        if self.resume:
            folder = Path(self.out) if self.out else latest_partial()
            earlier = Report.load(folder)
            if earlier.content["status"] == "complete":
                raise UsageError(f"the report in {folder} is complete: there is nothing to resume")
            return folder, earlier
        return (claim(Path(self.out), self.force) if self.out else fresh()), None

    def _audited(self, task: Task, checkpoint: str | None, earlier: Report | None) -> Report:
        with Bars() as bars:
            return audit(
                task,
                checkpoint,
                progress=bars,
                resume=earlier,
                command=shlex.join(["torchflat", *sys.argv[1:]]),
                options=self.options,
            )

    def _write(self, report: Report, folder: Path) -> None:
        report.save(folder, force=True)
        show(report.text, report.to_json(), self.json)
        say(f"the report is in {folder / 'report.html'}")

    def _trajectory(
        self, team: Team, task: Task, files: Sequence[Path], folder: Path, conditions: Sequence[gates.Gate]
    ) -> int:
        reports: list[Report] = []
        code = 0
        for index, file in enumerate(files):
            say(f"{file.name} ({index + 1} of {len(files)})")
            place = folder / file.name
            earlier = team.on_first(functools.partial(_finished, place))
            try:
                report = earlier or self._audited(task, str(file), None)
            except Interrupted as interruption:
                team.on_first(functools.partial(interruption.report.save, place, force=True))
                say(f"interrupted; go on with --resume --out {folder}")
                return INTERRUPTED
            team.on_first(functools.partial(report.save, place, force=True))
            reports.append(report)
            # The worst of them: a gate that tripped counts more than one that could not be decided.
            codes = {code, _exit_code(report, conditions)}
            code = next(candidate for candidate in (GATE_TRIPPED, INCONCLUSIVE, 0) if candidate in codes)
        team.on_first(lambda: self._write_trajectory(files, reports, folder))
        return code

    def _write_trajectory(self, files: Sequence[Path], reports: Sequence[Report], folder: Path) -> None:
        from torchflat.audit import page

        contents = [report.content for report in reports]
        write_text(folder / "trajectory.html", page.trajectory_page(contents))
        write_text(folder / "trajectory.json", json.dumps(contents, indent=2) + "\n")
        if self.json == "-":
            print(json.dumps(contents, indent=2))
        else:
            for file, report in zip(files, reports, strict=True):
                print(f"== {file.name}\n{report.text()}")
        say(f"the trajectory is in {folder / 'trajectory.html'}")


def _exit_code(report: Report, conditions: Sequence[gates.Gate]) -> int:
    outcomes = set()
    for condition in conditions:
        verdict = condition.evaluate(report.content)
        outcomes.add(verdict.outcome)
        say(f"gate {condition.expression!r}: {verdict.outcome.name}: {'; '.join(verdict.reasons)}")
    if gates.Outcome.FAIL in outcomes:
        return GATE_TRIPPED
    unfinished = [name for name, part in report.content.items() if isinstance(part, dict) and _inconclusive(part)]
    if unfinished:
        say(f"inconclusive: {', '.join(unfinished)}; raise --budget or --rtol")
    inconclusive = gates.Outcome.INCONCLUSIVE in outcomes or unfinished or report.content["status"] == "partial"
    return INCONCLUSIVE if inconclusive else 0


def _inconclusive(part: dict[str, Any]) -> bool:
    # The last three are findings about the loss: no budget would change them.
    return part.get("status", "CONVERGED") not in ("CONVERGED", "INCONSISTENT", "TRUNCATED", "UNCERTIFIED")


def _finished(folder: Path) -> Report | None:
    """Return the complete report in the folder, if a trajectory that is resumed left one there."""
    if not (folder / "report.json").exists():
        return None
    report = Report.load(folder)
    return report if report.content["status"] == "complete" else None
