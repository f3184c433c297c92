"""Laws of networks: counts against the null space of gradients, action, verification, and the table of rules."""

from __future__ import annotations

import copy
import functools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from symmetric_networks import SMALL, Small
from torch import Tensor, nn
from torch.func import functional_call

from torchflat.errors import UsageError
from torchflat.symmetry import Laws, laws
from torchflat.symmetry.units import RULES


def _doubled(case: Small) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    return case.build().double(), case.example()


@functools.cache
def _laws(case: Small) -> Laws:
    return laws(*_doubled(case))


def _gradients(model: nn.Module, example: Tensor, number: int, seed: int = 0) -> Tensor:
    """Rows are gradients of random linear functions of outputs, inputs at three scales."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(number):
        if example.is_floating_point():
            scale = 4.0 ** (i % 3 - 1)
            x = scale * torch.randn(example.shape, generator=generator, dtype=torch.float64)
        else:
            x = torch.randint(0, int(example.max()) + 1, example.shape, generator=generator)
        out = functional_call(model, dict(model.named_parameters()), x)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad((out * cotangent).sum(), list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def _nullity(rows: Tensor) -> int:
    """Dimension of the null space, with a gap of 1e4 in the singular values, or the test says so."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    values = torch.linalg.svdvals(rows)
    values = torch.cat([values, values.new_zeros(rows.shape[1] - len(values))]) / values[0]
    rank = int((values > 1e-9).sum())
    assert rank == 0 or rank == len(values) or values[rank - 1] > 1e4 * values[rank], values[rank - 2 : rank + 2]
    return rows.shape[1] - rank


