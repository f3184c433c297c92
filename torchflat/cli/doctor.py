"""``torchflat doctor``: show what this installation has, what it lacks, and what to do about it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import torchflat
from torchflat import ops
from torchflat.cli.selftest import KERNELS, ROUNDING_UNITS, kernel_difference
from torchflat.data import mnist_folder, relu_network
from torchflat.objective import Objective

__all__ = ["Doctor"]

BROKEN = 5
LIBRARIES = ("numpy", "tyro", "tqdm", "safetensors", "jsonschema", "matplotlib", "torchvision")
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps . (in torchflat's source)"


class Problem(NamedTuple):
    """Something that is not as it should be, and its cure. ``essential`` if numbers cannot be trusted."""

    what: str
    cure: str
    essential: bool = False


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show versions, devices, kernels, libraries, data and speed, and name the cure of what is missing.

    Exits with 5 if something essential is broken: a native kernel that disagrees with its reference twin.
    """

    json: bool = False
    """Print the same as JSON, and nothing else."""

    def run(self) -> int:
        """Look at everything, print it, and return the exit code."""
        facts = _examine()
        problems = list(_diagnose(facts))
        usable = not any(problem.essential for problem in problems)
        if self.json:
            report = {**facts, "problems": [problem._asdict() for problem in problems], "usable": usable}
            print(json.dumps(report, indent=2))
        else:
            print("\n".join(_page(facts, problems)))
        return 0 if usable else BROKEN


# What there is -----------------------------------------------------------------------------------------------------


