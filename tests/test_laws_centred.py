"""Laws about fixed means: |w|² + (b − μ)² − γ² of a layer with a bias before batch normalisation in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from law_count import draw_parameters, like
from orbits import hessian
from torch import Tensor, nn

import torchflat
from torchflat import Objective, Status
from torchflat.errors import UsageError
from torchflat.parameters import Layout
from torchflat.symmetry import Coupling, Group, Laws, Member, balance, flattest, flow, law_count, laws
from torchflat.symmetry.units import RULES

Function = Callable[..., Tensor]


def generic(model: nn.Module, seed: int = 0) -> nn.Module:
    """No gain is 1, no bias and no mean 0, what is normalised is rather on than off; in eval mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(p[0].numel(), 1) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.bias.abs_()
    return model


class Parts(nn.Module):
    """Modules by name, and a function of them and the input."""

    def __init__(self, function: Function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def chain(norm: nn.Module, bias: bool = True, activation: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), norm, activation or nn.ReLU(), nn.Linear(4, 2))


def parts(function: Function, **more: nn.Module) -> nn.Module:
    return Parts(function, a=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), out=nn.Linear(4, 2), **more)


def two_uses(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.out(m.norm(y).relu()) + m.other(y)


def two_means(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.out(m.norm(y).relu()) + m.other(m.last(y).relu())


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 5), nn.Flatten())
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(27, 2)),
    )


B = nn.BatchNorm1d
# Network, shape of a batch, and the laws: diagonal, centred, linear.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int, int]]] = {
    "plain": (lambda: chain(B(4)), (6, 3), (4, 4, 0)),
    # What a mean does to the output can only be made up for by β, and that conserves nothing.
    "without a bias": (lambda: chain(B(4), bias=False), (6, 3), (4, 0, 0)),
    # x − μ itself is what the next layer reads.
    "without gain and bias": (lambda: chain(B(4, affine=False)), (6, 3), (0, 4, 0)),
    # A matrix would have to commute with the variances.
    "linear throughout": (lambda: chain(B(4, affine=False), activation=nn.Identity()), (6, 3), (0, 4, 0)),
    "pinned behind": (lambda: chain(B(4), activation=nn.GELU()), (6, 3), (0, 4, 0)),
    # Statistics of the batch in eval mode too: b is conserved by itself.
    "without statistics": (lambda: chain(B(4, track_running_stats=False)), (6, 3), (4, 0, 4)),
    # The first one's β is a bias before the second one.
    "two in a row": (lambda: chain(nn.Sequential(B(4), B(4))), (6, 3), (4, 8, 0)),
    "two in a row, no bias": (lambda: chain(nn.Sequential(B(4), B(4)), bias=False), (6, 3), (4, 4, 0)),
    "conv": (conv, (4, 1, 5, 5), (2, 2, 0)),
    "conv transposed": (transposed, (4, 1, 4, 4), (2 + 3, 3, 0)),
    "last": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), B(2)), (6, 3), (4, 2, 0)),
    # Something else sees the scale of what is normalised, or another mean.
    "two uses": (lambda: parts(two_uses, other=nn.Linear(4, 2)), (6, 3), (4, 0, 2)),
    "two means": (lambda: parts(two_means, last=B(4), other=nn.Linear(4, 2)), (6, 3), (4 + 4, 0, 2)),
    "gelu between": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), *chain(B(4))[1:]), (6, 3), (4, 0, 0)),
    # A layer and its normalisation together, twice.
    "shared": (
        lambda: Parts(
            lambda m, x: m.out(m.norm(m.a(m.norm(m.a(x)).relu())).relu()),
            **{"a": nn.Linear(3, 3), "norm": B(3), "out": nn.Linear(3, 2)},
        ),
        (6, 3),
        (0, 3, 0),
    ),
    # One of two biases counts from the mean; their difference is conserved too.
    "sum": (
        lambda: parts(lambda m, x: m.out(m.norm(m.a(x) + m.b(x.abs())).relu()), b=nn.Linear(3, 4)),
        (6, 3),
        (4, 4, 4),
    ),
    "residual": (
        lambda: parts(lambda m, x: m.out(m.norm((y := m.a(x)) + m.b(y.relu())).relu()), b=nn.Linear(4, 4)),
        (6, 3),
        (4, 4, 0),
    ),
    "views": (
        lambda: parts(lambda m, x: m.out(m.norm(m.a(x.unflatten(1, (2, 3))).mT).relu().mean(-1))),
        (6, 6),
        (4, 4, 0),
    ),
}  # fmt: skip


def case(name: str) -> tuple[nn.Module, Tensor, Laws]:
    build, shape, _ = CASES[name]
    model = generic(build())
    example = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, example, laws(model, example)


