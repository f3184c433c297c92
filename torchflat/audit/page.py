"""The report as one self-contained HTML page: nothing is fetched, no script runs, every figure is inside.

The page is a list of independent sections. Each is a function of the report that gives HTML, or an empty string where
its part has not run; a new part of the report needs one such function in ``SECTIONS``.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchflat.audit.report import (
    PARTS,
    confidence,
    count,
    duration,
    memory,
    notes_of,
    number,
    plan_sentence,
    printable,
    share,
    shorten,
    span,
)
from torchflat.result import Status

__all__ = ["report_page", "trajectory_page"]

_BASIS = {
    "krylov": "The upper bound rests on what the Lanczos run itself saw from its random start.",
    "deflation": "The upper bound rests on a Lanczos run on what is left once the known eigenvectors are taken out.",
    "shards": "What was not found is bounded by random shards of the rows: that takes it that their curvature scatters "
    "like a normal variable once rows of outlying curvature are in each of them.",
}
_PNG_SIZE = slice(16, 24)  # width and height, 4 bytes each, big-endian, in the header of every PNG


def report_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of one report. ``pictures`` maps the names in ``figures.FIGURES`` to PNG files; any may lack."""
    title = _title(report)
    body = "\n".join(part for section in SECTIONS if (part := section(report, pictures)))
    return _document(title, body, report["provenance"])


