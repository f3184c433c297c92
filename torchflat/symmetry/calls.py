"""What a call in a graph is: its operator, its arguments, and the idioms that take more than one call."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["MOVES", "arguments", "looks_up_rows", "operator", "recentred", "sums_to_zero"]

MOVES = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice"),
    *("select", "flip", "roll", "split", "split_with_sizes", "unbind", "chunk", "clone", "alias", "detach"),
    *("_to_copy", "contiguous", "lift_fresh_copy"),
)
_CENTRES = ("mean", "amax", "amin")


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a call."""
    return node.args


def operator(node: fx.Node) -> str:
    """Return the name of the ATen operator of a call, without its overload; empty for other calls."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def recentred(user: fx.Node, source: fx.Node) -> set[int] | None:
    """Return the axes along which x − mean(x) or x − max(x) forgets a shift of x, ``source``; ``user`` is part of it.

    None if it is no part of that.
    """
    whole = next(iter(user.users), user) if operator(user) in _CENTRES else user
    if operator(whole) != "sub" or len(arguments(whole)) != 2 or whole.kwargs or arguments(whole)[0] is not source:
        return None
    centre = arguments(whole)[1]
    if not isinstance(centre, fx.Node) or operator(centre) not in _CENTRES or list(centre.users) != [whole]:
        return None
    if len(arguments(centre)) != 3 or arguments(centre)[0] is not source or not arguments(centre)[2]:
        return None
    return {int(axis) % source.meta["val"].ndim for axis in arguments(centre)[1]}


def looks_up_rows(node: fx.Node) -> bool:
    """Tell whether a call takes whole rows out of a table."""
    return operator(node) == "embedding" or (
        operator(node) == "index" and len(arguments(node)[1]) == 1 and arguments(node)[0].meta["val"].ndim == 2
    )


def sums_to_zero(node: Any) -> bool:
    """Tell whether the entries of a tensor sum to zero along its last axis, whatever the input."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name, given = operator(node), arguments(node)
    if name == "sub":
        mean = given[1] if isinstance(given[1], fx.Node) else node
        return operator(mean) == "mean" and recentred(node, given[0]) == {node.meta["val"].ndim - 1}
    if name == "layer_norm":
        return len(given[1]) == 1 and not any(isinstance(gain, fx.Node) for gain in given[2:4])
    if name in ("mul", "div"):
        factor = given[1].meta["val"].shape if isinstance(given[1], fx.Node) else ()
        return sums_to_zero(given[0]) and (not factor or factor[-1] == 1)
    same = name in ("view", "_unsafe_view", "clone", "_to_copy") and isinstance(given[0], fx.Node)
    return same and given[0].meta["val"].shape[-1:] == node.meta["val"].shape[-1:] and sums_to_zero(given[0])
