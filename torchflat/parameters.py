"""Named tensors and the one flat vector x they make up."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from torchflat.errors import UsageError

__all__ = ["Layout", "select"]


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in the flat vector x of length n.

    >>> layout = Layout(("weight", "bias"), (torch.Size([2, 3]), torch.Size([2])))
    >>> layout.n, [tuple(part.shape) for part in layout.split(torch.arange(8.0))]
    (8, [(2, 3), (2,)])
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def n(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut ``flat`` (n,) into views, one per tensor, in its shape."""
        parts = torch.split(flat, list(self.sizes))
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Make a new (n,) vector that holds the values of ``tensors`` in this layout."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def part(self, indices: Sequence[int]) -> Layout:
        """Make the layout of some of the tensors, for the vector that holds only these."""
        return Layout(tuple(self.names[i] for i in indices), tuple(self.shapes[i] for i in indices))

    def slices(self) -> dict[str, slice]:
        """Give the range of the flat vector that each name covers."""
        ranges, offset = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            ranges[name] = slice(offset, offset + size)
            offset += size
        return ranges


def select(model: nn.Module, patterns: str | Iterable[str] | None) -> list[str]:
    """Names of the parameters of ``model`` that make up x, in the model's order.

    ``None`` takes those that require grad. Otherwise a pattern is a name, a shell wildcard (``"*.weight"``) or the name
    of a submodule (``"encoder.0"``); one that begins with ``!`` takes away. A tied tensor counts once, under its
    first name, and may be asked for by any of its names.

    Raises:
        UsageError: a pattern matches nothing, nothing is left, or a parameter that is asked for is not real floating or
            has no values yet.
    """
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    if patterns is None:
        chosen = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if not chosen:
            raise UsageError("the model has no parameter that requires grad: name the ones to audit with params=[...]")
    else:
        aliases = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        chosen = _matching(aliases, [patterns] if isinstance(patterns, str) else list(patterns))
    names = [name for name in parameters if name in chosen]
    for name in names:
        if nn.parameter.is_lazy(parameters[name]) or parameters[name].is_meta:
            raise UsageError(f"parameter {name!r} has no values yet: run the model once, or load its weights")
        if not parameters[name].is_floating_point():
            raise UsageError(
                f"parameter {name!r} is {parameters[name].dtype}, and curvature is defined here for real floating "
                f"parameters only: leave it out with params=[..., '!{name}']"
            )
    return names


def _matching(aliases: dict[str, str], patterns: list[str]) -> set[str]:
    only_excluded = patterns and all(pattern.startswith("!") for pattern in patterns)
    chosen = set(aliases.values()) if only_excluded else set()
    for pattern in patterns:
        body = pattern.removeprefix("!")
        found = {
            name for alias, name in aliases.items() if fnmatch.fnmatchcase(alias, body) or alias.startswith(body + ".")
        }
        if not found:
            known = ", ".join(list(aliases)[:8]) + (", ..." if len(aliases) > 8 else "")
            raise UsageError(f"params: {body!r} matches no parameter; the model has {known}")
        chosen = chosen - found if pattern.startswith("!") else chosen | found
    if not chosen:
        raise UsageError(f"params={patterns!r} leaves no parameter to audit")
    return chosen
