"""Figures 6 and 7: what is told of known networks, and one tiny run of both experiments."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import denoiser, minima, mnist_gains, mnist_sections
from experiments.cells import Cells
from experiments.claim import Unreached, judge
from experiments.experiment import CONFIGS, configure
from torchflat import sharpness

torch.set_num_threads(1)

RECIPE = minima.Recipe("adam", 0, layers=3, side=4, rows=200, epochs=2, batch=50)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Smooth images instead of MNIST."""
    images = torch.rand(300, 4, 4, generator=torch.Generator().manual_seed(3))
    images = torch.nn.functional.interpolate(images[:, None], (28, 28), mode="bilinear").flatten(1)
    monkeypatch.setattr(denoiser, "mnist", lambda split, rows: (images[:rows], None))
    denoiser.noisy.cache_clear()
    yield
    denoiser.noisy.cache_clear()


def outcomes(experiment: Any, data: dict[str, Any]) -> dict[str, bool]:
    return {v.claim.number: v.as_declared for v in judge(experiment.CLAIMS, experiment.measure(data))}


# Figure 6 and Table S1 ------------------------------------------------------------------------------------------------


def network(optimizer: str, seed: int, sharp: float, flat: float, gain: float) -> dict[str, Any]:
    loss = {"sgd": 0.05, "adam": 0.045}[optimizer]
    return {
        "optimizer": optimizer,
        "seed": seed,
        "training": {
            "curve": [{"loss": loss * 4 / (k + 1), "test": loss * 4 / (k + 1)} for k in range(4)],
            "train": loss,
            "test": loss,
        },
        "sharpness": {"value": sharp, "lower": sharp, "upper": sharp, "status": "CONVERGED"},
        "orbit": {"before": sharp, "value": flat, "upper": flat, "lower": None, "status": "UNCERTIFIED"},
        "gauss_newton": {"before": sharp, "value": flat, "upper": flat, "lower": 0.98 * flat, "status": "CONVERGED"},
        "gains": {
            "before": {"largest": [gain, gain, 1.0], "of_output": [1.0, 1.0, 1.0]},
            "after": {"largest": [1.0, 1.5, 1.0], "of_output": [1.0, 1.0, 1.0]},
        },
    }


@pytest.fixture
def expected() -> dict[str, Any]:
    """Adam's networks are sharper by e², and at the flattest rescalings by e^½: three quarters of it is scaling."""
    e = math.e
    rows = [
        network(*each)
        for seed in (0, 1)
        for each in (("sgd", seed, 2.0, 0.5, 2.5), ("adam", seed, 2.0 * e**2, 0.5 * e**0.5, 4.0))
    ]
    return {"layers": 3, "epochs": 4, "networks": rows}


def test_numbers_of_known_networks(expected: dict[str, Any]) -> None:
    assert all(outcomes(mnist_gains, expected).values())
    found = mnist_gains.measure(expected)
    numbers = {name: value for name, value in found.items() if not isinstance(value, Unreached)}
    assert numbers == pytest.approx(
        {
            "stable": 0.5,
            "sharper": math.e**2,
            "rescaled": 0.25 * math.e**0.5,
            "scaling": 0.75,
            "still_sharper": math.e**0.5,
            "certified": 0.02,
            "bound": 1.5 / math.sqrt(3),
            "larger_gains": 1.6,
            "shrunk": 1.5 / 4,
            "output": 0,
        }
    )
    # Losses that fall like 1/epoch: 0.05 at epoch 4 is 0.0269 at 7.4.
    assert str(found["sgd_loss"]) == "not reached in 4 epochs: 0.05 (extrapolated: 7 epochs)"


def test_swapped_networks_flip_the_verdicts(expected: dict[str, Any]) -> None:
    for row in expected["networks"]:
        row["optimizer"] = {"sgd": "adam", "adam": "sgd"}[row["optimizer"]]
    wrong = {name for name, right in outcomes(mnist_gains, expected).items() if not right}
    assert wrong == {"stable", "sharper", "still_sharper", "larger_gains", "scaling"}
    assert "in 4 epochs: no excess, Adam's is 0.14 of SGD's" in str(mnist_gains.measure(expected)["scaling"])


