"""Optimizers followed along training: what is made of their curves, and runs of a small network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimizers_benchmark import TINY
from torch import Tensor

from benchmarks.cells import Cell
from benchmarks.contenders import CONTENDERS, OneGradient
from benchmarks.training import TASKS, Trainer
from experiments import optimizers_mnist
from experiments.cells import Cells
from experiments.claim import Outcome, judge
from experiments.experiment import CONFIGS, configure
from experiments.optimizers_mnist import CLAIMS, chosen, draw, followed, measure
from torchflat.errors import UsageError

torch.set_num_threads(1)
DECLARED = {claim.number: claim.declared() for claim in CLAIMS}


def made_up() -> dict[str, Any]:
    """Curves as they are declared: SGD and NormalizedGD keep the law, SAM ends flattest."""
    ends = {"sgd": (2.0, 1.2), "adam": (3.0, 3.2), "sam": (2.5, 0.6), "ngd": (1.8, 2.9), "ngd-cooldown": (1.7, 1.6)}
    runs = [
        {
            "contender": name,
            "seed": seed,
            "gradients": [0, 10],
            "losses": [2.0, 0.1],
            "balance": [1.0, drift],
            "drift": [0.0, drift],
            "unexplained": [] if name == "adam" else [0.0, 50.0 if name == "sam" else 0.2],
            "sharpness": [1.0, sharp + 0.1 * seed],
            "metric": 3.0,
        }
        for seed in (0, 1)
        for name, (drift, sharp) in ends.items()
    ]
    return {"loss": "nats", "metric": "%", "every": 10, "runs": runs}


def outcomes(data: dict[str, Any]) -> dict[str, Outcome]:
    return {verdict.claim.number: verdict.outcome for verdict in judge(CLAIMS, measure(data))}


def swapped(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def edit(run: dict[str, Any]) -> None:
        run["contender"] = {one: other, other: one}.get(run["contender"], run["contender"])

    return edit


def one_seed_breaks_the_law(run: dict[str, Any]) -> None:
    if (run["contender"], run["seed"]) == ("ngd-cooldown", 1):
        run["unexplained"][1] = 1.5


def balances(run: dict[str, Any]) -> None:
    run["balance"].reverse()


@pytest.mark.parametrize(
    ("edit", "flipped"),
    [
        (lambda run: None, set()),
        (one_seed_breaks_the_law, {"plain"}),
        (balances, {"balance"}),
        (swapped("sgd", "sam"), {"plain", "sam", "sam_flatter"}),
        (swapped("ngd", "sam"), {"plain", "sam", "flattest", "sam_flatter"}),
    ],
)
def test_curves_are_judged(edit: Callable[[dict[str, Any]], None], flipped: set[str]) -> None:
    data = made_up()
    for each in data["runs"]:
        edit(each)
    found = outcomes(data)
    assert {number for number in DECLARED if found[number] is not DECLARED[number]} == flipped


def test_swapping_sgd_and_adam_flips_their_drift() -> None:
    data = made_up()
    for each in data["runs"]:
        swapped("sgd", "adam")(each)
        each["unexplained"] = [0.0]  # Adam has no account
    assert outcomes(data)["adam"] is Outcome.NOT_REPRODUCED


def test_the_figure_has_a_line_for_each_optimizer() -> None:
    (figure,) = draw(made_up()).values()
    assert [len(axes.lines) for axes in figure.axes] == [5, 5, 5]
    assert "NormalizedGD, cool-down: 3" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "tiny", TINY)


def follow(contender: str, scratch: Path, **setting: float) -> dict[str, Any]:
    key = {"network": "tiny", "contender": contender, "setting": setting, "seed": 0}
    return followed({**key, "rows": 40, "epochs": 6, "every": 4, "sharpness_rows": 20}, scratch)


@pytest.mark.parametrize("contender", ["sgd", "ngd", "ngd-cooldown"])
def test_steps_along_the_gradient_keep_the_law(contender: str, tiny: None, tmp_path: Path) -> None:
    found = follow(contender, tmp_path, lr=0.05)
    assert found["gradients"] == list(range(0, 30, 4)) and len(found["losses"]) == 8
    assert {len(found[name]) for name in ("balance", "drift", "unexplained", "sharpness")} == {8}
    assert found["metric"] < follow(contender, tmp_path, lr=0.0)["metric"]
    assert all(value > 0 for value in found["sharpness"])
    assert max(found["unexplained"]) <= 1 and found["drift"][0] == 0 < found["drift"][-1]


def test_what_is_followed_is_what_the_benchmark_trains(tiny: None, tmp_path: Path) -> None:
    task = dataclasses.replace(TINY, epochs=6)
    cell = Cell("tiny", TINY.rows, "ngd", {"lr": 0.05, "seed": 0})
    trained = Trainer({"tiny": task}, tmp_path)(cell, None)
    assert follow("ngd", tmp_path, lr=0.05)["metric"] == trained["test"]


def test_weight_decay_breaks_the_law(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decayed(parameters: Any, setting: Any, steps: int) -> OneGradient:
        weights = list(parameters)

        class Decayed(OneGradient):
            def step(self, loss: Callable[[], Tensor]) -> float:
                return super().step(lambda: loss() + 0.1 * weights[0].square().sum())

        return Decayed(torch.optim.SGD(weights, setting["lr"]))

    monkeypatch.setitem(CONTENDERS, "sgd", dataclasses.replace(CONTENDERS["sgd"], make=decayed))
    assert max(follow("sgd", tmp_path, lr=0.05)["unexplained"]) > 1


def test_sam_breaks_the_law_and_is_sgd_at_radius_0(tiny: None, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    flat, plain = follow("sam", tmp_path, lr=0.05, rho=0.0), follow("sgd", tmp_path, lr=0.05)
    assert flat["balance"] == pytest.approx(plain["balance"], rel=1e-5) and max(flat["unexplained"]) <= 1
    assert flat["gradients"] == [2 * each for each in plain["gradients"]]
    assert max(follow("sam", tmp_path, lr=0.05, rho=0.2)["unexplained"]) > 1


def test_settings_are_those_that_the_benchmark_chose() -> None:
    config = configure(optimizers_mnist, CONFIGS / "optimizers_mnist.toml", quick=False)
    assert all(set(chosen(config.network, name)) >= {"lr"} for name in config.contenders)
    with pytest.raises(UsageError, match=r"has no setting of sgd on tinny: run python -m benchmarks.optimizers"):
        chosen("tinny", "sgd")


def test_a_missing_sam_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers_mnist, "installed", lambda name: name != "sam")
    config = configure(optimizers_mnist, CONFIGS / "optimizers_mnist.toml", quick=True)
    with pytest.raises(UsageError, match=r"SAM is not installed: pip install pytorch-optimizer"):
        optimizers_mnist.run(config, Cells(tmp_path))
