"""What the tests of single experiments share: small runs, their verdicts, and mutations of their data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.cells import Cells, write_json
from experiments.claim import Outcome, Verdict, judge

__all__ = ["Data", "conducted", "corrected", "mutated", "surprises", "verdicts"]

Data = dict[str, Any]


def verdicts(experiment: ModuleType, data: Data) -> dict[str, Verdict]:
    return {verdict.claim.number: verdict for verdict in judge(experiment.CLAIMS, experiment.measure(data))}


def surprises(experiment: ModuleType, data: Data) -> set[str]:
    return {number for number, verdict in verdicts(experiment, data).items() if not verdict.as_declared}


def mutated(data: Data, change: Callable[[Data], None]) -> Data:
    other = copy.deepcopy(data)
    change(other)
    return other


def conducted(experiment: ModuleType, config: Any, folder: Path) -> Data:
    data = experiment.run(config, Cells(folder))
    write_json(folder / "data.json", data)  # plain values only
    assert experiment.draw(data)
    return data


def corrected(experiment: ModuleType, data: Data) -> set[str]:
    """Return the claims of which the print is wrong."""
    return {number for number, v in verdicts(experiment, data).items() if v.outcome is Outcome.CORRECTED}
