"""The report: what the schema admits, what the table and the page show, and how it is saved."""

from __future__ import annotations

import functools
import html.parser
import json
import math
import os
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchflat.audit import figures, page
from torchflat.audit import report as report_module
from torchflat.audit.profile import doubling_radius
from torchflat.audit.report import Report
from torchflat.errors import UsageError
from torchflat.numerals import confidence, duration, memory, number, printable, shorten, span
from torchflat.result import Status

VOID = {"meta", "img", "br", "hr", "link", "input"}
LAYERS = 6


def cost(products: float, seconds: float) -> dict[str, Any]:
    return {"gradients": 2 * products + 1, "forwards": 1, "backwards": 1, "products": products, "seconds": seconds}


def interval(value: float, relative: float) -> dict[str, Any]:
    return {"value": value, "lower": value - 0.2 * relative * abs(value), "upper": value + relative * abs(value)}


def spectral_density(top: list[float], parameters: int, width: float = 0.03) -> dict[str, Any]:
    """The spectrum of a trained network: a sharp bulk at zero with a small negative part, and the outliers ``top``."""
    grid = [-0.4 + 4.4 * i / 511 for i in range(512)]
    atoms = [(0.0, 0.97), (0.02, 0.02), (0.1, 2e-3), (0.3, 2e-4), (0.7, 2e-5), (-0.08, 3e-4), (-0.2, 1e-6)]
    atoms += [(value, 1 / parameters) for value in top]
    density = [
        sum(mass * math.exp(-(((x - at) / width) ** 2) / 2) for at, mass in atoms) / (width * math.sqrt(2 * math.pi))
        for x in grid
    ]
    return {
        "grid": grid,
        "density": density,
        "standard_error": [0.2 * value + 0.02 / parameters for value in density],
        "width": width,
        "exact": top[:5],
        "starts": 4,
        "steps": 60,
        "status": "CONVERGED",
        "cost": cost(240, 130.0),
    }


def flatness_profile() -> dict[str, Any]:
    """f° of a point with a gradient: 0.0041 r + 1.73 r², exactly, down to a rounding of 1e-9."""
    radii = [1e-4 * 4.2**i for i in range(8)]
    return {
        "radii": radii,
        "values": [0.0041 * r + 1.73 * r * r for r in radii],
        "slopes": [0.0041 + 3.46 * r for r in radii],
        "signs": [1.0] * 8,
        "floor": [1e-9] * 8,
        "disagreements": [0.0] * 7,
        "accuracy": [1e-3] * 8,
        "order": {
            "p": {"value": 1.0, "lower": 1.0, "upper": 1.0},
            "exact": True,
            "modulus": {"value": 0.0041, "lower": 0.0040, "upper": 0.0042},
            "radius": 1e-4,
        },
        "curvature_radius": 2 * 0.0041 / 3.4673,
        "doubling_radius": 0.1016,
        "level": 0.0182734,
        "gradient_norm": 0.004127,
        "critical": False,
        "unbounded": None,
        "status": "CONVERGED",
        "cost": cost(0, 41.0),
    }


def conservation_laws() -> dict[str, Any]:
    """Five couplings, each less balanced than the one before it, and one law of every other kind."""
    couplings = [
        {
            "name": f"layers.{layer} → layers.{layer + 1}",
            "kind": "diagonal",
            "channels": 784,
            "laws": 784,
            "imbalance": 0.1 + 0.12 * layer,
            "writers": 21.0,
            "readers": 18.0,
            "ratios": [0.2 * 0.8**layer, 0.7, 1.1, 1.6, 3.0 * 1.5**layer],
            "degenerate": layer,
        }
        for layer in range(LAYERS - 1)
    ]
    return {
        "mode": "eval",
        "couplings": couplings,
        "linear": [{"name": "Σ layers.5", "laws": 784}],
        "approximate": [{**couplings[0], "name": "norm → head", "residual": 3e-6}],
        "dropped": [{"name": "a → b", "residual": 0.2}],
        "unknown": [{"place": "fft", "operator": "aten.fft_rfft"}],
    }


