"""Verdicts of ``compare`` on random pairs of points of which the theory says which is flatter.

    python -m benchmarks.pairs [--count 600] [--entropy N] [--processes 2] [--out FILE]

Factorisations, deep linear networks, monomials and small ReLU networks, all at zero loss, where the larger λ₁ is the
sharper (T021); a third of the pairs are equal by a symmetry of f°, a third within about 1 %, a third far apart. Each
is compared in both orders. The entropy that they were drawn from is in the results: with it, a run repeats.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import calibration
import pairs

from benchmarks.records import written


def judged(seed: int, i: int) -> pairs.Judgement:
    """One pair, in a process that shares the processor with others."""
    torch.set_num_threads(1)
    return pairs.judge(pairs.pair(seed, i))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--entropy", type=int, default=None, help="repeat an earlier run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pairs.json")
    options = parser.parse_args()
    entropy = calibration.fresh_entropy() if options.entropy is None else options.entropy
    started, judgements = time.monotonic(), []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        coming = pool.imap(functools.partial(judged, entropy), range(options.count))
        for judgement in tqdm(coming, total=options.count, unit="pair", disable=not sys.stderr.isatty()):
            judgements.append(judgement)
            if judgement.wrong or not judgement.mirrored:
                print(judgement, flush=True)
    counts = pairs.tally(judgements)
    result = {
        "entropy": entropy,
        "pairs": options.count,
        "wrong": counts.wrong,
        "not_mirrored": counts.not_mirrored,
        "further_apart_than_5_percent": counts.clear,
        "of_those_undecided": counts.clear_undecided,
        "said": dict(sorted(counts.said.items())),
        "median_gradients": statistics.median(each.gradients for each in judgements),
        "seconds": round(time.monotonic() - started),
    }
    print(written(result, options.out))
    holds = not counts.wrong and not counts.not_mirrored and counts.clear_undecided <= 0.1 * counts.clear
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
