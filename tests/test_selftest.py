"""The self-test passes where the library is right, and fails, naming the row, where it or a problem is made wrong."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from torchflat import ops
from torchflat.cli import selftest
from torchflat.cli.selftest import KERNELS, ROUNDING_UNITS, Selftest, kernel_difference
from torchflat.errors import UsageError
from torchflat.objective import Objective
from torchflat.objective.ledger import Ledger
from torchflat.ops import reference
from torchflat.optim import NormalizedGD
from torchflat.problems import PROBLEMS, Factorisation, Quadratic, sines
from torchflat.spectrum import trace

BULK = torch.cat([torch.linspace(-1, 0.5, 119), torch.tensor([2.0])]).double()


@dataclasses.dataclass(frozen=True, eq=False)
class Liar(Quadratic):
    """Claims another spectrum than its function has."""

    claimed: Tensor = dataclasses.field(default_factory=lambda: BULK)

    def eigenvalues(self) -> Tensor:
        return self.claimed.sort().values


class WrongBlocks(Factorisation):
    def block_sharpness(self) -> Mapping[str, float]:
        return {name: 1.01 * value for name, value in super().block_sharpness().items()}


class Broken(Quadratic):
    def objective(self) -> Objective:
        raise RuntimeError("this one breaks\nand says so at length")


def claims(index: int | None, factor: float) -> Tensor:
    claimed = BULK.clone()
    claimed[index] *= factor
    return claimed


def run(capsys: pytest.CaptureFixture[str], **flags: object) -> tuple[int, str]:
    code = Selftest(**flags).run()  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.err == "", "nothing may be shown where stderr is no terminal"
    return code, captured.out


def missed(output: str) -> list[str]:
    return re.findall(r"^missed: (.+?): ", output, flags=re.MULTILINE)


def test_everything_passes_and_the_table_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run(capsys)
    assert code == 0
    assert missed(output) == []
    assert "✗" not in output
    assert max(map(len, output.splitlines())) <= 80
    known = [name for name, problem in PROBLEMS.items() if problem.eigenvalues() is not None]
    for name in (*known, "model", "ledger", "optimizer"):
        assert re.search(rf"^{re.escape(name)} .*✓$", output, flags=re.MULTILINE), name
    passed = re.search(r"^(\d+) of (\d+) checks passed in .*seed 0,", output, flags=re.MULTILINE)
    assert passed is not None and passed[1] == passed[2] == str(output.count("✓"))
    assert "1 - 1e-6" in output
    assert ("no native kernels" in output) == (ops.backend("cpu") == "reference")


@pytest.mark.parametrize(
    ("claimed", "rows"),
    [
        (claims(119, 1.01), {"sharpness", "largest 3"}),
        (claims(119, 0.99), {"sharpness", "power", "largest 3"}),
        (claims(118, 1.2), {"largest 3"}),
        (claims(0, 1.1), {"smallest 2"}),
        (claims(0, 0.9), {"smallest 2"}),
        (BULK + 0.3 * (torch.arange(120) == 60), {"trace"}),
        (torch.cat([BULK[BULK < -0.5], BULK[BULK < -0.5] + 0.1, BULK[BULK >= 0.0]])[-120:], {"density", "trace"}),
    ],
)
def test_a_wrong_claim_fails_with_5_and_names_the_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, claimed: Tensor, rows: set[str]
) -> None:
    monkeypatch.setitem(PROBLEMS, "quadratic/wrong", Liar(BULK, claimed=claimed))
    # A narrower interval for the trace than is asked for otherwise.
    monkeypatch.setattr(selftest, "trace", lambda f, rtol, *args, **kwargs: trace(f, 1e-4, *args, **kwargs))
    code, output = run(capsys, only="quadratic/wrong")
    assert code == 5
    assert rows <= {label.removeprefix("quadratic/wrong ") for label in missed(output)}
    assert output.count("✗") == len(missed(output)) > 0
    assert "is outside [" in output


def test_a_true_claim_of_the_same_kind_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROBLEMS, "quadratic/right", Liar(BULK, claimed=BULK))
    code, output = run(capsys, only="quadratic/right")
    assert code == 0
    assert output.count("✓") == 6


def test_a_wrong_block_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBLEMS, "factorisation/wrong", WrongBlocks(sines(2, 3, 0.1), sines(3, 4, 0.2)))
    code, output = run(capsys, only="factorisation/wrong block")
    assert code == 5
    assert missed(output) == ["factorisation/wrong block left", "factorisation/wrong block right"]


def test_a_check_that_raises_is_a_miss_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROBLEMS, "monomial/broken", Broken(BULK))
    code, output = run(capsys, only="monomial/* sharpness")
    assert code == 5
    assert "missed: monomial/broken sharpness: RuntimeError: this one breaks (seed 0)" in output.splitlines()
    assert output.count("✓") == 4


def test_a_run_that_does_not_end_within_the_budget_is_a_miss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "BUDGET", 10.0)
    code, output = run(capsys, only="quadratic/indefinite sharpness")
    assert code == 5
    assert "missed: quadratic/indefinite sharpness: BUDGET" in output


def test_an_interruption_is_not_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Quadratic) -> Objective:
        raise KeyboardInterrupt

    monkeypatch.setattr(Quadratic, "objective", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Selftest(only="quadratic/zero").run()


def test_a_model_that_is_left_changed_is_a_miss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draws(*args: object, **kwargs: object) -> object:
        torch.rand(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    original = selftest.sharpness
    monkeypatch.setattr(selftest, "sharpness", draws)
    code, output = run(capsys, only="model restored")
    assert code == 5
    assert "0 is outside [1, 1]" in output


@pytest.mark.parametrize("forgotten", ["forwards", "backwards", "products"])
def test_a_ledger_that_forgets_is_a_miss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    def charge(self: Ledger, **rows: int) -> None:
        original(self, **{kind: count for kind, count in rows.items() if kind != forgotten})

    original = Ledger.charge
    monkeypatch.setattr(Ledger, "charge", charge)
    code, output = run(capsys, only="ledger")
    assert code == 5
    assert missed(output) == ["ledger gradients"]


@pytest.mark.parametrize(
    "wrong", [lambda params, lr: torch.optim.SGD(params, 0.01), lambda params, lr: NormalizedGD(params, lr, decay=0.6)]
)
def test_an_optimizer_that_stops_before_the_flat_minimum_is_a_miss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., torch.optim.Optimizer]
) -> None:
    monkeypatch.setattr(selftest, "NormalizedGD", wrong)
    code, output = run(capsys, only="optimizer")
    assert code == 5
    assert missed(output) == ["optimizer flatness"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_their_twins(kernel: str) -> None:
    assert 0 <= kernel_difference(kernel, "cpu") <= ROUNDING_UNITS


@pytest.mark.parametrize("wrong", [1 + 1e-12, math.nan])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_disagrees_is_a_miss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kernel: str, wrong: float
) -> None:
    twin = getattr(reference, kernel)

    def other(*args: object) -> Tensor | None:
        result: Tensor | None = twin(*args)
        changed = result if result is not None else args[0][0]  # type: ignore[index]
        changed *= wrong
        return result

    monkeypatch.setattr(reference, kernel, other)
    monkeypatch.setattr(ops, "backend", lambda device: "native" if device == "cpu" else "reference")
    assert kernel_difference(kernel, "cpu") > ROUNDING_UNITS
    code, output = run(capsys, only="cpu/")
    assert code == 5
    assert missed(output) == [f"cpu/{kernel} twin"]
    assert output.count("✓") == 2


def test_list_says_what_there_is_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROBLEMS, "quadratic/broken", Broken(BULK))
    code, output = run(capsys, list=True, only="quadratic/broken")
    assert code == 0
    assert output.splitlines() == [
        f"quadratic/broken {what}" for what in ("sharpness", "power", "largest 3", "smallest 2", "trace", "density")
    ]


@pytest.mark.parametrize(
    ("pattern", "labels"),
    [
        ("deep-linear/* trace", [f"deep-linear/{name} trace" for name in ("chain", "flattest", "canonical", "sharp")]),
        ("ledger", ["ledger gradients"]),
        ("monomial/sharp largest", ["monomial/sharp largest 2"]),
    ],
)
def test_only_takes_substrings_and_wildcards(
    capsys: pytest.CaptureFixture[str], pattern: str, labels: list[str]
) -> None:
    assert run(capsys, list=True, only=pattern) == (0, "\n".join(labels) + "\n")


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'nonsense' matches no check.*--list"):
        Selftest(only="nonsense").run()


def test_a_seed_is_repeatable_printed_and_matters(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [run(capsys, only="quadratic/negative sharpness", seed=seed)[1] for seed in (3, 3, 4)]
    tables = [output.partition(" checks passed")[0] for output in outputs]
    assert "seed 3" in outputs[0] and "seed 4" in outputs[2]
    assert tables[0] == tables[1] != tables[2]


def test_full_takes_ten_starts_and_narrower_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    label = "quadratic/gap-1e-3 sharpness"
    quick, full = (run(capsys, only=label, full=full) for full in (False, True))
    assert quick[0] == full[0] == 0
    costs = [int(re.findall(r"(\d+) ✓", output)[0]) for _, output in (quick, full)]
    assert costs[1] >= 10 * costs[0]
    lower, upper = (float(bound) for bound in re.findall(r"\[(\S+), (\S+)\]", full[1])[0])
    assert upper - lower <= 2e-4


def test_random_state_of_the_process_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    run(capsys, only="e*r")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("arguments", "code"), [(["--only", "monomial"], 0), (["--only", "nonsense"], 2)])
def test_as_a_command(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "torchflat", "selftest", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 0:
        assert done.stderr == ""
        assert "checks passed" in done.stdout
    else:
        assert done.stdout == ""
        assert "nonsense" in done.stderr