def fake_report() -> dict[str, Any]:
    """The audit of a six-layer denoiser, as the numbers of a real one are."""
    top = [3.4673, 3.4308, 2.911, 2.2043, 1.8077, 1.402, 1.2251, 0.991]
    parameters = 3_694_992
    widths = [0.31, 0.1, 0.043, 0.011, 3.1e-3, 2e-3]
    return {
        "schema_version": "1",
        "status": "complete",
        "provenance": {
            "torchflat": "0.1.0",
            "torch": "2.10.0",
            "python": "3.12.3",
            "platform": "Linux-6.8-x86_64",
            "device": "cpu",
            "dtype": "float32",
            "threads": 2,
            "ops": "native",
            "products": "retained",
            "microbatch": 1000,
            "memory_bytes": 2 << 30,
            "plan": {
                "microbatch": 1000,
                "reason": "as given",
                "graphs": 10,
                "planned": 9,
                "kept": 7,
                "bytes_per_row": 40_960.0,
                "seconds_per_row": 4.1e-4,
            },
            "seed": 0,
            "command": "torchflat audit denoiser.safetensors --task denoiser.py:task -o audit",
            "config": {"rtol": 0.01, "confidence": 0.99, "budget": None, "spectrum": {"k": 8, "smallest": 3}},
            "task": "denoiser.py:task",
            "checkpoint": {
                "path": "runs/sgd/denoiser.safetensors",
                "sha256": "9f" * 32,
                "format": "safetensors",
                "wrappers": ["state_dict", "module."],
            },
            "data": {"rows": 10_000, "batches": 10, "sha256": "1c" * 32},
            "started": "2026-01-15T10:12:44+00:00",
            "notes": ["The model was audited in eval mode: dropout is off."],
        },
        "point": {
            "loss": 0.0182734,
            "gradient_norm": 0.004127,
            "parameter_norm": 61.238,
            "parameters": parameters,
            "rows": 10_000,
        },
        "sharpness": {
            "value": 3.4673,
            "lower": 3.46602,
            "upper": 3.47091,
            "confidence": 0.99,
            "status": "CONVERGED",
            "basis": "krylov",
            "residual": 0.0021,
            "floor": 1.2e-5,
            "steps": 16,
            "cost": cost(16, 21.4),
            "largest_stable_step": {"value": 2 / 3.4673, "lower": 2 / 3.47091, "upper": 2 / 3.46602},
            "sampling": {
                "value": 3.4673,
                "lower": 3.2714,
                "upper": 3.6632,
                "confidence": 0.99,
                "standard_error": 0.0521,
                "groups": 64,
                "cost": cost(1, 1.4),
            },
            "history": [
                {
                    "products": k,
                    "value": 3.4673 * (1 - 0.9 * 0.55**k),
                    "lower": 3.4673 * (1 - 0.9 * 0.55**k) - 1e-4,
                    "upper": None if k < 3 else 3.4673 * (1 + 40 * 0.57**k),
                }
                for k in range(1, 17)
            ],
        },
        "eigenvalues": {
            "largest": [{**interval(value, 1e-3), "residual": 1e-3 * value} for value in top],
            "smallest": [{**interval(value, 2e-2), "residual": 2e-3} for value in (-0.2131, -0.1804, -0.1712)],
            "confidence": 0.99,
            "status": "CONVERGED",
            "cost": cost(41, 55.0),
        },
        "trace": {
            "value": 412.8,
            "lower": 398.1,
            "upper": 427.5,
            "confidence": 0.99,
            "standard_error": 5.7,
            "samples": 30,
            "status": "CONVERGED",
            "cost": cost(30, 18.2),
        },
        "density": spectral_density(top, parameters),
        "blocks": {
            "rows": [
                {
                    "name": f"layers.{layer}.{kind}",
                    "parameters": 784 * 784 if kind == "weight" else 784,
                    **interval(2.4 * 0.62**layer * (1 if kind == "weight" else 0.013), 4e-3),
                    "status": "CONVERGED",
                    "gradient_norm": 1e-3 * 0.7**layer,
                    "share": widths[layer] * (2 if kind == "weight" else 0.02),
                }
                for layer in range(LAYERS)
                for kind in ("weight", "bias")
            ],
            "confidence": 0.99,
            "status": "CONVERGED",
            "cost": cost(120, 101.5),
        },
        "variation": flatness_profile(),
        "laws": conservation_laws(),
        "orbit": {
            "value": 1.2041,
            "lower": None,
            "upper": 1.2063,
            "confidence": 0.99,
            "status": "UNCERTIFIED",
            "proof": None,
            "headroom": 2.8796,
            "negative": -0.041,
            "attained": True,
            "before": {"value": 3.4673, "lower": 3.46602, "upper": 3.47091},
            "before_from": "sharpness",
            "after": {"value": 1.2041, "lower": 1.2040, "upper": 1.2063},
            "largest_log_scale": 1.31,
            "max_log_scale": 8.0,
            "frozen": [{"name": "layers.3 → layers.4", "reason": "channel 7: nothing reads it"}],
            "cost": cost(40, 38.0),
        },
        "cost": {**cost(447, 326.1), "peak_memory_bytes": 1_610_612_736},
    }


def partial_report() -> dict[str, Any]:
    """The same audit, interrupted while λ₁ was being measured: no upper bound yet, and nothing else has run."""
    report = fake_report()
    for key in ("eigenvalues", "trace", "density", "blocks", "variation", "laws", "orbit"):
        del report[key]
    sharpness = report["sharpness"]
    sharpness.update(value=2.91, lower=2.9, upper=None, status="INTERRUPTED", history=sharpness["history"][:4])
    sharpness["largest_stable_step"] = {"value": 2 / 2.91, "lower": None, "upper": 2 / 2.9}
    report["status"] = "partial"
    return report


def bare_report() -> dict[str, Any]:
    return {
        "schema_version": "1",
        "status": "partial",
        "provenance": {"torchflat": "0.1.0", "torch": "2.10.0", "python": "3.10.0"},
    }


