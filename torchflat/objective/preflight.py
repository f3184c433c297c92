"""What is checked before the first pass: a model that is deterministic, and a loss that is a mean over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import DataError, LossError, ReproducibilityError, TorchflatError
from torchflat.objective.batches import Batches, row_count, rows_of, slice_rows
from torchflat.objective.evaluation import ModelTerm, Term
from torchflat.objective.ledger import Ledger

__all__ = ["preflight"]

SAMPLE_ROWS = 256
# ... but a small share of all rows, and that many at least.
SAMPLE_SHARE, FEWEST_ROWS = 1 / 32, 16
# A batch that fails in part is tried as a whole up to this size.
LARGEST_WHOLE = 4096
# Relative differences that rounding explains, in units of ε, before the comparison is repeated in float64.
FINE_ULPS = 32
# ... and those that it explains in float64, where losses far below the size of the logits still carry many digits.
EXACT = 1e-6
# ... and where there is no float64 to ask.
COARSE = 1e-3
# How far each parameter moves, relative to itself, where the loss is nothing but rounding.
NEARBY = 1e-2


@dataclass(frozen=True)
class _Probe:
    """Loss sums and weights of one sample: at once, at once again, and of its two halves (none if it was not cut)."""

    whole: tuple[float, float]
    again: tuple[float, float]
    halves: tuple[tuple[float, float], ...]

    def convincing(self, tolerance: float) -> bool:
        """Whether nothing speaks against the loss, and something could: where it is zero, so is any multiple."""
        telling = self.whole[0] != 0 or not self.halves
        return telling and self.reproducible(tolerance) and self.additive(tolerance)

    def finite(self) -> bool:
        return all(math.isfinite(value) for value, _ in (self.whole, self.again, *self.halves))

    def reproducible(self, tolerance: float) -> bool:
        return _close(self.whole[0], self.again[0], tolerance)

    def additive(self, tolerance: float) -> bool:
        scale = sum(abs(value) for value, _ in self.halves)
        values = _close(self.whole[0], sum(value for value, _ in self.halves), tolerance, scale)
        return not self.halves or (values and self._weights_add_up())

    def averaged(self, tolerance: float) -> bool:
        """Whether the sum of the whole is the weighted mean of those of the halves."""
        weight = sum(weight for _, weight in self.halves)
        products = sum(value * weight for value, weight in self.halves)
        return self._weights_add_up() and weight > 0 and _close(self.whole[0], products / weight, tolerance)

    def _weights_add_up(self) -> bool:
        return math.isclose(self.whole[1], sum(weight for _, weight in self.halves), rel_tol=1e-4)


def _close(a: float, b: float, tolerance: float, scale: float = 0.0) -> bool:
    # A loss that is not finite is reported when it is evaluated, with the names of what is not.
    return not (math.isfinite(a) and math.isfinite(b)) or abs(a - b) <= tolerance * max(abs(a), abs(b), scale)


def preflight(term: Term, parameters: Sequence[Tensor], batches: Batches, limit: int | None, ledger: Ledger) -> bool:
    """Evaluate a sample of at most ``limit`` rows twice, and in two halves; return whether batches may be cut.

    Where float32 leaves a doubt, float64 decides: rounding vanishes there, and randomness does not. Where float64 does
    too, a point nearby decides: at a network that fits its targets exactly the loss is rounding and nothing else, and
    whether it is a mean over rows does not depend on the point.

    Raises:
        ReproducibilityError: two evaluations on the same rows differ.
        LossError: the loss is not a mean over rows, and was not given as a sum with a weight.
    """
    wanted = min(SAMPLE_ROWS, max(FEWEST_ROWS, int(SAMPLE_SHARE * batches.rows)))
    rows = min(wanted, limit or wanted)
    sample, again = batches.sample(rows), batches.sample(rows)
    cuttable = row_count(sample) is not None
    try:
        probe = _probe(term, parameters, sample, again, cuttable, ledger)
    except DataError:
        sample, again, cuttable = batches.first(), batches.first(), False
        if rows_of(sample) > LARGEST_WHOLE:
            raise
        # Perhaps a model for batches of one size only. If the whole batch fails too, that is the error to tell.
        probe = _probe(term, parameters, sample, again, cuttable, ledger)
        term.notes.append("the model fails on a part of a batch: batches were kept whole")
    tolerance = EXACT if term.dtype == torch.float64 else min(COARSE, FINE_ULPS * torch.finfo(term.dtype).eps)
    finest = torch.float64
    if term.dtype != finest and not probe.convincing(tolerance):
        exact = _probe_in(finest, term, parameters, sample, again, cuttable, ledger)
        probe, tolerance = (probe, COARSE) if exact is None else (exact, EXACT)
        finest = term.dtype if exact is None else finest
    if not probe.convincing(tolerance):
        moved = _probe_in(finest, term, _nearby(parameters), sample, again, cuttable, ledger)
        probe = moved if moved is not None and moved.finite() else probe
    if not probe.reproducible(tolerance):
        raise ReproducibilityError(
            f"two evaluations on the same rows gave {probe.whole[0]:.9g} and {probe.again[0]:.9g}: the model or its "
            "data is random (dropout, noise, sampling, augmentation); switch that off, or fix its seed inside forward"
        )
    if probe.additive(tolerance):
        return cuttable
    _refuse_wrong_sums(term, probe, tolerance)
    term.notes.append("batch_loss is not a sum over rows: batches were kept whole")
    return False


def _probe(term: Term, parameters: Sequence[Tensor], sample: Any, again: Any, cut: bool, ledger: Ledger) -> _Probe:
    def evaluate(batch: Any) -> tuple[float, float]:
        ledger.charge(forwards=rows_of(batch))
        with torch.no_grad():
            total, weight = term(parameters, batch)
        return float(total), weight

    rows = rows_of(sample)
    cuts = ((0, rows // 2), (rows // 2, rows)) if cut and rows > 1 else ()
    return _Probe(evaluate(sample), evaluate(again), tuple(evaluate(slice_rows(sample, *ends)) for ends in cuts))


def _probe_in(
    dtype: torch.dtype,
    term: Term,
    parameters: Sequence[Tensor],
    sample: Any,
    again: Any,
    cut: bool,
    ledger: Ledger,
) -> _Probe | None:
    """Repeat the probe in another precision or at another point; None where that cannot be computed."""
    try:
        converted = [parameter.detach().to(dtype) for parameter in parameters]
        return _probe(term.converted(dtype), converted, sample, again, cut, ledger)
    except (TorchflatError, RuntimeError, TypeError):
        return None


def _nearby(parameters: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    noise = (torch.randn(p.shape, generator=generator, device="cpu").to(p) for p in parameters)
    return [p.detach() * (1 + NEARBY * n) for p, n in zip(parameters, noise, strict=True)]


def _refuse_wrong_sums(term: Term, probe: _Probe, tolerance: float) -> None:
    whole, parts = probe.whole[0], sum(value for value, _ in probe.halves)
    if isinstance(term, ModelTerm) and term.call.batch_loss is None:
        raise LossError(
            f"the loss is not a mean over rows: {whole:.6g} summed over some rows at once, {parts:.6g} over their two "
            "halves. Use reduction='mean' without class weights or ignored targets and no layer that mixes rows, or "
            "pass batch_loss(model, batch) -> (sum, weight) instead"
        )
    if probe.averaged(tolerance):
        raise LossError(
            f"batch_loss returned {whole:.6g} with weight {probe.whole[1]:g} for a batch, and the same on average for "
            "its two halves: it is a mean where the sum belongs; return (mean * weight, weight)"
        )
