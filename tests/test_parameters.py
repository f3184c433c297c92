"""Selecting parameters by name, and the flat vector they make up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchflat.errors import UsageError
from torchflat.parameters import Layout, select


def _model() -> nn.Module:
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)))
    model.add_module("encoder2", nn.Linear(3, 2))
    model.add_module("head", nn.Linear(3, 2, bias=False))
    model.get_submodule("head").weight = model.get_submodule("encoder2").weight
    return model


ALL = ["encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias", "encoder2.weight", "encoder2.bias"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, ALL),
        ("*", ALL),
        ("encoder", ALL[:4]),  # the submodule, not what begins with its name
        ("encoder.2", ALL[2:4]),
        (["*.bias"], ALL[1::2]),
        (["encoder2.bias", "encoder.0.weight"], [ALL[0], ALL[5]]),  # in the model's order
        ("head.weight", ["encoder2.weight"]),  # a tied tensor by its other name
        ("head", ["encoder2.weight"]),
        (["!*.weight"], ALL[1::2]),
        (["encoder", "!*.0.*"], ALL[2:4]),
        (["encoder", "!encoder.0", "encoder.0.bias"], ALL[1:4]),  # read from left to right
    ],
)
def test_patterns(patterns: Any, expected: list[str]) -> None:
    assert select(_model(), patterns) == expected


def test_frozen_parameters_are_left_out_unless_named() -> None:
    model = _model()
    model.get_submodule("encoder").requires_grad_(False)
    assert select(model, None) == ALL[4:]
    assert select(model, "encoder.0") == ALL[:2]


def _complex() -> nn.Module:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (_model(), "decoder", "'decoder' matches no parameter; the model has encoder.0.weight, .*"),
        (_model(), ["encoder", "!decoder"], "'decoder' matches no parameter"),
        (_model(), [], "leaves no parameter to audit"),
        (_model(), ["encoder", "!encoder"], "leaves no parameter to audit"),
        (_model().requires_grad_(False), None, r"no parameter that requires grad.*params="),
        (nn.ReLU(), None, "no parameter that requires grad"),
        (_complex(), None, r"'phase' is torch.complex64.*params=\[..., '!phase'\]"),
        (nn.LazyLinear(3), None, "'weight' has no values yet: run the model once"),
        (nn.Linear(2, 2, device="meta"), None, "'weight' has no values yet.*load its weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_selected(model: nn.Module, patterns: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(model, patterns)


def test_a_complex_parameter_can_be_left_out() -> None:
    assert select(_complex(), "!phase") == ["weight", "bias"]


shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(torch.Size), min_size=1, max_size=5)


@given(shapes)
def test_flatten_undoes_split(shapes: list[torch.Size]) -> None:
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(shapes))
    flat = torch.arange(layout.n, dtype=torch.float64)
    parts = layout.split(flat)
    assert [part.shape for part in parts] == shapes
    assert torch.equal(layout.flatten(parts), flat)
    for name, part in zip(layout.names, parts, strict=True):
        assert torch.equal(flat[layout.slices()[name]], part.reshape(-1))
        assert part.numel() == 0 or part._base is flat


def test_a_part_of_a_layout_is_the_layout_of_these_tensors() -> None:
    layout = Layout(("a", "b", "c"), (torch.Size([2]), torch.Size([]), torch.Size([2, 2])))
    part = layout.part((0, 2))
    assert (part.names, part.n) == (("a", "c"), 6)
