"""What ``benchmarks.optimizers`` has on file: which settings won, a table, verdicts, a figure."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from benchmarks.contenders import CONTENDERS, Setting
from benchmarks.records import Record
from benchmarks.training import TASKS

__all__ = ["Endings", "report"]

COLUMNS = (
    *("optimizer", "setting", "gradients", "train loss", "test metric", "λ₁", "width", "λ₁★", "λ₁/λ₁★"),
    *("imbalance", "norm", "ms a step", "× SGD", "seconds"),
)
BLIND = 0.98  # share of the loss of a network that always answers the same, from which on a run is lost
OURS = ("ngd", "ngd-cooldown")
OTHERS = ("sgd", "adam", "sam")
# Okabe and Ito's colours, told apart by most people with colour-blindness; each contender has its own marker too.
LOOKS = {
    "sgd": ("#000000", "o"),
    "adam": ("#E69F00", "s"),
    "sam": ("#56B4E9", "^"),
    "ngd": ("#D55E00", "D"),
    "ngd-cooldown": ("#009E73", "v"),
    "sgd-cooldown": ("#999999", "P"),
    "sam-half": ("#0072B2", "X"),
}


class Endings:
    """Records of runs, of the curvature at their ends, and of the times of steps, looked up by what was asked."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def chosen(self, network: str, contender: str) -> dict[str, Any] | None:
        """Return the setting with the best metric on held-out rows with seed 0, of those that lose no seed.

        A seed is lost that diverges, or ends with a network that always answers the same. None if all settings lose.
        """
        source = CONTENDERS[contender].tuned_as or contender
        kept = [each for each in self.tried(network, source) if not self.lost(network, source, each["setting"])]
        return without(min(kept, key=value)["setting"], "seed") if kept else None

    def lost(self, network: str, contender: str, setting: Setting) -> list[int]:
        """Return the seeds that are lost with a setting, of those that ran."""
        return sorted(seed(each) for each in self._with(network, contender, setting) if self._is_lost(each))

    def _is_lost(self, run: Record) -> bool:
        return run["status"] == "diverged" or run["train_loss"] >= BLIND * TASKS[run["network"]].blind_loss

    def tried(self, network: str, contender: str) -> list[Record]:
        """Return the runs with seed 0, whatever their setting."""
        return [each for each in self._runs(network, contender) if each["setting"]["seed"] == 0]

    def runs(self, network: str, contender: str) -> list[Record]:
        """Return the runs of the chosen setting that are not lost, by seed."""
        setting = self.chosen(network, contender)
        own = [] if setting is None else self._with(network, contender, setting)
        return sorted((each for each in own if not self._is_lost(each)), key=seed)

    def ends(self, network: str, contender: str) -> list[Record]:
        """Return the curvature at the ends of these runs, by seed."""
        setting = self.chosen(network, contender)
        found = [each for each in self._of(network, "curvature") if each["method"] == contender]
        return sorted((each for each in found if without(each["setting"], "seed", "measure") == setting), key=seed)

    def steps(self, network: str) -> Record | None:
        """Return the times of steps."""
        return next(iter(self._of(network, "steps")), None)

    def networks(self) -> list[str]:
        """Return the names of the networks that were trained."""
        return [name for name in TASKS if self._of(name, "run")]

    def _runs(self, network: str, contender: str) -> list[Record]:
        return [each for each in self._of(network, "run") if each["method"] == contender]

    def _with(self, network: str, contender: str, setting: Setting) -> list[Record]:
        asked = without(setting, "seed")
        return [each for each in self._runs(network, contender) if without(each["setting"], "seed") == asked]

    def _of(self, network: str, measure: str) -> list[Record]:
        here = [each for each in self.records if each["network"] == network]
        return [each for each in here if each["setting"].get("measure", "run") == measure]


def value(record: Record) -> float:
    return float(record["value"])


def seed(record: Record) -> int:
    return int(record["setting"]["seed"])


def without(setting: Setting, *names: str) -> dict[str, Any]:
    return {name: each for name, each in setting.items() if name not in names}


# Table ----------------------------------------------------------------------------------------------------------------


