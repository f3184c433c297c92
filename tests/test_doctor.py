"""The doctor shows what is there, names the cure of what is not, and exits with 5 only where numbers are at stake."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchflat
from torchflat import ops
from torchflat.cli import doctor
from torchflat.cli.doctor import Doctor
from torchflat.ops import reference


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise AssertionError("the doctor must not download anything")

    # By name, torchflat.data.mnist is the function.
    monkeypatch.setattr(sys.modules["torchflat.data.mnist"], "_download", refuse)


def report(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert Doctor(json=True).run() == code
    return json.loads(capsys.readouterr().out)


def problems(found: dict[str, Any]) -> dict[str, str]:
    return {problem["what"]: problem["cure"] for problem in found["problems"]}


def cure(found: dict[str, Any], word: str) -> str:
    """The cure of the one problem that has this word."""
    (only,) = (cure for what, cure in problems(found).items() if word in what)
    return only


def lay_down_mnist(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte.gz").touch()


def described(**cpu: Any) -> dict[str, Any]:
    absent = {"kernels": "reference", "library": None, "reason": "no nvcc: install the CUDA toolkit, or set CUDA_HOME"}
    return {"cpu": {**absent, **cpu}, "cuda": absent, "abi_target": None, "built_with_torch": None}


def test_it_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert found["versions"]["torchflat"] == torchflat.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["threads"] == torch.get_num_threads()
    assert found["libraries"]["tqdm"] == importlib.metadata.version("tqdm")
    assert found["kernels"]["cpu"]["kernels"] == ops.backend("cpu")
    assert (found["kernels"]["cpu"]["reason"] is None) == (ops.backend("cpu") == "native")
    assert found["speed"]["gradient_seconds"] > 0
    assert found["speed"]["product_gradients"] > 0
    assert found["speed"]["graphs"] == "retained"
    assert found["usable"] is True


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the system does not tell its memory")
def test_memory_is_of_a_plausible_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert 2**28 < report(capsys)["devices"][0]["memory_bytes"] < 2**50


def test_the_page_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert Doctor().run() == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for part in ("versions", "libraries"):
        for name, version in found[part].items():
            assert f"{name:12} {version}" in captured.out
    flat = " ".join(captured.out.split())
    for what, remedy in problems(found).items():
        assert " ".join(what.split()) in flat
        assert f"cure: {remedy}" in flat


def test_nothing_is_wrong_where_all_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lay_down_mnist(tmp_path)
    monkeypatch.setenv("TORCHFLAT_DATA", str(tmp_path))
    monkeypatch.setattr(ops, "describe", lambda: described(kernels="native", library="_cpu.so", reason=None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert report(capsys)["problems"] == []
    Doctor().run()
    assert "nothing is wrong" in capsys.readouterr().out


def test_mnist_is_found_or_the_cure_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHFLAT_DATA", str(tmp_path))
    assert "TORCHFLAT_DATA" in cure(report(capsys), str(tmp_path))
    lay_down_mnist(tmp_path)
    found = report(capsys)
    assert found["mnist"] == {"folder": str(tmp_path), "found": True}
    assert not any("MNIST" in what for what in problems(found))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert report(capsys)["mnist"]["found"] is False


def test_a_missing_library_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def version(name: str) -> str:
        if name in ("matplotlib", "torchvision"):
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("TORCHFLAT_DATA", str(tmp_path))
    found = report(capsys)
    assert found["libraries"]["matplotlib"] is None
    assert cure(found, "matplotlib") == "pip install matplotlib"
    # torchvision only downloads: it is asked for where there is something to download.
    assert "pip install torchvision" in cure(found, "MNIST")
    assert len([what for what in problems(found) if "torchvision is not" in what]) == 0


@pytest.mark.parametrize(
    ("reason", "path", "remedy"),
    [
        ("TORCHFLAT_OPS=reference", None, "unset TORCHFLAT_OPS"),
        ("no C++ compiler: 'c++' was not found", "", "install a C++ compiler"),
        ("not built: run `pip install`", None, "pip install --no-build-isolation"),
    ],
)
def test_why_the_twins_run_and_the_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str, path: str | None, remedy: str
) -> None:
    monkeypatch.setattr(ops, "describe", lambda: described(reason=reason))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "_compiler", lambda: None if path == "" else "/bin/c++")
    found = report(capsys)
    assert cure(found, reason).startswith(remedy)
    assert not any(what.startswith("cuda") for what in problems(found)), "no device, so nothing is missing"


def test_a_compiler_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "some-compiler -std=c++20")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert doctor._compiler() is None and doctor._nvcc() is None
    for name in ("some-compiler", "nvcc"):
        (tmp_path / name).touch(mode=0o755)
    assert doctor._compiler() == str(tmp_path / "some-compiler")
    assert doctor._nvcc() == str(tmp_path / "nvcc")


def test_kernels_that_disagree_are_essential(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = reference.dot
    monkeypatch.setattr(reference, "dot", lambda a, b: twin(a, b) * (1 + 1e-9))
    monkeypatch.setattr(ops, "describe", lambda: described(kernels="native", library="_cpu.so", reason=None))
    found = report(capsys, code=5)
    assert found["usable"] is False
    assert found["kernels"]["cpu"]["differences"]["dot"] > 1e6
    assert "TORCHFLAT_OPS=reference" in cure(found, "cpu kernel dot")
    assert [problem["essential"] for problem in found["problems"] if "kernel" in problem["what"]] == [True]
    assert Doctor().run() == 5
    assert "✗ the native cpu kernel dot" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [float("nan"), RuntimeError("no such symbol")])
def test_kernels_that_fail_are_essential(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: float | Exception
) -> None:
    def broken(a: object, b: object) -> torch.Tensor:
        if isinstance(answer, Exception):
            raise answer
        return torch.tensor(answer, dtype=torch.float64)

    monkeypatch.setattr(reference, "dot", broken)
    monkeypatch.setattr(ops, "describe", lambda: described(kernels="native", library="_cpu.so", reason=None))
    found = report(capsys, code=5)
    assert found["kernels"]["cpu"]["differences"]["dot"] is None
    assert any("dot fails" in what for what in problems(found))
    assert Doctor().run() == 5
    assert "failing: see below" in capsys.readouterr().out


def test_random_state_of_the_process_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    report(capsys)
    assert torch.equal(torch.get_rng_state(), state)


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "torchflat", "doctor", "--json"]
    environment = {**os.environ, "TORCHFLAT_OPS": "reference"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
    assert done.returncode == 0
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["kernels"]["cpu"]["reason"] == "TORCHFLAT_OPS=reference"
    assert cure(found, "cpu runs on the reference twins") == "unset TORCHFLAT_OPS"
