"""The page of results: what the papers say beside what was measured, from the files that the experiments wrote.

Every number in it is one of ``verdicts.json`` or ``run.json`` of an experiment's folder; what an experiment is about is
the docstring of its module.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.claim import Outcome, told
from experiments.experiment import CONFIGS, NAMES, configure, load
from torchflat.errors import UsageError

__all__ = ["PAGE", "RESULTS", "write_page"]

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE = "README.md"
INTRODUCTION = f"""\
# The four papers, reproduced

What is printed beside what was measured. Claims, bounds and the expected outcome stand in the module of each
experiment, ahead of its runs; one that was settled after a shorter run says so there. A number within the bounds of the
printed statement is *{Outcome.REPRODUCED.value}*, one within those of the corrected statement is
*{Outcome.CORRECTED.value}*, and one that a run would have needed more time for is *{Outcome.NOT_REACHED.value}*.
Numbers such as T035 count the papers' statements, as they were checked one by one.

`python -m experiments --page` writes this page. Every measured number is one of the `verdicts.json` or `run.json` that
the command of its section wrote; a figure is a link to its SVG.
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """The folder that an experiment wrote."""

    name: str
    run: Mapping[str, Any]
    verdicts: list[dict[str, Any]]
    figures: list[str]

    @property
    def scale(self) -> str:
        """Return ``quick`` or ``full``."""
        return "quick" if self.run["quick"] else "full"

    def count(self, outcome: Outcome) -> int:
        """Return how many claims came out like this."""
        return sum(verdict["outcome"] == outcome.value for verdict in self.verdicts)


def write_page(results: Path = RESULTS) -> Path:
    """Write the page of the folders in ``results``, one for each experiment that was run, and return the file.

    Raises:
        UsageError: no experiment was run into that folder, or a file of one is missing or damaged.
    """
    found = [result for result in (_read(results, name) for name in NAMES) if result is not None]
    if not found:
        raise UsageError(
            f"{results} holds no results: run python -m experiments NAME --out {results}/NAME, with the NAMEs of --list"
        )
    lines = [INTRODUCTION, *_overview(found), *_surprises(found)]
    for result in found:
        lines += _section(result)
    file = results / PAGE
    file.write_text("\n".join(lines).rstrip() + "\n")
    return file


def _read(results: Path, name: str) -> Result | None:
    folder = results / name
    if not folder.exists():
        return None
    try:
        run, verdicts = (json.loads((folder / f"{each}.json").read_text()) for each in ("run", "verdicts"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{folder} is not what a run left: {error}; run python -m experiments {name}") from None
    return Result(name, run, verdicts, sorted(file.stem for file in folder.glob("*.png")))


def _overview(found: list[Result]) -> Iterator[str]:
    yield f"| experiment | scale | {' | '.join(outcome.value for outcome in Outcome)} | as declared |"
    yield f"|---|---|{'--:|' * (len(Outcome) + 1)}"
    for result in found:
        counts = " | ".join(str(result.count(outcome)) for outcome in Outcome)
        declared = sum(verdict["as_declared"] for verdict in result.verdicts)
        title = _escaped(result.run["title"])
        yield f"| [{title}](#{result.name}) | {result.scale} | {counts} | {declared} of {len(result.verdicts)} |"
    for name in sorted(set(NAMES) - {result.name for result in found}):
        yield f"| {_escaped(load(name).TITLE)}: `python -m experiments {name}` | not run |{' |' * (len(Outcome) + 1)}"
    yield ""


def _surprises(found: list[Result]) -> Iterator[str]:
    """List, before everything else, what the papers say and these runs do not show."""
    open_ones = [
        (result, verdict)
        for result in found
        for verdict in result.verdicts
        if not verdict["as_declared"] or Outcome(verdict["outcome"]) in (Outcome.NOT_REPRODUCED, Outcome.NOT_REACHED)
    ]
    yield "## Not reproduced, not reached, or not as declared"
    yield ""
    for result, verdict in open_ones:
        surprise = "" if verdict["as_declared"] else f" (declared: {verdict['expected']})"
        says = f"{verdict['says']} ({verdict['source']}): {_measured(verdict)}, {_beside(verdict)}"
        yield f"- [{result.name}](#{result.name}): **{verdict['outcome']}**{surprise}: {_escaped(says)}"
    yield "" if open_ones else "Nothing.\n"


def _section(result: Result) -> Iterator[str]:
    yield f"## {result.name}"
    yield ""
    yield f"**{_escaped(result.run['title'])}**"
    yield ""
    yield _about(result.name)
    yield ""
    for figure in result.figures:
        yield f"[![{figure}]({result.name}/{figure}.png)]({result.name}/{figure}.svg)"
        yield ""
    yield "| claim | source | as printed | as corrected | measured | outcome |"
    yield "|---|---|--:|--:|--:|---|"
    for verdict in result.verdicts:
        columns = (
            _escaped(verdict["says"]),
            _escaped(verdict["source"]),
            _bounds(verdict["printed"]),
            _bounds(verdict["corrected"]),
            _escaped(_measured(verdict)),
            verdict["outcome"] if verdict["as_declared"] else f"**{verdict['outcome']}**, not as declared",
        )
        yield f"| {' | '.join(columns)} |"
    yield ""
    yield from _provenance(result)


def _provenance(result: Result) -> Iterator[str]:
    run = result.run
    flag = " --quick" if run["quick"] else ""
    file = CONFIGS / f"{result.name}.toml"
    yield f"`python -m experiments {result.name}{flag} --out docs/results/{result.name}`"
    yield ""
    own = json.loads(json.dumps(dataclasses.asdict(configure(load(result.name), file, run["quick"]))))
    changed = [f"{key} = {value}" for key, value in run["config"].items() if own.get(key) != value]
    settings = f"as in configs/{file.name}" + (f", but {', '.join(changed)}" if changed else "")
    yield (
        f"Scale: {result.scale}, {settings}. torch {run['torch']}, {run['machine']}, threads: {run['threads']}, "
        f"{run['date'][:10]}. Files: [{result.name}]({result.name})."
    )
    yield ""


def _about(name: str) -> str:
    """Return the docstring of an experiment's module below its first line."""
    text = inspect.getdoc(load(name)) or ""
    return text.partition("\n\n")[2] or text


def _measured(verdict: Mapping[str, Any]) -> str:
    """Return the number with the digits that its bounds ask for."""
    value = verdict["measured"]
    if isinstance(value, str):
        return value
    bounds = [each for each in (verdict["printed"], verdict["corrected"]) if each is not None]
    widths = [(high - low) / abs(high + low) for low, high in bounds if 0 < high - low < abs(high + low) < math.inf]
    return f"{value:.{max([4, *(math.ceil(-math.log10(width)) + 1 for width in widths)])}g}"


def _beside(verdict: Mapping[str, Any]) -> str:
    names = ("printed", "corrected")
    return ", ".join(f"{name} {_bounds(verdict[name])}" for name in names if verdict[name] is not None)


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else told(bounds)


def _escaped(text: str) -> str:
    """Return the text so that Markdown shows it as it is, in a table as well."""
    return re.sub(r"([|*<])", r"\\\1", text)