def extreme_report(scale: float = 1e-12) -> dict[str, Any]:
    """Every number multiplied by ``scale``, every status different, names that are long, wide and hostile."""
    report = fake_report()

    def scaled(part: Any) -> Any:
        if isinstance(part, dict):
            small = (
                "value", "lower", "upper", "grid", "width", "exact", "standard_error", "residual", "loss",
                "values", "slopes", "floor", "level", "curvature_radius", "doubling_radius",
            )  # fmt: skip
            return {
                key: _times(item, scale) if key in small else scaled(item) if key != "provenance" else item
                for key, item in part.items()
            }
        return [scaled(item) for item in part] if isinstance(part, list) else part

    report = scaled(report)
    report["variation"]["order"]["exact"] = False
    for key in ("density", "standard_error"):
        report["density"][key] = _times(fake_report()["density"][key], 1 / scale)
    # An audit starts from no earlier answer, so that none of its parts is TRACKED; UNCERTIFIED is for the flattest.
    profile_only = (Status.INCONSISTENT, Status.TRUNCATED)
    statuses = [status for status in Status if status not in (Status.TRACKED, Status.UNCERTIFIED, *profile_only)]
    report["variation"]["status"] = profile_only[scale > 1].name
    for key, status in zip(("sharpness", "eigenvalues", "trace", "density", "blocks"), statuses, strict=True):
        report[key]["status"] = status.name
    names = [
        "<b>bold</b> & $x^2$ \x1b[31m",
        "変換器.層.重み" * 8,
        "ＡＢＣ" * 40,
        "a" * 300,
        "encoder.layers.11.attention.out_proj.weight",
    ]
    for row, name in zip(report["blocks"]["rows"], names, strict=False):
        row["name"] = name
    return report


def flat_report() -> dict[str, Any]:
    """A maximum: all curvature is negative, and so there is no stable step to speak of."""
    report = fake_report()
    report["sharpness"].update(value=-0.31, lower=-0.32, upper=-0.3, largest_stable_step=None)
    report["sharpness"]["history"] = [
        {"products": k, "value": -0.31 - 0.5**k, "lower": -0.32 - 0.5**k, "upper": -0.3} for k in range(1, 8)
    ]
    for side in ("largest", "smallest"):
        values = (-0.31, -0.5, -1.2) if side == "largest" else (-1.2, -0.5, -0.31)
        report["eigenvalues"][side] = [interval(value, 1e-2) for value in values]
    report["density"]["grid"] = [-4.4 + x for x in report["density"]["grid"]]
    report["density"]["exact"] = []
    return report


def zero_report() -> dict[str, Any]:
    """A network whose Hessian is zero, as far as rounding lets one see, with one parameter."""
    report = fake_report()
    report["point"]["parameters"] = 1
    report["sharpness"].update(value=0.0, lower=-1e-9, upper=1e-9, largest_stable_step=None)
    report["sharpness"]["history"] = [{"products": k, "value": 0.0, "lower": 0.0, "upper": 0.0} for k in (1, 2)]
    report["eigenvalues"].update(largest=[{"value": 0.0, "lower": 0.0, "upper": 0.0}], smallest=[])
    report["trace"].update(value=0.0, lower=0.0, upper=0.0)
    report["density"].update(grid=[-1e-9, 0.0, 1e-9], density=[0.0] * 3, standard_error=[0.0] * 3, exact=[0.0])
    nothing = {"value": 0.0, "lower": 0.0, "upper": 0.0}
    report["variation"].update(values=[0.0] * 8, slopes=[0.0] * 8, floor=[0.0] * 8, order=None, level=0.0)
    report["variation"].update(curvature_radius=None, doubling_radius=None, disagreements=[None] * 7)
    report["blocks"]["rows"] = [{"name": "w", "parameters": 1, **nothing, "status": "BUDGET"}]
    for row in report["laws"]["couplings"]:
        row.update(imbalance=None, writers=0.0, readers=0.0, ratios=None, degenerate=row["channels"])
    report["orbit"].update(value=0.0, upper=1e-9, before=nothing, after=nothing, headroom=1.0, negative=0.0)
    return report


def unknown_report() -> dict[str, Any]:
    """Every number that may be null is null: nothing was finite."""
    report = fake_report()

    def emptied(part: Any) -> Any:
        if isinstance(part, dict):
            kept = (
                "provenance",
                "schema_version",
                "status",
                "name",
                "parameters",
                "starts",
                "steps",
                "samples",
                "groups",
                "grid",
                "products",
                "radii",
                "signs",
                "exact",
            )
            return {key: item if key in kept else emptied(item) for key, item in part.items()}
        return [emptied(item) for item in part] if isinstance(part, list) else None

    report = emptied(report)
    report["density"]["exact"] = []
    laws = fake_report()["laws"]
    report["laws"] = {
        key: [
            {**row, **dict.fromkeys(row.keys() - {"name", "kind", "channels", "laws", "place", "operator"})}
            for row in rows
        ]
        for key, rows in laws.items()
        if key != "mode"
    }
    report["orbit"]["frozen"] = []
    return report


