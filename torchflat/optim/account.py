"""An account of the conserved quantities along training: what plain steps explain of their change, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
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

    def __init__(self, sweep: Sweep, moves: Moves, parameters: Mapping[str, Tensor]) -> None:
        self.sweep, self.moves = sweep, moves
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
        self._setting: tuple[Any, ...] | None = None
        self._masses: Tensor | None = None

    @property
    def begun(self) -> bool:
        """Whether the parameters that it starts or goes on at are known."""
        return self._masses is not None

    def coarser(self, dtype: torch.dtype) -> None:
        """Take gradients to be no more precise than ``dtype``, as under autocast."""
        self._gradient_error = self._gradient_error.clamp(min=AUTOCAST_ERROR * _eps(dtype))

    def begin(self, x: Swept) -> None:
        """Start, or go on, at the parameters ``x``."""
        if self.initial is None:
            self.initial = x.values
        self._masses = x.masses

    def step(self, g: Swept, factors: Tensor) -> None:
        """Enter the plain step to come, with a for each parameter."""
        if len(self.refused) == len(self.sweep.laws):
            return
        assert self._masses is not None
        a = factors[self._first]
        per_value = a[self.sweep.unit_of]
        quadratic = (per_value != 0) & ~self.sweep.linear[self.sweep.unit_of]
        self.explained += torch.where(quadratic, per_value.square() * g.values, 0.0)
        both = torch.where(self.sweep.linear, g.masses, (self._masses * g.masses).sqrt())
        first_order = torch.where(a != 0, 2 * self._gradient_error * a.abs() * both, 0.0)
        self._rounding += self._eps * self._masses + first_order

    def look(self) -> None:
        """Look for laws whose parameters will not be moved by plain steps with a common factor."""
        setting = self.moves.setting()
        if setting == self._setting:
            return
        self._setting = setting
        everywhere = self.moves.refusal()
        for law in self.sweep.laws:
            reason = everywhere or self.moves.refusal_of([m.parameter for m in law.members])
            if reason:
                self.refused.setdefault(law.name, reason)

    def drift(self, x: Swept) -> Tensor:
        """Return Q(x) − Q(x₀), (size,)."""
        assert self.initial is not None
        return x.values - self.initial

    def unexplained(self, x: Swept) -> Tensor:
        """Return, for each law, the largest |Q(x) − Q(x₀) − S| over what rounding may do: (laws,), NaN if refused."""
        left = (self.drift(x) - self.explained).square()
        of_unit = _added(left, self.sweep.unit_of, self.sweep.units).sqrt()
        # The sums of a sweep have an error of their own.
        allowed = MARGIN * (self._rounding + 2 * self._eps * x.masses) + torch.finfo(torch.float64).tiny
        laws = len(self.sweep.laws)
        ratio = torch.zeros(laws, dtype=torch.float64, device=left.device)
        ratio.scatter_reduce_(0, self.sweep.owner, of_unit / allowed, "amax")
        for number, law in enumerate(self.sweep.laws):
            if law.name in self.refused:
                ratio[number] = torch.nan
        return ratio

    def statistics(self, x: Swept) -> Tensor:
        """Return, in columns for the laws, |C(x)|, Σ|C|/(writers + readers), |C(x) − C(x₀)| and what is unexplained.

        For a full coupling Σ|C| is over the eigenvalues of C; |·| are Euclidean and Frobenius norms.
        """
        laws, owner = len(self.sweep.laws), self.sweep.law_of
        sizes = _added(x.values.abs(), owner, laws)
        for number, (law, place) in enumerate(zip(self.sweep.laws, self.sweep.ranges, strict=True)):
            if isinstance(law, Coupling) and law.kind == "full":
                sizes[number] = torch.linalg.eigvalsh(x.values[place].view(law.size, law.size)).abs().sum()
        return torch.stack(
            [
                _added(x.values.square(), owner, laws).sqrt(),
                sizes / _added(x.masses, self.sweep.owner, laws),
                _added(self.drift(x).square(), owner, laws).sqrt(),
                self.unexplained(x),
            ]
        )

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
        names = [law.name for law in self.sweep.laws]
        if list(state["initial"]) != names:
            raise UsageError(
                f"the tracker's state has the laws {list(state['initial'])}, and this model {names}: "
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
    return torch.zeros(length, dtype=torch.float64, device=values.device).index_add_(0, place, values)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
