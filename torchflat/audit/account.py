"""The account that a Tracker kept of the conserved quantities, checked at the checkpoint that it was saved with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from torchflat import ops
from torchflat.audit.checkpoint import Checkpoint
from torchflat.audit.checkpoint_file import locate, read_tree
from torchflat.errors import CheckpointError, UsageError
from torchflat.objective.evaluation import unwrapped
from torchflat.objective.unsharded import unsharded
from torchflat.optim.account import Account
from torchflat.optim.sweep import Sweep
from torchflat.symmetry import Laws

__all__ = ["account_part", "tracker_state"]

KEYS = {"version", "steps", "names", "parameter_norm", "account"}
# Norms of the same parameters, summed in another order.
SAME = 1e-6


def tracker_state(path: str | Path | None, asked: bool, trust_pickle: bool = False) -> Mapping[str, Any] | None:
    """Return the state of a :class:`~torchflat.optim.Tracker` that a file is or holds; None if there is none.

    Args:
        path: a file that torch.save wrote; None for none.
        asked: whether the state is known to be there.
        trust_pickle: read pickles that run code.

    Raises:
        CheckpointError: the file cannot be read, or holds no state or several although one was asked for.
    """
    if path is None:
        return None
    found = list(_states(read_tree(locate(Path(path)), trust_pickle)[1]))
    if asked and len(found) != 1:
        many = "no state of a Tracker" if not found else f"the states of {len(found)} Trackers"
        raise CheckpointError(f"{path} holds {many}: save tracker.state_dict() with torch.save, and name that file")
    return found[0] if len(found) == 1 else None


def _states(tree: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, Mapping):
        if tree.keys() >= KEYS and isinstance(tree["account"], Mapping):
            yield tree
        else:
            for branch in tree.values():
                yield from _states(branch)


def account_part(
    state: Mapping[str, Any],
    find: Callable[[Literal["eval", "train"]], Laws],
    model: nn.Module,
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Return the part ``account`` of a report: for each law whether steps and rounding explain how it changed.

    Args:
        state: of the tracker, at the same step as the parameters.
        find: the laws of the model in a mode.
        model: which has the parameters.
        checkpoint: where they come from, with the precision that they were kept in.

    Raises:
        UsageError: the state is of another model, or of laws that are not found in this one.
    """
    plain = unsharded(unwrapped(model))
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in plain.named_parameters(remove_duplicate=False)}
    missing = [name for name in state["names"] if name not in tensors]
    if missing:
        raise UsageError(f"the tracker's state has the parameter {missing[0]!r}, and this model has not")
    if checkpoint is not None:
        tensors |= {name: checkpoint.tensors[name] for name in tensors if name in checkpoint.tensors}
    parameters = {name: tensors[name] for name in state["names"]}
    account = Account(Sweep(_laws(state, find), parameters), parameters)
    account.load_state_dict(state["account"])
    drifts, explained, ratios = account.check(account.sweep([account.sweep.read(list(parameters.values()))])).tolist()
    norm = float(ops.norm([each.float() if each.element_size() < 4 else each for each in parameters.values()]))
    averaged = checkpoint is not None and checkpoint.ema
    rows = []
    for law, drift, explanation, ratio in zip(account.sweep.laws, drifts, explained, ratios, strict=True):
        refused = "these are averaged weights" if averaged else account.refused.get(law.name)
        rows.append(
            {
                "name": law.name,
                "drift": drift,
                "explained": None if refused else explanation,
                "unexplained": None if refused else ratio,
                "refused": refused,
            }
        )
    return {
        "steps": state["steps"],
        "same_point": averaged or abs(norm - state["parameter_norm"]) <= SAME * norm,
        "broken": sum((row["unexplained"] or 0) > 1 for row in rows),
        "rows": rows,
    }


def _laws(state: Mapping[str, Any], find: Callable[[Literal["eval", "train"]], Laws]) -> Laws:
    """Return the laws that the state is of, in its order: those of train mode, unless it was tracked in eval mode."""
    wanted = list(state["account"]["initial"])
    unknown = wanted
    for mode in ("train", "eval"):
        found = find(mode)
        couplings, linear = {law.name: law for law in found.couplings}, {law.name: law for law in found.linear}
        unknown = [name for name in wanted if name not in couplings and name not in linear]
        if not unknown:
            return Laws(
                tuple(couplings[name] for name in wanted if name in couplings),
                tuple(linear[name] for name in wanted if name in linear),
            )
    raise UsageError(f"the tracker's state has the law {unknown[0]!r}, and this model has not")
