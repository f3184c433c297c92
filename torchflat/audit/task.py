"""Tasks: the model, loss and data that an audit needs, and how they are found by their address."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import math
import os
import sys
import sysconfig
import traceback
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from torchflat.errors import TorchflatError, UsageError, did_you_mean

__all__ = ["BUILTIN", "Task", "load_task"]

BUILTIN: dict[str, str] = {
    "digits": "torchflat.audit.builtin:digits",
    "mnist-classifier": "torchflat.audit.builtin:mnist_classifier",
    "mnist-denoiser": "torchflat.audit.builtin:mnist_denoiser",
}

_SKELETON = """\
    def task():
        loader = torch.utils.data.DataLoader(dataset, batch_size=500)
        return torchflat.Task(model, torch.nn.functional.cross_entropy, loader)"""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is audited: ``Objective(model, loss, data, params=..., batch_loss=..., weight_decay=...)``, still unbuilt.

    Args:
        model: an ``nn.Module``, or a function without arguments that returns one.
        loss: ``loss(output, target)`` giving the mean over the batch as a scalar; None with ``batch_loss``.
        data: a ``DataLoader``, a ``Dataset``, a pair of tensors ``(X, Y)``, an iterable of batches that can be iterated
            again, or a function without arguments that returns one of these.
        batch_loss: ``batch_loss(model, batch)`` giving ``(sum of the losses, weight)``.
        params: names or patterns of the parameters to audit; by default those that require grad.
        weight_decay: adds (weight_decay / 2) |x|^2 to the objective.
        name, description: for the report.
        example_input: what the model is called with, for its conservation laws: a tensor, a tuple, or a dict of
            keywords; by default from the first batch of the data.

    Raises:
        UsageError: a field is not what it must be.

    >>> import torch
    >>> X, Y = torch.randn(8, 3), torch.randn(8, 2)
    >>> task = Task(lambda: nn.Linear(3, 2), nn.functional.mse_loss, (X, Y), name="line", weight_decay=1e-4)
    >>> task.make_model()
    Linear(in_features=3, out_features=2, bias=True)
    >>> Task(nn.Linear(3, 2), nn.CrossEntropyLoss, (X, Y))
    Traceback (most recent call last):
        ...
    torchflat.errors.UsageError: Task.loss is the class CrossEntropyLoss, not a loss: write CrossEntropyLoss()
    """

    model: nn.Module | Callable[[], nn.Module] = dataclasses.field(repr=False)
    loss: Callable[[Any, Any], Tensor] | None
    data: Any = dataclasses.field(repr=False)
    batch_loss: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None
    params: str | Sequence[str] | None = None
    weight_decay: float = 0.0
    name: str = ""
    description: str = ""
    example_input: Any = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            _require_function("model", "an nn.Module", self.model)
        _check_losses(self.loss, self.batch_loss)
        _check_data(self.data)
        if isinstance(self.params, Sequence) and not all(isinstance(name, str) and name for name in self.params):
            raise UsageError(f"Task.params must be names or patterns of parameters, got {self.params!r}")
        if not (self.params is None or (isinstance(self.params, Sequence) and self.params)):
            raise UsageError(f"Task.params must be None, a name, or a list of names or patterns, got {self.params!r}")
        decay = self.weight_decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
            raise UsageError(f"Task.weight_decay must be a finite number that is not negative, got {decay!r}")
        for field in ("name", "description"):
            if not isinstance(getattr(self, field), str):
                raise UsageError(f"Task.{field} must be a string, got {type(getattr(self, field)).__name__}")

    def make_model(self) -> nn.Module:
        """Return the model, built if ``model`` is a function.

        Raises:
            UsageError: the function raises, or returns something else than an ``nn.Module``.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        with _users_code("the model function of the task"):
            model = self.model()
        if not isinstance(model, nn.Module):
            raise UsageError(f"the model function of the task returned {_article(model)}, not an nn.Module")
        return model

    def make_data(self) -> Any:
        """Return the data, built if ``data`` is a function.

        Raises:
            UsageError: the function raises, or returns something that is no data.
        """
        if not _is_function(self.data):
            return self.data
        with _users_code("the data function of the task"):
            data = self.data()
        if _is_function(data):
            raise UsageError(f"the data function of the task returned another function, {_name(data)}")
        _check_data(data)
        return data


def load_task(address: str, options: Mapping[str, Any] | None = None) -> Task:
    """Import the function at ``address``, call it with ``options`` as keyword arguments, and return its task.

    ``address`` is ``package.module:function``, ``path/to/file.py:function``, or a name in :data:`BUILTIN`. For a file
    the function may be left out if it is called ``task``, is the only one annotated to return a ``Task``, or is the
    only public one. An option given as a string becomes a number where the function's default is one. This runs the
    user's code; while it runs, the folder of the file (for a module: the current folder) leads ``sys.path``.

    Raises:
        UsageError: the address, the file, the function, its options or its result is wrong, or the code raises; the
            message then gives the line. Errors of torchflat pass through unchanged.

    >>> load_task("digitz")
    Traceback (most recent call last):
        ...
    torchflat.errors.UsageError: unknown task 'digitz'; did you mean 'digits'? A task is package.module:function, \
