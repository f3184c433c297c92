"""The laws command: what is conserved, in words and as JSON, and what can go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from torchflat.audit.example import example_input
from torchflat.audit.orbit import coupling_row
from torchflat.audit.task import Task
from torchflat.cli import main
from torchflat.errors import UsageError
from torchflat.symmetry import Coupling, Laws, Member

TASK = """
import torch, torchflat
from torch import nn

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

def network(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.ReLU(), nn.Linear(4, 2))

def relu():
    return torchflat.Task(lambda: network([]), nn.functional.mse_loss, (X, X[:, :2]), name="relu")

def normalised():
    return torchflat.Task(lambda: network([nn.BatchNorm1d(4)]), nn.functional.mse_loss, (X, X[:, :2]))

def scaled(scale="1.0"):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model[0].parameters():
            p *= float(scale)
    return torchflat.Task(lambda: model, nn.functional.mse_loss, (X, X[:, :2]))

def dicts():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network([])
        def forward(self, features, mask):
            return self.net(features) * mask
    batch = {"features": X, "mask": torch.ones(6, 1), "labels": X[:, :2]}
    return torchflat.Task(Named, nn.functional.mse_loss, [batch])

def branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network([])
        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)
    return torchflat.Task(Branching, nn.functional.mse_loss, (X, X[:, :2]))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    return tmp_path


def test_the_bundled_network(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws"]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert printed.splitlines()[1].split()[:6] == ["conv1", "→", "conv2", "diagonal", "8", "8"]
    assert printed.splitlines()[2].split()[:6] == ["conv2", "→", "linear", "diagonal", "16", "16"]
    assert "24 numbers are conserved along gradient flow, in 2 couplings" in " ".join(printed.split())


def test_json_agrees_with_the_parameters(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", "--task", "task.py:relu", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    (row,) = content["couplings"]
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    writers = (first.weight.square().sum(1) + first.bias.square()).double().detach()
    readers = last.weight.square().sum(0).double().detach()
    assert (row["kind"], row["channels"], row["laws"], row["degenerate"]) == ("diagonal", 4, 4, 0)
    expected = float((writers - readers).abs().sum() / (writers + readers).sum())
    assert row["imbalance"] == pytest.approx(expected, rel=1e-6)
    assert row["writers"] == pytest.approx(float(writers.sum()) ** 0.5, rel=1e-6)
    ratios = (writers / readers).sqrt()
    assert (row["ratios"][0], row["ratios"][-1]) == pytest.approx((float(ratios.min()), float(ratios.max())), rel=1e-6)
    assert content["task"] == "relu" and content["unknown"] == content["dropped"] == []


def test_more_is_conserved_where_the_batch_normalises(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for mode in ("eval", "train"):
        assert main(["laws", "--task", "task.py:normalised", "--mode", mode, "--json", "laws.json"]) == 0
        content = json.loads(Path("laws.json").read_text())
        assert content["mode"] == mode
        counts[mode] = len(content["couplings"]) + len(content["approximate"]) + len(content["linear"])
    assert counts["train"] > counts["eval"]
    assert "as ε → 0" in capsys.readouterr().out


def test_a_bias_before_fixed_statistics_counts_from_their_mean(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The mean is 0 and the variance 1 in a new network; here it is not.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    network[1].running_mean.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    torch.save(network.state_dict(), "network.pt")
    assert main(["laws", "network.pt", "--task", "task.py:normalised", "--json", "laws.json"]) == 0
    rows = {row["name"]: row for row in json.loads(Path("laws.json").read_text())["couplings"]}
    centred, plain = rows["0 → 1"], rows["1 → 3"]
    assert (centred["kind"], centred["centres"]) == ("centred", {"0.bias": "1.running_mean"})
    assert (plain["kind"], plain["centres"]) == ("diagonal", {})
    w, b = network[0].weight.detach().double(), network[0].bias.detach().double()
    writers = w.square().sum() + (b - network[1].running_mean).square().sum()
    assert centred["writers"] == pytest.approx(float(writers) ** 0.5, rel=1e-6)
    assert centred["readers"] == pytest.approx(2)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:6] == ["0", "→", "1", "centred", "4", "4"]
    assert "in 0 → 1 b − μ is 0.bias − 1.running_mean" in " ".join(printed.split())
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_laws_that_epsilon_breaks_are_said_to_mean_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for scale in ("1.0", "0.001"):
        assert main(["laws", "--task", "task.py:scaled", "--task-option", f"scale={scale}"]) == 0
        said[scale] = " ".join(capsys.readouterr().out.split())
        assert "0 diagonal 1 1" in said[scale] and "as ε → 0; here to" in said[scale]
    assert "1 law means nothing here of the 1 that hold as ε → 0, 0 least of all (residual 0." in said["0.001"]
    assert "means nothing" not in said["1.0"]


def test_batches_as_dicts_give_keyword_arguments(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", "--task", "task.py:dicts", "--json", "-"]) == 0
    assert [row["channels"] for row in json.loads(capsys.readouterr().out)["couplings"]] == [4]


@pytest.mark.parametrize("arguments", [
    ["a.safetensors"], ["--task", "task.py:branching"], ["--mode", "test"], ["--task", "task.py:nothing"],
])  # fmt: skip
def test_what_cannot_be_done_exits_with_2(
    place: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["laws", *arguments])
    except SystemExit as leave:
        code = int(leave.code or 0)
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err


def test_the_example_has_the_dtype_of_the_model_and_two_rows() -> None:
    X = torch.randn(5, 3)
    task = Task(nn.Linear(3, 1).double(), nn.functional.mse_loss, (X, X[:, :1]))
    (example,) = example_input(task, task.make_model(), task.make_data())
    assert (tuple(example.shape), example.dtype) == ((2, 3), torch.float64)
    given = Task(nn.Linear(3, 1), nn.functional.mse_loss, (X, X[:, :1]), example_input={"input": X})
    assert example_input(given, given.make_model(), None)["input"] is X  # type: ignore[call-overload]
    odd = Task(nn.Linear(3, 1), None, [(X, X, X)], batch_loss=lambda model, batch: (model(batch[0]).sum(), 5))
    with pytest.raises(UsageError, match="example_input"):
        example_input(odd, odd.make_model(), odd.make_data())


def test_ratios_of_a_full_coupling_are_one_exactly_where_it_is_balanced() -> None:
    X = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    rows = torch.arange(2)
    coupling = Coupling("a → b", 2, (Member("a", 0, rows, rows, 1.0), Member("b", 1, rows, rows, -1.0)), "full")
    balanced = coupling_row(coupling, {"a": X, "b": (X @ rotation).T})
    assert balanced["imbalance"] == pytest.approx(0, abs=1e-6)
    assert balanced["ratios"] == pytest.approx([1.0] * 5, abs=1e-6)
    # The same eigenvalues on both sides, along other axes.
    turned = coupling_row(coupling, {"a": X, "b": (rotation @ X).T})
    assert turned["imbalance"] > 0.1 and turned["ratios"][-1] > 1.1
    zero = coupling_row(coupling, {"a": 0 * X, "b": X})
    assert (zero["ratios"], zero["degenerate"], zero["imbalance"]) == (None, 2, 1.0)
    assert Laws((coupling,))["a → b"] is coupling