def report(records: Sequence[Record], file: Path) -> str:
    """Write the records to ``file``, table and figure beside it, and return the table."""
    endings = Endings(records)
    if not endings.networks():
        return "nothing measured"
    lines = [*machine(records), ""]
    for network in endings.networks():
        lines += [f"## {network}", "", *table(endings, network), "", *grid(endings, network), ""]
    lines += ["## NormalizedGD beside the others", "", *verdicts(endings)]
    text = "\n".join(lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(each) for each in records) + "\n]\n")
    file.with_suffix(".md").write_text(text + "\n")
    draw(endings, file)
    return text


def machine(records: Sequence[Record]) -> Iterator[str]:
    newest = max(records, key=lambda each: str(each["date"]))
    used = {name: newest["versions"].get(name) for name in ("torchflat", "torch", "pytorch-optimizer")}
    versions = ", ".join(f"{name} {version}" for name, version in used.items() if version)
    kernels = "compiled kernels" if newest["kernels"] == "native" else "no compiled kernels: torch's foreach"
    yield f"{newest['processor']}, threads: {newest['default_threads']}; {versions}; {kernels}."
    yield f"Measured from {min(each['date'] for each in records)} to {newest['date']}."
    yield ""
    yield (
        "Mean ± standard deviation over the seeds. λ₁ of the loss on all rows trained on; width: of its interval, the "
        "widest, relative to λ₁. Imbalance: Σ|C| over all channels by the sum of squares, from 0, balanced, to 1. "
        "Seconds of the processor, of a whole run; ms a step and × SGD were timed in turn."
    )


