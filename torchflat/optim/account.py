"""An account of the conserved quantities along training: what plain steps explain of their change, and what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.optim.moves import Moves
from torchflat.optim.sweep import Sweep, Swept
from torchflat.symmetry import Coupling

__all__ = ["MARGIN", "Account"]

# A change that is not explained counts as one from this multiple of what rounding may do.
MARGIN = 2.0
# Relative error of a gradient in units of its precision: of the terms that it is a sum of, which may cancel; and under
# autocast, where what is multiplied is rounded once each, before that.
GRADIENT_ERROR, AUTOCAST_ERROR = 32.0, 4.0


class Account:
    """Keeps Q(x₀), S = Σ a_k² Q(g_k) and what rounding may have done, for each law.

    A step x ← x − a·g with g = ∇f(x) changes a quadratic conserved quantity by exactly a²·Q(g), because its derivative
    along g is zero, and a linear one not at all (T037). So Q(x) − Q(x₀) − S is zero up to rounding, for as long as the
    parameters of the law are moved by such steps with a common a and by nothing else. Each entry is rounded by at most
    ε/2 of itself in a step, which changes Q by at most ε·(writers + readers) of the channel; the error of the gradient
    adds 2a·ε′·√(mass of x · mass of g). ``tolerance`` is the sum of these, times a margin.

    ``refused`` says, by name, which laws have no account any more, and why.
    """

    def __init__(self, sweep: Sweep, parameters: Mapping[str, Tensor]) -> None:
        self.sweep = sweep
        self.refused: dict[str, str] = {}
        self.initial: Tensor | None = None
        device = sweep.unit_of.device
        self.explained = torch.zeros(sweep.size, dtype=torch.float64, device=device)
        self._rounding = torch.zeros(sweep.units, dtype=torch.float64, device=device)
        number = {name: i for i, name in enumerate(parameters)}
        # Every law's parameters move by one factor: that of the first stands for all.
        first = [number[law.members[0].parameter] for law in sweep.laws]
        self._first = torch.tensor(first, dtype=torch.int64, device=device)[sweep.owner]
        eps = [max(_eps(parameters[m.parameter].dtype) for m in law.members) for law in sweep.laws]
        self._eps = torch.tensor(eps, dtype=torch.float64, device=device)[sweep.owner]
        self._gradient_error = GRADIENT_ERROR * self._eps
        self._masses: Tensor | None = None

    def coarser(self, dtype: torch.dtype) -> None:
        """Take gradients to be no more precise than ``dtype``, as under autocast."""
        self._gradient_error = self._gradient_error.clamp(min=AUTOCAST_ERROR * _eps(dtype))

    def enter(self, x: Swept, at: Sequence[int], g: Swept | None, factors: Tensor | None, steps: int) -> Tensor:
        """Enter a stretch of steps, and return what is known of the rows in it.

        Args:
            x: parameters, a column for each row.
            at: which of the steps each row comes before.
            g: gradients of plain steps, a column for each; None if they are not plain.
            factors: a_p of each parameter and step, (P, steps), with ``g``.
            steps: how many.

        Returns:
            |C(x)|, Σ|C|/(writers + readers), |C(x) − C(x₀)| and what is unexplained, for each law and row:
            (4, laws, rows). For a full coupling Σ|C| is over the eigenvalues of C; |·| are Euclidean and Frobenius
            norms. What is unexplained is the largest |Q(x) − Q(x₀) − S| over what rounding may do, NaN if refused.
        """
        if self.initial is None:
            self.initial, self._masses = x.values[:, 0].clone(), x.masses[:, 0].clone()
        assert self._masses is not None
        masses = torch.cat([self._masses[:, None], x.masses], 1)
        explained, rounding = self.explained[:, None], self._rounding[:, None]
        every = list(at) == list(range(steps))  # then views do what indices would, at a fraction of the time
        if g is not None and factors is not None and len(self.refused) < len(self.sweep.laws):
            last_row = torch.tensor([sum(place <= step for place in at) for step in range(steps)], device=masses.device)
            after = masses[:, 1:] if every else masses.index_select(1, last_row)
            changes, errors = self._changes(after, g, factors)
            explained, rounding = (torch.cat(pair, 1).cumsum(1) for pair in ((explained, changes), (rounding, errors)))
        else:
            explained, rounding = (each.expand(-1, steps + 1) for each in (explained, rounding))
        before = torch.tensor(at, dtype=torch.int64, device=masses.device)
        then = (each[:, :-1] if every else each.index_select(1, before) for each in (explained, rounding))
        found = self._statistics(x, *then)
        self.explained, self._rounding, self._masses = (
            explained[:, -1].clone(),
            rounding[:, -1].clone(),
            masses[:, -1].clone(),
        )
        return found

    def _changes(self, masses: Tensor, g: Swept, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Return a²Q(g) of each plain step, (size, steps), and what rounding may do in it, (units, steps)."""
        a = factors.index_select(0, self._first)
        per_value = self.sweep.of_values(a)
        changes = per_value.square() * g.values
        both = (masses * g.masses).sqrt()
        if self.sweep.any_linear:
            changes[self.sweep.of_values(self.sweep.linear)] = 0
            both = torch.where(self.sweep.linear[:, None], g.masses, both)
        errors = 2 * self._gradient_error[:, None] * a.abs() * both
        if not factors.all():  # a step that is not taken, as its gradient is infinite, changes nothing
            changes, errors = torch.where(per_value != 0, changes, 0.0), torch.where(a != 0, errors, 0.0)
        return changes, self._eps[:, None] * masses + errors

    def look(self, moves: Moves) -> None:
        """Look for laws whose parameters will not be moved by plain steps with a common factor."""
        everywhere = moves.refusal()
        for law in self.sweep.laws:
            reason = everywhere or moves.refusal_of([m.parameter for m in law.members])
            if reason:
                self.refused.setdefault(law.name, reason)

    def check(self, x: Swept) -> Tensor:
        """Return |Q(x) − Q(x₀)|, |S| and what is unexplained, of each law at the parameters now: (3, laws)."""
        assert self.initial is not None
        drift = x.values - self.initial[:, None]
        laws, owner, explained = len(self.sweep.laws), self.sweep.law_of, self.explained[:, None]
        return torch.cat(
            [
                _added(drift.square(), owner, laws).sqrt(),
                _added(explained.square(), owner, laws).sqrt(),
                self._unexplained(drift - explained, x.masses, self._rounding[:, None]),
            ],
            1,
        ).T

    def _statistics(self, x: Swept, explained: Tensor, rounding: Tensor) -> Tensor:
        assert self.initial is not None
        laws, owner = len(self.sweep.laws), self.sweep.law_of
        drift = x.values - self.initial[:, None]
        sizes = _added(x.values.abs(), owner, laws)
        for number, (law, place) in enumerate(zip(self.sweep.laws, self.sweep.ranges, strict=True)):
            if isinstance(law, Coupling) and law.kind == "full":
                C = x.values[place].T.reshape(-1, law.size, law.size)
                sizes[number] = torch.linalg.eigvalsh(C).abs().sum(1)
        return torch.stack(
            [
                _added(x.values.square(), owner, laws).sqrt(),
                sizes / _added(x.masses, self.sweep.owner, laws),
                _added(drift.square(), owner, laws).sqrt(),
                self._unexplained(drift - explained, x.masses, rounding),
            ]
        )

    def _unexplained(self, left: Tensor, masses: Tensor, rounding: Tensor) -> Tensor:
        of_unit = self.sweep.size_of_units(left)
        # The sums of a sweep have an error of their own.
        allowed = MARGIN * (rounding + 2 * self._eps[:, None] * masses) + torch.finfo(torch.float64).tiny
        ratio = left.new_zeros(len(self.sweep.laws), left.shape[1])
        ratio.scatter_reduce_(0, self.sweep.owner[:, None].expand_as(of_unit), of_unit / allowed, "amax")
        for number, law in enumerate(self.sweep.laws):
            if law.name in self.refused:
                ratio[number] = torch.nan
        return ratio

    def state_dict(self) -> dict[str, Any]:
        """Return Q(x₀), S and the tolerance by law, and the reasons of refusals: tensors on the CPU and words."""
        assert self.initial is not None and self._masses is not None
        return {
            "initial": self.sweep.by_name(self.initial),
            "explained": self.sweep.by_name(self.explained),
            "tolerance": self._by_law(MARGIN * self._rounding),
            "masses": self._by_law(self._masses),
            "refused": dict(self.refused),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same laws.

        Raises:
            UsageError: the state is of other laws.
        """
        own = {
            law.name: place.stop - place.start for law, place in zip(self.sweep.laws, self.sweep.ranges, strict=True)
        }
        other = {name: value.numel() for name, value in state["initial"].items()}
        if list(other.items()) != list(own.items()):
            raise UsageError(
                f"the tracker's state has the laws {_sized(other)}, and this model {_sized(own)}: "
                "go on with the model that it is of, or give laws="
            )
        self.initial = self._joined(state["initial"])
        self.explained = self._joined(state["explained"])
        self._rounding = self._joined(state["tolerance"]) / MARGIN
        self._masses = self._joined(state["masses"])
        self.refused = dict(state["refused"])

    def _by_law(self, of_units: Tensor) -> dict[str, Tensor]:
        return {law.name: of_units[self.sweep.owner == i].cpu() for i, law in enumerate(self.sweep.laws)}

    def _joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        device = self.sweep.unit_of.device
        flat = [part.reshape(-1).to(device, torch.float64) for part in parts.values()]
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=device)


def _added(values: Tensor, place: Tensor, length: int) -> Tensor:
    return values.new_zeros(length, values.shape[1]).index_add_(0, place, values)


def _sized(laws: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({size})" for name, size in laws.items()) or "none"


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
