"""Escape to infinity: verdicts of a small run, and mutations that flip them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from verdicts import Data, conducted, corrected, mutated, surprises

from experiments import bounded_descents, escape_to_infinity


@pytest.fixture(scope="module")
def escapes(tmp_path_factory: pytest.TempPathFactory) -> Data:
    config = escape_to_infinity.Config(seeds=(0,), trials=600, step=0.02, steps=4000, long=20_000, tracked=2)
    return conducted(escape_to_infinity, config, tmp_path_factory.mktemp("escape"))


def test_escapes_come_out_as_declared(escapes: Data) -> None:
    assert not surprises(escape_to_infinity, escapes)
    assert corrected(escape_to_infinity, escapes) == {"share", "limit", "sensing_constant"}


def to_two(data: Data) -> None:
    (batch,) = data["figure1"]
    batch["limit"] = [limit and limit + 1 for limit in batch["limit"]]


def without_signs(data: Data) -> None:
    (batch,) = data["figure1"]
    half = len(batch["alternating"]) // 2
    batch["alternating"] = batch["alternating"][half:] + batch["alternating"][:half]


def shuffled_alarms(data: Data) -> None:
    (batch,) = data["figure1"]
    batch["limit"] = batch["limit"][1:] + batch["limit"][:1]


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (to_two, {"limit"}),
        (without_signs, {"alternating"}),
        (shuffled_alarms, {"found", "false"}),
        (lambda data: data.update(step=0.01), {"halt"}),
        (lambda data: data["tracked"][0].update(f=1.1), {"alarms"}),
        (lambda data: data["critical"][3].update(f=2.0, least=0.0), {"critical", "saddles"}),
        (lambda data: data["plane"]["plateau"]["f"].append(0.3), {"plateau_share"}),
        (lambda data: data["plane"]["pair"]["flow"].pop(), {"flow_value", "flow_place"}),
        (lambda data: data["plane"]["symmetric"]["known"].append("an alarm"), {"infimum_alarms"}),
        (lambda data: data["bounded"]["linear"].update(drift=[1.0, 1.0, 1.0]), {"linear_drift"}),
        (lambda data: data["bounded"]["sensing"].update(example=2.0, constant=2.0), {"sensing_constant"}),
        (lambda data: data["bounded"]["absolute"]["share"].append(1.2), {"absolute_bound"}),
    ],
)
def test_each_escape_is_told(escapes: Data, change: Callable[[Data], None], numbers: set[str]) -> None:
    found = surprises(escape_to_infinity, mutated(escapes, change))
    assert numbers <= found and found <= numbers | {"others", "alternating"}


def test_the_tracker_tells_an_escape() -> None:
    stuck = escape_to_infinity.tracked(escape_to_infinity.MASKED.function, (0.9, -0.8, 0.5, -0.6), 0.02, 2000)
    solved = escape_to_infinity.tracked(escape_to_infinity.MASKED.function, (0.9, 0.8, 0.5, 0.6), 0.02, 2000)
    assert len(stuck["alarms"]) == 1 and stuck["f"] > 1 and not solved["alarms"] and solved["f"] < 1e-6


def test_the_printed_constant_fails_at_random_too() -> None:
    source = torch.Generator().manual_seed(3)
    constants = [bounded_descents.least_constant(source) for _ in range(300)]
    assert 2 < max(constants) <= 4 + 1e-9
    assert bounded_descents.example_constant() == pytest.approx(4, abs=1e-12)


def test_what_is_not_conserved_drifts_at_any_step() -> None:
    start = torch.tensor([1.2, 0.5], dtype=torch.float64)
    answer = bounded_descents.descents(
        lambda x: (x[0] * x[1] - 1) ** 2, start, lambda x: x[0] ** 2 + x[1] ** 2, (0.02, 0.01, 0.005), 2.0
    )
    assert answer["drift"][1] / answer["drift"][2] == pytest.approx(1, abs=0.05)