def _times(item: Any, scale: float) -> Any:
    if isinstance(item, list):
        return [_times(entry, scale) for entry in item]
    return item if item is None else item * scale


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "complete": fake_report,
    "partial": partial_report,
    "bare": bare_report,
    "tiny": extreme_report,
    "huge": lambda: extreme_report(1e15),
    "flat": flat_report,
    "zero": zero_report,
    "unknown": unknown_report,
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """The name of every variant that the report must bear."""
    return str(request.param)


@pytest.fixture
def content(variant: str) -> dict[str, Any]:
    """The dict of the variant's report."""
    return VARIANTS[variant]()


@functools.cache
def saved(variant: str) -> dict[str, bytes]:
    """The files that the variant's report is saved as. Warnings are errors, and the folder did not exist before."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = Path(place) / "new" / "audit"
        report = Report(VARIANTS[variant]())
        assert report.save(folder) == folder
        assert Report.load(folder) == Report.load(folder / "report.json") == report
        return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- schema --------------------------------------------------------------------------------------------------------


def test_every_variant_is_valid_and_survives_json(content: dict[str, Any]) -> None:
    report = Report(content)
    assert report.validate() is report
    assert json.loads(report.to_json()) == content


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = path.split(".")

    def change(report: dict[str, Any]) -> None:
        for step in way:
            report = report[int(step) if step.isdigit() else step]
        report[last] = value

    return change


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    *way, last = path.split(".")

    def change(report: dict[str, Any]) -> None:
        for step in way:
            report = report[int(step) if step.isdigit() else step]
        del report[last]

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("extra", 1), "extra"),
        (put("schema_version", "2"), "schema_version '2'"),
        (drop("schema_version"), "schema_version None"),
        (put("status", "done"), "done"),
        (drop("provenance"), "provenance"),
        (drop("point"), "point"),  # a complete report has it
        (put("sharpness.value", "3.4"), "sharpness.value"),
        (put("sharpness.value", True), "sharpness.value"),
        (put("sharpness.upper", float("inf")), "null"),
        (put("sharpness.value", float("nan")), "null"),
        (drop("sharpness.lower"), "lower"),
        (put("sharpness.status", "FINE"), "sharpness.status"),
        (put("sharpness.basis", "hope"), "sharpness.basis"),
        (put("sharpness.confidence", 99), "sharpness.confidence"),
        (put("sharpness.cost.hours", 1), "hours"),
        (put("trace.samples", 1.5), "trace.samples"),
        (put("blocks.rows.3.name", None), "blocks.rows[3].name"),
        (put("blocks.rows.0.colour", "red"), "colour"),
        (put("eigenvalues.largest", None), "eigenvalues.largest"),
        (put("density.grid", [0.0, 1.0]), "differ in length"),
        (put("variation.values", [0.0, 1.0]), "$.variation differ in length"),
        (put("variation.radii", [0.0] * 8), "variation.radii[7]"),
        (put("variation.order.p.value", "1"), "variation.order"),
        (put("variation.status", "FINE"), "variation.status"),
        (put("provenance.data.sha256", "xyz"), "sha256"),
        (put("point.parameters", -1), "point.parameters"),
    ],
)
def test_schema_refuses_what_is_no_report_and_says_where(change: Callable[[dict[str, Any]], None], named: str) -> None:
    content = fake_report()
    change(content)
    with pytest.raises(UsageError) as caught:
        Report(content).validate()
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


def test_every_status_of_the_library_is_in_the_schema() -> None:
    assert report_module.schema()["$defs"]["status"]["enum"] == [status.name for status in Status]


def test_to_dict_is_a_copy() -> None:
    report = Report(fake_report())
    report.to_dict()["sharpness"]["value"] = 0
    assert report.to_dict()["sharpness"]["value"] == 3.4673


# ---- numbers -------------------------------------------------------------------------------------------------------

FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def decimal_of(value: float) -> Decimal:
    """The number as the JSON file has it."""
    return Decimal(json.dumps(value))


def significant(text: str) -> int:
    return len(re.sub(r"e.*|[-.]", "", text).lstrip("0"))


@given(FLOATS, FLOATS, FLOATS)
@settings(max_examples=400)
def test_interval_shown_holds_and_its_digits_are_justified(a: float, b: float, c: float) -> None:
    lower, value, upper = sorted((a, b, c))
    shown, interval = span(value, lower, upper)
    low, high = interval[1:-1].split(", ")
    assert Decimal(low) <= decimal_of(lower)
    assert decimal_of(upper) <= Decimal(high)
    assert Decimal(low) <= Decimal(shown) <= Decimal(high)
    for text, exact in zip((shown, low, high), map(decimal_of, (value, lower, upper)), strict=True):
        assert significant(text) <= 7
        if exact and upper > lower:
            # The last digit stands for the second digit of the width, or is the second of the number itself.
            last = Decimal(text).as_tuple().exponent
            assert isinstance(last, int)
            assert last >= min((decimal_of(upper) - decimal_of(lower)).adjusted(), exact.adjusted()) - 1


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ((3.46729, 3.4603, 3.4709), "3.467 [3.460, 3.471]"),
        ((412.8, 398.1, 427.5), "413 [398, 428]"),
        ((-0.2131, -0.214, -0.209), "-0.2131 [-0.2140, -0.2090]"),
        ((0.0, -2e-9, 2e-9), "0 [-2.0e-9, 2.0e-9]"),
        ((1.0, 1.0, 1.0), "1.00000 [1.00000, 1.00000]"),
        ((2.5, 2.4, None), "2.500 [2.400, ∞)"),
        ((2.5, None, None), "2.500 (−∞, ∞)"),
        ((None, None, None), "– (−∞, ∞)"),
        ((1e300, -1.7e308, 1.7e308), "1.0e300 [-1.7e308, 1.7e308]"),
    ],
)
def test_span(interval: tuple[float | None, float | None, float | None], shown: str) -> None:
    assert " ".join(span(*interval)) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(9999.96, "10000"), (99999.96, "1.0000e5"), (0.0001, "0.0001000"), (0.00009999, "9.999e-5"), (-12.3456, "-12.35")],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


def test_confidence_is_never_rounded_up() -> None:
    shown = [confidence(value) for value in (0.99, 0.999, 0.5, 0.9999999, 1.0, 1, None)]
    assert shown == ["99 %", "99.9 %", "50 %", "99.99 %", "100 %", "100 %", "–"]


def test_times_and_sizes() -> None:
    assert [duration(value) for value in (0.421, 12.44, 59.99, 200, 7500)] == [
        "0.42 s", "12.4 s", "60.0 s", "3 min 20 s", "2 h 5 min",
    ]  # fmt: skip
    assert [memory(value) for value in (512, 1 << 20, 1_610_612_736)] == ["512 B", "1 MiB", "1.5 GiB"]


# ---- text ----------------------------------------------------------------------------------------------------------


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def test_text_fits_80_columns(content: dict[str, Any]) -> None:
    assert max(columns(line) for line in Report(content).text().splitlines()) <= 80


@given(
    names=st.lists(st.text(max_size=200), min_size=1, max_size=20),
    numbers=st.lists(st.none() | FLOATS, min_size=3, max_size=3),
    sizes=st.integers(0, 10**18),
    share=st.floats(0, 1e9),
    words=st.text(max_size=300),
)
@settings(max_examples=150, deadline=None)
def test_text_fits_80_columns_whatever_it_holds(
    names: list[str], numbers: list[float | None], sizes: int, share: float, words: str
) -> None:
    content = fake_report()
    part = dict(zip(("lower", "value", "upper"), numbers, strict=True))
    row = {**content["blocks"]["rows"][0], **part, "parameters": sizes, "share": share}
    content["blocks"]["rows"] = [{**row, "name": name} for name in names]
    content["sharpness"].update(part, largest_stable_step=part)
    content["eigenvalues"]["smallest"] = [part] * 12
    content["point"].update(loss=numbers[0], parameters=sizes, rows=sizes)
    content["cost"].update(gradients=float(sizes), seconds=float(sizes), peak_memory_bytes=sizes)
    content["provenance"].update(task=words, device=words, notes=[words])
    text = Report(content).text()
    assert max(columns(line) for line in text.splitlines()) <= 80
    assert all(line.isprintable() for line in text.split("\n"))


def test_text_says_what_matters() -> None:
    text = Report(fake_report()).text()
    assert re.search(r"^λ₁ sharpness +3\.4673  \[3\.4660, 3\.4710\] +99 %  ✓$", text, re.MULTILINE)
    assert re.search(r"^λₙ smallest +-0\.2131 ", text, re.MULTILINE)
    assert "895 gradients (447 products), 5 min 26 s, 1.5 GiB at the peak" in text
    assert "PARTIAL" not in text


def test_text_tells_the_chance_of_the_data_from_that_of_the_measurement() -> None:
    report = fake_report()
    lines = Report(report).text().splitlines()
    (line,) = (line for line in lines if "fresh data" in line)
    assert line == "· on fresh data of the same size: λ₁ in [3.27, 3.67] with 99 %, to first order"
    report["sharpness"]["sampling"].update(lower=None, upper=None, standard_error=None)
    assert "fresh data" not in Report(report).validate().text()
    del report["sharpness"]["sampling"]
    assert "fresh data" not in Report(report).validate().text()


def test_text_and_page_say_how_passes_went_through_the_data() -> None:
    report = fake_report()
    said = "up to 1,000 rows at once (as given), 7 of 10 graphs kept in the end, 9 expected, 40 KiB a row"
    assert said in " ".join(Report(report).text().split())
    assert f"Passes over the data: {said}." in page.report_page(report, {})
    report["provenance"]["plan"] = {"microbatch": None, "reason": "batches cannot be cut", "graphs": None, "kept": 0}
    assert "plan: batches cannot be cut\n" in Report(report).validate().text()
    report["provenance"]["plan"] = None
    assert "plan:" not in Report(report).validate().text()


def test_page_and_figure_show_where_the_sharpness_would_lie_on_fresh_data() -> None:
    report = fake_report()
    shown = page.report_page(report, {"eigenvalues": figures.png(figures.eigenvalues(report))})
    sentence = re.sub("<[^>]+>", "", shown)
    assert "On fresh data of the same size λ1 of this network would lie in [3.27, 3.67]" in sentence
    assert "The grey bar behind λ₁ is where it would lie on fresh data: 3.47, between 3.27 and 3.67." in shown
    (bar,) = (line for line in figures.eigenvalues(report).axes[0].lines if line.get_label() == "λ₁ on fresh data")
    assert list(bar.get_ydata()) == [3.2714, 3.6632]
    del report["sharpness"]["sampling"]
    assert "fresh data" not in page.report_page(report, {})
    assert "λ₁ on fresh data" not in [line.get_label() for line in figures.eigenvalues(report).axes[0].lines]


def test_text_explains_what_did_not_converge() -> None:
    text = " ".join(Report(partial_report()).text().split())
    assert text.startswith("! PARTIAL REPORT")
    assert f"λ₁: {Status.INTERRUPTED.value}." in text
    assert "[2.900, ∞)" in text
    assert "✓" not in text


def test_text_lists_the_sharpest_blocks_and_counts_the_rest() -> None:
    content = fake_report()
    content["blocks"]["rows"] = [
        {**content["blocks"]["rows"][0], "name": f"b{i}", "value": float(i)} for i in range(40)
    ]
    text = Report(content).text()
    assert "b39" in text
    assert "b27" not in text
    assert "… and 28 more blocks" in text


@given(st.text(max_size=60), st.integers(1, 40))
def test_shorten(text: str, width: int) -> None:
    short = shorten(text, width)
    assert columns(short) <= width
    assert ("…" in short) or short == printable(text)


# ---- page ----------------------------------------------------------------------------------------------------------


class Walk(html.parser.HTMLParser):
    """Checks that tags nest and close, and gathers what the page refers to, shows and says."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert value is not None
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "srcset", "action", "poster", "data"):
                self.links.append(value)
            elif name == "alt":
                self.alts.append(value)
            assert not name.startswith("on")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(content: dict[str, Any]) -> str:
    """The page of a report that has all parts, with the figures of another to save time."""
    pictures = {name: saved("complete")[f"{name}.png"] for name in figures.FIGURES}
    return page.report_page(content, pictures)


