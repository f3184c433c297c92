"""Flatter, sharper, equivalent or undecided: the sheet's examples, random pairs, networks, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pairs import judge, pairs, tally
from torch import Tensor, nn

from torchflat import Objective, Verdict, compare, is_flat_against
from torchflat.errors import UsageError
from torchflat.problems.kinks import absolute

FLATTER, SHARPER, EQUIVALENT, UNDECIDED = Verdict.FLATTER, Verdict.SHARPER, Verdict.EQUIVALENT, Verdict.UNDECIDED
Function = Callable[[Tensor], Tensor]
Point = tuple[float, ...]


def regular(x: Tensor) -> Tensor:
    return (x[0] * x[1] - 1) ** 2


def quartic(x: Tensor) -> Tensor:
    return (x[0] * x[1] - 1) ** 4


def kink(x: Tensor) -> Tensor:
    return absolute(x[0] * x[1] - 1)


def tie(x: Tensor) -> Tensor:
    return x[1] ** 2 + x[0] ** 2 * x[1] ** 4


def equivalent(x: Tensor) -> Tensor:
    return x[0] ** 2 + x[1] ** 4 * (1 + x[2] ** 2)


def rectified(x: Tensor) -> Tensor:
    return (x[1] * torch.relu(x[0]) + x[2] - 1) ** 2


def irregular(x: Tensor) -> Tensor:
    return torch.minimum(x[0] ** 2, absolute(x[1]))


def at(fn: Function, point: Point) -> Objective:
    return Objective.from_function(fn, torch.tensor(point, dtype=torch.float64))


CASES = [
    # By the orders: 2 where x² is the smaller of the two, at the origin, and 1 for |y| to the side of it.
    (irregular, (0.0, 0.0), (1.0, 0.0), FLATTER, "order"),
    # By the moduli.
    (regular, (1.0, 1.0), (2.0, 0.5), FLATTER, "modulus"),
    (regular, (1.0, 1.0), (1.001, 1 / 1.001), FLATTER, "modulus"),
    (quartic, (1.0, 1.0), (2.0, 0.5), FLATTER, "modulus"),
    (kink, (1.0, 1.0), (2.0, 0.5), FLATTER, "modulus"),
    (rectified, (0.0, 0.0, 1.0), (0.0, 0.3, 1.0), FLATTER, "modulus"),
    (rectified, (-1.0, 0.3, 1.0), (0.5, 0.3, 0.85), FLATTER, "modulus"),
    # By the profiles: order 2 and modulus 1 tie, and r⁴ decides.
    (tie, (1.0, 0.0), (2.0, 0.0), FLATTER, "profile"),
    (tie, (0.0, 0.0), (1.0, 0.0), FLATTER, "profile"),
    (tie, (0.1, 0.0), (0.11, 0.0), FLATTER, "profile"),
    # Not at all.
    (equivalent, (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), EQUIVALENT, "profile"),
    (equivalent, (0.0, 0.0, 1.0), (0.0, 0.0, 2.0), EQUIVALENT, "profile"),
    (equivalent, (0.0, 0.0, 0.5), (0.0, 0.0, 3.0), EQUIVALENT, "profile"),
    (rectified, (-0.5, 0.3, 1.0), (0.0, 0.0, 1.0), EQUIVALENT, "profile"),
    (regular, (0.5, 2.0), (2.0, 0.5), EQUIVALENT, "profile"),
    (kink, (1.0, 1.0), (-1.0, -1.0), EQUIVALENT, "profile"),
]


@pytest.mark.parametrize(("fn", "x", "y", "verdict", "by"), CASES)
def test_examples_of_the_sheet(fn: Function, x: Point, y: Point, verdict: Verdict, by: str) -> None:
    f, g = at(fn, x), at(fn, y)
    answer, mirror = compare(f, g), compare(g, f)
    assert (answer.verdict, answer.decided_by) == (verdict, by), answer.reason
    assert answer.verdict_limit is verdict
    assert (mirror.verdict, mirror.verdict_limit, mirror.verdict_curvature) == (
        verdict.mirrored,
        answer.verdict_limit.mirrored,
        answer.verdict_curvature.mirrored,
    )
    assert mirror.differences == tuple(-difference for difference in answer.differences)


@pytest.mark.parametrize("seed", [11])
def test_random_pairs(seed: int) -> None:
    result = tally(judge(pair, mirror=False) for pair in pairs(seed, 12))
    assert not result.wrong, result
    assert result.clear_undecided <= 0.1 * result.clear, result
    assert sum(count for said, count in result.said.items() if said.endswith("equal: EQUIVALENT")) == 4, result


@pytest.mark.slow
def test_many_random_pairs() -> None:
    result = tally(map(judge, pairs(12, 120)))
    assert not result.wrong and not result.not_mirrored, result
    assert result.clear_undecided <= 0.1 * result.clear, result


def test_flat_against_others() -> None:
    f = at(tie, (1.0, 0.0))
    assert is_flat_against(f, [torch.tensor([2.0, 0.0]), torch.tensor([1.5, 0.0])]).flat is True
    against = is_flat_against(f, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])])
    assert against.flat is False
    assert [comparison.verdict for comparison in against.comparisons] == [FLATTER, SHARPER]


# Networks -------------------------------------------------------------------------------------------------------------


def trained(width: int = 16, rows: int = 200) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    X = torch.randn(rows, 4)
    data = X, (X[:, 0] * X[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), data[1]).backward()
        optimizer.step()
    return model, data


def rescaled(f: Objective, factor: float) -> Objective:
    """Move along the orbit: all hidden neurons times a factor, and what they feed divided by it."""
    w1, b1, w2, b2 = f.layout.split(f.x)
    return f.at(f.layout.flatten([factor * w1, factor * b1, w2 / factor, b2]))


def test_a_trained_network_and_a_rescaled_copy() -> None:
    model, data = trained()
    f = Objective(model, nn.functional.cross_entropy, data)
    g = rescaled(f, 4.0)
    answer = compare(f, g)
    sharpness = [float(torch.linalg.eigvalsh(each.hvp(torch.eye(f.n)).double())[-1]) for each in (f, g)]
    assert sharpness[1] > 1.5 * sharpness[0]
    assert answer.verdict is answer.verdict_curvature is FLATTER and answer.decided_by == "profile", answer.reason
    assert not answer.first.critical and abs(answer.level_mismatch) < 1e-6 and not answer.cautions
    assert all(chance > 0 for chance in answer.sampled)


def test_points_of_one_objective_are_searched_on_a_budget_each() -> None:
    f = at(regular, (1.0, 1.0))
    together = compare(f, f.at(torch.tensor([2.0, 0.5], dtype=torch.float64)))
    apart = compare(at(regular, (1.0, 1.0)), at(regular, (2.0, 0.5)))
    assert together.cost.gradients == apart.cost.gradients and together.differences == apart.differences
    searched = apart.first.cost.gradients + apart.second.cost.gradients
    assert searched <= apart.cost.gradients <= 1.1 * searched + 10


def test_a_symmetry_takes_both_to_what_is_compared() -> None:
    model, data = trained()
    f = Objective(model, nn.functional.cross_entropy, data)

    def normed(objective: Objective) -> Objective:
        w1, _, w2, _ = objective.layout.split(objective.x)
        return rescaled(objective, math.sqrt(float(w2.norm() / w1.norm())))

    assert compare(f, rescaled(f, 4.0), symmetry=normed).verdict is EQUIVALENT


def test_another_architecture_is_compared_with_a_caution() -> None:
    (small, data), (large, _) = trained(8), trained(24)
    f, g = (Objective(model, nn.functional.cross_entropy, data) for model in (small, large))
    assert any("different variables" in caution for caution in compare(f, g).cautions)


def test_levels_that_differ_are_a_caution() -> None:
    answer = compare(at(regular, (2.0, 0.6)), at(regular, (1.0, 1.0)))
    assert answer.level_mismatch == pytest.approx(0.04)
    assert any("the loss is 0.04 at the first point" in caution for caution in answer.cautions)


# What is refused ------------------------------------------------------------------------------------------------------


def test_different_data_are_refused() -> None:
    model, (X, y) = trained()
    f = Objective(model, nn.functional.cross_entropy, (X, y))
    with pytest.raises(UsageError, match="different data"):
        compare(f, Objective(model, nn.functional.cross_entropy, (X[:100], y[:100])))
    with pytest.raises(UsageError, match="different data"):
        compare(f, Objective(model, nn.functional.cross_entropy, (X + 1, y)))


def test_a_part_of_the_parameters_is_refused() -> None:
    model, data = trained()
    f = Objective(model, nn.functional.cross_entropy, data)
    with pytest.raises(UsageError, match=r"leaves out 0\.bias, 0\.weight"):
        compare(f, Objective(model, nn.functional.cross_entropy, data, params="2"))


def test_functions_of_different_variables_are_refused() -> None:
    with pytest.raises(UsageError, match="2 and 3 variables"):
        compare(at(regular, (1.0, 1.0)), at(equivalent, (0.0, 0.0, 1.0)))


@pytest.mark.parametrize("options", [{"tolerance": -1.0}, {"tolerance": 1.0}, {"confidence": 1.0}, {"radii": [0.0]}])
def test_arguments_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        compare(at(regular, (1.0, 1.0)), at(regular, (2.0, 0.5)), **options)  # type: ignore[arg-type]


def test_constant_functions_are_undecided() -> None:
    f = at(lambda x: 0 * x[0] + 1, (1.0, 2.0))
    answer = compare(f, f.at(torch.tensor([2.0, 1.0])), radii=[0.1, 0.2, 0.4])
    assert answer.verdict is UNDECIDED and answer.decided_by is None and answer.radius is None
    assert answer.to_dict()["verdict"] == "UNDECIDED"
