"""The frame of the experiments: claims, configurations, pieces that are kept, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import flat_gd
from experiments.__main__ import main
from experiments.cells import Cells
from experiments.claim import Claim, Outcome, Unreached, Verdict, judge
from experiments.experiment import CONFIGS, NAMES, configure, load
from torchflat.errors import UsageError

ROOT = Path(__file__).parent.parent
PLAIN = Claim("n", "n is small", "T000", (0, 1))
MENDED = Claim("n", "n is small", "T000", (0, 1), corrected=(2, 3))


@pytest.mark.parametrize(
    ("claim", "measured", "outcome", "as_declared"),
    [
        (PLAIN, 0.5, Outcome.REPRODUCED, True),
        (PLAIN, 1.5, Outcome.NOT_REPRODUCED, False),
        (PLAIN, math.nan, Outcome.NOT_REPRODUCED, False),
        (MENDED, 2.5, Outcome.CORRECTED, True),
        (MENDED, 0.5, Outcome.REPRODUCED, False),
        (MENDED, 4.0, Outcome.NOT_REPRODUCED, False),
        (dataclasses.replace(PLAIN, printed=(0, math.inf)), math.inf, Outcome.NOT_REPRODUCED, False),
        (dataclasses.replace(PLAIN, expected=Outcome.NOT_REPRODUCED), 1.5, Outcome.NOT_REPRODUCED, True),
        (PLAIN, Unreached("5 epochs", "40 epochs"), Outcome.NOT_REACHED, False),
    ],
)
def test_a_number_is_judged_by_its_bounds(
    claim: Claim, measured: float | Unreached, outcome: Outcome, as_declared: bool
) -> None:
    verdict = Verdict(claim, measured)
    assert verdict.outcome is outcome and verdict.as_declared is as_declared
    assert ("UNEXPECTED" in verdict.line()) is not as_declared
    assert json.loads(json.dumps(verdict.to_dict()))["outcome"] == outcome.value


def test_every_claim_has_its_number() -> None:
    with pytest.raises(UsageError, match=r"without a number: \['n'\]; numbers without a claim: \['m'\]"):
        judge([PLAIN], {"m": 1.0})


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_configurations_and_distinct_claims(name: str) -> None:
    experiment = load(name)
    for quick in (False, True):
        configure(experiment, CONFIGS / f"{name}.toml", quick)
    numbers = [claim.number for claim in experiment.CLAIMS]
    assert len(set(numbers)) == len(numbers) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", r"missing: \['exponent', 'start'\]"),
        ("start = [1.0, 2.0]\nsteps = 3\nexponent = 1\nspeed = 1", r"not known: \['speed'\]"),
        ("start = [1.0, 2.0]\nsteps = 3.5\nexponent = 1", r"steps = 3.5 must be of type int"),
        ("start = [1.0, 2.0]\nsteps = true\nexponent = 1", r"steps = True must be of type int"),
        ("steps = ", r"config.toml: "),
    ],
)
def test_configurations_refuse(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        configure(flat_gd, file, quick=False)


def test_the_quick_table_overrides_and_integers_pass_as_floats(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("start = [1.0, 2.0]\nsteps = 3\nexponent = 1\n[quick]\nsteps = 2\n")
    config = configure(flat_gd, file, quick=True)
    assert config == flat_gd.Config(start=(1.0, 2.0), steps=2, exponent=1.0)
    assert isinstance(config.exponent, float)
    assert configure(flat_gd, file, quick=False).steps == 3


def test_finished_pieces_are_not_computed_again(tmp_path: Path) -> None:
    calls = []

    def compute(key: dict, scratch: Path) -> float:
        calls.append(key["seed"])
        (scratch / "half").write_text("kept for going on")
        if key["seed"] == 2 and len(calls) < 4:
            raise KeyboardInterrupt
        return key["seed"] / 4

    keys = [{"seed": seed} for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path).map("runs", keys, compute)
    halves = list(tmp_path.glob("*/half"))
    assert len(halves) == 1 and "seed=2" in halves[0].parent.name
    assert Cells(tmp_path).map("runs", keys, compute) == [0.0, 0.25, 0.5, 0.75]
    assert calls == [0, 1, 2, 2, 3] and not list(tmp_path.glob("*/half"))


SLOW_RUN = """
import sys, time
from pathlib import Path
from experiments.cells import Cells

def compute(key, scratch):
    print(key["i"], flush=True)
    time.sleep(60 if key["i"] == 2 and sys.argv[2] == "hang" else 0)
    return key["i"]

Cells(Path(sys.argv[1])).map("runs", [{"i": i} for i in range(4)], compute)
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, "hang"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while run.stdout.readline().strip() != "2":
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    again = subprocess.run([*command, "on"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.split() == ["2", "3"]


def test_the_command_writes_everything_and_tells_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["flat_gd", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "reproduced: normalised steps" in printed and "corrected: gradient descent" in printed
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"data.json", "run.json", "verdicts.json", "flat_gd.png", "flat_gd.svg"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["steps"] == 1000 and run["quick"] is True

    data = json.loads((tmp_path / "data.json").read_text())
    data["normalised"][-1][0] += 1e-3
    (tmp_path / "data.json").write_text(json.dumps(data))
    assert main(["flat_gd", "--redraw", "--out", str(tmp_path)]) == 1
    assert "UNEXPECTED, declared reproduced: not reproduced" in capsys.readouterr().out


def test_a_wrong_exponent_flips_the_verdict(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text((CONFIGS / "flat_gd.toml").read_text().replace("0.16666666666666666", "0.2"))
    assert main(["flat_gd", "--config", str(file), "--out", str(tmp_path / "out")]) == 1


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flat_dg"]) == 2
    assert "no experiment is called 'flat_dg': choose from flat_gd" in capsys.readouterr().err
    assert main(["flat_gd", "--redraw", "--out", str(tmp_path)]) == 2
    assert "run the experiment without --redraw" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["flat_gd", "--out", "x", "flat_gd"])
    assert main(["--list"]) == 0
    assert "flat_gd" in capsys.readouterr().out
