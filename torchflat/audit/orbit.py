"""What rescaling hides: the laws of a task's model and its flattest representative, as parts of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchflat.audit.example import example_input
from torchflat.audit.subject import picked
from torchflat.audit.task import Task
from torchflat.distributed import Team
from torchflat.objective.evaluation import unwrapped
from torchflat.objective.unsharded import unsharded
from torchflat.symmetry import Coupling, Flattest, Laws, laws

__all__ = ["contradiction", "coupling_row", "find_laws", "laws_part", "orbit_part"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def find_laws(
    task: Task, model: nn.Module, data: Any, mode: Literal["eval", "train"] = "eval", team: Team | None = None
) -> Laws:
    """Find the laws of a task's model, under the names of its parameters in the objective.

    Every process of ``team`` finds them for itself; an error on one of them is raised on all.

    Raises:
        LawsError: torch.export cannot follow the model, or what it takes is not known.
    """
    model = unsharded(unwrapped(model))
    softmax = task.loss is cross_entropy or isinstance(task.loss, nn.CrossEntropyLoss)
    with (team or Team.alone()).together():
        return laws(model, example_input(task, model, data), mode, loss=task.loss if softmax else None)


def laws_part(found: Laws, model: nn.Module, mode: str = "eval") -> dict[str, Any]:
    """Return the part ``laws`` of a report."""
    plain = unsharded(unwrapped(model))
    tensors = {name: tensor.detach() for name, tensor in (*plain.named_parameters(), *plain.named_buffers())}
    return {
        "mode": mode,
        "couplings": [coupling_row(coupling, tensors) for coupling in found.couplings],
        "linear": [{"name": law.name, "laws": law.laws} for law in found.linear],
        "approximate": [
            {**coupling_row(coupling, tensors), "residual": found.measured[coupling.name]}
            for coupling in found.approximate
        ],
        "dropped": [{"name": name, "residual": residual} for name, residual in found.dropped.items()],
        "unknown": [{"place": place, "operator": operator} for place, operator in found.unknown.items()],
    }


def coupling_row(coupling: Coupling, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how unbalanced a coupling is: Σ|C|/(|writers|² + |readers|²), from 0, balanced, to 1, one-sided.

    ``tensors`` are parameters and buffers; ``centres`` names the buffers that parameters count from.
    ``ratios`` are quantiles over channels of |writers|/|readers|: least, quarters, largest. For a full coupling the
    channels are the eigenvectors of C, so that all ratios are 1 exactly where C is 0. ``degenerate`` counts the
    channels in which one side, or both, vanish: they have no ratio, and nothing can be traded there.
    """
    writers, readers = coupling.sides(tensors)
    if coupling.kind == "full":
        axes = torch.linalg.eigh(writers - readers).eigenvectors
        writers, readers = ((axes.T @ side @ axes).diagonal().clamp(min=0) for side in (writers, readers))
    total = float((writers + readers).sum())
    both = (writers > 0) & (readers > 0)
    ratios = (writers[both] / readers[both]).sqrt()
    spread = torch.quantile(ratios.log(), torch.tensor(QUANTILES, dtype=ratios.dtype)).exp() if len(ratios) else None
    return {
        "name": coupling.name,
        "kind": coupling.named_kind,
        "centres": coupling.centres,
        "channels": coupling.size,
        "laws": coupling.laws,
        "imbalance": float((writers - readers).abs().sum()) / total if total else None,
        "writers": float(writers.sum()) ** 0.5,
        "readers": float(readers.sum()) ** 0.5,
        "ratios": None if spread is None else spread.tolist(),
        "degenerate": int((~both).sum()),
    }


def orbit_part(answer: Flattest, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the part ``orbit`` of a report: λ₁★, how it was reached, and what is proved of it.

    ``measured`` is the part ``sharpness`` of the same report. λ₁ before, and with it the headroom, is taken from there
    where its interval is narrower than that of the search for λ₁★.
    """
    before, headroom = picked(answer.before, "value", "lower", "upper"), answer.headroom
    better = measured is not None and _width(measured) < _width(before)
    if measured is not None and better:
        before = {key: measured[key] for key in before}
        headroom = before["value"] / answer.value if answer.value else 1.0
    scales = [
        z.reshape(-1) if z.ndim == 1 else torch.linalg.eigvalsh(z) for z in answer.log_scales.values() if z.numel()
    ]
    largest = max((float(z.abs().max()) for z in scales), default=0.0)
    return {
        "value": answer.value,
        "lower": answer.lower,
        "upper": answer.recomputed.upper,
        "confidence": answer.recomputed.confidence,
        "before": before,
        "before_from": "sharpness" if better else "orbit",
        "headroom": headroom,
        "after": picked(answer.recomputed, "value", "lower", "upper"),
        "largest_log_scale": largest,
        "frozen": [{"name": name, "reason": reason} for name, reason in answer.frozen.items()],
        **picked(answer, "status", "proof", "negative", "attained", "max_log_scale", "cost"),
    }


def contradiction(part: Mapping[str, Any], answer: Flattest) -> str | None:
    """Say that the part ``sharpness`` and the search for λ₁★ have no λ₁ of the first point in common, if so."""
    own, other = picked(answer.before, "lower", "upper"), part
    if math.inf in (_width(own), _width(other)) or max(own["lower"], other["lower"]) <= min(
        own["upper"], other["upper"]
    ):
        return None
    shown = [f"[{interval['lower']:.6g}, {interval['upper']:.6g}]" for interval in (other, own)]
    return (
        f"λ₁ was found to be in {shown[0]}, and in {shown[1]} on the way to λ₁★: one of the two is wrong, which chance "
        f"allows in {2 * (1 - answer.before.confidence):.0%} of all cases; try another --seed"
    )


def _width(interval: Mapping[str, Any]) -> float:
    """Return how wide it is; infinite where an end is not known."""
    ends = interval["lower"], interval["upper"]
    return math.inf if None in ends else float(ends[1] - ends[0])
