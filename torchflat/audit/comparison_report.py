"""The report of a comparison: one JSON-ready dict, its schema, a text table, and the folder it is saved to."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchflat.audit.profile_words import order_words, radius_words
from torchflat.audit.report import check, footer_text, table_lines, wrapped, write_whole
from torchflat.errors import UsageError
from torchflat.flatness.profiles import Verdict
from torchflat.numerals import count, number, shorten

__all__ = ["ComparisonReport", "grounds", "named", "side_rows", "verdict_words", "verdicts"]

FILES = ("compare.json", "compare.html", "profiles.png")


@dataclass(frozen=True)
class ComparisonReport:
    """What one comparison found. ``content`` is the dict that ``comparison.schema.json`` describes."""

    content: Mapping[str, Any]

    @property
    def verdict(self) -> Verdict:
        """Whether A is flatter than B."""
        return Verdict[self.content["verdict"]]

    def to_json(self) -> str:
        """Return the content as indented JSON with a final newline."""
        return json.dumps(self.content, indent=2, allow_nan=False) + "\n"

    def text(self) -> str:
        """Return the verdict and a table of both points for a terminal, at most 80 columns wide."""
        return "\n".join(line.rstrip() for line in _text(self.content)) + "\n"

    def validate(self) -> ComparisonReport:
        """Return the report itself, or raise :class:`~torchflat.errors.UsageError` naming what the schema refuses."""
        check(self.content, schema(), "comparison")
        return self

    def save(self, folder: str | os.PathLike[str], force: bool = False) -> Path:
        """Write ``compare.json``, ``compare.html`` and ``profiles.png`` into ``folder``, and return it.

        Raises :class:`~torchflat.errors.UsageError` if the folder holds one of them and ``force`` is not given, or if
        it cannot be written.
        """
        from torchflat.audit.comparison_page import comparison_page
        from torchflat.audit.profile_figures import comparison
        from torchflat.drawing import png

        self.validate()
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not force and (held := [name for name in FILES if (folder / name).exists()]):
                raise UsageError(f"{folder} already holds {held[0]}: name another folder, or overwrite it with --force")
            write_whole(folder / "compare.json", self.to_json().encode())
            drawn = comparison(self.content)
            picture = None if drawn is None else png(drawn)
            if picture is None:
                (folder / "profiles.png").unlink(missing_ok=True)  # of the comparison that is being replaced
            else:
                write_whole(folder / "profiles.png", picture)
            write_whole(folder / "compare.html", comparison_page(self.content, picture).encode())
        except OSError as error:
            raise UsageError(f"cannot write the report to {folder}: {error.strerror}; name another folder") from error
        return folder


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of a comparison (draft 2020-12). Shared by all callers: not to be changed."""
    file = Path(__file__).with_name("comparison.schema.json")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def verdict_words(name: str) -> str:
    """Return a verdict with the points named.

    >>> verdict_words("FLATTER"), verdict_words("EQUIVALENT")
    ('A is flatter than B', 'A and B are equally flat, within the tolerance')
    """
    than = " than B" if name in ("FLATTER", "SHARPER") else ""
    return named(Verdict[name].value) + than


def named(sentence: str) -> str:
    """Return a sentence of the library with A for its first point and B for its second."""
    for said, name in (
        ("the two points", "A and B"), ("the first point", "A"), ("the second point", "B"), ("the second", "B"),
    ):  # fmt: skip
        sentence = sentence.replace(said, name)
    return sentence


def grounds(content: Mapping[str, Any]) -> str:
    """Say what decided, and down to which radius it holds."""
    by, radius = content["decided_by"], content["radius"]
    if by is None:
        return f"Undecided: {named(content['reason'])}."
    down = "" if radius is None else f", down to r = {number(radius, 3)}"
    return f"Decided by {by}{down}: {named(content['reason'])}."


def verdicts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the two verdicts of which one was taken, each with the name of where it holds."""
    yield "as r goes to 0", verdict_words(content["verdict_limit"])
    yield "where curvature shows", verdict_words(content["verdict_curvature"])


def side_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield a label, and what it is for A and for B, for every row of the table."""
    sides = content["first"], content["second"]
    points = [side["variation"] for side in sides]

    def row(label: str, values: list[str]) -> tuple[str, str, str]:
        return label, *values  # type: ignore[return-value]

    yield row("checkpoint", [(side["checkpoint"] or {}).get("path") or "–" for side in sides])
    yield row("parameters", [count(side["parameters"]) for side in sides])
    yield row("|x|", [number(side["parameter_norm"]) for side in sides])
    yield row("loss", [number(point["level"]) for point in points])
    yield row("|gradient|", [number(point["gradient_norm"]) for point in points])
    orders = [point["order"] for point in points]
    yield row("order", [_order(order) for order in orders])
    yield row("modulus", [number(order["modulus"]["value"]) if order else "–" for order in orders])
    yield row("change within r", [order_words(order) or "–" for order in orders])
    yield row("loss doubles at", [_doubling(side) for side in sides])


def _order(order: Mapping[str, Any] | None) -> str:
    if order is None or order["p"]["value"] is None:
        return "–"
    return f"{order['p']['value']:.3g}" + ("" if order["exact"] else " or so")


def _doubling(side: Mapping[str, Any]) -> str:
    radius = side["variation"]["doubling_radius"]
    return "–" if radius is None else radius_words(radius, side["parameter_norm"])


def _text(content: Mapping[str, Any]) -> Iterator[str]:
    yield verdict_words(content["verdict"])
    yield from wrapped(grounds(content), "·")
    for place, verdict in verdicts(content):
        yield from wrapped(f"{place}: {verdict}", "·")
    yield from wrapped(f"relative differences below {100 * content['tolerance']:g} % count as none", "·")
    yield ""
    yield from table_lines([("", "A", "B"), *_narrow(side_rows(content))], right=())
    notes = [*map(named, content["cautions"]), *content["provenance"].get("notes", ())]
    if notes:
        yield ""
    for note in notes:
        yield from wrapped(note, "!")
    yield from footer_text(content)


def _narrow(rows: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    for label, first, second in rows:
        yield label, shorten(first, 29), shorten(second, 29)