@pytest.mark.parametrize(
    ("number", "change"),
    [
        ("scaling", lambda row: row["orbit"].update(value=row["orbit"]["before"] / 4)),
        ("rescaled", lambda row: row["orbit"].update(value=row["orbit"]["before"])),
        ("certified", lambda row: row["gauss_newton"].update(lower=None)),
        ("certified", lambda row: row["gauss_newton"].update(lower=0.9 * row["gauss_newton"]["upper"])),
        ("bound", lambda row: row["gains"]["after"]["largest"].__setitem__(1, 2.0)),
        ("output", lambda row: row["gains"]["after"]["largest"].__setitem__(2, 1.1)),
        ("shrunk", lambda row: row["gains"]["after"]["largest"].__setitem__(0, 5.0)),
        ("sgd_loss", lambda row: row["training"].update(train=0.0269)),
        ("adam_sharpness", lambda row: row["training"].update(train=0.0274)),
    ],
)
def test_each_number_is_measured(expected: dict[str, Any], number: str, change: Any) -> None:
    for row in expected["networks"]:
        change(row)
    assert not outcomes(mnist_gains, expected)[number]


def test_a_loss_that_does_not_fall_is_never_there() -> None:
    assert minima.reached_at([0.1, 0.1, 0.1, 0.1], 0.05) == math.inf
    assert minima.reached_at([0.1, 0.1, 0.1, 0.2], 0.05) == math.inf
    assert minima.reached_at([1.0], 0.5) == math.inf


# Figure 7 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sections() -> dict[str, Any]:
    """Sections where nothing deceives: parabolas whose curvatures are in the order of λ₁."""
    curvature = {"sgd": 2.0, "adam": 6.0}
    t = [i / mnist_sections.SECTION for i in range(-mnist_sections.SECTION, mnist_sections.SECTION + 1)]
    networks = [
        {
            "optimizer": name,
            "seed": 0,
            "losses": [0.4, 0.2, 0.1, 0.05],
            "sharpness": value,
            "section": [0.05 + value * s**2 / 2 for s in t],
        }
        for name, value in curvature.items()
    ]
    losses = [min(2 * p**2, 6 * (1 - p) ** 2) for p in mnist_sections.PLACES]
    verdict = {"reason": "", "radii": [0.1]}
    pair = {
        "sgd": 0,
        "adam": 0,
        "losses": losses,
        "distance": 1.0,
        "as_trained": {"verdict": "FLATTER", "profiles": [[1.0], [math.e**2]], **verdict},
        "rescaled": {"verdict": "UNDECIDED", "profiles": [[1.0], [math.e**0.5]], **verdict},
    }
    return {"epochs": 4, "reach": 1.0, "networks": networks, "pairs": [pair]}


def test_sections_of_known_networks(sections: dict[str, Any]) -> None:
    assert all(outcomes(mnist_sections, sections).values())
    found = mnist_sections.measure(sections)
    assert found["scaling"] == pytest.approx(0.75) and found["sharpest"] == found["compare"] == 1
    assert "0 of 1 pairs deceive" in str(found["deceived"])
    assert mnist_sections.looks(sections["pairs"][0]) == pytest.approx((0.02, 0.06))


def test_a_deceptive_picture_is_seen(sections: dict[str, Any]) -> None:
    sections["pairs"][0]["losses"].reverse()
    assert "1 of 1 pairs deceive" in str(mnist_sections.measure(sections)["deceived"])
    for row in sections["networks"]:
        row["section"] = [loss - 0.03 for loss in row["section"]]
    # Where the losses are those of the paper it counts.
    assert mnist_sections.measure(sections)["deceived"] == 1


def test_swapped_sharpness_flips_the_verdicts(sections: dict[str, Any]) -> None:
    first, second = sections["networks"]
    first["sharpness"], second["sharpness"] = second["sharpness"], first["sharpness"]
    assert {name for name, right in outcomes(mnist_sections, sections).items() if not right} == {"sharpest", "compare"}


def test_no_share_of_an_excess_that_is_not_there(sections: dict[str, Any]) -> None:
    sections["pairs"][0]["as_trained"]["profiles"].reverse()
    assert "in 4 epochs: no excess, Adam's is 0.14 of SGD's" in str(mnist_sections.measure(sections)["scaling"])


# Both, tiny -----------------------------------------------------------------------------------------------------------


