"""Reproduce the figures and tables of the four papers.

    python -m experiments NAME [NAME ...] [--quick] [--config FILE] [--out DIR] [--redraw]
    python -m experiments --list
    python -m experiments --page [--results DIR]

Each writes its data, its figures (PNG and SVG), its configuration and its verdicts, and prints the verdicts. A run that
was stopped goes on where it was. The exit code is 1 if a verdict comes out otherwise than was declared. ``--page``
computes nothing: it puts what was run with ``--out docs/results/NAME`` on one page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.experiment import CONFIGS, NAMES, conduct, configure, load, redraw
from experiments.page import RESULTS, write_page
from torchflat.errors import TorchflatError, UsageError

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or all")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours")
    parser.add_argument("--config", type=Path, help="configuration; default: configs/NAME.toml")
    parser.add_argument("--out", type=Path, help="folder; default: runs/NAME, or runs/NAME-quick")
    parser.add_argument("--redraw", action="store_true", help="compute nothing: figures and verdicts of the data there")
    parser.add_argument("--page", action="store_true", help="write README.md of the folders in --results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: docs/results")
    options = parser.parse_args(arguments)
    if options.list:
        for name in NAMES:
            print(f"{name:20} {load(name).TITLE}")
        return 0
    names = NAMES if options.names == ["all"] else options.names
    if options.page and names:
        parser.error("--page runs no experiment: give it without names")
    if not names and not options.page:
        parser.error("name an experiment, or see --list")
    if len(names) > 1 and (options.config or options.out):
        parser.error("--config and --out are for one experiment")
    try:
        if options.page:
            print(f"written to {write_page(options.results)}")
            return 0
        return max([one(name, options) for name in names])
    except TorchflatError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 3
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def one(name: str, options: argparse.Namespace) -> int:
    experiment = load(name)
    folder = options.out or Path("runs") / (f"{name}-quick" if options.quick else name)
    if options.redraw:
        verdicts = redraw(experiment, folder)
    else:
        config = configure(experiment, options.config or CONFIGS / f"{name}.toml", options.quick)
        verdicts = conduct(experiment, name, config, options.quick, folder)
    print(f"{name}: {experiment.TITLE}")
    for verdict in verdicts:
        print(f"  {verdict.line()}")
    print(f"  written to {folder}")
    return int(not all(verdict.as_declared for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
