"""Two and three processes audit and flatten as one: one answer, one voice, one file written."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Digits, Ranks, agree, raised, started
from safetensors.torch import load_file
from torch import nn

import torchflat
from torchflat import Task
from torchflat.audit.builtin import digits as shipped
from torchflat.audit.flatten import flatten_checkpoint
from torchflat.audit.run import Interrupted
from torchflat.cli import main
from torchflat.data import sample_checkpoint
from torchflat.errors import LawsError, VerificationError


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with started(request.param) as processes:
        yield processes


def audited() -> dict[str, Any]:
    torch.manual_seed(0)
    digits, model = Digits(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    task = Task(model, F.mse_loss, (digits.x, digits.y))
    content = torchflat.audit(task, top=3, parts=("sharpness", "eigenvalues", "trace", "blocks", "density")).content
    # How often a climb halves its step can hang on a rounding error, so its evaluations are not compared.
    profile = torchflat.audit(task, parts=("variation",)).content["variation"]
    return {
        "point": content["point"],
        "λ₁": [content["sharpness"][key] for key in ("value", "lower", "upper")],
        "trace": content["trace"]["value"],
        "variation": [
            [radius, value / radius] for radius, value in zip(profile["radii"], profile["values"], strict=True)
        ],
        "cost": [content["cost"][key] for key in ("forwards", "backwards", "products")],
        "sha": [float(int(digit, 16)) for digit in content["provenance"]["data"]["sha256"]],
    }


def processes() -> int:
    digits = Digits()
    task = Task(nn.Linear(4, 1), F.mse_loss, (digits.x, digits.y))
    nn.init.zeros_(task.make_model().weight)
    nn.init.zeros_(task.make_model().bias)
    return int(torchflat.audit(task, parts=()).content["provenance"]["processes"])


def test_an_audit_is_that_of_one_process(ranks: Ranks) -> None:
    agree(ranks, audited, rtol=1e-3, atol=1e-4)
    assert ranks(processes) == [len(ranks.pipes)] * len(ranks.pipes)
    assert processes() == 1


def interrupted() -> str:
    """Ctrl-C reaches one rank, in the middle of its work."""
    torch.manual_seed(0)
    digits, model = Digits(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def progress(part: str, line: str, fraction: float | None) -> None:
        if part == "sharpness" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        torchflat.audit(Task(model, F.mse_loss, (digits.x, digits.y)), progress=progress)
    except Interrupted as interruption:
        return ", ".join(interruption.report.content)
    return "not interrupted"


def test_an_interruption_of_one_rank_interrupts_all(ranks: Ranks) -> None:
    expected = "schema_version, status, provenance, point, sharpness, cost"
    assert ranks(interrupted) == [expected] * len(ranks.pipes)


# What rescaling hides -------------------------------------------------------------------------------------------------

ROWS = 40
ORBIT = importlib.import_module("torchflat.audit.orbit")


def orbit_numbers(part: dict[str, Any]) -> list[float]:
    return [part["value"], part["upper"], part["headroom"], part["before"]["lower"], part["largest_log_scale"]]


def rescaled() -> dict[str, Any]:
    content = torchflat.audit(shipped(), sample_checkpoint(), rows=ROWS, parts=("laws", "orbit")).content
    imbalance = {row["name"]: row["imbalance"] for row in content["laws"]["couplings"]}
    return {"imbalance": imbalance, "orbit": orbit_numbers(content["orbit"])}


def test_laws_and_orbit_of_an_audit_are_those_of_one_process(ranks: Ranks) -> None:
    answer = agree(ranks, rescaled, rtol=1e-3)
    assert len(answer["imbalance"]) == 2


def flattened(out: str) -> dict[str, Any]:
    found = flatten_checkpoint(shipped(), sample_checkpoint(), out, force=True, rows=ROWS)
    return {"orbit": orbit_numbers(found["orbit"]), "error": found["output_error"], "written": load_file(out)}


def test_the_flattest_network_is_that_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    agree(ranks, flattened, str(tmp_path / "b.safetensors"), rtol=1e-2, atol=1e-4)


def in_folders_of_their_own(place: str) -> tuple[int, bool, list[str]]:
    """Only that of rank 0 has the folder for the checkpoint."""
    folder, before = Path(place) / str(dist.get_rank()), Path.cwd()
    (folder / "there" if dist.get_rank() == 0 else folder).mkdir(parents=True)
    said = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            code = main(["flatten", "-o", "there/b.safetensors", "--rows", str(ROWS), "--json", "found.json"])
    finally:
        os.chdir(before)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return code, bool(said.getvalue()), files


def test_the_first_process_alone_writes_and_prints(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks(in_folders_of_their_own, str(tmp_path))
    assert first == (0, True, ["found.json", "there/b.safetensors"])
    assert others == [(0, False, [])] * (len(ranks.pipes) - 1)


def without_laws_on_rank_1(out: str | None) -> Any:
    """Fail to find the laws on one rank only."""
    found = ORBIT.laws

    def laws(*given: Any, **named: Any) -> Any:
        if dist.get_rank() == 1:
            raise LawsError("no laws here")
        return found(*given, **named)

    ORBIT.laws = laws
    try:
        if out is not None:
            return flatten_checkpoint(shipped(), sample_checkpoint(), out, rows=ROWS)
        content = torchflat.audit(shipped(), rows=ROWS, parts=("laws", "orbit")).content
        return [note for note in content["provenance"]["notes"] if "laws" in note]
    finally:
        ORBIT.laws = found


def test_laws_that_one_process_cannot_find_are_found_by_none(ranks: Ranks, tmp_path: Path) -> None:
    size = len(ranks.pipes)
    note = f"the laws could not be found: no laws here (on process 1 of {size})"
    assert ranks(without_laws_on_rank_1, None) == [[note]] * size
    raised(ranks(without_laws_on_rank_1, str(tmp_path / "b.pt")), LawsError, f"no laws here (on process 1 of {size})")
    assert not list(tmp_path.iterdir())


def differing_on_rank_1(out: str) -> Any:
    """Outputs that move on one rank only."""
    module = importlib.import_module("torchflat.audit.flatten")
    before = module._disagreement
    module._disagreement = lambda *given: 0.5 if dist.get_rank() == 1 else before(*given)
    try:
        return flatten_checkpoint(shipped(), sample_checkpoint(), out, rows=ROWS)
    finally:
        module._disagreement = before


def test_outputs_that_move_on_one_process_are_written_by_none(ranks: Ranks, tmp_path: Path) -> None:
    raised(ranks(differing_on_rank_1, str(tmp_path / "b.pt")), VerificationError, "outputs would differ by 5.0e-01")
    assert not list(tmp_path.iterdir())


# torchrun -------------------------------------------------------------------------------------------------------------

TASK = """
import os, torch, torchflat
from torch import nn

