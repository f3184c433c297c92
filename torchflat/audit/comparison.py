"""The comparison of two checkpoints: both are loaded, their flatness profiles held against each other, and a report."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchflat import ops
from torchflat.audit.checkpoint import Checkpoint
from torchflat.audit.comparison_report import ComparisonReport
from torchflat.audit.options import CompareOptions
from torchflat.audit.orbit import find_laws
from torchflat.audit.profile import profile_part
from torchflat.audit.run import Progress
from torchflat.audit.subject import load_weights, objective, peak_memory, picked, provenance
from torchflat.audit.task import Task, load_task
from torchflat.distributed import Team
from torchflat.errors import UsageError
from torchflat.flatness import Variation, compare
from torchflat.numerals import number
from torchflat.objective import Objective
from torchflat.result import Cost, Status
from torchflat.spectrum import NotConvergedWarning
from torchflat.symmetry import Flattest
from torchflat.symmetry.flattened import flattened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["compare_checkpoints"]

KEYS = (
    "verdict", "verdict_limit", "verdict_curvature", "decided_by", "radius", "reason",
    "radii", "differences", "errors", "sampled", "tolerance", "level_mismatch", "cautions",
)  # fmt: skip


def compare_checkpoints(
    task: Task | str,
    first: str | Path,
    second: str | Path,
    *,
    second_task: Task | str | None = None,
    task_options: Mapping[str, Any] | None = None,
    second_task_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    options: CompareOptions | None = None,
    group: ProcessGroup | str | None = None,
    **choices: Any,
) -> ComparisonReport:
    """Compare how flat two checkpoints are; see :func:`torchflat.compare` for what the verdict means.

    Args:
        task: a :class:`Task`, its address (``"file.py:function"``, ``"package.module:function"``) or a built-in name.
        first: file with the weights of A.
        second: file with the weights of B.
        second_task: of B, where its architecture is another one; the data must be the same.
        task_options: keyword arguments for the function of ``task``.
        second_task_options: the same for ``second_task``.
        progress: called as the search goes on.
        command: what was typed, for the report.
        options: all choices at once.
        group: processes that share the rows, as in :func:`torchflat.audit`.
        choices: single fields of :class:`~torchflat.audit.options.CompareOptions`, which come before ``options``.

    Raises:
        TorchflatError: a task, a checkpoint, the data or an option is wrong; each error names the cure.
    """
    options = replace(options or CompareOptions(), **choices)
    started, team = time.monotonic(), Team.of(group)
    with team.together():
        tasks = [load_task(task, task_options) if isinstance(task, str) else task] * 2
        if second_task is not None:
            tasks[1] = load_task(second_task, second_task_options) if isinstance(second_task, str) else second_task
        models = _two_models(*tasks)
        data = [tasks[0].make_data()] * 2
        if tasks[1] is not tasks[0]:
            data[1] = tasks[1].make_data()
        loaded = [load_weights(file, model, options) for file, model in zip((first, second), models, strict=True)]
    f, g = (objective(*parts, options, group) for parts in zip(tasks, models, data, strict=True))

    def told(which: str, radius: float, value: float) -> None:
        if progress is not None:
            progress({"first": "A", "second": "B"}[which], f"within {radius:.3g} the loss changes by {value:.3g}", None)

    with team.interrupted_together():
        points: tuple[Objective, Objective] = (f, g)
        moved: list[str] = []
        if options.symmetry:
            points, moved = _flattest(tasks, models, data, points, options)
        answer = compare(
            *points,
            radii=options.radii,
            tolerance=options.tolerance,
            confidence=options.confidence,
            seed=options.seed,
            budget=options.gradients,
            callback=told,
        )
    source = {**provenance(tasks[0], None, f, options, command), **f.provenance()}
    notes = [f"{name}: {note}" for name, file in zip("AB", loaded, strict=True) if file for note in file.notes]
    source["notes"] = list(dict.fromkeys([*notes, "the models were compared in eval mode", *f.provenance()["notes"]]))
    source["notes"] += moved
    if options.rows is not None:
        source["notes"].append(f"a random subset of {f.rows} rows was used: all numbers are about these rows")
    content = {
        "schema_version": "1",
        "provenance": source,
        **picked(answer, *KEYS),
        "confidence": options.confidence,
        "first": _side(tasks[0], loaded[0], points[0], answer.first),
        "second": _side(tasks[1], loaded[1], points[1], answer.second),
        "cost": _cost(f.cost + g.cost, time.monotonic() - started),
    }
    return ComparisonReport(content).validate()


def _two_models(first: Task, second: Task) -> tuple[nn.Module, nn.Module]:
    """Build the models, and see that they share nothing: each is to hold the weights of one checkpoint."""
    a, b = first.make_model(), second.make_model()
    shared = {id(tensor) for tensor in a.state_dict(keep_vars=True).values()}
    if a is not b and shared.isdisjoint(id(tensor) for tensor in b.state_dict(keep_vars=True).values()):
        return a, b
    try:
        return a, copy.deepcopy(b)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"the model of the task cannot be copied for the second checkpoint ({error}): "
            "give the task a function that builds it"
        ) from error


def _side(task: Task, checkpoint: Checkpoint | None, f: Objective, found: Variation) -> dict[str, Any]:
    return {
        "task": task.name or None,
        "checkpoint": checkpoint and picked(checkpoint, "path", "sha256", "format", "wrappers"),
        "parameters": f.n,
        "parameter_norm": float(ops.norm([f.x])),
        "variation": profile_part(found),
    }


def _flattest(
    tasks: Sequence[Task],
    models: Sequence[nn.Module],
    data: Sequence[Any],
    points: tuple[Objective, Objective],
    options: CompareOptions,
) -> tuple[tuple[Objective, Objective], list[str]]:
    """Take both points to the flattest of their orbits, and say by how much λ₁ fell."""
    notes: list[str] = []

    def told(name: str) -> Callable[[Flattest], None]:
        def said(found: Flattest) -> None:
            before, after = number(found.before.value), number(found.value)
            notes.append(f"{name} was rescaled to the flattest network that computes the same: λ₁ {before} → {after}")
            if found.status is Status.BUDGET:
                notes.append(f"the flattest rescaling of {name}: {found.status.value}")

        return said

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        a, b = (
            flattened(
                find_laws(task, model, rows, team=f.team),
                told(name),
                confidence=options.confidence,
                seed=options.seed,
            )(f)
            for name, task, model, rows, f in zip("AB", tasks, models, data, points, strict=True)
        )
    return (a, b), notes


def _cost(cost: Cost, seconds: float) -> dict[str, Any]:
    return {**cost.to_dict(), "seconds": seconds, "peak_memory_bytes": peak_memory()}
