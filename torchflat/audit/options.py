"""What can be chosen about an audit or a comparison: keywords of functions, flags of commands, keys of their files."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, get_args

import torch

from torchflat.errors import UsageError

__all__ = ["PARTS", "CompareOptions", "FlattenOptions", "Options", "Setting", "parse_duration"]

Part = Literal["sharpness", "eigenvalues", "trace", "density", "blocks", "variation", "laws", "orbit"]
PARTS: tuple[Part, ...] = get_args(Part)

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is loaded and where it is computed: the choices that all commands on checkpoints share."""

    seed: int = 0
    """Of all random starts and probes. Same seed, same machine, same threads: same numbers."""
    params: tuple[str, ...] | None = None
    """Names, wildcards or submodules of the parameters in question; !name leaves out. Default: the task's choice."""
    rows: int | None = None
    """Use a random subset of so many rows of the data."""
    device: str | None = None
    """Where to compute, such as cuda or cpu. Default: where the model is."""
    dtype: Literal["float32", "float64"] | None = None
    """Working precision. Default: the model's, and float32 for half precision."""
    microbatch: int | None = None
    """Rows that go through the model at once. Default: what the memory budget suggests."""
    memory: str = "2GiB"
    """Budget for retained graphs, Krylov vectors and workspace together."""
    key: str | None = None
    """Which weights of the checkpoint to take, if it holds several (for example ema)."""
    trust_pickle: bool = False
    """Read pickles that run code. Only for files whose author you trust."""

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UsageError(f"rows={self.rows}: it must be a positive number of rows")
        if self.dtype not in (None, "float32", "float64"):
            raise UsageError(f"dtype={self.dtype!r}: choose float32 or float64")
        if self.device is not None:
            _check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The working precision as torch knows it."""
        return getattr(torch, self.dtype) if self.dtype else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the report's provenance."""
        return {key: list(item) if isinstance(item, tuple) else item for key, item in vars(self).items()}


@dataclasses.dataclass(frozen=True)
class Options(Setting):
    """How an audit is carried out. Every field has a default that suits a first look."""

    rtol: float = 1e-2
    """How narrow the interval of the sharpness is to be, relative to its value."""
    confidence: float = 0.99
    """Probability with which every interval holds, over the random starts."""
    budget: str | None = None
    """Time for the whole audit, such as 10m, 90s or 2h. What is not finished then says so."""
    parts: tuple[Part, ...] = PARTS
    """What to measure besides the loss and its gradient."""
    top: int = 5
    """How many of the largest eigenvalues."""
    smallest: int = 1
    """How many of the smallest eigenvalues."""
    method: Literal["auto", "lanczos", "multilevel", "power"] = "auto"
    """How to find the sharpness; multilevel takes few passes over many rows, power is a cross-check."""
    certify: Literal["auto", "krylov"] = "auto"
    """What its upper bound may rest on; krylov forbids bounds from a sample of the rows."""
    by: Literal["module", "tensor"] = "module"
    """What a block is."""
    gradients: float | None = None
    """Gradients for the flatness profile. Default: 100, or 20,000 where there are 1,000 parameters at most."""
    tracker: str | None = None
    """State of the Tracker of this training, to check its account at the end. Default: what the checkpoint holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("top", "smallest"):
            if getattr(self, field) < 0:
                raise UsageError(f"{field}={getattr(self, field)}: it must not be negative")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise UsageError(f"parts: {unknown[0]!r} is not one of {', '.join(PARTS)}")
        _check_gradients(self.gradients)
        parse_duration(self.budget)


@dataclasses.dataclass(frozen=True)
class CompareOptions(Setting):
    """How two checkpoints are compared."""

    tolerance: float = 5e-2
    """Relative difference of the flatness profiles that counts as none."""
    confidence: float = 0.99
    """With which a difference is not the chance in the rows of the data."""
    radii: tuple[float, ...] | None = None
    """Distances from the points to compare at. Default: the range that suits both."""
    gradients: float | None = None
    """Gradients for the search at each point. Default: 200, or 20,000 where there are 1,000 parameters at most."""
    symmetry: bool = False
    """Compare the flattest networks that compute what A and B compute, by rescaling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tolerance < 1 or not 0 < self.confidence < 1:
            raise UsageError(f"tolerance={self.tolerance}, confidence={self.confidence}: both must lie between 0 and 1")
        _check_gradients(self.gradients)


@dataclasses.dataclass(frozen=True)
class FlattenOptions(Setting):
    """How the flattest network that computes the same function is looked for."""

    rtol: float = 1e-2
    """How near λ₁ is to be to the least, relative to it."""
    confidence: float = 0.99
    """Probability with which intervals hold, over the random starts."""
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    """Whose λ₁; the Gauss–Newton matrix is positive semidefinite, so that the least can be proved."""
    gradients: float = 400.0
    """Budget in gradients over all the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gradients(self.gradients)


def _check_gradients(gradients: float | None) -> None:
    if gradients is not None and not gradients > 0:
        raise UsageError(f"gradients={gradients}: it must be positive")


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def parse_duration(text: str | None) -> float | None:
    """Seconds in ``"10m"``, ``"1h30m"``, ``"45"`` (seconds); None for None.

    >>> parse_duration("10m"), parse_duration("1h30m"), parse_duration("2.5s")
    (600.0, 5400.0, 2.5)
    """
    if text is None:
        return None
    parts = re.findall(r"([0-9.]+)([smhd]?)", text.lower())
    if not parts or "".join(map("".join, parts)) != text.lower().strip():
        raise UsageError(f"budget={text!r} is no duration: write it like 10m, 90s or 1h30m")
    try:
        seconds = sum(float(amount) * _SECONDS[unit] for amount, unit in parts)
    except ValueError:
        raise UsageError(f"budget={text!r} is no duration: write it like 10m, 90s or 1h30m") from None
    if not seconds > 0:
        raise UsageError(f"budget={text!r}: it must be longer than nothing")
    return seconds