def _diagonal_directions(model: nn.Module, found: Laws) -> Tensor:
    """The field Aθ/θ of each diagonal coupling, one column per channel, with the diagonals of full ones."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    columns = []
    for coupling in found.couplings:
        for channel in range(coupling.size):
            z = torch.zeros(coupling.size, dtype=torch.float64)
            z[channel] = 1e-3
            scale = z if coupling.kind == "diagonal" else torch.diag(z)
            ones = {name: torch.ones_like(p) for name, p in parameters.items()}
            moved = found.moved(ones, {coupling.name: scale}) if coupling.kind == "diagonal" else None
            if moved is None:
                single = {m.parameter for m in coupling.members}
                moved = dict(ones)
                for name in single:
                    logs = torch.zeros_like(parameters[name])
                    for m in coupling.members:
                        if m.parameter == name:
                            rows = m.slices(torch.zeros_like(logs)) + (m.exponent * z[m.channel])[:, None]
                            logs = logs + m.with_slices(torch.zeros_like(logs), rows)
                    moved[name] = logs.exp()
            columns.append(torch.cat([moved[name].log().reshape(-1) for name in parameters]) / 1e-3)
    return torch.stack(columns, 1) if columns else torch.zeros(sum(map(torch.numel, parameters.values())), 0).double()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_diagonal_laws_are_the_null_space_of_sampled_gradients(case: Small) -> None:
    (model, example), found = _doubled(case), _laws(case)
    assert not found.dropped and not found.unknown
    directions = _diagonal_directions(model, found)
    n = directions.shape[0]
    rank = int(torch.linalg.matrix_rank(directions)) if directions.shape[1] else 0
    assert rank == directions.shape[1], "the laws found are independent"
    weighted, rows = [], []
    # Several points: at one, more directions are orthogonal to all gradients than those of laws.
    for seed in range(8):
        _jitter(model)
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        rows.append(_gradients(model, example, n // 4 + 20, seed))
        weighted.append(rows[-1] * theta)
    gradients, both = torch.cat(rows), torch.cat(weighted)
    if rank:
        assert float((both @ directions).abs().max()) <= 1e-9 * float(both.abs().sum(1).max())
    # An entry that no gradient moves conserves its own square: key biases.
    silent = int((gradients.abs().max(0).values < 1e-12 * gradients.abs().max()).sum())
    assert _nullity(both) == rank + silent


def _jitter(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.8)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_linear_laws_are_the_common_null_space_of_gradients(case: Small) -> None:
    (model, example), found = _doubled(case), _laws(case)
    size = sum(p.numel() for p in model.parameters())
    # Several points, because what is orthogonal to all gradients at one point need not be so at the next.
    rows = []
    for seed in range(4):
        _jitter(model)
        rows.append(_gradients(model, example, size // 2 + 20, seed))
    assert found.count["linear"] == _nullity(torch.cat(rows))


@pytest.mark.parametrize("case", SMALL, ids=str)
@torch.no_grad()
def test_the_action_keeps_the_function(case: Small) -> None:
    (model, example), found = _doubled(case), _laws(case)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x = torch.randn_like(example) if example.is_floating_point() else example
    out = model.eval()(x)
    scales = {}
    for coupling in found.couplings:
        z = 2 * torch.rand(coupling.size, coupling.size, dtype=torch.float64) - 1
        scales[coupling.name] = z[0] if coupling.kind == "diagonal" else (z + z.T) / 2
    state = found.act(model, scales)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    moved = copy.deepcopy(model)
    moved.load_state_dict(state)
    assert float((moved(x) - out).abs().max() / out.abs().max()) <= 1e-9
    if found.couplings:
        assert any(not torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_expected_counts(case: Small) -> None:
    found = _laws(case)
    assert (found.count["diagonal"], found.count["full"], found.count["linear"]) == case.counts


# Each rule is exercised by one of the small networks; those below by one of their own.
USED = [
    ("linear", "mlp"), ("relu", "mlp"), ("leaky_relu", "mlp"), ("convolution", "lenet"), ("view", "lenet"),
    ("max_pool2d_with_indices", "lenet"), ("add", "residual"), ("mean", "residual"), ("cat", "concatenated"),
    ("_native_batch_norm_legit_no_training", "residual"), ("mul", "concatenated"), ("split_with_sizes", "concatenated"),
    ("layer_norm", "attention"), ("scaled_dot_product_attention", "attention"), ("permute", "attention"),
    ("embedding", "tied"), ("mm", "functional 0"), ("bmm", "functional 1"), ("pow", "functional 0"),
    ("where", "functional 4"), ("slice", "functional 4"), ("unsqueeze", "recurrent"), ("rms_norm", "decoder"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "network"), USED)
def test_without_a_rule_there_are_fewer_laws_and_no_wrong_ones(
    operator: str, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = _doubled(next(case for case in SMALL if case.name == network))
    whole = _laws(next(case for case in SMALL if case.name == network))
    monkeypatch.delitem(RULES, operator)
    less = laws(model, example)
    assert any(name.split(".")[1] == operator for name in less.unknown.values())
    assert not less.dropped
    assert sum(less.count.values()) < sum(whole.count.values())
    assert all(less.count[kind] <= whole.count[kind] for kind in ("diagonal", "linear"))


ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.Identity, nn.GELU, nn.Sigmoid, nn.ELU, nn.ReLU6]


@st.composite
def random_networks(draw: st.DrawFn) -> nn.Module:
    """Chains of layers, some of them with a skip or a product around them."""
    width = draw(st.integers(2, 4))
    layers: list[nn.Module] = [nn.Linear(3, width, bias=draw(st.booleans()))]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "skip", "gate", "norm", "shared"]))
        inner = nn.Sequential(draw(st.sampled_from(ACTIVATIONS))(), nn.Linear(width, width, bias=draw(st.booleans())))
        if kind == "skip":
            layers.append(_Around(inner, torch.add))
        elif kind == "gate":
            layers.append(_Around(inner, torch.mul))
        elif kind == "norm":
            layers += [draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d]))(width), inner]
        elif kind == "shared" and len(layers) > 1:
            layers.append(layers[-1])
        else:
            layers.append(inner)
    layers.append(nn.Linear(width, 2))
    return nn.Sequential(*layers)


class _Around(nn.Module):
    def __init__(self, inside: nn.Module, join: object) -> None:
        super().__init__()
        self.inside, self.join = inside, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.inside(x))  # type: ignore[operator]


@given(random_networks(), st.sampled_from(["eval", "train"]), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_no_gradient_contradicts_a_law_of_a_random_network(model: nn.Module, mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    found = laws(model, torch.randn(5, 3), mode=mode)  # type: ignore[arg-type]
    assert not found.dropped and not found.unknown
    model = model.double().train(mode == "train")
    for scale in (0.1, 1.0, 10.0):
        (model(scale * torch.randn(5, 3, dtype=torch.float64)) ** 3).mean().backward()
        assert all(residual <= 1e-8 for residual in found.residuals(model).values())


def test_linear_laws_of_cross_entropy() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    found = laws(model, torch.randn(2, 3), loss=F.cross_entropy)
    assert found.count == {"diagonal": 4, "centred": 0, "full": 0, "linear": 4 + 1}
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3)), torch.randint(0, 5, (8,))).backward()
        optimizer.step()
    drift = found.drift(before, model)
    # Linear laws survive steps of any size, quadratic ones only small steps.
    assert all(float(drift[law.name].abs().max()) < 1e-5 for law in found.linear)
    assert max(float(drift[c.name].abs().max()) for c in found.couplings) > 1e-3


def test_batch_norm_in_training_frees_what_comes_before_it_as_epsilon_goes() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    found = laws(model, torch.randn(4, 2, 6, 6), mode="train")
    assert found.count == {"diagonal": 3, "centred": 0, "full": 0, "linear": 3}
    (scale,) = found.approximate
    assert scale.name == "0" and scale.size == 3 and 1e-8 < found.measured["0"] < 0.1


def test_an_operator_without_a_rule_is_named_and_pins() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.special.bessel_j0(self.b(self.a(x).relu())))

    found = laws(Odd(), torch.randn(2, 3))
    assert list(found.unknown.values()) == ["aten.special_bessel_j0"]
    assert [c.name for c in found.couplings] == ["a → b"]
    assert "no rule for aten.special_bessel_j0" in found.describe()


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    laws(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), mode="train")
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() is torch.float32
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_frozen_parameters_are_constants() -> None:
    model = mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    mlp[0].requires_grad_(False)
    assert [c.name for c in laws(model, torch.randn(2, 3)).couplings] == ["2 → 4"]


def test_laws_from_a_group() -> None:
    B = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    found = Laws.from_group(B=B, names=["a", "b"])
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert {k: v.tolist() for k, v in found.values(x).items()} == {"a": [2.0 - 4.0], "b": [4.0 - 9.0]}
    z = torch.tensor([0.3, -0.7], dtype=torch.float64)
    torch.testing.assert_close(found.moved({"x": x}, z)["x"], x * (B @ z).exp())
    writers, readers = torch.arange(4).view(2, 2), torch.arange(4, 8).view(2, 2)
    block = Laws.from_group(blocks=[(writers, readers)])
    x = torch.randn(8, dtype=torch.float64)
    X, Y = x[:4].view(2, 2), x[4:].view(2, 2)
    torch.testing.assert_close(block.values(x)["law 1"], X @ X.T - Y @ Y.T)
    S = torch.tensor([[0.1, 0.4], [0.4, -0.3]], dtype=torch.float64)
    moved = block.moved({"x": x}, {"law 1": S})["x"]
    torch.testing.assert_close(moved[:4].view(2, 2).T @ moved[4:].view(2, 2), X.T @ Y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: laws(m, torch.zeros(1, 3), mode="test"), "mode='test'"),
        (lambda m: laws(m, torch.zeros(1, 3), loss=F.mse_loss), "only the softmax cross-entropy"),
        (lambda m: laws(m.requires_grad_(False), torch.zeros(1, 3)), "no parameter requires grad"),
        (lambda m: laws(m, torch.zeros(1, 3)).act(m, {"1 → 2": torch.zeros(4)}), "did you mean '0 → 2'"),
        (lambda m: laws(m, torch.zeros(1, 3)).act(m, {"0 → 2": torch.zeros(5)}), "it takes \\(4,\\)"),
        (lambda m: laws(m, torch.zeros(1, 3)).act(m, torch.zeros(5)), "these laws take 4"),
    ],
)
def test_errors_name_the_cure(call: object, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=message):
        call(model)  # type: ignore[operator]


def test_channels_without_writers_or_readers_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = laws(model, torch.zeros(1, 3))
    assert found.degenerate(model) == {}
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, 0.0
        model[2].weight[:, 3] = 0.0
    assert {name: channels.tolist() for name, channels in found.degenerate(model).items()} == {"0 → 2": [1, 3]}
