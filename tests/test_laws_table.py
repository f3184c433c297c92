"""The laws that inference finds, against the table that was derived by hand and counted from gradients."""

from __future__ import annotations

import pytest
from law_networks import NETWORKS, SIZES
from law_table import FORMULAS, TABLE, Count

from torchflat.symmetry import laws

MODES = ("eval", "train")
# At full size: those that take seconds; the others are slow, or slow and large.
LARGE = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small", "densenet121", "vit_b_16", "convnext_tiny")


def agrees(name: str, mode: str, expected: Count, small: bool) -> None:
    found = laws(*NETWORKS[name](small=small), mode=mode, points=1 if not small else 3)  # type: ignore[arg-type]
    kinds = ("diagonal", "centred", "full", "linear")
    assert found.count == {kind: getattr(expected, kind) for kind in kinds}
    assert sum(coupling.laws for coupling in found.approximate) == expected.approximate
    assert not found.unknown and not found.dropped


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_small_networks(name: str, mode: str) -> None:
    agrees(name, mode, FORMULAS[name](**SIZES[name][1])[mode == "train"], small=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in TABLE])
def test_networks_at_full_size(name: str, mode: str) -> None:
    agrees(name, mode, TABLE[name][mode == "train"], small=False)
