"""The page of results says what the files beside it say, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.claim import judge
from experiments.experiment import NAMES, load
from experiments.page import PAGE, RESULTS, write_page
from torchflat.errors import UsageError

WRITTEN = [name for name in NAMES if (RESULTS / name).exists()]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in ("flat_gd", "scalar_networks"):
        shutil.copytree(RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("data.json", "*.svg", "cells"))
    return tmp_path


def change(file: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def section(page: str, name: str) -> str:
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_the_committed_page_is_what_the_committed_files_give(tmp_path: Path) -> None:
    committed = (RESULTS / PAGE).read_text()
    shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("data.json", "*.svg", "cells", PAGE))
    assert write_page(tmp_path / "results").read_text() == committed


@pytest.mark.parametrize("name", WRITTEN)
def test_the_committed_verdicts_are_what_the_committed_data_give(name: str) -> None:
    experiment, folder = load(name), RESULTS / name
    verdicts = judge(experiment.CLAIMS, experiment.measure(json.loads((folder / "data.json").read_text())))
    committed = json.loads((folder / "verdicts.json").read_text())
    for verdict, old in zip(verdicts, committed, strict=True):
        new = json.loads(json.dumps(verdict.to_dict()))
        words = isinstance(old["measured"], str)  # of a number that was not reached
        assert new["measured"] == (old["measured"] if words else pytest.approx(old["measured"], rel=1e-9, nan_ok=True))
        for changing in ("measured", "line"):  # in the last digits, from machine to machine
            del new[changing], old[changing]
        assert new == old
    for figure in folder.glob("*.png"):
        assert figure.with_suffix(".svg").exists()


def test_a_changed_number_changes_the_page(results: Path) -> None:
    before = write_page(results).read_text()
    assert "| 34.608825 ± 1e-06 | 34.6088246 | corrected |" in section(before, "scalar_networks")
    change(results / "scalar_networks" / "verdicts.json", lambda verdicts: verdicts[0].update(measured=34.6088257))
    after = write_page(results).read_text()
    assert "| 34.608825 ± 1e-06 | 34.6088257 | corrected |" in section(after, "scalar_networks")
    assert after.replace("34.6088257 ", "34.6088246 ") == before


def test_what_came_out_otherwise_stands_first(results: Path) -> None:
    def spoil(verdicts: list[dict[str, Any]]) -> None:
        verdicts[1].update(measured=0.5, outcome="not reproduced", as_declared=False)
        verdicts[2].update(
            measured="not reached in 2 epochs (extrapolated: 9)", outcome="not reached", expected="not reached"
        )

    before = write_page(results).read_text()
    assert "\nNothing.\n" in section(before, "Not reproduced, not reached, or not as declared")
    change(results / "scalar_networks" / "verdicts.json", spoil)
    after = write_page(results).read_text()
    assert "| full | 7 | 1 | 1 | 1 | 9 of 10 |" in after and "| full | 9 | 1 | 0 | 0 | 10 of 10 |" in before
    first = section(after, "Not reproduced, not reached, or not as declared").strip().splitlines()
    assert len(first) == 2 and "Nothing." not in after
    assert first[0].startswith("- [scalar_networks](#scalar_networks): **not reproduced** (declared: reproduced): ")
    assert first[0].endswith(": 0.5, printed ≤ 1e-05")
    assert ": **not reached**: " in first[1] and "not reached in 2 epochs (extrapolated: 9), printed 4" in first[1]
    assert "| 0.5 | **not reproduced**, not as declared |" in section(after, "scalar_networks")


def test_scale_and_settings_are_those_of_the_run(results: Path) -> None:
    full = section(write_page(results).read_text(), "scalar_networks")
    assert "Scale: full, as in configs/scalar_networks.toml. " in full and "--quick" not in full
    change(results / "scalar_networks" / "run.json", lambda run: run.update(quick=True))
    quick = section(write_page(results).read_text(), "scalar_networks")
    assert "Scale: quick, as in configs/scalar_networks.toml, but pairs = 400. " in quick
    assert "`python -m experiments scalar_networks --quick --out docs/results/scalar_networks`" in quick


def test_an_experiment_that_was_not_run_says_so(results: Path) -> None:
    shutil.rmtree(results / "flat_gd")
    page = write_page(results).read_text()
    assert "`python -m experiments flat_gd` | not run |" in page and "\n## flat_gd\n" not in page


def test_every_link_leads_to_a_file(results: Path) -> None:
    page = (RESULTS / PAGE).read_text()
    targets = {part.split(")")[0] for part in page.split("](")[1:]}
    headings = {f"#{line[3:]}" for line in page.splitlines() if line.startswith("## ")}
    assert targets and all(target in headings or (RESULTS / target).exists() for target in targets)


def test_what_the_page_refuses(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--page", "--results", str(results)]) == 0
    assert f"written to {results / PAGE}" in capsys.readouterr().out
    assert main(["--page", "--results", str(tmp_path / "nowhere")]) == 2
    assert "holds no results: run python -m experiments NAME --out" in capsys.readouterr().err
    (results / "flat_gd" / "verdicts.json").unlink()
    with pytest.raises(UsageError, match=r"flat_gd is not what a run left: .*run python -m experiments flat_gd"):
        write_page(results)
    with pytest.raises(SystemExit):
        main(["--page", "flat_gd"])
