"""Objectives at the flattest points of their orbits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchflat.objective import Objective
from torchflat.symmetry.coupling import Coupling
from torchflat.symmetry.flattest import Flattest, flattest
from torchflat.symmetry.group import HasCouplings

__all__ = ["flattened"]


def flattened(
    laws: HasCouplings | Sequence[Coupling], told: Callable[[Flattest], object] | None = None, **options: Any
) -> Callable[[Objective], Objective]:
    """Return what takes an objective to the flattest point of its orbit, as ``compare(..., symmetry=)`` wants it.

    Args:
        laws: the couplings of the model, or what has them; objectives at other points of the same model share them.
        told: called with each answer of :func:`flattest`.
        options: of :func:`flattest`.

    >>> import torch
    >>> from torchflat.symmetry import Laws
    >>> f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, torch.tensor([4.0, 1 / 4], dtype=torch.float64))
    >>> move = flattened(Laws.from_group(B=torch.tensor([[1.0], [-1.0]])))
    >>> [round(entry, 4) for entry in move(f).x.tolist()]
    [1.0, 1.0]
    """

    def move(f: Objective) -> Objective:
        answer = flattest(f, laws, **options)
        if told is not None:
            told(answer)
        return f.at(f.layout.flatten([answer.state_dict[name] for name in f.layout.names]))

    return move
