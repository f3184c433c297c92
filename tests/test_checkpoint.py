"""Checkpoints: every wrapping is read, nothing unsafe runs, and whatever does not fit is named."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from torchflat.audit.checkpoint import Checkpoint, find_checkpoints, load_checkpoint
from torchflat.errors import CheckpointError, NonFiniteError


class Net(nn.Module):
    """Parameters, persistent and other buffers, and a submodule, so that keys have several depths."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 2)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


class Unsafe:
    """Unpickling this makes the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    state = Net().state_dict()
    return {name: torch.randn(value.shape) if value.is_floating_point() else value + 7 for name, value in state.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value / 2 if value.is_floating_point() else value for name, value in weights.items()}


def assert_holds(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    """The checkpoint has these values, and so has a model after ``apply``, which was not touched before."""
    assert checkpoint.tensors.keys() == weights.keys()
    model = Net()
    checkpoint.apply(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def message(path: Path, model: nn.Module | None = None, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model or Net(), **options)
    text = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in text and len(text) < 600
    return text


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_format_is_told_by_content_not_by_suffix(weights: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    save_file(weights, tmp_path / f"a{suffix}")
    torch.save(weights, tmp_path / f"b{suffix}")
    torch.save(weights, tmp_path / f"c{suffix}", _use_new_zipfile_serialization=False)
    for name, kind in (("a", "safetensors"), ("b", "torch"), ("c", "torch")):
        file = tmp_path / f"{name}{suffix}"
        checkpoint = load_checkpoint(file, Net())
        assert (checkpoint.format, checkpoint.wrappers, checkpoint.ema, checkpoint.notes) == (kind, (), False, ())
        assert checkpoint.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert checkpoint.path == str(file)
        assert_holds(checkpoint, weights)


WRAPPINGS: list[tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = [
    (lambda w: {"state_dict": w}, ("state_dict",)),
    (lambda w: {"model": w, "epoch": 3}, ("model",)),
    (lambda w: {"model_state_dict": w}, ("model_state_dict",)),
    (lambda w: {"net": w}, ("net",)),
    (lambda w: {"module": w}, ("module",)),
    (lambda w: {"params": w}, ("params",)),
    (lambda w: {"checkpoint": {"model": {"state_dict": w}}}, ("checkpoint", "model", "state_dict")),
    (lambda w: prefixed(w, "module."), ("module.",)),
    (lambda w: prefixed(w, "_orig_mod.module."), ("_orig_mod.", "module.")),
    (lambda w: prefixed(w, "module._orig_mod."), ("module.", "_orig_mod.")),
    (lambda w: {"state_dict": prefixed(w, "model.")}, ("state_dict", "model.")),
    (lambda w: {"state_dict": prefixed(w, "net._orig_mod.")}, ("state_dict", "net.", "_orig_mod.")),
    (lambda w: prefixed(w, "backbone."), ("backbone.",)),
    (lambda w: {name.replace("body.", "body._orig_mod."): value for name, value in w.items()}, ("_orig_mod.",)),
    (lambda w: {"weights": w, "optimizer": {"momentum": halved(w)}}, ("weights",)),
]


@pytest.mark.parametrize(("wrap", "wrappers"), WRAPPINGS, ids=[str(wrappers) for _, wrappers in WRAPPINGS])
def test_wrapping_is_undone(
    weights: dict[str, Tensor], path: Path, wrap: Callable[..., Any], wrappers: tuple[str, ...]
) -> None:
    torch.save(wrap(weights), path)
    checkpoint = load_checkpoint(path, Net())
    assert checkpoint.wrappers == wrappers and not checkpoint.ema
    assert_holds(checkpoint, weights)


segments = st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "backbone.", "net.", "body."]), max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(["state_dict", "model", "anything", "params"]), max_size=3),
    segments=segments,
    beside=st.booleans(),
)
def test_any_nesting_of_wrappers_and_prefixes_is_undone(
    weights: dict[str, Tensor], path: Path, names: list[str], segments: list[str], beside: bool
) -> None:
    tree: Any = prefixed(weights, "".join(segments))
    for name in reversed(names):
        tree = {name: tree, **({"epoch": 3, "rng": torch.zeros(3, dtype=torch.uint8)} if beside else {})}
    torch.save(tree, path)
    checkpoint = load_checkpoint(path, Net())
    assert checkpoint.wrappers == (*names, *segments)
    assert_holds(checkpoint, weights)


def test_lightning_checkpoint_with_averages_metrics_and_hyper_parameters(
    weights: dict[str, Tensor], path: Path
) -> None:
    state = {
        **prefixed(weights, "model._orig_mod.module."),
        **prefixed(halved(weights), "ema_model."),
        "ema_model.decay": torch.tensor(0.999),
        "train_accuracy.count": torch.tensor(5),
        "loss_fn.weight": torch.ones(2),
    }
    everything = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4, 3)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"args": argparse.Namespace(lr=0.1, widths=[1, 2])},
    }
    torch.save(everything, path)
    checkpoint = load_checkpoint(path, Net())
    assert checkpoint.wrappers == ("state_dict", "model.", "_orig_mod.", "module.") and not checkpoint.ema
    assert_holds(checkpoint, weights)
    notes = " / ".join(checkpoint.notes)
    assert "averaged weights are there too, under 'state_dict' > 'ema_model.': key='ema_model.'" in notes
    assert "left aside, as no persistent part of the model: ema_model.*, train_accuracy.count, loss_fn.weight" in notes

    averaged = load_checkpoint(path, Net(), key="ema_model")
    assert averaged.wrappers == ("state_dict", "ema_model.") and averaged.ema
    assert_holds(averaged, halved(weights))


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "params_ema", "ema_state_dict"])
def test_average_is_taken_only_alone_or_when_asked_for(weights: dict[str, Tensor], path: Path, name: str) -> None:
    average = halved(weights)
    torch.save({name: average, "state_dict": weights}, path)
    plain = load_checkpoint(path, Net())
    assert plain.wrappers == ("state_dict",) and not plain.ema
    assert any(f"key={name!r} takes them" in note for note in plain.notes)
    assert_holds(plain, weights)

    asked = load_checkpoint(path, Net(), key=name)
    assert asked.wrappers == (name,) and asked.ema
    assert_holds(asked, average)

    torch.save({name: {"module": average}}, path)
    alone = load_checkpoint(path, Net())
    assert alone.wrappers == (name, "module") and alone.ema
    assert any("averaged weights" in note for note in alone.notes)
    assert_holds(alone, average)


def test_averages_that_cannot_be_used_are_mentioned(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": weights, "ema": {"decay": 0.9, "shadow_params": list(weights.values())}}, path)
    (note,) = load_checkpoint(path, Net()).notes
    assert "'ema'" in note and "do not fit" in note


def test_average_of_torch_is_read(weights: dict[str, Tensor], path: Path) -> None:
    model = Net()
    model.load_state_dict(weights)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), path)
    checkpoint = load_checkpoint(path, Net())
    assert_holds(checkpoint, weights)
    assert any("n_averaged" in note for note in checkpoint.notes)


def test_of_several_familiar_names_one_is_taken_and_the_other_told(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": halved(weights), "state_dict": weights}, path)
    checkpoint = load_checkpoint(path, Net())
    assert_holds(checkpoint, weights)
    assert checkpoint.notes == ("other weights that fit are there too, under 'model': key='model' takes them",)
    assert_holds(load_checkpoint(path, Net(), key="model"), halved(weights))


def test_unfamiliar_names_are_not_guessed_among(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"teacher": {"model": weights}, "student": {"model": halved(weights)}}, path)
    text = message(path)
    assert "several sets" in text and "'teacher' > 'model'" in text and "'student' > 'model'" in text and "key=" in text
    assert_holds(load_checkpoint(path, Net(), key="student"), halved(weights))
    assert "no weights under 'pupil'" in message(path, key="pupil") and "'student'" in message(path, key="pupil")


def test_a_part_of_a_larger_network_is_not_taken_for_the_network(path: Path) -> None:
    stack = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torch.save(stack.state_dict(), path)
    text = message(path, nn.Linear(3, 3))
    assert "does not fit" in text and "unexpected" in text
    # Unless it is asked for by name.
    part = load_checkpoint(path, nn.Linear(3, 3), key="1.")
    assert torch.equal(part.tensors["weight"], stack[1].weight)


def test_compiled_model_takes_a_plain_checkpoint(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)
    model = nn.Module()
    model.add_module("_orig_mod", Net())  # the keys that torch.compile(Net()) has
    load_checkpoint(path, model).apply(model)
    assert torch.equal(model.state_dict()["_orig_mod.head.weight"], weights["head.weight"])


def test_shards_with_an_index(weights: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / shard)
    index = folder / "model.safetensors.index.json"
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expected = hashlib.sha256(b"".join((folder / f).read_bytes() for f in (index.name, *sorted(shards)))).hexdigest()
    for place in (folder, index):
        checkpoint = load_checkpoint(place, Net())
        assert checkpoint.format == "safetensors" and checkpoint.sha256 == expected
        assert_holds(checkpoint, weights)

    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in message(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../last.safetensors"}}))
    save_file(weights, tmp_path / "last.safetensors")
    assert "not a file in its folder" in message(folder)
    for broken in ("", "{", "[]", '{"metadata": {}}', '{"weight_map": 3}', "\xff"):
        index.write_text(broken, encoding="latin-1")
        assert "index" in message(folder) or "empty" in message(folder)


def test_shard_that_lacks_a_tensor_of_the_index(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({"scale": weights["scale"]}, tmp_path / "m-1-of-1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "m-1-of-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "m-1-of-1.safetensors" in message(tmp_path)


def test_tied_weights_need_one_name_and_one_value(path: Path) -> None:
    source, target = Tied(), Tied()
    save_model(source, str(path))  # leaves one of the two names out
    checkpoint = load_checkpoint(path, target)
    checkpoint.apply(target)
    assert target.out.weight is target.embed.weight and torch.equal(target.out.weight, source.out.weight)

    torch.save(source.state_dict(), path)
    assert torch.equal(load_checkpoint(path, Tied()).tensors["out.weight"], source.out.weight)
    torch.save({"embed.weight": torch.zeros(5, 3), "out.weight": torch.ones(5, 3)}, path)
    assert "embed.weight and out.weight are tied" in message(path, Tied())


def test_other_buffers_and_old_batch_norms_are_excused(weights: dict[str, Tensor], path: Path) -> None:
    without_count = {name: value for name, value in weights.items() if "num_batches" not in name}
    torch.save({**without_count, "scratch": torch.ones(2)}, path)
    model = Net()
    checkpoint = load_checkpoint(path, model)
    checkpoint.apply(model)
    assert torch.equal(model.state_dict()["head.weight"], weights["head.weight"])
    assert model.body[1].num_batches_tracked == 0 and torch.equal(model.scratch, torch.zeros(2))
    assert len(checkpoint.notes) == 2 and "scratch" in checkpoint.notes[0]
    assert "body.1.num_batches_tracked" in checkpoint.notes[1]


def test_conversions_of_precision_are_noted(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in weights.items()}, path)
    model = Net()
    checkpoint = load_checkpoint(path, model)
    checkpoint.apply(model)
    assert checkpoint.notes == ("9 of 10 tensors are converted: float16 in the file, float32 in the model",)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, weights["head.weight"].half().float())


def test_loading_touches_no_model_and_applying_only_a_model_that_fits(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)
    model, other = Net(), Net(width=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: value.clone() for name, value in other.state_dict().items()}
    checkpoint = load_checkpoint(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"body\.0\.weight is \(4, 3\) in the file and \(5, 3\) in the model"):
        checkpoint.apply(other)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())

    checkpoint.apply(model)
    model.head.weight.data.zero_()  # the file is mapped privately: neither it nor the checkpoint follows the model
    assert_holds(checkpoint, weights)
    assert_holds(load_checkpoint(path, Net()), weights)


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("anonymous memory is read from /proc")

    def anonymous() -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    model = nn.Linear(4096, 4096, bias=False)  # 64 MiB
    size = model.weight.numel() * 4
    torch.save({"state_dict": model.state_dict(), "optimizer": {0: torch.ones(4096, 4096)}}, tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        before = anonymous()
        checkpoint = load_checkpoint(tmp_path / name, model)
        checkpoint.apply(model)
        assert anonymous() - before < size / 4


def test_to_dict_is_ready_for_json(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": weights}, path)
    plain = load_checkpoint(path, Net()).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain.keys() == {"path", "sha256", "format", "wrappers", "ema", "notes"}


# --- what is refused --------------------------------------------------------------------------------------------------


def save_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def save_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_new_protocol(value: object, path: Path) -> None:
    torch.save(value, path, pickle_protocol=4)


def save_legacy_new_protocol(value: object, path: Path) -> None:
    torch.save(value, path, pickle_protocol=4, _use_new_zipfile_serialization=False)


def save_plain_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def save_text_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=0))


@pytest.mark.parametrize(
    "save",
    [save_zip, save_legacy, save_new_protocol, save_legacy_new_protocol, save_plain_pickle, save_text_pickle],
)
def test_pickle_that_runs_code_is_refused_by_name_and_does_not_run(
    tmp_path: Path, path: Path, save: Callable[[object, Path], None]
) -> None:
    made = tmp_path / "made"
    save({"head.weight": 1.0, "evil": Unsafe(made)}, path)
    text = message(path)
    assert f"{os.mkdir.__module__}.mkdir" in text and "--trust-pickle" in text and "refused" in text
    assert not made.exists()
    # The same file does run its code where it is trusted: the refusal above was not luck.
    with pytest.raises(CheckpointError):
        load_checkpoint(path, Net(), trust_pickle=True)
    assert made.exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_whole_module_needs_trust(weights: dict[str, Tensor], path: Path, save: Callable[[object, Path], None]) -> None:
    model = Net()
    model.load_state_dict(weights)
    save({"model": model, "epoch": 1}, path)
    text = message(path)
    assert f"{Net.__module__}.Net" in text and "torch.nn.modules.linear.Linear" in text
    assert "OrderedDict" not in text and "_rebuild_tensor" not in text  # these are allowed
    checkpoint = load_checkpoint(path, Net(), trust_pickle=True)
    assert checkpoint.wrappers == ("model",)
    assert_holds(checkpoint, weights)


def test_refusal_names_everything_that_is_asked_for(path: Path) -> None:
    names = ("remove", "rename", "rmdir", "mkdir", "listdir", "link", "chmod")
    torch.save({"model": [getattr(os, name) for name in names]}, path)
    text = message(path)
    assert all(f"{os.mkdir.__module__}.{name}" in text for name in names)  # none may hide behind "and 2 more"


def test_pickle_of_a_class_that_is_not_here(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = type("Gone", (), {"__module__": __name__})
    monkeypatch.setitem(globals(), "Gone", gone)
    torch.save({"model": gone()}, path)
    monkeypatch.undo()
    assert f"{__name__}.Gone" in message(path)
    assert "cannot be loaded here: AttributeError" in message(path, trust_pickle=True)


def test_protocol_that_the_safe_reader_lacks(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path, pickle_protocol=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one clear line, and nothing of torch beside it
        message(path)
    assert "torch's safe reader cannot read it" in message(path)
    assert_holds(load_checkpoint(path, Net(), trust_pickle=True), weights)


def test_interrupt_passes_through(weights: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    torch.save(weights, path)
    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(path, Net())


def test_missing_files_and_folders(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "epoch_12.pt")
    assert "did you mean 'epoch_12.pt'?" in message(tmp_path / "epoch12.pt")
    assert "did you mean" not in message(tmp_path / "zzzz")
    assert "there is no folder" in message(tmp_path / "no" / "such.pt")
    assert "is a folder" in message(tmp_path) and "epoch_12.pt" in message(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in message(tmp_path / "empty.pt")


def test_unreadable_file(weights: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    torch.save(weights, path)
    for method in ("open", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, denied)
            assert "cannot be read: Permission denied" in message(path)


OTHERS = (
    *(b"x", b"hello, world\n" * 5, b"config: a\nb: c\n", b"cat\ndog\n", b"<!DOCTYPE html>", b"\x89HDF\r\n\x1a\n", b"."),
    *(b"\x80", b"\x80\x04.", bytes(100), b"\xff" * 100, b"PK\x03\x04", b"PK\x03\x04" + bytes(100)),
)


@pytest.mark.parametrize("content", OTHERS)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    for trust in (False, True):
        text = message(tmp_path / name, trust_pickle=trust)
        assert "no checkpoint" in text or "damaged" in text or "safe reader" in text or "holds a" in text
        if name == "a.safetensors" and not content.startswith((b"PK", b"\x80")):
            assert "damaged safetensors" in text  # what it claims to be, it is named by


def test_pointer_of_git_lfs(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in message(path)


def test_zip_archives_of_others(weights: dict[str, Tensor], path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one written by torch.save" in message(path)
    torch.jit.script(nn.Linear(2, 2)).save(path)  # type: ignore[no-untyped-call]
    assert "TorchScript" in message(path)
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    assert_holds(load_checkpoint(path, Net()), weights)  # packed again, it cannot be mapped, but read


SAVES: dict[str, Callable[[Any, Path], None]] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "safetensors": lambda value, path: save_file(value, path),
}


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_truncation_anywhere_is_a_checkpoint_error(
    weights: dict[str, Tensor], tmp_path: Path, kind: str, name: str
) -> None:
    SAVES[kind](weights, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in sorted(
        {*range(1, 64), *range(64, len(whole), len(whole) // 60), *range(len(whole) - 16, len(whole))}
    ):
        (tmp_path / name).write_bytes(whole[:length])
        message(tmp_path / name, trust_pickle=length % 2 == 0)
    (tmp_path / name).write_bytes(whole)
    assert_holds(load_checkpoint(tmp_path / name, Net()), weights)


@pytest.mark.parametrize("kind", SAVES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_found_or_harmless(weights: dict[str, Tensor], path: Path, kind: str, data: Any) -> None:
    """A flipped bit gives the right values or an error; only a format without checksums may read other values."""
    SAVES[kind](weights, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        checkpoint = load_checkpoint(path, Net())
    except (CheckpointError, NonFiniteError):
        return
    if kind == "zip":
        assert_holds(checkpoint, weights)


def test_wrong_checksum_is_named(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)
    content = path.read_bytes()
    at = content.index(weights["head.weight"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert torch.load(path, weights_only=True)["head.weight"].shape == (2, 4)  # torch does not see it
    assert "checksum" in message(path) and "data/" in message(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_holds(load_checkpoint(path, Net()), weights)


def test_files_without_weights(path: Path) -> None:
    torch.save({"epoch": 3, "config": {"lr": 0.1}}, path)
    assert "holds no tensors: its top-level keys are 'epoch', 'config'" in message(path)
    torch.save({}, path)
    assert "none at all" in message(path)
    torch.save(torch.zeros(2, 3), path)
    assert "holds one tensor of shape (2, 3)" in message(path)
    torch.save([1, 2], path)
    assert "holds a list" in message(path)
    cycle: dict[str, Any] = {"epoch": 3}
    cycle["state_dict"] = cycle
    torch.save(cycle, path)
    assert "holds no tensors" in message(path)


def test_wrong_architecture_says_what_differs(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": prefixed(weights, "module.")}, path)
    text = message(path, Net(width=6))
    assert "body.0.weight is (4, 3) in the file and (6, 3) in the model" in text
    assert "read under 'state_dict' > 'module.'" in text and "... and 2 more" in text

    changed = dict(weights)
    changed["tail.weight"] = changed.pop("head.weight")
    torch.save(changed, path)
    assert "1 missing: head.weight; 1 unexpected: tail.weight" in message(path)

    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    torch.save(deep[:1].state_dict(), path)
    assert "16 missing: 1.weight, 1.bias, 2.weight, 2.bias, 3.weight ... and 11 more" in message(path, deep)
    torch.save({"other.kernel": torch.zeros(2)}, path)
    assert "none of its keys is one of the model's; it has other.kernel" in message(path)


def test_wrong_kinds_of_numbers(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({**weights, "head.bias": torch.ones(2, dtype=torch.int64)}, path)
    assert "head.bias is int64 in the file and float32 in the model" in message(path)
    torch.save({**weights, "head.bias": torch.ones(2, dtype=torch.complex64)}, path)
    assert "head.bias is complex64 in the file" in message(path)
    torch.save({**weights, "head.weight": torch.zeros(2, 4).to_sparse()}, path)
    assert "head.weight is no plain dense tensor" in message(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_counted(weights: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    spoilt = weights["head.weight"].clone()
    spoilt[0, 1] = spoilt[1, 2] = float("nan")
    spoilt[1, 0] = -float("inf")
    torch.save({"state_dict": {**weights, "head.weight": spoilt.to(dtype)}}, path)
    with pytest.raises(NonFiniteError, match=r"not finite: head\.weight \(2 NaN and 1 infinite of 8\)$") as caught:
        load_checkpoint(path, Net())
    assert caught.value.exit_code == 3


def test_masks_may_be_infinite_but_not_nan(path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.triu(torch.full((3, 3), -float("inf")), 1))
    torch.save(model.state_dict(), path)
    assert load_checkpoint(path, model).notes == ("buffers with infinite entries (masks?): mask",)
    torch.save({**model.state_dict(), "mask": torch.full((3, 3), float("nan"))}, path)
    with pytest.raises(NonFiniteError, match="mask"):
        load_checkpoint(path, model)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_trajectory_is_in_natural_order(tmp_path: Path) -> None:
    for name in ("epoch10.pt", "epoch2.pt", "epoch1.safetensors", "log.txt", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "model.safetensors").touch()
    (tmp_path / "checkpoint-20" / "optimizer.pt").touch()
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100" / "model.safetensors.index.json").touch()
    (tmp_path / "plots").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in find_checkpoints(tmp_path)]
    expected = ["checkpoint-20/model.safetensors", "checkpoint-100", "epoch1.safetensors", "epoch2.pt", "epoch10.pt"]
    assert found == [str(Path(name)) for name in expected]
    assert find_checkpoints(tmp_path / "checkpoint-100") == [tmp_path / "checkpoint-100"]
    for empty in (tmp_path / "plots", tmp_path / "epoch2.pt", tmp_path / "none"):
        with pytest.raises(CheckpointError):
            find_checkpoints(empty)