def test_an_orbit_is_kept_with_the_network(tmp_path: Path, digits: None) -> None:
    flat, record = minima.flattest_of(RECIPE, minima.Orbit(100, 0.05, 100.0), tmp_path, tmp_path)
    as_trained, _ = minima.trained(RECIPE, tmp_path, tmp_path)
    inputs, _ = denoiser.noisy("train", 200, 4)
    with torch.no_grad():
        torch.testing.assert_close(flat(inputs), as_trained(inputs), rtol=1e-4, atol=1e-5)
    assert sharpness(minima.objective(flat, RECIPE, 100)).value == pytest.approx(record["value"], rel=1e-2)
    assert record["value"] < 0.9 * record["before"]
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(stamps) == 2
    again, same = minima.flattest_of(RECIPE, minima.Orbit(100, 0.05, 100.0), tmp_path, tmp_path)
    assert same == record and stamps == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert all(torch.equal(a, b) for a, b in zip(flat.parameters(), again.parameters(), strict=True))
    assert RECIPE.file(tmp_path) != dataclasses.replace(RECIPE, epochs=3).file(tmp_path)


def test_both_experiments_end_to_end(tmp_path: Path, digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"layers": 3, "side": 4, "rows": 200, "epochs": 3, "seeds": (0,), "orbit_rows": 100}
    gains = dataclasses.replace(
        configure(mnist_gains, CONFIGS / "mnist_gains.toml", True), **small, curvature_rows=100, starts=4, steps=40
    )
    data = mnist_gains.run(gains, Cells(tmp_path / "gains" / "cells"))
    assert set(mnist_gains.measure(data)) == {claim.number for claim in mnist_gains.CLAIMS}
    assert mnist_gains.measure(data)["output"] < 1e-2
    assert mnist_gains.measure(data)["certified"] < 0.05
    assert all(row["orbit"]["value"] < row["orbit"]["before"] for row in data["networks"])
    assert json.loads(json.dumps(data)) == data and set(mnist_gains.draw(data)) == {
        "mnist_gains",
        "mnist_gains_sharpness",
    }

    def no_training(*_: Any) -> None:
        raise AssertionError("the networks are there")

    monkeypatch.setattr(minima, "train", no_training)
    sections = dataclasses.replace(
        configure(mnist_sections, CONFIGS / "mnist_sections.toml", True),
        **small,
        networks=str(tmp_path / "gains" / "networks"),
        section_rows=100,
        compare_rows=100,
    )
    found = mnist_sections.run(sections, Cells(tmp_path / "sections" / "cells"))
    assert set(mnist_sections.measure(found)) == {claim.number for claim in mnist_sections.CLAIMS}
    middle = mnist_sections.SECTION
    for row in found["networks"]:
        recipe = minima.Recipe(row["optimizer"], 0, layers=3, side=4, rows=200, epochs=3, batch=100)
        f = minima.objective(minima.trained(recipe, tmp_path / "gains" / "networks", tmp_path)[0], recipe, 100)
        v = f.hvp(sharpness(f, 1e-5).vector) / row["sharpness"]
        steps = (f.at(f.x + t * sections.reach * v).value() for t in (-1, 0, 1))
        assert sorted([*row["section"][::middle]]) == pytest.approx(sorted(steps), rel=1e-3)
    ends = [found["pairs"][0]["losses"][mnist_sections.PLACES.index(end)] for end in (0.0, 1.0)]
    assert ends == pytest.approx([row["section"][middle] for row in found["networks"]], rel=1e-4)
    assert set(mnist_sections.draw(found)) == {"mnist_sections"}


@pytest.mark.parametrize("quick", [False, True])
def test_both_configurations_ask_for_the_same_networks(quick: bool) -> None:
    gains = configure(mnist_gains, CONFIGS / "mnist_gains.toml", quick)
    sections = configure(mnist_sections, CONFIGS / "mnist_sections.toml", quick)
    shared = {field.name for field in dataclasses.fields(gains)} & {
        field.name for field in dataclasses.fields(sections)
    }
    assert shared >= {"layers", "side", "rows", "epochs", "batch", "seeds", "orbit_rows", "orbit_rtol", "orbit_budget"}
    assert [getattr(gains, name) for name in shared] == [getattr(sections, name) for name in shared]
    assert sections.networks == f"runs/mnist_gains{'-quick' if quick else ''}/networks"
