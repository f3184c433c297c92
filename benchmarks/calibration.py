"""How often intervals miss, on random symmetric matrices and finite sums of every awkward kind, with fresh seeds.

    python -m benchmarks.calibration [--what matrices | sums] [--count 500] [--entropy N] [--out FILE]

A run counts as a miss if the truth lies outside its interval at any step, not only at the last one, so that runs cut
short anywhere are counted too. ``allowed`` is the 99.9 % quantile of the misses of an interval with exactly the
probability asked for. The entropy that the problems were drawn from is in the results: with it, a run repeats.
Takes about a quarter of an hour on one core. Sums are for method="multilevel", and are told apart by what the upper
bound rests on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import calibration
import finite_sums

from benchmarks.records import written


def rows(count: int, entropy: int) -> Iterator[tuple[dict[str, Any], calibration.Tally]]:
    def seeds() -> int:
        return int(streams.integers(2**62))

    streams = np.random.default_rng(entropy)
    for delta in (0.5, 0.1, 0.01):
        for rtol in (1e-2, 1e-4):
            seed = seeds()
            given = calibration.problems(seed, count)
            what = {"what": "sharpness, lanczos", "delta": delta, "rtol": rtol}
            yield what, calibration.calibrate_sharpness(given, seed, delta, rtol)
    for delta in (0.5, 0.1, 0.01):
        seed = seeds()
        given = calibration.problems(seed, count, kind="outlier")
        what = {"what": "sharpness, lanczos, one outlier only", "delta": delta, "rtol": 1e-4}
        yield what, calibration.calibrate_sharpness(given, seed, delta, 1e-4)
    for delta in (0.5, 0.1, 0.01):
        seed = seeds()
        given = calibration.problems(seed, count, largest=150)
        what = {"what": "sharpness, power", "delta": delta, "rtol": 1e-2}
        yield what, calibration.calibrate_sharpness(given, seed, delta, 1e-2, method="power", compare=False)
    for delta in (0.5, 0.1, 0.01):
        for which in ("largest", "smallest", "magnitude"):
            seed = seeds()
            given = calibration.problems(seed, count * 3 // 5)
            what = {"what": f"eigenpairs, 5 {which}, jointly", "delta": delta, "rtol": 1e-2}
            yield what, calibration.calibrate_eigenpairs(given, seed, delta, 5, which)
    for delta in (0.5, 0.1, 0.01):
        seed = seeds()
        given = calibration.problems(seed, count * 3 // 5, largest=150)
        what = {"what": "eigenpairs, 5 largest, cut by a budget of 40 gradients", "delta": delta, "rtol": 1e-2}
        yield what, calibration.calibrate_eigenpairs(given, seed, delta, 5, "largest", 40.0)
    for delta in (0.5, 0.1, 0.01):
        seed = seeds()
        given = calibration.sampled(seed, count * 3 // 5)
        what = {"what": "trace, sampled", "delta": delta, "rtol": 5e-2}
        yield what, calibration.calibrate_trace(given, seed, delta, 5e-2)


def matrices(count: int, entropy: int) -> Iterator[dict[str, Any]]:
    for what, tally in rows(count, entropy):
        row = {**what, **outcome(tally.runs, len(tally.missed), what["delta"]), "faults": len(tally.faults)}
        row["statuses"] = dict(tally.statuses)
        if tally.worst_step_ratio:
            row["steps_over_plain_t090"] = round(tally.worst_step_ratio, 3)
        yield row


def sums(count: int, entropy: int) -> Iterator[dict[str, Any]]:
    streams = np.random.default_rng(entropy)
    for delta in (0.5, 0.1, 0.01):
        for certify in ("auto", "krylov"):
            given = finite_sums.finite_sums(int(streams.integers(2**62)), count)
            tally = finite_sums.calibrate_multilevel(given, delta, 1e-2, certify)
            for basis, runs in sorted(tally.runs.items()):
                what = {"what": f"multilevel, certify={certify}, basis={basis}", "delta": delta, "rtol": 1e-2}
                yield {**what, **outcome(runs, tally.misses[basis], delta), "faults": len(tally.faults)}


def outcome(runs: int, misses: int, delta: float) -> dict[str, int]:
    return {"runs": runs, "misses": misses, "allowed": calibration.allowed(runs, delta)}


WHAT = {"matrices": (matrices, "calibration.json"), "sums": (sums, "calibration_sums.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--entropy", type=int, default=None, help="repeat an earlier run")
    parser.add_argument("--what", choices=list(WHAT), default="matrices")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    work, file = WHAT[options.what]
    out = options.out or Path(__file__).parent / "results" / file
    entropy = calibration.fresh_entropy() if options.entropy is None else options.entropy
    print(f"entropy {entropy}", flush=True)
    table, started = [], time.monotonic()
    for row in work(options.count, entropy):
        table.append(row)
        verdict = "ok" if row["misses"] <= row["allowed"] and not row["faults"] else "FAILED"
        counts = f"{row['misses']:>4}/{row['runs']} (≤ {row['allowed']})"
        print(f"{row['what']:<58} δ={row['delta']:<5} {counts} {verdict}", flush=True)
    result = {
        "entropy": entropy,
        "seconds": round(time.monotonic() - started),
        "rows": table,
    }
    written(result, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
