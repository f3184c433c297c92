"""Pieces of self-contained HTML pages: nothing is fetched, no script runs, every figure is inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchflat import numerals
from torchflat.result import Status

__all__ = [
    "badge",
    "cell",
    "document",
    "ending",
    "figure",
    "interval_cells",
    "number",
    "plain",
    "prose",
    "row_header",
    "section",
    "sentence",
    "span",
    "table",
    "text",
    "typeset",
    "words",
]

_PNG_SIZE = slice(16, 24)  # width and height, 4 bytes each, big-endian, in the header of every PNG


def document(title: str, body: str, provenance: Mapping[str, Any]) -> str:
    """Return a whole page: its head with the style, the body, and a footer with the versions."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)} – torchflat audit</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer><p>torchflat {text(provenance['torchflat'])} · torch {text(provenance['torch'])}</p></footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, body: str) -> str:
    """Return a section with a heading; nothing for an empty body."""
    if not body:
        return ""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}</section>'


def text(value: str) -> str:
    """Escape what is not ours: one printable line."""
    return html.escape(numerals.printable(value))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number, rounded, in digits of one width."""
    return f'<span class="number">{typeset(numerals.number(value, digits))}</span>'


def typeset(shown: str) -> str:
    """Turn the numbers of a text into HTML: a true minus sign, and powers of ten as such."""
    return re.sub(r"e(−?\d+)", r"×10<sup>\1</sup>", shown.replace("-", "−"))


def prose(sentence: str) -> str:
    """Return a sentence of ours with its numbers set, and r^2 as a power."""
    return re.sub(r"\^(−?[0-9.]+)", r"<sup>\1</sup>", typeset(text(sentence))).replace("r = ", "r&nbsp;=&nbsp;")


def span(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return a number and its interval; see :func:`torchflat.numerals.span`."""
    value, interval = numerals.span(part["value"], part["lower"], part["upper"])
    return typeset(value), f'<span class="number">{typeset(interval)}</span>'


def plain(value: float | None) -> str:
    """Return a number for those who hear the page."""
    return numerals.number(value).replace("-", "minus ")


def words(part: Mapping[str, Any]) -> str:
    """Return a number and its interval in words, for those who hear the page."""
    value, interval = numerals.span(part["value"], part["lower"], part["upper"])
    low, high = interval[1:-1].replace("-", "minus ").split(", ")
    low, high = low.replace("(−∞", "unknown").replace("−∞", "unknown"), high.replace("∞", "unknown")
    return f"{value.replace('-', 'minus ')}, between {low} and {high}"


def interval_cells(part: Mapping[str, Any]) -> str:
    """Return two cells of a table: the number, and its interval."""
    if not part:
        return cell("–", "n") + cell("–", "i")
    value, interval = span(part)
    return cell(value, "n") + cell(interval, "i")


def cell(content: str, kind: str = "") -> str:
    """Return a cell; kind ``n`` is for numbers, ``i`` for intervals."""
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def row_header(name: str, code: bool = False) -> str:
    """Return the first cell of a row, shortened; the whole name is its title."""
    shown = text(numerals.shorten(name, 60))
    return f'<th scope="row" title="{text(name)}">{f"<code>{shown}</code>" if code else shown}</th>'


def table(heads: Sequence[tuple[str, str]], rows: Iterable[str], caption: str = "") -> str:
    """Return a table. ``heads`` are names and kinds of the columns, ``rows`` the cells of each."""
    head = "".join(
        f'<th scope="col" class="{kind}">{name}</th>' if kind else f'<th scope="col">{name}</th>'
        for name, kind in heads
    )
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def badge(status: str) -> str:
    """Return how something ended, as a coloured word."""
    name = status.lower().replace("_", " ")
    kind = "badge" if status == Status.CONVERGED.name else "badge warn"
    return f'<span class="{kind}" title="{html.escape(Status[status].value)}">{name}</span>'


def ending(part: Mapping[str, Any]) -> str:
    """Say at which confidence a part holds and, unless it converged, how it ended."""
    status = part["status"]
    level = f"Confidence {numerals.confidence(part['confidence'])}." if part.get("confidence") is not None else ""
    how = "" if status == Status.CONVERGED.name else f"{badge(status)} {html.escape(Status[status].value)}"
    return " ".join(piece for piece in (level, how) if piece)


def sentence(facts: Mapping[str, str]) -> str:
    """Return a line of facts with their labels."""
    return f'<p class="soft">{" · ".join(f"{label} {value}" for label, value in facts.items())}</p>'


def figure(picture: bytes, alt: str) -> str:
    """Return a PNG inside the page; ``alt`` says what it shows."""
    width, height = (int.from_bytes(picture[_PNG_SIZE][i : i + 4], "big") // 2 for i in (0, 4))
    data = base64.b64encode(picture).decode("ascii")
    size = f'width="{width}" height="{height}"'
    return f'<figure><img {size} alt="{text(alt)}" src="data:image/png;base64,{data}"></figure>\n'
