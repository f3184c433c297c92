"""The group moves x so that f stays, and the Hessian by congruence; log λ₁ is convex along it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbits import chain, entries, full, hessian, randomly_moved, relu_classifier
from torch import Tensor, nn

import torchflat
from torchflat import Objective
from torchflat.errors import UsageError
from torchflat.parameters import Layout
from torchflat.symmetry import Coupling, Group, Member


def random_z(group: Group, seed: int, most: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return most * (2 * torch.rand(group.size, generator=generator, dtype=torch.float64) - 1)


def awkward() -> tuple[Group, list[Coupling]]:
    """A convolution and entries without an axis, exponents that are not ±1, two couplings on one tensor, a full one."""
    layout = Layout(("conv", "head", "pair"), (torch.Size([3, 2, 2, 2]), torch.Size([4, 3]), torch.Size([2, 5])))
    three, two = torch.arange(3), torch.arange(2)
    couplings = [
        Coupling("a", 3, (Member("conv", 0, three, three, 1.0), Member("head", 1, three, three, -2.0)), "diagonal"),
        Coupling(
            "b",
            2,
            (
                Member("conv", -3, two, torch.tensor([1, 0]), 0.5),
                Member("pair", None, torch.tensor([[0, 7], [3, 8]]), two, -1.0),
            ),
            "diagonal",
        ),
        Coupling(
            "c",
            2,
            (
                Member("head", 0, torch.arange(4), torch.tensor([0, 1, 0, 1]), 1.0),
                Member("pair", None, torch.tensor([[1, 2], [4, 5]]), two, -1.0),
            ),
            "full",
        ),
    ]
    return Group(couplings, layout), couplings


def test_a_dense_matrix_of_exponents_acts_the_same() -> None:
    group, couplings = awkward()
    B = torch.zeros(group.layout.n, 5, dtype=torch.float64)
    flat = dict(zip(group.layout.names, group.layout.split(torch.arange(group.layout.n)), strict=True))
    column = 0
    for coupling in couplings[:2]:
        for member in coupling.members:
            for places, channel in zip(member.slices(flat[member.parameter]), member.channel, strict=True):
                B[places, column + int(channel)] += member.exponent
        column += coupling.size
    z = random_z(group, 0)
    z[5:] = 0
    v = torch.randn(3, group.layout.n, dtype=torch.float64)
    torch.testing.assert_close(group.act(v, z), v * (B @ z[:5]).exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(group.act(group.act(v, z), z, inverse=True), v, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(group.imbalance(v)[:5], B.T @ v.square().sum(0), rtol=1e-13, atol=1e-13)


def test_imbalance_is_what_the_couplings_conserve() -> None:
    group, couplings = awkward()
    v = torch.randn(group.layout.n, dtype=torch.float64)
    tensors = dict(zip(group.layout.names, group.layout.split(v), strict=True))
    for part, coupling in zip(group.matrices(group.imbalance(v[None])), couplings, strict=True):
        torch.testing.assert_close(part, coupling.value(tensors), rtol=1e-13, atol=1e-13)


def test_imbalance_pulled_back_is_the_gradient_of_the_squared_norm() -> None:
    group, _ = awkward()
    v = torch.randn(2, group.layout.n, dtype=torch.float64)
    z, direction = random_z(group, 1), random_z(group, 2)

    def norm(t: float) -> float:
        return float(group.act(v, z + t * direction, inverse=True).square().sum())

    slope = (norm(1e-5) - norm(-1e-5)) / 2e-5
    C = group.imbalance(group.act(v, z, inverse=True))
    assert -2 * float(group.pulled_back(C, z) @ direction) == pytest.approx(slope, rel=1e-7)


def test_full_couplings_act_by_the_exponential_of_S() -> None:
    group, _ = awkward()
    S = torch.tensor([[0.3, -0.7], [-0.7, 0.1]], dtype=torch.float64)
    z = group.packed([torch.zeros(3), torch.zeros(2), S])
    torch.testing.assert_close(group.matrices(z)[2], S)
    assert float(z.norm()) == pytest.approx(float(S.norm()))
    x = torch.randn(group.layout.n, dtype=torch.float64)
    before, after = (group.layout.split(y) for y in (x, group.act(x[None], z)[0]))
    G = torch.matrix_exp(S)
    torch.testing.assert_close(after[1], torch.cat([G @ before[1][:2], G @ before[1][2:]]))
    moved = torch.linalg.inv(G) @ before[2].reshape(-1)[torch.tensor([[1, 2], [4, 5]])]
    torch.testing.assert_close(after[2].reshape(-1)[torch.tensor([[1, 2], [4, 5]])], moved)
    assert torch.equal(after[2][1, 1:], before[2][1, 1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_network_computes_the_same_anywhere_in_its_orbit(dtype: torch.dtype, tolerance: float) -> None:
    model, (X, labels) = relu_classifier(dtype=dtype)
    f = Objective(model, nn.CrossEntropyLoss(), (X, labels))
    moved = randomly_moved(f, chain(model), seed=3)
    tensors = dict(zip(f.layout.names, f.layout.split(moved.x), strict=True))
    outputs, after = model(X).detach(), torch.func.functional_call(model, tensors, (X,)).detach()
    assert float((after - outputs).abs().max()) <= tolerance * float(outputs.abs().max())
    assert not torch.allclose(moved.x, f.x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_sharpness_of_the_moved_network_is_what_congruence_predicts(dtype: torch.dtype, tolerance: float) -> None:
    model, data = relu_classifier(seed=1, dtype=dtype)
    f = Objective(model, nn.CrossEntropyLoss(), data)
    group = Group(chain(model), f.layout)
    z = random_z(group, 5)
    moved = f.at(group.act(f.x[None], z)[0])
    congruent = group.act(group.act(hessian(f), z, inverse=True).T, z, inverse=True)
    predicted = float(torch.linalg.eigvalsh((congruent + congruent.T) / 2)[-1])
    assert torchflat.sharpness(moved, rtol=tolerance / 10).value == pytest.approx(predicted, rel=tolerance)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["diagonal", "full"]))
def test_log_sharpness_is_convex_along_the_orbit_where_the_matrix_is_semidefinite(seed: int, kind: str) -> None:
    model, data = relu_classifier(seed=seed % 7, widths=(3, 4, 3, 2))
    if kind == "full":
        model = nn.Sequential(*(layer for layer in model if isinstance(layer, nn.Linear)))
    f = Objective(model, nn.CrossEntropyLoss(), data).gauss_newton()
    group = Group(chain(model, kind), f.layout)
    start, direction = random_z(group, seed), random_z(group, seed + 1, 1.5)
    # In a full coupling geodesics are lines through the point that they start from.
    f = f.at(group.act(f.x[None], start)[0])
    H = hessian(f)

    def log_sharpness(t: float) -> float:
        moved = group.act(group.act(H, t * direction, inverse=True).T, t * direction, inverse=True)
        return math.log(float(torch.linalg.eigvalsh((moved + moved.T) / 2)[-1]))

    values = [log_sharpness(t) for t in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert all(values[i - 1] + values[i + 1] >= 2 * values[i] - 1e-9 for i in (1, 2, 3))


def test_what_cannot_be_moved_is_named() -> None:
    model, data = relu_classifier()
    f = Objective(model, nn.CrossEntropyLoss(), data, params=["2", "4"])
    one_sided = Coupling("lone", 3, (Member("4.bias", 0, torch.arange(3), torch.arange(3), 1.0),), "diagonal")
    group = Group([*chain(model), one_sided], f.layout)
    assert [coupling.name for coupling in group.couplings] == ["2 → 4"]
    assert group.frozen["0 → 2"].startswith("0.weight, 0.bias is not among the parameters")
    assert "at infinity" in group.frozen["lone"]


def test_channels_without_writers_or_readers_are_frozen() -> None:
    model, data = relu_classifier()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
        model[0].weight[4], model[0].bias[4] = 0, 0
        model[0].weight[2], model[0].bias[2], model[2].weight[:, 2] = 0, 0, 0
    f = Objective(model, nn.CrossEntropyLoss(), data)
    group = Group(chain(model), f.layout)
    group.freeze(f.x[None], "the weight")
    assert group.frozen["0 → 2"] == (
        "channel 2: the weight vanishes in what writes and what reads it; "
        "channel 4: the weight vanishes in what writes it: the least is at infinity; "
        "channel 1: the weight vanishes in what reads it: the least is at infinity"
    )
    C = group.imbalance(f.x[None])
    assert C[[1, 2, 4]].tolist() == [0, 0, 0]
    assert bool((C[[0, 3, 5]] != 0).all())


def test_a_coupling_of_another_model_is_refused() -> None:
    layout = Layout(("a", "b"), (torch.Size([2]), torch.Size([3])))
    rows = torch.arange(3)
    members = Member("a", 0, rows, rows, 1.0), Member("b", 0, rows, rows, -1.0)
    with pytest.raises(UsageError, match="does not fit a of shape"):
        Group([Coupling("a → b", 3, members, "diagonal")], layout)


# The Gauss–Newton matrix -------------------------------------------------------------------------------------------


def dense_gauss_newton(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], f: Objective) -> Tensor:
    X, target = data

    def output(x: Tensor) -> Tensor:
        named = dict(zip(f.layout.names, f.layout.split(x), strict=True))
        return torch.func.functional_call(model, named, (X,)).reshape(-1)

    o = output(f.x)
    H = torch.func.hessian(lambda o: loss(o.view(len(X), -1), target))(o)
    J = torch.func.jacrev(output)(f.x)
    return J.T @ H @ J


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
@pytest.mark.parametrize("microbatch", [None, 7])
def test_gauss_newton_products(loss: nn.Module, microbatch: int | None) -> None:
    model, (X, labels) = relu_classifier()
    target = labels if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(24, 3, dtype=torch.float64)
    f = Objective(model, loss, (X, target), microbatch=microbatch)
    g = f.gauss_newton()
    expected = dense_gauss_newton(model, loss, (X, target), f)
    torch.testing.assert_close(hessian(g), expected, rtol=1e-10, atol=1e-13)
    assert g.value() == pytest.approx(f.value())
    assert float((hessian(f) - expected).abs().max()) > 1e-3
    y = f.x + 0.1
    moved = dense_gauss_newton(model, loss, (X, target), f.at(y))
    torch.testing.assert_close(hessian(g.at(y)), moved, rtol=1e-10, atol=1e-13)
    assert f.cost.products >= 2 * f.n


def test_gauss_newton_of_a_linear_network_is_the_hessian_and_keeps_the_decay() -> None:
    X, Y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    f = Objective(nn.Linear(4, 2).double(), nn.MSELoss(), (X, Y), weight_decay=0.5)
    torch.testing.assert_close(hessian(f.gauss_newton()), hessian(f), rtol=1e-12, atol=1e-13)


def test_gauss_newton_in_single_precision_knows_its_rounding() -> None:
    model, data = relu_classifier(dtype=torch.float32)
    g = Objective(model, nn.CrossEntropyLoss(), data).gauss_newton()
    v = torch.randn(1, g.n)
    assert 0 < g.rounding_error(v) < 1e-4
    assert "products are those of the Gauss–Newton matrix" in g.provenance()["notes"]


def test_gauss_newton_needs_an_output_and_a_loss() -> None:
    f = Objective.from_function(lambda x: (x * x).sum(), torch.ones(2))
    with pytest.raises(UsageError, match="needs a model and loss"):
        f.gauss_newton()
    model, data = relu_classifier()
    f = Objective(model, None, data, batch_loss=lambda m, b: (nn.functional.cross_entropy(m(b[0]), b[1]), len(b[0])))
    with pytest.raises(UsageError, match="curvature='hessian'"):
        f.gauss_newton()


def test_entries_of_a_function() -> None:
    layout = Layout(("x",), (torch.Size([3]),))
    group = Group([entries("first", [0, 1], [2, 2])], layout)
    moved = group.act(torch.ones(1, 3, dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(moved[0], torch.tensor([0.5, 0.25, -0.75], dtype=torch.float64).exp())
    assert full(2, "a", 1, "b", 0).laws == 3
