"""The least norm in an orbit, where C = 0, and the flow towards it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbits import chain, entries, full, relu_classifier
from torch import Tensor, nn

from torchflat import Objective, Status
from torchflat.errors import NonFiniteError, UsageError
from torchflat.problems import Factorisation
from torchflat.spectrum import NotConvergedWarning
from torchflat.symmetry import Coupling, Group, Member, balance, flow


class TwoFactors(nn.Module):
    """x ↦ X Y x."""

    def __init__(self, X: Tensor, Y: Tensor) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(X), nn.Parameter(Y)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.left @ self.right).T


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 3.0))
def test_a_balanced_network_computes_the_same_with_the_least_norm(seed: int, spread: float) -> None:
    model, (X, _) = relu_classifier(seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            p *= torch.exp(spread * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = balance(model, chain(model))
    assert answer.status is Status.CONVERGED
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for coupling in chain(model):
        assert float(coupling.value(answer).abs().sum()) <= 1e-12 * answer.norm**2
    outputs = model(X).detach()
    after = torch.func.functional_call(model, dict(answer), (X,)).detach()
    assert float((after - outputs).abs().max()) <= 1e-9 * float(outputs.abs().max())
    # No point of the orbit near by is shorter.
    layout = Objective(model, nn.MSELoss(), (X, outputs)).layout
    group = Group(chain(model), layout)
    x = layout.flatten([answer[name] for name in layout.names])
    for other in range(5):
        z = 0.1 * torch.randn(group.size, generator=torch.Generator().manual_seed(other)).double()
        assert float(group.act(x[None], z).norm()) >= answer.norm * (1 - 1e-12)
    assert answer.norm <= answer.norm_before * (1 + 1e-12)


def test_one_pair_in_closed_form() -> None:
    """The log-scale is ½ log(|reader|/|writer|), and both have the geometric mean of the norms."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 4, bias=False)).double()
    a, b = (float(layer.weight.detach().norm()) for layer in model)
    answer = balance(model, chain(model))
    assert float(answer.log_scales["0 → 1"]) == pytest.approx(0.5 * math.log(b / a))
    assert [float(tensor.norm()) for tensor in answer.values()] == pytest.approx([math.sqrt(a * b)] * 2)


@pytest.mark.parametrize(("m", "r", "n"), [(3, 2, 4), (4, 4, 4), (6, 3, 5)])
def test_full_couplings_balance_to_the_nuclear_norm(m: int, r: int, n: int) -> None:
    """T019: the least |X|² + |Y|² over XY = M is 2‖M‖_*, where XᵀX = YYᵀ."""
    generator = torch.Generator().manual_seed(m)
    X = torch.randn(m, r, generator=generator, dtype=torch.float64)
    Y = torch.randn(r, n, generator=generator, dtype=torch.float64)
    answer = balance(TwoFactors(X, Y), [full(r, "left", 1, "right", 0)])
    assert answer.status is Status.CONVERGED
    left, right = answer["left"], answer["right"]
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(left @ right, X @ Y, rtol=1e-10, atol=1e-12)
    assert answer.norm**2 == pytest.approx(2 * float(torch.linalg.matrix_norm(X @ Y, "nuc")), rel=1e-10)


def test_full_couplings_along_a_chain() -> None:
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in ((4, 4), (4, 5), (5, 3))]).double()
    couplings = chain(model, "full")
    # Five channels between ranks four and three: some directions cannot be balanced, and are driven to zero.
    answer = balance(model, couplings, rtol=1e-5)
    assert answer.status is Status.CONVERGED
    x = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.functional_call(model, dict(answer), (x,)), model(x), rtol=1e-7, atol=1e-8)


def test_single_precision_and_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    model[0].weight.data *= 50
    answer = balance(model, chain(model))
    assert answer.status is Status.CONVERGED
    assert {name: tensor.dtype for name, tensor in answer.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    x = torch.randn(9, 5)
    before = model.eval()(x).detach()
    model.load_state_dict(answer)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-4, atol=1e-5)


def test_unequal_exponents() -> None:
    """|x|² with writers scaled by e^z and readers by e^{−2z} is least where writers² = 2·readers²."""
    rows = torch.arange(1)
    members = Member("left", 0, rows, rows, 1.0), Member("right", 0, rows, rows, -2.0)
    model = TwoFactors(torch.full((1, 1), 9.0).double(), torch.full((1, 1), 0.1).double())
    answer = balance(model, [Coupling("cubic", 1, members, "diagonal")])
    assert float(answer["left"] ** 2) == pytest.approx(2 * float(answer["right"] ** 2))
    assert float(answer["left"] ** 2 * answer["right"]) == pytest.approx(8.1)


def test_channels_that_cannot_be_balanced_are_listed() -> None:
    model, _ = relu_classifier()
    with torch.no_grad():
        model[2].weight[:, 0] = 0
    answer = balance(model, chain(model))
    assert answer.frozen == {"0 → 2": "channel 0: the weight vanishes in what reads it: the least is at infinity"}
    assert torch.equal(answer["0.weight"][0], model[0].weight[0])
    assert answer.status is Status.CONVERGED
    lone = Coupling("lone", 3, (Member("4.bias", 0, torch.arange(3), torch.arange(3), 1.0),), "diagonal")
    assert "nothing reads it" in balance(model, [lone]).frozen["lone"]
    assert balance(model, []).residual == 0