@pytest.mark.parametrize("name", CASES)
def test_no_more_and_no_fewer_than_gradients_know(name: str) -> None:
    model, example, found = case(name)
    diagonal, centred, linear = CASES[name][2]
    assert found.count == {"diagonal": diagonal, "centred": centred, "full": 0, "linear": linear}
    assert not found.dropped and not found.unknown
    inputs = like(example)
    counted = law_count(model, inputs, parameters=partial(draw_parameters, copy.deepcopy(model), inputs), seed=1)
    assert counted.clear and counted.complete
    assert counted.count == diagonal + centred + linear


@pytest.mark.parametrize("name", CASES)
def test_the_action_keeps_the_function_and_the_buffers(name: str) -> None:
    model, example, found = case(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scales = {c.name: 2 * torch.rand(c.size, dtype=torch.float64) - 1 for c in found.couplings}
    state = found.act(model, scales)
    moved = copy.deepcopy(model)
    moved.load_state_dict(state)
    x = 2 * torch.randn_like(example)
    with torch.no_grad():
        torch.testing.assert_close(moved(x), model(x), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(before[name], state[name]) for name, _ in model.named_buffers())
    for coupling in (c for c in found.couplings if c.centres):
        assert all(not torch.equal(before[parameter], state[parameter]) for parameter in coupling.centres)


# One network, in closed form -----------------------------------------------------------------------------------------


def by_hand(state: Mapping[str, Tensor]) -> Tensor:
    w, b, mean, gain = (state[name] for name in ("0.weight", "0.bias", "1.running_mean", "1.weight"))
    return w.flatten(1).square().sum(1) + (b - mean).square() - gain.square()


@pytest.fixture
def network() -> tuple[nn.Module, Tensor, Laws]:
    return case("conv")


def classified(model: nn.Module, seed: int = 0) -> Objective:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 1, 5, 5, generator=generator, dtype=torch.float64)
    return Objective(model, nn.CrossEntropyLoss(), (rows, torch.randint(2, (20,), generator=generator)))


