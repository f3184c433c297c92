"""Laws from gradients alone: known counts, known laws, and what makes such counts wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchflat.errors import DataError, NonFiniteError, UsageError
from torchflat.parameters import Layout
from torchflat.spectrum.run import NotConvergedWarning
from torchflat.symmetry.discover import Products, _brackets, discover, law_count
from torchflat.symmetry.sampling import Function, numerical_rank, sampler


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def rows(width: int) -> Tensor:
    return torch.zeros(1, width)


def both(model: nn.Module | Function, inputs: Tensor, **options: object) -> int:
    """Quadratic laws, and laws of any form, where these are the same number."""
    found = discover(model, inputs, **options)  # type: ignore[arg-type]
    counted = law_count(model, inputs, **options)  # type: ignore[arg-type]
    assert found.clear and counted.clear
    assert found.count == counted.count
    return found.count


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Normed(nn.Module):
    """Linear, BatchNorm with fixed statistics, an activation, linear."""

    def __init__(self, activation: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 2, bias=bias), nn.BatchNorm1d(2)
        self.activation, self.last = activation, nn.Linear(2, 2)
        self.norm.running_mean = torch.tensor([0.4, -0.7])
        self.norm.running_var = torch.tensor([0.6, 1.5])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.norm(self.first(x))))


# Known counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_linear_layers_share_a_symmetric_matrix(rank: int) -> None:
    assert both(mlp(3, rank, 3, activation=nn.Identity), rows(3)) == rank * (rank + 1) // 2


def test_three_linear_layers_share_two() -> None:
    assert both(mlp(2, 2, 2, 2, activation=nn.Identity, bias=False), rows(2)) == 6


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_one_law_for_each_rectified_unit(activation: type[nn.Module]) -> None:
    assert both(mlp(3, 4, 2, activation=activation), rows(3)) == 4


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Tanh])
def test_none_across_other_activations(activation: type[nn.Module]) -> None:
    assert both(mlp(2, 3, 2, activation=activation), rows(2)) == 0


def test_gated_units_trade_the_linear_factor_only() -> None:
    model = Gated(2, 3)
    assert both(model, rows(2)) == 3
    laws = discover(model, rows(2))
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    moved = laws.gradients(laws.point).abs().amax(0)
    for size, name in zip(moved.tolist(), names, strict=True):
        assert (size < 1e-8) == (name.startswith("gate") or name == "down.bias")


@pytest.mark.parametrize("powers", [(1, 1), (1, 2), (1, 2, 3), (2, 1, 1, 3)])
def test_monomials(powers: tuple[int, ...]) -> None:
    """C_i = υ_n x_i² − υ_i x_n², and nothing else (T032)."""
    exponents, n = torch.tensor(powers, dtype=torch.float64), len(powers)
    function: Function = lambda x, batch: (torch.prod(x**exponents) - 1) ** 2 * batch  # noqa: E731
    laws = discover(function, torch.zeros(1), parameters=n)
    assert (
        laws.clear
        and laws.count == len(laws.quadratic) == n - 1 == law_count(function, torch.zeros(1), parameters=n).count
    )
    x = torch.rand(n, dtype=torch.float64) + 0.5
    known = torch.zeros(n - 1, n, dtype=torch.float64)
    for i in range(n - 1):
        known[i, i], known[i, -1] = exponents[-1] * x[i], -exponents[i] * x[-1]
    assert numerical_rank(torch.cat([known, laws.gradients(x)])).rank == n - 1


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(2, 4), min_size=3, max_size=4), st.integers(0, 9))
def test_rectified_networks_of_any_shape(widths: list[int], seed: int) -> None:
    model = mlp(*widths)
    layout = Layout(("x",), (torch.Size([sum(p.numel() for p in model.parameters())]),))
    laws = discover(model, rows(widths[0]), products=Products.squares(layout.n), seed=seed)
    assert laws.count == sum(widths[1:-1])


# Batch normalisation with fixed statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "each"), [(nn.ReLU(), 1), (nn.Identity(), 1), (nn.GELU(), 0)])
def test_fixed_statistics_pin_what_is_normalised(activation: nn.Module, each: int) -> None:
    assert both(Normed(activation, bias=False), rows(3)) == 2 * each


@pytest.mark.parametrize(("activation", "each"), [(nn.ReLU(), 1), (nn.Identity(), 1), (nn.GELU(), 0)])
def test_a_bias_before_them_gives_a_law_about_the_mean(activation: nn.Module, each: int) -> None:
    model = Normed(activation, bias=True)
    assert both(model, rows(3)) == 2 * each + 2
    laws = discover(model, rows(3))
    layout = Layout(*zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True))
    x = torch.randn(layout.n, dtype=torch.float64)
    # |w|² + (b − μ)² − γ² of the first channel.
    slopes = dict(zip(layout.names, layout.split(torch.zeros(layout.n, dtype=torch.float64)), strict=True))
    parts = dict(zip(layout.names, layout.split(x), strict=True))
    slopes["first.weight"][0] = parts["first.weight"][0]
    slopes["first.bias"][0] = parts["first.bias"][0] - float(model.norm.running_mean[0])
    slopes["norm.weight"][0] = -parts["norm.weight"][0]
    with_known = torch.cat([laws.gradients(x), layout.flatten(list(slopes.values()))[None]])
    assert numerical_rank(with_known).rank == numerical_rank(laws.gradients(x)).rank == laws.count


# What makes counts wrong ----------------------------------------------------------------------------------------------


def test_inputs_that_switch_no_unit_obey_more_laws() -> None:
    model = mlp(3, 4, 2)
    positive = lambda generator: torch.rand(1, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    always_on = lambda generator: 0.5 + torch.rand(26, generator=generator, dtype=torch.float64)  # noqa: E731
    # As without relu: a symmetric matrix.
    assert law_count(model, positive, parameters=always_on).count == 10
    assert law_count(model, rows(3)).count == 4


def test_gradients_alone_count_symmetries_that_conserve_nothing() -> None:
    counted = law_count(mlp(2, 2, 2, activation=nn.Identity, bias=False), rows(2))
    assert counted.dimensions == (8 - 4, 8 - 3, 8 - 3) and counted.count == 3


def test_turning_a_pair_of_rotated_queries_and_keys_conserves_nothing() -> None:
    def logits(x: Tensor, batch: Tensor) -> Tensor:
        q, k = x.view(2, 2)
        angle = batch[0]
        return (
            batch[1]
            * torch.stack([angle.cos() * q[0] - angle.sin() * q[1], angle.sin() * q[0] + angle.cos() * q[1]])
            @ k
        )

    counted = law_count(logits, torch.zeros(2), parameters=4)
    assert counted.dimensions[0] == 4 - 2 and counted.count == 1
    assert discover(logits, torch.zeros(2), parameters=4).count == 1


def test_laws_that_are_not_quadratic_are_counted_only() -> None:
    """(x₁² + a·x₂² − 1)² conserves x₂|x₁|^(−a) (T042)."""
    ellipse: Function = lambda x, batch: (x[0] ** 2 + 3 * x[1] ** 2 - 1) ** 2 * batch  # noqa: E731
    assert law_count(ellipse, torch.zeros(1), parameters=2).count == 1
    assert discover(ellipse, torch.zeros(1), parameters=2).count == 0


def test_products_of_linear_laws_are_not_independent() -> None:
    laws = discover(lambda x, batch: x[0] * batch, torch.zeros(1), parameters=3)
    # x₁, x₂, and their three products.
    assert laws.count == 2 and len(laws.linear) == 5


def test_brackets_cut_short_are_an_upper_bound() -> None:
    with pytest.warns(NotConvergedWarning):
        counted = law_count(mlp(2, 2, 2, activation=nn.Identity, bias=False), rows(2), depth=1)
    assert not counted.complete and not counted.clear and counted.count >= 3


@pytest.mark.parametrize(("count", "coupling"), [(law_count, 1e-9), (discover, 1e-6)])
def test_a_law_that_nearly_holds_is_not_clear(count: Callable[..., Any], coupling: float) -> None:
    def model(x: Tensor, batch: Tensor) -> Tensor:
        return torch.stack([x[0] * x[1], x[0] * x[1] + coupling * x[2]]) * batch

    with pytest.warns(NotConvergedWarning, match="apart"):
        assert not count(model, torch.zeros(1), parameters=3).clear


def test_laws_hold_on_fresh_points_and_inputs() -> None:
    model = mlp(3, 4, 3, 2).double()
    laws = discover(model, rows(3))
    for _ in range(5):
        model = mlp(3, 4, 3, 2).double()
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(3 * torch.randn(20, 3, dtype=torch.float64)), torch.randint(2, (20,)))
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
        x = torch.cat([p.detach().reshape(-1) for p in parameters])
        slopes = laws.gradients(x)
        assert float((slopes @ gradient).abs().max()) <= 1e-7 * float(slopes.norm() * gradient.norm())
        # C(x + αg) − C(x) is of second order: no law has a first derivative along the flow.
        change = laws.values(x + 1e-4 * gradient) - laws.values(x)
        assert float(change.abs().max()) <= 1e-7


def test_slices_find_what_all_products_find() -> None:
    model = mlp(2, 3, 2, activation=nn.Identity)
    names = dict(model.named_parameters())
    layout = Layout(tuple(names), tuple(p.shape for p in names.values()))
    assert discover(model, rows(2), products=Products.slices(layout)).count == discover(model, rows(2)).count == 6


def test_the_same_seed_gives_the_same_answer() -> None:
    first, second = (discover(mlp(2, 2, 1), rows(2), seed=3) for _ in range(2))
    assert torch.equal(first.quadratic, second.quadratic) and first.gap == second.gap
    assert math.isfinite(first.to_dict()["gap"])


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    product: Function = lambda x, batch: x.prod() * batch  # noqa: E731
    with pytest.raises(UsageError, match="parameters=n"):
        discover(product, torch.zeros(1))
    with pytest.raises(UsageError, match="int64"):
        discover(product, torch.zeros(1, dtype=torch.int64), parameters=2)
    with pytest.raises(UsageError, match="float32"):
        discover(product, torch.zeros(1), parameters=lambda generator: torch.randn(2, generator=generator))
    with pytest.raises(UsageError, match="draws 3 numbers, but the model has 9"):
        discover(mlp(2, 2, 1), rows(2), parameters=3)
    with pytest.raises(UsageError, match="smaller model"):
        discover(product, torch.zeros(1), parameters=200)
    with pytest.raises(DataError, match="float32"):
        discover(lambda x, batch: x.float(), torch.zeros(1), parameters=2)
    with pytest.raises(DataError, match="tuple"):
        discover(lambda x, batch: (x, x), torch.zeros(1), parameters=2)  # type: ignore[arg-type, return-value]
    with pytest.raises(NonFiniteError, match="narrower"):
        discover(lambda x, batch: (x - x.detach()).sqrt() * batch, torch.zeros(1), parameters=2)


def test_brackets_of_layer_norm_are_those_of_the_norm_written_out() -> None:
    def fields(norm: Callable[[Tensor], Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        source = sampler(lambda x, rows: norm(rows @ x[:12].view(4, 3)) @ x[12:], torch.zeros(5, 4), 15, generator)
        return _brackets(source, source.points(generator), 2, 4, generator)

    def written_out(h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(fields(lambda h: F.layer_norm(h, (3,))), fields(written_out), rtol=1e-10, atol=1e-12)
