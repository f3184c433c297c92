"""The denoiser that several experiments train: its data, and training that goes on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import denoiser

torch.set_num_threads(1)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Rows like the images', without MNIST."""
    source = torch.Generator().manual_seed(7)
    clean = torch.rand(70, 16, generator=source)
    return clean + 0.3 * torch.randn(70, 16, generator=source), clean


def adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=1e-2)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, again, other = (denoiser.build(3, seed, side=4) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.shape for p in one.parameters()] == [(16, 16)] * 3
    assert torch.equal(one[0].weight, again[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(denoiser.build(2, 0, "identity", side=4)[2].weight, torch.eye(16))


def test_a_stopped_training_goes_on_to_the_same_end(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    def trained(folder: Path, stop_after: int | None) -> tuple[nn.Module, denoiser.Curve]:
        folder.mkdir(exist_ok=True)
        seen = 0

        def look(network: nn.Module) -> Mapping[str, float]:
            nonlocal seen
            if seen == stop_after:
                raise KeyboardInterrupt
            seen += 1
            return {"norm": float(network[0].weight.detach().norm())}

        network = denoiser.build(2, 3, side=4)
        return network, denoiser.train(network, adam(network), data, 5, 20, 0, folder, look=look)

    straight, curve = trained(tmp_path / "straight", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", 2)
    resumed, second = trained(tmp_path / "broken", None)
    assert curve == second and [set(row) for row in curve] == [{"loss", "norm"}] * 5
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["norm"] == pytest.approx(float(straight[0].weight.detach().norm()))


def test_the_order_of_the_rows_is_the_seeds(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    losses = []
    for seed in (0, 0, 1):
        network = denoiser.build(2, 3, side=4)
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        losses.append(denoiser.train(network, adam(network), data, 2, 20, seed, folder)[-1]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_training_ends_where_it_diverges(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    network = denoiser.build(4, 0, side=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e6)
    curve = denoiser.train(network, optimizer, data, 5, 10, 0, tmp_path)
    assert len(curve) == 1 and not math.isfinite(curve[-1]["loss"])


def test_the_mean_loss_counts_a_ragged_last_batch_by_its_rows(data: tuple[Tensor, Tensor]) -> None:
    network = denoiser.build(2, 0, side=4)
    with torch.no_grad():
        expected = float(((network(data[0]) - data[1]) ** 2).mean())
    assert denoiser.mean_loss(network, data, batch=32) == pytest.approx(expected, rel=1e-6)


def test_weights_come_back(tmp_path: Path) -> None:
    network = denoiser.build(2, 0, side=4)
    denoiser.keep(network, tmp_path / "new" / "one.safetensors")
    back = denoiser.fetch(denoiser.build(2, 1, side=4), tmp_path / "new" / "one.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), back.parameters(), strict=True))


def test_data(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(200, 784, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(denoiser, "mnist", lambda split, rows: (images[:rows], None))
    denoiser.noisy.cache_clear()
    inputs, targets = denoiser.noisy("train", 100)
    assert torch.equal(targets, images[:100])
    assert float((inputs - targets).std()) == pytest.approx(1.25, rel=1e-2)
    assert denoiser.noisy("train", 100)[0] is inputs
    assert not torch.equal(denoiser.noisy("test", 100)[0], inputs)
    small, clean = denoiser.noisy("train", 50, 14)
    torch.testing.assert_close(clean[0, 15], images[0].view(28, 28)[2:4, 2:4].mean())
    assert small.shape == (50, 196)
    denoiser.noisy.cache_clear()
