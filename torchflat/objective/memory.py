"""One budget for everything that grows: retained graphs, the Krylov basis, and room to work in."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from torchflat.errors import UsageError

__all__ = ["Memory", "measured_graph", "parse_bytes"]

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


class Memory:
    """Tells how many bytes of graphs may be kept. ``vectors`` grows with a Krylov basis, and graphs then have to go."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.vectors = 0
        self.graphs = 0

    def room_for_graphs(self, workspace: int) -> int:
        """Bytes that graphs may take in all, if ``workspace`` bytes must stay free for one product."""
        return max(0, self.total - self.vectors - workspace)

    def release(self, size: int) -> None:
        """Called when a retained graph is gone."""
        self.graphs -= size

    @contextlib.contextmanager
    def vectors_held(self, size: int) -> Iterator[None]:
        """Account for ``size`` bytes of vectors inside the block."""
        self.vectors += size
        try:
            yield
        finally:
            self.vectors -= size


@contextlib.contextmanager
def measured_graph(leaves: list[Tensor]) -> Iterator[list[int]]:
    """Measure the bytes that graphs built inside the block keep alive; the one item of the list is the sum.

    Every tensor that autograd saves passes through the hook. Overlapping views count once, views of ``leaves`` never.
    """
    owned = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    seen: set[tuple[int, int]] = set()
    total = [0]

    def count(tensor: Tensor) -> Tensor:
        # By the bytes of the view: the storage of a slice of the data may be the whole data set.
        key = tensor.data_ptr(), tensor.numel()
        if key not in seen and tensor.untyped_storage().data_ptr() not in owned:
            seen.add(key)
            total[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield total
