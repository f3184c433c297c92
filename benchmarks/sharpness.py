"""Time λ₁ to 1e-3, beside PyHessian, hessian-eigenthings, and curvlinops with scipy's ``eigsh``.

    python -m benchmarks.sharpness [--quick] [--full] [--network NAME ...] [--method NAME ...] [--out DIR] [--redo]
    python -m benchmarks.sharpness --report     # table and plot of what is on file, nothing measured

Needs MNIST (TORCHFLAT_DATA) and ``pip install "torchflat[bench]"``; a library that is not installed is left out.
Without ``--full`` the denoisers stay at 10 000 images; ``--quick`` takes small networks and few rows.

Rules. Every measurement is a fresh process and one JSON file; what is on file is not measured again. Each library gets
the batch size and the threads that a probe finds fastest, and is stopped at 15 times torchflat's default. It runs by a
rule that its user can apply, tightened until the actual error is at most 1e-3: PyHessian's ``tol``, ``tol`` of
``eigsh``; hessian-eigenthings, which has no such rule, gets the fewest Lanczos steps that do it, which no user knows.
The rule is chosen at the smaller number of rows and kept at the larger, or tightened further if the error asks for it.
The true λ₁ is torchflat's Lanczos at rtol=1e-6, whose interval holds with 99 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.cells import Cell, Cells, in_a_process
from benchmarks.methods import METHODS, PEERS, Record, Setting
from benchmarks.networks import MAIN, NETWORKS, QUICK, QUICK_WIDTHS, WIDTHS, Network
from benchmarks.records import ERROR
from benchmarks.tables import report
from torchflat.errors import TorchflatError

STOP_AT = 15.0  # times torchflat's default
SEARCH_STEPS = 32
REFERENCE: Setting = {"method": "lanczos", "rtol": 1e-6}
OURS: tuple[Setting, ...] = ({"rtol": 1e-3}, {"rtol": 3e-3}, {"method": "lanczos", "rtol": 1e-2})
ORDERS = ("shuffled", "sorted")
ROWS, QUICK_ROWS = (1_000, 3_000, 10_000, 30_000, 60_000), (250, 500)
RESULTS = Path(__file__).parent / "results"


def reached(record: Record, truth: float) -> bool:
    """Whether the value is right to :data:`ERROR`."""
    return record["value"] is not None and abs(record["value"] - truth) <= ERROR * abs(truth)


class Comparison:
    """All cells of one network, in the order in which one depends on another."""

    def __init__(self, cells: Cells, network: Network, methods: Sequence[str]) -> None:
        self.cells, self.network = cells, network
        self.peers = [name for name in methods if name != "torchflat"]
        self._rungs: dict[str, int] = {}
        self._searched: dict[str, Setting] = {}

    def run(self, rows: int) -> None:
        """Measure everything at this number of rows."""
        truth = self._ours(rows, REFERENCE)
        if truth["value"] is None:
            return
        default = self._ours(rows, {})
        exact, *_ = (self._ours(rows, setting) for setting in OURS)
        if default["status"] == "failed":
            return
        records = [record for name in self.peers for record in self._climb(name, rows, truth["value"], default, exact)]
        self._within_the_leanest(rows, records, truth["value"])

    def orders(self, rows: int) -> None:
        """Measure the default on the same rows in other orders."""
        for order in ORDERS:
            self._ours(rows, {"order": order})

    def _ours(self, rows: int, setting: Setting) -> Record:
        return self.cells.measure(Cell(self.network.name, rows, "torchflat", setting))

    def _climb(self, name: str, rows: int, truth: float, default: Record, exact: Record) -> Iterator[Record]:
        """Tighten a peer's rule until its error is small enough or its time is over."""

        def measure(setting: Setting, limit: float | None = None) -> Record:
            return self.cells.measure(Cell(self.network.name, rows, name, setting), limit)

        probed = measure({"probe": 1})
        if probed["status"] == "failed":
            return
        best = probed["best"]
        limit = STOP_AT * default["gradients"]
        if name == "hessian-eigenthings":
            if name not in self._searched:
                self._searched[name] = fewest_steps(measure({**best, "search": SEARCH_STEPS}), truth)
            yield measure({**best, "max_iter": max(1, round(exact.get("products") or 1))}, limit)
        ladder = PEERS[name].ladder(self._searched.get(name, {}))
        for rung in range(self._rungs.get(name, 0), len(ladder)):
            record = measure({**best, **ladder[rung]}, limit)
            yield record
            self._rungs[name] = rung
            if record["status"] != "finished" or reached(record, truth):
                return

    def _within_the_leanest(self, rows: int, records: Sequence[Record], truth: float) -> None:
        """Measure the default with the memory and the batch size of the leanest peer that got there, once all ran."""
        there = [record for record in records if reached(record, truth)]
        if there and {record["method"] for record in records if record["status"] != "failed"} == set(PEERS):
            leanest = min(there, key=lambda record: record["peak_bytes"])
            batch = min(leanest["setting"]["batch"], rows)
            self._ours(rows, {"memory": leanest["peak_bytes"], "microbatch": batch})


