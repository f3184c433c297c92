"""Power iteration agrees with Lanczos, and never claims what it did not see."""

from __future__ import annotations

import pytest
import torch
from calibration import TRAP, allowed, calibrate_sharpness, diagonal, problems, quadratic

from torchflat import Status, sharpness
from torchflat.spectrum import NotConvergedWarning

quiet = pytest.mark.filterwarnings("ignore::torchflat.spectrum.NotConvergedWarning")


@quiet
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("spectrum", [(5.0, 1.0, 0.5, -2.0), (-5.0, -1.0, 0.5, 3.0), (-5.0, -4.0, -1.0, -2.0)])
def test_power_agrees_with_lanczos(spectrum: tuple[float, ...], scale: float) -> None:
    f = quadratic(
        torch.diag(torch.tensor([*spectrum, *([0.1] * 6)] if max(spectrum) > 0 else spectrum).double()) * scale
    )
    power, lanczos = sharpness(f, 1e-3, method="power", budget=4000), sharpness(f, 1e-3)
    top = max(*spectrum) * scale
    assert power.value == pytest.approx(top, rel=2e-3) == lanczos.value
    assert power.lower <= top <= power.upper
    assert torch.allclose(power.vector.abs(), lanczos.vector.abs(), atol=2e-2)


def test_power_that_only_settled_is_not_certified() -> None:
    with pytest.warns(NotConvergedWarning, match="NOT_CERTIFIED") as record:
        answer = sharpness(diagonal(5.0, *([0.1] * 30)), method="power")
    assert len(record) == 1
    assert answer.status is Status.NOT_CERTIFIED
    assert answer.lower <= 5 <= answer.upper
    assert answer.residual <= 1e-2 * answer.value + 16 * answer.floor


@quiet
def test_power_in_the_trap_is_never_converged() -> None:
    misses = 0
    for seed in range(8):
        answer = sharpness(quadratic(torch.diag(TRAP)), 1e-2, method="power", seed=seed)
        assert answer.status is not Status.CONVERGED
        misses += not answer.lower <= float(TRAP[0]) <= answer.upper
    assert misses <= allowed(8, 0.01)


@quiet
@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_power_is_calibrated(delta: float) -> None:
    tally = calibrate_sharpness(problems(22, 15, largest=50), 22, delta, 1e-2, method="power", compare=False)
    assert len(tally.missed) <= allowed(tally.runs, delta), tally
    assert not tally.faults, tally
