"""λ₁ along training, by products that start from the last eigenvector, within a share of the time of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from torchflat.distributed import Team
from torchflat.errors import NonFiniteError, UsageError
from torchflat.objective import Objective
from torchflat.result import Status
from torchflat.spectrum.krylov import Krylov

__all__ = ["Follower", "Reading"]

# How near to an eigenvalue a value is to be, and how many products may be spent on it.
RTOL, PRODUCTS = 0.02, 40
# What a measurement costs, for a guess at the next one: three products, and as much as two for the graph.
TYPICAL = 5


@dataclass(frozen=True)
class Reading:
    """A value of λ₁, followed until it settled (TRACKED) or its products were spent (BUDGET): then a lower bound."""

    value: float
    status: Status
    vector: Tensor


class Follower:
    """Measures λ₁ of an objective at the present parameters, at most every so many steps and share of the time.

    Each measurement is a Lanczos run that starts from the vector where the last one ended, with nothing random in it,
    so that a few products do, and nothing bounds λ₁ from above; the first starts at random and takes more. None is cut
    short by the clock, as half a run tells nothing of λ₁: what one takes beyond the share, later ones wait for.

    Args:
        objective: f; or a function that makes it anew for each measurement, which a model with statistics in its
            buffers (batch normalisation) needs, as an objective copies them.
        every: steps between measurements, at least.
        share: of all time since the first step that may be spent here; a measurement that would exceed it waits, but
            for the first.
    """

    def __init__(self, objective: Objective | Callable[[], Objective], every: int, share: float) -> None:
        if every < 1:
            raise UsageError(f"sharpness_every={every}: it must be a positive number of steps")
        if not share > 0:
            raise UsageError(f"sharpness_share={share}: it must be a positive share of the time, such as 0.15")
        self._objective, self.every, self.share = objective, every, share
        self._next = 0 if math.isinf(share) else every
        self._last: Reading | None = None
        self._began: float | None = None
        self._expected = 0.0
        self.spent = 0.0

    def measure(self, step: int, parameters: Mapping[str, Tensor]) -> Reading | None:
        """Return λ₁, or None where it is not yet time, or the parameters are not finite."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        if step < self._next:
            return None
        allowed = self.share * (now - self._began) - self.spent
        if self._last is not None and self._team.anywhere(lambda: allowed <= self._expected):
            return None
        self._next = (step // self.every + 1) * self.every
        f = self._objective if isinstance(self._objective, Objective) else self._objective()
        missing = [name for name in f.layout.names if name not in parameters]
        if missing:
            raise UsageError(f"objective= has the parameter {missing[0]!r}, and the tracked model has not")
        try:
            self._last = self._follow(f.at(f.layout.flatten([parameters[name] for name in f.layout.names])))
        except NonFiniteError:
            return None
        finally:
            self.spent += time.perf_counter() - now
        return self._last

    @property
    def _team(self) -> Team:
        return self._objective.team if isinstance(self._objective, Objective) else Team.of(None)

    def _follow(self, f: Objective) -> Reading:
        start = None if self._last is None else self._last.vector.to(f.device, f.dtype)
        status = Status.BUDGET
        with Krylov.of(f, 0, "tracker", start=start, fresh=1.0 if start is None else 0.0) as krylov:
            while krylov.steps < PRODUCTS and not krylov.full:
                began = time.perf_counter()
                krylov.step()
                each = time.perf_counter() - began
                if krylov.settled(RTOL * abs(float(krylov.ritz()[0][-1]))):
                    status = Status.TRACKED
                    break
            self._expected = TYPICAL * each
            values, vectors = krylov.ritz()
            return Reading(float(values[-1]), status, krylov.vectors(vectors[:, -1:])[0])

    def state_dict(self) -> dict[str, int]:
        """Return when the next measurement is due; the eigenvector is left out, being as large as the parameters."""
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state: the next measurement starts at random again."""
        self._next = state["next"]
