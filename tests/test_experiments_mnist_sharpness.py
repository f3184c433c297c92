"""Sharpness over depth and step: what is made of the tiles, and a run on small random images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import denoiser, mnist_sharpness
from experiments.cells import Cells
from experiments.claim import Outcome, judge
from experiments.mnist_sharpness import CLAIMS, Config, draw, measure, run, stable, trained
from experiments.mnist_sharpness import tiles as tiles_of
from torchflat.errors import UsageError

torch.set_num_threads(1)

DEPTHS, STEPS, BLIND = (2, 4, 8, 16), [2.25 * 2 ** (k / 2) for k in range(-8, 11)], 0.1


def tile(start: str, depth: int, step: float, largest: float, sharper: float = 1.0) -> dict[str, Any]:
    """A network as theory has it: it stays up to the largest step, dies beyond, and diverges far beyond."""
    flattest = sharper * 2 / largest
    loss, top = (0.05, flattest * (1 + (largest / step - 1) / 10)) if step <= largest * 1.001 else (0.0999, 1e-3)
    if step > 3 * largest:
        return {
            "start": start,
            "depth": depth,
            "step": step,
            "seed": 0,
            "losses": [None],
            "loss": None,
            "sharpness": None,
        }
    if 1.001 * largest < step < 1.5 * largest:
        top = 2.5 / step
    record = {"losses": [2 * loss, loss], "loss": loss, "sharpness": top}
    return {"start": start, "depth": depth, "step": step, "seed": 0, **record}


def tiles(exponent: float = 1.0, he: float = 4.0) -> dict[str, Any]:
    """Networks whose largest stable step is 36/m^exponent from the identity, and 2.25/he at 16 layers from He's."""
    found = [tile("identity", m, step, 2.25 * (16 / m) ** exponent) for m in DEPTHS for step in STEPS]
    found += [tile("he", m, step, 2.25 / he * (16 / m) ** exponent) for m in DEPTHS for step in STEPS]
    return {"blind": BLIND, "curve_step": 2.25, "tiles": found}


def outcomes(data: dict[str, Any]) -> dict[str, Outcome]:
    return {verdict.claim.number: verdict.outcome for verdict in judge(CLAIMS, measure(data))}


DECLARED = {claim.number: claim.declared() for claim in CLAIMS}


def test_networks_as_theory_has_them_come_out_as_declared() -> None:
    numbers = measure(tiles())
    assert numbers["largest_step"] == pytest.approx(-1, abs=1e-9)
    assert numbers["he_steps"] == pytest.approx(0.25) and numbers["he_sharper"] == pytest.approx(4)
    assert numbers["curve_identity"] == pytest.approx(0.5) and numbers["curve_he"] == pytest.approx(2.25 / 4)
    assert outcomes(tiles()) == DECLARED


@pytest.mark.parametrize(
    ("change", "flipped"),
    [
        ({"exponent": 0.4}, {"largest_step"}),
        ({"exponent": 1.6}, {"largest_step"}),
        ({"he": 0.5}, {"he_steps", "he_sharper", "curve_he"}),
    ],
)
def test_other_networks_flip_the_verdicts(change: dict[str, float], flipped: set[str]) -> None:
    found = outcomes(tiles(**change))
    assert {number for number in DECLARED if found[number] is not DECLARED[number]} - {"linear"} == flipped


def test_starts_that_are_swapped_flip_the_verdicts() -> None:
    data = tiles()
    for each in data["tiles"]:
        each["start"] = {"he": "identity", "identity": "he"}[each["start"]]
    found = outcomes(data)
    assert {number for number in DECLARED if found[number] is not DECLARED[number]} == {
        "he_steps", "he_sharper", "curve_identity", "curve_he",
    }  # fmt: skip


def test_a_crooked_line_is_seen() -> None:
    data = tiles()
    for each in data["tiles"]:
        if each["sharpness"] and each["depth"] in (2, 16) and each["start"] == "identity":
            each["sharpness"] /= 8
    assert outcomes(data)["linear"] is Outcome.NOT_REPRODUCED


