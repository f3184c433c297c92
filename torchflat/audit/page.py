"""The report as one self-contained HTML page: nothing is fetched, no script runs, every figure is inside.

The page is a list of independent sections. Each is a function of the report that gives HTML, or an empty string where
its part has not run; a new part of the report needs one such function in ``SECTIONS``.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchflat.audit import markup
from torchflat.audit.orbit_words import account_sentences, coupling_cells, laws_sentences, orbit_sentences
from torchflat.audit.profile_words import profile_sentences
from torchflat.audit.report import PARTS, notes_of, plan_sentence
from torchflat.numerals import confidence, count, duration, memory, share
from torchflat.result import Status

__all__ = ["provenance_section", "report_page", "trajectory_page"]

_BASIS = {
    "krylov": "The upper bound rests on what the Lanczos run itself saw from its random start.",
    "deflation": "The upper bound rests on a Lanczos run on what is left once the known eigenvectors are taken out.",
    "shards": "What was not found is bounded by random shards of the rows: that takes it that their curvature scatters "
    "like a normal variable once rows of outlying curvature are in each of them.",
}


def report_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of one report. ``pictures`` maps the names in ``figures.FIGURES`` to PNG files; any may lack."""
    title = _title(report)
    body = "\n".join(part for section in SECTIONS if (part := section(report, pictures)))
    return markup.document(title, body, report["provenance"])


