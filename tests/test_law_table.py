"""The table of conservation laws, derived by hand, against counts from gradients of the same networks, made small."""

from __future__ import annotations

import pytest
import torch
from law_count import Counted, counted
from law_networks import NETWORKS, SIZES
from law_table import FORMULAS, TABLE
from torch import nn
from torchvision import models

from torchflat.symmetry.sampling import CLEAR_GAP

# Half a minute together; the others take up to half a minute each.
QUICK = ("mlp", "lenet", "vgg11_bn", "gpt_layernorm", "gpt_rope", "rnn", "plain1", "plain2", "plain4", "plain5")
BATCH_STATISTICS = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small", "densenet121")
OTHER_NORMS = ("vit_b_16", "convnext_tiny", "gpt_layernorm", "gpt_rope", "plain1", "plain2")
# Far from the eps of 0 at which more laws hold; and as good as 0, which batch_norm refuses.
EPS, NO_EPS = 0.3, {"eval": 0.0, "train": 1e-20}


def sorted_by_time(cases: list[tuple[str, str]]) -> list[object]:
    return [pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("name", TABLE)
def test_the_table_holds_the_formulas_at_full_size(name: str) -> None:
    assert FORMULAS[name](**SIZES[name][0]) == TABLE[name]


def test_every_network_has_a_row() -> None:
    assert set(TABLE) == set(NETWORKS) == set(SIZES) == set(FORMULAS)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small"])
def test_one_approximate_law_for_each_channel_after_a_convolution(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    channels = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert TABLE[name][1].approximate == channels


@pytest.mark.parametrize(
    ("name", "mode"),
    sorted_by_time([(name, "eval") for name in TABLE] + [(name, "train") for name in BATCH_STATISTICS]),
)
def test_exact_laws(name: str, mode: str) -> None:
    count = FORMULAS[name](**SIZES[name][1])[mode == "train"]
    found = counted(name, mode, eps=EPS)
    assert found == Counted.expected(count, approximate=False)
    assert found.gap >= CLEAR_GAP


@pytest.mark.parametrize(
    ("name", "mode"),
    sorted_by_time([(name, "eval") for name in OTHER_NORMS] + [(name, "train") for name in BATCH_STATISTICS]),
)
def test_laws_as_eps_goes_to_0(name: str, mode: str) -> None:
    count = FORMULAS[name](**SIZES[name][1])[mode == "train"]
    found = counted(name, mode, eps=NO_EPS[mode])
    assert found == Counted.expected(count, approximate=True)
    assert found.gap >= CLEAR_GAP
