"""How far λ₁ would move on fresh data: the data's own chance, beside the solver's interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchflat import ops
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.objective.forms import Forms
from torchflat.result import Cost, Interval
from torchflat.spectrum.krylov import power_of_two
from torchflat.spectrum.sharpness import Sharpness
from torchflat.spectrum.student import t_quantile

__all__ = ["Sampling", "sampling_interval", "standard_error"]

# Below this the spread of the data is not worth stating.
FEWEST = 8


@dataclass(frozen=True)
class Sampling(Interval):
    """Where λ₁ of as many fresh rows of the same kind would lie, to first order, with probability ``confidence``.

    ``value`` is vᵀHv on the data at hand, ``standard_error`` how far that is from its mean over data sets of this size,
    and ``groups`` tells from how many random groups of rows this was estimated. ``note`` says what to know about it.
    Where there are too few rows, the bounds are infinite.
    """

    standard_error: float
    groups: int
    cost: Cost
    note: str = ""


def sampling_interval(
    f: Objective, vector: Tensor | Sharpness, confidence: float = 0.99, seed: int = 0, groups: int = 64
) -> Sampling:
    """Predict where λ₁ would lie on as many fresh rows, from vᵀH_g v of random groups g of rows: one pass, no solve.

    With rows i of weight wᵢ that were drawn independently, hᵢ = wᵢ·vᵀHᵢv and q = vᵀHv = Σhᵢ/Σwᵢ, the ratio has the
    standard error s of the residuals eᵢ = hᵢ − q·wᵢ, weights being random too, and fresh data a chance of its own:

        s² = m/(m−1) · Σeᵢ² / (Σwᵢ)²  over the m rows,        [lower, upper] = q ± t·√2·s.

    Σeᵢ² is not seen row by row. Batches are strata, the rows of each were dealt to its groups at random, and so

        Σeᵢ² = Σ_b (n_b − 1)·S_b² + n_b·ē_b²,       S_b² = Σ_g m_g·(ē_g − ē_b)² / (groups of b − 1),

    is without bias in whatever order the rows come. t is Student's, with groups − 1 degrees of freedom for a single
    stratum; what several strata tell exactly adds to them.

    What it rests on: rows that are independent and of one kind, few enough of them dominating; a simple λ₁; and v as
    fixed, which is first order in the change of H. To second order λ₁ of every sample lies above λ₁ of all data there
    could be, and fresh data of the same size as much as these. Rows that *are* all there could be have no such
    uncertainty. The network is the same in all of this: it is not trained anew.

    Args:
        f: the objective, at its point.
        vector: the top eigenvector (n,), or the answer that holds it.
        confidence: probability, over both the data at hand and fresh data.
        seed: of the groups.
        groups: how many at least, as far as there are rows.

    Raises:
        UsageError: the vector is zero, or an argument is out of range.

    >>> X = torch.linspace(-1, 1, 100)[:, None]
    >>> f = Objective(torch.nn.Linear(1, 1, bias=False), torch.nn.MSELoss(), (X, X))
    >>> fresh = sampling_interval(f, torch.ones(1), confidence=0.9)
    >>> fresh.lower < 2 / 3 < fresh.upper, fresh.groups
    (True, 64)
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence}: it must lie between 0 and 1, both excluded")
    if groups < FEWEST:
        raise UsageError(f"groups={groups}: it must be at least {FEWEST}")
    v = vector.vector if isinstance(vector, Sharpness) else vector
    size = float(ops.norm([v])) if v.numel() else 0.0
    if not size > 0:
        raise UsageError("the vector is zero or empty: pass an eigenvector, such as sharpness(f).vector")
    before = f.cost
    forms = f.quadratic_forms(v / size, groups, seed)
    count, units = len(forms.sums), int(forms.units.sum())
    if units < FEWEST:
        error = half = math.inf
        note = f"{units} {'rows' if forms.cut else 'batches'} are too few to say how far λ₁ moves on fresh data"
    else:
        error, freedom = standard_error(forms)
        half = t_quantile(confidence, freedom) * math.sqrt(2) * error
        note = "" if forms.cut else "the batches cannot be cut: each counts as one random draw of fresh data"
    value = forms.mean
    return Sampling(value, value - half, value + half, confidence, error, count, f.cost - before, note)


def standard_error(forms: Forms) -> tuple[float, int]:
    """Return the standard error of vᵀHv over the draw of the rows, and how many degrees of freedom it has."""
    residuals = forms.sums - forms.mean * forms.weights
    scale = power_of_two(float(residuals.abs().max()))
    residuals = residuals / scale
    units, groups, totals, squares = (
        torch.zeros(int(forms.strata.max()) + 1, dtype=torch.float64).index_add_(0, forms.strata, terms)
        for terms in (forms.units, torch.ones_like(residuals), residuals, residuals.square() / forms.units)
    )
    between = totals.square() / units
    within = (squares - between).clamp(min=0) * (units - 1) / (groups - 1).clamp(min=1)
    total, rows = float((within + between).sum()), float(units.sum())
    error = scale * math.sqrt(total * rows / (rows - 1)) / float(forms.weights.sum())
    return error, _freedom(float(within.sum()) / total if total else 0.0, units, groups)


def _freedom(share: float, units: Tensor, groups: Tensor) -> int:
    """Degrees of freedom of Σeᵢ², of which ``share`` was estimated from groups of rows.

    The relative variance of a sum of squares is 2/freedom. That of the rows themselves is 2/(m − 1); dealing them to
    groups adds what a spread over groups has, less what a spread over single rows has.
    """
    rows = float(units.sum())
    inside, single = float((groups - 1).sum()), float((units - 1).sum())
    dealing = share**2 * (1 / inside - 1 / single) if inside else 0.0
    return max(1, math.floor(1 / (dealing + 1 / (rows - 1)) + 1e-9))
