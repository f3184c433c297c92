"""How a pass goes through the data: how many rows at once, and which of their graphs are kept.

The size of a micro-batch is decided from the bytes of its graph, which a probe of a few rows measures, and not from the
clock: the same seed must give the same answer (float32 sums within a micro-batch round by its size), and a clock on a
busy machine does not. What the clock would have found is in `benchmarks/microbatch.py`: time per row falls with the
rows while they share the overhead of a call, and rises again once the tensors of a graph outgrow what the processor and
the allocator recycle. In bytes both ends lie at the same place for very different networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchflat.result import Answer

__all__ = ["PROBE_ROWS", "Plan", "choose_rows", "graphs_that_fit"]

PROBE_ROWS = 16
LARGEST_MICROBATCH = 4096
# One graph takes at most this share of the budget, so that the workspace stays small beside what is retained.
GRAPH_SHARE = 1 / 16
# Measured on networks of 2 KiB to 5 MiB a row: within about a tenth of the fastest size on each.
FASTEST_GRAPH = 128 * 2**20


@dataclass(frozen=True)
class Plan(Answer):
    """The micro-batch and why it has this size, and how many graphs were expected to be kept, and are.

    ``microbatch`` is None where batches are taken as they come. ``planned`` of ``graphs`` micro-batches fit into the
    memory budget before a Krylov basis takes its part, ``kept`` are there now. ``bytes_per_row`` is what the graph of a
    row keeps, and ``seconds_per_row`` the mean time that building it took. What is not known yet is None.
    """

    microbatch: int | None
    reason: str
    graphs: int | None
    planned: int | None
    kept: int
    bytes_per_row: float | None
    seconds_per_row: float | None


def choose_rows(bytes_per_row: float, budget: int, device: torch.device, limit: int | None) -> tuple[int, str]:
    """Return the rows of a micro-batch, and the reason: the tightest of the limits.

    ``limit`` is the largest number of rows that is known to fit the device, if memory has run out above it. Fewer than
    a probe has are taken only for its sake: single rows save no memory worth the time.

    >>> choose_rows(2.0**20, 2 * 2**30, torch.device("cpu"), None)
    (128, '1/16 of the memory budget')
    >>> choose_rows(2.0**20, 12 * 2**30, torch.device("cpu"), None)
    (128, 'larger graphs are slower')
    """
    share = int(budget * GRAPH_SHARE)
    choices = [(int(share / max(1.0, bytes_per_row)), "1/16 of the memory budget")]
    if device.type == "cpu":
        choices.append((int(FASTEST_GRAPH / max(1.0, bytes_per_row)), "larger graphs are slower"))
    choices.append((LARGEST_MICROBATCH, "more rows are no faster"))
    rows, reason = min(choices, key=lambda choice: choice[0])
    if rows < PROBE_ROWS:
        rows, reason = PROBE_ROWS, "fewer rows save no memory worth the time"
    return (rows, reason) if limit is None or rows <= limit else (limit, "memory ran out above")


def graphs_that_fit(rows: int, batch: int, microbatch: int, bytes_per_row: float, room: int) -> tuple[int, int]:
    """Return how many micro-batches ``rows`` rows make, in batches of ``batch``, and how many of them ``room`` holds.

    >>> graphs_that_fit(rows=1000, batch=1000, microbatch=128, bytes_per_row=10.0, room=4000)
    (8, 3)
    """
    graphs = -(-rows // batch) * -(-min(rows, batch) // microbatch)
    size = bytes_per_row * rows / graphs
    return graphs, min(graphs, int(room / size)) if size else graphs
