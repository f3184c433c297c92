"""Which of two points is flatter: x ⪯ y if f°(x, r) ≤ f°(y, r) for all small r."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchflat.errors import UsageError
from torchflat.flatness.ladder import geometric
from torchflat.flatness.profiles import CURVED, Decision, Profiles, Verdict, shared
from torchflat.flatness.variation import Search, Variation, checked
from torchflat.objective import Objective
from torchflat.objective.forms import Forms
from torchflat.result import Answer, Cost
from torchflat.spectrum.sampling import standard_error
from torchflat.spectrum.student import t_quantile

__all__ = ["Comparison", "FlatAgainst", "compare", "is_flat_against"]

# Groups of rows from which the data's chance is told, and the fewest rows for that.
GROUPS, FEWEST_ROWS = 64, 64
# Gradients for each point unless it is small: a comparison hangs on the largest radii, which come last.
BUDGET = 200.0
# Curvature shows clearly where f° exceeds the bound for it this many times.
CLEARLY = 1.2
# Losses this close, relative to the larger, are one level.
LEVEL = 1e-2

Symmetry = Callable[[Objective], Objective]


@dataclass(frozen=True)
class Comparison(Answer):
    """Which of two points is flatter, and on what grounds.

    ``verdict_limit`` is the preorder's own: r → 0. At points with a gradient its order is 1, which is rarely what is
    meant by flat: ``verdict_curvature`` compares the profiles where f° exceeds twice |∇f|·r for both. ``verdict`` is
    the limit's where both points are critical, else the curvature's. It was ``decided_by`` order, modulus or profile,
    and holds down to ``radius``. ``differences`` are f°(x, r) − f°(y, r) at ``radii``, give or take ``errors``:
    rounding, what the searches may have missed, and the chance that is in the data (``sampled``).
    """

    verdict: Verdict
    verdict_limit: Verdict
    verdict_curvature: Verdict
    decided_by: str | None
    radius: float | None
    reason: str
    radii: tuple[float, ...]
    differences: tuple[float, ...]
    errors: tuple[float, ...]
    sampled: tuple[float, ...]
    tolerance: float
    level_mismatch: float
    cautions: tuple[str, ...]
    first: Variation
    second: Variation
    cost: Cost


def compare(
    f: Objective,
    g: Objective,
    symmetry: Symmetry | None = None,
    *,
    radii: Sequence[float] | Tensor | None = None,
    tolerance: float = 0.05,
    confidence: float = 0.99,
    seed: int = 0,
    budget: float | None = None,
    callback: Callable[[str, float, float], object] | None = None,
) -> Comparison:
    """Compare the point of ``f`` with the point of ``g``: FLATTER means that that of ``f`` is.

    ``compare(g, f)`` gives the mirror image.

    Args:
        f: one objective, at its point.
        g: the same function at another point; or another model on the same data and loss, with a caution.
        symmetry: takes each objective to the point of its orbit that is to be compared (:meth:`Objective.at`), such as
            the flattest: ``torchflat.symmetry.flattened(laws)``.
        radii: where to compare; by default on the range that is sensible for both.
        tolerance: relative difference of the profiles that counts as none.
        confidence: with which the chance in the data does not make the difference.
        seed: of the random starts, and of the groups of rows.
        budget: of the search at each point, in full-data gradients; default 200, or 20 000 up to 1 000 parameters.
        callback: called with "first" or "second", a radius, and the value there; a true return value stops that search.

    Raises:
        UsageError: the two have different data, different parameter sets of one model, or an argument is out of range.

    Source: T001, T002, T006 and section 6 of the design: order and modulus first, then the profiles.

    >>> import torch
    >>> fn = lambda x: (x[0] * x[1] - 1) ** 2
    >>> flat, sharp = (torch.tensor([t, 1 / t], dtype=torch.float64) for t in (1.0, 2.0))
    >>> answer = compare(Objective.from_function(fn, flat), Objective.from_function(fn, sharp))
    >>> answer.verdict.name, answer.decided_by
    ('FLATTER', 'modulus')
    """
    if not 0 <= tolerance < 1 or not 0 < confidence < 1:
        raise UsageError(f"tolerance={tolerance}, confidence={confidence}: both must lie between 0 and 1")
    cautions = _checked_pair(f, g)
    # Each with a ledger of its own, also where one is derived from the other.
    ledgers = f, g = f.at(f.x), g.at(g.x)
    if symmetry is not None:
        f, g = symmetry(f), symmetry(g)
    with contextlib.ExitStack() as stack:

        def searched(name: str, objective: Objective) -> Search:
            told = None if callback is None else lambda radius, value: callback(name, radius, value)
            return stack.enter_context(Search(objective, seed, budget, told, usual=BUDGET))

        searches = [searched("first", f), searched("second", g)]
        common = checked(radii) if radii is not None else _common_radii(searches)
        if not common:
            raise UsageError("the radii that suit the two points do not overlap: give radii=")
        first, second = (search.run(common) for search in searches)
    sampled = _sampled(f, g, first, second, confidence, seed)
    profiles = Profiles(first, second, sampled, tolerance)
    limit, curved = profiles.at_small_radii(), profiles.on_curved_range()
    chosen = _chosen(limit, curved, first, second)
    mismatch = first.level - second.level
    if abs(mismatch) > LEVEL * max(abs(first.level), abs(second.level)):
        cautions.append(f"the loss is {first.level:.4g} at the first point and {second.level:.4g} at the second")
    if f.rows >= FEWEST_ROWS and all(error == 0 for error in sampled):
        cautions.append("the data cannot be paired row by row: the chance in it is not in the verdict")
    for name, answer in (("first", first), ("second", second)):
        if not answer.status.ok:
            cautions.append(f"the variation of the {name} point is {answer.status.name}: {answer.status.value}")
    return Comparison(
        verdict=chosen.verdict,
        verdict_limit=limit.verdict,
        verdict_curvature=curved.verdict,
        decided_by=chosen.by,
        radius=chosen.radius,
        reason=chosen.reason,
        radii=profiles.radii,
        differences=tuple(profiles.differences),
        errors=tuple(profiles.errors),
        sampled=sampled,
        tolerance=tolerance,
        level_mismatch=mismatch,
        cautions=tuple(cautions),
        first=first,
        second=second,
        cost=ledgers[0].cost + ledgers[1].cost,
    )


@dataclass(frozen=True)
class FlatAgainst(Answer):
    """Whether a point is at least as flat as each of others: True, False, or None where one of them is undecided."""

    flat: bool | None
    comparisons: tuple[Comparison, ...]


def is_flat_against(f: Objective, points: Sequence[Tensor], **options: object) -> FlatAgainst:
    """Whether the point of ``f`` is at least as flat as all of ``points``, (n,) each, which should lie on one level.

    Args:
        f: the objective, at the point in question.
        points: others, to be compared with it.
        options: of :func:`compare`.

    >>> import torch
    >>> f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, torch.ones(2, dtype=torch.float64))
    >>> is_flat_against(f, [torch.tensor([2.0, 0.5]), torch.tensor([-1.0, -1.0])]).flat
    True
    """
    comparisons = tuple(compare(f, f.at(point), **options) for point in points)  # type: ignore[arg-type]
    verdicts = {comparison.verdict for comparison in comparisons}
    if Verdict.SHARPER in verdicts:
        return FlatAgainst(False, comparisons)
    return FlatAgainst(None if Verdict.UNDECIDED in verdicts else True, comparisons)


def _common_radii(searches: Sequence[Search]) -> list[float]:
    """Return one ladder for both, which goes on to where the curvature of both shows."""
    common = shared(*(search.ladder() for search in searches))
    if common:
        found = [search.curved(CLEARLY * CURVED, common[-1]) for search in searches]
        far = max((radius for radius in found if radius is not None), default=0.0)
        if far > common[-1]:
            common += geometric(common[-1], far, 3)[1:]
    return common


def _chosen(limit: Decision, curved: Decision, first: Variation, second: Variation) -> Decision:
    """Take the limit's decision at critical points, unless it hangs on orders that could not be told."""
    if not (first.critical and second.critical):
        return curved
    told = all(found.order is not None and found.order.exact for found in (first, second))
    return limit if told or limit.verdict is not Verdict.UNDECIDED else curved