def table(endings: Endings, network: str) -> Iterator[str]:
    task, steps = TASKS[network], endings.steps(network)
    rows = {each["orbit"]["rows"] for name in CONTENDERS for each in endings.ends(network, name)}
    yield f"Test metric: {task.metric_name}." + "".join(f" λ₁★ and λ₁/λ₁★ on {each} rows." for each in rows)
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'|'.join('---' if each in COLUMNS[:2] else '--:' for each in COLUMNS)}|"
    for name, contender in CONTENDERS.items():
        runs, ends = endings.runs(network, name), endings.ends(network, name)
        if not runs:
            continue
        widths = [(each["upper"] - each["lower"]) / each["value"] for each in ends]
        timed = CONTENDERS[name].tuned_as or name
        cells = [
            contender.label + missing(endings, network, name),
            told(endings.chosen(network, name) or {}),
            f"{runs[0]['gradients']}",
            spread(runs, lambda each: each["train_loss"]),
            spread(runs, lambda each: each["test"]),
            spread(ends, value),
            f"{100 * max(widths):.1f} %" if widths else "",
            spread(ends, lambda each: each["orbit"]["value"]),
            spread(ends, headroom),
            spread(ends, lambda each: each["imbalance"]),
            spread(ends, lambda each: each["norm"]),
            f"{steps['milliseconds'][timed]:.1f}" if steps and timed in steps["milliseconds"] else "",
            f"{steps['ratios'][timed]:.2f}" if steps and timed in steps["ratios"] else "",
            f"{statistics.fmean(each['seconds'] for each in runs):.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def missing(endings: Endings, network: str, contender: str) -> str:
    """Return a note of the seeds that are lost with a setting that was tuned on another contender."""
    lost = endings.lost(network, contender, endings.chosen(network, contender) or {})
    return f" (lost seed {', '.join(map(str, lost))})" if lost else ""


def headroom(end: Record) -> float:
    return float(end["orbit"]["before"] / end["orbit"]["value"])


def spread(records: Sequence[Record], of: Callable[[Record], float]) -> str:
    """Return mean ± standard deviation, to three digits of the mean."""
    if not records:
        return ""
    values = [of(each) for each in records]
    deviation = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{deviation}"


def told(setting: Setting) -> str:
    symbols = {"rho": "ρ"}
    return ", ".join(f"{symbols.get(name, name)} {each:g}" for name, each in setting.items())


def grid(endings: Endings, network: str) -> Iterator[str]:
    """Show what was tried, and the held-out metric of each setting."""
    yield "| tried with seed 0 | held-out metric, by setting (**chosen**; seeds lost: diverged, or always one answer) |"
    yield "|---|---|"
    for name, contender in CONTENDERS.items():
        tried = endings.tried(network, name) if contender.tuned_as is None else []
        if tried:
            yield f"| {contender.label} | {'; '.join(one(endings, network, name, each) for each in tried)} |"


def one(endings: Endings, network: str, contender: str, run: Record) -> str:
    setting = without(run["setting"], "seed")
    text = told(setting) + ("" if run["value"] is None else f": {run['value']:.3g}")
    lost = endings.lost(network, contender, setting)
    if lost:
        return f"{text} (lost seed {', '.join(map(str, lost))})"
    return f"**{text}**" if setting == endings.chosen(network, contender) else text


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(endings: Endings) -> Iterator[str]:
    """Show how NormalizedGD does beside each of the others: ratios, of which at most 1 is as good or better."""
    yield "Ratios of medians over the seeds; at most 1 is as good or better."
    yield ""
    yield f"| network | ratio | {' | '.join(MEASURES)} | time of a step | as good or better in |"
    yield f"|---|---|{'--:|' * (len(MEASURES) + 1)}---|"
    for network, own, other in itertools.product(endings.networks(), OURS, OTHERS):
        ratios = {kind: ratio(of(endings, network, own), of(endings, network, other)) for kind, of in MEASURES.items()}
        steps = endings.steps(network)
        times = {} if steps is None else steps["ratios"]
        ratios["time of a step"] = times[own] / times[other] if {own, other} <= set(times) else None
        shown = " | ".join("" if each is None else f"{each:.2f}" for each in ratios.values())
        known = [kind for kind, each in ratios.items() if each is not None]
        good = ", ".join(kind for kind in known if ratios[kind] <= 1) or ("nothing" if known else "not measured")
        yield f"| {network} | {CONTENDERS[own].label} / {CONTENDERS[other].label} | {shown} | {good} |"


def ratio(own: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the ratio of the medians, None if one side has not been measured."""
    return statistics.median(own) / statistics.median(other) if own and other else None


MEASURES: dict[str, Callable[[Endings, str, str], list[float]]] = {
    "λ₁": lambda endings, *who: [value(each) for each in endings.ends(*who)],
    "λ₁★": lambda endings, *who: [each["orbit"]["value"] for each in endings.ends(*who)],
    "train loss": lambda endings, *who: [each["train_loss"] for each in endings.runs(*who)],
    "test metric": lambda endings, *who: [each["test"] for each in endings.runs(*who)],
}


# Figure ---------------------------------------------------------------------------------------------------------------


def draw(endings: Endings, file: Path) -> None:
    """Write ``.png`` and ``.svg``: for each network the loss by epoch, and λ₁ and λ₁★ beside the test metric."""
    networks = endings.networks()
    figure = Figure(figsize=(11, 4.2 * len(networks) + 0.6), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False)
    for network, (left, right) in zip(networks, panels, strict=True):
        curves(left, endings, network)
        scatter(right, endings, network)
        left.set_title(network, loc="left")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    for suffix in (".png", ".svg"):
        figure.savefig(file.with_suffix(suffix), dpi=150)


def curves(panel: Axes, endings: Endings, network: str) -> None:
    """Draw the mean loss of each epoch, over the seeds; not of the first, which would dwarf the others."""
    for name, contender in CONTENDERS.items():
        runs = endings.runs(network, name)
        if runs:
            color, marker = LOOKS[name]
            losses = [statistics.fmean(each) for each in zip(*(run["losses"] for run in runs), strict=True)]
            panel.plot(range(2, len(losses) + 1), losses[1:], color=color, marker=marker, ms=5, label=contender.label)
    panel.set(yscale="log", xlabel="epoch, from the second on", ylabel=f"training loss ({TASKS[network].loss_name})")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_ticks(panel)


def scatter(panel: Axes, endings: Endings, network: str) -> None:
    """Draw λ₁ (full) of each seed at its test metric, and hollow what the best rescaling makes of it."""
    for name in CONTENDERS:
        color, marker = LOOKS[name]
        tests = {seed(run): run["test"] for run in endings.runs(network, name)}
        for end in endings.ends(network, name):
            at = tests[seed(end)]
            star = end["value"] / headroom(end)
            panel.plot([at, at], [star, end["value"]], color=color, linewidth=0.8, alpha=0.5)
            panel.plot(at, end["value"], marker, color=color, ms=7)
            panel.plot(at, star, marker, color=color, ms=7, mfc="none")
    panel.set(yscale="log", xlabel=TASKS[network].metric_name, ylabel="λ₁ (full), and after rescaling (hollow)")
    plain_ticks(panel)


def plain_ticks(panel: Axes) -> None:
    """Write 0.06, not 6 × 10⁻²."""
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 8)))
    panel.yaxis.set_minor_formatter("{x:g}")
