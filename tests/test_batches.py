"""Whatever form the data has: the same rows, each once, in the same order on every pass."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import network
from torch import Tensor, nn
from torch.utils import data as torch_data

from torchflat import Objective
from torchflat.errors import DataError, ReproducibilityError
from torchflat.objective.batches import Batches, as_batches, describe, row_count, slice_rows

ROWS = 23
X, Y = torch.arange(2.0 * ROWS).view(ROWS, 2), torch.arange(ROWS)


class _Map(torch_data.Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return X[row], Y[row]


class _Stream(torch_data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y, strict=True)


class _Batched(torch_data.Dataset[Any]):
    """Makes whole batches by itself."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[5 * index : 5 * index + 5], Y[5 * index : 5 * index + 5]


def _loader(dataset: Any = None, **options: Any) -> torch_data.DataLoader[Any]:
    return torch_data.DataLoader(dataset if dataset is not None else _Map(), **{"batch_size": 5, **options})


def _tensors() -> torch_data.TensorDataset:
    return torch_data.TensorDataset(X, Y)


ALL_ROWS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "list of tensors": lambda: [X, Y],
    "dict of tensors": lambda: {"x": X, "y": Y},
    "dataset": _Map,
    "tensor dataset": _tensors,
    "subset of a dataset": lambda: torch_data.Subset(_Map(), range(ROWS)),
    "list of batches": lambda: [(X[:9], Y[:9]), (X[9:], Y[9:])],
    "loader": _loader,
    "loader of tensors": lambda: _loader(_tensors()),
    "shuffling loader": lambda: _loader(shuffle=True),
    "shuffling loader of tensors": lambda: _loader(_tensors(), shuffle=True, drop_last=True),
    "dropping loader": lambda: _loader(drop_last=True, shuffle=True),
    "loader with its generator": lambda: _loader(shuffle=True, generator=torch.Generator()),
    "loader with workers": lambda: _loader(num_workers=1, shuffle=True),
    "distributed loader": lambda: _loader(
        sampler=torch_data.DistributedSampler(_Map(), num_replicas=2, rank=1, shuffle=True)
    ),
    "batch sampler": lambda: _loader(batch_size=1, batch_sampler=[[0, 1, 2], list(range(3, 20)), [20], [21, 22]]),
    "loader of ready batches": lambda: _loader(_Batched(), batch_size=None, shuffle=True),
    "stream": lambda: _loader(_Stream()),
    "own collate": lambda: _loader(
        _tensors(), collate_fn=lambda rows: [torch.stack(c) for c in zip(*rows, strict=True)]
    ),
}


def _labels(batches: Batches) -> list[int]:
    """The rows of one pass, by their labels."""
    return torch.cat([batch["y"] if isinstance(batch, dict) else batch[1] for batch in batches]).tolist()


@pytest.mark.parametrize("form", ALL_ROWS)
def test_every_row_counts_once_in_the_same_order_on_every_pass(form: str) -> None:
    data = ALL_ROWS[form]()
    batches = as_batches(data)
    assert batches.rows == ROWS
    assert _labels(batches) == _labels(batches) == list(range(ROWS))


@pytest.mark.parametrize("form", ALL_ROWS)
def test_products_do_not_depend_on_the_form_of_the_data(form: str) -> None:
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight)

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        x, y = batch.values() if isinstance(batch, dict) else batch
        return ((model(x)[:, 0] - y) ** 2).sum(), len(x)

    f = Objective(model, None, ALL_ROWS[form](), batch_loss=batch_loss, dtype=torch.float64, microbatch=4, memory="0B")
    ones = torch.ones(ROWS, 3, dtype=torch.float64)
    ones[:, :2] = X
    assert torch.allclose(f.hvp(torch.eye(3, dtype=torch.float64)), 2 * ones.T @ ones / ROWS, rtol=1e-12)
    assert f.provenance()["products"] == "rebuilt"


