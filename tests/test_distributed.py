"""Two and three processes give the answers of one, fail together, and never wait for each other in vain."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import network
from processes import Digits, Ranks, agree, raised, started
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

import torchflat
import torchflat.flatness
from torchflat import Objective
from torchflat.distributed import Bucket, Team
from torchflat.errors import DataError, LossError, NonFiniteError, UsageError
from torchflat.objective.batches import as_batches, row_count
from torchflat.optim import NormalizedGD


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with started(request.param) as processes:
        yield processes


# The same answers -----------------------------------------------------------------------------------------------------

NETWORKS = ["batchnorm", "tokens", "dict_batches", "weight_decay"]


def basics(name: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    f = network(name).objective(**options)
    v = torch.randn(f.n, 2, generator=torch.Generator().manual_seed(1)).to(f.dtype)
    answers = {"value": f.value(), "gradient": f.gradient(), "hvp": f.hvp(v), "again": f.hvp(v)}
    blocks = {(i,): torch.ones(size, dtype=f.dtype) for i, size in enumerate(f.layout.sizes)}
    products = f.block_products(blocks)
    answers["blocks"] = torch.cat([products[block] for block in blocks])
    answers["moved"] = f.at(1.01 * f.x).gradient()
    answers["few rows"] = f.few_rows(2).gradient()
    answers["rows"] = f.rows
    answers["sha"] = [float(int(digit, 16)) for digit in f.fingerprint()]
    answers["cost"] = [f.cost.forwards, f.cost.backwards, f.cost.products]
    return answers


@pytest.mark.parametrize("name", NETWORKS)
def test_value_gradient_products_and_cost_are_those_of_one_process(ranks: Ranks, name: str) -> None:
    agree(ranks, basics, name, {})


@pytest.mark.parametrize("options", [{"microbatch": 2}, {"memory": 0}], ids=str)
def test_cut_small_and_with_rebuilt_graphs(ranks: Ranks, options: dict[str, Any]) -> None:
    agree(ranks, basics, "relu", options)


def spectrum() -> dict[str, Any]:
    f = regression(Digits(), hidden=6)
    top = torchflat.sharpness(f)
    ends = torchflat.eigenpairs(f, 3, which="magnitude")
    blocks = torchflat.block_sharpness(f, top=top.vector)
    trace, density = torchflat.trace(f), torchflat.spectral_density(f, rtol=1.0, starts=2, steps=8)
    return {
        "sharpness": [top.value, top.lower, top.upper, top.cost.gradients],
        "vector": top.vector * top.vector.sign()[top.vector.abs().argmax()],
        "eigenvalues": ends.values,
        "trace": [trace.value, trace.lower, trace.upper],
        "blocks": [[row.value, row.lower, row.upper, row.share] for row in blocks.rows],
        "density": density.density,
        "cost": f.cost.gradients,
    }


def test_the_spectrum_is_that_of_one_process(ranks: Ranks) -> None:
    agree(ranks, spectrum, rtol=1e-3, atol=1e-4)


def regression(data: Any, **options: Any) -> Objective:
    torch.manual_seed(0)
    hidden = options.pop("hidden", 3)
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return Objective(model, options.pop("loss", nn.MSELoss()), data, **options)


def few_passes() -> dict[str, Any]:
    """Scores of rows, forms of groups, and λ₁ by shards, on rows that do not divide evenly; some stand out."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5003, 40, generator=generator, dtype=torch.float64) * torch.arange(1.0, 41.0).double() ** -0.6
    x[-2:] *= 12
    torch.manual_seed(0)
    f = Objective(nn.Linear(40, 1, bias=False).double(), F.mse_loss, (x, x[:, :1]))
    found = torchflat.sharpness(f, method="multilevel")
    forms = f.quadratic_forms(found.vector)
    return {
        "scores": f.row_curvatures(seed=3),
        "interval": [found.lower, found.value, found.upper],
        "basis": [float(found.basis == "shards")],
        "vector": found.vector,
        "forms": [forms.mean, float(forms.units.sum())],
        "values": f.group_values(groups=20).sums,
        "tracked": torchflat.sharpness(f, start=found, fresh=0).value,
        "cost": [found.cost.forwards, found.cost.backwards, found.cost.products],
    }


def test_shards_and_scores_are_those_of_one_process(ranks: Ranks) -> None:
    answers = agree(ranks, few_passes)
    assert answers["basis"] == [1.0]


