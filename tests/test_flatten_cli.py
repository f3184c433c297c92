"""The flatten command: λ₁★ that is known, a checkpoint that computes the same, and what can go wrong."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_line, run
from safetensors.torch import load_file, save_file

from torchflat.audit.flatten import flatten_checkpoint

# f = 2 (ab - 1)² with two rows, as in the tests of compare: λ₁ = 4 (a² + b²) where ab = 1, and λ₁★ = 8 at a = b = 1.
TASK = """
import torch, torchflat
from torch import nn

X = torch.tensor([[1.0], [3**0.5]], dtype=torch.float64)

def model():
    return nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()

def task(decay=0.0):
    return torchflat.Task(model, nn.functional.mse_loss, (X, X), name="unit", weight_decay=decay)

def dicts():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()
            self.register_buffer("kept", torch.tensor([7]))
        def forward(self, values):
            return {"logits": self.inner(values)}["logits"]
    return torchflat.Task(Wrapped, nn.functional.mse_loss, [{"values": X, "labels": X}], name="dicts")

def normalised():
    def network():
        torch.manual_seed(0)
        layers = [nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)]
        return nn.Sequential(*layers).double()
    rows = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torchflat.Task(network, nn.functional.mse_loss, (rows, rows.prod(1, keepdim=True)), name="normalised")

def pairs():
    def loss(model, batch):
        first, second, y = batch
        return ((model(first + second) - y) ** 2).sum(), len(y)
    return torchflat.Task(model, None, [(X / 2, X / 2, X)], batch_loss=loss, name="pairs")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    save_file(
        {"2.weight": torch.tensor([[4.0]]).double(), "0.weight": torch.tensor([[0.25]]).double()}, "a.safetensors"
    )
    return tmp_path


def flatten(*flags: object, out: str = "b.safetensors", task: str = "task.py:task") -> int:
    return run("flatten", "a.safetensors", "-o", out, "--task", task, *flags)


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_the_known_least_is_reached_and_the_function_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flatten("--json", "-") == 0
    content = found(capsys)
    orbit = content["orbit"]
    assert orbit["value"] == pytest.approx(8, rel=1e-4)
    assert orbit["lower"] <= 8 * (1 + 1e-9) and orbit["upper"] >= 8 * (1 - 1e-9)
    assert orbit["headroom"] == pytest.approx((16 + 1 / 16) / 2, rel=1e-2)
    assert (orbit["status"], orbit["proof"], orbit["frozen"]) == ("CONVERGED", "semidefinite", [])
    written = load_file("b.safetensors")
    product = float(written["0.weight"] * written["2.weight"])
    assert product == pytest.approx(1, rel=1e-12) and float(written["0.weight"]) == pytest.approx(1, rel=1e-2)
    assert content["output_error"] <= 1e-9 and {path.name for path in place.iterdir()} >= {"b.safetensors"}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_the_suffix_tells_the_format(place: Path, suffix: str) -> None:
    assert flatten(out=f"b{suffix}") == 0
    assert set(torch.load(f"b{suffix}", weights_only=True)) == {"0.weight", "2.weight"}


def test_what_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flatten("--config", "nowhere.toml") == 2
    assert flatten() == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    said = " ".join(printed.split())
    for needle in (
        "λ₁ before",
        "λ₁ after",
        "headroom 8.03",
        "Rescaling alone explains a factor 8.03",
        "proved",
        "verified",
    ):
        assert needle in said, needle


def test_parameters_and_buffers_of_a_model_on_dicts(place: Path) -> None:
    save_file(
        {
            "inner.2.weight": torch.tensor([[4.0]]).double(),
            "inner.0.weight": torch.tensor([[0.25]]).double(),
            "kept": torch.tensor([5]),
        },
        "a.safetensors",
    )
    assert flatten(task="task.py:dicts") == 0
    written = load_file("b.safetensors")
    assert written["kept"].tolist() == [5]
    assert float(written["inner.0.weight"]) == pytest.approx(1, rel=1e-2)


