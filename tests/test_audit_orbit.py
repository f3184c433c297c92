"""The parts ``laws`` and ``orbit`` of an audit: what they take from each other and from λ₁, and what they pass over."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchflat
from torchflat import Objective, Task
from torchflat.audit.orbit import contradiction, orbit_part
from torchflat.audit.orbit_words import orbit_sentences
from torchflat.errors import LawsError, UsageError
from torchflat.symmetry import Flattest, Laws, flattest

# torchflat.audit is the function, which hides the package of the same name.
RUN = importlib.import_module("torchflat.audit.run")


def rectified(**more: Any) -> Task:
    """A small ReLU network on random data, half of its units scaled up."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        model[0].weight[:3] *= 3
    return Task(model, F.mse_loss, (X, Y), **more)


@pytest.fixture(scope="module")
def hyperbola() -> Flattest:
    point = torch.tensor([4.0, 0.25], dtype=torch.float64)
    f = Objective.from_function(lambda x: (x[0] * x[1] - 1) ** 2, point)
    return flattest(f, Laws.from_group(B=torch.tensor([[1.0], [-1.0]])))


def interval(value: float, lower: float, upper: float | None) -> dict[str, Any]:
    return {"value": value, "lower": lower, "upper": upper, "status": "CONVERGED"}


def test_the_headroom_rests_on_the_narrower_interval(hyperbola: Flattest) -> None:
    true = 2 * (16 + 1 / 16)
    width = max(hyperbola.before.upper - hyperbola.before.lower, 1e-3)
    wide, narrow = interval(true, true - width, true + width), interval(32.0, 31.9999, 31.9999)
    for measured in (None, wide, {**wide, "upper": None}):
        part = orbit_part(hyperbola, measured)
        assert part["before_from"] == "orbit" and part["before"]["value"] == hyperbola.before.value
        assert part["headroom"] == hyperbola.headroom
    part = orbit_part(hyperbola, narrow)
    assert part["before_from"] == "sharpness" and part["before"] == {k: narrow[k] for k in ("value", "lower", "upper")}
    assert part["headroom"] == pytest.approx(32 / hyperbola.value)


def test_two_intervals_of_one_number_that_do_not_meet_are_told(hyperbola: Flattest) -> None:
    lower, upper = hyperbola.before.lower, hyperbola.before.upper
    for agreeing in (interval(upper, upper, upper + 1), interval(lower, lower - 1, lower), interval(99.0, 99.0, None)):
        assert contradiction(agreeing, hyperbola) is None
    for other in (interval(upper + 2, upper + 1, upper + 3), interval(lower - 2, lower - 3, lower - 1)):
        said = contradiction(other, hyperbola)
        assert said is not None and f"[{other['lower']:.6g}, {other['upper']:.6g}]" in said
        assert "one of the two is wrong, which chance allows in 2% of all cases; try another --seed" in said


def test_the_words_say_where_the_point_itself_was_measured(hyperbola: Flattest) -> None:
    known = interval(32.0, 31.9999, 31.9999)
    said = " ".join(orbit_sentences(orbit_part(hyperbola)))
    assert "λ₁ without rescaling is 32.1" in said and "as the search for λ₁★ measured it on its way" in said
    assert "without rescaling" not in " ".join(orbit_sentences(orbit_part(hyperbola, known)))


def test_an_audit_uses_its_own_interval_and_finds_the_laws_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any, **named: Any) -> Laws:
        calls.append(given)
        return found(*given, **named)

    found = RUN.find_laws
    monkeypatch.setattr(RUN, "find_laws", counted)
    content = torchflat.audit(rectified(), parts=("sharpness", "laws", "orbit")).content
    assert len(calls) == 1
    orbit, sharpness = content["orbit"], content["sharpness"]
    assert orbit["before_from"] == "sharpness"
    assert orbit["before"] == {key: sharpness[key] for key in ("value", "lower", "upper")}
    assert orbit["headroom"] == pytest.approx(sharpness["value"] / orbit["value"]) and orbit["headroom"] > 1.05
    assert not any("one of the two is wrong" in note for note in content["provenance"]["notes"])


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) < 1e9 else -self.inner(x)


def notes(task: Task) -> list[str]:
    content = torchflat.audit(task, parts=("laws", "orbit")).content
    assert content["status"] == "complete"
    told: list[str] = content["provenance"]["notes"]
    return [note for note in told if "could not be found" in note]


def test_what_has_no_laws_is_told_once_and_audited_all_the_same() -> None:
    X = torch.randn(8, 3, dtype=torch.float64)
    (said,) = notes(Task(_Branching, F.mse_loss, (X, X[:, :2])))
    assert said.startswith("the laws could not be found: torch.export")
    (said,) = notes(rectified(weight_decay=0.1))
    assert said.startswith("λ₁★ could not be found: f has weight_decay=0.1")


@pytest.mark.parametrize("part", ["find_laws", "flattest"])
def test_other_errors_end_the_audit(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: type[Exception]) -> Callable[..., Any]:
        def raises(*given: Any, **named: Any) -> Any:
            raise error("wrong")

        return raises

    monkeypatch.setattr(RUN, part, fails(LawsError))
    assert len(notes(rectified())) == 1
    monkeypatch.setattr(RUN, part, fails(UsageError))
    with pytest.raises(UsageError, match="wrong"):
        notes(rectified())
