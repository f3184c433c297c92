"""What an experiment is, and how one is run: configuration, data, figures, verdicts.

An experiment is a module of this package with

- ``TITLE``: what is reproduced, in one line;
- ``Config``: a frozen dataclass; its values come from ``configs/NAME.toml``, and ``[quick]`` there overrides them;
- ``CLAIMS``: what it expects, as :class:`~experiments.claim.Claim`, said before anything is computed;
- ``run(config, cells)``: compute, and return plain values for JSON; long work goes through
  :class:`~experiments.cells.Cells`;
- ``measure(data)``: the numbers of the claims, by name;
- ``draw(data)``: the figures, by name.

``measure`` and ``draw`` see nothing but what ``run`` returned and was written to ``data.json``.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, get_type_hints

import torch
from matplotlib.figure import Figure

import torchflat
from experiments.cells import Cells, write_json
from experiments.claim import Claim, Unreached, Verdict, judge
from torchflat.drawing import png, svg
from torchflat.errors import UsageError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

__all__ = ["CONFIGS", "NAMES", "Experiment", "conduct", "configure", "load", "redraw"]

NAMES = (
    "flat_gd",
    "flattening_flow",
    "flat_but_unbalanced",
    "ngd_examples",
    "scalar_networks",
    "intermediate_gains",
    "mnist_sharpness",
    "mnist_gains",
    "mnist_sections",
    "escape_to_infinity",
    "optimizers_mnist",
)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Experiment(Protocol):
    """The face of an experiment's module."""

    TITLE: str
    Config: type
    CLAIMS: Sequence[Claim]

    def run(self, config: Any, cells: Cells) -> dict[str, Any]:
        """Compute, and return plain values."""

    def measure(self, data: dict[str, Any]) -> Mapping[str, float | Unreached]:
        """Return the numbers of the claims."""

    def draw(self, data: dict[str, Any]) -> Mapping[str, Figure]:
        """Return the figures."""


def load(name: str) -> Experiment:
    """Return the experiment of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in NAMES:
        raise UsageError(f"no experiment is called {name!r}: choose from {', '.join(NAMES)}")
    return cast(Experiment, importlib.import_module(f"experiments.{name}"))


def configure(experiment: Experiment, file: Path, quick: bool) -> Any:
    """Read the configuration, with the table ``[quick]`` over it if that is asked for.

    Raises:
        UsageError: the file cannot be read, or a key is missing, not known, or of another type.
    """
    try:
        table = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file}: {error}") from None
    over = table.pop("quick", {})
    values = {**table, **(over if quick else {})}
    types = get_type_hints(experiment.Config)
    strange, missing = sorted({*values, *over} - set(types)), sorted(set(types) - set(values))
    if strange or missing:
        raise UsageError(
            f"{file}: keys that are not known: {strange or 'none'}; keys that are missing: {missing or 'none'}"
        )
    return experiment.Config(**{name: _converted(file, name, values[name], kind) for name, kind in types.items()})


def conduct(experiment: Experiment, name: str, config: Any, quick: bool, folder: Path) -> list[Verdict]:
    """Run the experiment, or what is left of it, and write data, figures and verdicts to the folder."""
    settings = dataclasses.asdict(config)
    data = experiment.run(config, Cells(folder / "cells"))
    write_json(folder / "data.json", data)
    write_json(
        folder / "run.json",
        {"experiment": name, "title": experiment.TITLE, "quick": quick, "config": settings, **environment()},
    )
    return redraw(experiment, folder)


def redraw(experiment: Experiment, folder: Path) -> list[Verdict]:
    """Draw the figures and judge the claims anew from the data in the folder.

    Raises:
        UsageError: there is no data.
    """
    file = folder / "data.json"
    if not file.exists():
        raise UsageError(f"{file} does not exist: run the experiment without --redraw")
    data = json.loads(file.read_text())
    verdicts = judge(experiment.CLAIMS, experiment.measure(data))
    for name, figure in experiment.draw(data).items():
        (folder / f"{name}.png").write_bytes(png(figure))
        (folder / f"{name}.svg").write_bytes(svg(figure))
    write_json(folder / "verdicts.json", [verdict.to_dict() for verdict in verdicts])
    return verdicts


def environment() -> dict[str, Any]:
    """Return what the numbers depend on besides the configuration."""
    return {
        "torchflat": torchflat.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _converted(file: Path, name: str, value: Any, kind: Any) -> Any:
    """Return the value as its type, lists as tuples; integers pass as floats."""
    if isinstance(value, list):
        value = tuple(tuple(each) if isinstance(each, list) else each for each in value)
    origin = getattr(kind, "__origin__", kind)
    if origin is float and type(value) is int:
        value = float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise UsageError(f"{file}: {name} = {value!r} must be of type {getattr(kind, '__name__', kind)}")
    return value
