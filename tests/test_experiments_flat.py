"""Balanced against flat: verdicts of a run on a small network, and mutations that flip them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from verdicts import Data, conducted, corrected, mutated, surprises

from experiments import flat_but_unbalanced
from torchflat.problems import MaximumOfThree

HEADROOMS = {"SGD_headroom", "Adam_headroom"}


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory: pytest.TempPathFactory) -> Data:
    config = flat_but_unbalanced.Config(
        data="sample", depth=3, width=12, epochs=12, batch=20, rows=100, rtol=0.1, budget=150.0, factorisations=1
    )
    return conducted(flat_but_unbalanced, config, tmp_path_factory.mktemp("flat"))


def test_flat_and_balanced_come_out_as_declared(unbalanced: Data) -> None:
    # So narrow a network, so briefly trained, need not have much to gain.
    assert surprises(flat_but_unbalanced, unbalanced) <= HEADROOMS
    assert corrected(flat_but_unbalanced, unbalanced) == {"single_gradient", "single_vector"}


def swap_networks(data: Data) -> None:
    for run in data["networks"].values():
        run["balanced"], run["flattest"] = run["flattest"], run["balanced"]


def one_sided(data: Data) -> None:
    data["maximum"]["C"] = [abs(c) for c in data["maximum"]["C"]]


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (swap_networks, {"SGD_balanced", "Adam_balanced"}),
        (one_sided, {"hull_gradient"}),
        (lambda data: data["maximum"]["C"].append(0.0), {"single_gradient"}),
        (lambda data: data["maximum"]["slopes"].reverse(), set()),
        (lambda data: data["maximum"]["slopes"].insert(0, data["maximum"]["slopes"].pop()), {"modulus", "strict"}),
        (lambda data: data["determinants"]["single"].append(0.0), {"single_vector"}),
        (lambda data: data["determinants"]["moved"].append(0.9), {"flat_vectors"}),
        (lambda data: data["example"].update(least=6.1), {"least"}),
        (lambda data: data["networks"]["SGD"].update(change=0.01, residual=0.01), {"same", "balanced"}),
        (lambda data: data["networks"]["SGD"]["losses"].append(0.07), {"learned"}),
    ],
)
def test_each_claim_on_balance_is_told(unbalanced: Data, change: Callable[[Data], None], numbers: set[str]) -> None:
    found = surprises(flat_but_unbalanced, mutated(unbalanced, change))
    assert numbers <= found and found <= numbers | HEADROOMS


def test_another_point_is_not_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_but_unbalanced, "FLATTEST_OF_THREE", MaximumOfThree((2.4, 1 / 2.4, 0.6, 1 / 0.6)))
    data = flat_but_unbalanced.maximum()
    assert len(data["C"]) == 2 and math.copysign(1, data["C"][0]) * data["C"][1] > 0