def loaded(kind: str) -> dict[str, Any]:
    digits = Digits()
    if kind == "sampler":
        size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sampler = DistributedSampler(digits, size, rank, shuffle=True, seed=3)  # what a training loop has
        data: Any = DataLoader(digits, batch_size=4, sampler=sampler)
    else:
        data = list(DataLoader(digits, batch_size=10))
    f = regression(data)
    part = f.subset(5, seed=2)
    return {"gradient": f.gradient(), "subset": part.gradient(), "one": f.subset(1).hvp(torch.ones(f.n)), "n": f.rows}


@pytest.mark.parametrize("kind", ["sampler", "list"])
def test_every_kind_of_data_is_split_and_no_rank_needs_rows(ranks: Ranks, kind: str) -> None:
    agree(ranks, loaded, kind)


def read_by_this_rank() -> list[int]:
    digits = Digits()
    f = regression(digits)
    f.gradient()
    digits.read = 0
    f.at(f.x).value()
    return [digits.read, len(f.team.share(f.rows))]


def test_a_dataset_is_read_by_its_own_rank_only(ranks: Ranks) -> None:
    answers = ranks(read_by_this_rank)
    assert all(read == share for read, share in answers)
    assert sum(read for read, _ in answers) == 29


def contrastive(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    """A loss within batches: no sum over rows."""
    logits = model(batch[0])
    return ((logits - logits.mean()) ** 2).sum(), float(len(logits))


def whole_batches() -> dict[str, Any]:
    digits = Digits()
    batches = [(digits.x[low : low + 6], digits.y[low : low + 6]) for low in range(0, 29, 6)]
    f = regression(batches, loss=None, batch_loss=contrastive)
    return {
        "value": f.value(),
        "gradient": f.gradient(),
        "hvp": f.hvp(torch.ones(f.n)),
        "few": f.few_rows(4).value(),
        "by batch": f.group_values().sums,
    }


def test_batches_that_cannot_be_cut_are_dealt_out_whole(ranks: Ranks) -> None:
    agree(ranks, whole_batches)


def third_derivative() -> dict[str, Any]:
    answer = torchflat.flatness.derivative_norm(
        regression(Digits(), dtype=torch.float64, weight_decay=0.1), 3, starts=2
    )
    return {"value": answer.value, "vector": answer.vector, "gradients": answer.cost.gradients}


def test_the_norm_of_a_derivative_is_that_of_one_process(ranks: Ranks) -> None:
    agree(ranks, third_derivative)


def alone() -> dict[str, Any]:
    f = regression(Digits(), group="alone")
    # Only one rank takes part: with the others in the team it would wait for ever.
    return {"rows": f.rows, "value": f.value() if not dist.is_initialized() or dist.get_rank() == 0 else 0.0}


def test_a_process_can_keep_to_itself(ranks: Ranks) -> None:
    first, *others = ranks(alone)
    torch.testing.assert_close(first, alone())
    assert all(other == {"rows": 29, "value": 0.0} for other in others)


def reductions() -> list[int]:
    f = regression(Digits())
    f.hvp(torch.ones(f.n))
    counts, reduce = [], dist.all_reduce

    def counted(*arguments: Any, **keywords: Any) -> Any:
        counts[-1] += 1
        return reduce(*arguments, **keywords)

    dist.all_reduce = counted
    try:
        counts.append(0)
        f.products(torch.eye(f.n)[:4])
        counts.append(0)
        f.block_products({(0, 1): torch.ones(15), (2,): torch.ones(3)})
        counts.append(0)
        f.gradient()
    finally:
        dist.all_reduce = reduce
    return counts


def test_one_reduction_per_pass(ranks: Ranks) -> None:
    assert all(answer == [1, 1, 1] for answer in ranks(reductions))


# Failing together -----------------------------------------------------------------------------------------------------


def with_nan() -> float:
    digits = Digits()
    digits.x[28, 2] = torch.nan  # the last row, which only the last rank has
    return regression((digits.x, digits.y)).value()


def overflowing(order: str) -> Any:
    """x ↦ √x at 0 has an infinite derivative, in the last row only."""
    x = torch.ones(29, 1)
    x[28] = 0.0

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w * x).abs() ** 1.5 if order == "product" else (self.w - 1 + x).sqrt()

    f = Objective(Root(), nn.L1Loss(), (x, -torch.ones(29, 1)))
    return f.gradient() if order == "gradient" else f.hvp(torch.ones(1))