def test_a_bias_moves_about_the_mean_of_a_normalisation_which_stays(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = runpy.run_path("task.py")["normalised"]()
    state = task.make_model().state_dict()
    state["1.running_mean"].copy_(torch.tensor([0.5, -1.0, 2.0]))
    state["1.running_var"].copy_(torch.tensor([0.5, 1.5, 2.0]))
    state["0.weight"].mul_(5)
    save_file(state, "a.safetensors")
    assert flatten("--curvature", "gauss_newton", "--json", "-", task="task.py:normalised") == 0
    content = found(capsys)
    assert [row["kind"] for row in content["laws"]["couplings"]] == ["centred", "diagonal"]
    assert content["orbit"]["status"] == "CONVERGED" and content["orbit"]["headroom"] > 1.1
    written = load_file("b.safetensors")
    kept = [name for name in state if name.startswith("1.running") or name == "1.num_batches_tracked"]
    assert len(kept) == 3 and all(torch.equal(written[name], state[name]) for name in kept)
    factor = written["0.weight"] / state["0.weight"]
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-9, atol=0)
    mean = state["1.running_mean"]
    torch.testing.assert_close((written["0.bias"] - mean) / (state["0.bias"] - mean), factor[:, 0], rtol=1e-9, atol=0)
    assert float((factor - 1).abs().max()) > 0.1


def test_a_model_whose_inputs_are_not_in_the_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flatten(task="task.py:pairs") == 2
    error = capsys.readouterr().err
    assert "set Task.example_input" in error and error.count("\n") == 1
    assert not Path("b.safetensors").exists()


def test_an_l2_term_is_left_out_with_a_note(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flatten("--task-option", "decay=0.1", "--json", "-") == 0
    content = found(capsys)
    assert content["orbit"]["value"] == pytest.approx(8, rel=1e-3)
    assert any("weight_decay=0.1" in note for note in content["provenance"]["notes"])


def test_json_that_could_not_be_written_stops_it_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flatten("--json", "no/such/folder.json") == 2
    one_line(capsys, "cannot write no/such/folder.json")
    assert not Path("b.safetensors").exists()
    assert flatten("--json", "found.json") == 0 and Path("found.json").exists()


def test_nothing_is_overwritten_without_force(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.safetensors").write_text("precious")
    assert flatten() == 2
    assert "--force" in capsys.readouterr().err
    assert Path("b.safetensors").read_text() == "precious"
    assert flatten("--force") == 0
    assert set(load_file("b.safetensors")) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("out", ["b.npz", "nowhere/b.pt", "b"])
def test_outputs_that_cannot_be_written(place: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert flatten(out=out) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path(out).exists()


def test_a_network_that_computes_something_else_is_not_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[flatten_checkpoint.__module__]
    honest = module.state_with

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        state = honest(*arguments)
        state["0.weight"] *= 1 + 1e-6
        return state

    monkeypatch.setattr(module, "state_with", wrong)
    assert flatten() == 5
    assert "nothing was written" in capsys.readouterr().err
    assert not Path("b.safetensors").exists()


def test_an_interruption_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    before = sorted(path.name for path in place.iterdir())
    assert flatten() == 130
    assert sorted(path.name for path in place.iterdir()) == before


def test_the_bundled_network_is_uncertified_and_that_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("flatten", "-o", "b.safetensors", "--rows", "200", "--json", "-") == 0
    orbit = found(capsys)["orbit"]
    assert (orbit["status"], orbit["lower"], orbit["proof"]) == ("UNCERTIFIED", None, None)
    assert orbit["headroom"] > 1.05
    assert run("flatten", "-o", "c.safetensors", "--rows", "200", "--gradients", "21") == 4
    assert "BUDGET" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--rtol", "-1"), ("--gradients", "0"), ("--curvature", "sphere"), ("--rowz", "1")])
def test_wrong_flags_exit_with_2(place: Path, flags: tuple[str, str]) -> None:
    assert flatten(*flags) == 2
    assert not Path("b.safetensors").exists()
    assert run("flatten", "a.safetensors", "-o", "b.pt") == run("flatten", "--task", "task.py:task") == 2
