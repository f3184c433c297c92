"""The targets of the comparison, and whether what was measured meets them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.records import ERROR, Records, geometric_mean, gradients, is_default, width

__all__ = ["DENOISERS", "LABELS", "SPEED", "Verdict", "verdicts"]

DENOISERS = ("denoiser_sgd", "denoiser_adam")
OTHERS = ("resnet18", "transformer")
SPEED = {  # target on the denoisers, on the others
    "pyhessian": (8.0, 3.0),
    "curvlinops": (5.0, 2.0),
    "hessian-eigenthings": (1.5, 1.0),
}
LABELS = {
    "pyhessian": "PyHessian",
    "curvlinops": "curvlinops + eigsh",
    "hessian-eigenthings": "hessian-eigenthings",
    "torchflat": "torchflat",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target and what was measured; None where the cells for it are not there."""

    claim: str
    target: float
    measured: float | None
    at_least: bool = True
    is_bound: bool = False  # a peer was stopped: the ratio is larger than measured

    @property
    def met(self) -> bool | None:
        """Whether the target is met."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    @property
    def sentence(self) -> str:
        """Met, missed by how much, or not measured."""
        if self.measured is None:
            return "not measured"
        if self.met:
            return "met"
        if self.target == 0:
            return f"missed by {self.measured:.3g}"
        off = abs(self.measured / self.target - 1)
        return f"missed by {100 * off:.0f} %"

    @property
    def line(self) -> str:
        """One row of the table of verdicts."""
        relation = "≥" if self.at_least else "≤"
        measured = "" if self.measured is None else f"{'> ' if self.is_bound else ''}{self.measured:.3g}"
        return f"| {self.claim} | {relation} {self.target:g} | {measured} | {self.sentence} |"


def verdicts(records: Records) -> Iterator[Verdict]:
    """Yield every target of the comparison with what was measured."""
    denoisers = [name for name in map(records.named, DENOISERS) if name]
    others = [name for name in map(records.named, OTHERS) if name]
    groups = [("denoisers", denoisers, 0)] + [(name, [name], 1) for name in others]
    for title, networks, column in groups:
        for peer, targets in SPEED.items():
            yield faster(records, title, networks, peer, {}, targets[column])
    yield faster(records, "denoisers", denoisers, "curvlinops", {"rtol": 1e-3}, 1.4)
    yield as_many_products(records, denoisers)
    for title, networks, _ in groups:
        yield from as_promised(records, title, networks)
    yield from full_products(records, denoisers)
    yield rows_do_not_matter(records)
    yield never_wrong(records)
    yield any_order(records)
    yield within_memory(records)
    yield two_processes(records)


def faster(
    records: Records, title: str, networks: Sequence[str], peer: str, ours: Mapping[str, Any], target: float
) -> Verdict:
    """Time of a peer over ours, geometric mean over the networks at their largest numbers of rows."""
    setting = ", ".join(f"{key}={value:g}" for key, value in ours.items()) or "default"
    claim = f"{title}: time of {LABELS[peer]} / torchflat, {setting}"
    ratios, bound = [], False
    for network in networks:
        rows = records.sizes(network)[-1]
        own, other = records.find(network, rows, "torchflat", **ours), records.of_peer(network, rows, peer)
        if own is None or other is None:
            return Verdict(claim, target, None)
        ratios.append(gradients(other) / gradients(own))
        bound = bound or other["status"] == "stopped"
    return Verdict(claim, target, geometric_mean(ratios) if ratios else None, is_bound=bound)


def as_many_products(records: Records, networks: Sequence[str]) -> Verdict:
    claim = "denoisers: time of hessian-eigenthings / torchflat, rtol=0.001, at the same number of products"
    ratios = []
    for network in networks:
        rows = records.sizes(network)[-1]
        own = records.find(network, rows, "torchflat", rtol=1e-3)
        if own is None:
            return Verdict(claim, 1.0, None)
        other = records.find(network, rows, "hessian-eigenthings", max_iter=max(1, round(own["products"])))
        if other is None:
            return Verdict(claim, 1.0, None)
        ratios.append(gradients(other) / gradients(own))
    return Verdict(claim, 1.0, min(ratios, default=None))


def as_promised(records: Records, title: str, networks: Sequence[str]) -> Iterator[Verdict]:
    """Error and width of the default, the worst of the networks."""
    found = [records.find(network, records.sizes(network)[-1], "torchflat") for network in networks]
    runs = [run for run in found if run is not None]
    yield Verdict(f"{title}: error of the default", ERROR, max(map(records.error, runs), default=None), at_least=False)
    widths = [math.inf if width(run) is None else width(run) for run in runs]
    yield Verdict(f"{title}: width of its interval", 1e-2, max(widths, default=None), at_least=False)  # type: ignore[type-var]


def full_products(records: Records, networks: Sequence[str]) -> Iterator[Verdict]:
    """All that was spent, in products of two gradients over all the data, the worst of the networks."""
    for asked, target in (({}, 5.0), ({"rtol": 3e-3}, 7.0)):
        found = [records.find(network, records.sizes(network)[-1], "torchflat", **asked) for network in networks]
        spent = [run["cost"]["gradients"] / 2 for run in found if run is not None]
        setting = "rtol=0.003" if asked else "default"
        yield Verdict(f"denoisers: full products' worth, {setting}", target, max(spent, default=None), at_least=False)


def rows_do_not_matter(records: Records) -> Verdict:
    """Whether more rows take no more full products, from 10 000 rows on where there are so many."""
    name = records.named("denoiser_adam")
    runs = [run for run in records.all if run["network"] == name and is_default(run)]
    many = [run for run in runs if run["rows"] >= 10_000] or runs
    few, most = (pick(many, key=lambda run: run["rows"]) if many else None for pick in (min, max))
    claim = "full products' worth at the most rows / at 10 000 (or the fewest)"
    if few is None or most is None or few is most:
        return Verdict(claim, 1.1, None, at_least=False)
    return Verdict(claim, 1.1, most["cost"]["gradients"] / few["cost"]["gradients"], at_least=False)


def never_wrong(records: Records) -> Verdict:
    """Count looks at a run, at any budget, whose interval does not hold the true λ₁."""
    misses = looks = 0
    for run in records.all:
        truth = records.truth(run["network"], run["rows"]) if run["method"] == "torchflat" else None
        if truth is None or "order" in run["setting"]:
            continue
        for _, _, lower, upper in run["trace"]:
            looks += 1
            missed_above = upper is not None and upper < truth["lower"]
            misses += missed_above or (lower is not None and lower > truth["upper"])
    claim = f"looks at a run, of {looks}, whose interval misses λ₁"
    return Verdict(claim, 0, misses if looks else None, at_least=False)


def any_order(records: Records) -> Verdict:
    """Gap between the intervals on shuffled and on sorted rows, over λ₁; 0 if they overlap."""
    gaps = []
    for first in records.all:
        if first["method"] == "torchflat" and first["setting"].get("order") == "shuffled":
            second = records.find(first["network"], first["rows"], "torchflat", order="sorted")
            if second is not None:
                gap = max(first["lower"], second["lower"]) - min(first["upper"], second["upper"])
                gaps.append(max(0.0, gap) / abs(first["value"]))
    return Verdict(
        "gap between the intervals on shuffled and on sorted rows", 0, max(gaps, default=None), at_least=False
    )


def within_memory(records: Records) -> Verdict:
    runs = [run for run in records.all if "memory" in run["setting"]]
    shares = {(run["network"], run["rows"]): run["peak_bytes"] / run["setting"]["memory"] for run in runs}
    claim = "peak memory / the leanest peer's, which is the budget, at its batch size"
    return Verdict(claim, 1.0, max(shares.values(), default=None), at_least=False)


def two_processes(records: Records) -> Verdict:
    claim = "time of one process / of two, one thread each"
    for one in records.all:
        if one["setting"].get("processes") == 1:
            two = records.find(one["network"], one["rows"], "torchflat", processes=2, threads=1)
            if two is not None:
                return Verdict(claim, 1.7, gradients(one) / gradients(two))
    return Verdict(claim, 1.7, None)