def test_page_is_well_formed_and_fetches_nothing(variant: str) -> None:
    source = saved(variant)["report.html"].decode()
    walk = Walk(source)
    assert len(set(walk.ids)) == len(walk.ids)
    for link in walk.links:
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in walk.ids
    assert walk.tags.count("h1") == 1
    assert not {"script", "link", "iframe", "object"} & set(walk.tags)
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert "None" not in walk.text
    assert "nan" not in walk.text.split()


def test_page_shows_every_part_with_numbers_in_the_alternatives_of_the_figures() -> None:
    walk = Walk(saved("complete")["report.html"].decode())
    assert {"spectrum", "density", "trace", "blocks", "variation", "orbit", "cost", "notes", "provenance"} == {
        name for name in walk.ids if not name.endswith("-title")
    }
    assert len(walk.alts) == len(figures.FIGURES)
    numbers = ("3.4673", "minus 0.2131", "3.467", "layers.0.weight", "0.004100 r", "layers.4 → layers.5")
    for alt, said in zip(walk.alts, numbers, strict=True):
        assert said in alt
    for said in (
        "converged",
        "0.57682",
        "at least 99 %",
        "413",
        "10,000",
        "9f9f9f",
        "spectrum.smallest",
        "dropout is off",
    ):
        assert said in walk.text


