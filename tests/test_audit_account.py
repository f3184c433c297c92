"""The account that a Tracker kept, checked by an audit at the checkpoint that it was saved with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import one_line, run
from torch import Tensor, nn

from torchflat import Task
from torchflat.audit.report import Report
from torchflat.audit.run import audit
from torchflat.errors import CheckpointError
from torchflat.optim import NormalizedGD, Tracker
from torchflat.symmetry import laws

COUPLINGS = {"0 → 2", "2 → 4"}
STEPS = 40


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def rows() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(16, 5, generator=source), torch.randn(16, 2, generator=source)


def trained(make: Callable[..., Any], penalty: float = 0.0) -> tuple[nn.Module, Tracker]:
    model, (x, y) = network(), rows()
    optimizer = make(model.parameters())
    with Tracker(model, optimizer, log=lambda _: None) as tracker:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y) + penalty * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
    return model, tracker


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def audited(model: nn.Module, tracker: Tracker, folder: Path, wrap: str = "tracker", **options: Any) -> Report:
    tree: dict[str, Any] = {"model": model.state_dict(), wrap: tracker.state_dict()}
    torch.save(tree, folder / "model.pt")
    return audit(Task(network(), F.mse_loss, rows()), folder / "model.pt", parts=("laws",), **options)


@pytest.mark.parametrize("make", [sgd, lambda p: NormalizedGD(p, lr=0.1)])
def test_plain_steps_explain_what_they_changed(make: Callable[..., Any], tmp_path: Path) -> None:
    model, tracker = trained(make)
    found = laws(network(), torch.zeros(2, 5))
    before, after = found.values(network()), found.values(model)
    report = audited(model, tracker, tmp_path)
    part = report.content["account"]
    assert part["steps"] == STEPS and part["same_point"] and part["broken"] == 0
    assert {row["name"] for row in part["rows"]} == COUPLINGS
    for row in part["rows"]:
        moved = float((after[row["name"]] - before[row["name"]]).norm())
        assert row["drift"] == pytest.approx(moved, rel=1e-4) and row["explained"] == pytest.approx(moved, rel=1e-2)
        assert moved > 1e-4 and 0 <= row["unexplained"] < 1 and row["refused"] is None
    assert "nothing else moved these parameters" in " ".join(report.text().split())
    page = (report.save(tmp_path / "out") / "report.html").read_text()
    assert "nothing else moved these parameters" in " ".join(page.split())


def test_a_penalty_is_found_at_the_end(tmp_path: Path) -> None:
    report = audited(*trained(sgd, penalty=1e-2), tmp_path)
    part = report.content["account"]
    assert part["broken"] == 2 and part["same_point"]
    assert all(row["drift"] > 1.1 * row["explained"] and row["unexplained"] > 1 for row in part["rows"])
    assert "was broken by something other than the size of the steps" in " ".join(report.text().split())


def test_weights_that_were_changed_after_training_are_told_from_those_that_were_not(tmp_path: Path) -> None:
    model, tracker = trained(sgd)
    state = tracker.state_dict()
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    tracker.state_dict = lambda: state  # type: ignore[method-assign]
    report = audited(model, tracker, tmp_path)
    assert report.content["account"]["broken"] == 1 and not report.content["account"]["same_point"]
    assert "of another step, or were changed after training" in " ".join(report.text().split())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-2), "Adam does not take plain steps"),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum was used"),
        (lambda p: NormalizedGD(p, lr=1e-2, weight_decay=0.1), "weight decay was used"),
    ],
)
def test_other_steps_are_refused_with_the_reason(make: Callable[..., Any], reason: str, tmp_path: Path) -> None:
    report = audited(*trained(make), tmp_path)
    part = report.content["account"]
    assert part["broken"] == 0 and [row["unexplained"] for row in part["rows"]] == [None, None]
    assert all(reason in row["refused"] and row["drift"] > 0 for row in part["rows"])
    assert f"There is no account of 0 → 2 and 1 more: {reason}" in " ".join(report.text().split())


def test_the_state_is_found_wherever_a_checkpoint_holds_it_and_in_a_file_of_its_own(tmp_path: Path) -> None:
    model, tracker = trained(sgd)
    torch.save({"state_dict": model.state_dict(), "callbacks": {"Callback": tracker.state_dict()}}, tmp_path / "a.ckpt")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    torch.save(tracker.state_dict(), tmp_path / "torchflat_tracker.pt")
    task = Task(network(), F.mse_loss, rows())
    inside = audit(task, tmp_path / "a.ckpt", parts=("laws",)).content["account"]
    beside = audit(task, tmp_path / "b.pt", parts=("laws",), tracker=str(tmp_path / "torchflat_tracker.pt"))
    assert inside == beside.content["account"] and inside["broken"] == 0
    assert "account" not in audit(task, tmp_path / "b.pt", parts=("laws",)).content
    with pytest.raises(CheckpointError, match="no state of a Tracker"):
        audit(task, tmp_path / "b.pt", parts=("laws",), tracker=str(tmp_path / "b.pt"))


def test_a_state_of_another_network_is_a_note(tmp_path: Path) -> None:
    model, _ = trained(sgd)
    other = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = sgd(other.parameters())
    x, y = rows()
    with Tracker(other, optimizer) as tracker:
        F.mse_loss(other(x), y).backward()
        optimizer.step()
    report = audited(model, tracker, tmp_path)
    assert "account" not in report.content
    assert any("account could not be checked" in note for note in report.content["provenance"]["notes"])


def test_the_command_checks_and_a_gate_can_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tracker = trained(sgd, penalty=1e-2)
    torch.save({"model": model.state_dict(), "tracker": tracker.state_dict()}, "run.pt")
    Path("task.py").write_text(
        "import torch, torchflat\nfrom torch import nn\n\ndef task():\n"
        "    source = torch.Generator().manual_seed(1)\n"
        "    rows = torch.randn(16, 5, generator=source), torch.randn(16, 2, generator=source)\n"
        "    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))\n"
        "    return torchflat.Task(model, nn.functional.mse_loss, rows)\n"
    )
    common = ("audit", "run.pt", "--task", "task.py:task", "--parts", "laws", "--json", "report.json")
    assert run(*common, "--fail-on", "account.broken > 0", "-o", "out") == 1
    assert json.loads(Path("report.json").read_text())["account"]["broken"] == 2
    capsys.readouterr()
    assert run(*common, "--tracker", "task.py", "-o", "again") == 3
    one_line(capsys, "task.py")
