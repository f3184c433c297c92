"""What a normalised step does exactly: to the laws of the flow, under other scales, and in other coordinates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from experiments.descents import normalized, starts
from torchflat.objective import Objective
from torchflat.optim import NormalizedGD
from torchflat.problems import PROBLEMS, DeepLinear, Factorisation, Function, Monomial, Problem

# Constants of the flow that are not quadratic: the one-step law is not theirs.
OTHER_LAWS = {"squares/flattest", "squares/sharp", "squares/ellipse", "squares/hyperbola", "squares/cone"}
OTHER_LAWS |= {"squares/cone-tip", "curve/parabola", "curve/cubic"}
QUADRATIC = [name for name, p in PROBLEMS.items() if p.conserved() is not None and name not in OTHER_LAWS]


def law(problem: Problem, x: Tensor) -> Tensor:
    """Return C(x), also where x does not solve the problem."""
    if isinstance(problem, Factorisation):
        X, Y = x.split([problem.X.numel(), problem.Y.numel()])
        return Factorisation(X.view_as(problem.X), Y.view_as(problem.Y)).conserved()
    if isinstance(problem, DeepLinear):
        parts = x.split([w.numel() for w in problem.weights])
        weights = tuple(part.view_as(w) for part, w in zip(parts, problem.weights, strict=True))
        return dataclasses.replace(problem, weights=weights).conserved()
    assert isinstance(problem, Function)
    conserved = problem.at(x).conserved()
    assert conserved is not None
    return conserved


def errors_of_the_law(problem: Problem, norm: str, steps: int = 10, lr: float = 0.5) -> Tensor:
    """Return |C(x − αu) − C(x) − α²C(u)|, u = ∇f/|∇f|, for each of some steps from a random point."""
    f: Objective = problem.objective()
    x = torch.randn(f.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [part.requires_grad_() for part in x.chunk(2)]
    optimizer = NormalizedGD(parts, lr=lr, norm=norm)
    errors = []
    for k in range(steps):
        gradient, before = f.at(x.detach()).gradient(), law(problem, x.detach())
        for part, share in zip(parts, gradient.chunk(2), strict=True):
            part.grad = share
        optimizer.step()
        alpha, u = lr * (k + 1) ** -0.25, gradient / gradient.norm()
        errors.append((law(problem, x.detach()) - before - alpha**2 * law(problem, u)).abs().max())
    return torch.stack(errors)


@pytest.mark.parametrize("name", QUADRATIC)
def test_t037_each_step_changes_a_quadratic_law_by_its_value_at_the_step(name: str) -> None:
    problem = PROBLEMS[name]
    x = torch.linspace(0.5, 1.5, problem.objective().n, dtype=torch.float64)
    torch.testing.assert_close(law(problem, 2 * x), 4 * law(problem, x), rtol=1e-12, atol=1e-12)
    assert float(errors_of_the_law(problem, "global").max()) <= 1e-12


def test_t037_of_the_example() -> None:
    x = torch.tensor([2.0, 0.7], dtype=torch.float64, requires_grad=True)
    ((x[0] * x[1] - 1) ** 2).backward()
    NormalizedGD([x], lr=0.3).step()
    first, second = x.tolist()
    assert (first**2 - second**2) / (2.0**2 - 0.7**2) == pytest.approx(0.9799554566, abs=1e-10)


def test_t037_dividing_each_tensor_by_its_own_norm_breaks_the_laws_between_them() -> None:
    balanced = PROBLEMS["deep-linear/chain"]
    assert float(errors_of_the_law(balanced, "tensor").max()) >= 1e-2


def test_t037_a_linear_law_is_kept() -> None:
    # Softmax does not see what all classes have in common.
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    rows, labels = torch.randn(20, 4).double(), torch.arange(20) % 3
    optimizer = NormalizedGD(model.parameters(), lr=0.5)
    weight, shared = model.weight.detach().clone(), model.weight.detach().sum(dim=0)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows), labels).backward()
        optimizer.step()
    assert float((model.weight - weight).detach().norm()) >= 0.1
    torch.testing.assert_close(model.weight.detach().sum(dim=0), shared, rtol=0, atol=1e-14)


@pytest.mark.parametrize("exponents", [(1, 1), (1, 2), (1, 2, 3)])
def test_t049_powers_of_a_function_have_the_same_iterates(exponents: tuple[int, ...]) -> None:
    start = starts(len(exponents), 10)
    ends = [normalized(Monomial((1.0,) * len(exponents), exponents, power=k).function, start, 50) for k in (1, 2, 4)]
    assert float((ends[0] - start).norm(dim=1).min()) >= 0.05
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["monomial/flattest", "curve/bilinear", "squares/sharp"])
def test_t055_steps_commute_with_orthogonal_changes_of_variables(name: str) -> None:
    problem = PROBLEMS[name]
    assert isinstance(problem, Function)
    n = len(problem.point)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    start = starts(n, 10)
    straight = normalized(problem.function, start, 50)
    turned = normalized(lambda y: problem.function(Q @ y), start @ Q, 50)
    torch.testing.assert_close(turned @ Q.T, straight, rtol=0, atol=1e-9)


def test_t055_not_where_the_change_mixes_tensors_of_their_own_norm() -> None:
    f, Q = Monomial((1.0, 1.0), (1, 2)).function, torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)

    def end(turn: Tensor, norm: str) -> Tensor:
        y = turn.T @ torch.tensor([1.7, 0.4], dtype=torch.float64)
        parts = [part.requires_grad_() for part in y.split(1)]
        optimizer = NormalizedGD(parts, lr=0.3, norm=norm)
        for _ in range(5):
            optimizer.zero_grad()
            f(turn @ torch.cat(parts)).backward()
            optimizer.step()
        return turn @ y.detach()

    same = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(end(Q, "global"), end(same, "global"), rtol=0, atol=1e-12)
    assert float((end(Q, "tensor") - end(same, "tensor")).norm()) >= 0.05


def test_lr_to_start_with_the_steps_of_sgd() -> None:
    eta = 0.05

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def loss(network: nn.Module) -> Tensor:
        rows = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
        return nn.functional.mse_loss(network(rows), rows[:, :2].cos())

    one, other = model(), model()
    loss(one).backward()
    loss(other).backward()
    length = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
    torch.optim.SGD(one.parameters(), lr=eta).step()
    NormalizedGD(other.parameters(), lr=eta * float(length)).step()
    for ours, theirs in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
