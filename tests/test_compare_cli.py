"""The compare command: verdicts that are known, what it writes and prints, and the exit code of what can go wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_line, run
from safetensors.torch import save_file
from torch import nn

import torchflat
from torchflat.audit.comparison import compare_checkpoints
from torchflat.audit.comparison_page import comparison_page
from torchflat.audit.comparison_report import ComparisonReport, named, verdict_words
from torchflat.audit.comparison_report import schema as comparison_schema
from torchflat.audit.profile_figures import comparison
from torchflat.errors import UsageError
from torchflat.flatness import Verdict

# One ReLU unit on positive data: f = (ab - 1)² mean x² = 2 (ab - 1)², so that where ab = 1 the largest eigenvalue of
# the Hessian is 4 (a² + b²), the order is 2, the modulus half of that, and (a, b) = (1, 1) is the flattest minimum.
TASK = """
import torch, torchflat
from torch import nn

X = torch.tensor([[1.0], [3**0.5]], dtype=torch.float64)

def model():
    return nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()

def task(rows=2):
    return torchflat.Task(model, nn.functional.mse_loss, (X[:rows], X[:rows]), name="unit")

def wide():
    def wider():
        return nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    return torchflat.Task(wider, nn.functional.mse_loss, (X, X), name="two units")

def one_model():
    return torchflat.Task(model(), nn.functional.mse_loss, (X, X), name="one model")