X, Y = torch.eye(5), torch.zeros(5, 1)

def task():
    return torchflat.Task(lambda: nn.Linear(5, 1, bias=False), nn.functional.mse_loss, (X, Y))

def broken_somewhere():
    if os.environ["RANK"] == "1":
        raise FileNotFoundError("not on this machine")
    return task()
"""


def torchrun(place: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (place / "task.py").write_text(TASK)
    torch.save({"weight": torch.ones(1, 5)}, place / "line.pt")
    here = str(Path(torchflat.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole = [*launch, "-m", "torchflat", command, *arguments]
    return subprocess.run(whole, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


def test_torchrun_audits_into_one_folder(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "audit", "line.pt", "--task", "task.py:task", "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)  # one report, and nothing else
    assert content["provenance"]["processes"] == 2
    assert content["sharpness"]["lower"] <= 0.4 <= content["sharpness"]["upper"]  # 2 XᵀX / 5
    assert sorted(path.name for path in tmp_path.glob("torchflat-audit-*")) == ["torchflat-audit-1"]
    assert done.stderr.count("torchflat: the report is in") == 1


def test_torchrun_flattens_into_one_checkpoint(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "flatten", "-o", "b.safetensors", "--rows", str(ROWS), "--json", "-")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["provenance"]["processes"] == 2 and content["orbit"]["headroom"] > 1.5
    assert done.stderr.count("torchflat: the checkpoint is in b.safetensors") == 1
    assert set(load_file(tmp_path / "b.safetensors")) == set(load_file(sample_checkpoint()))


@pytest.mark.parametrize("command, out", [("audit", "out"), ("flatten", "out.pt")])
def test_torchrun_tells_an_error_of_any_process_once(tmp_path: Path, command: str, out: str) -> None:
    done = torchrun(tmp_path, command, "line.pt", "--task", "task.py:broken_somewhere", "-o", out)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("torchflat: error: ") == 1
    assert "FileNotFoundError: not on this machine (on process 1 of 2)" in done.stderr
    assert not (tmp_path / out).exists()