def test_page_of_a_partial_report_says_so_first() -> None:
    walk = Walk(saved("partial")["report.html"].decode())
    body = walk.text[walk.text.index("torchflat audit") + len("torchflat audit") :].lstrip()
    assert body.startswith("Partial report.")
    assert "interrupted" in walk.text
    assert "how much larger is not known" in walk.text
    assert "lies in" not in walk.text
    assert {"density", "trace", "blocks", "variation"}.isdisjoint(walk.ids)


def test_page_claims_no_upper_bound_that_nothing_proves() -> None:
    content = fake_report()
    content["sharpness"].update(basis="none", status="NOT_CERTIFIED")
    text = Walk(render(content)).text
    assert "how much larger is not known" in text
    assert "with a probability" not in text


def test_page_escapes_all_that_is_not_its_own() -> None:
    content = fake_report()
    hostile = "\"><script>alert(1)</script>&'<b"
    content["provenance"].update(
        task=hostile, command=hostile, notes=[hostile], started=hostile, config={hostile: hostile}
    )
    content["provenance"].update(torch=hostile, torchflat=hostile, device=hostile)
    content["provenance"]["checkpoint"].update(path=hostile, wrappers=[hostile])
    content["blocks"]["rows"][0].update(name=hostile, value=1e3)
    for source in (render(content), page.trajectory_page([content])):
        walk = Walk(source)
        assert "script" not in walk.tags
        assert "alert(1)" in walk.text


