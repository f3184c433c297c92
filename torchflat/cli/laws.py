"""``torchflat laws``: which rescalings leave the function of a network as it is, and what they conserve."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro

from torchflat.audit.options import Setting
from torchflat.audit.orbit import find_laws, laws_part
from torchflat.audit.orbit_words import law_rows, laws_sentences
from torchflat.audit.report import table_lines, wrapped
from torchflat.audit.subject import load_weights, picked
from torchflat.cli.output import check_writable, show
from torchflat.cli.progress import Bars
from torchflat.cli.subject import named

__all__ = ["Laws"]


@dataclasses.dataclass(frozen=True)
class Laws:
    """Show the conservation laws of a network: what can be rescaled without any effect, and how balanced it is.

    With no checkpoint and no task, those of the small trained network that ships with torchflat. --task imports and
    runs the code it names.
    """

    checkpoint: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[CKPT]")] = None
    """Weights: safetensors or torch.save, bare or wrapped. Default: the task's own."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Model and data: file.py:function or package.module:function that returns a torchflat.Task, or one of
    digits, mnist-classifier, mnist-denoiser. The code it names is run."""
    task_option: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An argument for the task's function, such as rows=1000."""
    mode: Literal["eval", "train"] = "eval"
    """In train mode batch normalisation uses the statistics of the batch, and more is conserved."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the laws as JSON there too; - prints it, and nothing else."""
    key: str | None = None
    """Which weights of the checkpoint to take, if it holds several (for example ema)."""
    trust_pickle: bool = False
    """Read pickles that run code. Only for files whose author you trust."""

    def run(self) -> int:
        """Find, print, and return the exit code."""
        task, checkpoint = named(self.task, self.task_option, self.checkpoint, "laws")
        check_writable(self.json)
        model = task.make_model()
        loaded = load_weights(checkpoint, model, Setting(key=self.key, trust_pickle=self.trust_pickle))
        with Bars() as bars:
            bars("laws", "units on the graph", None)
            part = laws_part(find_laws(task, model, task.make_data(), self.mode), model, self.mode)
        source = {"task": task.name or None, "checkpoint": loaded and picked(loaded, "path", "sha256")}
        content = json.dumps({**source, **part}, indent=2, allow_nan=False) + "\n"
        show(lambda: "".join(f"{line.rstrip()}\n" for line in _text(part)), content, self.json)
        return 0


def _text(part: dict[str, Any]) -> Iterator[str]:
    head, *rows = law_rows(part)
    if rows:
        yield from table_lines([head, *rows], right=(2, 3, 4))
        yield ""
    for sentence in laws_sentences(part):
        yield from wrapped(sentence, "·")
