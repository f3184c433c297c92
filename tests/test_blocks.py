"""λ₁ of each diagonal block against the dense blocks, by module and by tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration import allowed, dense_network, held, problems, quadratic
from networks import NETWORKS
from torch import nn

from torchflat import Objective, Status, block_sharpness, sharpness
from torchflat.errors import UsageError
from torchflat.spectrum import NotConvergedWarning

quiet = pytest.mark.filterwarnings("ignore::torchflat.spectrum.NotConvergedWarning")


def block_indices(f: Objective, by: str) -> dict[str, list[int]]:
    """Coordinates of every block, from the names alone."""
    blocks: dict[str, list[int]] = {}
    for name, part in f.layout.slices().items():
        key = name if by == "tensor" or "." not in name else name.rsplit(".", 1)[0]
        blocks.setdefault(key, []).extend(range(part.start, part.stop))
    return {name: indices for name, indices in blocks.items() if indices}


@pytest.mark.parametrize("by", ["module", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_against_their_dense_blocks(name: str, dtype: torch.dtype, by: str) -> None:
    network, hessian = dense_network(name)
    f = network.objective(dtype=dtype)
    own = held(f)
    whole = sharpness(f, 1e-4)
    answer = block_sharpness(f, 1e-2, by=by, top=whole.vector, budget=1e4)
    slack = network.by_differences * float(torch.linalg.matrix_norm(hessian, 2))
    expected = block_indices(f, by)
    assert [row.name for row in answer.rows] == list(expected)
    assert answer.status is Status.CONVERGED
    gradient = f.gradient()
    for row in answer.rows:
        indices = expected[row.name]
        block = hessian[indices][:, indices]
        truth = float(torch.linalg.eigvalsh(block)[-1])
        assert row.lower - slack <= truth <= row.upper + slack
        assert row.lower <= row.value <= row.upper
        assert row.status is Status.CONVERGED
        assert row.parameters == len(indices)
        assert row.gradient_norm == pytest.approx(float(gradient[indices].double().norm()), rel=1e-6)
        # Interlacing: no block is sharper than the whole.
        assert row.lower <= whole.upper
    assert sum(row.share or 0.0 for row in answer.rows) == pytest.approx(1, abs=1e-5)
    assert all(row.share is not None and row.share >= 0 for row in answer.rows)
    assert f.memory.vectors == own


def two_blocks(matrix: torch.Tensor, cut: int) -> Objective:
    """A quadratic whose blocks are the first ``cut`` variables and the rest."""
    model = nn.ParameterDict({"a": torch.zeros(cut).double(), "b": torch.zeros(len(matrix) - cut).double()})

    def batch_loss(model: nn.Module, batch: object) -> tuple[torch.Tensor, float]:
        x = torch.cat([model["a"], model["b"]])  # type: ignore[index]
        return x @ (matrix @ x) / 2, 1.0

    return Objective(model, None, [(torch.zeros(1),)], batch_loss=batch_loss)


@quiet
@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_joint_intervals_are_calibrated(delta: float) -> None:
    misses = runs = 0
    for item in problems(50, 40, largest=80):
        if item.n < 4 or item.kind in ("tiny", "huge"):
            continue
        cut = item.n // 3
        answer = block_sharpness(two_blocks(item.matrix, cut), 1e-2, 1 - delta, "tensor", item.seed % 2**32, 4000)
        runs += 1
        blocks = (item.matrix[:cut, :cut], item.matrix[cut:, cut:])
        tops = [float(torch.linalg.eigvalsh(block)[-1]) for block in blocks]
        slack = 1e-15 * item.norm
        misses += not all(
            row.lower - slack <= top <= row.upper + slack for row, top in zip(answer.rows, tops, strict=True)
        )
    assert runs > 20
    assert misses <= allowed(runs, delta)


def test_agrees_with_the_block_alone() -> None:
    matrix = torch.diag(torch.linspace(-1, 3, 60, dtype=torch.float64))
    answer = block_sharpness(two_blocks(matrix, 20), 1e-3, by="tensor", budget=4000)
    for row, part in zip(answer.rows, (matrix[:20, :20], matrix[20:, 20:]), strict=True):
        alone = sharpness(quadratic(part), 1e-3)
        assert row.value == pytest.approx(alone.value, rel=1e-3)
        assert row.lower <= alone.upper and alone.lower <= row.upper


def test_block_that_f_does_not_depend_on_has_zero_curvature() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "idle": nn.Linear(4, 4)})

    def batch_loss(model: nn.Module, batch: tuple[torch.Tensor]) -> tuple[torch.Tensor, int]:
        return model["used"](batch[0]).square().sum(), len(batch[0])  # type: ignore[index]

    answer = block_sharpness(Objective(model, None, [(torch.randn(6, 3),)], batch_loss=batch_loss))
    idle = {row.name: row for row in answer.rows}["idle"]
    assert (idle.lower, idle.value, idle.upper, idle.gradient_norm) == (0, 0, 0, 0)
    assert answer.status is Status.CONVERGED
    assert all(row.share is None for row in answer.rows)


def test_blocks_that_are_done_cost_nothing_more() -> None:
    matrix = torch.diag(torch.cat([torch.ones(50), torch.linspace(0, 1, 150)]).double())
    f = two_blocks(matrix, 50)
    answer = block_sharpness(f, 1e-3, by="tensor", budget=4000)
    alone = sharpness(quadratic(matrix[50:, 50:]), 1e-3, 1 - 0.01 / 2)
    # The identity needs one step; all the others are those of the second block.
    assert answer.cost.products <= alone.steps * 1.3 + 1


def test_budget_and_callback() -> None:
    matrix = torch.diag(torch.linspace(-1, 1, 200, dtype=torch.float64))
    with pytest.warns(NotConvergedWarning, match="BUDGET") as record:
        answer = block_sharpness(two_blocks(matrix, 100), 1e-6, by="tensor", budget=40)
    assert len(record) == 1
    assert answer.status is Status.BUDGET and answer.cost.gradients <= 40
    assert [row.status for row in answer.rows] == [Status.BUDGET] * 2
    for row, top in zip(answer.rows, (float(matrix[99, 99]), 1.0), strict=True):
        assert row.lower <= top <= row.upper
    seen: list[float] = []

    def stop(fraction: float) -> bool:
        seen.append(fraction)
        return len(seen) == 3

    with pytest.warns(NotConvergedWarning, match="BUDGET"):
        block_sharpness(two_blocks(matrix, 100), 1e-6, by="tensor", callback=stop)
    assert seen == [0.0, 0.0, 0.0]


def test_interruption_gives_the_memory_back() -> None:
    f = two_blocks(torch.diag(torch.linspace(-1, 1, 200, dtype=torch.float64)), 100)
    own = held(f)

    def interrupt(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block_sharpness(f, callback=interrupt)
    assert f.memory.vectors == own


def test_unknown_partition_is_refused() -> None:
    with pytest.raises(UsageError, match="'layer'"):
        block_sharpness(two_blocks(torch.eye(4).double(), 2), by="layer")


def test_same_seed_same_answer() -> None:
    matrix = torch.diag(torch.from_numpy(np.linspace(-1, 1, 80)))
    first, second, other = (block_sharpness(two_blocks(matrix, 30), by="tensor", seed=seed).rows for seed in (0, 0, 1))
    assert first == second != other


def test_a_block_that_is_zero_beside_the_others_has_converged() -> None:
    # The last layer is zero, so that the first one's block vanishes, up to float32 rounding of the whole Hessian.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    f = Objective(model, nn.MSELoss(), (torch.randn(40, 6), torch.randn(40, 3)))
    first, last = block_sharpness(f).rows
    assert first.lower <= 0 <= first.upper < 1e-3 * last.lower
    assert first.status is last.status is Status.CONVERGED