def test_what_is_not_finite_on_one_rank_is_told_by_all(ranks: Ranks) -> None:
    last = f"(on process {len(ranks.pipes) - 1} of {len(ranks.pipes)})"
    raised(ranks(with_nan), NonFiniteError, "the loss of micro-batch", "batch[0] (1 of", last)
    raised(ranks(overflowing, "gradient"), NonFiniteError, "the gradient of micro-batch", last)
    # And the ranks still understand each other.
    agree(ranks, alone_together)


def alone_together() -> float:
    return regression(Digits()).value()


class Square(torch.autograd.Function):
    """x², by a kernel whose double backward is missing, as those of fused attention are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SquareBackward.apply(ctx.saved_tensors[0], gradient)


class SquareBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        return 2 * x * gradient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("the derivative of this kernel is not implemented")


class OnceSomewhere(nn.Module):
    """Cannot be differentiated twice on rank 1: not at all, or not until fused kernels are switched off."""

    def __init__(self, falls_back: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.falls_back = nn.Linear(4, 1), falls_back

    def forward(self, x: Tensor) -> Tensor:
        fused = dist.get_rank() == 1 and (not self.falls_back or torch.backends.cudnn.enabled)
        return Square.apply(self.line(x)) if fused else self.line(x) ** 2


def differing(what: str) -> Any:
    rank = dist.get_rank()
    digits = Digits()
    if what == "data":
        return regression((digits.x[rank:], digits.y[rank:])).value()
    if what == "last row":
        digits.y[28] += rank
        return regression((digits.x, digits.y)).fingerprint()
    if what == "rows":
        return regression((digits.x + rank, digits.y)).value()
    if what == "derivative":
        return Objective(OnceSomewhere(falls_back=False), nn.MSELoss(), digits).hvp(torch.ones(5))
    if what == "vector":
        f = regression(digits)
        return f.hvp(torch.full((f.n,), 1.0 + rank))
    if what == "finite vector":
        f = regression(digits)
        return f.hvp(torch.full((f.n,), torch.nan if rank == 1 else 1.0))
    torch.manual_seed(rank)
    return Objective(nn.Linear(4, 1), nn.MSELoss(), digits).value()


@pytest.mark.parametrize(
    ("what", "kind", "needle"),
    [
        ("data", UsageError, "the data, which every process is handed whole, must be the same on all"),
        ("rows", UsageError, "the data, which every process is handed whole, must be the same on all"),
        ("last row", UsageError, "the data, which every process is handed whole, must be the same on all"),
        ("vector", UsageError, "a vector that H is applied to, must be the same on all"),
        ("parameters", UsageError, "the point x, or"),
        ("finite vector", NonFiniteError, "NaN or infinity (on process 1 of"),
        ("derivative", LossError, "(on process 1 of"),
    ],
)
def test_ranks_that_were_given_different_things_say_so(
    ranks: Ranks, what: str, kind: type[BaseException], needle: str
) -> None:
    raised(ranks(differing, what), kind, needle)


def fallen_back() -> list[Any]:
    digits = Digits()
    f = Objective(OnceSomewhere(falls_back=True), nn.MSELoss(), digits)
    line = OnceSomewhere(falls_back=True).line
    exact = Objective(nn.Sequential(line, Squared()), nn.MSELoss(), digits)
    v = torch.ones(5)
    return [bool(torch.allclose(f.hvp(v), exact.hvp(v))), "fused kernel" in " ".join(f.provenance()["notes"])]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


def test_all_ranks_give_up_a_kernel_that_fails_on_one(ranks: Ranks) -> None:
    assert ranks(fallen_back) == [[True, True]] * len(ranks.pipes)


def stopped(rank: int, how: str) -> list[Any]:
    """λ₁ with a callback that stops on one rank only, or fails there."""

    def callback(answer: Any) -> bool:
        if dist.get_rank() == rank and answer.steps == 3:
            if how == "raises":
                raise KeyError("of the callback")
            return True
        return False

    answer = torchflat.sharpness(regression(Digits()), rtol=1e-9, callback=callback)
    return [answer.steps, answer.status.name]


@pytest.mark.filterwarnings("ignore:sharpness")
def test_a_callback_that_stops_or_fails_on_one_rank_does_on_all(ranks: Ranks) -> None:
    for rank in (0, 1):
        assert ranks(stopped, rank, "stops") == [[3, "BUDGET"]] * len(ranks.pipes)
    raised(ranks(stopped, 1, "raises"), KeyError, "of the callback")


def pending() -> str:
    """Ctrl-C outside of a block waits for the next one, and is used up by it."""
    team, found = Team.of(None), []
    with team.interrupted_together():
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(2):
            try:
                with team.together():
                    pass
                found.append("calm")
            except KeyboardInterrupt:
                found.append("interrupted")
    return " ".join(found)


def test_an_interruption_between_passes_waits_for_the_next(ranks: Ranks) -> None:
    assert ranks(pending) == ["interrupted calm"] * len(ranks.pipes)


# Sharded models -------------------------------------------------------------------------------------------------------


def sharded(kind: str) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), nn.Linear(5, 1))
    digits = Digits()
    expected = Objective(model, nn.MSELoss(), digits).hvp(torch.ones(71))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel()}, src_data_rank=None)
    elif kind == "tensor":
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, src_data_rank=None))
    else:
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind == "used":
        model(digits.x)  # parameters of the outermost module stay gathered after it
    before = [(name, type(tensor)) for name, tensor in model.named_parameters()]
    product = Objective(model, nn.MSELoss(), digits).hvp(torch.ones(71))
    assert before == [(name, type(tensor)) for name, tensor in model.named_parameters()]
    model(digits.x).sum().backward()  # and it can still be trained
    return [bool((product == expected).all()), model[0].weight.grad is not None]


@pytest.mark.parametrize("kind", ["fresh", "used"])
def test_a_model_sharded_by_fsdp2_is_audited_whole(ranks: Ranks, kind: str) -> None:
    assert ranks(sharded, kind) == [[True, True]] * len(ranks.pipes)


@pytest.mark.parametrize("kind", ["parallel", "tensor"])
def test_a_model_sharded_otherwise_is_refused_with_the_cure(ranks: Ranks, kind: str) -> None:
    raised(ranks(sharded, kind), UsageError, "'0.weight' is a DTensor", "get_model_state_dict")


# Training sharded models ----------------------------------------------------------------------------------------------

STEPS: list[dict[str, Any]] = [
    {},
    {"norm": "group", "momentum": 0.5, "foreach": False},
    {"norm": "tensor", "weight_decay": 0.1},
    {"norm": "global", "momentum": 0.5, "weight_decay": 0.1, "capturable": True},
    {"norm": "tensor", "momentum": 0.5, "foreach": True},
]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard(model: nn.Module, kind: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized() or kind == "alone":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    size = dist.get_world_size()
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    if kind != "partly":
        fully_shard(model[2], mesh=mesh)
        return fully_shard(model, mesh=mesh)
    fully_shard(model[2], mesh=mesh)  # the other layers are plain tensors, and alike on all ranks: see below
    return model


def restarted(model: nn.Module, optimizer: NormalizedGD, fresh: NormalizedGD) -> NormalizedGD:
    """A new optimizer with the state of another, by way of a checkpoint, of whole tensors where there are any."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    optimizer.zero_grad()
    # torch cannot load a whole state that has nothing but numbers in it, of any optimizer.
    options = checkpoint.StateDictOptions(full_state_dict=bool(optimizer.defaults["momentum"]))
    state = checkpoint.get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.set_optimizer_state_dict(model, fresh, state, options=options)
    return fresh


