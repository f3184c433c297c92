"""One budget for everything that grows: retained graphs, the Krylov basis, and room to work in."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchflat.errors import UsageError

__all__ = ["Memory", "graph_bytes", "parse_bytes", "return_freed_pages"]

UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("k", "m", "g", "t"), 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_bytes(amount: str | int) -> int:
    """Bytes in an amount such as ``"2GiB"``, ``"500 MB"`` or a plain number.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 kB"), parse_bytes(4096)
    (2147483648, 1500, 4096)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(amount).lower())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * UNITS[match[2]])
    except (KeyError, ValueError):
        raise UsageError(f"memory={amount!r} is no amount of memory: write it like '2GiB' or '500MB'") from None


# Where graphs and vectors take less than this share of the budget, freed pages do no harm. And giving pages back is
# tried again once the process has grown by the other share.
SMALL_SHARE, GROWN_SHARE = 1 / 4, 1 / 64


class GraphHolder(Protocol):
    """What keeps graphs, and can do without them."""

    def drop_one(self) -> bool:
        """Drop a graph; say whether there was one."""


class Memory:
    """Tells how many bytes of graphs may be kept. ``vectors`` grows with a Krylov basis, and graphs then have to go.

    All functions derived from one share a budget: a run on a sample of the rows needs what the graphs of all the data
    take.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.vectors = 0
        self.graphs = 0
        self._resident_before = self._resident_when_tidy = resident_bytes()
        self._holders: weakref.WeakValueDictionary[int, GraphHolder] = weakref.WeakValueDictionary()
        self._held_before = itertools.count()

    def room_for_graphs(self, workspace: int) -> int:
        """Bytes that graphs may take in all, if ``workspace`` bytes must stay free for one product."""
        return max(0, self.total - self.vectors - workspace)

    def keep_graph(self, graph: object, size: int) -> None:
        """Account for ``size`` bytes until ``graph`` is gone."""
        self.graphs += size
        weakref.finalize(graph, self._forget, 0, size).atexit = False

    def add_holder(self, holder: GraphHolder) -> None:
        """Let the graphs of ``holder`` go when others need the room."""
        self._holders[next(self._held_before)] = holder

    def drop_graphs(self, room: int, last: GraphHolder) -> None:
        """Drop graphs until they fit into ``room`` bytes: those of the oldest holder first, those of ``last`` last."""
        if self.graphs <= room:
            return
        others = [holder for holder in self._holders.values() if holder is not last]
        for holder in (*others, last):
            while self.graphs > room and holder.drop_one():
                pass
        return_freed_pages()

    def keep_vectors(self, owner: object, size: int) -> None:
        """Account for ``size`` bytes of vectors until their ``owner`` is gone."""
        self.vectors += size
        weakref.finalize(owner, self._forget, size, 0).atexit = False

    def tidy(self, workspace: int) -> None:
        """Return freed pages to the system if what comes next, ``workspace`` bytes, would go beyond the budget.

        What is dropped leaves pages in the heap, and what is kept lies between the temporaries of the next product, so
        that neither a Krylov basis nor the graphs to come take up the holes.
        """
        if self.vectors + self.graphs + workspace < SMALL_SHARE * self.total:
            return
        limit = self._resident_before + self.total - workspace
        if resident_bytes() > max(limit, self._resident_when_tidy + GROWN_SHARE * self.total):
            return_freed_pages()
            self._resident_when_tidy = resident_bytes()

    def _forget(self, vectors: int, graphs: int) -> None:
        self.vectors -= vectors
        self.graphs -= graphs

    @contextlib.contextmanager
    def vectors_held(self, size: int) -> Iterator[None]:
        """Account for ``size`` bytes of vectors inside the block."""
        self.vectors += size
        try:
            yield
        finally:
            self.vectors -= size


def resident_bytes() -> int:
    """Bytes of this process that are in memory, on Linux; 0 elsewhere."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def return_freed_pages() -> None:
    """Give memory that was freed back to the system, where glibc would keep it in its heap.

    Blocks below 32 MiB are recycled, but not for larger ones and not across other blocks: without this, what a check in
    float64 took stays resident beside what the budget is spent on.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def graph_bytes(roots: Iterable[Node], owned: Iterable[Tensor]) -> int:
    """Bytes that the autograd graph below ``roots`` keeps alive, in the tensors that its nodes have saved.

    Overlapping views count once, views of the tensors ``owned`` by the objective never. (Hooks on saved tensors would
    see them all, but what a hook returns for an operator's own output closes a reference cycle, and is never freed.)
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in owned}
    views: dict[tuple[int, int], int] = {}
    nodes, waiting = set(roots), list(roots)
    while waiting:
        node = waiting.pop()
        for tensor in _saved_tensors(node):
            # By the bytes of the view: the storage of a slice of the data may be the whole data set.
            if tensor.untyped_storage().data_ptr() not in storages:
                views[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
        for below, _ in node.next_functions:
            if below is not None and below not in nodes:
                nodes.add(below)
                waiting.append(below)
    return sum(views.values())


# Attributes of each type of node that hold what it has saved; looking for them takes longer than reading them.
_SAVED_NAMES: dict[type, list[str]] = {}


def _saved_tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        saved = [*node.saved_tensors, *vars(node).values()]
    else:
        kind = type(node)
        if kind not in _SAVED_NAMES:
            raw = [name for name in dir(kind) if name.startswith("_raw_saved_")]
            _SAVED_NAMES[kind] = [name.removeprefix("_raw") for name in raw]
        saved = [getattr(node, name) for name in _SAVED_NAMES[kind]]
    for value in saved:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                yield tensor
