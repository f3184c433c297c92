"""Regression: one linear layer on data, with a squared or a cross-entropy loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from torchflat.objective import Objective
from torchflat.problems.problem import Problem

__all__ = ["LinearRegression", "SoftmaxRegression"]


@dataclass(frozen=True, eq=False)
class LinearRegression(Problem):
    """f(w) = (1/m)|Xw − y|², X (m, d): H = (2/m) XᵀX, at every w.

    The rows go through the model seven at a time, and the last piece is shorter: f weighs rows, not batches.

    >>> LinearRegression(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).eigenvalues().tolist()
    [1.0, 4.0]
    """

    source: ClassVar[str] = "the definition"

    X: Tensor

    @property
    def rows(self) -> int:
        """The number of rows of X."""
        return len(self.X)

    def objective(self) -> Objective:
        """Return f of a float64 linear layer of ones, on seven rows at a time, with targets zero."""
        model = skip_init(nn.Linear, self.X.shape[1], 1, bias=False, dtype=torch.float64)
        nn.init.ones_(model.weight)
        data = list(zip(self.X.double().split(7), self.X.new_zeros(len(self.X), 1).double().split(7), strict=True))
        return Objective(model, nn.functional.mse_loss, data)

    def eigenvalues(self) -> Tensor:
        """Return those of (2/m) XᵀX."""
        X = self.X.double()
        values: Tensor = torch.linalg.eigvalsh(2 / len(X) * X.T @ X)
        return values


@dataclass(frozen=True, eq=False)
class SoftmaxRegression(Problem):
    """f(W) = mean cross-entropy of the logits Wx over c classes, at W = 0: H = (1/c)(I − 11ᵀ/c) ⊗ (1/m)XᵀX.

    All classes are equally likely there, whatever the labels. With μ the eigenvalues of XᵀX/m, those of H are μᵢ/c,
    c − 1 times each, and zeros. The model computes in float32, unlike the other problems.

    >>> SoftmaxRegression(torch.tensor([[2.0]]), classes=2).eigenvalues().tolist()
    [0.0, 2.0]
    """

    source: ClassVar[str] = "the definition"

    X: Tensor
    classes: int

    @property
    def rows(self) -> int:
        """The number of rows of X."""
        return len(self.X)

    def objective(self) -> Objective:
        """Return f of a float32 linear layer of zeros, with every label in turn."""
        model = skip_init(nn.Linear, self.X.shape[1], self.classes, bias=False)
        nn.init.zeros_(model.weight)
        labels = torch.arange(len(self.X)) % self.classes
        return Objective(model, nn.functional.cross_entropy, (self.X.float(), labels))

    def eigenvalues(self) -> Tensor:
        """Return those of XᵀX/mc, c − 1 times each, and zeros."""
        # Of the very rows that the model sees: rounded to float32 first.
        X = self.X.float().double()
        moments = torch.linalg.eigvalsh(X.T @ X / len(X)) / self.classes
        return torch.cat([moments.repeat(self.classes - 1), torch.zeros_like(moments)]).sort().values