def trajectory_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return one page for a series of checkpoints: λ₁ and the loss of each, as a figure and as a table."""
    from torchflat.audit import figures

    names, rows, known, levels = [_title(report) for report in reports], [], [], []
    for name, report in zip(names, reports, strict=True):
        sharpness, point = report.get("sharpness", {}), report.get("point", {})
        if sharpness:
            known.append(f"{name}: {_words(sharpness)}")
            levels.append(sharpness["confidence"])
        rows.append(
            _row_header(name)
            + _interval_cells(sharpness)
            + _cell(_number(point.get("loss")), "n")
            + _cell(_number(point.get("gradient_norm")), "n")
            + _cell(_badge(sharpness["status"]) if sharpness else '<span class="badge warn">not run</span>')
        )
    heads = [("checkpoint", ""), ("λ<sub>1</sub>", "n"), ("interval", ""), ("loss", "n"), ("|gradient|", "n"), ("", "")]
    level = f"Confidence {confidence(min(levels))}." if levels and None not in levels else ""
    picture = figures.png(figures.trajectory(reports, names))
    body = (
        f"<header><p>torchflat audit</p><h1>Sharpness along {count(len(reports))} checkpoints</h1></header>"
        + _figure(picture, f"λ₁ with its interval, and the loss, against the checkpoint. {'; '.join(known)}.")
        + _table(heads, rows, level)
    )
    return _document(f"{count(len(reports))} checkpoints", body, reports[0]["provenance"])


# ---- sections ------------------------------------------------------------------------------------------------------


def _headline_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    provenance = report["provenance"]
    notes = list(notes_of(report))
    started = (provenance.get("started") or "").replace("T", " ").replace("+00:00", " UTC")
    line = "".join(f" · {_text(fact)}" for fact in (provenance.get("task"), started) if fact)
    partial = (
        '<p class="banner" role="status"><b>Partial report.</b> The audit did not finish. What is shown holds; '
        "what is missing has not run.</p>"
        if report["status"] == "partial"
        else ""
    )
    more = f'<a href="#notes">{len(notes)} {"note" if len(notes) == 1 else "notes"}</a>' if notes else ""
    header = f"<header><p>torchflat audit{line}</p><h1>{_text(_title(report))}</h1></header>"
    return partial + header + _headline(report.get("sharpness"), more) + _facts(report)


def _headline(sharpness: Mapping[str, Any] | None, more: str) -> str:
    if sharpness is None:
        return f'<div class="headline"><p>The sharpness λ<sub>1</sub> has not been measured. {more}</p></div>'
    value, interval = _span(sharpness)
    level = confidence(sharpness["confidence"])
    bounded = sharpness["lower"] is not None and sharpness["upper"] is not None
    between = f"in {interval}" + (f" with {level}" if bounded else "")
    return (
        '<div class="headline">'
        f'<p class="value"><strong class="number">λ<sub>1</sub> = {value}</strong>'
        f'<span class="between number">{between}</span>'
        f'<span class="ending">{_badge(sharpness["status"])}{more}</span></p>'
        f"<p>{_step_sentence(sharpness)}</p>"
        f"<p>{_interval_sentence(sharpness, interval, level)}</p>"
        f"{_fresh_data(sharpness.get('sampling'))}"
        "</div>"
    )


def _step_sentence(sharpness: Mapping[str, Any]) -> str:
    if sharpness["value"] is None:
        return "No eigenvalue was found."
    if sharpness["value"] <= 0:
        return "The loss curves upwards in no direction that was found: curvature sets no limit to the step here."
    step = sharpness.get("largest_stable_step")
    if step is None:
        return ""
    value, interval = _span(step)
    if sharpness["upper"] is None:
        return (
            "To second order, gradient descent with steps longer than 2/λ<sub>1</sub>, which is at most about "
            f"<b>{value}</b>, is thrown out of this point along its sharpest direction."
        )
    return (
        f"To second order, gradient descent with steps longer than 2/λ<sub>1</sub> = <b>{value}</b> {interval} is "
        "thrown out of this point along its sharpest direction; with shorter steps it is not."
    )


def _interval_sentence(sharpness: Mapping[str, Any], interval: str, level: str) -> str:
    if sharpness["upper"] is None or sharpness.get("basis") == "none":
        return "The largest eigenvalue of the Hessian is at least the lower bound; how much larger is not known."
    basis = _BASIS.get(sharpness.get("basis") or "", "")
    return (
        f"The largest eigenvalue of the Hessian, over all the data, lies in {interval} with a probability of at least "
        f"{level}, taken over the random choices of the measurement. {basis}"
    )


def _fresh_data(sampling: Mapping[str, Any] | None) -> str:
    if sampling is None or sampling["lower"] is None:
        return ""
    level, error = confidence(sampling["confidence"]), _number(sampling.get("standard_error"), 2)
    return (
        f"<p>On fresh data of the same size λ<sub>1</sub> of this network would lie in {_span(sampling)[1]} in about "
        f"{level} of the cases, to first order. That is the chance in the draw of the rows (standard error {error}), "
        "not in the measurement; where these rows are all there could be, it does not apply.</p>"
    )


def _facts(report: Mapping[str, Any]) -> str:
    point = report.get("point")
    if point is None:
        return ""
    facts = {
        "loss": _number(point["loss"]),
        "norm of the gradient": _number(point["gradient_norm"]),
        "norm of the parameters": _number(point.get("parameter_norm")),
        "parameters": count(point["parameters"]),
        "rows of data": count(point.get("rows")),
    }
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _spectrum_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    pairs, sharpness = report.get("eigenvalues"), report.get("sharpness", {})
    body = ""
    if "convergence" in pictures:
        body += _figure(
            pictures["convergence"],
            f"The interval of λ₁ narrows as Hessian products are spent; it ends at {_words(sharpness)}.",
        )
    if pairs:
        rows = [(f"λ<sub>{index + 1}</sub>", row) for index, row in enumerate(pairs["largest"])]
        rows += [
            (f"λ<sub>n{f'−{index}' if index else ''}</sub>", row)
            for index, row in reversed(list(enumerate(pairs["smallest"])))
        ]
        if "eigenvalues" in pictures:
            body += _figure(pictures["eigenvalues"], _eigenvalues_alt(pairs, sharpness.get("sampling")))
        heads = [("", ""), ("value", "n"), ("interval", ""), ("residual", "n")]
        lines = [
            f'<th scope="row">{name}</th>' + _interval_cells(row) + _cell(_number(row.get("residual"), 2), "n")
            for name, row in rows
        ]
        body += _table(heads, lines, _ending(pairs))
    return _section("spectrum", "Top and bottom of the spectrum", body)


def _eigenvalues_alt(pairs: Mapping[str, Any], sampling: Mapping[str, Any] | None) -> str:
    ends = [(f"the {end} is {_words(pairs[end][0])}") for end in ("largest", "smallest") if pairs[end]]
    known = f"Eigenvalues with their intervals: {'; '.join(ends)}."
    if sampling is None or sampling["lower"] is None or not pairs["largest"]:
        return known
    return f"{known} The grey bar behind λ₁ is where it would lie on fresh data: {_words(sampling)}."


def _density_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    part = report.get("density")
    if not part or "density" not in pictures:
        return ""
    low, high = (_plain(end) for end in (part["grid"][0], part["grid"][-1]))
    exact = part.get("exact", ())
    alt = f"Density of the Hessian's eigenvalues, on a logarithmic scale, from {low} to {high}."
    if exact:
        alt += f" Known eigenvalues: {', '.join(_plain(value) for value in sorted(exact, reverse=True)[:10])}."
    body = _figure(pictures["density"], alt)
    body += (
        "<p>The share of the eigenvalues in each unit of the axis, smoothed; the darker band is one standard error. "
        "Ticks below mark eigenvalues that were found one by one, and the dashed line is how high a single "
        "eigenvalue stands.</p>"
    )
    facts = {
        "smoothing width": _number(part.get("width"), 3),
        "random starts": count(part.get("starts")),
        "Lanczos steps each": count(part.get("steps")),
    }
    return _section("density", "Density of the eigenvalues", body + _sentence(facts) + f"<p>{_ending(part)}</p>")


def _trace_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    part = report.get("trace")
    if not part:
        return ""
    value, interval = _span(part)
    parameters = report.get("point", {}).get("parameters")
    mean = part["value"] / parameters if parameters and part["value"] is not None else None
    body = f'<p>The sum of all eigenvalues is <b class="number">{value}</b> {interval}.</p>'
    facts = {
        "standard error": _number(part.get("standard_error"), 2),
        "random probes": count(part.get("samples")),
        "mean eigenvalue": _number(mean, 3),
    }
    return _section("trace", "Trace", body + _sentence(facts) + f"<p>{_ending(part)}</p>")


def _blocks_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    part = report.get("blocks")
    if not part or not part["rows"]:
        return ""
    body = "<p>The largest eigenvalue of each diagonal block of the Hessian: its sharpness if it alone moves.</p>"
    known = [row for row in part["rows"] if row["value"] is not None]
    if "blocks" in pictures:
        sharpest = max(known, key=lambda row: row["value"], default=None)
        alt = f"Sharpness of {count(len(part['rows']))} blocks of parameters."
        if sharpest is not None:
            alt += f" The sharpest is {sharpest['name']}: {_words(sharpest)}."
        body += _figure(pictures["blocks"], alt)
    heads = [
        ("block", ""), ("size", "n"), ("λ<sub>1</sub>", "n"), ("interval", ""),
        ("|gradient|", "n"), ("share of top vector", "n"), ("", ""),
    ]  # fmt: skip
    rows = [
        _row_header(row["name"], code=True)
        + _cell(count(row["parameters"]), "n")
        + _interval_cells(row)
        + _cell(_number(row.get("gradient_norm"), 3), "n")
        + _cell(html.escape(share(row.get("share"))), "n")
        + _cell("" if row["status"] == Status.CONVERGED.name else _badge(row["status"]))
        for row in part["rows"]
    ]
    return _section("blocks", "Blocks of parameters", body + _table(heads, rows, _ending(part)))


def _cost_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    costs = [(name, report[key]["cost"]) for key, name in PARTS.items() if "cost" in report.get(key, {})]
    total = report.get("cost", {})
    if total:
        costs.append(("everything", total))
    if not costs:
        return ""
    heads = [("", ""), ("gradients", "n"), ("products", "n"), ("time", "n")]
    rows = [
        f'<th scope="row">{label}</th>'
        + _cell(count(cost["gradients"]), "n")
        + _cell(count(cost["products"]), "n")
        + _cell(duration(cost["seconds"]), "n")
        for label, cost in costs
    ]
    meaning = (
        "One gradient is one forward and one backward pass over all the data; a Hessian product costs two or three."
    )
    peak = total.get("peak_memory_bytes")
    more = "" if peak is None else f"<p>Memory at the peak: {memory(peak)}.</p>"
    if plan := plan_sentence(report["provenance"].get("plan")):
        more += f"<p>Passes over the data: {_text(plan)}.</p>"
    return _section("cost", "Cost", f"<p>{meaning}</p>{_table(heads, rows)}{more}")


def _notes_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes_of(report))
    return _section("notes", "Notes and cautions", f'<ul class="notes">{items}</ul>' if items else "")


def _provenance_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(label)}</th><td>{_text(value)}</td></tr>'
        for label, value in _flat(report["provenance"])
        if not label.startswith("notes")
    )
    table = f"<table><tbody>{rows}</tbody></table>"
    details = f"<details><summary>Everything needed to repeat this audit</summary>{table}</details>"
    return _section("provenance", "Provenance", details)


def _flat(value: Any, label: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{label}.{key}" if label else str(key))
    else:
        yield label, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


SECTIONS = (
    _headline_section,
    _spectrum_section,
    _density_section,
    _trace_section,
    _blocks_section,
    _cost_section,
    _notes_section,
    _provenance_section,
)


# ---- pieces --------------------------------------------------------------------------------------------------------


def _document(title: str, body: str, provenance: Mapping[str, Any]) -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)} – torchflat audit</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer><p>torchflat {_text(provenance['torchflat'])} · torch {_text(provenance['torch'])}</p></footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _section(name: str, title: str, body: str) -> str:
    if not body:
        return ""
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}</section>'


def _title(report: Mapping[str, Any]) -> str:
    provenance = report["provenance"]
    path = (provenance.get("checkpoint") or {}).get("path")
    return re.split(r"[/\\]", path)[-1] if path else provenance.get("task") or "Audit"


def _text(value: str) -> str:
    return html.escape(printable(value))


def _number(value: float | None, digits: int = 4) -> str:
    return f'<span class="number">{_typeset(number(value, digits))}</span>'


def _typeset(text: str) -> str:
    """Turn the numbers of a text into HTML: a true minus sign, and powers of ten as such."""
    return re.sub(r"e(−?\d+)", r"×10<sup>\1</sup>", text.replace("-", "−"))


def _span(part: Mapping[str, Any]) -> tuple[str, str]:
    value, interval = span(part["value"], part["lower"], part["upper"])
    return _typeset(value), f'<span class="number">{_typeset(interval)}</span>'


def _plain(value: float | None) -> str:
    return number(value).replace("-", "minus ")


def _words(part: Mapping[str, Any]) -> str:
    """Return a number and its interval in words, for those who hear the page."""
    value, interval = span(part["value"], part["lower"], part["upper"])
    low, high = interval[1:-1].replace("-", "minus ").split(", ")
    low, high = low.replace("(−∞", "unknown").replace("−∞", "unknown"), high.replace("∞", "unknown")
    return f"{value.replace('-', 'minus ')}, between {low} and {high}"


def _interval_cells(part: Mapping[str, Any]) -> str:
    if not part:
        return _cell("–", "n") + _cell("–", "i")
    value, interval = _span(part)
    return _cell(value, "n") + _cell(interval, "i")


def _cell(content: str, kind: str = "") -> str:
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def _row_header(name: str, code: bool = False) -> str:
    shown = _text(shorten(name, 60))
    return f'<th scope="row" title="{_text(name)}">{f"<code>{shown}</code>" if code else shown}</th>'


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[str], caption: str = "") -> str:
    head = "".join(
        f'<th scope="col" class="{kind}">{name}</th>' if kind else f'<th scope="col">{name}</th>'
        for name, kind in heads
    )
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _badge(status: str) -> str:
    name = status.lower().replace("_", " ")
    kind = "badge" if status == Status.CONVERGED.name else "badge warn"
    return f'<span class="{kind}" title="{html.escape(Status[status].value)}">{name}</span>'


def _ending(part: Mapping[str, Any]) -> str:
    """Say at which confidence a part holds and, unless it converged, how it ended."""
    status = part["status"]
    level = f"Confidence {confidence(part['confidence'])}." if part.get("confidence") is not None else ""
    ending = "" if status == Status.CONVERGED.name else f"{_badge(status)} {html.escape(Status[status].value)}"
    return " ".join(piece for piece in (level, ending) if piece)


def _sentence(facts: Mapping[str, str]) -> str:
    return f'<p class="soft">{" · ".join(f"{label} {value}" for label, value in facts.items())}</p>'


def _figure(picture: bytes, alt: str) -> str:
    width, height = (int.from_bytes(picture[_PNG_SIZE][i : i + 4], "big") // 2 for i in (0, 4))
    data = base64.b64encode(picture).decode("ascii")
    size = f'width="{width}" height="{height}"'
    return f'<figure><img {size} alt="{_text(alt)}" src="data:image/png;base64,{data}"></figure>\n'
