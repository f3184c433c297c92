"""Which channels may be mixed with each other, and not only scaled: a partition that every operator refines."""

from __future__ import annotations

import torch
from torch import Tensor

from torchflat.symmetry.equations import Solution
from torchflat.symmetry.forms import Form, dependent_axes

__all__ = ["Mixing"]


class Mixing:
    """A partition of the channels into blocks that an invertible matrix may act on.

    All channels start in one block. An operator says what it needs: two channels stay together where they occur
    equally often in each *fibre*, a line of entries that the operator treats alike: the entries that a linear layer
    sums over, or writes. An element-wise function has fibres of one entry, and so puts every channel by itself. Each
    channel's occurrences are hashed into 64 bits, and channels with the same hash are a block.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor | None]] = []

    def fibres(self, form: Form, axes: set[int]) -> None:
        """Allow mixing along ``axes`` only, by the same matrix at every index of the other axes."""
        for _, labels in form.terms:
            varying = dependent_axes(labels)
            rows = [axis for axis in varying if axis not in axes]
            short = labels.permute(rows + [axis for axis in range(labels.ndim) if axis not in rows])
            for axis in range(len(rows), labels.ndim):
                if short.stride(axis) == 0:
                    short = short.narrow(axis, 0, 1)
            number = int(torch.Size(short.shape[: len(rows)]).numel())
            matrix = short.reshape(number, -1)
            place = torch.arange(number)[:, None].expand(matrix.shape)
            self._seen.append((matrix.reshape(-1), place.reshape(-1)))

    def separate(self, form: Form) -> None:
        """Allow scaling only: what an element-wise function needs of its argument."""
        for _, labels in form.terms:
            still = [axis for axis in range(labels.ndim) if axis not in dependent_axes(labels)]
            for axis in still:
                labels = labels.narrow(axis, 0, 1)
            self._seen.append((labels.reshape(-1), None))

    def blocks(self, solution: Solution) -> Tensor:
        """Return a key for every free variable: those with the same key make up a block."""
        generator = torch.Generator().manual_seed(0)
        keys = torch.zeros(len(solution.root), dtype=torch.int64)
        for labels, places in self._seen:
            if places is None:
                for _, variables, _ in solution.terms(labels):
                    alone = variables.unique()
                    keys[alone] += _random(len(alone), generator)
                continue
            weights = _random(int(places.max()) + 1 if len(places) else 0, generator)
            for where, variables, factors in solution.terms(labels):
                # The factor is hashed as well, so that only channels that act alike share a block.
                keys.index_add_(0, variables, weights[places[where]] * (1000 * factors).round().to(torch.int64))
        return keys


def _random(number: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**62), 2**62, (number,), generator=generator)
