"""Linear equations between a great many variables, nearly all of which say that two of them are equal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from torchflat.symmetry.forms import Form, dependent_axes, narrowed

__all__ = ["Equations", "Solution"]

# Exponents in networks are small rationals; a float64 within this of a fraction with a small denominator is that.
_DENOMINATOR = 10_000


@dataclass(frozen=True, eq=False)
class Solution:
    """Every variable in terms of free ones: z_v = ratio[v] · z_root[v], and some roots are sums of other roots.

    Roots with ``size`` > 0 are Σ weight · z_variable over ``variable[start : start + size]``, without circles.
    """

    root: Tensor
    ratio: Tensor
    start: Tensor
    size: Tensor
    variable: Tensor
    weight: Tensor

    def terms(self, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rewrite a vector of labels in free variables: (positions, variables, factors) several times.

        A position comes as often as it has free variables, and not at all where it is zero.
        """
        roots, factors, places = self.root[labels], self.ratio[labels], torch.arange(len(labels))
        found = []
        while len(roots):
            size = self.size[roots]
            free = (roots != 0) & (size == 0)
            found.append((places[free], roots[free], factors[free]))
            sums = size > 0
            places, factors, size = places[sums], factors[sums], size[sums]
            within = torch.arange(int(size.sum())) - (size.cumsum(0) - size).repeat_interleave(size)
            entry = self.start[roots[sums]].repeat_interleave(size) + within
            places, factors = places.repeat_interleave(size), factors.repeat_interleave(size) * self.weight[entry]
            factors = factors * self.ratio[self.variable[entry]]
            roots = self.root[self.variable[entry]]
        return found


class Equations:
    """Variables z₁, z₂, … (z₀ = 0) and homogeneous equations between them, collected first and solved at once.

    >>> equations = Equations()
    >>> a, b = Form.of(equations.fresh((3,))), Form.of(equations.fresh((3,)))
    >>> equations.zero(a + b)
    >>> solution = equations.solve()
    >>> solution.root.tolist(), solution.ratio.tolist()
    ([0, 1, 2, 3, 1, 2, 3], [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    """

    def __init__(self) -> None:
        self.count = 1
        self._batches: list[tuple[list[float], Tensor]] = []

    def fresh(self, shape: tuple[int, ...] | torch.Size, axes: set[int] | None = None) -> Tensor:
        """Return labels of new variables of ``shape``, one for each index along ``axes`` (default: all)."""
        size = [n if axes is None or axis in axes else 1 for axis, n in enumerate(shape)]
        number = int(torch.Size(size).numel())
        labels = torch.arange(self.count, self.count + number).view(size)
        self.count += number
        return labels.expand(shape)

    def zero(self, form: Form) -> None:
        """Demand that the form is zero at every entry.

        Terms that share no axis vary independently, so that E(a, b) = f(a) + g(b) = 0 for all a and b is E(0, 0) = 0
        with f(a) = f(0) and g(b) = g(0): a sum of sizes in place of their product, and mostly equations of two terms.
        """
        if not form.terms or 0 in form.shape:
            return
        everywhere = set(range(len(form.shape)))
        corner = [narrowed(labels, everywhere).reshape(1) for _, labels in form.terms]
        blocks = _blocks(form)
        for block in blocks:
            inside = [i for i, (_, labels) in enumerate(form.terms) if block & set(dependent_axes(labels))]
            columns = [narrowed(form.terms[i][1], everywhere - block).reshape(-1) for i in inside]
            coefficients = [form.terms[i][0] for i in inside]
            if len(blocks) > 1 and len(inside) == 1:
                (start,) = (corner[i] for i in inside)
                self._batches.append(([1.0, -1.0], torch.stack([columns[0], start.expand_as(columns[0])], 1)))
                continue
            rest = [i for i in range(len(form.terms)) if i not in inside]
            coefficients += [form.terms[i][0] for i in rest]
            columns += [corner[i].expand_as(columns[0]) for i in rest]
            self._batches.append((coefficients, torch.stack(columns, 1)))
        self._batches.append(([c for c, _ in form.terms], torch.stack(corner, 1)))

    def solve(self) -> Solution:
        """Solve: merge by twos until nothing changes, then eliminate what is left exactly."""
        root, ratio = torch.arange(self.count), torch.ones(self.count, dtype=torch.float64)
        batches = [(torch.tensor(c, dtype=torch.float64).expand(rows.shape), rows) for c, rows in self._batches]
        while True:
            remaining, pairs = [], []
            for coefficients, rows in batches:
                coefficients, rows = _collected(coefficients * ratio[rows], root[rows])
                number = (coefficients != 0).sum(1)
                pairs.append(_as_pairs(coefficients[number > 0], rows[number > 0], number[number > 0]))
                if bool((number > 2).any()):
                    remaining.append((coefficients[number > 2], rows[number > 2]))
            batches = remaining
            edges = torch.cat([pair[0] for pair in pairs]) if pairs else torch.empty(0, 2, dtype=torch.int64)
            if not len(edges):
                return Solution(root, ratio, *_tabulated(_eliminated(remaining), self.count))
            _merge(root, ratio, edges, torch.cat([pair[1] for pair in pairs]))