"""


def save(name: str, a: float, b: float) -> None:
    pair = {"2.weight": torch.tensor([[a]]).double(), "0.weight": torch.tensor([[b]]).double()}
    save_file(pair, name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    save("flat.safetensors", 1.0, 1.0)
    save("sharp.safetensors", 2.0, 0.5)
    save("off.safetensors", 1.0, 1.1)
    return tmp_path


def content(folder: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(folder, "compare.json").read_text())
    return loaded


def test_the_flatter_point_is_found_with_its_known_order_and_modulus(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", "flat.safetensors", "sharp.safetensors", "--task", "task.py:task", "-o", "out") == 0
    found = content("out")
    assert (found["verdict"], found["verdict_limit"], found["decided_by"]) == ("FLATTER", "FLATTER", "modulus")
    for side, modulus in (("first", 2 * 2.0), ("second", 2 * 4.25)):
        order = found[side]["variation"]["order"]
        assert order["p"]["value"] == 2 and order["exact"]
        assert order["modulus"]["lower"] <= modulus <= order["modulus"]["upper"]
        assert order["modulus"]["value"] == pytest.approx(modulus, rel=1e-3)
        assert len(found[side]["checkpoint"]["sha256"]) == 64
    assert found["first"]["checkpoint"]["path"] == "flat.safetensors"
    assert found["second"]["parameter_norm"] == pytest.approx(4.25**0.5)
    ComparisonReport(found).validate()
    assert {path.name for path in Path("out").iterdir()} == {"compare.json", "compare.html", "profiles.png"}
    printed = capsys.readouterr().out
    assert printed.startswith("A is flatter than B\n")
    assert "Decided by modulus" in printed and "8.500 r^2" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_the_mirror_image_and_json_on_stdout(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = ("compare", "sharp.safetensors", "flat.safetensors", "--task", "task.py:task", "--json", "-")
    done = subprocess.run(
        [sys.executable, "-m", "torchflat", *command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    report = ComparisonReport(json.loads(done.stdout)).validate()
    assert report.verdict is Verdict.SHARPER
    page = Path("torchflat-compare-1", "compare.html")
    assert done.stderr.splitlines() == [f"torchflat: the report is in {page}"]
    text = page.read_text()
    assert "A is sharper than B" in text and "<script" not in text and "http" not in text and "None" not in text


@pytest.mark.parametrize("address", ["task.py:task", "task.py:one_model"])
def test_a_file_is_as_flat_as_itself(place: Path, address: str) -> None:
    assert run("compare", "flat.safetensors", "flat.safetensors", "--task", address, "-o", "out") == 0
    assert content("out")["verdict"] == "EQUIVALENT"


def test_a_model_that_the_task_holds_is_copied_for_the_second_point(place: Path) -> None:
    # Were it shared, both points would be the second.
    assert run("compare", "flat.safetensors", "sharp.safetensors", "--task", "task.py:one_model", "-o", "out") == 0
    assert content("out")["verdict"] == "FLATTER"


def test_what_is_undecided_exits_with_4(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # At these radii the gradient of the second point is all that shows, and it is not critical.
    radii = ("--radii", "1e-6", "2e-6", "4e-6", "8e-6", "1.6e-5")
    task = ("--task", "task.py:task", "-o", "out")
    assert run("compare", "flat.safetensors", "off.safetensors", *task, *radii) == 4
    found = content("out")
    assert (found["verdict"], found["decided_by"], found["radii"][0]) == ("UNDECIDED", None, 1e-6)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("what was found does not decide · Undecided: at no radius")
    assert "rise above the gradient" in printed
    assert "! the loss is 0 at A and 0.02 at B" in printed
    assert Path("out/compare.html").exists()


def test_another_architecture_comes_with_a_caution(place: Path) -> None:
    save_file({"0.weight": torch.ones(2, 1).double(), "2.weight": torch.full((1, 2), 0.5).double()}, "wide.safetensors")
    command = ("compare", "flat.safetensors", "wide.safetensors", "--task", "task.py:task", "--task2", "task.py:wide")
    assert run(*command, "-o", "out") == 0
    found = content("out")
    assert (found["first"]["parameters"], found["second"]["parameters"]) == (2, 4)
    assert any("different variables" in caution for caution in found["cautions"])
    # f = 2 (a·b - 1)² with vectors: the modulus is 2 (|a|² + |b|²) = 2 (½ + 2).
    assert found["second"]["variation"]["order"]["modulus"]["value"] == pytest.approx(5, rel=1e-3)
    assert found["verdict"] == "FLATTER"


@pytest.mark.parametrize("flags", [
    ("--tolerance", "2"), ("--confidence", "0"), ("--radii", "-1"), ("--radii", "x"), ("--gradients", "0"),
    ("--tolerence", "0.1"), ("--rows", "0"), ("--device", "abacus"), ("--task-option", "rowz=1"), ("--dtype", "int8"),
    ("--task2-option", "rows=1"), ("--config", "nowhere.toml"), ("--task2", "nowhere.py:task"),
])  # fmt: skip
def test_wrong_flags_exit_with_2_and_write_nothing(
    place: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("flat.safetensors", "sharp.safetensors", "--task", "task.py:task", "-o", "out")
    assert run("compare", *files, *flags) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not Path("out").exists()


def test_without_a_task_or_a_second_file_exits_with_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "flat.safetensors", "sharp.safetensors") == 2
    one_line(capsys, "--task")
    assert run("compare", "flat.safetensors", "--task", "task.py:task") == 2
    assert not list(place.glob("torchflat-*"))


def test_wrong_checkpoints_exit_with_3_and_write_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"0.weight": torch.zeros(2, 1), "2.weight": torch.zeros(1, 2)}, "wide.safetensors")
    for first, second, needle in (
        ("wide.safetensors", "flat.safetensors", "wide.safetensors"),
        ("flat.safetensors", "wide.safetensors", "wide.safetensors"),
        ("flat.safetensors", "missing.pt", "missing.pt"),
    ):
        assert run("compare", first, second, "--task", "task.py:task", "-o", "out") == 3
        one_line(capsys, needle)
        assert not Path("out").exists()


def test_nothing_is_overwritten_without_force(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    command = ("compare", "flat.safetensors", "flat.safetensors", "--task", "task.py:task", "-o", "out")
    assert run(*command) == 2
    one_line(capsys, "out", "--force")
    assert run(*command, "--force", "--radii", "0.01", "0.02") in (0, 4)
    assert Path("out/precious.txt").read_text() == "mine" and Path("out/compare.json").exists()


def test_flags_from_a_file(place: Path) -> None:
    Path("compare.toml").write_text('task = "task.py:task"\nout = "out"\nradii = [0.1, 0.2]\ntolerance = 0.05\n')
    assert run("compare", "flat.safetensors", "flat.safetensors", "--config", "compare.toml", "--seed", "3") in (0, 4)
    found = content("out")
    assert (found["radii"], found["tolerance"], found["provenance"]["config"]["seed"]) == ([0.1, 0.2], 0.05, 3)


def test_help_names_the_command_and_its_exit_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == run("compare", "--help") == 0
    printed = capsys.readouterr().out
    assert "say which of two checkpoints is flatter" in printed and "--tolerance" in printed


# ---- the report without the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ComparisonReport:
    """A small network with a gradient, on enough rows to tell the chance in them, against a sharper copy of itself."""
    random = torch.Generator().manual_seed(0)
    X = torch.randn(80, 2, generator=random, dtype=torch.float64)
    Y = X.abs().sum(1, keepdim=True)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()

    first = torch.tensor([[1.0, 0.2], [-0.3, 1.0], [-1.0, -0.8]]).double()
    second = torch.tensor([[0.9, 1.1, 0.8]]).double()
    files = [tmp_path_factory.mktemp("checkpoints") / name for name in ("a.safetensors", "b.safetensors")]
    for file, scale in zip(files, (1, 8), strict=True):
        save_file({"0.weight": first * scale, "2.weight": second / scale}, file)
    told: list[str] = []
    report = compare_checkpoints(
        torchflat.Task(model, nn.functional.mse_loss, (X, Y), name="absolute values"),
        *files,
        gradients=300,
        progress=lambda part, line, fraction: told.append(part),
    )
    assert set(told) == {"A", "B"}
    return report


def test_a_network_with_a_gradient_is_told_from_its_sharper_copy(found: ComparisonReport) -> None:
    said = found.content
    assert said["first"]["variation"]["level"] == pytest.approx(said["second"]["variation"]["level"], rel=1e-12)
    assert said["first"]["variation"]["gradient_norm"] > 0
    assert any(said["sampled"])
    # The slope in the direction of the first layer is eight times as large, that of the second an eighth.
    assert said["verdict_limit"] == "FLATTER"
    assert said["verdict"] in ("FLATTER", "UNDECIDED")


def test_the_schema_is_sound_and_refuses_what_is_no_comparison(found: ComparisonReport) -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(comparison_schema())
    for change, needle in (
        ({"verdict": "MAYBE"}, "verdict"),
        ({"schema_version": "2"}, "schema_version"),
        ({"differences": [float("nan")]}, "null"),
        ({"first": {**found.content["first"], "variation": {}}}, "first.variation"),
        ({"extra": 1}, "extra"),
    ):
        with pytest.raises(UsageError, match="comparison") as caught:
            ComparisonReport({**found.content, **change}).validate()
        assert needle in str(caught.value)


def test_the_figure_has_both_profiles_their_ratio_and_the_tolerance(found: ComparisonReport) -> None:
    figure = comparison(found.content)
    assert figure is not None
    above, below = figure.axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in above.get_lines()}
    first, second = (found.content[side]["variation"]["values"] for side in ("first", "second"))
    assert lines["A: largest change within r"] == first
    assert lines["B: largest change within r"] == second
    ratio = list(below.get_lines()[-1].get_ydata())
    assert ratio == pytest.approx([a / b for a, b in zip(first, second, strict=False)])
    assert below.get_xlim() == above.get_xlim()
    low, high = (patch.get_extents() for patch in below.patches[:1] * 2)
    assert low.height > 0 and high.width > 0


def test_a_profile_that_no_scale_can_show_is_not_drawn(found: ComparisonReport, tmp_path: Path) -> None:
    broken = copy.deepcopy(dict(found.content))
    broken["first"]["variation"].update(
        {key: [] for key in ("radii", "values", "slopes", "signs", "floor", "accuracy")}
    )
    broken.update(radii=[], differences=[], errors=[], sampled=[], radius=None, decided_by=None, verdict="UNDECIDED")
    assert comparison(broken) is None
    ComparisonReport(broken).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.html"}
    with pytest.raises(UsageError, match="--force"):
        found.save(tmp_path)
    found.save(tmp_path, force=True)
    assert (tmp_path / "profiles.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_names_are_escaped_and_fit_the_terminal(found: ComparisonReport) -> None:
    hostile = copy.deepcopy(dict(found.content))
    name = '"><script>alert(1)</script>' + "ＡＢＣ" * 40
    hostile["first"]["checkpoint"]["path"] = hostile["provenance"]["task"] = name
    hostile["cautions"] = [name]
    page = comparison_page(hostile, None)
    assert "<script" not in page and "alert(1)" in page
    lines = ComparisonReport(hostile).validate().text().splitlines()
    assert max(sum(2 if character in "ＡＢＣ" else 1 for character in line) for line in lines) <= 80


def test_words_name_the_points() -> None:
    assert [verdict_words(verdict.name) for verdict in Verdict] == [
        "A is flatter than B",
        "A is sharper than B",
        "A and B are equally flat, within the tolerance",
        "what was found does not decide",
    ]
    said = "the loss is 1 at the first point and 2 at the second"
    assert named(said) == "the loss is 1 at A and 2 at B"


def test_symmetry_compares_the_flattest_of_each_orbit(place: Path) -> None:
    # Both compute x ↦ x; without symmetry the second is sharper.
    files = ("flat.safetensors", "sharp.safetensors", "--task", "task.py:task")
    assert run("compare", *files, "--symmetry", "-o", "out") == 0
    found = content("out")
    assert found["verdict"] == "EQUIVALENT"
    assert any("A was rescaled" in note for note in found["provenance"]["notes"])
    assert found["second"]["parameter_norm"] == pytest.approx(2**0.5, rel=1e-2)
    assert run("compare", *files, "-o", "plain") == 0
    assert content("plain")["verdict"] == "FLATTER"