def test_the_orbit_is_told_in_words_in_text_and_page() -> None:
    report = fake_report()
    said = " ".join(Report(report).text().split())
    shown = " ".join(Walk(saved("complete")["report.html"].decode()).text.split())
    for needle in (
        "Rescaling alone explains a factor 2.88 of this sharpness",
        "is not proved",
        "channel 7: nothing reads it",
    ):
        assert needle in said.replace("· ", "") and needle in shown
    assert "There is no rule for aten.fft_rfft (at fft)" in said
    report["orbit"].update(lower=1.19, proof="gauss_newton", status="CONVERGED", headroom=1.002)
    said = " ".join(Report(report).text().split())
    assert "next to nothing" in said and "No rescaling gets below 1.190: that is proved with 99 %" in said
    report["orbit"].update(attained=False)
    assert "the least may lie beyond, or at infinity" in " ".join(Report(report).text().split())


def test_trajectory_page_has_a_row_for_each_checkpoint() -> None:
    first = fake_report()
    first["provenance"]["checkpoint"]["path"] = "runs/epoch-01.safetensors"
    walk = Walk(page.trajectory_page([first, *(make() for make in VARIANTS.values())]))
    assert walk.tags.count("img") == 1
    assert walk.tags.count("tr") == 2 + len(VARIANTS)
    assert "epoch-01.safetensors" in walk.text
    assert "3.4673" in walk.alts[0]


# ---- figures -------------------------------------------------------------------------------------------------------


def test_only_the_parts_that_are_present_are_drawn() -> None:
    drawn = {variant: [name for name in figures.FIGURES if f"{name}.png" in saved(variant)] for variant in VARIANTS}
    everything = ["convergence", "eigenvalues", "density", "blocks"]
    assert drawn["complete"] == drawn["tiny"] == drawn["flat"] == [*everything, "profile", "balance"]
    # A logarithmic scale has no place for zeros.
    assert drawn["zero"] == everything
    assert drawn["partial"] == ["convergence"]
    assert drawn["bare"] == drawn["unknown"] == []


def test_figures_have_twice_the_density_of_a_screen(variant: str) -> None:
    for name, data in saved(variant).items():
        if name.endswith(".png"):
            assert data.startswith(b"\x89PNG")
            assert int.from_bytes(data[16:20], "big") == 2 * 96 * 8


def test_density_shows_both_signs_on_a_logarithmic_scale_with_known_eigenvalues_as_ticks() -> None:
    content = fake_report()
    (axes,) = figures.density(content).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert axes.get_yscale() == "log"
    assert {"positive", "negative", "known eigenvalues", "height of one eigenvalue"} <= lines.keys()
    assert list(lines["known eigenvalues"].get_xdata()) == content["density"]["exact"]
    # An eigenvalue that occurs once, smoothed, reaches the line: here the isolated one at 2.2043.
    height = lines["height of one eigenvalue"].get_ydata()[0]
    at = min(range(512), key=lambda i: abs(content["density"]["grid"][i] - 2.2043))
    assert content["density"]["density"][at] == pytest.approx(height, rel=0.02)


def test_profile_shows_the_values_the_references_and_the_two_radii() -> None:
    content = fake_report()
    part = content["variation"]
    (axes,) = figures.FIGURES["profile"](content).axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(lines["largest change within r"].get_ydata()) == part["values"]
    gradient, curvature = lines["gradient alone: |∇f| r"], lines["curvature alone: ½ λ₁ r²"]
    assert gradient.get_ydata()[0] == pytest.approx(0.004127e-4)
    assert curvature.get_ydata()[0] == pytest.approx(3.4673e-8 / 2)
    # The two references cross at the radius that is marked.
    marked = float(lines["curvature shows: 2|∇f|/λ₁"].get_xdata()[0])
    assert 3.4673 * marked**2 / 2 == pytest.approx(0.0041 * marked)
    assert float(lines["change = the loss itself"].get_xdata()[0]) == part["doubling_radius"]
    del content["sharpness"]
    part.update(curvature_radius=None, doubling_radius=None)
    (axes,) = figures.FIGURES["profile"](content).axes
    assert {line.get_label() for line in axes.get_lines()} == {"largest change within r", "gradient alone: |∇f| r"}


