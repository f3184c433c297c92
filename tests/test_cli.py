"""The audit command: what it writes, what it prints, and the exit code of everything that can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from command_line import one_line, run
from safetensors.torch import save_file

from torchflat.audit.report import Report

# Least squares: H = 2 XᵀX / m = diag(2, 8), so that λ₁ = 8, λ_min = 2 and the trace is 10.
TASK = """
import torch, torchflat
from torch import nn

X = torch.tensor([[2**0.5, 0.0], [0.0, 8**0.5]])
Y = torch.zeros(2, 1)

def model():
    return nn.Linear(2, 1, bias=False)

def task(rows=2):
    return torchflat.Task(model, nn.functional.mse_loss, (X[:rows], Y[:rows]), name="line")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    save_file({"weight": torch.tensor([[1.0, 2.0]])}, tmp_path / "line.safetensors")
    return tmp_path


def write(place: Path, body: str) -> str:
    """A task file with the usual imports; returns its address."""
    head = "import torch, torchflat\nfrom torch import nn\nfrom torch.nn import functional as F\n"
    (place / "other.py").write_text(head + textwrap.dedent(body))
    return "other.py:task"


def test_known_answer_in_every_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "line.safetensors", "--task", "task.py", "-o", "out", "--json", "copy.json") == 0
    report = Report.load("out")
    content = report.content
    assert content["status"] == "complete"
    assert content["sharpness"]["lower"] <= 8 <= content["sharpness"]["upper"]
    assert content["sharpness"]["largest_stable_step"]["value"] == pytest.approx(0.25, rel=1e-5)
    assert content["eigenvalues"]["smallest"][0]["value"] == pytest.approx(2, rel=1e-5)
    assert content["trace"]["value"] == pytest.approx(10, rel=1e-5)
    # f = mean (√2·1)², (√8·2)² = (2 + 32)/2, and ∇f = H x.
    assert content["point"]["loss"] == pytest.approx(17, rel=1e-5)
    assert content["point"]["gradient_norm"] == pytest.approx((2**2 + 16**2) ** 0.5, rel=1e-5)
    # Beyond 2|∇f|/λ₁ curvature outweighs the gradient, and all values lie between the two quadratics.
    profile = content["variation"]
    assert profile["curvature_radius"] == pytest.approx(2 * (2**2 + 16**2) ** 0.5 / 8, rel=1e-5)
    assert profile["order"]["p"]["value"] == pytest.approx(1, abs=0.02)
    for radius, value in zip(profile["radii"], profile["values"], strict=True):
        slope = (2**2 + 16**2) ** 0.5 * radius
        assert 0.99 * (slope + radius**2) <= value <= 1.01 * (slope + 4 * radius**2)
    near, far = ((2**2 + 16**2) ** 0.5 * r + c * r * r for r, c in ((profile["doubling_radius"], c) for c in (1, 4)))
    assert near <= 1.01 * 17 and far >= 0.99 * 17
    assert json.loads(Path("copy.json").read_text()) == json.loads(Path("out/report.json").read_text())
    names = {path.name for path in Path("out").iterdir()}
    assert names >= {
        "report.json",
        "report.html",
        "density.png",
        "blocks.png",
        "convergence.png",
        "eigenvalues.png",
        "profile.png",
    }
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    provenance = content["provenance"]
    assert provenance["checkpoint"]["path"] == "line.safetensors"
    assert len(provenance["checkpoint"]["sha256"]) == len(provenance["data"]["sha256"]) == 64


def test_the_report_is_the_same_twice(place: Path) -> None:
    for folder in ("a", "b"):
        assert run("audit", "line.safetensors", "--task", "task.py", "-o", folder, "--seed", 3) == 0
    first, second = (Report.load(folder).content for folder in ("a", "b"))
    for part in ("point", "eigenvalues", "trace", "density", "blocks", "variation"):
        # Seconds differ, and nothing else does.
        assert _without_cost(first[part]) == _without_cost(second[part])