def elsewhere(f: Objective, found: Laws, seed: int, most: float = 1.0) -> tuple[Objective, Group, Tensor]:
    """The same function at another point of the orbit."""
    group = Group(found.couplings, f.layout, f.buffers)
    z = most * (2 * torch.rand(group.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)
    return f.at(group.move(f.x, z)), group, z


def test_the_law_is_the_one_written_out(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, _, found = network
    law = found["0 → 1"]
    assert law.centres == {"0.bias": "1.running_mean"} and law.named_kind == "centred" and law.kind == "diagonal"
    torch.testing.assert_close(law.value(model.state_dict()), by_hand(model.state_dict()).detach())
    torch.testing.assert_close(found.values(model)["0 → 1"], by_hand(model.state_dict()).detach())
    line = next(line for line in found.describe().splitlines() if line.startswith("0 → 1"))
    assert line.split(maxsplit=5)[3:] == ["centred", "2", "2     with 0.bias − 1.running_mean"]


def test_values_of_a_checkpoint_are_about_its_own_buffers(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, _, found = network
    other = generic(conv(), seed=5)
    torch.testing.assert_close(found.values(other.state_dict())["0 → 1"], by_hand(other.state_dict()).detach())
    drift = found.drift(model, other.state_dict())["0 → 1"]
    torch.testing.assert_close(drift, (by_hand(other.state_dict()) - by_hand(model.state_dict())).detach())
    with pytest.raises(UsageError, match=r"counts it from the buffer 1\.running_mean, which is missing"):
        found.values(dict(model.named_parameters()))
    # A direction has no centre.
    gradient = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    w, b, gain = gradient["0.weight"], gradient["0.bias"], gradient["1.weight"]
    expected = w.flatten(1).square().sum(1) + b.square() - gain.square()
    torch.testing.assert_close(found["0 → 1"].product(gradient, gradient), expected)


def test_gradients_are_orthogonal_about_the_mean_only(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, example, found = network
    model(example).square().sum().backward()
    assert all(residual <= 1e-12 for residual in found.residuals(model).values())
    tensors, slopes = model.state_dict(), {name: p.grad for name, p in model.named_parameters()}
    b, mean = tensors["0.bias"], tensors["1.running_mean"]
    others = (tensors["0.weight"] * slopes["0.weight"]).flatten(1).sum(1) - tensors["1.weight"] * slopes["1.weight"]
    assert float((others + (b - mean) * slopes["0.bias"]).abs().max()) <= 1e-10 * float(others.abs().max())
    assert float((others + b * slopes["0.bias"]).abs().min()) > 1e-2 * float(others.abs().min()) > 0


def test_small_steps_of_gradient_descent_conserve_it(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, example, found = network
    law, trained, length, steps = found["0 → 1"], copy.deepcopy(model), 1e-3, 500
    optimizer, second_order = torch.optim.SGD(trained.parameters(), lr=length), torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        trained(example).square().mean().backward()
        optimizer.step()
        gradient = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
        second_order += length**2 * law.product(gradient, gradient)
    # One step changes the law by length²·C(gradient), exactly; C of a direction has no centre.
    drift = found.drift(model, trained)["0 → 1"]
    torch.testing.assert_close(drift, second_order, rtol=1e-9, atol=1e-12)
    # Counted from 0 the bias would leave 2μ·(its change), which no shorter step makes smaller.
    old, new = (m.state_dict() for m in (model, trained))
    about_zero = drift + 2 * old["1.running_mean"] * (new["0.bias"] - old["0.bias"])
    assert float(drift.abs().max()) < 1e-2 * float(about_zero.abs().max())


def test_the_hessian_moves_by_congruence_of_the_linear_part(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, _, found = network
    f = classified(model)
    moved, group, z = elsewhere(f, found, seed=3)
    assert moved.value() == pytest.approx(f.value(), rel=1e-12)
    torch.testing.assert_close(
        moved.gradient(), group.act(f.gradient()[None], z, inverse=True)[0], rtol=1e-9, atol=1e-12
    )
    congruent = group.act(group.act(hessian(f), z, inverse=True).T, z, inverse=True)
    torch.testing.assert_close(hessian(moved), congruent, rtol=1e-8, atol=1e-9)
    predicted = float(torch.linalg.eigvalsh(congruent)[-1])
    assert torchflat.sharpness(moved, rtol=1e-8).value == pytest.approx(predicted, rel=1e-7)


def test_group_and_laws_act_and_count_alike(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, _, found = network
    f = classified(model)
    moved, group, z = elsewhere(f, found, seed=4)
    state = found.act(model, group.log_scales(z))
    torch.testing.assert_close(
        moved.x, f.layout.flatten([state[name] for name in f.layout.names]), rtol=1e-13, atol=1e-14
    )
    C = group.log_scales(group.imbalance(group.centred(moved.x)[None]))
    for name, value in found.values(state).items():
        torch.testing.assert_close(C[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(group.placed(group.centred(f.x)), f.x, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flattest_is_the_same_from_anywhere_in_the_orbit(dtype: torch.dtype) -> None:
    model, _, found = case("conv")
    f = classified(model.to(dtype))
    answers = [flattest(f, found, "gauss_newton", rtol=1e-3)]
    answers += [flattest(elsewhere(f, found, seed)[0], found, "gauss_newton", rtol=1e-3, seed=seed) for seed in (1, 2)]
    for answer in answers:
        assert answer.status is Status.CONVERGED and not answer.frozen
        assert answer.value == pytest.approx(answers[0].value, rel=2e-3)
        assert answer.lower is not None and answer.lower <= min(other.recomputed.upper for other in answers)
    assert answers[0].headroom > 1.01
    # The same parameters, up to what the bounds leave open, and not only the same number: outputs agree.
    for answer in answers:
        copied = copy.deepcopy(model)
        copied.load_state_dict({**model.state_dict(), **answer.state_dict})
        x = torch.randn(8, 1, 5, 5, dtype=dtype)
        with torch.no_grad():
            rtol = 1e-9 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(copied(x), model(x), rtol=rtol, atol=rtol)


def test_without_the_law_less_is_gained() -> None:
    model, _, found = case("conv")
    f = classified(model)
    # A filter that is too long for its gain.
    x, _, _ = elsewhere(f, found, seed=0)
    group = Group(found.couplings, f.layout, f.buffers)
    z = group.packed([torch.full((c.size,), 1.5 if c.centres else 0.0, dtype=torch.float64) for c in group.couplings])
    f = x.at(group.move(x.x, z))
    rest = [coupling for coupling in found.couplings if not coupling.centres]
    assert flattest(f, found, "gauss_newton").value < 0.8 * flattest(f, rest, "gauss_newton").value


def test_balance_finds_the_least_norm_about_the_mean(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, _, found = network
    answer = balance(model, found)
    assert answer.status is Status.CONVERGED
    assert float(by_hand(answer.state_dict).abs().max()) <= 1e-10
    assert all(torch.equal(answer[name], buffer) for name, buffer in model.named_buffers())
    # Every other point of the orbit is longer.
    f = classified(model)
    least = f.layout.flatten([answer[name] for name in f.layout.names])
    for seed in range(5):
        group = Group(found.couplings, f.layout, f.buffers)
        z = 0.1 * torch.randn(group.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert group.centred(group.move(least, z)).norm() > group.centred(least).norm()
    assert f.at(least).value() == pytest.approx(f.value(), rel=1e-12)
    assert answer.norm < answer.norm_before


def test_flow_descends_the_imbalance_about_the_mean(network: tuple[nn.Module, Tensor, Laws]) -> None:
    model, _, found = network
    f = classified(model)
    only = [found["0 → 1"]]

    def energy(x: Tensor) -> Tensor:
        state = dict(zip(f.layout.names, f.layout.split(x), strict=True)) | f.buffers
        return by_hand(state).square().sum() / 4

    slope = torch.func.grad(energy)(f.x)
    # ẋ = −∇c at the start, and c as it is computed from the parameters at the end.
    short = flow(f, only, 1e-6)
    torch.testing.assert_close((short.x - f.x) / 1e-6, -slope, rtol=1e-4, atol=1e-5)
    answer = flow(f, only, 0.5)
    assert answer.energies[0] == pytest.approx(float(energy(f.x)), rel=1e-12)
    assert answer.energies[-1] == pytest.approx(float(energy(answer.x)), rel=1e-9)
    assert answer.energies[-1] < 0.5 * answer.energies[0]
    assert f.at(answer.x).value() == pytest.approx(f.value(), rel=1e-10)
    # d log λ₁/dt by differences, at the start.
    step, tight = 1e-4, {"sharpness_rtol": 1e-10}
    nearby = flow(f, only, step, **tight)
    rate = (nearby.after.value / nearby.before.value - 1) / step
    assert nearby.rates[0] == pytest.approx(rate, rel=1e-2)


# What is dead, missing or inconsistent -------------------------------------------------------------------------------


def test_a_filter_is_dead_where_its_bias_is_at_the_mean() -> None:
    model, _, found = case("conv")
    f = classified(model)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0
    assert found.degenerate(model) == {}
    with torch.no_grad():
        model[0].bias[1] = model[1].running_mean[1]
    assert {name: channels.tolist() for name, channels in found.degenerate(model).items()} == {"0 → 1": [1]}
    dead = f.at(f.layout.flatten([model.get_parameter(name).detach() for name in f.layout.names]))
    answer = flattest(dead, found, "gauss_newton")
    assert answer.frozen["0 → 1"].startswith("channel 1: the weight vanishes in what writes it")
    assert float(answer.log_scales["0 → 1"][1]) == 0
    assert "0 → 1" in balance(model, found).frozen


def test_centres_that_are_missing_or_contradict_each_other() -> None:
    model, _, found = case("conv")
    f = classified(model)
    group = Group(found.couplings, f.layout)
    assert group.frozen == {"0 → 1": "1.running_mean, which it counts from, is not among the buffers of the objective"}
    one = torch.arange(1)
    pair = [
        Coupling(name, 1, (Member("a", 0, one, one, 1.0, centre), Member(name, 0, one, one, -1.0)), "diagonal")
        for name, centre in (("b", "mean"), ("c", None))
    ]
    layout = Layout(("a", "b", "c"), (torch.Size([1]),) * 3)
    with pytest.raises(UsageError, match="couplings disagree on the centre of a: mean and None"):
        Group(pair, layout, {"mean": torch.zeros(1)})


def test_frozen_parts_leave_other_laws() -> None:
    example = torch.randn(4, 1, 5, 5, dtype=torch.float64)

    def names(frozen: str) -> list[tuple[str, str]]:
        model = generic(conv())
        model.get_parameter(frozen).requires_grad_(False)
        return [(coupling.name, coupling.named_kind) for coupling in laws(model, example).couplings]

    assert names("0.bias") == [("1 → 3", "diagonal")]
    # What is normalised, and β with it, is read by what comes next.
    assert names("1.weight") == [("0, 1 → 3", "centred")]
    assert names("1.bias") == [("0 → 1", "centred")]


@pytest.mark.parametrize("operator", ["_native_batch_norm_legit_no_training", "convolution", "relu"])
def test_without_a_rule_there_are_fewer_laws_and_no_wrong_ones(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example, whole = case("conv")
    monkeypatch.delitem(RULES, operator)
    less = laws(model, example)
    assert any(name.split(".")[1] == operator for name in less.unknown.values())
    assert not less.dropped
    assert sum(less.count.values()) < sum(whole.count.values())
    assert all(less.count[kind] <= whole.count[kind] for kind in whole.count)
    model(example).square().sum().backward()
    assert all(residual <= 1e-10 for residual in less.residuals(model).values())


def test_batch_statistics_have_the_other_laws() -> None:
    model, example, _ = case("conv")
    found = laws(model, example, mode="train")
    assert found.count == {"diagonal": 2, "centred": 0, "full": 0, "linear": 2}
    assert [coupling.centres for coupling in found.approximate] == [{}]