def _checked_pair(f: Objective, g: Objective) -> list[str]:
    """Refuse what cannot be compared, and return what must be said about the rest."""
    if f.rows != g.rows or f.fingerprint() != g.fingerprint():
        raise UsageError(f"the two objectives have different data ({f.rows} and {g.rows} rows): give both the same")
    if f.weight_decay != g.weight_decay:
        raise UsageError(f"weight_decay is {f.weight_decay} and {g.weight_decay}: give both the same")
    if f.layout == g.layout:
        return []
    names = set(f.layout.names), set(g.layout.names)
    if names[0] & names[1] and (names[0] < names[1] or names[1] < names[0]):
        missing = ", ".join(sorted(names[0] ^ names[1])[:3])
        raise UsageError(f"params= of one objective leaves out {missing}, ...: choose the same parameters for both")
    if f.layout.names == ("x",):
        raise UsageError(f"the two functions have {f.n} and {g.n} variables: give two points of one function")
    return [f"the points have {f.n} and {g.n} parameters: profiles of functions of different variables are compared"]


def _sampled(
    f: Objective, g: Objective, first: Variation, second: Variation, confidence: float, seed: int
) -> tuple[float, ...]:
    """How far f° of the two move apart, at each radius, by the draw of the rows, which are the same for both."""
    count = min(len(first.radii), len(second.radii))
    if f.rows < FEWEST_ROWS:
        return (0.0,) * count

    def changes(objective: Objective, found: Variation) -> list[Forms]:
        here = objective.group_values(GROUPS, seed)
        there = [objective.at(point).group_values(GROUPS, seed) for point in found.points[:count]]
        signed = zip(there, found.signs, strict=False)
        return [_with_sums(here, sign * (forms.sums - here.sums)) for forms, sign in signed]

    pairs = list(zip(changes(f, first), changes(g, second), strict=True))
    if not all(a.cut == b.cut and a.units.equal(b.units) and a.weights.equal(b.weights) for a, b in pairs):
        return (0.0,) * count
    return tuple(_chance(a, b, confidence) for a, b in pairs)


def _chance(a: Forms, b: Forms, confidence: float) -> float:
    """How far chance moves the ratio of two means over the same rows, times the larger: t·s(small − ratio·large)."""
    small, large = sorted((a, b), key=lambda forms: abs(forms.mean))
    if large.mean == 0:
        return 0.0
    error, freedom = standard_error(_with_sums(a, small.sums - small.mean / large.mean * large.sums))
    return t_quantile(confidence, freedom) * error if error else 0.0


def _with_sums(forms: Forms, sums: Tensor) -> Forms:
    return Forms(forms.weights, sums, forms.units, forms.strata, forms.cut)
