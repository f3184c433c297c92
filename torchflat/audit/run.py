"""The audit: every part in turn on one objective, sharing what earlier parts found, and a report whatever happens."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from torchflat import ops
from torchflat.audit.account import account_part, tracker_state
from torchflat.audit.options import Options, parse_duration
from torchflat.audit.orbit import contradiction, find_laws, laws_part, orbit_part
from torchflat.audit.profile import profile_part
from torchflat.audit.report import Report
from torchflat.audit.subject import load_weights, objective, peak_memory, picked, provenance
from torchflat.audit.task import Task, load_task
from torchflat.distributed import Team
from torchflat.errors import LawsError, UsageError
from torchflat.flatness import variation
from torchflat.objective import Objective
from torchflat.result import Status
from torchflat.spectrum import NotConvergedWarning, Sharpness, block_sharpness, sharpness, spectral_density, trace
from torchflat.spectrum.eigenpairs import Eigenpairs, extremal
from torchflat.spectrum.krylov import Krylov
from torchflat.spectrum.run import Run
from torchflat.spectrum.sampling import sampling_interval
from torchflat.symmetry import Laws, flattest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Interrupted", "Progress", "audit"]

# Of the time that is left, no part but the last may take more than this share of it.
SHARE = 0.6
# Choices that change what an audit costs, and not what it finds: a resumed audit may differ in them.
COST_ONLY = ("budget", "memory", "microbatch", "trust_pickle")
BUDGET = 2000.0


class Progress(Protocol):
    """Told what the audit is doing: the part, a line about how far it is, and the fraction done if that is known."""

    def __call__(self, part: str, line: str, fraction: float | None) -> None:
        """Show it."""


class Interrupted(KeyboardInterrupt):
    """The audit was interrupted; ``report`` holds what was found until then, and can be resumed."""

    def __init__(self, report: Report) -> None:
        super().__init__("the audit was interrupted")
        self.report = report


def audit(
    task: Task | str,
    checkpoint: str | Path | None = None,
    *,
    task_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    resume: Report | None = None,
    command: str | None = None,
    options: Options | None = None,
    group: ProcessGroup | str | None = None,
    **choices: Any,
) -> Report:
    """Measure how sharp ``checkpoint`` is for ``task``, and return a :class:`Report`.

    Where torch.distributed is initialised, every process calls this with the same arguments, the rows are split among
    them (see :class:`~torchflat.Objective`), and all get the report. Ctrl-C on one of them then interrupts all.

    Args:
        task: a :class:`Task`, its address (``"file.py:function"``, ``"package.module:function"``) or a built-in name.
        checkpoint: file with the weights; None audits the task's model as it is.
        task_options: keyword arguments for the task's function.
        progress: called as the audit goes on.
        resume: a partial report of the same audit, whose finished parts are taken over.
        command: what was typed, for the report.
        options: all choices at once.
        group: processes that share the rows: by default all, if torch.distributed is initialised; ``"alone"``: none.
        choices: single fields of :class:`~torchflat.audit.options.Options`, which come before ``options``.

    Raises:
        TorchflatError: the task, the checkpoint, the data or an option is wrong; each error names the cure.
        Interrupted: on Ctrl-C, with the partial report.

    >>> X, Y = torch.eye(4), torch.zeros(4, 1)
    >>> report = audit(Task(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, (X, Y)), parts=("sharpness",))
    >>> report.content["sharpness"]["status"]
    'CONVERGED'
    """
    options = replace(options or Options(), **choices)
    started = time.monotonic()
    team = Team.of(group)
    with team.together():
        task = load_task(task, task_options) if isinstance(task, str) else task
        model, data = task.make_model(), task.make_data()
        loaded = load_weights(checkpoint, model, options)
        state = tracker_state(options.tracker or checkpoint, options.tracker is not None, options.trust_pickle)
    f = objective(task, model, data, options, group)
    source = provenance(task, loaded, f, options, command)
    find = functools.partial(find_laws, task, model, data, team=team)
    work = _Audit(f, options, source, progress, started, find, model)
    if state is not None:
        work.account = lambda: account_part(state, find, model, loaded)
    if resume is not None:
        work.take_over(resume)
    try:
        with team.interrupted_together(), warnings.catch_warnings():
            # The report carries every status, so that a warning would say it twice.
            warnings.simplefilter("ignore", NotConvergedWarning)
            work.run()
    except KeyboardInterrupt:
        raise Interrupted(work.report("partial")) from None
    return work.report("complete" if not work.skipped else "partial")


class _Audit:
    """The state that the parts share."""

    def __init__(
        self,
        f: Objective,
        options: Options,
        provenance: dict[str, Any],
        progress: Progress | None,
        started: float,
        find: Callable[..., Laws],
        model: nn.Module,
    ) -> None:
        self.f, self.options, self.provenance, self.progress = f, options, provenance, progress
        self.started, self.model = started, model
        self._find = find
        self.notes: list[str] = list(provenance["notes"])
        self.content: dict[str, Any] = {}
        self.skipped: list[str] = []
        self.account: Callable[[], dict[str, Any]] | None = None
        self.krylov: Krylov | None = None
        self.top: Tensor | None = None
        self.known: tuple[Tensor, Tensor] | None = None
        limit = parse_duration(options.budget)
        self.deadline = math.inf if limit is None else started + limit
        self._part = ""
        self._part_deadline = math.inf

    def run(self) -> None:
        """Every part that was asked for and is not there yet, in an order in which each helps the next."""
        parts: Mapping[str, Callable[[], dict[str, Any] | None]] = {
            "point": self._point,
            "sharpness": self._sharpness,
            "eigenvalues": self._eigenvalues,
            "trace": self._trace,
            "density": self._density,
            "blocks": self._blocks,
            "variation": self._variation,
            "laws": self._laws,
            "orbit": self._orbit,
            "account": self._account,
        }
        wanted = ["point", *(part for part in parts if part in self.options.parts)]
        if self.account is not None:
            wanted.append("account")
        for part in wanted:
            if part in self.content:
                continue
            # Clocks of several processes differ, and none must go on without the others.
            late = self.f.team.anywhere(lambda: time.monotonic() >= self.deadline)
            if late and part != "point":
                self.skipped.append(part)
                continue
            left = self.deadline - time.monotonic()
            self._part = part
            self._part_deadline = time.monotonic() + (left if part == wanted[-1] else SHARE * left)
            found = parts[part]()
            if found is not None:
                self.content[part] = found
            if part != "sharpness" and self.krylov is not None:
                self.krylov.release()

    def report(self, status: str) -> Report:
        """Return what is known now."""
        notes = list(dict.fromkeys([*self.notes, *self.f.provenance()["notes"]]))
        if self.skipped:
            notes.append(f"the time budget was spent before: {', '.join(self.skipped)}; raise --budget, or --resume")
        elapsed = time.monotonic() - self.started
        cost = {**self.f.cost.to_dict(), "seconds": elapsed, "peak_memory_bytes": peak_memory()}
        provenance = {**self.provenance, **self.f.provenance(), "notes": notes}
        content = {"schema_version": "1", "status": status, "provenance": provenance, **self.content, "cost": cost}
        return Report(content).validate()

    def take_over(self, earlier: Report) -> None:
        """Take the finished parts of an earlier report of the same audit."""
        before, now = earlier.content["provenance"], self.provenance
        for what, old, new in (
            ("task", before.get("task"), now["task"]),
            ("checkpoint", (before.get("checkpoint") or {}).get("sha256"), (now["checkpoint"] or {}).get("sha256")),
            ("data", (before.get("data") or {}).get("sha256"), now["data"]["sha256"]),
            *(
                (f"option {key}", before.get("config", {}).get(key), value)
                for key, value in now["config"].items()
                if key not in COST_ONLY
            ),
        ):
            if old != new:
                raise UsageError(f"cannot resume: the {what} was {old!r} and is {new!r} now; audit into a new folder")
        finished = {"CONVERGED", "ROUNDING_LIMITED", "NOT_CERTIFIED", "INCONSISTENT", "TRUNCATED", "UNCERTIFIED"}
        for part in ("point", *self.options.parts):
            held = earlier.content.get(part)
            if held is not None and held.get("status", "CONVERGED") in finished:
                self.content[part] = held
        self.notes.append(f"resumed; taken over: {', '.join(self.content) or 'nothing'}")

    def _tell(self, line: str, fraction: float | None = None) -> bool:
        """Report progress; True asks the part to stop, because its time is up."""
        if self.progress is not None:
            self.progress(self._part, line, fraction)
        return time.monotonic() > self._part_deadline

    def _point(self) -> dict[str, Any]:
        self._tell("gradient")
        norm = float(ops.norm([self.f.gradient()]))
        size = float(ops.norm([self.f.x]))
        return {
            "loss": self.f.value(),
            "gradient_norm": norm,
            "parameter_norm": size,
            "parameters": self.f.n,
            "rows": self.f.rows,
        }

    def _sharpness(self) -> dict[str, Any]:
        options = self.options
        # The eigenvalues need a run on all the data anyway, of which the sharpness is the first part.
        if options.method in ("auto", "lanczos") and "eigenvalues" in options.parts:
            self.krylov = Krylov.of(self.f, options.seed, "sharpness")

        def told(answer: Sharpness) -> bool:
            if answer.lower == -math.inf:
                return self._tell(f"λ₁ is about {answer.value:.4g} on a sample of the rows")
            self.content["sharpness"] = _sharpness_part(replace(answer, status=Status.INTERRUPTED))
            if answer.upper == math.inf:
                return self._tell(f"λ₁ ≥ {answer.lower:.4g}, not bounded from above yet")
            width = (answer.upper - answer.lower) / abs(answer.value) if answer.value else math.inf
            return self._tell(f"λ₁ in [{answer.lower:.4g}, {answer.upper:.4g}], width {width:.1%}")

        answer = sharpness(
            self.f,
            options.rtol,
            options.confidence,
            options.method,
            options.seed,
            BUDGET,
            certify=options.certify,
            callback=told,
            krylov=self.krylov,
        )
        self.top = answer.vector
        part = self.content["sharpness"] = _sharpness_part(answer)
        if not self._tell("fresh data"):
            fresh = sampling_interval(self.f, answer, options.confidence, options.seed)
            keys = ("value", "lower", "upper", "confidence", "standard_error", "groups", "cost")
            part["sampling"] = picked(fresh, *keys)
            if fresh.note:
                self.notes.append(fresh.note)
        return part

    def _eigenvalues(self) -> dict[str, Any]:
        options = self.options
        run = Run(self.f, options.rtol, None, options.confidence, BUDGET, lambda search: self._tell("Ritz pairs"))
        krylov, self.krylov = self.krylov, None
        # A small problem has fewer eigenvalues than were asked for; the smallest is shown before the list is filled.
        bottom = min(options.smallest, self.f.n - 1)
        largest, smallest = extremal(self.f, min(options.top, self.f.n - bottom), bottom, run, options.seed, krylov)
        vectors = torch.cat([largest.vectors, smallest.vectors], dim=1)
        if largest.status in (Status.CONVERGED, Status.ROUNDING_LIMITED):
            self.known = torch.cat([largest.values, smallest.values]), vectors
        if self.top is None and largest.pairs:
            self.top = largest.vectors[:, 0]
        return {
            "largest": _pairs(largest),
            "smallest": _pairs(smallest),
            **picked(largest, "confidence", "status", "cost"),
        }

    def _trace(self) -> dict[str, Any]:
        basis = None if self.known is None else self.known[1]
        answer = trace(
            self.f,
            confidence=self.options.confidence,
            seed=self.options.seed,
            budget=BUDGET,
            basis=basis,
            callback=lambda fraction: self._tell("probes", fraction),
        )
        return picked(answer, "value", "lower", "upper", "confidence", "standard_error", "samples", "status", "cost")

    def _density(self) -> dict[str, Any]:
        answer = spectral_density(
            self.f,
            seed=self.options.seed,
            budget=BUDGET,
            known=self.known,
            callback=lambda density: self._tell("starts"),
        )
        keys = ("grid", "density", "standard_error", "width", "exact", "starts", "steps", "status", "cost")
        return picked(answer, *keys)

    def _blocks(self) -> dict[str, Any]:
        answer = block_sharpness(
            self.f,
            confidence=self.options.confidence,
            by=self.options.by,
            seed=self.options.seed,
            budget=BUDGET,
            top=self.top,
            callback=lambda fraction: self._tell("blocks", fraction),
        )
        keys = ("name", "parameters", "value", "lower", "upper", "status", "gradient_norm", "share")
        return {"rows": [picked(row, *keys) for row in answer.rows], **picked(answer, "confidence", "status", "cost")}

    def _variation(self) -> dict[str, Any]:
        def told(radius: float, value: float) -> bool:
            # Where one process stops, all must.
            return self.f.team.anywhere(lambda: self._tell(f"within {radius:.3g} the loss changes by {value:.3g}"))

        answer = variation(self.f, seed=self.options.seed, budget=self.options.gradients, callback=told)
        return profile_part(answer, self.content.get("sharpness", {}).get("value"))

    @functools.cached_property
    def _found_laws(self) -> Laws | None:
        """The laws; None, and a note, where those of this model cannot be found: the rest of the audit has its use."""
        self._tell("units on the graph")
        try:
            return self._find()
        except LawsError as error:
            self.notes.append(f"the laws could not be found: {error}")
            return None

    def _laws(self) -> dict[str, Any] | None:
        return None if self._found_laws is None else laws_part(self._found_laws, self.model)

    def _account(self) -> dict[str, Any] | None:
        """Check a Tracker's account; None, and a note, where the laws that it is of are not found here."""
        assert self.account is not None
        try:
            return self.account()
        except (LawsError, UsageError) as error:
            self.notes.append(f"the tracker's account could not be checked: {error}")
            return None

    def _orbit(self) -> dict[str, Any] | None:
        laws, options = self._found_laws, self.options
        if laws is None:
            return None

        def told(found: Mapping[str, float]) -> bool:
            return self.f.team.anywhere(lambda: self._tell(f"λ₁ is {found['value']:.4g} after rescaling"))

        try:
            answer = flattest(
                self.f, laws, rtol=options.rtol, confidence=options.confidence, seed=options.seed, callback=told
            )
        except LawsError as error:
            self.notes.append(f"λ₁★ could not be found: {error}")
            return None
        measured = self.content.get("sharpness")
        if measured is not None and (note := contradiction(measured, answer)):
            self.notes.append(note)
        return orbit_part(answer, measured)


def _pairs(answer: Eigenpairs) -> list[dict[str, Any]]:
    return [picked(pair, "value", "lower", "upper", "residual") for pair in answer.pairs]


def _sharpness_part(answer: Sharpness) -> dict[str, Any]:
    keys = ("value", "lower", "upper", "confidence", "status", "basis", "residual", "floor", "steps", "cost", "history")
    step = answer.largest_stable_step if answer.value > 0 else None
    return {
        **picked(answer, *keys),
        "largest_stable_step": None if step is None else picked(step, "value", "lower", "upper"),
    }
