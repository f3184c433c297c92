"""The logic of ``benchmarks.optimizers``: who runs what, which setting is chosen, and what a run and its end tell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import training
from benchmarks.cells import Cell, Cells
from benchmarks.contenders import CONTENDERS
from benchmarks.endings import Endings, ratio, report, spread
from benchmarks.optimizers import Contest
from benchmarks.training import TASKS, Task, Trainer, imbalance, squares
from torchflat.symmetry import laws

# Held-out metrics by learning rate; None where it diverges.
HELD_OUT = {"sgd": {0.1: 3.0, 0.3: 2.0, 1.0: None}, "ngd": {1.0: 4.0}, "adam": {3e-3: 1.0}, "ngd-cooldown": {3.0: 0.5}}
KNOWN = {
    "versions": {"torch": "0"},
    "kernels": "reference",
    "processor": "none",
    "default_threads": 1,
    "date": "2000-01-01",
}


class Fake:
    """A trainer whose runs end where HELD_OUT says, 9 where it says nothing, and λ₁ at 10 plus the seed."""

    def __init__(self) -> None:
        self.calls: list[Cell] = []

    def __call__(self, cell: Cell, limit: float | None) -> dict[str, Any]:
        self.calls.append(cell)
        setting = cell.setting
        if setting.get("measure") == "steps":
            milliseconds = {name: 2.0 if name == "sam" else 1.0 for name in TASKS[cell.network].grids}
            return {"status": "finished", "value": None, "milliseconds": milliseconds, "ratios": milliseconds, **KNOWN}
        if setting.get("measure") == "curvature":
            top = (10.0 if cell.method == "ngd" else 20.0) + setting["seed"]
            orbit = {"rows": 7, "before": 12.0, "value": 4.0, "lower": None, "upper": 4.1}
            found = {"status": "CONVERGED", "value": top, "lower": top * 0.99, "upper": top * 1.01, "orbit": orbit}
            return {**found, "imbalance": 0.5, "norm": 3.0, **KNOWN}
        metric = HELD_OUT.get(cell.method, {}).get(setting["lr"], 9.0)
        if metric is None:
            return {"status": "diverged", "value": None, "losses": [], **KNOWN}
        more = {"test": metric + setting["seed"], "train_loss": 0.25, "losses": [2.0, 1.0], "seconds": 1.5}
        return {"status": "finished", "value": metric, "gradients": 100, **more, **KNOWN}


def contested(folder: Path, fake: Fake, contenders: tuple[str, ...] = tuple(CONTENDERS), seeds: int = 3) -> Cells:
    cells = Cells(folder, fake)
    contest = Contest(cells, TASKS["digits"], contenders, seeds)
    contest.train()
    contest.time_steps()
    contest.measure_ends(tuned=True)
    contest.measure_ends(tuned=False)
    return cells


def test_settings_are_tried_with_seed_0_and_the_best_runs_with_all(tmp_path: Path) -> None:
    fake = Fake()
    endings = Endings(contested(tmp_path, fake).all())
    own = [call.setting for call in fake.calls if call.method == "sgd" and "measure" not in call.setting]
    assert [each["lr"] for each in own if each["seed"] == 0] == [0.1, 0.3, 1.0]
    assert [each for each in own if each["seed"]] == [{"lr": 0.3, "seed": 1}, {"lr": 0.3, "seed": 2}]
    assert [run["setting"]["seed"] for run in endings.runs("digits", "sgd")] == [0, 1, 2]
    assert [end["value"] for end in endings.ends("digits", "ngd")] == [10, 11, 12]
    assert endings.chosen("digits", "ngd-cooldown") == {"lr": 3.0}


def test_some_take_the_setting_of_others_and_have_no_grid(tmp_path: Path) -> None:
    fake = Fake()
    endings = Endings(contested(tmp_path, fake).all())
    for name, source in (("sgd-cooldown", "sgd"), ("sam-half", "sam")):
        tried = [call.setting for call in fake.calls if call.method == name and "measure" not in call.setting]
        chosen = endings.chosen("digits", source)
        assert tried == [{**chosen, "seed": seed} for seed in range(3)]


def test_what_is_on_file_is_not_trained_again(tmp_path: Path) -> None:
    first, again = Fake(), Fake()
    contested(tmp_path, first)
    assert len({call.name for call in first.calls}) == len(first.calls) == len(list(tmp_path.glob("*.json")))
    contested(tmp_path, again)
    assert not again.calls
    next(tmp_path.glob("*-adam-*seed=2.json")).unlink()
    contested(tmp_path, again)
    assert [(call.method, call.setting["seed"]) for call in again.calls] == [("adam", 2)]


def test_who_always_diverges_is_not_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HELD_OUT, "adam", dict.fromkeys((1e-3, 3e-3, 1e-2, 3e-2)))
    endings = Endings(contested(tmp_path, Fake()).all())
    assert endings.chosen("digits", "adam") is None and not endings.runs("digits", "adam")
    text = report(endings.records, tmp_path / "out" / "optimizers.json")
    assert "| Adam | lr 0.001 (lost seed 0); lr 0.003 (lost seed 0); lr 0.01 (lost seed 0); lr 0.03" in text
    assert "| digits | NormalizedGD / Adam |  |  |  |  | 1.00 | time of a step |" in text


class Unstable(Fake):
    """Loses seed 2 with SGD at 0.3, the best for seed 0: it diverges, or always answers the same."""

    def __init__(self, contender: str, train_loss: float | None) -> None:
        super().__init__()
        self.contender, self.train_loss = contender, train_loss

    def __call__(self, cell: Cell, limit: float | None) -> dict[str, Any]:
        found = super().__call__(cell, limit)
        if (cell.method, cell.setting.get("lr"), cell.setting.get("seed")) != (self.contender, 0.3, 2):
            return found
        return (
            {**found, "train_loss": self.train_loss}
            if self.train_loss
            else {**found, "status": "diverged", "value": None}
        )


@pytest.mark.parametrize("train_loss", [None, 2.3])
def test_a_setting_that_loses_a_seed_gives_way_to_the_next(tmp_path: Path, train_loss: float | None) -> None:
    fake = Unstable("sgd", train_loss)
    endings = Endings(contested(tmp_path / "cells", fake).all())
    assert endings.chosen("digits", "sgd") == {"lr": 0.1}
    assert [run["setting"] for run in endings.runs("digits", "sgd")] == [{"lr": 0.1, "seed": seed} for seed in range(3)]
    assert {end["setting"]["lr"] for end in endings.ends("digits", "sgd")} == {0.1}
    assert {call.setting["lr"] for call in fake.calls if call.method == "sgd" and "measure" in call.setting} == {0.1}
    text = report(endings.records, tmp_path / "optimizers.json")
    assert "| SGD | **lr 0.1: 3**; lr 0.3: 2 (lost seed 2); lr 1 (lost seed 0) |" in text


def test_who_borrows_a_setting_keeps_it_and_tells_what_it_loses(tmp_path: Path) -> None:
    fake = Unstable("sgd-cooldown", None)
    endings = Endings(contested(tmp_path / "cells", fake).all())
    assert [run["setting"]["seed"] for run in endings.runs("digits", "sgd-cooldown")] == [0, 1]
    assert [end["setting"]["seed"] for end in endings.ends("digits", "sgd-cooldown")] == [0, 1]
    text = report(endings.records, tmp_path / "optimizers.json")
    assert "| SGD, cool-down (lost seed 2) | lr 0.3 | 100 | 0.25 ± 0 | 9.5 ± 0.7 | 20.5 ± 0.7 |" in text


def test_the_report_has_table_verdicts_and_figure(tmp_path: Path) -> None:
    records = contested(tmp_path / "cells", Fake()).all()
    file = tmp_path / "out" / "optimizers.json"
    text = report(records, file)
    assert file.with_suffix(".md").read_text() == text + "\n"
    assert file.with_suffix(".png").stat().st_size > 0 and file.with_suffix(".svg").exists()
    assert json.loads(file.read_text()) == records
    assert "| NormalizedGD | lr 1 | 100 | 0.25 ± 0 | 5 ± 1 | 11 ± 1 | 2.0 % | 4 ± 0 | 3 ± 0 |" in text
    good = "λ₁, λ₁★, train loss, time of a step"
    assert f"| digits | NormalizedGD / SGD | 0.52 | 1.00 | 1.00 | 1.67 | 1.00 | {good} |" in text
    assert "| digits | NormalizedGD / SAM | 0.52 | 1.00 | 1.00 | 0.50 | 0.50 |" in text
    assert "lr 0.1: 3; **lr 0.3: 2**; lr 1 (lost seed 0)" in text


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    assert report([], tmp_path / "optimizers.json") == "nothing measured"
    assert not list(tmp_path.iterdir())


def test_spread_and_ratio() -> None:
    records = [{"value": each} for each in (1.0, 2.0, 6.0)]
    assert spread(records, lambda each: each["value"]) == "3 ± 3"
    assert spread(records[:1], lambda each: each["value"]) == "1"
    assert spread([], lambda each: each["value"]) == ""
    assert ratio([1.0, 2.0, 6.0], [4.0]) == 0.5
    assert ratio([1.0], []) is None


# Real runs, of a network with a dozen weights -------------------------------------------------------------------------


def rows(split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0 if split == "train" else 1))[:stop]
    return inputs[start:], inputs[start:].relu().sum(1, keepdim=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))


TINY = Task(
    name="tiny",
    build=network,
    data=rows,
    loss=nn.MSELoss(),
    loss_name="squared error",
    metric=squares,
    metric_name="squared error",
    blind_loss=100.0,
    rows=40,
    held_out=20,
    test_rows=20,
    epochs=4,
    batch=8,
    rtol=1e-2,
    orbit_rows=30,
    grids={"sgd": ({"lr": 0.1},), "ngd": ({"lr": 0.1},), "ngd-cooldown": ({"lr": 0.1},)},
)


def run(folder: Path, contender: str, seed: int = 0, **setting: Any) -> dict[str, Any]:
    return dict(Trainer({"tiny": TINY}, folder)(Cell("tiny", TINY.rows, contender, {**setting, "seed": seed}), None))


def test_a_run_tells_loss_and_metrics_at_its_end_and_can_be_repeated(tmp_path: Path) -> None:
    found = run(tmp_path / "a", "ngd", lr=0.1)
    assert (found["status"], found["steps"], found["gradients"], len(found["losses"])) == ("finished", 20, 20, 4)
    assert found["losses"][-1] < found["losses"][0]
    model = network()
    model.load_state_dict(torch.load(tmp_path / "a" / "tiny-40-ngd-lr=0.1-seed=0.pt", weights_only=True))
    for name, part in (("train_loss", TINY.training), ("value", TINY.unseen), ("test", TINY.test)):
        assert found[name] == pytest.approx(float(TINY.loss(model(part[0]), part[1]).detach()), rel=1e-5)
    again = run(tmp_path / "b", "ngd", lr=0.1)
    assert [again[name] for name in ("losses", "value", "test")] == [
        found[name] for name in ("losses", "value", "test")
    ]
    assert run(tmp_path / "b", "ngd", seed=1, lr=0.1)["losses"] != found["losses"]


def test_all_start_from_the_same_weights_with_the_same_batches(tmp_path: Path) -> None:
    losses = [run(tmp_path, name, lr=0.0)["losses"] for name in ("sgd", "adam", "ngd", "ngd-cooldown", "sgd-cooldown")]
    assert all(each == losses[0] for each in losses)


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    found = run(tmp_path, "sgd", lr=1e6)
    assert (found["status"], found["value"]) == ("diverged", None)
    assert not list(tmp_path.glob("*.pt"))


def test_a_cool_down_ends_at_rate_0() -> None:
    model = network()
    for name in ("sgd-cooldown", "ngd-cooldown"):
        loop = CONTENDERS[name].make(model.parameters(), {"lr": 0.1}, 8)
        rates = []
        for _ in range(8):
            rates.append(loop.optimizer.param_groups[0]["lr"])
            loop.step(lambda: TINY.loss(model(TINY.training[0]), TINY.training[1]))
        assert rates[0] == 0.1 and rates[6] > rates[7] > 0
        assert loop.optimizer.param_groups[0]["lr"] == 0


def test_sam_takes_two_gradients_and_is_sgd_at_radius_0(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    flat, plain = run(tmp_path, "sam", lr=0.1, rho=0.0), run(tmp_path, "sgd", lr=0.1)
    assert flat["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert (flat["gradients"], plain["gradients"]) == (40, 20)
    half = run(tmp_path, "sam-half", lr=0.1, rho=0.0)
    assert half["gradients"] == 20 and half["losses"] == pytest.approx(flat["losses"][:2], rel=1e-5)
    assert run(tmp_path, "sam", lr=0.1, rho=0.5)["losses"] != pytest.approx(plain["losses"], rel=1e-3)


def test_the_curvature_is_that_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    trained = run(tmp_path, "ngd", lr=0.1)
    found = run(tmp_path, "ngd", lr=0.1, measure="curvature")
    model = network()
    kept = tmp_path / "tiny-40-ngd-lr=0.1-seed=0.pt"
    model.load_state_dict(torch.load(kept, weights_only=True))

    def f(x: Tensor) -> Tensor:
        first, last = x[:9].view(3, 3), x[9:].view(1, 3)
        loss: Tensor = TINY.loss((TINY.training[0] @ first.T).relu() @ last.T, TINY.training[1])
        return loss

    x = torch.cat([p.detach().flatten() for p in model.parameters()])
    top = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(f, x))[-1])
    assert found["lower"] <= top * (1 + 1e-5) and top <= found["upper"] * (1 + 1e-5)
    assert float(f(x)) == pytest.approx(trained["train_loss"], rel=1e-5)
    assert 0 < found["orbit"]["value"] <= found["orbit"]["before"] * 1.02
    assert found["norm"] == pytest.approx(float(x.norm()))
    kept.unlink()  # it is trained once more, to the same end
    assert run(tmp_path, "ngd", lr=0.1, measure="curvature")["value"] == found["value"]


def test_imbalance_goes_from_balanced_to_one_sided() -> None:
    model = network()
    found = laws(model, torch.zeros(1, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3) * torch.tensor([1.0, 2.0, 3.0]))
        model[2].weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
    assert imbalance(found, model) == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        model[2].weight.zero_()
    assert imbalance(found, model) == pytest.approx(1)
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[2.0, 2.0, 2.0]]))
    assert imbalance(found, model) == pytest.approx((3 + 0 + 5) / (14 + 12))


def test_steps_are_timed_in_turn_and_told_in_those_of_sgd(tmp_path: Path) -> None:
    found = Trainer({"tiny": TINY}, tmp_path)(Cell("tiny", 40, "all", {"measure": "steps"}), None)
    assert found["ratios"]["sgd"] == 1
    assert set(found["ratios"]) == set(found["milliseconds"]) == set(TINY.grids)
    assert all(each > 0 for each in found["milliseconds"].values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_noise_has_nothing_to_do_with_the_first_weights(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "mnist", lambda split, rows: (torch.zeros(rows, 784), None))
    noise, _ = TASKS["denoiser"].data(split, 0, 2000)
    for seed in range(3):
        torch.manual_seed(seed)
        for weight in TASKS["denoiser"].build().parameters():
            cosines = nn.functional.normalize(weight.detach(), dim=1) @ nn.functional.normalize(noise, dim=1).T
            assert cosines.abs().max() < 0.3


def test_every_contender_is_tuned_on_every_task() -> None:
    for task in TASKS.values():
        tuned = {name for name, contender in CONTENDERS.items() if contender.tuned_as is None}
        assert tuned == set(task.grids)
    assert TINY.steps(dataclasses.replace(CONTENDERS["sgd"], epochs=0.5)) == 10
