"""Nothing of the user's is left changed: not by any call, not when it is interrupted, not when it raises."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Network, network
from torch import Tensor, nn

import torchflat
from torchflat import Objective
from torchflat.errors import LossError


def _contents(value: Any) -> Any:
    """What a container holds, by identity, so that a tensor exchanged for an equal one shows."""
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [id(item) for item in value]
    return id(value)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _photograph(model: nn.Module) -> dict[str, Any]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "attributes": [{k: _contents(v) for k, v in vars(module).items()} for module in model.modules()],
        "bits": {name: (id(tensor), _bits(tensor)) for name, tensor in named},
        "requires_grad": {name: tensor.requires_grad for name, tensor in named},
        "grad": {name: None if t.grad is None else (id(t.grad), _bits(t.grad)) for name, t in named},
        "training": [module.training for module in model.modules()],
        "torch": _bits(torch.get_rng_state()),
        "numpy": repr(numpy.random.get_state()),
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.cudnn.enabled),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
    }


OPERATIONS: dict[str, Callable[[Objective], Any]] = {
    "value": Objective.value,
    "gradient": Objective.gradient,
    "hvp": lambda f: f.hvp(torch.ones(f.n, 2)),
    "blocks": lambda f: f.block_products({(0,): torch.ones(f.layout.sizes[0])}),
    "at": lambda f: f.at(f.x + 1).gradient(),
    "subset": lambda f: f.subset(min(4, f.rows)).hvp(torch.ones(f.n)),
    "rounding": lambda f: f.rounding_error(torch.ones(1, f.n)),
    "fingerprint": Objective.fingerprint,
    "sharpness": lambda f: torchflat.sharpness(f, rtol=0.3),
}


def _untidy(case: Network, grads: str, flags: list[bool]) -> None:
    """Leave the model in a state that a clean-up by defaults would destroy."""
    for index, parameter in enumerate(case.model.parameters()):
        if grads == "zero" or (grads == "mixed" and index % 2):
            parameter.grad = torch.zeros_like(parameter)
        elif grads == "ones":
            parameter.grad = torch.ones_like(parameter)
    for module, flag in zip(case.model.modules(), flags * 20, strict=False):
        module.training = flag
    case.model.register_forward_hook(lambda module, inputs, output: random.random() and None)


class _Interrupted:
    """A function, interrupted in its call number ``at``; it spends randomness of all kinds, as a user's might."""

    def __init__(self, function: Any, at: int | None) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        torch.rand(3), numpy.random.rand(), random.random()
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.function(*arguments)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    name=st.sampled_from(sorted(NETWORKS)),
    operation=st.sampled_from(sorted(OPERATIONS)),
    memory=st.sampled_from(["0B", "100kB", "1GiB"]),
    microbatch=st.sampled_from([1, 3, None]),
    at=st.one_of(st.none(), st.integers(1, 30)),
    grads=st.sampled_from(["none", "zero", "ones", "mixed"]),
    flags=st.lists(st.booleans(), min_size=1, max_size=5),
)
@pytest.mark.filterwarnings("ignore::torchflat.spectrum.run.NotConvergedWarning")
def test_nothing_is_left_changed(
    name: str, operation: str, memory: str, microbatch: int | None, at: int | None, grads: str, flags: list[bool]
) -> None:
    case = network(name)
    exact = case.hessian().sum(0)
    _untidy(case, grads, flags)
    before = _photograph(case.model)
    loss = _Interrupted(case.loss or case.batch_loss, at)
    used = dataclasses.replace(case, **{"loss" if case.loss else "batch_loss": loss})
    for module, flag in zip(case.model.modules(), before["training"], strict=True):
        module.training = flag  # replace() put the model into eval mode
    f = used.objective(memory=memory, microbatch=microbatch)
    with contextlib.suppress(KeyboardInterrupt):
        OPERATIONS[operation](f)
    loss.at = None
    assert _photograph(case.model) == before
    # Whatever was cut short, the next answer is whole.
    assert float((f.hvp(torch.ones(f.n)).double() - exact).norm() / exact.norm()) < 1e-5
    assert _photograph(case.model) == before


class _Fuse(torch.autograd.Function):
    """The identity, whose second derivative goes off when it is armed."""

    armed: BaseException | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _FuseBackward.apply(gradient)


class _FuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if _Fuse.armed is not None:
            raise _Fuse.armed
        return gradient


class _Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_Fuse.apply(torch.tanh(self.first(x))))


@pytest.mark.parametrize("memory", ["1GiB", "0B"])
@pytest.mark.parametrize(
    ("raised", "caught"), [(KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("went off"), LossError)]
)
def test_a_product_that_raises_leaves_all_as_it_was(
    memory: str, raised: BaseException, caught: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = _Fused()
    f = Objective(model, nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2)), memory=memory, microbatch=4)
    v = torch.ones(f.n)
    expected, before, graphs = f.hvp(v), _photograph(model), f.memory.graphs
    monkeypatch.setattr(_Fuse, "armed", raised)
    with pytest.raises(caught):
        f.hvp(v)
    monkeypatch.setattr(_Fuse, "armed", None)
    assert _photograph(model) == before
    assert f.memory.graphs == graphs and torch.equal(f.hvp(v), expected)


def test_a_module_registered_twice_keeps_its_own_parameters() -> None:
    # torch.func.functional_call alone leaves its tensors behind in such a module (torch 2.14).
    case = network("registered_twice")
    own = [id(parameter) for parameter in case.model.parameters()]
    case.objective().hvp(torch.ones(20))
    assert [id(parameter) for parameter in case.model.parameters()] == own


def test_the_model_can_be_trained_on_while_an_objective_of_it_is_held() -> None:
    case = network("batchnorm")
    f = case.objective(memory="1GiB")
    expected = f.hvp(torch.ones(f.n))
    case.model.train()
    x, y = case.data
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    nn.functional.cross_entropy(case.model(x), y).backward()
    optimizer.step()
    assert torch.equal(f.hvp(torch.ones(f.n)), expected)
    assert torch.equal(f.at(f.x).hvp(torch.ones(f.n)), expected)


def test_frozen_parameters_that_are_trained_under_a_retained_graph_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    f = Objective(model, nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)), params="0")
    f.hvp(torch.ones(f.n))
    with torch.no_grad():
        model[2].weight += 1
    with pytest.raises(LossError, match="modified by an inplace operation"):
        f.hvp(torch.ones(f.n))
