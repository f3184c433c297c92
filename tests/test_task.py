"""Tasks: what their fields may be, how an address is found, and whose fault an error is."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchflat.audit.task import BUILTIN, Task, load_task
from torchflat.errors import DataError, UsageError

X, Y = torch.zeros(6, 3), torch.zeros(6, 2)

GOOD = """
    import torch
    from torchflat.audit.task import Task

    def task(width="2", name="mine"):
        data = (torch.zeros(4, 3), torch.zeros(4, int(width)))
        return Task(torch.nn.Linear(3, int(width)), torch.nn.functional.mse_loss, data, name=name)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file into the current folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(source: str, name: str = "my_task.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def _imports_are_undone(tmp_path: Path) -> Iterator[None]:
    """Every test also checks that sys.path is left as it was."""
    path = list(sys.path)
    yield
    assert sys.path == path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def message(address: str, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_task(address, options)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- fields -----------------------------------------------------------------------------------------------------------


class Rows(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(X)


GOOD_DATA = {
    "tensors": (X, Y),
    "list of two tensors": [X, Y],
    "dataset": TensorDataset(X, Y),
    "iterable dataset": Rows(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=2),
    "batches": [(X, Y), (X, Y)],
    "function": lambda: (X, Y),
}


@pytest.mark.parametrize("data", GOOD_DATA.values(), ids=GOOD_DATA)
def test_data_of_every_kind_is_passed_on_as_it_is(data: Any) -> None:
    task = Task(nn.Linear(3, 2), mse_loss, data)
    made = task.make_data()
    if data is GOOD_DATA["function"]:
        assert made == (X, Y)
    else:
        assert made is data


def test_model_is_given_or_made() -> None:
    model = nn.Linear(3, 2)
    assert Task(model, mse_loss, (X, Y)).make_model() is model
    made = Task(lambda width=5: nn.Linear(3, width), mse_loss, (X, Y))
    assert made.make_model().weight.shape == (5, 3)  # type: ignore[union-attr]
    assert made.make_model() is not made.make_model()
    assert isinstance(Task(nn.Identity, mse_loss, (X, Y)).make_model(), nn.Identity)


def test_defaults_and_loss_per_batch() -> None:
    task = Task(nn.Linear(3, 2), None, (X, Y), batch_loss=lambda model, batch: (model(batch[0]).sum(), 1))
    assert task.loss is None and task.params is None and task.weight_decay == 0.0
    assert task.name == task.description == "" and task.example_input is None
    with pytest.raises(AttributeError):
        task.name = "other"  # type: ignore[misc]
    assert "Linear" not in repr(task) and "tensor" not in repr(task)  # of any size


NO_BATCHES: Any = iter([(X, Y)])
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnet"}, "Task.model must be an nn.Module or a function that returns it, got a str"),
    ({"model": None}, "Task.model must be an nn.Module or a function that returns it, got None"),
    ({"model": nn.Linear}, "Task.model is the function Linear, which needs arguments (in_features, out_features)"),
    ({"loss": None}, "Task needs either loss(output, target) or batch_loss(model, batch): neither is given"),
    ({"batch_loss": mse_loss}, "both are given"),
    ({"loss": nn.MSELoss}, "Task.loss is the class MSELoss, not a loss: write MSELoss()"),
    ({"loss": "mse"}, "Task.loss must be a function, got a str"),
    ({"data": None}, "got None"),
    ({"data": X}, "got a Tensor"),
    ({"data": "data/mnist"}, "got a str"),
    ({"data": {"x": X}}, "got a dict"),
    ({"data": 3}, "got an int"),
    ({"data": (X, Y[:4])}, "a pair of tensors with 6 and 4 rows"),
    ({"data": (X, torch.tensor(1.0))}, "a pair of tensors with 6 and 0 rows"),
    ({"data": NO_BATCHES}, "can be gone through only once"),
    ({"data": ((x, x) for x in X)}, "Task.data is a generator, which can be gone through only once"),
    ({"data": lambda split: (X, Y)}, "Task.data is the function <lambda>, which needs arguments (split)"),
    ({"params": 3}, "Task.params must be"),
    ({"params": ()}, "Task.params must be"),
    ({"params": ["weight", 3]}, "Task.params must be"),
    ({"params": ""}, "Task.params must be"),
    ({"weight_decay": -0.1}, "Task.weight_decay must be a finite number that is not negative, got -0.1"),
    ({"weight_decay": float("nan")}, "got nan"),
    ({"weight_decay": "0.1"}, "got '0.1'"),
    ({"weight_decay": True}, "got True"),
    ({"name": 3}, "Task.name must be a string, got int"),
    ({"description": None}, "Task.description must be a string, got NoneType"),
]


@pytest.mark.parametrize(("fields", "text"), WRONG, ids=[text for _, text in WRONG])
def test_wrong_fields_are_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        Task(**{"model": nn.Linear(3, 2), "loss": mse_loss, "data": (X, Y), **fields})


def broken() -> Any:
    raise RuntimeError("no such\nwidth")


def test_functions_of_a_task_that_fail_or_return_something_else() -> None:
    line = broken.__code__.co_firstlineno + 1
    task = Task(broken, mse_loss, broken)
    for make in (task.make_model, task.make_data):
        with pytest.raises(
            UsageError, match=rf"test_task\.py:{line}: .* failed with RuntimeError: no such width$"
        ) as e:
            make()
        assert isinstance(e.value.__cause__, RuntimeError)
    with pytest.raises(UsageError, match=r"model function of the task returned a dict, not an nn\.Module"):
        Task(dict, mse_loss, (X, Y)).make_model()
    with pytest.raises(UsageError, match="got None"):
        Task(nn.Identity, mse_loss, lambda: None).make_data()
    with pytest.raises(UsageError, match="returned another function, broken"):
        Task(nn.Identity, mse_loss, lambda: broken).make_data()


# --- addresses --------------------------------------------------------------------------------------------------------


def test_file_by_name_by_path_and_with_options(write: Callable[..., Path]) -> None:
    path = write(GOOD, "sub/my_task.py")
    os.chdir(path.parent)
    for address in ("my_task.py:task", "./my_task.py:task", f"{path}:task", "my_task.py", str(path)):
        assert load_task(address).name == "mine"
    task = load_task("my_task.py:task", {"width": "5", "name": "wide"})
    assert task.name == "wide" and task.make_model().weight.shape == (5, 3)  # type: ignore[union-attr]


def test_nothing_is_written_beside_the_file_and_changes_are_seen(write: Callable[..., Path]) -> None:
    path = write(GOOD)
    assert load_task("my_task.py").name == "mine"
    write(GOOD.replace("mine", "ours"))  # of the same length, within the same second
    assert load_task("my_task.py").name == "ours"
    assert list(path.parent.iterdir()) == [path]


def test_file_is_compiled_by_its_own_rules(write: Callable[..., Path]) -> None:
    source = "from torchflat.audit.task import Task\ndef f(x: int): ...\n"
    write(source + "def task():\n    return Task(object, print, [1], name=repr(f.__annotations__['x']))\n")
    assert load_task("my_task.py").name == "<class 'int'>"  # and not 'int', as under this package's own future import


def test_files_of_one_name_are_two_modules(write: Callable[..., Path]) -> None:
    kept = "\nimport dataclasses\n@dataclasses.dataclass\nclass Config:\n    width: int = 2\n"
    write(GOOD + textwrap.indent(kept, "    "), "a/my_task.py")
    write(GOOD.replace("mine", "other"), "b/my_task.py")
    first, second = load_task("a/my_task.py"), load_task("b/my_task.py")
    assert (first.name, second.name) == ("mine", "other")


def test_file_may_import_its_neighbours_even_late(write: Callable[..., Path]) -> None:
    write("NAME = 'from next door'", "sub/neighbour_one.py")
    write("NAME = 'late'", "sub/neighbour_two.py")
    late = "def task():\n    from neighbour_two import NAME as late\n    return made(name=neighbour_one.NAME + late)"
    source = textwrap.dedent(GOOD).replace("def task", "def made")
    write(f"import neighbour_one\n{source}\n{late}", "sub/my_task.py")
    assert load_task("sub/my_task.py").name == "from next doorlate"


def test_module_in_the_current_folder(write: Callable[..., Path]) -> None:
    write("", "some_package/__init__.py")
    write(GOOD, "some_package/tasks.py")
    assert load_task("some_package.tasks:task", {"name": "x"}).name == "x"


def test_builtin_names_are_addresses(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(BUILTIN) == {"digits", "mnist-denoiser", "mnist-classifier"}
    write(GOOD)
    monkeypatch.setitem(BUILTIN, "digits", "my_task.py:task")
    assert load_task("digits", {"name": "shipped"}).name == "shipped"


def test_function_may_be_left_out_where_it_is_clear(write: Callable[..., Path]) -> None:
    good = textwrap.dedent(GOOD)
    write(good + "def helper(): ...\n")
    assert load_task("my_task.py").name == "mine"
    write(good.replace("def task(", "def only(") + "def _private(): ...\nfrom os.path import join\n")
    assert load_task("my_task.py").name == "mine"
    annotated = good.replace("def task(width='2', name='mine')", "").replace('name="mine")', 'name="mine") -> "Task"')
    write(annotated.replace("def task(", "def some(") + "def helper() -> int: ...\n")
    assert load_task("my_task.py").name == "mine"
    write(good.replace("def task(", "def first(") + "def second(): ...\n")
    text = message("my_task.py")
    assert "which function" in text and "first, second" in text and "my_task.py:NAME" in text
    write("x = 3")
    assert "it has none" in message("my_task.py")


@pytest.mark.parametrize("address", ["", ":", "a:", ":b", "a b:c", "a.py:b.c", "a.py:b c", "a/b:c", "a..b:c", "3:f"])
def test_malformed_addresses(write: Callable[..., Path], address: str) -> None:
    text = message(address)
    assert "package.module:function" in text and "digits, mnist-classifier, mnist-denoiser" in text


def test_missing_places_say_what_was_searched(write: Callable[..., Path]) -> None:
    path = write(GOOD)
    text = message("my_tsk.py:task")
    assert f"in {path.parent}" in text and "did you mean 'my_task.py'?" in text
    assert "there is no folder" in message("nowhere/my_task.py:task")
    for name in ("nowhere_at_all", "nowhere_at_all.deep", "torchflat.nowhere"):
        text = message(f"{name}:task")
        assert f"no module '{name.removesuffix('.deep')}'" in text and str(path.parent) in text
    assert "unknown task 'digit'; did you mean 'digits'?" in message("digit")
    assert "unknown task 'zzz'. A task is" in message("zzz")


def test_missing_functions_list_the_candidates(write: Callable[..., Path]) -> None:
    write(GOOD + "    def tusk(): ...\n    VALUE = 3\n")
    text = message("my_task.py:tak")
    assert "no function 'tak'; did you mean 'task'" in text and "(it has task, tusk)" in text
    assert "'VALUE' in my_task.py is an int, not a function" in message("my_task.py:VALUE")


@pytest.mark.parametrize(
    ("body", "kind"),
    [("return None", "None"), ("return {}", "a dict"), ("return object()", "an object"), ("yield", "a generator")],
)
def test_result_that_is_no_task_shows_what_one_is(write: Callable[..., Path], body: str, kind: str) -> None:
    write(f"def task():\n    {body}\n")
    first, *skeleton = message("my_task.py").splitlines()
    assert first == f"my_task.py:task returned {kind}, not a torchflat.Task. A task looks like this:"
    assert len(skeleton) == 3
    compile(textwrap.dedent("\n".join(skeleton)), "skeleton", "exec")


def test_options_that_do_not_fit_name_the_parameters(write: Callable[..., Path]) -> None:
    write(GOOD)
    text = message("my_task.py:task", {"widht": "3"})
    assert "unexpected keyword argument 'widht'" in text and "it takes width='2', name='mine'" in text
    write("def task(): ...")
    assert "it takes no options" in message("my_task.py:task", {"width": "3"})
    write("def task(root): ...")
    assert "missing a required argument: 'root'; it takes root" in message("my_task.py")


def test_options_from_a_command_line_become_what_the_function_has(write: Callable[..., Path]) -> None:
    write(
        """
        from torchflat.audit.task import Task
        def task(rows=1, noise=0.5, flip=False, path="", many=None):
            told = repr((rows, noise, flip, path, many))
            return Task(lambda: None, lambda a, b: a, [1, 2], name=told)
        """
    )
    options = {"rows": "20", "noise": "1e-3", "flip": "True", "path": "7", "many": "8"}
    assert load_task("my_task.py", options).name == "(20, 0.001, True, '7', '8')"
    assert load_task("my_task.py", {"rows": 2.5, "flip": "false"}).name == "(2.5, 0.5, False, '', None)"
    assert "option rows must be an int, got '2.5'" in message("my_task.py", {"rows": "2.5"})
    assert "option flip must be true or false, got 'maybe'" in message("my_task.py", {"flip": "maybe"})


# --- whose fault it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("x = 1\ndef task(:\n    pass\n", 2, "def task(:"),
        ("def task():\nreturn 3\n", 2, "return 3"),
        ("x = 'abc", 1, "'abc"),
    ],
)
def test_syntax_error_is_shown_with_its_line(write: Callable[..., Path], source: str, line: int, text: str) -> None:
    path = write(source)
    told = message("my_task.py:task")
    assert told.startswith(f"{path}:{line}: syntax error, ") and text in told and "\n" not in told


def test_syntax_error_next_door_is_shown_there(write: Callable[..., Path]) -> None:
    path = write("def f(:", "neighbour_three.py")
    write("import neighbour_three\n" + textwrap.dedent(GOOD))
    assert message("my_task.py").startswith(f"{path}:1: syntax error")


def test_bytes_that_are_no_source(write: Callable[..., Path]) -> None:
    path = write("")
    for content in (b"x = '\xff'\n", b"x = 1\x00"):
        path.write_bytes(content)
        assert "my_task.py" in message("my_task.py:task")


FAULTS = {
    "while importing": ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    "in the function": ("def task():\n    width = int('a')\n", 2, "ValueError: invalid literal for int()"),
    "in a library": (
        "import torch\ndef task():\n    x = torch.nn.Linear(2, 2)\n    return x(torch.zeros(3))\n",
        4,
        "RuntimeError: ",
    ),
    "a missing import": ("import nowhere_at_all\n", 1, "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "two lines": ("def task():\n    raise OSError('one\\n  two')\n", 2, "OSError: one two"),
    "an exit": ("import sys\nsys.exit(3)\n", 2, "ended the program (exit code 3)"),
    "arguments parsed": (
        "import argparse\ndef task():\n    argparse.ArgumentParser().parse_args(['--no-such'])\n",
        3,
        "ended the program (exit code 2)",
    ),
}


@pytest.mark.parametrize(("source", "line", "text"), FAULTS.values(), ids=FAULTS)
def test_faults_of_users_code_give_file_and_line(write: Callable[..., Path], source: str, line: int, text: str) -> None:
    path = write(source)
    modules = set(sys.modules)
    with pytest.raises(UsageError) as caught:
        load_task("my_task.py:task")
    told = str(caught.value)
    assert told.startswith(f"{path}:{line}: ") and text in told and "\n" not in told
    assert caught.value.__cause__ is not None
    assert not [name for name in set(sys.modules) - modules if "my_task" in name] or "def task" in source
    if "nowhere" not in source:
        assert message("my_task:task").startswith(f"{path}:{line}: ")  # the same as a module


def test_missing_import_inside_a_module_is_not_a_missing_task(write: Callable[..., Path]) -> None:
    path = write("import nowhere_at_all")
    assert message("my_task:task").startswith(f"{path}:1: ")


def test_errors_of_torchflat_pass_through(write: Callable[..., Path]) -> None:
    write("from torchflat.errors import DataError\ndef task():\n    raise DataError('no MNIST here')\n")
    with pytest.raises(DataError, match=r"^no MNIST here$"):
        load_task("my_task.py")
    write(GOOD.replace("torch.nn.functional.mse_loss", "None"))
    assert message("my_task.py").startswith("Task needs either loss")


@pytest.mark.parametrize("source", ["raise KeyboardInterrupt", "def task():\n    raise KeyboardInterrupt"])
def test_interrupt_passes_through(write: Callable[..., Path], source: str) -> None:
    write(source)
    with pytest.raises(KeyboardInterrupt):
        load_task("my_task.py:task")


def test_file_that_changes_the_path_itself(write: Callable[..., Path]) -> None:
    write("import sys\nsys.path.pop(0)\n" + textwrap.dedent(GOOD))
    assert load_task("my_task.py").name == "mine"