def _blocks(form: Form) -> list[set[int]]:
    blocks: list[set[int]] = []
    for _, labels in form.terms:
        joint = set(dependent_axes(labels))
        apart = [block for block in blocks if not block & joint]
        blocks = [*apart, joint.union(*(block for block in blocks if block & joint))]
    return [block for block in blocks if block]


def _collected(coefficients: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the coefficients of equal variables of each row, to the last of them; drop variable 0; zeros come first."""
    rows, order = rows.sort(1)
    coefficients = coefficients.gather(1, order).clone()
    coefficients[rows == 0] = 0.0
    for column in range(rows.shape[1] - 1):
        same = rows[:, column] == rows[:, column + 1]
        coefficients[:, column + 1] += torch.where(same, coefficients[:, column], 0.0)
        coefficients[:, column] = torch.where(same, 0.0, coefficients[:, column])
    coefficients[coefficients.abs() < 1e-9] = 0.0
    order = (coefficients != 0).to(torch.int8).argsort(dim=1, stable=True)
    return coefficients.gather(1, order), rows.gather(1, order)


def _as_pairs(coefficients: Tensor, rows: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return edges (low, high) with ratio: z_high = ratio · z_low; a variable alone in its row meets variable 0."""
    single = number == 1
    edges = [torch.stack([torch.zeros_like(rows[single, -1]), rows[single, -1]], 1)]
    ratios = [torch.ones(int(single.sum()), dtype=torch.float64)]
    if rows.shape[1] > 1:
        double = number == 2
        edges.append(rows[double][:, -2:])
        ratios.append(-coefficients[double][:, -2] / coefficients[double][:, -1])
    return torch.cat(edges), torch.cat(ratios)


def _merge(root: Tensor, ratio: Tensor, edges: Tensor, ratios: Tensor) -> None:
    """Join roots: hook the larger onto the smaller for all edges at once, flatten the trees, until all agree."""
    while len(edges):
        a, b = edges.unbind(1)
        low, high = root[a], root[b]
        # z_b = r z_a, z_a = s z_low, z_b = t z_high: z_high = (r s / t) z_low.
        factor = ratios * ratio[a] / ratio[b]
        swap = low > high
        low, high = torch.where(swap, high, low), torch.where(swap, low, high)
        factor = torch.where(swap, 1.0 / factor, factor)
        contradiction = (low == high) & (high != 0) & ((factor - 1).abs() > 1e-9)
        high = torch.where(contradiction, low, high)
        low = torch.where(contradiction, 0, low)
        active = low != high
        if not bool(active.any()):
            return
        edges, ratios = edges[active], ratios[active]
        low, high, factor = low[active], high[active], factor[active]
        high, order = high.sort(stable=True)
        one_each = torch.cat([torch.tensor([True]), high[1:] != high[:-1]])
        chosen = order[one_each]
        root[high[one_each]], ratio[high[one_each]] = low[chosen], factor[chosen]
        while True:
            above = root[root]
            if torch.equal(above, root):
                break
            ratio *= torch.where(above == root, 1.0, ratio[root])
            root.copy_(above)
        ratio[root == 0] = 1.0


_Sums = list[tuple[Tensor, Tensor, Tensor]]


def _eliminated(batches: list[tuple[Tensor, Tensor]]) -> _Sums:
    """Solve the rows of three terms and more: (pivots (m,), variables (m, t), weights (m, t)), several times.

    A variable that only one row knows is solved for at once, the others exactly and one by one.
    """
    if not batches:
        return []
    width = max(rows.shape[1] for _, rows in batches)
    rows = torch.cat([torch.nn.functional.pad(rows, (width - rows.shape[1], 0)) for _, rows in batches])
    coefficients = torch.cat([torch.nn.functional.pad(c, (width - c.shape[1], 0)) for c, _ in batches])
    coefficients = coefficients / coefficients[:, -1:]
    rows = torch.where(coefficients == 0, 0, rows)
    unique = torch.unique(torch.cat([rows.double(), coefficients], 1), dim=0)
    rows, coefficients = unique[:, :width].long(), unique[:, width:]
    solved: _Sums = []
    while len(rows):
        alone = torch.where((rows.reshape(-1).bincount()[rows] == 1) & (rows != 0), rows, -1)
        pivot, column = alone.max(1)
        # The newest first, so that parameters, which are older than what is made of them, stay free.
        newest = pivot == rows.max(1).values
        done = newest if bool(newest.any()) else pivot >= 0
        if not bool(done.any()):
            solved.extend(_one_by_one(rows, coefficients))
            break
        own = coefficients[done].gather(1, column[done, None])
        weights = (-coefficients[done] / own).scatter(1, column[done, None], 0.0)
        solved.append((pivot[done], rows[done], weights))
        rows, coefficients = rows[~done], coefficients[~done]
    return solved


def _one_by_one(rows: Tensor, coefficients: Tensor) -> _Sums:
    """Eliminate exactly: each pivot is the variable that fewest equations know, so that shared ones stay."""
    equations = [
        {v: _exact(c) for v, c in zip(names, values, strict=True) if c}
        for names, values in zip(rows.tolist(), coefficients.tolist(), strict=True)
    ]
    uses = Counter(variable for row in equations for variable in row)
    solved: dict[int, dict[int, int | Fraction]] = {}
    for row in equations:
        reduced: dict[int, int | Fraction] = {}
        pending = list(row.items())
        while pending:
            variable, c = pending.pop()
            if variable in solved:
                pending.extend((other, c * weight) for other, weight in solved[variable].items())
            else:
                reduced[variable] = reduced.get(variable, 0) + c
        reduced = {v: c for v, c in reduced.items() if c}
        if reduced:
            pivot = min(reduced, key=lambda v: (uses[v], -v))
            own = reduced.pop(pivot)
            scale = -own if own in (1, -1) else -1 / Fraction(own)
            solved[pivot] = {v: c * scale for v, c in reduced.items()}
    return [
        (
            torch.tensor([v]),
            torch.tensor([list(value)], dtype=torch.int64),
            torch.tensor([[float(c) for c in value.values()]]).double(),
        )
        for v, value in solved.items()
    ]


def _exact(coefficient: float) -> int | Fraction:
    """Return an integer where it is one, as nearly all are: their arithmetic is ten times as fast."""
    if coefficient.is_integer():
        return int(coefficient)
    return Fraction(coefficient).limit_denominator(_DENOMINATOR)


def _tabulated(sums: _Sums, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start, size = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    variables, weights, offset = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)], 0
    for pivots, names, factors in sums:
        width = max(names.shape[1], 1)
        if not names.shape[1]:
            names, factors = torch.zeros(len(pivots), 1, dtype=torch.int64), torch.zeros(len(pivots), 1).double()
        # Variable 0 is zero, and ends the rewriting.
        variables.append(torch.where(factors == 0, 0, names).reshape(-1))
        weights.append(factors.reshape(-1))
        start[pivots] = offset + width * torch.arange(len(pivots))
        size[pivots] = width
        offset += width * len(pivots)
    return start, size, torch.cat(variables), torch.cat(weights)
