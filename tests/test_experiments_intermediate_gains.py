"""Theorems 1 to 4 on deep linear networks: a short search, and data that is wrong."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import intermediate_gains
from experiments.cells import Cells
from experiments.claim import judge
from torchflat.problems import PROBLEMS, DeepLinear, random_minimiser

torch.set_num_threads(1)

CONFIG = intermediate_gains.Config(size=2, layers=3, move=0.02, draws=3000, seeds=(0, 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return intermediate_gains.run(CONFIG, Cells(tmp_path_factory.mktemp("cells")))


def wrong(data: dict[str, Any]) -> set[str]:
    verdicts = judge(intermediate_gains.CLAIMS, intermediate_gains.measure(data))
    return {verdict.claim.number for verdict in verdicts if not verdict.as_declared}


def test_what_does_not_depend_on_the_size_comes_out(data: dict[str, Any]) -> None:
    # Two random layers of size two are sharp and uncoupled by chance only.
    assert wrong(data) <= {"sharp_gains", "loose", "draws"}
    assert set(intermediate_gains.draw(data)) == {"intermediate_gains"}


@pytest.mark.parametrize(
    ("number", "change"),
    [
        ("least", lambda data: data["searches"][0]["end"].update(ratio=0.99)),
        ("attained", lambda data: data["searches"][0]["canonical"].update(ratio=1.01)),
        ("found", lambda data: data["searches"][0]["end"].update(ratio=1.02)),
        ("gains", lambda data: data["searches"][0]["end"]["gains"].__setitem__(0, 3.0)),
        ("norms", lambda data: data["searches"][0]["end"]["norms"].__setitem__(0, 2.0)),
        ("coupling", lambda data: data["searches"][0]["end"]["cosines"].__setitem__(0, 0.9)),
        ("enough", lambda data: data["enough"].__setitem__(0, 1.001)),
        ("needed", lambda data: data["converse"]["layers"].__setitem__(0, 1.0)),
    ],
)
def test_wrong_data_flips_the_verdicts(data: dict[str, Any], number: str, change: Any) -> None:
    other = copy.deepcopy(data)
    change(other)
    assert number in wrong(other)


def test_starts_in_the_place_of_ends_flip_the_verdicts(data: dict[str, Any]) -> None:
    other = copy.deepcopy(data)
    for search in other["searches"]:
        search["start"], search["end"] = search["end"], search["start"]
    assert "found" in wrong(other)


def test_units_are_those_of_the_flattest() -> None:
    seen = intermediate_gains.looked_at(PROBLEMS["deep-linear/flattest"])
    assert seen["ratio"] == pytest.approx(1, abs=1e-12)
    ones = [1, 1, 1]
    assert seen["norms"] == pytest.approx(ones) and seen["outer"] == pytest.approx(ones)
    assert seen["cosines"] == pytest.approx([1, 1]) and max(seen["gains"]) <= math.sqrt(3)


def test_the_bounds_of_a_near_minimum_hold_for_any_network() -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        product = torch.randn(3, 3, generator=source, dtype=torch.float64)
        seen = intermediate_gains.looked_at(DeepLinear.white(random_minimiser(product, 4, source)))
        m, ratio = 4, seen["ratio"]
        assert intermediate_gains.spread(seen["norms"]) <= m * (ratio - 1) * (1 + 1e-9)
        assert min(map(abs, seen["cosines"])) >= ratio ** (-m / 2) * (1 - 1e-9)
        for gain, outer in zip(seen["gains"][:-1], seen["outer"][1:], strict=True):
            assert gain * outer <= math.sqrt(m * ratio) * (1 + 1e-9)


def test_the_search_keeps_what_lowers(tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, draws=200, seeds=(0,))
    (search,) = intermediate_gains.run(short, Cells(tmp_path))["searches"]
    ratios = [ratio for _, ratio in search["lowered"]]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == pytest.approx(search["start"]["ratio"]) and ratios[-1] == pytest.approx(search["end"]["ratio"])
