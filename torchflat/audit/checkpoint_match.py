"""Which part of a file is the state of the model: found by its keys and shapes, under any wrapping.

Every dictionary of tensors in the file, under every prefix of its keys, is one *reading* of the file. Those whose keys
and shapes are the model's fit; names decide only among several that fit.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchflat.errors import CheckpointError

__all__ = ["Reading", "Target", "choose", "dtype_name", "listed", "read_as"]

# Names under which the weights themselves are stored; where several fit, the first of these is taken.
_FAMILIAR = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "online_model")
_AVERAGED = frozenset({"ema", "swa", "shadow", "averaged"})
# Put into the keys by wrappers of torch itself, at any depth; no module is called so by its author.
_TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Target:
    """What the model expects: its named tensors, and which names are excused."""

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        self.tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.names = {_plain_key(name): name for name in self.tensors}
        self.parameters = {name for name, value in self.tensors.items() if isinstance(value, nn.Parameter)}
        self.transient = {_plain_key(name) for name, _ in model.named_buffers()} - set(self.names)
        groups: dict[int, list[str]] = {}
        for name, value in self.tensors.items():
            groups.setdefault(id(value), []).append(name)
        self.ties = [names for names in groups.values() if len(names) > 1]


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read the file as the model's state; ``tensors`` has the model's names, the lists those of the file."""

    wrappers: tuple[str, ...]
    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    differing: list[str]
    aside: list[str]
    excused: list[str]

    @property
    def fits(self) -> bool:
        """Whether names, shapes and kinds of numbers are the model's."""
        return not (self.missing or self.unexpected or self.differing)

    @property
    def averaged(self) -> bool:
        """Whether a name on the way says that these are averaged weights (EMA, SWA)."""
        return any(_is_averaged(name) for name in self.wrappers)

    @property
    def familiar(self) -> bool:
        """Whether every name on the way is one that trainers use for the weights themselves."""
        return _all_familiar(self.wrappers)

    @property
    def address(self) -> str:
        """The names on the way, for a message."""
        return " > ".join(map(repr, self.wrappers)) or "the top level"

    @property
    def misfit(self) -> str:
        """What does not fit, in one line."""
        parts = {"missing": self.missing, "unexpected": self.unexpected, "different": self.differing}
        return "; ".join(f"{len(items)} {what}: {listed(items)}" for what, items in parts.items() if items)


def _readings(tree: object, target: Target, key: str | None) -> Iterator[Reading]:
    for path, flat in _dictionaries(tree, ()):
        votes: Counter[str] = Counter()
        for name in map(_plain_key, flat):
            cuts = [0, *(match.end() for match in re.finditer(r"\.", name))]
            votes.update(name[:cut] for cut in cuts if name[cut:] in target.names)
        # A name such as "norm.weight" ends many others: those few votes are no prefix of the whole.
        for prefix in (prefix for prefix, count in votes.items() if 2 * count >= max(votes.values())):
            yield read_as(flat, target, path, prefix, key)


