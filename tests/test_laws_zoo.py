"""Laws of architectures people use, counted by hand, and their action."""

from __future__ import annotations

import copy

import pytest
import torch

from torchflat.symmetry import laws

torchvision = pytest.importorskip("torchvision")

SLOW = pytest.mark.slow
# Batch normalisation in evaluation stops what comes before it; its gain and bias write what comes after.
CASES = [
    # A stream for each stage, 960 channels, and the inner channels of two blocks each.
    ("resnet18", "eval", 3 * 960, 0, 0),
    # GELU stops: norm → linear, linear → layer scale of 18 blocks, norms before convolutions, last norm → classifier.
    # 1ᵀ of the first convolution (48 + 1) before its norm, and of the biases of 18 depthwise ones.
    ("convnext_tiny", "eval", 2 * 6624 + 96 + 192 + 384 + 768, 0, 49 + 18),
    pytest.param("vgg11_bn", "eval", 2752 + 2 * 4096, 0, 0, marks=SLOW),
    # Two norms of 12 blocks and the last; 12 heads of 64 with Q/K and V/O; b_K, 1ᵀ of out_proj and of the last layer of
    # the MLP, 1ᵀ of the patches, class token − position 0, patches' bias − positions, 1ᵀ of positions.
    pytest.param(
        *("vit_b_16", "eval", 25 * 768, 12 * 12 * 2 * (64 * 65 // 2)),
        12 * (768 + 769 + 3073) + 3 * 768 + 197,
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("name", "mode", "diagonal", "full", "linear"), CASES)
def test_counts_and_action(name: str, mode: str, diagonal: int, full: int, linear: int) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).double().eval()
    x = torch.randn(1, 3, *([224, 224] if name.startswith("vit") else [64, 64]), dtype=torch.float64)
    found = laws(model, x, mode=mode, points=1)  # type: ignore[arg-type]
    assert found.count == {"diagonal": diagonal, "full": full, "linear": linear}
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
