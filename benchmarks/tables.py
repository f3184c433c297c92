"""Measured cells as one page of tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures import draw
from benchmarks.records import ERROR, Record, Records, geometric_mean, gradients, is_default, plain, width
from benchmarks.verdicts import DENOISERS, LABELS, SPEED, verdicts

__all__ = ["report"]

COLUMNS = (
    *("network", "rows", "method", "batch", "threads", "error", "width", "products"),
    *("to the value", "to the end", "seconds", "×", "peak MiB", "status"),
)


def report(cells: Sequence[Record], folder: Path) -> str:
    """Write ``<folder>.md``, ``.png`` and ``.svg``, and return the text."""
    records = Records(cells)
    if not records.all:
        return f"nothing measured in {folder}"
    lines = [*machine(records), "", *table(records), "", *means(records), "", "| target | asked | measured | verdict |"]
    lines += ["|---|--:|--:|---|", *(verdict.line for verdict in verdicts(records)), "", *along(records)]
    lines += ["", *profile(records)]
    text = "\n".join(lines)
    folder.with_suffix(".md").write_text(text + "\n")
    draw(records, folder)
    return text


def machine(records: Records) -> Iterator[str]:
    newest = max(records.all, key=lambda record: record["date"])
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items() if version)
    yield f"{newest['processor']}, {newest['default_threads']} threads; Python {newest['python']}, {versions}."
    yield f"Measured from {min(record['date'] for record in records.all)} to {newest['date']}."
    yield ""
    yield (
        "Times are in gradients of all rows, each timed in the same process. To the value: the error is, and stays, "
        f"at most {ERROR:g}; to the end: the interval, where there is one. × is the time to the end over that of "
        "torchflat's default."
    )


def table(records: Records) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'|'.join('---' if each in ('network', 'method', 'status') else '--:' for each in COLUMNS)}|"
    networks = dict.fromkeys(record["network"] for record in records.all)
    for network in networks:
        for rows in records.sizes(network):
            default = records.find(network, rows, "torchflat")
            here = [run for run in records.all if (run["network"], run["rows"]) == (network, rows)]
            for run in sorted(
                here, key=lambda run: (list(LABELS).index(run["method"]), len(run["setting"])), reverse=True
            ):
                if not {"probe", "search", "order", "processes"} & set(run["setting"]):
                    yield row(records, run, default)


def row(records: Records, run: Record, default: Record | None) -> str:
    setting, own = run["setting"], run.get("provenance", {})
    asked = ", ".join(f"{key}={show(value)}" for key, value in plain(setting).items()) or "default"
    stopped = run["status"] == "stopped"
    ratio = "" if default is None else f"{'> ' if stopped else ''}{gradients(run) / gradients(default):.2f}"
    to_value = records.to_value(run)
    columns = [
        run["network"],
        f"{run['rows']:,}".replace(",", " "),
        f"{LABELS[run['method']]}, {asked}",
        str(setting.get("batch", own.get("microbatch", ""))),
        str(setting.get("threads", run["default_threads"])),
        "" if stopped else f"{records.error(run):.1e}",
        "" if width(run) is None else f"{width(run):.1e}",
        "" if run.get("products") is None else f"{run['products']:.3g}",
        "" if math.isinf(to_value) else f"{to_value:.1f}",
        f"{'> ' if stopped else ''}{gradients(run):.1f}",
        f"{run['seconds']:.1f}",
        ratio,
        f"{run['peak_bytes'] / 2**20:.0f}",
        run["status"].lower(),
    ]
    return f"| {' | '.join(columns)} |"


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value / 2**20:.0f} MiB" if isinstance(value, int) and value > 2**20 else str(value)


def means(records: Records) -> Iterator[str]:
    """Geometric means over the SGD- and the Adam-trained denoiser of all times, in torchflat's default."""
    names = [name for name in map(records.named, DENOISERS) if name]
    if len(names) < 2:
        return
    yield "| geometric mean over the two denoisers | rows | to the value | to the end |"
    yield "|---|--:|--:|--:|"
    for rows in sorted(set(records.sizes(names[0])) & set(records.sizes(names[1]))):
        defaults = [records.find(name, rows, "torchflat") for name in names]
        for peer in SPEED:
            runs = [records.of_peer(name, rows, peer) for name in names]
            pairs = [(a, b) for a, b in zip(runs, defaults, strict=True) if a is not None and b is not None]
            if len(pairs) < 2:
                continue
            more = "> " if any(run["status"] == "stopped" for run, _ in pairs) else ""
            end = geometric_mean([gradients(run) / gradients(own) for run, own in pairs])
            waits = [records.to_value(own) for _, own in pairs]
            quotients = [gradients(run) / wait for (run, _), wait in zip(pairs, waits, strict=True)]
            value = f"{more}{geometric_mean(quotients):.2f}" if all(quotients) else ""
            yield f"| {LABELS[peer]} / torchflat, default | {rows} | {value} | {more}{end:.2f} |"


def along(records: Records) -> Iterator[str]:
    """Show the default along rows, parameters, processes."""
    runs = [
        run for run in records.all if is_default(run) and run["network"].startswith(("denoiser_adam", "denoiser_w"))
    ]
    runs += [run for run in records.all if "processes" in run["setting"]]
    if not runs:
        return
    yield "| the default | rows | parameters | processes | seconds | µs a row | gradients | full products' worth |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for run in sorted(runs, key=lambda run: (run["network"], run["setting"].get("processes", 0), run["rows"])):
        processes = run["setting"].get("processes", "")
        yield (
            f"| {run['network']} | {run['rows']} | {run['parameters']} | {processes} | {run['seconds']:.1f} | "
            f"{1e6 * run['seconds'] / run['rows']:.0f} | {gradients(run):.1f} | {run['cost']['gradients'] / 2:.2f} |"
        )


def profile(records: Records) -> Iterator[str]:
    """Where the time of torchflat goes, in passes over all the data."""
    runs = [run for run in records.all if run["method"] == "torchflat" and not set(run["setting"]) - {"rtol", "method"}]
    yield "| torchflat's passes over the data | rows | forwards | backwards | products | of the seconds | basis |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for run in runs:
        cost, asked = run["cost"], ", ".join(f"{k}={show(v)}" for k, v in run["setting"].items()) or "default"
        yield (
            f"| {run['network']}, {asked} | {run['rows']} | {cost['forwards']:.2f} | {cost['backwards']:.2f} | "
            f"{cost['products']:.2f} | {100 * cost['seconds'] / run['seconds']:.0f} % | {run['basis']} |"
        )
