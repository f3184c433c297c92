"""The action of the laws of architectures people use: outputs stay. Their counts are in test_laws_table."""

from __future__ import annotations

import copy

import pytest
import torch

from torchflat.symmetry import laws

torchvision = pytest.importorskip("torchvision")

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_tiny", pytest.param("vgg11_bn", marks=SLOW), pytest.param("vit_b_16", marks=SLOW)]
)
def test_action(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).double().eval()
    x = torch.randn(1, 3, *([224, 224] if name.startswith("vit") else [64, 64]), dtype=torch.float64)
    found = laws(model, x, points=1)
    assert not found.dropped and not found.unknown
    scales = {}
    for coupling in found.couplings:
        z = 2 * torch.rand(coupling.size, dtype=torch.float64) - 1
        scales[coupling.name] = z if coupling.kind == "diagonal" else torch.diag(z)
    moved = copy.deepcopy(model)
    moved.load_state_dict(found.act(model, scales))
    with torch.no_grad():
        out = model(x)
        assert float((moved(x) - out).abs().max()) <= 1e-9 * float(out.abs().max())