def _without_cost(part: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in part.items() if key != "cost"}


def test_json_on_stdout_is_json_and_nothing_else(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torchflat", "audit", "--task", "task.py", "--parts", "sharpness", "--json", "-"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Report(json.loads(done.stdout)).validate().content["sharpness"]["status"] == "CONVERGED"
    # Not a terminal: no bar on stderr, only the line that says where the report is.
    assert done.stderr.splitlines() == [f"torchflat: the report is in {Path('torchflat-audit-1', 'report.html')}"]


def test_numbered_folders_are_fresh(place: Path) -> None:
    for _ in range(2):
        assert run("audit", "--task", "task.py", "--parts", "sharpness") == 0
    assert Path("torchflat-audit-1/report.json").exists() and Path("torchflat-audit-2/report.json").exists()


def test_nothing_is_overwritten_without_force(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    assert run("audit", "--task", "task.py", "-o", "out") == 2
    one_line(capsys, "out", "--force")
    assert [path.name for path in Path("out").iterdir()] == ["precious.txt"]
    assert run("audit", "--task", "task.py", "-o", "out", "--force", "--parts", "sharpness") == 0
    assert Path("out/precious.txt").read_text() == "mine"


@pytest.mark.parametrize("gate, code", [
    ("sharpness.lower > 7", 1),
    ("sharpness.upper < 7", 0),
    ("sharpness.value > 8.0000001", 4),
    ("sharpness.value > 9 or trace.value > 9", 1),
    ("sharpness.value > 9 and trace.value > 9", 0),
    ("variation.curvature_radius > 0 and variation.order.p.value > 0.9", 1),
    ("variation.values[0] > 1e3 or variation.order.p.upper > 1.1", 0),
])  # fmt: skip
def test_gates_decide_the_exit_code(place: Path, gate: str, code: int) -> None:
    assert run("audit", "--task", "task.py", "-o", "out", "--fail-on", gate) == code


@pytest.mark.parametrize("gate", ["sharpness.lower >", "sharpnes.lower > 1", "__import__('os')", "sharpness.lower > x"])
def test_a_wrong_gate_costs_no_audit(place: Path, gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "--task", "task.py", "-o", "out", "--fail-on", gate) == 2
    assert not Path("out").exists() and "Traceback" not in capsys.readouterr().err


def test_configuration_file_and_flags(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("audit.toml").write_text(
        'task = "task.py"\nout = "out"\nparts = ["sharpness"]\nrtol = 1e-3\nseed = 5\n[task_option]\nrows = 1\n'
    )
    assert run("audit", "--config", "audit.toml", "--seed", 7) == 0
    content = Report.load("out").content
    assert content["provenance"]["config"]["seed"] == 7
    assert content["provenance"]["config"]["rtol"] == 1e-3
    # The one row left is (√2, 0): H = diag(4, 0).
    assert content["sharpness"]["value"] == pytest.approx(4, rel=1e-4)
    capsys.readouterr()
    Path("audit.toml").write_text("rtoll = 1\n")
    assert run("audit", "--config", "audit.toml") == 2
    one_line(capsys, "rtoll", "rtol")
    Path("audit.toml").write_text("rtol = = 1\n")
    assert run("audit", "--config", "audit.toml") == 2
    assert run("audit", "--config", "nowhere.toml") == 2


@pytest.mark.parametrize("flags", [
    ("--rtoll", "1"), ("--rtol", "abc"), ("--rtol", "-1"), ("--confidence", "1"), ("--budget", "soon"), ("--top", "-1"),
    ("--memory", "much"), ("--rows", "0"), ("--rows", "99"), ("--microbatch", "0"), ("--parts", "shapness"),
    ("--params", "nothing.*"), ("--task-option", "rows"), ("--task-option", "rowz=1"), ("--device", "abacus"),
])  # fmt: skip
def test_wrong_flags_exit_with_2(place: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "--task", "task.py", "-o", "out", *flags) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not Path("out").exists() or not any(Path("out").iterdir())


def test_task_errors_exit_with_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text("def task(:\n    pass\n")
    assert run("audit", "--task", "broken.py") == 2
    one_line(capsys, "broken.py", "1")
    assert run("audit", "--task", "nowhere.py:task") == 2
    one_line(capsys, "nowhere.py")
    assert run("audit", "line.safetensors") == 2
    one_line(capsys, "--task")
    assert run("audit", "--task", write(place, "def task():\n    raise KeyError('lost')\n")) == 2
    one_line(capsys, "other.py:5", "lost")


@pytest.mark.parametrize("target", ["task.py/out", "missing/../task.py"])
def test_unwritable_folder_exits_with_2(place: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "--task", "task.py", "-o", target) == 2
    one_line(capsys, "task.py")
    assert Path("task.py").read_text() == TASK


@pytest.mark.parametrize("body, needles", [
    ("loss = lambda o, t: (o - t)**2", ("shape (2, 1)", "reduction='mean'")),
    ("loss = lambda o, t: F.mse_loss(o, t) * float('nan')", ("nan",)),
    ("loss = lambda o, t: F.mse_loss(o.detach(), t)", ("does not depend",)),
    ("loss = lambda o, t: 3.0", ("float", "tensor")),
    ("loss = nn.MSELoss(reduction='sum')", ("mean over rows", "batch_loss")),
])  # fmt: skip
def test_wrong_losses_exit_with_3(
    place: Path, body: str, needles: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    address = write(
        place,
        f"""
        {body}
        def task():
            X = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
            return torchflat.Task(nn.Linear(2, 1), loss, (X, torch.zeros(2, 1)))
        """,
    )
    assert run("audit", "--task", address, "-o", "out") == 3
    one_line(capsys, *needles)
    assert not Path("out").exists()


def test_wrong_data_exits_with_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = write(
        place,
        """
        def task(case="empty"):
            X, Y = torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 7])
            data = {"empty": (X[:0], Y[:0]), "label": (X, Y), "nan": (X * float("nan"), Y % 3)}[case]
            return torchflat.Task(nn.Linear(2, 3), F.cross_entropy, data)
        """,
    )
    assert run("audit", "--task", address) == 3
    one_line(capsys, "empty")
    assert run("audit", "--task", address, "--task-option", "case=label") == 3
    one_line(capsys, "out of bounds", "[0, 7]")
    assert run("audit", "--task", address, "--task-option", "case=nan") == 3
    one_line(capsys, "nan")
    assert not list(place.glob("torchflat-audit-*"))


def test_wrong_checkpoints_exit_with_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(place / "owned"),)

    Path("empty.pt").touch()
    torch.save({"weight": torch.zeros(1, 2), "payload": Payload()}, "payload.pt")
    torch.save({"weight": torch.zeros(1, 3)}, "shape.pt")
    torch.save({"weight": torch.tensor([[1.0, float("nan")]])}, "nan.pt")
    Path("cut.safetensors").write_bytes(Path("line.safetensors").read_bytes()[:40])
    for name, needle in (
        ("missing.pt", "missing.pt"), ("empty.pt", "empty"), ("payload.pt", "mkdir"), ("shape.pt", "(1, 3)"),
        ("nan.pt", "weight"), ("cut.safetensors", "cut.safetensors"),
    ):  # fmt: skip
        assert run("audit", name, "--task", "task.py", "-o", "out") == 3, name
        one_line(capsys, needle)
        assert not Path("out").exists()
    assert not Path("owned").exists()


INTERRUPTING = """
    class Model(nn.Module):
        calls = 0
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
        def forward(self, x):
            Model.calls += 1
            if Model.calls == LIMIT:
                raise KeyboardInterrupt
            return self.linear(x)

    def task():
        X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        return torchflat.Task(Model(), F.mse_loss, (X, torch.zeros(40, 4)))
    """


def test_interruption_leaves_a_partial_report_that_resumes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Graphs are rebuilt for every product (no memory to keep them), so that the model is called in the middle of λ₁.
    common = ("--memory", "0B", "--microbatch", "40", "--rtol", "1e-6", "--dtype", "float64", "-o")
    torch.manual_seed(0)
    address = write(place, INTERRUPTING.replace("LIMIT", "12"))
    save_file({"linear.weight": torch.randn(4, 6), "linear.bias": torch.randn(4)}, "m.safetensors")
    assert run("audit", "m.safetensors", "--task", address, *common, "out") == 130
    content = Report.load("out").content
    assert content["status"] == "partial"
    assert content["sharpness"]["status"] == "INTERRUPTED"
    assert "point" in content and "blocks" not in content
    assert Path("out/report.html").exists()
    assert "--resume" in capsys.readouterr().err

    address = write(place, INTERRUPTING.replace("LIMIT", "-1"))
    assert run("audit", "m.safetensors", "--task", address, *common, "out", "--resume") == 0
    resumed = Report.load("out").content
    assert resumed["status"] == "complete"
    assert resumed["point"] == content["point"]
    assert run("audit", "m.safetensors", "--task", address, *common, "fresh") == 0
    fresh = Report.load("fresh").content
    for part in ("eigenvalues", "trace", "density", "blocks", "variation"):
        assert _without_cost(fresh[part]) == _without_cost(resumed[part])


def test_resume_refuses_another_audit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    address = write(place, INTERRUPTING.replace("LIMIT", "12"))
    save_file({"linear.weight": torch.randn(4, 6), "linear.bias": torch.randn(4)}, "m.safetensors")
    common = ("m.safetensors", "--task", address, "--memory", "0B", "--microbatch", "40", "-o", "out")
    assert run("audit", *common) == 130
    write(place, INTERRUPTING.replace("LIMIT", "-1"))
    capsys.readouterr()
    assert run("audit", *common, "--resume", "--seed", 9) == 2
    one_line(capsys, "seed")
    save_file({"linear.weight": torch.randn(4, 6), "linear.bias": torch.randn(4)}, "m.safetensors")
    assert run("audit", *common, "--resume") == 2
    one_line(capsys, "checkpoint")
    assert run("audit", "--task", "task.py", "--resume", "-o", "nowhere") == 2


def test_a_spent_time_budget_is_inconclusive(place: Path) -> None:
    address = write(
        place,
        """
        import time
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(30, 20)
            def forward(self, x):
                time.sleep(0.02)
                return self.linear(x)
        def task():
            return torchflat.Task(Model(), F.mse_loss, (torch.randn(50, 30), torch.zeros(50, 20)))
        """,
    )
    torch.manual_seed(0)
    assert run("audit", "--task", address, "-o", "out", "--budget", "0.3s", "--memory", "0B") == 4
    content = Report.load("out").content
    assert content["status"] == "partial"
    assert any("budget" in note for note in content["provenance"]["notes"])


def test_a_folder_is_a_trajectory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    for epoch in (2, 10):
        save_file({"weight": torch.full((1, 2), float(epoch))}, f"run/epoch{epoch}.safetensors")
    assert run("audit", "run", "--task", "task.py", "-o", "out", "--parts", "sharpness") == 0
    series = json.loads(Path("out/trajectory.json").read_text())
    # The loss is quadratic, so that λ₁ is the same and the loss grows: (2 + 8)/2 · epoch².
    assert [report["point"]["loss"] for report in series] == pytest.approx([20, 500], rel=1e-5)
    assert [report["sharpness"]["value"] for report in series] == pytest.approx([8, 8], rel=1e-5)
    assert Path("out/trajectory.html").exists() and Path("out/epoch10.safetensors/report.html").exists()


def test_internal_errors_leave_a_log(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchflat.cli.audit.audit", lambda *args, **keywords: 1 / 0)
    assert run("audit", "--task", "task.py", "-o", "out") == 70
    message = capsys.readouterr().err
    assert "ZeroDivisionError" in message and "Traceback" not in message
    log = Path(next(word for word in message.replace(";", " ").split() if word.endswith(".log")))
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_help_and_version(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == run("--version") == run("audit", "--help") == 0
    printed = capsys.readouterr().out
    assert "selftest" in printed and "torchflat 0." in printed and "--fail-on" in printed
    assert run("audti") == 2
    one_line(capsys, "audti", "audit")


def test_importing_torchflat_needs_torch_only() -> None:
    def loaded(name: str) -> set[str]:
        code = f"import sys, {name}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return set(done.stdout.split())

    # torch itself imports some of these where it finds them.
    extra = loaded("torchflat") - loaded("torch") - set(sys.stdlib_module_names)
    assert extra == {"torchflat"}


# ---- laws and the flattest rescaling -------------------------------------------------------------------------------

# f = 2 (ab - 1)² at a = 4, b = ¼: λ₁ = 4 (a² + b²), and λ₁★ = 8.
UNIT = """
    def task(branch="false"):
        class Unit(nn.Sequential):
            def forward(self, x):
                return super().forward(x if branch == "false" or x.sum() > 0 else -x)
        model = Unit(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            model[0].weight.fill_(0.25), model[2].weight.fill_(4.0)
        X = torch.tensor([[1.0], [3**0.5]], dtype=torch.float64)
        return torchflat.Task(model, F.mse_loss, (X, X))
    """


def test_laws_and_orbit_of_a_unit_and_a_gate_on_the_headroom(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = write(place, UNIT)
    parts = ("--parts", "laws", "orbit")
    assert run("audit", "--task", address, "-o", "out", *parts, "--fail-on", "orbit.headroom > 10") == 0
    content = Report.load("out").content
    (row,) = content["laws"]["couplings"]
    assert (row["channels"], row["laws"], row["ratios"]) == (1, 1, pytest.approx([1 / 16] * 5))
    assert row["imbalance"] == pytest.approx((16 - 1 / 16) / (16 + 1 / 16))
    orbit = content["orbit"]
    assert orbit["lower"] <= 8 * (1 + 1e-9) and orbit["upper"] >= 8 * (1 - 1e-9) and orbit["status"] == "CONVERGED"
    assert orbit["headroom"] == pytest.approx((16 + 1 / 16) / 2, rel=1e-2)
    assert run("audit", "--task", address, "-o", "gated", *parts, "--fail-on", "orbit.headroom > 7") == 1
    assert "Rescaling alone explains a factor 8.03" in capsys.readouterr().out


def test_a_model_that_cannot_be_exported_is_a_note(place: Path) -> None:
    address = write(place, UNIT)
    flags = ("--task-option", "branch=true", "--parts", "sharpness", "laws", "orbit")
    assert run("audit", "--task", address, "-o", "out", *flags) == 0
    content = Report.load("out").content
    assert content["status"] == "complete" and not {"laws", "orbit"} & content.keys()
    assert any("the laws could not be found: torch.export" in note for note in content["provenance"]["notes"])


def test_laws_are_taken_over_on_resume(place: Path) -> None:
    address = write(place, UNIT)
    assert run("audit", "--task", address, "-o", "out", "--parts", "laws", "orbit") == 0
    report = json.loads(Path("out/report.json").read_text())
    del report["orbit"]
    report["status"] = "partial"
    report["laws"]["couplings"][0]["name"] = "as it was"
    Path("out/report.json").write_text(json.dumps(report))
    assert run("audit", "--task", address, "-o", "out", "--parts", "laws", "orbit", "--resume") == 0
    content = Report.load("out").content
    assert content["laws"]["couplings"][0]["name"] == "as it was" and content["orbit"]["status"] == "CONVERGED"