def test_steps_beyond_the_first_that_does_not_stay_are_not_stable() -> None:
    data = tiles()
    found = stable(data, "identity")
    assert {depth: max(row) for depth, row in found.items()} == {m: pytest.approx(36 / m) for m in DEPTHS}
    beyond = [each for each in data["tiles"] if each["depth"] == 8 and each["step"] > 9.1]
    beyond[0].update(loss=0.02, sharpness=1e-3)  # trains, flat, after one that did not stay
    assert max(stable(data, "identity")[8]) == pytest.approx(4.5)


def test_one_seed_that_diverges_is_enough() -> None:
    data = tiles()
    lost = {**next(each for each in data["tiles"] if (each["start"], each["depth"]) == ("identity", 8)), "seed": 1}
    lost.update(loss=None, sharpness=None, step=STEPS[5])
    data["tiles"].append(lost)
    assert max(stable(data, "identity")[8]) == pytest.approx(STEPS[4])


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(split: str, rows: int, side: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(5)
        clean = torch.rand(rows, 1, generator=source) * torch.rand(side**2, generator=source)
        return clean + 0.5 * torch.randn(rows, side**2, generator=source), clean

    monkeypatch.setattr(denoiser, "noisy", noisy)


CONFIG = Config(
    depths=(1, 2, 3), identity=(0.5, 2.25, 1e4), he=(0.5, 2.25, 1e4), curve_step=2.25, side=4, rows=60, epochs=4,
    batch=10, sharpness_rows=30, sharpness_rtol=0.01, seeds=(0,),
)  # fmt: skip


def test_a_run_trains_measures_and_draws(small_images: None, tmp_path: Path) -> None:
    data = run(CONFIG, Cells(tmp_path))
    assert len(data["tiles"]) == 18 and len(list(tmp_path.glob("*.json"))) == 18
    diverged = [each for each in data["tiles"] if each["step"] == 1e4 and each["depth"] == 1]
    assert all(each["loss"] is None and each["losses"][-1] is None and each["sharpness"] is None for each in diverged)
    assert not any(tile.trains for rows in tiles_of(data, "he").values() for tile in rows if tile.step == 1e4)
    trained = [each for each in data["tiles"] if each["step"] == 0.5 and each["start"] == "identity"]
    assert all(each["losses"][-1] < each["losses"][0] and each["status"] == "CONVERGED" for each in trained)
    # One layer is a regression, whatever its weights: λ₁ = 2/side² times the largest eigenvalue of the mean of xxᵀ.
    inputs = denoiser.noisy("train", 60, 4)[0][:30].double()
    linear = 2 / 16 * float(torch.linalg.eigvalsh(inputs.T @ inputs / 30)[-1])
    assert trained[0]["depth"] == 1 and trained[0]["sharpness"] == pytest.approx(linear, rel=0.011)
    assert set(draw(data)) == {"mnist_sharpness_4", "mnist_sharpness_5"}
    assert all(isinstance(number, float) and not math.isnan(number) for number in measure(data).values())
    assert run(CONFIG, Cells(tmp_path)) == data


def test_a_loss_that_is_a_number_beyond_which_nothing_is_has_diverged(
    small_images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(network: nn.Module, *rest: Any) -> denoiser.Curve:
        with torch.no_grad():
            network[0].weight.fill_(3e18)
        return [{"loss": 3.0}]

    monkeypatch.setattr(denoiser, "train", grown)
    key = {"start": "identity", "depth": 2, "step": 0.5, "seed": 0, "sharpness_rtol": 0.01, "sharpness_rows": 30}
    found = trained({**key, "side": 4, "rows": 60, "epochs": 1, "batch": 10}, tmp_path)
    assert found == {"losses": [3.0], "loss": None, "sharpness": None, "status": None}


def test_the_step_of_the_curves_must_be_in_the_grids(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"curve_step = 3.5 is not in both grids"):
        mnist_sharpness.run(Config(**{**vars(CONFIG), "curve_step": 3.5}), Cells(tmp_path))
