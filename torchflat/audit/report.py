"""The report of an audit: one JSON-ready dict, its schema, a text table, and the folder it is saved to."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchflat.audit.orbit_words import account_sentences, coupling_cells, laws_sentences, orbit_sentences
from torchflat.audit.profile_words import profile_sentences
from torchflat.errors import UsageError
from torchflat.numerals import (
    columns,
    confidence,
    count,
    duration,
    memory,
    number,
    printable,
    share,
    shorten,
    span,
)
from torchflat.result import Status

__all__ = ["Report", "check", "footer_text", "schema", "table_lines", "wrapped", "write_whole"]

WIDTH = 80
BLOCKS_IN_TEXT = 12
PARTS = {
    "sharpness": "λ₁", "eigenvalues": "eigenvalues", "trace": "trace", "density": "density", "blocks": "blocks",
    "variation": "flatness profile", "laws": "laws", "orbit": "λ₁★",
}  # fmt: skip
# Lists of a part that have one entry for each of the same things.
_PARALLEL = {
    "density": ("grid", "density", "standard_error"),
    "variation": ("radii", "values", "slopes", "signs", "floor", "accuracy"),
}
_SUBSCRIPTS = str.maketrans("0123456789-n", "₀₁₂₃₄₅₆₇₈₉₋ₙ")


@dataclasses.dataclass(frozen=True)
class Report:
    """What one audit found. ``content`` is the dict that ``schema.json`` describes; ``None`` is unknown or infinite.

    >>> versions = {"torchflat": "0.1.0", "torch": "2.10.0", "python": "3.10.0"}
    >>> report = Report({"schema_version": "1", "status": "partial", "provenance": versions})
    >>> report.validate().to_dict()["status"]
    'partial'
    """

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the content as a dict of its own: changing it does not change the report."""
        return copy.deepcopy(dict(self.content))

    def to_json(self) -> str:
        """Return the content as indented JSON with a final newline. Raises ``ValueError`` if a number is not finite."""
        return json.dumps(self.content, indent=2, allow_nan=False) + "\n"

    def text(self) -> str:
        """Return the report as a table for a terminal, at most 80 columns wide whatever it holds."""
        return "\n".join(line.rstrip() for part in _TEXT_PARTS for line in part(self.content)) + "\n"

    def validate(self) -> Report:
        """Return the report itself, or raise :class:`~torchflat.errors.UsageError` naming what the schema refuses."""
        check(self.content, schema(), "report")
        for part, keys in _PARALLEL.items():
            lengths = {key: len(held) for key in keys if (held := self.content.get(part, {}).get(key)) is not None}
            if len(set(lengths.values())) > 1:
                raise UsageError(f"not a torchflat report: the lists of $.{part} differ in length: {lengths}")
        return self

    def save(self, folder: str | os.PathLike[str], force: bool = False) -> Path:
        """Write ``report.json``, ``report.html`` and the figures (``*.png``) into ``folder``, and return it.

        The folder is made if need be. Every file appears whole or not at all, and ``report.json`` comes first, since
        all the others can be made again from it: ``Report.load(folder).save(folder, force=True)``.

        Raises :class:`~torchflat.errors.UsageError` if the folder holds a report and ``force`` is not given, or if it
        cannot be written.
        """
        from torchflat.audit import figures, page

        self.validate()
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not force and (held := [name for name in ("report.json", "report.html") if (folder / name).exists()]):
                raise UsageError(f"{folder} already holds {held[0]}: name another folder, or overwrite it with --force")
            write_whole(folder / "report.json", self.to_json().encode())
            pictures = {name: figures.png(figure) for name, figure in figures.draw(self.content).items()}
            for name in figures.FIGURES:
                if name in pictures:
                    write_whole(folder / f"{name}.png", pictures[name])
                else:
                    (folder / f"{name}.png").unlink(missing_ok=True)  # of the report that is being replaced
            write_whole(folder / "report.html", page.report_page(self.content, pictures).encode())
        except OSError as error:
            raise UsageError(f"cannot write the report to {folder}: {error.strerror}; name another folder") from error
        return folder

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Return the report saved at ``path``: a ``report.json``, or the folder that holds it.

        Raises :class:`~torchflat.errors.UsageError` if there is none, or if the schema refuses it.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the report {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a torchflat report: no valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise UsageError(f"{path} is not a torchflat report: it holds a {type(content).__name__}, not an object")
        return cls(content).validate()


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of a report (draft 2020-12). Shared by all callers: not to be changed."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    return content


def check(content: Mapping[str, Any], against: Mapping[str, Any], kind: str) -> None:
    """Raise :class:`~torchflat.errors.UsageError` naming what the schema refuses, or what JSON cannot hold."""
    import jsonschema
    from referencing import Registry, Resource

    version = content.get("schema_version")
    if version != "1":
        raise UsageError(f"the {kind} has schema_version {version!r}, this torchflat reads '1': use the one it is from")
    # Other schemas refer to that of the report.
    known = Registry().with_resource(schema()["$id"], Resource.from_contents(schema()))
    validator = jsonschema.Draft202012Validator(against, registry=known)
    fault = jsonschema.exceptions.best_match(validator.iter_errors(content))
    if fault is not None:
        raise UsageError(f"not a torchflat {kind}: {fault.json_path}: {shorten(fault.message, 160)}")
    try:
        json.dumps(content, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"not a torchflat {kind}: {error}; unknown and infinite numbers are null") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- text ----------------------------------------------------------------------------------------------------------


def _pad(text: str, width: int, right: bool = False) -> str:
    blank = " " * (width - columns(text))
    return blank + text if right else text + blank


def wrapped(text: str, mark: str) -> list[str]:
    """Return the lines of a text that begins with a mark, in as many columns as a terminal has at least."""
    text = printable(text)
    # Where characters are two columns wide, half as many fit.
    width = WIDTH if columns(text) == len(text) else WIDTH // 2
    return textwrap.wrap(text, width, initial_indent=f"{mark} ", subsequent_indent="  ")


def eigenvalue_name(index: int, smallest: bool = False) -> str:
    """Return ``λ₁``, ``λ₂``, … for index 0, 1, … from the largest; ``λₙ``, ``λₙ₋₁``, … from the smallest."""
    name = ("n" if index == 0 else f"n-{index}") if smallest else str(index + 1)
    return "λ" + name.translate(_SUBSCRIPTS)


def _mark(status: str) -> str:
    return "✓" if status == Status.CONVERGED.name else "!"


def _header_text(report: Mapping[str, Any]) -> Iterator[str]:
    provenance, point = report["provenance"], report.get("point", {})
    checkpoint, data = provenance.get("checkpoint") or {}, provenance.get("data") or {}
    if report["status"] == "partial":
        yield from wrapped("PARTIAL REPORT: the audit did not finish; what is missing has not run.", "!")
        yield ""
    rows = point.get("rows", data.get("rows"))
    facts: tuple[tuple[str, Any, Callable[[Any], str]], ...] = (
        ("task", provenance.get("task"), str),
        ("checkpoint", checkpoint.get("path"), str),
        ("data", rows, lambda rows: f"{count(rows)} rows"),
        ("parameters", point.get("parameters"), count),
        ("loss", point.get("loss"), number),
        ("|gradient|", point.get("gradient_norm"), number),
    )
    for label, fact, show in facts:
        if fact is not None:
            yield f"{label:<12}{shorten(show(fact), WIDTH - 12)}"


def table_lines(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    """Lay out rows (the first is the head) in columns; the first column gives way where 80 columns are not enough."""
    widths = [max(columns(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    for row in rows:
        cells = (_pad(shorten(cell, widths[i]), widths[i], right=i in right) for i, cell in enumerate(row))
        yield "  ".join(cells)


def _numbers_text(report: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (label, *span(part["value"], part["lower"], part["upper"]), confidence(level), _mark(status))
        for label, part, level, status in _measured(report)
    ]
    if rows:
        yield ""
        yield from table_lines([("", "value", "interval", "conf.", ""), *rows], right=(1, 3))
    sharpness = report.get("sharpness", {})
    if sharpness.get("largest_stable_step", ...) is None:
        yield "2/λ₁ stable step: none, because λ₁ is not positive"
    fresh = sharpness.get("sampling")
    if fresh and fresh["lower"] is not None:
        interval = span(fresh["value"], fresh["lower"], fresh["upper"])[1]
        level = confidence(fresh["confidence"])
        yield from wrapped(f"on fresh data of the same size: λ₁ in {interval} with {level}, to first order", "·")


def _measured(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], float | None, str]]:
    """Yield label, interval, confidence and status of every number that has an interval, but for the blocks."""
    sharpness, pairs, trace = (report.get(key) for key in ("sharpness", "eigenvalues", "trace"))
    if sharpness:
        yield "λ₁ sharpness", sharpness, sharpness["confidence"], sharpness["status"]
        if sharpness.get("largest_stable_step"):
            yield "2/λ₁ stable step", sharpness["largest_stable_step"], sharpness["confidence"], sharpness["status"]
    if pairs:
        # λ₁ stands above, from the run that was made for it.
        for index, pair in list(enumerate(pairs["largest"]))[1 if sharpness else 0 :]:
            yield eigenvalue_name(index), pair, pairs["confidence"], pairs["status"]
        for index, pair in reversed(list(enumerate(pairs["smallest"]))):
            label = eigenvalue_name(index, smallest=True) + (" smallest" if index == 0 else "")
            yield label, pair, pairs["confidence"], pairs["status"]
    if trace:
        yield "trace", trace, trace["confidence"], trace["status"]
    if orbit := report.get("orbit"):
        yield "λ₁★ rescaled", orbit, orbit["confidence"], orbit["status"]


def _blocks_text(report: Mapping[str, Any]) -> Iterator[str]:
    blocks = report.get("blocks")
    if not blocks or not blocks["rows"]:
        return
    ranked = sorted(blocks["rows"], key=lambda row: (row["value"] is None, -(row["value"] or 0)))
    rows = [
        (
            printable(row["name"]),
            count(row["parameters"]),
            *span(row["value"], row["lower"], row["upper"], digits=4),
            share(row.get("share")),
            _mark(row["status"]),
        )
        for row in ranked[:BLOCKS_IN_TEXT]
    ]
    head = (f"block ({confidence(blocks['confidence'])})", "size", "λ₁", "interval", "share", "")
    yield ""
    yield from table_lines([head, *rows], right=(1, 2, 4))
    if len(ranked) > len(rows):
        yield f"… and {count(len(ranked) - len(rows))} more blocks below these"


def _profile_text(report: Mapping[str, Any]) -> Iterator[str]:
    yield from _sentences_text(profile_sentences(report))


def _orbit_text(report: Mapping[str, Any]) -> Iterator[str]:
    laws = report.get("laws")
    if laws and laws["couplings"]:
        ranked = sorted(laws["couplings"], key=lambda row: -(row["imbalance"] or 0))
        head = ("coupling", "kind", "channels", "laws", "imbalance", "writers/readers", "dead")
        rows = [(printable(row["name"]), *coupling_cells(row)) for row in ranked[:BLOCKS_IN_TEXT]]
        dead = any(row[-1] for row in rows)
        yield ""
        yield from table_lines([row if dead else row[:-1] for row in (head, *rows)], right=(2, 3, 4, 6))
        if len(ranked) > len(rows):
            yield f"… and {count(len(ranked) - len(rows))} more couplings below these"
    said = orbit_sentences(report.get("orbit")), laws_sentences(laws), account_sentences(report.get("account"))
    yield from _sentences_text(itertools.chain(*said))


def _sentences_text(sentences: Iterable[str]) -> Iterator[str]:
    for index, sentence in enumerate(sentences):
        if index == 0:
            yield ""
        yield from wrapped(sentence, "·")


def _notes_text(report: Mapping[str, Any]) -> Iterator[str]:
    notes = list(notes_of(report))
    if notes:
        yield ""
    for note in notes:
        yield from wrapped(note, "!")


def notes_of(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the reader should be warned of: how parts ended that did not converge, and the audit's own notes."""
    for key, name in PARTS.items():
        status = report.get(key, {}).get("status", Status.CONVERGED.name)
        if status != Status.CONVERGED.name:
            yield f"{name}: {Status[status].value}."
    yield from report["provenance"].get("notes", ())


def footer_text(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the last lines: what was spent, and with which versions."""
    yield ""
    cost, provenance = report.get("cost"), report["provenance"]
    if cost:
        spent = (
            f"{count(cost['gradients'])} gradients ({count(cost['products'])} products), {duration(cost['seconds'])}"
        )
        peak = cost.get("peak_memory_bytes")
        yield from wrapped(f"cost: {spent}" + ("" if peak is None else f", {memory(peak)} at the peak"), "·")
    if plan := plan_sentence(provenance.get("plan"), (cost or {}).get("products", 0)):
        yield from wrapped(f"plan: {plan}", "·")
    facts: Sequence[str | None] = (
        f"torchflat {provenance['torchflat']}",
        f"torch {provenance['torch']}",
        provenance.get("device"),
        provenance.get("dtype"),
        f"seed {provenance['seed']}" if provenance.get("seed") is not None else None,
        f"{provenance['ops']} kernels" if provenance.get("ops") else None,
        f"{provenance['processes']} processes" if (provenance.get("processes") or 1) > 1 else None,
    )
    yield from wrapped(", ".join(fact for fact in facts if fact), "·")


def plan_sentence(plan: Mapping[str, Any] | None, products: float) -> str:
    """Say how passes went through the data: ``up to 128 rows at once (as given), 3 of 8 graphs kept, 12 KiB a row``.

    Graphs are kept for ``products`` only.
    """
    if not plan:
        return ""
    rows, graphs, each = plan.get("microbatch"), plan.get("graphs"), plan.get("bytes_per_row")
    reason = plan.get("reason", "")
    facts = [reason if rows is None else f"up to {count(rows)} rows at once" + (f" ({reason})" if reason else "")]
    if graphs is not None and products:
        kept, planned = plan.get("kept"), plan.get("planned")
        expected = "" if planned in (None, kept) else f" in the end, {count(planned)} expected"
        facts.append(f"{count(kept)} of {count(graphs)} graphs kept{expected}")
    if each is not None:
        facts.append(f"{memory(each)} a row")
    return ", ".join(fact for fact in facts if fact)


_TEXT_PARTS = (_header_text, _numbers_text, _blocks_text, _profile_text, _orbit_text, _notes_text, footer_text)
