"""The level distance is the inverse of the variation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchflat import Objective, level_distance, variation
from torchflat.errors import UsageError


def function(fn: object, *x: float) -> Objective:
    return Objective.from_function(fn, torch.tensor(x, dtype=torch.float64))  # type: ignore[arg-type]


def test_closed_form_of_the_sheet() -> None:
    """T001: f̄(0, ℓ) = √(ℓ + ℓ²) for min{x², |y|}, and 0.08309518948 is ℓ of r = 0.3."""
    f = function(lambda x: torch.minimum(x[0] ** 2, x[1].abs()), 0.0, 0.0)
    levels = [1e-3, 0.08309518948]
    answer = level_distance(f, levels)
    assert answer.distances == pytest.approx([math.sqrt(level + level**2) for level in levels], rel=1e-7)
    assert answer.distances[1] == pytest.approx(0.3, rel=1e-7)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), radius=st.sampled_from([1e-3, 0.05, 0.4]))
def test_it_inverts_the_variation(seed: int, radius: float) -> None:
    a, b, c = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    f = function(lambda x: ((a + 0.5) * x[0] * x[1] - 1) ** 2 + b * x[0] ** 2 + c * x[2], 1.0, 2.0, 0.5)
    value = variation(f, [radius]).values[0]
    answer = level_distance(f, value)
    assert answer.distances[0] == pytest.approx(radius, rel=1e-6)
    assert variation(f, [answer.distances[0]]).values[0] == pytest.approx(value, rel=1e-6)
    change = f.at(answer.points[0]).value() - f.value()
    assert abs(change) >= value * (1 - 1e-12)
    assert float(torch.linalg.vector_norm(answer.points[0] - f.x)) <= answer.distances[0] * (1 + 1e-12)


def test_levels_beyond_the_ladder_are_found() -> None:
    f = function(lambda x: x[0] ** 2 + x[1] ** 2 / 2, 0.0, 0.0)
    assert level_distance(f, [1e-14, 1e4]).distances == pytest.approx([1e-7, 1e2], rel=1e-8)


def test_a_level_that_is_never_reached_is_infinitely_far() -> None:
    f = function(lambda x: torch.tanh(x[0] ** 2), 0.0)
    assert level_distance(f, [0.5, 2.0]).distances == (pytest.approx(math.sqrt(math.atanh(0.5)), rel=1e-8), math.inf)


@pytest.mark.parametrize("levels", [0.0, [-1.0], [], [math.inf], [math.nan]])
def test_levels_must_be_positive(levels: object) -> None:
    with pytest.raises(UsageError, match="positive"):
        level_distance(function(lambda x: x[0] ** 2, 1.0), levels)  # type: ignore[arg-type]
