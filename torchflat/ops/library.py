"""The ``torchflat`` operator library: a schema per kernel, its twin everywhere, the compiled kernel where it is built.

The dispatcher chooses: the twins are registered for every backend, and the compiled libraries register themselves for
CPU and CUDA on top of that. What runs on a device is therefore asked of the dispatcher, never remembered here.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchflat.errors import UsageError
from torchflat.ops import reference

__all__ = ["backend", "describe"]

# Of both devices: line_squares is compiled for the CPU only, as its twin is bound by memory on CUDA already.
_KERNELS = ("orthogonalize_", "dot", "norms", "axpy_", "axpby_", "normalized_axpby_")
_PACKAGE = Path(__file__).resolve().parent
_BUILD_RECORD = _PACKAGE / "_build.json"


def backend(device: torch.device | str = "cpu") -> str:
    """Say which kernels run on ``device``: ``"native"`` or ``"reference"``.

    >>> import torch, torchflat.ops
    >>> torchflat.ops.backend(torch.device("meta"))
    'reference'
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(torch.device(device).type)
    native = key is not None and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"torchflat::{name}", key) for name in _KERNELS
    )
    return "native" if native else "reference"


def describe() -> dict[str, Any]:
    """Say what is compiled, where it lies, what it was built against, and why not if it is not.

    Keys ``cpu`` and ``cuda`` hold ``kernels`` (``"native"`` or ``"reference"``), ``library`` (path or None) and
    ``reason`` (None if native); ``abi_target`` is the oldest torch that the binary loads under.
    """
    build = _build_record()
    return {
        device: {"kernels": backend(device), "library": _loaded.get(device), "reason": _reasons.get(device)}
        for device in ("cpu", "cuda")
    } | {"abi_target": build.get("abi_target"), "built_with_torch": build.get("torch")}


def _build_record() -> dict[str, Any]:
    if not _BUILD_RECORD.exists():
        reason = "not built: run `pip install --no-build-isolation -e .`"
        return {"cpu_reason": reason, "cuda_reason": reason}
    record: dict[str, Any] = json.loads(_BUILD_RECORD.read_text())
    return record


def _load(device: str) -> str:
    """Load the compiled library of one device; return its path. Raise OSError with the reason if that cannot be."""
    if _requested() == "reference":
        raise OSError("TORCHFLAT_OPS=reference")
    record = _build_record()
    reason = record[f"{device}_reason"]
    if reason:
        raise OSError(reason)
    if device == "cuda" and _major(record["cuda"]) != _major(torch.version.cuda):
        raise OSError(f"built for CUDA {record['cuda']}, and this torch has {torch.version.cuda}: reinstall torchflat")
    path = _PACKAGE / f"_{device}{'.pyd' if os.name == 'nt' else '.so'}"
    torch.ops.load_library(path)
    return str(path)


def _major(version: str | None) -> str:
    return (version or "none").partition(".")[0]


def _requested() -> str:
    choice = os.environ.get("TORCHFLAT_OPS", "auto")
    if choice not in ("auto", "reference"):
        raise UsageError(f"TORCHFLAT_OPS is {choice!r}: set it to 'reference' or 'auto', or unset it")
    return choice


def _fake_orthogonalize(basis: Tensor, vector: Tensor) -> Tensor:
    reference.check_orthogonalize(basis, vector)
    return vector.new_empty(basis.shape[0] + 1)


def _fake_dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    reference.check_lists(a, b, "dot")
    return a[0].new_empty((), dtype=torch.float64)


def _fake_norms(a: list[Tensor]) -> Tensor:
    reference.check_list(a, "norms")
    return a[0].new_empty(len(a), dtype=torch.float64)


def _fake_line_squares(a: list[Tensor]) -> Tensor:
    reference.check_lines(a)
    return a[0].new_empty(sum(x.shape[0] + x.shape[1] for x in a), dtype=torch.float64)


def _fake_axpy(y: list[Tensor], x: list[Tensor], alpha: float) -> None:
    reference.check_lists(y, x, "axpy_")


def _fake_axpby(y: list[Tensor], x: list[Tensor], alpha: Tensor, beta: Tensor) -> None:
    reference.check_axpby(y, x, alpha, beta, len(y), "axpby_")


def _fake_normalized_axpby(y: list[Tensor], x: list[Tensor], alpha: Tensor, beta: Tensor) -> Tensor:
    reference.check_axpby(y, x, alpha, beta, 1, "normalized_axpby_")
    return alpha.new_empty(())


_library = torch.library.Library("torchflat", "DEF")


def _define(schema: str, twin: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, twin, "CompositeExplicitAutograd")
    # The public functions refuse tensors that autograd would have to follow; below them there is nothing to record.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"torchflat::{name}", fake, lib=_library)


_define("orthogonalize_(Tensor basis, Tensor(a!) vector) -> Tensor", reference.orthogonalize_, _fake_orthogonalize)
_define("dot(Tensor[] a, Tensor[] b) -> Tensor", reference.dot, _fake_dot)
_define("norms(Tensor[] a) -> Tensor", reference.norms, _fake_norms)
_define("line_squares(Tensor[] a) -> Tensor", reference.line_squares, _fake_line_squares)
_define("axpy_(Tensor(a!)[] y, Tensor[] x, float alpha) -> ()", reference.axpy_, _fake_axpy)
_define("axpby_(Tensor(a!)[] y, Tensor[] x, Tensor alpha, Tensor beta) -> ()", reference.axpby_, _fake_axpby)
_define(
    "normalized_axpby_(Tensor(a!)[] y, Tensor[] x, Tensor alpha, Tensor beta) -> Tensor",
    reference.normalized_axpby_,
    _fake_normalized_axpby,
)


def _compiled_step() -> Callable[[list[Tensor], float, float], float | None] | None:
    """Return the step that parameters are handed to without the dispatcher, if it is compiled and torch allows it."""
    try:
        return importlib.import_module("torchflat.ops._cpu").normalized_step  # type: ignore[no-any-return]
    except ImportError:  # a torch that does not show its tensors to C
        return None


_loaded: dict[str, str] = {}
_reasons: dict[str, str] = {}
for _device in ("cpu", "cuda"):
    try:
        _loaded[_device] = _load(_device)
    except OSError as error:
        _reasons[_device] = str(error)

compiled_step = _compiled_step() if "cpu" in _loaded else None
