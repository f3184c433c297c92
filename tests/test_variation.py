"""f° against closed forms, dense matrices and an independent maximum; every value attained; what ends a search."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from brute_force import largest_change
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchflat import Objective, Status, variation
from torchflat.errors import UsageError
from torchflat.flatness.climb import shortest_combination
from torchflat.flatness.quadratic import ball_maximiser
from torchflat.flatness.variation import Variation
from torchflat.problems import PROBLEMS
from torchflat.problems.maximum import quadratic_maximum

RADII = (1e-3, 0.03, 0.3)
KNOWN = [name for name, problem in PROBLEMS.items() if problem.variation(RADII[0]) is not None]
# Thousands of gradients each, and nothing that smaller ones do not show.
LARGE = {"quadratic/gap-1e-2", "quadratic/gap-1e-3", "quadratic/indefinite", "quadratic/negative"}


def function(fn: object, *x: float) -> Objective:
    return Objective.from_function(fn, torch.tensor(x, dtype=torch.float64))  # type: ignore[arg-type]


def attained(f: Objective, answer: Variation) -> None:
    for point, radius, value, sign in zip(answer.points, answer.radii, answer.values, answer.signs, strict=True):
        assert float(torch.linalg.vector_norm((point - f.x).double())) <= radius * (1 + 1e-12)
        assert f.at(point).value() - f.value() == sign * value


def as_accurate_as_it_says(answer: Variation, known: list[float]) -> None:
    for value, exact, accuracy, floor in zip(answer.values, known, answer.accuracy, answer.floor, strict=True):
        assert accuracy <= 1e-6
        # Above by rounding only: values are attained.
        assert -1e-12 * exact - floor <= exact - value <= accuracy * exact + floor


# Known answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in LARGE])
def test_closed_forms(name: str) -> None:
    problem = PROBLEMS[name]
    known = {radius: value for radius in RADII if (value := problem.variation(radius)) is not None}
    f = problem.objective()
    answer = variation(f, list(known))
    as_accurate_as_it_says(answer, list(known.values()))
    assert answer.status in (Status.CONVERGED, Status.ROUNDING_LIMITED), answer.status
    attained(f, answer)


@pytest.mark.parametrize(
    ("name", "r", "value"),
    [
        ("T001", 0.3, 0.08309518948),
        ("T002", 0.2, 0.09171370850),
        ("T006", 0.1, 4.596398782e-4),
        ("T029", 0.1, 0.01040003703996),
        ("T094", 0.05, 0.0107513962),
        ("T094", 0.2, 0.1790104374),
        ("T009", 0.3, 0.09364689648776),
        ("T025", 0.2, 0.1299979590),
    ],
)
def test_instances_of_the_sheet(name: str, r: float, value: float) -> None:
    functions = {
        "T001": function(lambda x: torch.minimum(x[0] ** 2, x[1].abs()), 0.0, 0.0),
        "T002": function(lambda x: (x[0] * x[1] - 1) ** 2, 1.0, 1.0),
        "T006": function(lambda x: (x[0] * x[1] - 1) ** 4, 1.0, 1.0),
        "T029": function(lambda x: x[1] ** 2 + x[0] ** 2 * x[1] ** 4, 2.0, 0.0),
        "T094": function(lambda x: (x[0] * x[1] - 1) ** 2, 2.0, 0.5),
        "T009": function(
            lambda x: x[0] ** 2 + x[1] ** 4 * (1 + x[2] ** 2) + x[0] ** 6 * (1 + (x[2] - 1) ** 2), 0.0, 0.0, 3.0
        ),
        "T025": function(lambda x: ((x[0] * x[1] - 3) ** 2) / 2, 3**0.5, 3**0.5),
    }
    assert variation(functions[name], [r]).values[0] == pytest.approx(
        value, rel=1e-7 if name == "T001" else 2e-9, abs=6e-11
    )


def test_slopes_are_those_of_the_sheet() -> None:
    answer = variation(function(lambda x: (x[0] * x[1] - 1) ** 2, 2.0, 0.5), [0.05, 0.2])
    assert answer.slopes == pytest.approx((0.43268, 1.84099), abs=1e-5)


def test_slope_on_a_kink_is_that_of_the_mixture() -> None:
    # f° = (√(1 + 4r²) − 1)/2 is attained where x² = |y|: its slope 2r/√(1 + 4r²) is neither 1 nor 2x there.
    r = 0.3
    answer = variation(function(lambda x: torch.minimum(x[0] ** 2, x[1].abs()), 0.0, 0.0), [r])
    assert answer.slopes[0] == pytest.approx(2 * r / math.sqrt(1 + 4 * r * r), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 7), radius=st.sampled_from([1e-3, 0.1, 2.0]))
def test_quadratics_with_a_gradient(seed: int, n: int, radius: float) -> None:
    source = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=source, dtype=torch.float64)
    g, hessian = torch.randn(n, generator=source, dtype=torch.float64), a + a.T
    f = Objective.from_function(lambda x: g @ x + x @ hessian @ x / 2, torch.zeros(n, dtype=torch.float64))
    known = max(float(quadratic_maximum(sign * g, sign * hessian, radius)) for sign in (1, -1))
    assert variation(f, [radius]).values[0] == pytest.approx(known, rel=1e-7)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_orthogonal_changes_of_variables_change_nothing(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(3, 3, generator=source, dtype=torch.float64)).Q
    point = torch.tensor([0.9, 1.1, 0.7], dtype=torch.float64)

    def fn(x: Tensor) -> Tensor:
        return (x[0] * x[1] ** 2 * x[2] - 1) ** 2 + x.cos().sum()

    plain, turned = (
        variation(Objective.from_function(each, at), [0.01, 0.2])
        for each, at in ((fn, point), (lambda x: fn(q @ x), q.T @ point))
    )
    assert turned.values == pytest.approx(plain.values, rel=1e-7)


@pytest.mark.parametrize("radius", [1e-2, 0.1])
def test_small_network(radius: float) -> None:
    """Not below what a random search reaches, and as far from the dense quadratic model as cubic terms are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X = torch.randn(20, 3, dtype=torch.float64)
    f = Objective(model, nn.functional.mse_loss, (X, X[:, :2].sin()))
    answer = variation(f, [radius])
    attained(f, answer)
    hessian = f.hvp(torch.eye(f.n, dtype=torch.float64))
    model_value = max(float(quadratic_maximum(s * f.gradient(), s * hessian, radius)) for s in (1, -1))
    assert answer.values[0] == pytest.approx(model_value, rel=10 * radius)

    def fn(x: Tensor) -> Tensor:
        w1, b1, w2, b2 = f.layout.split(x)
        return (((X @ w1.T + b1).tanh() @ w2.T + b2 - X[:, :2].sin()) ** 2).mean()

    assert answer.values[0] >= largest_change(fn, f.x, radius) * (1 - 1e-12)