def trajectory_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return one page for a series of checkpoints: λ₁ and the loss of each, as a figure and as a table."""
    from torchflat.audit import figures

    names, rows, known, levels = [_title(report) for report in reports], [], [], []
    for name, report in zip(names, reports, strict=True):
        sharpness, point = report.get("sharpness", {}), report.get("point", {})
        if sharpness:
            known.append(f"{name}: {markup.words(sharpness)}")
            levels.append(sharpness["confidence"])
        rows.append(
            markup.row_header(name)
            + markup.interval_cells(sharpness)
            + markup.cell(markup.number(point.get("loss")), "n")
            + markup.cell(markup.number(point.get("gradient_norm")), "n")
            + markup.cell(markup.badge(sharpness["status"]) if sharpness else '<span class="badge warn">not run</span>')
        )
    heads = [("checkpoint", ""), ("λ<sub>1</sub>", "n"), ("interval", ""), ("loss", "n"), ("|gradient|", "n"), ("", "")]
    level = f"Confidence {confidence(min(levels))}." if levels and None not in levels else ""
    picture = figures.png(figures.trajectory(reports, names))
    body = (
        f"<header><p>torchflat audit</p><h1>Sharpness along {count(len(reports))} checkpoints</h1></header>"
        + markup.figure(picture, f"λ₁ with its interval, and the loss, against the checkpoint. {'; '.join(known)}.")
        + markup.table(heads, rows, level)
    )
    return markup.document(f"{count(len(reports))} checkpoints", body, reports[0]["provenance"])


# ---- sections ------------------------------------------------------------------------------------------------------


def _headline_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    provenance = report["provenance"]
    notes = list(notes_of(report))
    started = (provenance.get("started") or "").replace("T", " ").replace("+00:00", " UTC")
    line = "".join(f" · {markup.text(fact)}" for fact in (provenance.get("task"), started) if fact)
    partial = (
        '<p class="banner" role="status"><b>Partial report.</b> The audit did not finish. What is shown holds; '
        "what is missing has not run.</p>"
        if report["status"] == "partial"
        else ""
    )
    more = f'<a href="#notes">{len(notes)} {"note" if len(notes) == 1 else "notes"}</a>' if notes else ""
    header = f"<header><p>torchflat audit{line}</p><h1>{markup.text(_title(report))}</h1></header>"
    return partial + header + _headline(report.get("sharpness"), more) + _facts(report)


def _headline(sharpness: Mapping[str, Any] | None, more: str) -> str:
    if sharpness is None:
        return f'<div class="headline"><p>The sharpness λ<sub>1</sub> has not been measured. {more}</p></div>'
    value, interval = markup.span(sharpness)
    level = confidence(sharpness["confidence"])
    bounded = sharpness["lower"] is not None and sharpness["upper"] is not None
    between = f"in {interval}" + (f" with {level}" if bounded else "")
    return (
        '<div class="headline">'
        f'<p class="value"><strong class="number">λ<sub>1</sub> = {value}</strong>'
        f'<span class="between number">{between}</span>'
        f'<span class="ending">{markup.badge(sharpness["status"])}{more}</span></p>'
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
    value, interval = markup.span(step)
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
    level, error = confidence(sampling["confidence"]), markup.number(sampling.get("standard_error"), 2)
    return (
        f"<p>On fresh data of the same size λ<sub>1</sub> of this network would lie in {markup.span(sampling)[1]} in "
        f"about {level} of the cases, to first order. That is the chance in the draw of the rows (standard error "
        f"{error}), not in the measurement; where these rows are all there could be, it does not apply.</p>"
    )


def _facts(report: Mapping[str, Any]) -> str:
    point = report.get("point")
    if point is None:
        return ""
    facts = {
        "loss": markup.number(point["loss"]),
        "norm of the gradient": markup.number(point["gradient_norm"]),
        "norm of the parameters": markup.number(point.get("parameter_norm")),
        "parameters": count(point["parameters"]),
        "rows of data": count(point.get("rows")),
    }
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _spectrum_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    pairs, sharpness = report.get("eigenvalues"), report.get("sharpness", {})
    body = ""
    if "convergence" in pictures:
        body += markup.figure(
            pictures["convergence"],
            f"The interval of λ₁ narrows as Hessian products are spent; it ends at {markup.words(sharpness)}.",
        )
    if pairs:
        rows = [(f"λ<sub>{index + 1}</sub>", row) for index, row in enumerate(pairs["largest"])]
        rows += [
            (f"λ<sub>n{f'−{index}' if index else ''}</sub>", row)
            for index, row in reversed(list(enumerate(pairs["smallest"])))
        ]
        if "eigenvalues" in pictures:
            body += markup.figure(pictures["eigenvalues"], _eigenvalues_alt(pairs, sharpness.get("sampling")))
        heads = [("", ""), ("value", "n"), ("interval", ""), ("residual", "n")]
        lines = [
            f'<th scope="row">{name}</th>'
            + markup.interval_cells(row)
            + markup.cell(markup.number(row.get("residual"), 2), "n")
            for name, row in rows
        ]
        body += markup.table(heads, lines, markup.ending(pairs))
    return markup.section("spectrum", "Top and bottom of the spectrum", body)


def _eigenvalues_alt(pairs: Mapping[str, Any], sampling: Mapping[str, Any] | None) -> str:
    ends = [(f"the {end} is {markup.words(pairs[end][0])}") for end in ("largest", "smallest") if pairs[end]]
    known = f"Eigenvalues with their intervals: {'; '.join(ends)}."
    if sampling is None or sampling["lower"] is None or not pairs["largest"]:
        return known
    return f"{known} The grey bar behind λ₁ is where it would lie on fresh data: {markup.words(sampling)}."


def _density_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    part = report.get("density")
    if not part or "density" not in pictures:
        return ""
    low, high = (markup.plain(end) for end in (part["grid"][0], part["grid"][-1]))
    exact = part.get("exact", ())
    alt = f"Density of the Hessian's eigenvalues, on a logarithmic scale, from {low} to {high}."
    if exact:
        alt += f" Known eigenvalues: {', '.join(markup.plain(value) for value in sorted(exact, reverse=True)[:10])}."
    body = markup.figure(pictures["density"], alt)
    body += (
        "<p>The share of the eigenvalues in each unit of the axis, smoothed; the darker band is one standard error. "
        "Ticks below mark eigenvalues that were found one by one, and the dashed line is how high a single "
        "eigenvalue stands.</p>"
    )
    facts = {
        "smoothing width": markup.number(part.get("width"), 3),
        "random starts": count(part.get("starts")),
        "Lanczos steps each": count(part.get("steps")),
    }
    return markup.section(
        "density", "Density of the eigenvalues", body + markup.sentence(facts) + f"<p>{markup.ending(part)}</p>"
    )


def _trace_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    part = report.get("trace")
    if not part:
        return ""
    value, interval = markup.span(part)
    parameters = report.get("point", {}).get("parameters")
    mean = part["value"] / parameters if parameters and part["value"] is not None else None
    body = f'<p>The sum of all eigenvalues is <b class="number">{value}</b> {interval}.</p>'
    facts = {
        "standard error": markup.number(part.get("standard_error"), 2),
        "random probes": count(part.get("samples")),
        "mean eigenvalue": markup.number(mean, 3),
    }
    return markup.section("trace", "Trace", body + markup.sentence(facts) + f"<p>{markup.ending(part)}</p>")


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
            alt += f" The sharpest is {sharpest['name']}: {markup.words(sharpest)}."
        body += markup.figure(pictures["blocks"], alt)
    heads = [
        ("block", ""), ("size", "n"), ("λ<sub>1</sub>", "n"), ("interval", ""),
        ("|gradient|", "n"), ("share of top vector", "n"), ("", ""),
    ]  # fmt: skip
    rows = [
        markup.row_header(row["name"], code=True)
        + markup.cell(count(row["parameters"]), "n")
        + markup.interval_cells(row)
        + markup.cell(markup.number(row.get("gradient_norm"), 3), "n")
        + markup.cell(html.escape(share(row.get("share"))), "n")
        + markup.cell("" if row["status"] == Status.CONVERGED.name else markup.badge(row["status"]))
        for row in part["rows"]
    ]
    return markup.section("blocks", "Blocks of parameters", body + markup.table(heads, rows, markup.ending(part)))


def _profile_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    part, said = report.get("variation"), list(profile_sentences(report))
    if not part or not said:
        return ""
    body = "<p>How much the loss can change within a distance r, upwards or downwards, whatever the direction.</p>"
    if "profile" in pictures:
        body += markup.figure(pictures["profile"], f"Largest change of the loss within r, against r. {' '.join(said)}")
    body += f"<p>{' '.join(markup.prose(sentence) for sentence in said)}</p>"
    body += (
        '<p class="soft">Every value is attained at a point that was found, so that the largest change is no smaller. '
        "In the grey zone rounding would hide it.</p>"
    )
    return markup.section("variation", "Flatness profile", body + f"<p>{markup.ending(part)}</p>")


def _orbit_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    orbit, laws = report.get("orbit"), report.get("laws")
    body = _paragraph(orbit_sentences(orbit))
    if laws and laws["couplings"]:
        body += (
            "<p>A coupling is a set of channels whose writers can be scaled up and whose readers down without any "
            "effect on what the network computes; λ<sub>1</sub> changes. The difference of their squared norms is "
            "conserved along gradient flow in every channel. The imbalance is its size relative to their sum: 0 where "
            "both sides have the same norm, 1 where one of them vanishes.</p>"
        )
    if "balance" in pictures:
        alt = "Ratio of the norms of writers and readers over the channels of each coupling, and its imbalance."
        body += markup.figure(pictures["balance"], f"{alt} {' '.join(laws_sentences(laws))}")
    body += _paragraph(laws_sentences(laws))
    if laws and laws["couplings"]:
        heads = [
            ("coupling", ""), ("kind", ""), ("channels", "n"), ("laws", "n"), ("imbalance", "n"),
            ("|writers|/|readers|", "n"), ("degenerate", "n"),
        ]  # fmt: skip
        shown = len(heads) if any(row["degenerate"] for row in laws["couplings"]) else len(heads) - 1
        heads, rows = heads[:shown], []
        for row in laws["couplings"]:
            kind, *cells = coupling_cells(row)[: shown - 1]
            numbers = "".join(markup.cell(markup.typeset(cell), "n") for cell in cells)
            rows.append(markup.row_header(row["name"], code=True) + markup.cell(kind) + numbers)
        body += markup.table(heads, rows)
    body += _paragraph(account_sentences(report.get("account")))
    return markup.section("orbit", "What rescaling hides", body + (f"<p>{markup.ending(orbit)}</p>" if orbit else ""))


def _paragraph(sentences: Iterable[str]) -> str:
    said = " ".join(map(markup.prose, sentences))
    return f"<p>{said}</p>" if said else ""


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
        + markup.cell(count(cost["gradients"]), "n")
        + markup.cell(count(cost["products"]), "n")
        + markup.cell(duration(cost["seconds"]), "n")
        for label, cost in costs
    ]
    meaning = (
        "One gradient is one forward and one backward pass over all the data; a Hessian product costs two or three."
    )
    peak = total.get("peak_memory_bytes")
    more = "" if peak is None else f"<p>Memory at the peak: {memory(peak)}.</p>"
    if plan := plan_sentence(report["provenance"].get("plan"), report["cost"]["products"]):
        more += f"<p>Passes over the data: {markup.text(plan)}.</p>"
    return markup.section("cost", "Cost", f"<p>{meaning}</p>{markup.table(heads, rows)}{more}")


def _notes_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    items = "".join(f"<li>{markup.text(note)}</li>" for note in notes_of(report))
    return markup.section("notes", "Notes and cautions", f'<ul class="notes">{items}</ul>' if items else "")


def provenance_section(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return what is needed to repeat the measurement, folded away."""
    rows = "".join(
        f'<tr><th scope="row">{markup.text(label)}</th><td>{markup.text(value)}</td></tr>'
        for label, value in _flat(report["provenance"])
        if not label.startswith("notes")
    )
    table = f"<table><tbody>{rows}</tbody></table>"
    details = f"<details><summary>Everything needed to repeat this</summary>{table}</details>"
    return markup.section("provenance", "Provenance", details)


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
    _profile_section,
    _orbit_section,
    _cost_section,
    _notes_section,
    provenance_section,
)


def _title(report: Mapping[str, Any]) -> str:
    provenance = report["provenance"]
    path = (provenance.get("checkpoint") or {}).get("path")
    return re.split(r"[/\\]", path)[-1] if path else provenance.get("task") or "Audit"
