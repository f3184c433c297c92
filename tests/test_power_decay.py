"""PowerDecayLR: its rates, its end, what it refuses, and the optimizers and tensors that it goes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from torchflat.optim import NormalizedGD, PowerDecayLR


def still(lr: float | Tensor = 1.0, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([Parameter(torch.zeros(1))], lr=lr, **options)


def rates(scheduler: PowerDecayLR, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        assert float(scheduler.get_last_lr()[0]) == found[-1]
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("exponent", [0, 0.25, 0.5, 1.0])
def test_the_rate_falls_as_a_power(exponent: float) -> None:
    assert rates(PowerDecayLR(still(2.0), exponent), 6) == [2.0 * (k + 1) ** -exponent for k in range(6)]


def test_the_last_steps_fall_to_zero() -> None:
    scheduler = PowerDecayLR(still(), 0.5, cooldown_steps=4, total_steps=6)
    factors = [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates(scheduler, 8) == [factor * (k + 1) ** -0.5 for k, factor in enumerate(factors)]


def test_a_run_that_is_all_cool_down() -> None:
    assert rates(PowerDecayLR(still(), 0.0, cooldown_steps=4, total_steps=4), 5) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_without_a_cool_down_nothing_ends() -> None:
    assert rates(PowerDecayLR(still(), 1.0, total_steps=2), 4) == [1.0, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent": -0.5}, "exponent must be 0 or more, got -0.5"),
        ({"exponent": float("nan")}, "exponent must be 0 or more, got nan"),
        ({"exponent": 0.5, "cooldown_steps": -1}, "cooldown_steps must be 0 or more, got -1"),
        (
            {"exponent": 0.5, "cooldown_steps": 3},
            "cooldown_steps=3 needs total_steps, the number of steps of the whole",
        ),
        (
            {"exponent": 0.5, "cooldown_steps": 3, "total_steps": 2},
            "total_steps must be at least cooldown_steps=3, got 2",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    optimizer = still()
    with pytest.raises(ValueError, match=message):
        PowerDecayLR(optimizer, **arguments)
    assert "initial_lr" not in optimizer.param_groups[0]


def test_two_decays_at_once_are_refused() -> None:
    params = [Parameter(torch.zeros(1)), Parameter(torch.zeros(1))]
    optimizer = NormalizedGD([{"params": params[:1], "decay": 0}, {"params": params[1:]}], 1.0)
    with pytest.raises(ValueError, match=r"parameter group 1 has decay=0\.25, which would multiply with this schedule"):
        PowerDecayLR(optimizer, 0.5)


def test_its_steps_are_those_of_the_decay_that_is_built_in() -> None:
    found = []
    for built_in in (True, False):
        x = Parameter(torch.tensor([2.0, 0.7], dtype=torch.float64))
        optimizer = NormalizedGD([x], 0.3, decay=0.25 if built_in else 0.0)
        scheduler = None if built_in else PowerDecayLR(optimizer, 0.25)
        for _ in range(30):
            optimizer.zero_grad()
            (x[0] * x[1] - 1).square().backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
        found.append(x.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_the_cool_down_takes_the_last_swing_away() -> None:
    """T050: steps of length α_K end α_K away from the valley, on one side or the other; those that fall to 0, in it."""
    ends = []
    for cooldown in (0, 1000):
        x = Parameter(torch.tensor([1.8, -0.4], dtype=torch.float64))
        optimizer = NormalizedGD([x], 0.3, decay=0)
        scheduler = PowerDecayLR(optimizer, 0.25, cooldown_steps=cooldown, total_steps=3000)
        distances = []
        for _ in range(3000):
            optimizer.zero_grad()
            (x[0] * x[1] - 1).square().backward()
            optimizer.step()
            scheduler.step()
            distances.append(float((x[0] * x[1] - 1).detach().abs()))
        ends.append(max(distances[-2:]))
    assert ends[1] < 1e-3 < 1e-2 < ends[0]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_that_is_a_tensor_stays_one(shape: tuple[int, ...]) -> None:
    rate = torch.full(shape, 2.0, dtype=torch.float64)
    optimizer = NormalizedGD([Parameter(torch.zeros(1))], rate, decay=0)
    scheduler = PowerDecayLR(optimizer, 0.5)
    kept = optimizer.param_groups[0]["lr"]
    assert rates(scheduler, 4) == pytest.approx([2.0 * (k + 1) ** -0.5 for k in range(4)], rel=1e-15)
    assert optimizer.param_groups[0]["lr"] is kept and kept.shape == shape
    assert float(scheduler.base_lrs[0]) == 2.0


def test_each_group_has_its_own_rate() -> None:
    params = [Parameter(torch.zeros(1)), Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=2.0)
    scheduler = PowerDecayLR(optimizer, 1.0)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.25, 1.0]


def test_it_resumes() -> None:
    arguments = {"exponent": 0.5, "cooldown_steps": 4, "total_steps": 9}
    expected = rates(PowerDecayLR(still(), **arguments), 9)
    optimizer = still()
    scheduler = PowerDecayLR(optimizer, **arguments)
    rates(scheduler, 4)
    again = still()
    other = PowerDecayLR(again, exponent=0.0)
    again.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    assert rates(other, 5) == expected[4:]
    # Or from the number of the last step, as all schedulers of torch do.
    third = still()
    third.load_state_dict(optimizer.state_dict())
    assert rates(PowerDecayLR(third, **arguments, last_epoch=3), 5) == expected[4:]


def test_it_takes_its_turn_after_a_warm_up() -> None:
    optimizer = still()
    warm = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    both = lr_scheduler.SequentialLR(optimizer, [warm, PowerDecayLR(optimizer, 1.0)], milestones=[2])
    found = []
    for _ in range(5):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert found == pytest.approx([0.5, 0.5, 1.0, 1 / 2, 1 / 3])