@pytest.mark.parametrize("radii", [(1.1, 1.9), (0.9, 30.0), (1e-9, 1.0)])
def test_logarithmic_axes_have_labels_whatever_they_span(radii: tuple[float, float]) -> None:
    content = fake_report()
    for key, items in content["variation"].items():
        if isinstance(items, list):
            content["variation"][key] = items[:2]
    content["variation"]["radii"] = list(radii)
    (axes,) = figures.FIGURES["profile"](content).axes
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    shown = [text.get_text() for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert len([label for label in shown if label]) >= 2


def test_text_and_page_say_what_the_profile_means() -> None:
    content = fake_report()
    text = " ".join(Report(content).text().split())
    walk = Walk(page.report_page(content, {}))
    for said in (
        "For small r the loss changes by at most 0.004100 r within a distance r of this point.",
        "Curvature shows beyond r = 0.00236 (0.0039 % of |x|).",
        "The loss can have doubled at r = 0.102 (0.17 % of |x|).",
    ):
        assert said in text.replace("· ", "")
        assert said in walk.text
    content["variation"].update(order=None, curvature_radius=None, doubling_radius=None)
    assert "For small r" not in Report(content).validate().text()
    content["variation"]["order"] = fake_report()["variation"]["order"]
    content["variation"]["order"]["p"] = {"value": 2.5, "lower": 2.4, "upper": 2.6}
    content["variation"]["order"]["exact"] = False
    assert "by at most about 0.004100 r^2.5 within" in " ".join(Report(content).text().split())
    assert "r<sup>2.5</sup>" in page.report_page(content, {})


@given(st.floats(0.3, 5), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_doubling_radius_of_a_power_is_exact(p: float, a: float, level: float) -> None:
    radii = [10.0 ** (i / 2) for i in range(-20, 21)]
    values, slopes = [a * r**p for r in radii], [a * p * r ** (p - 1) for r in radii]
    found = doubling_radius(radii, values, slopes, level)
    if found is None:
        assert not values[0] < level <= 2 * values[-1]
    else:
        assert a * found**p == pytest.approx(level, rel=1e-6)
    assert doubling_radius(radii, values, slopes, -level) is None


def test_blocks_are_drawn_from_the_sharpest_down() -> None:
    left, right = figures.blocks(fake_report()).axes
    assert [text.get_text() for text in left.get_yticklabels()][:2] == ["layers.0.weight", "layers.1.weight"]
    assert left.yaxis_inverted()
    assert right.patches[0].get_width() == pytest.approx(62)


def test_a_number_without_a_bound_is_drawn_as_a_triangle_that_points_there() -> None:
    content = fake_report()
    content["eigenvalues"]["largest"][1]["upper"] = None
    content["eigenvalues"]["smallest"][0]["lower"] = None
    largest, smallest = figures.eigenvalues(content).axes
    assert [line.get_marker() for line in largest.get_lines()][1:8:2] == ["o", "^", "o", "o"]
    assert [line.get_marker() for line in smallest.get_lines()][1::2] == ["o", "o", "v"]


def test_checkpoints_are_named_without_extensions_unless_these_tell_them_apart() -> None:
    def ticks(names: list[str]) -> list[str]:
        below = figures.trajectory([bare_report(), fake_report()], names).axes[1]
        return [text.get_text() for text in below.get_xticklabels()]

    assert ticks(["a.pt", "b.pt"]) == ["a", "b"]
    assert ticks(["a.pt", "a.safetensors"]) == ["a.pt", "a.safetensors"]


def test_drawing_leaves_the_style_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for figure in figures.draw(fake_report()).values():
        figures.png(figure)
    assert dict(matplotlib.rcParams) == before


# ---- folder --------------------------------------------------------------------------------------------------------


def test_save_writes_the_report_the_page_and_the_figures_and_no_more(variant: str, content: dict[str, Any]) -> None:
    expected = {"report.json", "report.html"} | {f"{name}.png" for name in figures.draw(content)}
    assert saved(variant).keys() == expected
    assert json.loads(saved(variant)["report.json"]) == content


def test_save_never_overwrites_without_force(tmp_path: Path) -> None:
    Report(partial_report()).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"already holds report\.json.*--force"):
        Report(fake_report()).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_forced_save_replaces_the_whole_report_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    Report(partial_report()).save(tmp_path)
    Report(bare_report()).save(tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "mine.png"}
    assert Report.load(tmp_path).to_dict() == bare_report()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_whole_and_no_debris(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Report(partial_report()).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UsageError, match="No space left on device"):
        Report(fake_report()).save(tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_numbers_are_safe_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(report: Any) -> None:
        raise RuntimeError("no pictures today")

    monkeypatch.setattr(figures, "draw", broken)
    with pytest.raises(RuntimeError, match="no pictures"):
        Report(fake_report()).save(tmp_path)
    assert Report.load(tmp_path).to_dict() == fake_report()


def test_an_invalid_report_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a torchflat report"):
        Report({**fake_report(), "trace": 3}).save(tmp_path / "audit")
    assert list(tmp_path.iterdir()) == []


def test_save_into_what_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "audit", tmp_path / ("a" * 300)):
        with pytest.raises(UsageError, match="cannot write the report to"):
            Report(bare_report()).save(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "holds a list"),
        (b"{}", "schema_version None"),
        (b'{"schema_version": "1"}', "required"),
    ],
)
def test_load_refuses_what_is_no_report(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "report.json").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        Report.load(tmp_path)


def test_load_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the report"):
        Report.load(tmp_path)


def test_load_refuses_nan(tmp_path: Path) -> None:
    text = Report(fake_report()).to_json().replace("3.46602", "NaN", 1)
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UsageError, match="null"):
        Report.load(tmp_path)
