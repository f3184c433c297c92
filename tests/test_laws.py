"""Laws of networks: counts against the null space of gradients, action, verification, and the table of rules."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from law_networks import SMALL, Small
from torch import Tensor, nn
from torch.func import functional_call

from torchflat.errors import UsageError
from torchflat.symmetry import Laws, laws
from torchflat.symmetry.graph import trace
from torchflat.symmetry.linear import LinearLaw
from torchflat.symmetry.units import RULES
from torchflat.symmetry.verify import relative, relative_sum


def _doubled(case: Small) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    return case.build().double(), case.example()


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
    model, example = _doubled(case)
    found = laws(model, example)
    assert not found.dropped and not found.unknown
    directions = _diagonal_directions(model, found)
    n = directions.shape[0]
    rank = int(torch.linalg.matrix_rank(directions)) if directions.shape[1] else 0
    assert rank == directions.shape[1], "the laws found are independent"
    weighted, rows = [], []
    # Several points: at one, more directions are orthogonal to all gradients than those of laws.
    for seed in range(4):
        _jitter(model)
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        rows.append(_gradients(model, example, n // 3 + 20, seed))
        weighted.append(rows[-1] * theta)
    gradients, both = torch.cat(rows), torch.cat(weighted)
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
    model, example = _doubled(case)
    found = laws(model, example)
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
    model, example = _doubled(case)
    found = laws(model, example)
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
    model, example = _doubled(case)
    found = laws(model, example)
    assert (found.count["diagonal"], found.count["full"], found.count["linear"]) == case.counts
