"""The logic of ``benchmarks.sharpness``: what is measured, what is not measured again, when a peer stops, verdicts."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cells as cells_module
from benchmarks.cells import Cell, Cells, Stopped, stopped_after
from benchmarks.methods import METHODS, Method, torchflat_solve
from benchmarks.networks import NETWORKS, CharacterTransformer, Network, Problem, library_text
from benchmarks.records import Records
from benchmarks.sharpness import STOP_AT, Comparison, fewest_steps
from benchmarks.tables import report
from benchmarks.verdicts import Verdict, faster, verdicts

TRUTH = 2.0
NETWORK = NETWORKS["denoiser_sgd"]


def record(seconds: float, value: float | None, status: str = "finished", **more: Any) -> dict[str, Any]:
    """A cell as its process would have printed it, with a gradient of one second."""
    return {
        "status": status,
        "value": value,
        "lower": None if value is None else value * 0.999,
        "upper": None if value is None else value * 1.005,
        "trace": [(seconds / 2, 0.9 * TRUTH, TRUTH * 0.8, None), (seconds, value, 1.999, 2.01)],
        "seconds": seconds,
        "gradient_seconds": [0.5, 1.5],
        "gradients": seconds,
        "products": seconds / 2,
        "cost": {"gradients": seconds, "forwards": 0, "backwards": 0, "products": seconds / 2, "seconds": seconds},
        "basis": "krylov",
        "peak_bytes": 1000,
        "parameters": 7,
        "problem": "same",
        "versions": {"torch": "0"},
        "python": "3",
        "processor": "none",
        "default_threads": 2,
        "date": "2000-01-01",
        **more,
    }


class Fake:
    """Peers with made-up errors and times; ours takes 10 gradients, and the truth is known."""

    def __init__(self, tolerance_needed: float = 1e-4, steps_needed: int = 5) -> None:
        self.tolerance_needed, self.steps_needed = tolerance_needed, steps_needed
        self.calls: list[Cell] = []
        self.limits: dict[str, float | None] = {}

    def __call__(self, cell: Cell, limit: float | None) -> dict[str, Any]:
        self.calls.append(cell)
        self.limits[cell.name] = limit
        setting = cell.setting
        if "probe" in setting:
            return record(1.0, None, best={"batch": 500, "threads": 1})
        if "search" in setting:
            values = [TRUTH * (1 if k >= self.steps_needed else 0.9) for k in range(1, setting["search"] + 1)]
            return record(99.0, TRUTH, values=values)
        if cell.method == "torchflat":
            return record(10.0, TRUTH)
        if "max_iter" in setting:
            return record(3.0 * setting["max_iter"], TRUTH if setting["max_iter"] >= self.steps_needed else 1.9)
        seconds = 20 / setting["tol"] ** 0.25
        if limit is not None and seconds > limit:
            return record(limit, None, "stopped")
        return record(seconds, TRUTH if setting["tol"] <= self.tolerance_needed else 1.9)


def compared(folder: Path, fake: Fake, rows: tuple[int, ...] = (10_000,)) -> Cells:
    cells = Cells(folder, fake)
    comparison = Comparison(cells, NETWORK, list(METHODS))
    for each in rows:
        comparison.run(each)
    return cells


def asked(fake: Fake, method: str, key: str, rows: int) -> list[float]:
    return [c.setting[key] for c in fake.calls if c.method == method and c.rows == rows and key in c.setting]


def test_what_is_on_file_is_not_measured_again(tmp_path: Path) -> None:
    first = Fake()
    compared(tmp_path, first)
    assert len(first.calls) == len({call.name for call in first.calls}) == len(list(tmp_path.glob("*.json")))
    again = Fake()
    compared(tmp_path, again)
    assert not again.calls
    next(tmp_path.glob("*pyhessian*tol=0.001*")).unlink()
    compared(tmp_path, again)
    assert [call.method for call in again.calls] == ["pyhessian"]


def test_redo_measures_each_cell_once_more(tmp_path: Path) -> None:
    cell = Cell("a", 1, "torchflat", {"rtol": 0.1})
    Cells(tmp_path, Fake()).measure(cell)
    fake = Fake()
    cells = Cells(tmp_path, fake, redo=True)
    for _ in range(2):
        cells.measure(cell)
    assert fake.calls == [cell]


def test_a_failure_is_tried_again_by_the_next_run_only(tmp_path: Path) -> None:
    cell = Cell("a", 1, "torchflat", {})
    tries = []

    def fail(cell: Cell, limit: float | None) -> dict[str, Any]:
        tries.append(cell)
        return {"status": "failed", "error": "exit code 137", "value": None}

    for expected in (1, 2):
        cells = Cells(tmp_path, fail)
        assert {cells.measure(cell)["status"] for _ in range(2)} == {"failed"}
        assert len(tries) == expected


def test_an_interrupted_write_leaves_no_cell(tmp_path: Path) -> None:
    def unwritable(cell: Cell, limit: float | None) -> dict[str, Any]:
        return {"status": "finished", "value": object()}

    with pytest.raises(TypeError):
        Cells(tmp_path, unwritable).measure(Cell("a", 1, "torchflat", {}))
    assert not list(tmp_path.glob("*.json"))


def test_tolerances_are_tightened_at_the_fewer_rows_and_kept_at_the_more(tmp_path: Path) -> None:
    fake = Fake(tolerance_needed=1e-3)
    compared(tmp_path / "loose", fake, (10_000, 60_000))
    assert asked(fake, "pyhessian", "tol", 10_000) == asked(fake, "pyhessian", "tol", 60_000) == [1e-3]
    fake = Fake(tolerance_needed=1e-4)
    fake.limits = {}
    compared(tmp_path / "tight", fake, (10_000, 60_000))
    # 20 gradients / tol^(1/4): 112 at 1e-3, 200 at 1e-4, which is past 15 × 10.
    assert asked(fake, "pyhessian", "tol", 10_000) == [1e-3, 1e-4]
    assert asked(fake, "pyhessian", "tol", 60_000) == [1e-4]


def test_a_peer_is_stopped_at_fifteen_times_our_default(tmp_path: Path) -> None:
    fake = Fake(tolerance_needed=1e-9)
    records = Records(compared(tmp_path, fake).all())
    limits = [fake.limits[call.name] for call in fake.calls if "tol" in call.setting]
    assert set(limits) == {STOP_AT * 10.0}
    stopped = records.of_peer(NETWORK.name, 10_000, "pyhessian")
    assert stopped is not None and stopped["status"] == "stopped"
    verdict = faster(records, "it", [NETWORK.name], "pyhessian", {}, 8.0)
    assert (verdict.measured, verdict.is_bound, verdict.sentence) == (15.0, True, "met")
    assert "> 15" in verdict.line


def test_steps_are_searched_once_and_added_where_they_do_not_do(tmp_path: Path) -> None:
    class Harder(Fake):
        def __call__(self, cell: Cell, limit: float | None) -> dict[str, Any]:
            self.steps_needed = 5 if cell.rows == 10_000 else 7
            return super().__call__(cell, limit)

    fake = Harder()
    compared(tmp_path, fake, (10_000, 60_000))
    ours = round(record(10.0, TRUTH)["products"])  # the cell with as many products as torchflat took
    assert asked(fake, "hessian-eigenthings", "max_iter", 10_000) == [5] and ours == 5
    assert asked(fake, "hessian-eigenthings", "max_iter", 60_000) == [5, 6, 7]
    assert len(asked(fake, "hessian-eigenthings", "search", 60_000)) == 0
    assert fewest_steps({"status": "finished", "values": [1.0, 1.5]}, TRUTH) == {"max_iter": 2}


def test_memory_is_asked_for_as_the_leanest_peer_that_got_there_took_it(tmp_path: Path) -> None:
    class Lean(Fake):
        def __call__(self, cell: Cell, limit: float | None) -> dict[str, Any]:
            answer = super().__call__(cell, limit)
            return answer if answer["value"] == TRUTH else {**answer, "peak_bytes": 10}

    fake = Lean()
    compared(tmp_path, fake)
    assert [c.setting for c in fake.calls if "memory" in c.setting] == [{"memory": 1000, "microbatch": 500}]


def test_stopped_after_raises_and_leaves_no_timer() -> None:
    with pytest.raises(Stopped), stopped_after(0.01):
        time.sleep(5)
    with stopped_after(math.inf):
        pass
    with stopped_after(0.01):
        pass
    time.sleep(0.02)


@pytest.mark.parametrize(
    ("verdict", "met", "sentence"),
    [
        (Verdict("", 8.0, 8.0), True, "met"),
        (Verdict("", 8.0, 6.0), False, "missed by 25 %"),
        (Verdict("", 5.0, 5.5, at_least=False), False, "missed by 10 %"),
        (Verdict("", 0.0, 3, at_least=False), False, "missed by 3"),
        (Verdict("", 8.0, None), None, "not measured"),
    ],
)
def test_verdicts_say_by_how_much(verdict: Verdict, met: bool | None, sentence: str) -> None:
    assert (verdict.met, verdict.sentence) == (met, sentence)


def test_a_ratio_is_the_geometric_mean_over_networks_at_their_most_rows() -> None:
    def cell(network: str, rows: int, method: str, setting: dict[str, Any], seconds: float) -> dict[str, Any]:
        return {"network": network, "rows": rows, "method": method, "setting": setting, **record(seconds, TRUTH)}

    truth = {"method": "lanczos", "rtol": 1e-6}
    made = [
        cell(network, rows, *rest)
        for network, peer in (("denoiser_sgd", 20.0), ("denoiser_adam", 80.0))
        for rows, own in ((10, 1.0), (60, 10.0))
        for rest in (
            ("torchflat", truth, 40.0),
            ("torchflat", {}, own),
            ("curvlinops", {"tol": 1e-3, "batch": 5, "threads": 1}, peer),
        )
    ]
    verdict = faster(Records(made), "denoisers", ["denoiser_sgd", "denoiser_adam"], "curvlinops", {}, 5.0)
    assert verdict.measured == pytest.approx(4.0)
    assert verdict.sentence == "missed by 20 %"
    claims = {each.claim: each for each in verdicts(Records(made))}
    assert claims["denoisers: full products' worth, default"].measured == 5.0
    assert claims["denoisers: time of curvlinops + eigsh / torchflat, default"].measured == verdict.measured


def test_time_to_the_value_is_when_it_comes_to_stay() -> None:
    what = {"network": "n", "rows": 1, "method": "torchflat"}
    back_and_forth = [(1.0, 2.0, 0, 9), (2.0, 1.5, 0, 9), (3.0, 2.001, 0, 9), (4.0, 2.0, 1.9, 2.1)]
    run = {**what, "setting": {}, **record(4.0, 2.0, trace=back_and_forth)}
    truth = {**what, "setting": {"method": "lanczos", "rtol": 1e-6}, **record(9.0, TRUTH)}
    records = Records([truth, run])
    assert records.to_value(run) == 3.0
    assert records.to_value({**run, "value": 1.9}) == math.inf


def test_the_newest_cell_of_a_request_counts() -> None:
    what = {"network": "n", "rows": 1, "method": "curvlinops"}
    old = {**what, "setting": {"tol": 1e-3, "batch": 1}, **record(1.0, TRUTH, date="2001-01-01")}
    new = {**what, "setting": {"tol": 1e-3, "batch": 2}, **record(2.0, TRUTH, date="2001-01-02")}
    for made in ([old, new], [new, old]):
        assert Records(made).all == [new]


def test_cells_of_different_weights_are_refused() -> None:
    what = {"network": "n", "rows": 1, "method": "torchflat"}
    first = {**what, "setting": {}, **record(1.0, TRUTH)}
    other = {**what, "setting": {"rtol": 1e-3}, **record(1.0, TRUTH, problem="other")}
    assert len(Records([first, {**other, "problem": "same"}]).all) == 2
    with pytest.raises(SystemExit, match="--redo"):
        Records([first, other])


def test_the_report_is_written_beside_the_cells(tmp_path: Path) -> None:
    text = report(compared(tmp_path / "cells", Fake()).all(), tmp_path / "cells")
    assert (tmp_path / "cells.md").read_text() == text + "\n"
    assert (tmp_path / "cells.png").stat().st_size > 0 and (tmp_path / "cells.svg").exists()
    assert "| denoiser_sgd | 10 000 | PyHessian, tol=0.0001 |" in text
    assert "not measured" in text


def tiny() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return Problem(model, nn.MSELoss(), torch.randn(20, 3), torch.randn(20, 2), 10, (5, 7, 10))


def test_a_measurement_tells_everything_in_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "load", lambda *_: tiny())
    threads = torch.get_num_threads()
    found = cells_module.measure(Cell(NETWORK.name, 20, "torchflat", {"rtol": 1e-3}), tmp_path, threads, math.inf)
    hessian = torch.autograd.functional.hessian(*function_of(tiny()))
    assert found["value"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)
    assert found["lower"] <= found["value"] <= found["upper"]
    assert found["gradients"] == pytest.approx(2 * found["seconds"] / sum(found["gradient_seconds"]))
    assert [seconds for seconds, *_ in found["trace"]] == sorted(seconds for seconds, *_ in found["trace"])
    assert json.loads(json.dumps(found, allow_nan=False))["problem"] == tiny().fingerprint()


def test_a_measurement_is_stopped_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(problem: Problem, setting: Any) -> dict[str, Any]:
        time.sleep(60)
        return {"value": 1.0}

    monkeypatch.setattr(Network, "load", lambda *_: tiny())
    monkeypatch.setitem(METHODS, "sleeper", Method("none", (), lambda problem, setting: lambda: None, sleep))
    found = cells_module.measure(Cell(NETWORK.name, 20, "sleeper", {}), tmp_path, torch.get_num_threads(), 10.0)
    assert (found["status"], found["value"]) == ("stopped", None)
    assert found["seconds"] < 30


def test_a_probe_tries_the_batches_that_divide_the_rows_and_then_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def product(problem: Problem, setting: Any) -> Any:
        batches.append(setting["batch"])
        return lambda: time.sleep(0.05 if setting["batch"] == 5 else 0.005)

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    method = Method("none", (), product, torchflat_solve, whole=True)
    found = cells_module.probe(method, tiny(), 2)
    assert batches[:3] == [5, 10, 20]
    assert batches[3] in (10, 20) and found["tried"][3]["threads"] == 1
    assert found["best"]["batch"] in (10, 20)


def function_of(problem: Problem) -> Any:
    names = [name for name, _ in problem.model.named_parameters()]
    shapes = [parameter.shape for parameter in problem.model.parameters()]
    x = torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])

    def f(x: torch.Tensor) -> torch.Tensor:
        parts = [p.view(s) for p, s in zip(x.split([s.numel() for s in shapes]), shapes, strict=True)]
        given = dict(zip(names, parts, strict=True))
        outputs = torch.func.functional_call(problem.model, given, (problem.inputs,))
        return problem.loss(outputs, problem.targets)

    return f, x


def test_the_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = CharacterTransformer(width=16, depth=2, heads=2, length=8)
    letters = torch.randint(128, (2, 8))
    changed = letters.clone()
    changed[:, 5:] = 0
    assert torch.allclose(model(letters)[:, :, :5], model(changed)[:, :, :5], atol=1e-6)
    assert not torch.allclose(model(letters)[:, :, 5:], model(changed)[:, :, 5:], atol=1e-3)


def test_text_is_followed_by_itself() -> None:
    inputs, targets, _ = library_text(6, length=10)
    assert inputs.shape == targets.shape == (6, 10)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(library_text(3, length=10)[0], inputs[:3])