def _examine() -> dict[str, Any]:
    return {
        "versions": {
            "torchflat": torchflat.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "devices": list(_devices()),
        "kernels": _kernels(),
        "compilers": {"c++": _compiler(), "nvcc": _nvcc()},
        "libraries": {name: _version(name) for name in LIBRARIES},
        "mnist": _mnist(),
        "speed": _speed(),
    }


def _devices() -> Iterator[dict[str, Any]]:
    yield {
        "device": "cpu",
        "name": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield {"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory}


def _memory_bytes() -> int | None:
    """Return the memory of the machine, or None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _kernels() -> dict[str, Any]:
    described = ops.describe()
    for device in ("cpu", "cuda"):
        runs = described[device]["kernels"] == "native" and (device == "cpu" or torch.cuda.is_available())
        described[device]["differences"] = {name: _difference(name, device) for name in KERNELS} if runs else {}
    return described


def _difference(name: str, device: str) -> float | None:
    """Return how far the kernel is from its twin, or None if it raises or gives NaN."""
    try:
        difference = kernel_difference(name, device)
    except RuntimeError:
        return None
    return difference if math.isfinite(difference) else None


def _compiler() -> str | None:
    command = os.environ.get("CXX", "cl" if os.name == "nt" else "c++").split()[0]
    return shutil.which(command)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mnist() -> dict[str, Any]:
    folder, found = mnist_folder()
    return {"folder": str(folder), "found": found}


def _speed() -> dict[str, Any]:
    """Time a gradient and a product on a small network; of a few repetitions, the fastest."""
    depth, width, rows = 6, 128, 2048
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, data = relu_network(depth, width), (torch.randn(rows, width), torch.randn(rows, width))
        vector = torch.randn(depth * width * width)
    f = Objective(model, nn.functional.mse_loss, data)
    f.hvp(vector)
    elsewhere = iter([f.at(f.x) for _ in range(5)])
    gradient = _fastest(lambda: next(elsewhere).gradient())
    product = _fastest(lambda: f.hvp(vector))
    return {
        "network": f"{depth} x {width} ReLU, {rows} rows",
        "gradient_seconds": gradient,
        "product_gradients": product / gradient,
        "graphs": f.provenance()["products"],
    }


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# What is wrong with it ---------------------------------------------------------------------------------------------


def _diagnose(facts: Mapping[str, Any]) -> Iterator[Problem]:
    for device in ("cpu", "cuda"):
        yield from _diagnose_kernels(device, facts)
    for library, version in facts["libraries"].items():
        if version is None and library != "torchvision":
            yield Problem(f"{library} is not installed", f"pip install {library}")
    mnist = facts["mnist"]
    if not mnist["found"]:
        install = "" if facts["libraries"]["torchvision"] else "pip install torchvision and "
        yield Problem(
            f"full MNIST is not in {mnist['folder']} (the sample that ships with torchflat needs none)",
            f"set TORCHFLAT_DATA to a folder that holds MNIST/raw, or {install}let it be downloaded on first use",
        )


def _diagnose_kernels(device: str, facts: Mapping[str, Any]) -> Iterator[Problem]:
    kernels = facts["kernels"][device]
    for name, difference in kernels["differences"].items():
        if difference is None or difference > ROUNDING_UNITS:
            how = "fails" if difference is None else f"is {difference:.3g} units of rounding off its twin"
            yield Problem(
                f"the native {device} kernel {name} {how}",
                f"set TORCHFLAT_OPS=reference until the kernels are built anew: {REINSTALL}",
                essential=True,
            )
    used = device == "cpu" or any(entry["device"].startswith("cuda") for entry in facts["devices"])
    if kernels["kernels"] == "reference" and used:
        yield Problem(
            f"{device} runs on the reference twins, which are slower: {kernels['reason']}",
            _cure_of_missing(device, kernels["reason"], facts["compilers"]),
        )


def _cure_of_missing(device: str, reason: str, compilers: Mapping[str, str | None]) -> str:
    if "TORCHFLAT_OPS" in reason:
        return "unset TORCHFLAT_OPS"
    if compilers["c++"] is None:
        return f"install a C++ compiler such as g++, then {REINSTALL}"
    if device == "cuda" and compilers["nvcc"] is None:
        return f"install the CUDA toolkit or set CUDA_HOME, then {REINSTALL}"
    return REINSTALL


# How it is shown ---------------------------------------------------------------------------------------------------


def _page(facts: Mapping[str, Any], problems: list[Problem]) -> Iterator[str]:
    yield from _section("versions", {name: version or "none" for name, version in facts["versions"].items()})
    devices = {entry["device"]: _device_line(entry) for entry in facts["devices"]}
    yield from _section("devices", devices if len(devices) > 1 else devices | {"cuda": "no device"})
    kernels = {device: _kernel_line(facts["kernels"][device]) for device in ("cpu", "cuda")}
    compilers = {name: path or "not found" for name, path in facts["compilers"].items()}
    yield from _section("kernels", kernels | compilers)
    yield from _section("libraries", {name: version or "not installed" for name, version in facts["libraries"].items()})
    mnist, speed = facts["mnist"], facts["speed"]
    yield from _section("data", {"MNIST": mnist["folder"] if mnist["found"] else f"not in {mnist['folder']}"})
    yield from _section(
        "speed",
        {
            "gradient": f"{1e3 * speed['gradient_seconds']:.2f} ms ({speed['network']})",
            "product": f"{speed['product_gradients']:.1f} gradients ({speed['graphs']} graph)",
        },
    )
    yield "nothing is wrong" if not problems else f"{len(problems)} to look at"
    for problem in problems:
        yield from textwrap.wrap(f"{'✗' if problem.essential else '-'} {problem.what}", 80, subsequent_indent="  ")
        yield from textwrap.wrap(
            f"cure: {problem.cure}", 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )


def _section(title: str, lines: Mapping[str, str]) -> Iterator[str]:
    yield title
    for name, line in lines.items():
        yield f"  {name:12} {line}"
    yield ""


def _device_line(entry: Mapping[str, Any]) -> str:
    parts = [entry["name"]]
    if "threads" in entry:
        parts.append(f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}")
    if entry["memory_bytes"] is not None:
        parts.append(f"{entry['memory_bytes'] / 2**30:.1f} GiB")
    return ", ".join(parts)


def _kernel_line(kernels: Mapping[str, Any]) -> str:
    if kernels["kernels"] == "reference":
        return f"reference twins: {kernels['reason']}"
    if not kernels["differences"]:
        return f"native, {Path(kernels['library']).name}, not tried: no such device here"
    differences = kernels["differences"].values()
    if None in differences:
        return f"native, {Path(kernels['library']).name}, failing: see below"
    return f"native, {Path(kernels['library']).name}, within {max(differences):.3g} units of rounding of their twins"
