"""A stretch of steps, worked out at once: what was read before each, and the rows that it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat.optim.account import Account
from torchflat.optim.follower import Reading
from torchflat.optim.history import Cell
from torchflat.optim.moves import Move, Moves
from torchflat.optim.sweep import Swept
from torchflat.symmetry import Coupling

__all__ = ["Seen", "Travelled", "work_out"]


@dataclass
class Seen:
    """What was read of x_k and its gradient before a step, by :meth:`torchflat.optim.sweep.Sweep.read`.

    Args:
        step: k.
        x: the parameters; None where there is to be no row.
        g: the gradients, where the step is plain; then ``move`` says what it does with them.
        squares: |g_p|² where it is not plain, and there is to be a row.
        rates: learning rates, by column.
        edge_rate: η for a step that is not plain; None if it is, or nothing is known.
        loss: f(x_k).
        reading: λ₁.
        length: of the step, where it was measured.
        open: whether the step has not ended yet.
    """

    step: int
    x: Tensor | None
    g: Tensor | None
    squares: Tensor | None
    move: Move | None
    rates: dict[str, Cell]
    edge_rate: float | None
    loss: Tensor | float | None
    reading: Reading | None
    length: Tensor | None = None
    open: bool = True


class Travelled:
    """Σα and Σα² of the steps so far; None before any length was known."""

    def __init__(self, sums: Sequence[float] | None = None) -> None:
        self.sums = None if sums is None else list(sums)

    def add(self, length: float | None) -> dict[str, Cell]:
        """Enter a step, if its length is known, and return both sums."""
        if length is not None:
            total, squares = self.sums or (0.0, 0.0)
            self.sums = [total + length, squares + length**2]
        if self.sums is None:
            return {"sum_length": None, "sum_length_squared": None}
        return {"sum_length": self.sums[0], "sum_length_squared": self.sums[1]}


def work_out(account: Account, moves: Moves, seen: Sequence[Seen], travelled: Travelled) -> Iterator[dict[str, Cell]]:
    """Enter the steps into the account, in order, and yield the rows; either all of the steps are plain, or none is."""
    rows = [index for index, each in enumerate(seen) if each.x is not None]
    x = account.sweep([each.x for each in seen if each.x is not None])
    plain = [each.move for each in seen if each.move is not None]
    g = factors = None
    lengths: list[float | None] = [None if each.length is None else float(each.length) for each in seen]
    if plain:
        g = _unscaled(account.sweep([each.g for each in seen if each.g is not None]), plain)
        factors = moves.factors(plain, g.squares)
        found = _total(torch.where(factors != 0, factors.square() * g.squares, 0.0)).sqrt().tolist()
        lengths = [known if measured is None else measured for measured, known in zip(lengths, found, strict=True)]
    statistics = account.enter(x, rows, g, factors, len(seen)).tolist()
    inside = moves.inside
    parameter_norms = _total(x.squares[:inside]).sqrt().tolist()
    sums = [travelled.add(length) for length in lengths]
    row = 0
    for index, each in enumerate(seen):
        if each.x is None:
            continue
        squares = each.squares if g is None else g.squares[:, index]
        assert squares is not None
        cells: dict[str, Cell] = {"step": each.step, "loss": None if each.loss is None else float(each.loss)}
        cells |= each.rates
        cells |= {"parameter_norm": parameter_norms[row], "gradient_norm": float(_total(squares[:inside]).sqrt())}
        cells["length"] = lengths[index]
        cells |= _of_laws(account, [[law[row] for law in statistic] for statistic in statistics])
        cells |= sums[index]
        if each.reading is not None:
            rate = each.edge_rate if factors is None else float(factors[:, index].max())
            cells |= {"sharpness": each.reading.value, "sharpness_status": each.reading.status.name}
            cells["edge"] = None if rate is None else rate * each.reading.value
        yield cells
        row += 1


def _total(columns: Tensor) -> Tensor:
    """Sum down each column in one order, however many there are: a resumed run cuts stretches elsewhere."""
    return columns.cumsum(0)[-1]


def _of_laws(account: Account, statistics: Sequence[Sequence[float]]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for law, (balance, imbalance, drift, unexplained) in zip(
        account.sweep.laws, zip(*statistics, strict=True), strict=True
    ):
        if isinstance(law, Coupling):
            cells |= {f"balance/{law.name}": balance, f"imbalance/{law.name}": imbalance}
        cells[f"drift/{law.name}"] = drift
        if law.name not in account.refused:
            cells[f"unexplained/{law.name}"] = unexplained
    return cells


def _unscaled(g: Swept, moves: Sequence[Move]) -> Swept:
    """Take out the factor of a GradScaler, where the optimizer does that itself in its step."""
    if all(move.scale is None for move in moves):
        return g
    square = torch.stack([g.squares.new_ones(()) if move.scale is None else move.scale for move in moves]).square()
    return Swept(g.values / square, g.masses / square, g.squares / square)
