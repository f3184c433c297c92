"""What is on file about a comparison, looked up by what was asked, and told in gradients."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import torchflat

__all__ = ["ERROR", "Record", "Records", "geometric_mean", "gradients", "is_default", "plain", "width", "written"]

Record = Mapping[str, Any]
ERROR = 1e-3  # of λ₁: what counts as the value
TUNED = ("batch", "threads")  # how a method runs, not what is asked of it


def written(result: Record, file: Path) -> str:
    """Write what was measured, with what it depends on, and return it as text."""
    used = {"torchflat": torchflat.__version__, "torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps({**result, **used, "processor": platform.machine()}, indent=1, ensure_ascii=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
    return text


class Records:
    """Measured cells, looked up by what was asked."""

    def __init__(self, records: Sequence[Record]) -> None:
        finished = sorted((each for each in records if each["status"] != "failed"), key=lambda each: each["date"])
        # The newest of each request: measured again, a probe may have chosen another batch size.
        newest = {(place(each), *sorted(plain(each["setting"]).items())): each for each in finished}
        self.all = list(newest.values())
        problems: dict[tuple[object, ...], str] = {}
        for record in self.all:
            key = (record["network"], record["rows"], record["setting"].get("order"))
            if problems.setdefault(key, record["problem"]) != record["problem"]:
                raise SystemExit(f"the cells of {key[0]} are of different weights or rows: measure them again (--redo)")

    def find(self, network: str, rows: int, method: str, /, **asked: Any) -> Record | None:
        """Return the cell of this very request, tuning aside."""
        for record in self.all:
            if place(record) == (network, rows, method) and plain(record["setting"]) == asked:
                return record
        return None

    def of(self, network: str, rows: int, method: str, key: str) -> list[Record]:
        """Return the cells whose setting has ``key``."""
        return [each for each in self.all if place(each) == (network, rows, method) and key in each["setting"]]

    def truth(self, network: str, rows: int) -> Record | None:
        """Return the cell with the true λ₁."""
        return self.find(network, rows, "torchflat", method="lanczos", rtol=1e-6)

    def error(self, record: Record) -> float:
        """Return |λ̂ − λ₁| / λ₁, infinite where there is no value."""
        truth = self.truth(record["network"], record["rows"])
        if truth is None or record["value"] is None:
            return math.inf
        return float(abs(record["value"] / truth["value"] - 1))

    def of_peer(self, network: str, rows: int, peer: str) -> Record | None:
        """Return the peer's quickest run that has the value; if there is none, the longest of the stopped ones."""
        runs = [run for key in ("tol", "max_iter") for run in self.of(network, rows, peer, key)]
        right = [run for run in runs if self.error(run) <= ERROR]
        stopped = [run for run in runs if run["status"] == "stopped"]
        if right:
            return min(right, key=gradients)
        return max(stopped, key=gradients) if stopped else None

    def to_value(self, record: Record) -> float:
        """Return the gradients' time until the value is, and stays, within ERROR."""
        truth = self.truth(record["network"], record["rows"])
        if truth is None or self.error(record) > ERROR:
            return math.inf
        reached = float(record["seconds"])
        for seconds, value, *_ in reversed(record.get("trace", [])):
            if abs(value / truth["value"] - 1) > ERROR:
                break
            reached = seconds
        return reached / unit(record)

    def sizes(self, network: str) -> list[int]:
        """Return the numbers of rows at which there is a true value."""
        return sorted(
            {record["rows"] for record in self.all if record["network"] == network}
            & {rows for rows in {record["rows"] for record in self.all} if self.truth(network, rows)}
        )

    def named(self, beginning: str) -> str | None:
        """Return the network with a true value whose name begins so."""
        names = sorted({record["network"] for record in self.all if record["network"].startswith(beginning)})
        return next((name for name in names if self.sizes(name)), None)


def place(record: Record) -> tuple[str, int, str]:
    return record["network"], record["rows"], record["method"]


def plain(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in setting.items() if key not in TUNED or "processes" in setting}


def unit(record: Record) -> float:
    before, after = record["gradient_seconds"]
    return float(before + after) / 2


def gradients(record: Record) -> float:
    return float(record["gradients"])


def width(record: Record) -> float | None:
    if record.get("upper") is None or record.get("lower") is None:
        return None
    return float((record["upper"] - record["lower"]) / abs(record["value"]))


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean.

    >>> geometric_mean([2, 8])
    4.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def is_default(run: Record) -> bool:
    return run["method"] == "torchflat" and not run["setting"]
