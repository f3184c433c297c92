"""The record of a run as columns of equal length, and as a file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchflat.errors import DataError, UsageError

__all__ = ["Columns", "load", "save", "tensorboard"]

Cell = float | int | str | None


class Columns(dict[str, list[Cell]]):
    """Columns by name; a row that lacks one, or comes before it was known, has None there.

    >>> history = Columns()
    >>> history.add({"step": 0, "loss": 1.5})
    >>> history.add({"step": 1, "lr": 0.1})
    >>> dict(history)
    {'step': [0, 1], 'loss': [1.5, None], 'lr': [None, 0.1]}
    """

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.values()), []))

    def add(self, row: Mapping[str, Cell]) -> None:
        """Append a row."""
        before = self.rows
        for name in row:
            if name not in self:
                self[name] = [None] * before
        for name, column in self.items():
            column.append(row.get(name))

    def row(self, index: int) -> dict[str, Cell]:
        """Return what is known of a row."""
        return {name: column[index] for name, column in self.items() if column[index] is not None}


def save(columns: Mapping[str, Sequence[Cell]], path: str | Path) -> None:
    """Write columns to a file: ``.csv``, where an unknown number is an empty cell, or ``.jsonl``, where it is left out.

    A number that is not finite is written as nan, inf or -inf, in JSON as a string.

    Raises:
        UsageError: the name ends in neither.
    """
    path, names = Path(path), list(columns)
    rows = zip(*columns.values(), strict=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    elif path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                known = {name: _finite(cell) for name, cell in zip(names, row, strict=True) if cell is not None}
                file.write(json.dumps(known, ensure_ascii=False) + "\n")
    else:
        raise UsageError(f"{path.name}: a history is written to a name that ends in .csv or .jsonl")


def load(path: str | Path) -> Columns:
    """Read columns from a file that :func:`save` wrote.

    Raises:
        UsageError: the name ends in neither .csv nor .jsonl.
        DataError: the file is not one of these.
    """
    path, columns = Path(path), Columns()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                names, *table = csv.reader(file)
                columns.update({name: [] for name in names})
                for row in table:
                    columns.add({name: _number(cell) for name, cell in zip(names, row, strict=True)})
            elif path.suffix == ".jsonl":
                for line in file:
                    columns.add({name: _number(cell) for name, cell in json.loads(line).items()})
            else:
                raise UsageError(f"{path.name}: a history is read from a name that ends in .csv or .jsonl")
    except (ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise DataError(f"{path.name} is not a history that was written by Tracker.save: {error}") from error
    return columns


def tensorboard(rows: Iterable[Mapping[str, Cell]], target: Any) -> None:
    """Write rows to a SummaryWriter, or to one that is made for a folder.

    Raises:
        UsageError: TensorBoard is not installed, and ``target`` is a folder.
    """
    writer = target
    if isinstance(target, (str, Path)):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"TensorBoard is not installed: pip install tensorboard ({error})") from error
        writer = SummaryWriter(str(target))
    for row in rows:
        for name, cell in row.items():
            if name != "step" and isinstance(cell, (int, float)):
                writer.add_scalar(name, cell, row["step"])
    if writer is target:
        writer.flush()
    else:
        writer.close()


def _finite(cell: Any) -> Any:
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def _number(cell: Any) -> Cell:
    """Return the number that a cell holds; a word where it is none."""
    if not isinstance(cell, str):
        return cell  # type: ignore[no-any-return]
    if not cell:
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