def trained(kind: str, resumed: bool = False) -> list[list[Tensor]]:
    """Parameters after four steps with each of the options; every rank has rows of its own."""
    reached = []
    digits = Digits()
    there = dist.is_initialized() and kind != "partly"
    rows = Team.of(None).share(29) if there else range(29)
    x, y = digits.x[rows.start : rows.stop].double(), digits.y[rows.start : rows.stop].double()
    for options in STEPS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)))
        model.append(nn.Linear(5, 1)).double()
        model = shard(model, kind)

        def made(model: nn.Module = model, options: dict[str, Any] = options) -> NormalizedGD:
            first, *rest = model.parameters()
            return NormalizedGD([{"params": [first], "lr": 0.2}, {"params": rest}], 0.1, **options)

        optimizer = made()
        for step in range(4):
            optimizer.zero_grad()
            (model(x) - y).square().sum().backward()
            optimizer.step()
            if resumed and step == 1:
                optimizer = restarted(model, optimizer, made())
        reached.append([whole(p) for p in model.parameters()])
    return reached


@pytest.mark.parametrize("kind", ["fsdp", "hybrid", "partly", "ddp"])
def test_normalized_steps_of_a_sharded_model_are_those_of_one_process(ranks: Ranks, kind: str) -> None:
    agree(ranks, trained, kind, rtol=1e-10, atol=1e-11)


def test_normalized_steps_resume_from_a_checkpoint(ranks: Ranks) -> None:
    agree(ranks, trained, "fsdp", True, rtol=1e-10, atol=1e-11)