@pytest.mark.parametrize("form", ALL_ROWS)
def test_a_subset_is_drawn_by_its_seed_and_in_order(form: str) -> None:
    batches = as_batches(ALL_ROWS[form]())
    drawn = [_labels(batches.subset(7, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7 and drawn[0] == sorted(drawn[0])
    # The same rows whatever the form.
    assert drawn[0] == _labels(as_batches((X, Y)).subset(7, 0))


def test_samplers_that_draw_are_drawn_once() -> None:
    weights = torch.ones(ROWS)
    weights[:20] = 0
    loader = _loader(sampler=torch_data.WeightedRandomSampler(weights.tolist(), 10))
    batches = as_batches(loader)
    passes = [_labels(batches) for _ in range(2)]
    assert passes[0] == passes[1] and set(passes[0]) <= {20, 21, 22} and batches.rows == 10
    some = as_batches(_loader(sampler=torch_data.SubsetRandomSampler([7, 3, 5])))
    assert _labels(some) == [3, 5, 7]


@pytest.mark.parametrize("own", [True, False])
def test_no_randomness_of_the_loader_is_spent(own: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own else None
    loader = _loader(shuffle=True, generator=generator)
    states = [torch.get_rng_state(), generator.get_state() if generator else None]
    batches = as_batches(loader)
    batches.subset(4, 0)
    batches.fingerprint()
    as_batches(_loader(_Stream()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert generator is None or torch.equal(generator.get_state(), states[1])


def test_fingerprints_tell_data_apart_and_not_its_batches() -> None:
    prints = {
        form: as_batches(ALL_ROWS[form]()).fingerprint() for form in ("loader", "shuffling loader", "loader of tensors")
    }
    assert len(set(prints.values())) == 1
    other = X.clone()
    other[3, 1] += 1e-5
    assert as_batches((other, Y)).fingerprint() != as_batches((X, Y)).fingerprint()
    assert as_batches((X, Y.int())).fingerprint() != as_batches((X, Y)).fingerprint()


class _Shrinking:
    """Has fewer batches on every pass."""

    def __init__(self) -> None:
        self.left = 8

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        return iter([(X[:4].clone(), Y[:4])] * self.left)


class _Shuffled(torch_data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(X[row], Y[row]) for row in torch.randperm(ROWS).tolist()])


class _Augmented(_Map):
    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return X[row] + torch.randn(2), Y[row]


def test_data_that_shrinks_is_refused() -> None:
    f = Objective(nn.Linear(2, ROWS), nn.CrossEntropyLoss(), _Shrinking())
    with pytest.raises(DataError, match=r"changes between passes: 28 rows at first, and now \d+"):
        f.value()


@pytest.mark.parametrize("dataset", [_Shuffled(), _Augmented()], ids=["shuffled stream", "augmented"])
def test_data_that_is_random_is_refused(dataset: Any) -> None:
    f = Objective(nn.Linear(2, ROWS), nn.CrossEntropyLoss(), _loader(dataset))
    with pytest.raises(ReproducibilityError, match="its data is random"):
        f.value()


class _Endless(torch_data.Dataset[Any]):
    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return X[row], Y[row]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X[:0], Y[:0]), "the data is empty"),
        ([], "the data is empty"),
        (torch_data.TensorDataset(X[:0], Y[:0]), "the data is empty"),
        ((X, Y[:5]), r"same number of rows; their shapes are \(23, 2\), \(5,\)"),
        ((X, torch.tensor(1.0)), r"same number of rows; their shapes are \(23, 2\), \(\)"),
        (((x, y) for x, y in zip(X, Y, strict=True)), r"only once \(a generator or iterator\).*list"),
        (zip(X, Y, strict=True), "only once"),
        (3, r"data is a int: pass \(X, Y\)"),
        (None, "data is a NoneType"),
        ("mnist", "data is a str"),
        (_Endless(), "_Endless has no length: give it __len__"),
    ],
)
def test_data_that_cannot_be_used(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_batches(data)


Pair = collections.namedtuple("Pair", "x y")


def test_batches_keep_their_kind_when_they_are_cut() -> None:
    batch = {
        "pair": Pair(X, [Y, X]),
        "names": [str(row) for row in range(ROWS)],
        "size": (224, 224),
        "user": collections.UserDict(y=Y),
    }
    assert row_count(batch) == ROWS
    part = slice_rows(batch, 3, 5)
    assert type(part["pair"]) is Pair and torch.equal(part["pair"].y[0], Y[3:5])
    assert part["names"] == ["3", "4"] and part["size"] == (224, 224)
    assert type(part["user"]) is collections.UserDict and torch.equal(part["user"]["y"], Y[3:5])
    assert torch.equal(batch["user"]["y"], Y), "the user's own batch was changed"
    assert (
        row_count({"x": X, "y": Y[:3]}) is None and row_count((X, torch.tensor(1))) is None and row_count("x") is None
    )


def test_batches_whose_rows_cannot_be_told_apart_stay_whole() -> None:
    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        nodes, edges = batch
        return (model(nodes)[edges[0]] * nodes[edges[1], :1]).pow(2).sum(), len(nodes)

    graphs = [(torch.randn(n, 2), torch.randint(n, (2, 9))) for n in (5, 6)]
    model = nn.Linear(2, 1)
    f = Objective(model, None, graphs, batch_loss=batch_loss, microbatch=1, dtype=torch.float64)
    with torch.no_grad():
        sums = [batch_loss(model, graph) for graph in graphs]
    assert f.value() == pytest.approx(float(sum(s for s, _ in sums)) / 11, rel=1e-5)
    assert f.rows == 2 and torch.isfinite(f.hvp(torch.ones(3, dtype=torch.float64))).all()
    with pytest.raises(DataError, match="cannot be cut into rows"):
        f.subset(1)


def test_a_batch_of_one_tensor() -> None:
    f = Objective(nn.Linear(2, 2), None, X, batch_loss=lambda m, x: (((m(x) - x) ** 2).sum(), len(x)), microbatch=5)
    assert f.rows == ROWS and f.value() > 0


def test_descriptions_of_odd_tensors() -> None:
    assert describe((torch.zeros(0, 2), torch.ones(2, dtype=torch.bool))) == "(0, 2) float32; (2,) bool"
    assert describe(torch.tensor([1.5, torch.nan])) == "(2,) float32 in [nan, nan]"
    assert describe(torch.eye(2).to_sparse()) == "(2, 2) float32"
    assert describe("text") == "a str without tensors"


def test_the_loaders_batch_size_is_kept_for_losses_within_batches() -> None:
    case = network("relu")
    x, y = case.data
    sizes: list[int] = []

    def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        sizes.append(len(batch[0]))
        out = model(batch[0])
        return (out - out.mean(0)).pow(2).sum(), len(out)

    data = torch_data.DataLoader(torch_data.TensorDataset(x, y), batch_size=8)
    f = Objective(case.model, None, data, batch_loss=batch_loss)
    f.value()
    assert sizes[-3:] == [8, 8, 7]


@pytest.mark.parametrize(("at_once", "sizes"), [(None, [17]), (17, [17]), (8, [6, 6, 5]), (5, [5, 5, 5, 2])])
def test_rows_taken_are_copied_a_batch_at_a_time_and_not_held(at_once: int | None, sizes: list[int]) -> None:
    rows = torch.randperm(ROWS)[:17]
    taken = as_batches((X, Y)).take(rows, at_once)
    assert [len(x) for x, _ in taken] == sizes
    expected = rows.sort().values
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in taken]), X[expected])
        assert torch.equal(torch.cat([y for _, y in taken]), Y[expected])
    first, _ = taken.first()
    copy = weakref.ref(first)
    del first
    assert copy() is None
    again = taken.take(torch.tensor([16, 3, 4]))
    assert torch.equal(torch.cat([x for x, _ in again]), X[expected[[3, 4, 16]]])


def test_rows_of_a_loader_are_taken_in_batches_of_its_size() -> None:
    taken = as_batches(_loader(_tensors())).take(torch.arange(1, 18), 9)
    assert [len(x) for x, _ in taken] == [5, 5, 5, 2]