def test_steps_that_do_not_suffice_and_broken_weights() -> None:
    model, _ = relu_classifier()
    with torch.no_grad():
        model[0].weight *= 1e6
    assert balance(model, chain(model), steps=1).status is Status.BUDGET
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        balance(model, chain(model))


# The flow ----------------------------------------------------------------------------------------------------------


def product(x: Tensor) -> Tensor:
    return (x[0] * x[1] - 1) ** 2


def test_flow_of_the_textbook_function() -> None:
    """T015: x₁ = e^θ, tanh θ(t) = 0.8 e^{−4t}, λ₁ = 4 cosh 2θ, d log λ₁/dt = −2w, w = (x₁² − x₂²)²/|x|²."""
    f = Objective.from_function(product, torch.tensor([3.0, 1 / 3], dtype=torch.float64))
    answer = flow(f, [entries("p", [0], [1])], 0.1, rtol=1e-10, sharpness_rtol=1e-10)
    assert float(answer.x[0]) == pytest.approx(1.820089175, rel=1e-8)
    assert answer.before.value == pytest.approx(18.22222222, rel=1e-8)
    assert answer.after.value == pytest.approx(7.229181857, rel=1e-8)
    assert float(answer.x[0] * answer.x[1]) == pytest.approx(1, abs=1e-14)
    for x, rate in zip((f.x, answer.x), answer.rates, strict=True):
        assert rate == pytest.approx(-2 * float((x[0] ** 2 - x[1] ** 2) ** 2 / (x @ x)), rel=1e-8)
    assert answer.status is Status.CONVERGED
    assert answer.times[0] == 0
    assert answer.times[-1] == 0.1
    assert list(answer.energies) == sorted(answer.energies, reverse=True)


def test_flow_of_monomials_ends_at_the_flat_minimum() -> None:
    """T033: ẋᵢ = −υ_n xᵢ Cᵢ, ẋ_n = x_n Σ υᵢ Cᵢ, Cᵢ = υ_n xᵢ² − υᵢ x_n²."""
    u = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    x = torch.tensor([0.9, 0.7, 0.0], dtype=torch.float64)
    x[2] = float(x[0] * x[1] ** 2) ** (-1 / 3)
    f = Objective.from_function(lambda y: ((y**u).prod() - 1) ** 2, x)
    couplings = [entries(str(i), [i], [2], (float(u[2]), float(u[i]))) for i in range(2)]
    C = u[2] * x[:2] ** 2 - u[:2] * x[2] ** 2
    short = flow(f, couplings, 1e-5)
    velocity = torch.cat([-u[2] * x[:2] * C, x[2:] * (u[:2] * C).sum()])
    torch.testing.assert_close((short.x - x) / 1e-5, velocity, rtol=1e-3, atol=1e-3)
    answer = flow(f, couplings, 20.0, sharpness_rtol=1e-10)
    torch.testing.assert_close(answer.x, torch.tensor([0.6769366, 0.9573330, 1.1724887]).double(), rtol=1e-6, atol=0)
    assert answer.after.value == pytest.approx(26.18696726, rel=1e-8)
    assert f.at(answer.x).value() < 1e-25


def test_flow_in_a_full_coupling_keeps_the_product_and_balances() -> None:
    X = torch.tensor([[2.0, 0.3], [0.1, 1.0], [0.0, 0.4]], dtype=torch.float64)
    Y = torch.tensor([[0.5, 0.2], [-0.3, 1.5]], dtype=torch.float64)
    f = Factorisation(X, Y).objective()
    # A reference: the same equation by many small steps of Euler on x.
    A, B = X.clone(), Y.clone()
    for _ in range(20_000):
        C = A.T @ A - B @ B.T
        A, B = A - 5e-6 * A @ C, B + 5e-6 * C @ B
    answer = flow(f, [full(2, "left", 1, "right", 0)], 0.1)
    left, right = f.layout.split(answer.x)
    torch.testing.assert_close(left, A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, B, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left @ right, X @ Y, rtol=1e-13, atol=1e-14)
    end = flow(f, [full(2, "left", 1, "right", 0)], 30.0)
    left, right = f.layout.split(end.x)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-6, atol=1e-7)


def test_flow_refuses_and_runs_out() -> None:
    f = Objective.from_function(product, torch.tensor([3.0, 1 / 3], dtype=torch.float64))
    with pytest.raises(UsageError, match="t=-1"):
        flow(f, [entries("p", [0], [1])], -1)
    with pytest.raises(UsageError, match="no coupling can be moved"):
        flow(f, [], 1.0)
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        assert flow(f, [entries("p", [0], [1])], 1.0, steps=2).status is Status.BUDGET
    still = flow(Objective.from_function(product, torch.ones(2).double()), [entries("p", [0], [1])], 1.0)
    assert still.x.tolist() == [1, 1]
