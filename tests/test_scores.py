"""Scores of rows: unbiased for what they stand for, and blind to no row of high curvature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from torchflat import Objective
from torchflat.objective.scores import NoScores


def regression(rows: int = 40, n: int = 30) -> tuple[Objective, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, rows)[:, None].double()
    model = nn.Linear(n, 1).double()
    return Objective(model, mse_loss, (x, torch.randn(rows, 1, generator=generator).double())), x


def mean_score(f: Objective, seeds: int) -> Tensor:
    return torch.stack([f.row_curvatures(seed) for seed in range(seeds)]).mean(dim=0)


def test_mean_is_the_trace_of_each_row_of_a_linear_model() -> None:
    f, x = regression()
    # One output: tr Hᵢ = 2(|xᵢ|² + 1), and a mean of 4 · 100 squared Gaussians is off by 7 %.
    torch.testing.assert_close(mean_score(f, 100), 2 * ((x**2).sum(dim=1) + 1), rtol=0.35, atol=0)


def test_rows_without_gradient_score_as_high() -> None:
    _, x = regression()
    model = nn.Linear(30, 1).double()
    fitted, other = (Objective(model, mse_loss, (x, y)) for y in (model(x).detach(), x[:, :1]))
    assert float(fitted.gradient().abs().max()) == 0 < float(other.gradient().abs().max())
    # A linear model has no curvature of its own, and that of the loss does not depend on the residual.
    torch.testing.assert_close(fitted.row_curvatures(3), other.row_curvatures(3))


def test_curvature_of_the_model_itself_counts() -> None:
    # z = ab: no Gauss–Newton part where the loss is linear in z, and ‖∇²z‖_F = √2.
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(1.0).double()), nn.Parameter(torch.tensor(2.0).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.a * self.b * x

    x = torch.tensor([[1.0], [10.0]], dtype=torch.float64)
    f = Objective(Product(), lambda z, y: (z * y).mean(), (x, torch.ones(2, 1).double()))
    scores = torch.stack([f.row_curvatures(seed) for seed in range(300)])
    # E |d₁d'₂ + d₂d'₁| lies between ½ and 1 times the root mean square √2.
    assert 0.6 < float(scores[:, 0].mean()) < 1.6
    torch.testing.assert_close(scores[:, 1], 10 * scores[:, 0])


def test_sum_over_rows_is_the_trace_of_a_classifier() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(200, 6, generator=generator), torch.randint(5, (200,), generator=generator)
    model = nn.Linear(6, 5)
    f = Objective(model, cross_entropy, (x, y), microbatch=64)
    p = torch.softmax(model(x), dim=1).detach()
    exact = (1 - (p**2).sum(dim=1)) * ((x**2).sum(dim=1) + 1)
    torch.testing.assert_close(mean_score(f, 60).mean(), exact.double().mean(), rtol=0.1, atol=0)
    assert f.row_curvatures(0).shape == (200,)


def test_sequences_count_as_one_row() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 7, 6, generator=generator), torch.randn(12, 7, 2, generator=generator)
    x[4] *= 20
    scores = Objective(nn.Linear(6, 2), mse_loss, (x, y)).row_curvatures()
    assert scores.shape == (12,) and int(scores.argmax()) == 4


def test_order_of_the_data_is_kept_and_micro_batches_do_not_matter() -> None:
    f, x = regression()
    small = Objective(nn.Linear(30, 1).double(), mse_loss, (x, x[:, :1]), microbatch=7)
    large = Objective(small._term.call.model, mse_loss, (x, x[:, :1]), microbatch=40)  # type: ignore[attr-defined]
    torch.testing.assert_close(small.row_curvatures(5), large.row_curvatures(5))
    assert f.row_curvatures(1).equal(f.row_curvatures(1))


def test_costs_a_few_forwards() -> None:
    f, _ = regression()
    f.value()
    before = f.cost
    f.row_curvatures()
    spent = f.cost - before
    assert spent.forwards == 6 and spent.products == spent.backwards == 0


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


def test_what_cannot_be_told_apart_by_rows_is_refused() -> None:
    x = torch.randn(10, 3)
    function = Objective.from_function(lambda v: (v**2).sum(), torch.ones(3))
    summed = Objective(nn.Linear(3, 2), None, (x, x), batch_loss=lambda m, b: (m(b[0]).square().sum(), len(b[0])))
    two = Objective(TwoOutputs(), lambda output, y: output[0].square().mean() + 0 * y.mean(), (x, x))
    for f, reason in ((function, "loss"), (summed, "loss"), (two, "tuple")):
        with pytest.raises(NoScores, match=reason):
            f.row_curvatures()
