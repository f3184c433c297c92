"""λ₁★ in closed form, against brute force, from several starts, and where there is little to be had."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbits import chain, entries, full, hessian, randomly_moved, relu_classifier
from scipy.optimize import minimize
from torch import Tensor, nn

from torchflat import Objective, Status
from torchflat.errors import UsageError
from torchflat.problems import DeepLinear, Factorisation
from torchflat.spectrum import NotConvergedWarning
from torchflat.symmetry import Coupling, Flattest, Group, Member, flattest
from torchflat.symmetry.lower_model import LowerModel


def holds(answer: Flattest, least: float, rtol: float) -> None:
    """The least is attained to ``rtol``, and both bounds are."""
    assert answer.status is Status.CONVERGED
    assert answer.value == pytest.approx(least, rel=rtol)
    assert answer.lower is not None
    assert answer.lower <= least * (1 + 1e-12)
    assert answer.lower >= least * (1 - 2 * rtol)
    assert answer.recomputed.upper >= least * (1 - 1e-12)


# Closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "r", "n"), [(3, 2, 2), (4, 3, 5), (5, 5, 5), (3, 6, 4)])
def test_factorisations(m: int, r: int, n: int) -> None:
    generator = torch.Generator().manual_seed(10 * m + r)
    X = torch.randn(m, r, generator=generator, dtype=torch.float64)
    Y = torch.randn(r, n, generator=generator, dtype=torch.float64)
    f = Factorisation(X, Y).objective()
    answer = flattest(f, [full(r, "left", 1, "right", 0)], rtol=1e-6)
    holds(answer, 2 * float(torch.linalg.matrix_norm(X @ Y, 2)), 1e-6)
    assert answer.proof == "semidefinite"
    after = answer.state_dict
    torch.testing.assert_close(after["left"] @ after["right"], X @ Y, rtol=1e-10, atol=1e-10)
    S = answer.log_scales["full"]
    torch.testing.assert_close(after["left"], X @ torch.matrix_exp(S), rtol=1e-9, atol=1e-9)


def deep_linear(problem: DeepLinear) -> Objective:
    model = nn.Sequential(*[nn.Linear(*w.T.shape, bias=False, dtype=torch.float64) for w in problem.weights])
    for layer, weight in zip(model, problem.weights, strict=True):
        layer.weight.data.copy_(weight)

    def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        return ((model(batch[0]) - batch[1]) ** 2).sum(), float(len(batch[0]))

    data = [(problem.inputs, problem.inputs @ problem.product().T)]
    return Objective(model, None, data, batch_loss=squares)


@pytest.mark.parametrize("widths", [(3, 4, 3), (3, 5, 4, 3), (2, 3, 4, 3, 2)])
def test_deep_linear_networks(widths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(widths))
    shapes = [(b, a) for a, b in itertools.pairwise(widths)]
    weights = tuple(torch.randn(s, generator=generator, dtype=torch.float64) / s[1] ** 0.5 for s in shapes)
    problem = DeepLinear.white(weights)
    couplings = [full(w, f"{k}.weight", 0, f"{k + 1}.weight", 1, str(k)) for k, w in enumerate(widths[1:-1])]
    least = problem.least_sharpness()
    assert least is not None
    holds(flattest(deep_linear(problem), couplings, rtol=1e-5), least, 1e-5)


@pytest.mark.parametrize(("powers", "printed"), [((1, 2), 9.524406312), ((1, 2, 3), 26.18696726)])
def test_monomials(powers: tuple[int, ...], printed: float) -> None:
    """T032: f = (x^υ − 1)² has the least λ₁ 2|υ|₁(Πυ^υ)^{1/|υ|₁}."""
    u = torch.tensor(powers, dtype=torch.float64)
    x = torch.linspace(0.6, 1.5, len(u), dtype=torch.float64)
    x[-1] = float((x[:-1] ** u[:-1]).prod()) ** (-1 / powers[-1])
    f = Objective.from_function(lambda y: ((y**u).prod() - 1) ** 2, x)
    last = len(u) - 1
    couplings = [entries(str(i), [i], [last], (1 / powers[i], 1 / powers[last])) for i in range(last)]
    answer = flattest(f, couplings, rtol=1e-6)
    least = 2 * float(u.sum()) * float((u**u).prod()) ** (1 / float(u.sum()))
    assert least == pytest.approx(printed, rel=1e-9)
    holds(answer, least, 1e-6)
    expected = u.sqrt() / float((u**u).prod()) ** (1 / (2 * float(u.sum())))
    torch.testing.assert_close(answer.state_dict["x"], expected, rtol=1e-4, atol=0)


def test_scalar_chain() -> None:
    """T057: 2mσ̂²|τ|^{2(1−1/m)} with m = 3, σ̂² = 1.7, τ = −2.5."""
    problem = DeepLinear.chain((-2.0, 1.25, 1.0), second_moment=1.7)
    rows = torch.arange(1)
    couplings = [
        Coupling(
            str(k),
            1,
            (Member(f"{k}.weight", 0, rows, rows, 1.0), Member(f"{k + 1}.weight", 1, rows, rows, -1.0)),
            "diagonal",
        )
        for k in range(2)
    ]
    least = problem.least_sharpness()
    assert least == pytest.approx(34.60882461, rel=1e-9)
    holds(flattest(deep_linear(problem), couplings, rtol=1e-6), least, 1e-6)


def kink(x: Tensor) -> Tensor:
    """T018: ½det(x₁,x₂)² + ½det(x₁,x₃)² + ⅛(det(x₂,x₃) − 1)², invariant under diag(s, 1/s)."""

    def det(a: Tensor, b: Tensor) -> Tensor:
        return a[0] * b[1] - a[1] * b[0]

    a, b, c = x.view(3, 2)
    return 0.5 * det(a, b) ** 2 + 0.5 * det(a, c) ** 2 + (det(b, c) - 1) ** 2 / 8


def test_a_multiple_eigenvalue_needs_a_mixture() -> None:
    """λ₁ = max(s², 1/s²) for s ≠ 1: at the least, 1, C is ±1 at the limits of single top eigenvectors."""
    x = torch.tensor([0.0, 0.0, 1.7, 0.0, 0.0, 1 / 1.7], dtype=torch.float64)
    channel = torch.zeros(3, dtype=torch.int64)
    members = [Member("x", None, torch.tensor([[i], [i + 2], [i + 4]]), channel, (-1.0) ** i) for i in (0, 1)]
    answer = flattest(Objective.from_function(kink, x), [Coupling("s", 1, tuple(members), "diagonal")], rtol=1e-5)
    holds(answer, 1.0, 1e-5)
    certificate = answer.certificate
    assert len(certificate.weights) == 2
    assert certificate.residual < 1e-2
    C = [float(v[0::2].square().sum() - v[1::2].square().sum()) for v in certificate.vectors]
    assert sum(w * c for w, c in zip(certificate.weights, C, strict=True)) == pytest.approx(0, abs=1e-2)
    torch.testing.assert_close(certificate.vectors.norm(dim=1), torch.ones(2).double())


# Brute force -------------------------------------------------------------------------------------------------------


def pairs(A: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """½|A(u∘v) − b|² with b so that it is zero at x = (u, v): a positive semidefinite Hessian, of any rank."""
    k = len(x) // 2
    b = A @ (x[:k] * x[k:])
    return lambda y: 0.5 * ((A @ (y[:k] * y[k:]) - b) ** 2).sum()


def least_by_brute_force(H: Tensor, group: Group) -> float:
    """Minimise log λ₁ by scipy on the smoothed maximum, with rising powers."""

    def log_norm(z: np.ndarray, power: float) -> float:
        moved = group.act(group.act(H, torch.from_numpy(z), inverse=True).T, torch.from_numpy(z), inverse=True)
        values = torch.linalg.eigvalsh((moved + moved.T) / 2).clamp(min=0)
        return math.log(values[-1]) + math.log(((values / values[-1]) ** power).sum()) / power

    z = np.zeros(group.size)
    for power in (10.0, 100.0, 1000.0, 10_000.0):
        z = minimize(log_norm, z, args=(power,), method="BFGS", options={"gtol": 1e-9, "maxiter": 500}).x
    return math.exp(log_norm(z, 1e6))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4), rows=st.integers(1, 5))
def test_both_bounds_against_brute_force(seed: int, k: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    x = torch.rand(2 * k, generator=generator, dtype=torch.float64) + 0.3
    f = Objective.from_function(pairs(A, x), x)
    couplings = [entries("u → v", list(range(k)), list(range(k, 2 * k)))]
    answer = flattest(f, couplings, rtol=1e-3)
    least = least_by_brute_force(hessian(f), Group(couplings, f.layout))
    assert answer.status is Status.CONVERGED
    assert answer.lower is not None
    assert answer.lower <= least * (1 + 1e-6)
    assert least * (1 - 1e-6) <= answer.recomputed.upper
    assert answer.recomputed.upper <= least * (1 + 1e-3)


def test_the_bound_holds_whatever_the_point_that_it_comes_from() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    x = torch.rand(8, generator=generator, dtype=torch.float64) + 0.3
    f = Objective.from_function(pairs(A, x), x)
    group = Group([entries("u → v", [0, 1, 2, 3], [4, 5, 6, 7])], f.layout)
    least = least_by_brute_force(hessian(f), group)
    model = LowerModel(group, f.dtype, f.device, definite=True, magnitude=False)
    basis = torch.eye(8, dtype=torch.float64)
    model.add(basis[:5], f.products(basis[:5]), group.identity(), 1.0)
    model.add(basis[5:], f.products(basis[5:]), group.identity(), 1.0)
    torch.testing.assert_close(model.rows.T @ model.rows, hessian(f), rtol=1e-10, atol=1e-12)
    for seed in range(20):
        z = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for power in (3.0, 300.0):
            assert model.bound(z, power, 8.0) <= least * (1 + 1e-9)


def test_gradient_of_the_smoothed_sharpness() -> None:
    model, data = relu_classifier(widths=(3, 4, 3))
    for kind, definite in (("diagonal", True), ("full", True), ("diagonal", False)):
        f = Objective(model, nn.CrossEntropyLoss(), data)
        f = f.gauss_newton() if definite else f
        group = Group(chain(model, kind), f.layout)
        lower = LowerModel(group, f.dtype, f.device, definite, magnitude=False)
        basis = torch.randn(9, f.n, dtype=torch.float64)
        lower.add(basis, f.products(basis), group.identity(), 10.0)
        z, step = 0.3 * torch.randn(group.size).double(), torch.randn(group.size).double()
        rise = lower.smoothed(z + 1e-6 * step, 20.0).value - lower.smoothed(z - 1e-6 * step, 20.0).value
        assert float(lower.smoothed(z, 20.0).gradient @ step) == pytest.approx(rise / 2e-6, rel=1e-5)


# Networks ----------------------------------------------------------------------------------------------------------


def test_gauss_newton_of_a_network_from_several_starts() -> None:
    model, data = relu_classifier(seed=2)
    f = Objective(model, nn.CrossEntropyLoss(), data)
    answers = [flattest(f, chain(model), "gauss_newton")]
    answers += [flattest(randomly_moved(f, chain(model), s), chain(model), "gauss_newton", seed=s) for s in (1, 2)]
    least = least_by_brute_force(hessian(f.gauss_newton()), Group(chain(model), f.layout))
    for answer in answers:
        assert answer.status is Status.CONVERGED
        assert answer.proof == "gauss_newton"
        assert answer.gap <= 0.01
        assert answer.lower is not None
        assert answer.lower <= least * (1 + 1e-6) <= answer.recomputed.upper * (1 + 2e-6)
        assert answer.headroom == pytest.approx(answer.before.value / answer.value)
        assert answer.certificate.residual < 0.05
        assert sum(answer.certificate.weights) == pytest.approx(1, abs=1e-4)


def test_the_hessian_of_a_network_is_not_certified_but_flattened() -> None:
    model, data = relu_classifier(seed=3)
    f = Objective(model, nn.CrossEntropyLoss(), data)
    first = flattest(f, chain(model))
    assert first.status is Status.UNCERTIFIED
    assert first.lower is None
    assert first.proof is None
    assert first.negative < 0
    assert first.to_dict()["lower"] is None
    others = [flattest(randomly_moved(f, chain(model), seed=s), chain(model), seed=s).value for s in (1, 2, 3)]
    assert others == pytest.approx([first.value] * 3, rel=0.01)
    # The state_dict has that sharpness, and the network still computes the same.
    model.load_state_dict(dict(first.state_dict), strict=False)
    g = Objective(model, nn.CrossEntropyLoss(), data)
    assert g.value() == pytest.approx(f.value(), rel=1e-12)
    assert float(torch.linalg.eigvalsh(hessian(g))[-1]) == pytest.approx(first.value, rel=1e-3)
    assert first.value < float(torch.linalg.eigvalsh(hessian(f))[-1])


def test_spectral_norm_where_the_negative_part_is_the_larger() -> None:
    def f(x: Tensor) -> Tensor:
        return -2 * (x[0] * x[1] - 1) ** 2 + x[2] ** 2 / 2

    x = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    answer = flattest(Objective.from_function(f, x), [entries("p", [0], [1])], spectral="norm", rtol=1e-4)
    assert answer.value == pytest.approx(8.0, rel=1e-4)
    assert answer.lower is None


def test_dead_units_and_zero_rows_are_listed_and_left_alone() -> None:
    model, data = relu_classifier(seed=4)
    with torch.no_grad():
        model[0].bias[1] = -100.0
        model[2].weight[:, 3] = 0
    f = Objective(model, nn.CrossEntropyLoss(), data)
    answer = flattest(f, chain(model), "gauss_newton")
    assert "channel 1: the curvature vanishes in what writes and what reads it" in answer.frozen["0 → 2"]
    assert "channel 3: the weight vanishes in what reads it: the least is at infinity" in answer.frozen["0 → 2"]
    assert answer.log_scales["0 → 2"][[1, 3]].tolist() == [0, 0]
    assert answer.status is Status.CONVERGED
    assert answer.attained


def test_nothing_to_move() -> None:
    model, data = relu_classifier()
    f = Objective(model, nn.CrossEntropyLoss(), data, params=["4"])
    answer = flattest(f, chain(model), "gauss_newton")
    assert answer.headroom == pytest.approx(1, abs=0.02)
    assert answer.state_dict["4.weight"].equal(model[4].weight)
    assert set(answer.frozen) == {"0 → 2", "2 → 4"}
    assert answer.lower is not None
    flat = flattest(Objective.from_function(lambda x: 0 * x.sum(), torch.ones(2).double()), [entries("p", [0], [1])])
    assert flat.value == 0
    assert torch.equal(flat.state_dict["x"], torch.ones(2).double())


def test_log_scales_stay_in_the_box() -> None:
    x = torch.tensor([100.0, 0.01], dtype=torch.float64)
    f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, x)
    answer = flattest(f, [entries("p", [0], [1])], max_log_scale=1.0)
    assert answer.log_scales["p"].tolist() == pytest.approx([-1.0])
    assert not answer.attained
    assert answer.value == pytest.approx(2 * ((100 / math.e) ** 2 + (0.01 * math.e) ** 2), rel=1e-6)
    assert answer.status is Status.CONVERGED
    assert answer.lower is not None
    assert answer.lower <= answer.value


def test_the_same_seed_gives_the_same_answer_and_the_objective_is_left_alone() -> None:
    model, data = relu_classifier(seed=5)
    f = Objective(model, nn.CrossEntropyLoss(), data)
    x = f.x
    first, second = flattest(f, chain(model)), flattest(f, chain(model))
    assert first.value == second.value
    assert torch.equal(f.x, x)
    assert f.memory.vectors == f.x.nbytes


def test_a_spent_budget_says_so() -> None:
    model, data = relu_classifier(seed=2)
    f = Objective(model, nn.CrossEntropyLoss(), data)
    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        answer = flattest(f, chain(model), "gauss_newton", rtol=1e-9, budget=10)
    assert answer.status is Status.BUDGET
    assert answer.lower is not None
    assert answer.lower <= answer.recomputed.upper


def test_a_callback_sees_each_round_and_can_end_the_search() -> None:
    model, data = relu_classifier(seed=2)
    f = Objective(model, nn.CrossEntropyLoss(), data)
    seen: list[dict[str, float]] = []

    def stop(known: dict[str, float]) -> bool:
        seen.append(known)
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        flattest(f, chain(model), "gauss_newton", rtol=1e-5, callback=stop)
    assert len(seen) == 1
    assert set(seen[0]) == {"products", "gradients", "value", "model", "log_scale"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "fisher"}, "curvature='fisher'"),
        ({"spectral": "trace"}, "spectral='trace'"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"max_log_scale": 0.0}, "max_log_scale=0.0"),
        ({"budget": 0.0}, "budget=0.0"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, float], message: str) -> None:
    f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, torch.tensor([2.0, 0.5]).double())
    with pytest.raises(UsageError, match=message):
        flattest(f, [entries("p", [0], [1])], **options)  # type: ignore[arg-type]


def test_decay_and_wrong_couplings_are_refused() -> None:
    x = torch.tensor([2.0, 0.5], dtype=torch.float64)
    f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, x, weight_decay=0.1)
    with pytest.raises(UsageError, match=r"weight_decay=0\.1"):
        flattest(f, [entries("p", [0], [1])])
    f = Objective.from_function(lambda x: (x[0] * x[1] ** 2 - 1) ** 2 + 0.1 * x[0] ** 2, x)
    with pytest.raises(UsageError, match="do not leave f unchanged"):
        flattest(f, [entries("p", [0], [1])])