file.py:function, or one of digits, mnist-classifier, mnist-denoiser
    """
    place, function_name = _parse(BUILTIN.get(address, address))
    file = Path(place).expanduser() if place.endswith(".py") else None
    with _leading_path(file.resolve().parent if file else Path.cwd()):
        module = _import_file(file) if file else _import_module(place)
        function = _find_function(module, function_name, place)
        where = f"{place}:{_name(function)}"
        keywords = _keywords(function, options or {}, where)
        with _users_code(f"the task {where}"):
            task = function(**keywords)
    if not isinstance(task, Task):
        raise UsageError(
            f"{where} returned {_article(task)}, not a torchflat.Task. A task looks like this:\n{_SKELETON}"
        )
    return task


# --- fields of a task -------------------------------------------------------------------------------------------------


def _check_losses(loss: object, batch_loss: object) -> None:
    if (loss is None) == (batch_loss is None):
        given = "both are" if loss is not None else "neither is"
        raise UsageError(f"Task needs either loss(output, target) or batch_loss(model, batch): {given} given")
    for field, value in (("loss", loss), ("batch_loss", batch_loss)):
        if inspect.isclass(value):
            raise UsageError(f"Task.{field} is the class {value.__name__}, not a loss: write {value.__name__}()")
        if value is not None and not callable(value):
            raise UsageError(f"Task.{field} must be a function, got {_article(value)}")


def _check_data(data: object) -> None:
    if isinstance(data, Tensor | str | bytes | Mapping | nn.Module) or data is None:
        raise UsageError(
            f"Task.data must be a DataLoader, a Dataset, (X, Y) tensors, a list of batches or a function that returns "
            f"one of these, got {_article(data)}"
        )
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        rows = [len(part) if part.ndim else 0 for part in data]
        if rows[0] != rows[1]:
            raise UsageError(f"Task.data is a pair of tensors with {rows[0]} and {rows[1]} rows: they must agree")
    elif isinstance(data, Iterator):
        raise UsageError(
            f"Task.data is {_article(data)}, which can be gone through only once: give a list, or the function itself"
        )
    elif not isinstance(data, Iterable | Dataset):
        _require_function("data", "a DataLoader, a Dataset, (X, Y) tensors or a list of batches", data)


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, Iterable | Dataset)


def _require_function(field: str, instead: str, value: object) -> None:
    """Check that ``value`` can be called without arguments."""
    if not callable(value):
        raise UsageError(f"Task.{field} must be {instead} or a function that returns it, got {_article(value)}")
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # some builtins have none: the call itself will tell
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise UsageError(
            f"Task.{field} is the function {_name(value)}, which needs arguments ({', '.join(needed)}): "
            f"pass {instead} or wrap it in 'lambda: ...'"
        )


def _name(value: object) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _article(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


# --- from an address to a function ------------------------------------------------------------------------------------


def _parse(address: str) -> tuple[str, str]:
    """``(file or module, function)``; the function is empty where it was left out."""
    if address.endswith(".py"):
        return address, ""
    place, colon, function = address.rpartition(":")
    kinds = f"A task is package.module:function, file.py:function, or one of {', '.join(sorted(BUILTIN))}"
    if not colon:
        hint = did_you_mean(address, BUILTIN) or "."
        raise UsageError(f"unknown task {address!r}{hint} {kinds}")
    is_module = all(part.isidentifier() for part in place.split("."))
    if not function.isidentifier() or not (place.endswith(".py") or is_module):
        raise UsageError(f"malformed task {address!r}. {kinds}")
    return place, function


@contextlib.contextmanager
def _leading_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it away itself
            sys.path.remove(entry)


def _import_file(file: Path) -> types.ModuleType:
    """Run ``file`` as a module of its own name. Its bytecode is not cached: nothing is written beside the file."""
    folder = file.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"no task file {file}: there is no folder {folder}")
    if not file.is_file():
        raise UsageError(f"no task file {file.name} in {folder}{did_you_mean(file.name, os.listdir(folder))}")
    path = str(file.resolve())
    name = f"torchflat_task_{file.stem}_{zlib.crc32(path.encode()):08x}"
    module = types.ModuleType(name)
    module.__file__ = path
    with _users_code(f"the task file {file}"):
        code = compile(file.read_bytes(), path, "exec", dont_inherit=True)
        sys.modules[name] = module  # dataclasses and workers of a DataLoader look their module up
        try:
            exec(code, module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _import_module(name: str) -> types.ModuleType:
    importlib.invalidate_caches()
    try:
        with _users_code(f"the module {name}"):
            return importlib.import_module(name)
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise UsageError(
                f"no module {cause.name!r} for the task (searched {Path.cwd()} and the installed packages): "
                "install it, or give the path of a file.py"
            ) from cause
        raise


def _find_function(module: types.ModuleType, name: str, place: str) -> Callable[..., Any]:
    functions = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    listed = f"it has {', '.join(functions)}" if functions else "it has none"
    if not name:
        annotated = [key for key, value in functions.items() if _returns_task(value)]
        for candidates in (["task"] if "task" in functions else [], annotated, list(functions)):
            if len(candidates) == 1:
                return functions[candidates[0]]
        raise UsageError(f"which function of {place} makes the task? {listed}: write {place}:NAME")
    if not hasattr(module, name):
        raise UsageError(f"{place} has no function {name!r}{did_you_mean(name, functions)} ({listed})")
    function = getattr(module, name)
    if not callable(function):
        raise UsageError(f"{name!r} in {place} is {_article(function)}, not a function that returns a torchflat.Task")
    return function  # type: ignore[no-any-return]


def _returns_task(function: Callable[..., Any]) -> bool:
    annotation = function.__annotations__.get("return")
    return annotation is Task or (isinstance(annotation, str) and annotation.rpartition(".")[2].strip("'\"") == "Task")


def _keywords(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``options`` as keyword arguments of ``function``: checked, and numbers made of strings where it has numbers."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none: the call itself will tell
        return dict(options)
    parameters = signature.parameters
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(map(str, parameters.values())) or "no options"
        raise UsageError(f"{where}: {error}; it takes {takes}") from error
    return {
        name: _like(parameters[name].default, value, f"{where}: option {name}") if name in parameters else value
        for name, value in options.items()
    }


def _like(default: object, value: Any, what: str) -> Any:
    """``value`` in the type of ``default``, if it is a string and that a bool, int or float."""
    if not isinstance(value, str) or type(default) not in (bool, int, float):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value)  # type: ignore[call-arg]
    except (KeyError, ValueError) as error:
        kind = "true or false" if isinstance(default, bool) else _article(default)
        raise UsageError(f"{what} must be {kind}, got {value!r}") from error


# --- what the user's code raises --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that names the place in it."""
    try:
        yield
    except TorchflatError:
        raise
    except SyntaxError as error:
        text = f": {error.text.strip()!r}" if error.text else ""
        where = f"{error.filename}:{error.lineno}" if error.lineno else what
        raise UsageError(f"{where}: syntax error, {error.msg}{text}") from error
    except SystemExit as error:
        raise UsageError(f"{_place(error)}: {what} ended the program (exit code {error.code})") from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"{_place(error)}: {what} failed with {type(error).__name__}: {text}") from error


def _place(error: BaseException) -> str:
    """``file:line`` of the innermost frame that is the user's own: neither of this file, nor of a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _is_library(filename: str) -> bool:
    parts = Path(filename).parts
    if filename == __file__ or filename.startswith("<") or "site-packages" in parts or "dist-packages" in parts:
        return True
    return filename.startswith(sysconfig.get_path("stdlib") + os.sep)