def fewest_steps(search: Record, truth: float) -> Setting:
    """Return the fewest Lanczos steps of the search that come near enough, or all of them."""
    if search["status"] != "finished":
        return {"max_iter": SEARCH_STEPS}
    near = [abs(value - truth) <= ERROR * abs(truth) for value in search["values"]]
    return {"max_iter": near.index(True) + 1 if any(near) else len(near)}


def scaling(cells: Cells, network: Network, widths: Sequence[Network], rows: Sequence[int]) -> None:
    """Measure the default along rows, parameters and processes."""
    for count in rows:
        cells.measure(Cell(network.name, count, "torchflat", {}))
    for wide in widths:
        cells.measure(Cell(wide.name, wide.rows[0], "torchflat", {}))
    for processes in (1, 2):
        cells.measure(Cell(network.name, network.rows[0], "torchflat", {"processes": processes, "threads": 1}))


def chosen(names: Sequence[str] | None, among: Sequence[Network]) -> list[Network]:
    """Return the networks whose names begin with one of ``names``; all, if there are none."""
    unknown = [name for name in names or () if not any(each.startswith(name) for each in NETWORKS)]
    if unknown:
        sys.exit(f"no network is called {unknown[0]}: choose from {', '.join(each.name for each in among)}")
    return [each for each in among if not names or any(each.name.startswith(name) for name in names)]


def installed(names: Sequence[str]) -> list[str]:
    """Return the methods that can run, and name the others on stderr."""
    missing = [name for name in names if not METHODS[name].installed()]
    if missing:
        print(f'not installed, left out: {", ".join(missing)}: pip install "torchflat[bench]"', file=sys.stderr)
    return [name for name in names if name not in missing]


def measure_all(options: argparse.Namespace, folder: Path) -> None:
    main, widths = (QUICK, QUICK_WIDTHS) if options.quick else (MAIN, WIDTHS)
    networks, methods = chosen(options.network, main), installed(options.method or list(METHODS))
    for network in networks:
        network.trained(options.cache)
    with tqdm(desc="cells", unit="cell", file=sys.stderr) as bar:
        fresh = in_a_process(options.cache.resolve(), options.threads)

        def execute(cell: Cell, limit: float | None) -> Record:
            bar.set_postfix_str(cell.name)
            record = fresh(cell, limit)
            bar.update()
            if record["status"] == "failed":
                bar.write(f"{cell.name}: {record['error']}", file=sys.stderr)
            return record

        cells = Cells(folder, execute, options.redo)
        for network in networks:
            comparison = Comparison(cells, network, methods)
            for rows in network.rows if options.full else network.rows[:1]:
                comparison.run(rows)
            if network.name.startswith("denoiser"):
                comparison.orders(network.rows[0])
        scaled = next((each for each in networks if each.name.startswith("denoiser_adam")), None)
        if scaled is not None:
            top = scaled.rows[-1] if options.full else scaled.rows[0]
            fewer = QUICK_ROWS if options.quick else ROWS
            scaling(cells, scaled, widths, [*(rows for rows in fewer if rows < top), top])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks and few rows, minutes")
    parser.add_argument("--full", action="store_true", help="the denoisers at 60 000 images too, hours")
    parser.add_argument("--network", nargs="+", metavar="NAME", help="only these; the beginning of a name is enough")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--out", type=Path, help="folder of the cells; table and plot are written beside it")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache", help="folder of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="at most; default: torch's")
    parser.add_argument("--redo", action="store_true", help="measure again what is on file")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or RESULTS / ("sharpness-quick" if options.quick else "sharpness")
    if not options.report:
        measure_all(options, folder)
    print(report(Cells(folder, lambda cell, limit: {}).all(), folder))


if __name__ == "__main__":
    try:
        main()
    except TorchflatError as error:
        sys.exit(str(error))
