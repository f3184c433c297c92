"""A checkpoint taken to the flattest network that computes the same function, verified before it is written."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchflat.audit.checkpoint_write import refuse_output, write_checkpoint
from torchflat.audit.example import example_input, inputs
from torchflat.audit.options import FlattenOptions
from torchflat.audit.orbit import find_laws, laws_part, orbit_part
from torchflat.audit.run import Progress
from torchflat.audit.subject import load_weights, objective, provenance
from torchflat.audit.task import Task, load_task
from torchflat.distributed import Bucket, Team
from torchflat.errors import VerificationError
from torchflat.objective import Objective
from torchflat.objective.evaluation import unwrapped
from torchflat.objective.state import modules_kept
from torchflat.objective.unsharded import unsharded
from torchflat.spectrum import NotConvergedWarning
from torchflat.symmetry import flattest
from torchflat.symmetry.state import state_with

__all__ = ["flatten_checkpoint"]

# How far outputs may move, relative to the largest.
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-9}
ROWS = 256


def flatten_checkpoint(
    task: Task | str,
    checkpoint: str | Path | None,
    out: str | Path,
    *,
    force: bool = False,
    task_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    options: FlattenOptions | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Write the flattest network that computes what ``checkpoint`` does, and return what was found as plain values.

    An L2 term is left out, because rescaling changes it. ``out`` gets all parameters and persistent buffers of the
    model, in its dtype; those that moved at least in the working precision. Where torch.distributed is initialised,
    every process calls this, the rows are split among them, the first one writes, and all get the answer.

    Args:
        task: a :class:`Task`, its address or a built-in name.
        checkpoint: file with the weights; None takes the task's model as it is.
        out: file to be written, in the format of its suffix.
        force: overwrite it.
        task_options: keyword arguments for the task's function.
        progress: called as the search goes on.
        command: what was typed, for the provenance.
        options: all choices at once.
        choices: single fields of :class:`~torchflat.audit.options.FlattenOptions`, which come before ``options``.

    Raises:
        TorchflatError: the task, the checkpoint, the data, ``out`` or an option is wrong.
        VerificationError: outputs differ from what they were by more than 1e-4, or 1e-9 in float64, relative to the
            largest; nothing is written.
    """
    options, out = dataclasses.replace(options or FlattenOptions(), **choices), Path(out)
    team = Team.of(None)
    team.on_first(lambda: refuse_output(out, force))
    with team.together():
        task = load_task(task, task_options) if isinstance(task, str) else task
        model, data = task.make_model(), task.make_data()
        loaded = load_weights(checkpoint, model, options)
    laws = find_laws(task, model, data, team=team)
    f = objective(dataclasses.replace(task, weight_decay=0.0), model, data, options, None)

    def told(found: Mapping[str, float]) -> None:
        if progress is not None:
            progress("flatten", f"λ₁ is {found['value']:.4g} after {found['gradients']:.0f} gradients", None)

    with team.interrupted_together(), warnings.catch_warnings():
        # What is returned carries the status.
        warnings.simplefilter("ignore", NotConvergedWarning)
        answer = flattest(
            f,
            laws,
            options.curvature,
            rtol=options.rtol,
            confidence=options.confidence,
            budget=options.gradients,
            seed=options.seed,
            callback=told,
        )
    plain = unsharded(unwrapped(model))
    state = state_with(plain, _held(plain, answer.state_dict))
    errors = Bucket(team, numbers=team.size)
    with team.summed(errors):
        errors.numbers[team.rank] = _disagreement(task, plain, state, data, f)
    error = max(errors.numbers)
    if not error <= AGREEMENT[f.dtype]:
        raise VerificationError(
            f"nothing was written: outputs would differ by {error:.1e} of the largest, and at most "
            f"{AGREEMENT[f.dtype]:.0e} is rounding in {f.dtype}; try --dtype float64, and report it if it stays"
        )
    team.on_first(lambda: write_checkpoint(out, state))
    source = {**provenance(task, loaded, f, options, command), **f.provenance()}
    source["notes"] = [*source["notes"], *_notes(task)]
    return {
        "out": str(out),
        "curvature": options.curvature,
        "output_error": error,
        "orbit": orbit_part(answer),
        "laws": laws_part(laws, model),
        "cost": f.cost.to_dict(),
        "provenance": source,
    }


def _notes(task: Task) -> list[str]:
    if not task.weight_decay:
        return []
    return [f"the L2 term of the task (weight_decay={task.weight_decay}) was left out: rescaling changes it"]


def _held(model: nn.Module, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what moved in the model's dtype, but for half precision, which cannot hold it closely enough."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    return {name: new.to(dtypes[name]) if dtypes[name].itemsize >= 4 else new for name, new in moved.items()}


def _disagreement(task: Task, model: nn.Module, state: Mapping[str, Tensor], data: Any, f: Objective) -> float:
    """Return how far the outputs for all of ``data`` move with ``state``, relative to the largest.

    Where only the task knows what its batches hold, the outputs are those for its example.
    """
    before = copy.deepcopy(model).to(f.device, f.dtype)
    after = copy.deepcopy(before)
    after.load_state_dict(state)
    furthest = largest = 0.0
    with torch.no_grad(), modules_kept(before, False), modules_kept(after, False):
        known = task.batch_loss is None
        for given in inputs(before, data, ROWS) if known else (example_input(task, before, data),):
            old, new = (_outputs(network, given) for network in (before, after))
            for a, b in zip(old, new, strict=True):
                # NaN on either side must not pass for agreement.
                furthest = max(furthest, float((a - b).abs().max().nan_to_num(nan=torch.inf)))
                largest = max(largest, float(a.abs().max()))
    return furthest / largest if 0 < largest < torch.inf else furthest


def _outputs(model: nn.Module, given: tuple[Any, ...] | dict[str, Any]) -> list[Tensor]:
    output = model(**given) if isinstance(given, dict) else model(*given)
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