def _dictionaries(tree: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary that holds tensors by name, with the names that lead to it. The states of optimizers are not."""
    if isinstance(tree, nn.Module):
        tree = tree.state_dict()
    # The depth is bounded because a pickle can hold a dictionary that contains itself.
    if not isinstance(tree, Mapping) or len(path) > 5:
        return
    named = {name: value for name, value in tree.items() if isinstance(name, str)}
    tensors = {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for name, value in named.items():
        if not name.startswith("optim"):
            yield from _dictionaries(value, (*path, name))


def read_as(
    flat: Mapping[str, Tensor],
    target: Target,
    path: tuple[str, ...] = (),
    prefix: str = "",
    key: str | None = None,
) -> Reading:
    """``flat``, found under the names ``path``, as the state of ``target`` with ``prefix`` before each name."""
    tensors: dict[str, Tensor] = {}
    outside, aside, unexpected = [], [], []
    segments: tuple[str, ...] = ()
    for full_name, value in flat.items():
        name = _plain_key(full_name)
        own = name[len(prefix) :] if name.startswith(prefix) else None
        if own in target.names and target.names[own] not in tensors:
            tensors[target.names[own]] = value
            segments = max(segments, _extra_segments(full_name, own), key=len)
        elif own in target.transient or _is_averaged(own or name) or name.endswith("_extra_state"):
            aside.append(full_name)
        elif own and "." not in own and value.numel() == 1 and _is_averaged(prefix):
            aside.append(full_name)  # the average's own decay and count
        elif own is None:
            outside.append(full_name)
        else:
            unexpected.append(full_name)
    for tie in target.ties:
        present = [name for name in tie if name in tensors]
        tensors.update({name: tensors[present[0]] for name in tie if present and name not in tensors})
    absent = [name for name in target.tensors if name not in tensors]
    # Written by no torch before 0.4.1, and used by no BatchNorm that is in eval mode.
    excused = [name for name in absent if name.endswith("num_batches_tracked")]
    wrappers = (*path, *segments)
    # Under a prefix that every trainer uses, or that was asked for, other entries are the trainer's own: its metrics,
    # its loss. Under any other prefix they are other layers, and the file is that of a larger network.
    (aside if _all_familiar(wrappers) or _named(wrappers, key) else unexpected).extend(outside)
    return Reading(
        wrappers=wrappers,
        tensors=tensors,
        missing=[name for name in absent if name not in excused],
        unexpected=unexpected,
        differing=[text for name in tensors if (text := _difference(name, tensors[name], target.tensors[name]))],
        aside=aside,
        excused=excused,
    )


def _plain_key(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def _extra_segments(full_name: str, own: str) -> tuple[str, ...]:
    """Return the segments of a key that the model's name lacks: ("module.",) for "module.fc.bias", "fc.bias"."""
    kept, extra = own.split("."), []
    for part in reversed(full_name.split(".")):
        if kept and kept[-1] == part:
            kept.pop()
        else:
            extra.append(f"{part}.")
    return tuple(reversed(extra))


def _is_averaged(name: str) -> bool:
    return not _AVERAGED.isdisjoint(re.split(r"[._-]", name.lower()))


def _all_familiar(wrappers: Sequence[str]) -> bool:
    return all(_rank(name) < len(_FAMILIAR) for name in wrappers)


def _named(wrappers: Sequence[str], key: str | None) -> bool:
    return key is not None and (key in wrappers or f"{key}." in wrappers or key == "".join(wrappers))


def _rank(name: str) -> int:
    bare = name.rstrip(".")
    if bare in _TRANSPARENT or _is_averaged(bare):
        return -1
    return _FAMILIAR.index(bare) if bare in _FAMILIAR else len(_FAMILIAR)


def _difference(name: str, ours: Tensor, theirs: Tensor) -> str:
    if ours.layout != torch.strided or ours.is_quantized:
        return f"{name} is no plain dense tensor in the file"
    if not is_lazy(theirs) and ours.shape != theirs.shape:
        return f"{name} is {tuple(ours.shape)} in the file and {tuple(theirs.shape)} in the model"
    if _kind(ours) != _kind(theirs):
        return f"{name} is {dtype_name(ours)} in the file and {dtype_name(theirs)} in the model"
    return ""


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def dtype_name(tensor: Tensor) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def choose(tree: object, target: Target, key: str | None, path: str) -> tuple[Reading, list[str]]:
    """Return the reading of ``tree`` to take, and notes on the others that could have been.

    Raises:
        CheckpointError: no reading fits, none is called ``key``, or several fit and no name tells them apart.
    """
    readings = list(_readings(tree, target, key))
    if not readings:
        raise CheckpointError(_nothing_fits(tree, path))
    asked = [reading for reading in readings if key is None or _named(reading.wrappers, key)]
    if not asked:
        known = sorted({name for reading in readings for name in reading.wrappers})
        there = f"it has {listed(map(repr, known))}" if known else "they are not wrapped"
        raise CheckpointError(f"{path} has no weights under {key!r}: {there}")
    fitting = [reading for reading in asked if reading.fits]
    if not fitting:
        best = max(asked, key=lambda r: (len(r.tensors) - len(r.missing), -len(r.unexpected), not r.averaged))
        under = f", read under {best.address}," if best.wrappers else ""
        raise CheckpointError(f"{path}{under} does not fit the model: {best.misfit}")
    plain = [reading for reading in fitting if not reading.averaged]
    familiar = [reading for reading in plain if reading.familiar]
    pool = familiar or plain or fitting
    if len(pool) > 1 and not familiar:
        sets = listed(reading.address for reading in pool)
        raise CheckpointError(f"{path} holds several sets of weights that fit the model, {sets}: choose one with key=")
    chosen = min(pool, key=lambda reading: [_rank(name) for name in reading.wrappers])
    return chosen, [*_alternatives(chosen, readings), *_useless_averages(tree, readings)]


def _alternatives(chosen: Reading, readings: Iterable[Reading]) -> Iterator[str]:
    for other in readings:
        if other.fits and other.wrappers != chosen.wrappers:
            what = "averaged weights" if other.averaged else "other weights that fit"
            key = next((name for name in other.wrappers if name not in chosen.wrappers), "")
            yield f"{what} are there too, under {other.address}" + (f": key={key!r} takes them" if key else "")


def _useless_averages(tree: object, readings: Iterable[Reading]) -> Iterator[str]:
    usable = {name for reading in readings if reading.fits for name in reading.wrappers}
    names = [name for name in tree if isinstance(name, str)] if isinstance(tree, Mapping) else []
    for name in names:
        if _is_averaged(name.partition(".")[0]) and usable.isdisjoint({name, f"{name.partition('.')[0]}."}):
            yield f"averaged weights may be there too, under {name!r}, but they do not fit the model as they are"
            return


def _nothing_fits(tree: object, path: str) -> str:
    if isinstance(tree, Tensor):
        return f"{path} holds one tensor of shape {tuple(tree.shape)}, not a dictionary of named tensors"
    if not isinstance(tree, Mapping | nn.Module):
        return f"{path} holds a {type(tree).__name__}, not a dictionary of named tensors"
    found = [name for _, flat in _dictionaries(tree, ()) for name in flat]
    if found:
        return f"{path} does not fit the model: none of its keys is one of the model's; it has {listed(found)}"
    keys = listed(map(repr, tree)) if isinstance(tree, Mapping) else ""
    return f"{path} holds no tensors: its top-level keys are {keys or 'none at all'}"


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Name the first few of ``items``, and how many more there are.

    >>> listed("abcdefgh")
    'a, b, c, d, e ... and 3 more'
    """
    items = list(items)
    more = f" ... and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