def placed(bad: bool) -> list[list[Tensor]]:
    """Steps on tensors that are laid out in all ways, by gradients that may be laid out in others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    reached = []
    for options in STEPS:
        generator = torch.Generator().manual_seed(0)
        shapes = [(5, 3), (2, 7), (4,), (1, 3), (3, 2), (6, 2), ()]
        starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if bad:
            grads[0][-1, 1] = torch.nan
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            ways = [Shard(0), Shard(1), Replicate(), Shard(0), Shard(0), None, Replicate()]
            ways_of_grads = [Shard(0), Shard(0), Replicate(), Shard(0), Partial(), None, Replicate()]
            for index, (way, way_of_grad) in enumerate(zip(ways, ways_of_grads, strict=True)):
                if way is None or way_of_grad is None:
                    continue
                starts[index] = distribute_tensor(starts[index], mesh, [way], src_data_rank=None)
                if way_of_grad.is_partial():
                    part = grads[index] / mesh.size()
                    grads[index] = DTensor.from_local(part, mesh, [way_of_grad], run_check=False)
                else:
                    grads[index] = distribute_tensor(grads[index], mesh, [way_of_grad], src_data_rank=None)
        params = [nn.Parameter(start) for start in starts]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer = NormalizedGD([{"params": params[:3]}, {"params": params[3:]}], 0.1, **options)
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("error" if not bad else "ignore")
                optimizer.step()
        reached.append([whole(p) for p in params])
        assert not bad or all(torch.equal(whole(p), whole(start)) for p, start in zip(params, starts, strict=True))
        assert float(optimizer.state[params[0]]["step"]) == (0 if bad else 3)
    return reached


@pytest.mark.parametrize("bad", [False, True])
def test_normalized_steps_on_any_layout_are_those_of_one_process(ranks: Ranks, bad: bool) -> None:
    agree(ranks, placed, bad, rtol=1e-11, atol=1e-12)


def flattened(original: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(ValueError, match="FullyShardedDataParallel has flattened") as error:
        NormalizedGD(model.parameters(), 0.1)
    return str(error.value)


@pytest.mark.parametrize("original", [False, True])
def test_a_model_sharded_by_fsdp1_is_refused_with_the_cure(ranks: Ranks, original: bool) -> None:
    for answer in ranks(flattened, original):
        assert "torch.distributed.fsdp.fully_shard instead" in str(answer)


# Without processes ----------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 40), size=st.integers(1, 9), batch=st.integers(1, 12), stream=st.booleans())
def test_shares_are_disjoint_even_and_complete(rows: int, size: int, batch: int, stream: bool) -> None:
    tensors = torch.arange(rows), torch.arange(rows)
    pieces = list(zip(*(tensor.split(batch) for tensor in tensors), strict=True))
    batches = as_batches(pieces if stream else tensors)
    teams = [Team(None, rank, size, torch.device("cpu")) for rank in range(size)]
    for by_row in (True, False):
        shares = [[row for x, _ in batches.share(team, by_row) for row in x.tolist()] for team in teams]
        assert sorted(row for share in shares for row in share) == list(range(rows))
        if by_row:
            assert shares == [list(team.share(rows)) for team in teams]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_is_read_without_copies() -> None:
    x = torch.arange(10)
    (part,) = as_batches((x, x)).share(Team(None, 1, 2, torch.device("cpu")), by_row=True)
    assert part[0].data_ptr() == x[5:].data_ptr() and row_count(part) == 5


def test_data_that_changes_is_noticed_by_every_rank() -> None:
    class Growing:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            yield torch.zeros(3 + self.passes, 1), torch.zeros(3 + self.passes, 1)

    batches = as_batches(Growing())
    for rank in range(2):
        with pytest.raises(DataError, match="changes between passes: 4 rows at first"):
            list(batches.share(Team(None, rank, 2, torch.device("cpu")), by_row=True))


def test_one_process_without_a_group_is_a_team_of_one() -> None:
    team = Team.of(None)
    bucket = Bucket(team, length=3, numbers=2)
    with team.summed(bucket):
        bucket.numbers = [1.0, 2.0]
    assert (team.size, team.first, bucket.numbers, bucket.sums.tolist()) == (1, True, [1.0, 2.0], [0.0, 0.0, 0.0])
    assert team.anywhere(lambda: True) and not team.anywhere(lambda: False)
    with pytest.raises(KeyError, match="'of the body'"), team.together():
        raise KeyError("of the body")


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="group='everyone': it must be a process group, None or 'alone'"):
        regression(Digits(), group="everyone")
