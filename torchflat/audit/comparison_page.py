"""The comparison of two checkpoints as one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchflat.audit import markup
from torchflat.audit.comparison_report import grounds, named, side_rows, verdict_words, verdicts
from torchflat.audit.page import provenance_section
from torchflat.numerals import confidence, count, duration, memory

__all__ = ["comparison_page"]

_MEANING = (
    "<p>The profile of a point is the largest change of the loss within a distance r, whatever the direction. The "
    "flatter point has the lower profile. At a point with a gradient every profile begins as |∇f|·r, which says little "
    "about flatness: so the profiles are compared where both exceed twice that, unless both points are critical.</p>"
)


def comparison_page(content: Mapping[str, Any], picture: bytes | None) -> str:
    """Return the page of one comparison; ``picture`` is the PNG of the two profiles, if there are any."""
    title = " and ".join(_name(content[side], letter) for side, letter in (("first", "A"), ("second", "B")))
    sections = (
        _headline(content, title),
        _profiles(content, picture),
        _cost(content),
        _notes(content),
        provenance_section(content, {}),
    )
    return markup.document(title, "\n".join(filter(None, sections)), content["provenance"])


def _name(side: Mapping[str, Any], letter: str) -> str:
    path = (side["checkpoint"] or {}).get("path")
    return re.split(r"[/\\]", path)[-1] if path else letter


def _headline(content: Mapping[str, Any], title: str) -> str:
    provenance = content["provenance"]
    started = (provenance.get("started") or "").replace("T", " ").replace("+00:00", " UTC")
    line = "".join(f" · {markup.text(fact)}" for fact in (provenance.get("task"), started) if fact)
    lines = "".join(
        f"<p>{place[0].upper()}{place[1:]}: {markup.text(verdict)}.</p>" for place, verdict in verdicts(content)
    )
    kind = "badge warn" if content["verdict"] == "UNDECIDED" else "badge"
    words = verdict_words(content["verdict"])
    return (
        f"<header><p>torchflat compare{line}</p><h1>{markup.text(title)}</h1></header>"
        '<div class="headline">'
        f'<p class="value"><strong class="verdict">{markup.text(words[0].upper() + words[1:])}</strong>'
        f'<span class="ending"><span class="{kind}">{content["verdict"].lower()}</span></span></p>'
        f"<p>{markup.prose(grounds(content))}</p>{lines}{_certainty(content)}</div>"
        + markup.table(
            [("", ""), ("A", "n"), ("B", "n")],
            [
                markup.row_header(label) + "".join(markup.cell(markup.prose(value), "n") for value in values)
                for label, *values in side_rows(content)
            ],
        )
    )


def _certainty(content: Mapping[str, Any]) -> str:
    said = f"Relative differences below {100 * content['tolerance']:g} % count as none."
    if any(content["sampled"]):
        level = confidence(content["confidence"])
        said += f" The chance in the draw of the rows is in the errors, with {level} confidence."
    return f'<p class="soft">{markup.text(said)}</p>'


def _profiles(content: Mapping[str, Any], picture: bytes | None) -> str:
    if picture is None:
        return ""
    alt = (
        "Above, the largest change of the loss within r of A and of B, against r, with their errors; below, the ratio "
        f"of A to B with its error and the tolerance. {grounds(content)}"
    )
    return markup.section("profiles", "Flatness profiles", _MEANING + markup.figure(picture, alt))


def _cost(content: Mapping[str, Any]) -> str:
    heads = [("", ""), ("gradients", "n"), ("time", "n")]
    costs = [
        ("search at A", content["first"]["variation"]["cost"]),
        ("search at B", content["second"]["variation"]["cost"]),
        ("everything", content["cost"]),
    ]
    rows = [
        markup.row_header(label)
        + markup.cell(count(cost["gradients"]), "n")
        + markup.cell(duration(cost["seconds"]), "n")
        for label, cost in costs
    ]
    peak = content["cost"].get("peak_memory_bytes")
    more = "" if peak is None else f"<p>Memory at the peak: {memory(peak)}.</p>"
    return markup.section("cost", "Cost", markup.table(heads, rows) + more)


def _notes(content: Mapping[str, Any]) -> str:
    notes = [*map(named, content["cautions"]), *content["provenance"].get("notes", ())]
    items = "".join(f"<li>{markup.text(note)}</li>" for note in notes)
    return markup.section("notes", "Notes and cautions", f'<ul class="notes">{items}</ul>' if items else "")