# The pieces -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 6), shift=st.sampled_from([-3.0, 0.0, 3.0]), hard=st.booleans())
def test_maximum_on_a_ball(seed: int, n: int, shift: float, hard: bool) -> None:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=source, dtype=torch.float64) + shift
    slopes = torch.randn(n, generator=source, dtype=torch.float64)
    if hard:
        slopes[values.argmax()] = 0.0
    z = ball_maximiser(values, slopes, 0.7)
    assert float(torch.linalg.vector_norm(z)) <= 0.7 * (1 + 1e-9)
    reached = float(slopes @ z + (values * z * z).sum() / 2)
    assert reached == pytest.approx(float(quadratic_maximum(slopes, torch.diag(values), 0.7)), rel=1e-8, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 7))
@example(seed=198, k=6)
def test_shortest_combination_is_optimal(seed: int, k: int) -> None:
    rows = torch.randn(k, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    weights = shortest_combination(rows @ rows.T)
    assert float(weights.min()) >= 0 and float(weights.sum()) == pytest.approx(1)
    shortest = weights @ rows
    # Optimal exactly if no row reaches less far along it than it does itself.
    assert float((rows @ shortest).min()) >= float(shortest @ shortest) - 1e-10 * float((rows * rows).sum())


def test_it_does_not_know_the_problems() -> None:
    folder = Path(variation.__code__.co_filename).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any("problems" in name for name in names), file


# The ladder and the status --------------------------------------------------------------------------------------------


def test_ladder_goes_from_rounding_to_the_size_of_the_loss() -> None:
    torch.manual_seed(0)
    X = torch.randn(50, 3, dtype=torch.float64)
    f = Objective(nn.Linear(3, 1).double(), nn.MSELoss(), (X, torch.randn(50, 1, dtype=torch.float64)))
    answer = variation(f)
    assert answer.status is Status.CONVERGED and len(answer.radii) >= 8
    assert 0.5 * f.value() <= answer.values[-1] <= 2 * f.value()
    assert answer.values[0] > 100 * answer.floor[0] and answer.radii[0] < 1e-6 * answer.radii[-1]


def test_critical_points_and_kinks_are_told_from_slopes() -> None:
    square = (lambda x: (x[0] * x[1] - 1) ** 2, 2.0, 0.5)
    kink = (lambda x: torch.where(x[0] * x[1] >= 1, x[0] * x[1] - 1, 1 - x[0] * x[1]), 2.0, 0.5)
    assert variation(function(*square), [0.1]).critical
    assert variation(function(*kink), [0.1]).critical and variation(function(*kink), [0.1]).gradient_norm > 1
    assert not variation(function(square[0], 2.0, 0.6), [0.1]).critical


def test_a_loss_that_is_not_finite_ends_the_radii() -> None:
    f = function(lambda x: -torch.log(1 - x[0] ** 2) + x[1] ** 2, 0.0, 0.0)
    answer = variation(f, [0.1, 0.5, 1.5, 3.0])
    assert answer.status is Status.TRUNCATED and answer.radii == (0.1, 0.5)
    assert answer.values[1] == pytest.approx(-math.log(0.75), rel=1e-9)
    assert 1 <= answer.unbounded <= 1.5


def test_constant_functions_have_no_order() -> None:
    answer = variation(function(lambda x: 0 * x[0] + 3.0, 1.0, 2.0), [0.1, 1.0])
    assert answer.status is Status.ROUNDING_LIMITED and answer.order is None and answer.values == (0.0, 0.0)


def test_the_budget_and_the_callback_end_a_search() -> None:
    f = PROBLEMS["factorisation/wide"].objective()
    short = variation(f, RADII, budget=60)
    assert short.status is Status.BUDGET and len(short.values) < len(RADII)
    attained(f, short)
    seen: list[float] = []
    stopped = variation(f, RADII, callback=lambda radius, value: seen.append(radius) or True)
    assert seen == [RADII[0]] and len(stopped.values) == 1


@pytest.mark.parametrize("budget", [70.0, 85.5, 101.3, 120.0])
def test_a_budget_that_suffices_for_the_model_is_never_exceeded(budget: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2))
    f = Objective(model, nn.functional.cross_entropy, (torch.randn(50, 4), torch.randint(2, (50,))))
    assert variation(f, budget=budget).cost.gradients <= budget


@pytest.mark.parametrize("radii", [[], [0.0], [-1.0, 0.1], [math.inf], [math.nan]])
def test_radii_must_be_positive(radii: list[float]) -> None:
    with pytest.raises(UsageError, match="positive"):
        variation(function(lambda x: x[0] ** 2, 1.0), radii)


def test_the_model_is_left_as_it_was_and_the_cost_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    f = Objective(model, nn.MSELoss(), (torch.randn(20, 3), torch.randn(20, 1)))
    answer = variation(f, [0.1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert answer.cost.gradients == pytest.approx(f.cost.gradients, rel=0.2) and answer.cost.products == 0


def test_same_seed_same_answer() -> None:
    a, b = (variation(PROBLEMS["valley/relu-edge"].objective(), RADII, seed=3) for _ in range(2))
    assert a.values == b.values and all(map(torch.equal, a.points, b.points))
