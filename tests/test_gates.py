"""The language of ``--fail-on``: what it decides, what it leaves open, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchflat.audit.gates import Outcome, evaluate, keys, parse
from torchflat.errors import UsageError

PASS, FAIL, INCONCLUSIVE = Outcome.PASS, Outcome.FAIL, Outcome.INCONCLUSIVE

REPORT: dict[str, Any] = {
    "schema_version": "1",
    "status": "partial",
    "provenance": {"seed": 7, "config": {"rtol": 0.01, "name": "x", "exact": True}},
    "point": {"loss": 0.25, "parameters": 100, "parameter_norm": None},
    "sharpness": {
        "value": 3.467,
        "lower": 3.460,
        "upper": 3.471,
        "confidence": 0.99,
        "status": "CONVERGED",
        "largest_stable_step": {"value": 0.5769, "lower": 0.5762, "upper": 0.5780},
    },
    "eigenvalues": {
        "largest": [],
        "smallest": [{"value": 2.0, "lower": None, "upper": 2.5}],
        "confidence": 0.99,
        "status": "BUDGET",
    },
    "trace": {"value": 40.0, "lower": 38.0, "upper": None, "confidence": 0.99, "status": "BUDGET"},
    "blocks": {
        "rows": [
            {"name": "a", "parameters": 60, "value": 3.0, "lower": 2.9, "upper": 3.1, "status": "CONVERGED"},
            {"name": "b", "parameters": 40, "value": None, "lower": None, "upper": None, "status": "INTERRUPTED"},
        ],
        "confidence": 0.99,
        "status": "INTERRUPTED",
    },
}


@pytest.mark.parametrize(
    ("expression", "outcome"),
    [
        # an interval on one side of the threshold, or around it; the bounds belong to the interval
        ("sharpness.value > 3", FAIL),
        ("sharpness.value > 3.465", INCONCLUSIVE),
        ("sharpness.value > 3.460", INCONCLUSIVE),
        ("sharpness.value >= 3.460", FAIL),
        ("sharpness.value > 3.471", PASS),
        ("sharpness.value >= 3.471", INCONCLUSIVE),
        ("sharpness.value < 3.460", PASS),
        ("sharpness.value <= 3.460", INCONCLUSIVE),
        ("sharpness.value < 3.471", INCONCLUSIVE),
        ("sharpness.value <= 3.471", FAIL),
        ("sharpness.value < 4", FAIL),
        ("sharpness.largest_stable_step.value < 0.577", INCONCLUSIVE),
        # bounds, and numbers that have none, are decided
        ("sharpness.lower>50", PASS),
        ("sharpness.lower > 3.4599", FAIL),
        ("sharpness.upper < 3.471", PASS),
        ("sharpness.confidence >= 0.99", FAIL),
        ("point.loss < 0.25", PASS),
        ("point.loss <= 25e-2", FAIL),
        ("point.loss > -.5", FAIL),
        ("point.loss > +1.", PASS),
        ("provenance.seed >= 8", PASS),
        # one bound is infinite
        ("trace.value > 37", FAIL),
        ("trace.value > 39", INCONCLUSIVE),
        ("trace.value < 38", PASS),
        ("trace.upper > 1", INCONCLUSIVE),
        ("eigenvalues.smallest[0].value > -5", INCONCLUSIVE),
        ("eigenvalues.smallest[0].value < 3", FAIL),
        ("eigenvalues.smallest[0].value > 2.5", PASS),
        # lists
        ("blocks.rows[0].value >= 3", INCONCLUSIVE),
        ("blocks.rows[0].value >= 2.9", FAIL),
        ("blocks.rows[0].parameters < 60", PASS),
        ("blocks.rows[1].value > 0", INCONCLUSIVE),
        ("blocks.rows[2].value > 0", INCONCLUSIVE),
        # what has not run, and what is null
        ("density.width > 1", INCONCLUSIVE),
        ("density.grid[3] > 1", INCONCLUSIVE),
        ("sharpness.cost.products > 1", INCONCLUSIVE),
        ("point.parameter_norm > 1", INCONCLUSIVE),
        ("provenance.config.rtol > 0.001", FAIL),
        ("provenance.config.absent > 0", INCONCLUSIVE),
    ],
)
def test_comparison(expression: str, outcome: Outcome) -> None:
    verdict = evaluate(expression, REPORT)
    assert verdict.outcome is outcome
    assert len(verdict.reasons) == 1
    assert expression.split()[0].split(">")[0] in verdict.reasons[0]


TRUE, FALSE, UNKNOWN = "point.loss > 0", "point.loss < 0", "trace.value > 39"
TRUTH: dict[str, bool | None] = {TRUE: True, FALSE: False, UNKNOWN: None}
OUTCOMES = {True: FAIL, False: PASS, None: INCONCLUSIVE}


def conjunction(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if a is None or b is None else True


def disjunction(a: bool | None, b: bool | None) -> bool | None:
    return True if a is True or b is True else None if a is None or b is None else False


@pytest.mark.parametrize(("a", "b"), itertools.product(TRUTH, repeat=2))
def test_truth_tables(a: str, b: str) -> None:
    assert evaluate(f"{a} and {b}", REPORT).outcome is OUTCOMES[conjunction(TRUTH[a], TRUTH[b])]
    assert evaluate(f"{a} or {b}", REPORT).outcome is OUTCOMES[disjunction(TRUTH[a], TRUTH[b])]


TREES = st.recursive(
    st.sampled_from(list(TRUTH)).map(lambda text: (text, TRUTH[text])),
    lambda child: st.tuples(child, st.sampled_from(["and", "or"]), child).map(
        lambda node: (
            f"({node[0][0]}) {node[1]} ({node[2][0]})",
            (conjunction if node[1] == "and" else disjunction)(node[0][1], node[2][1]),
        )
    ),
    max_leaves=12,
)


@given(TREES)
def test_nested_expressions_follow_the_truth_tables(tree: tuple[str, bool | None]) -> None:
    expression, truth = tree
    assert evaluate(expression, REPORT).outcome is OUTCOMES[truth]


def test_and_binds_tighter_than_or_and_brackets_tighter_than_both() -> None:
    assert evaluate(f"{TRUE} or {TRUE} and {FALSE}", REPORT).outcome is FAIL
    assert evaluate(f"({TRUE} or {TRUE}) and {FALSE}", REPORT).outcome is PASS
    assert evaluate(f"{FALSE} and {FALSE} or {TRUE}", REPORT).outcome is FAIL


def test_spaces_do_not_matter() -> None:
    assert evaluate("  (point.loss>0)and(\tpoint.loss<1 ) \n", REPORT).outcome is FAIL


def test_reasons_are_those_that_decide() -> None:
    assert evaluate(f"{TRUE} and {UNKNOWN}", REPORT).reasons == ("trace.value is 40.00 [38.00, ∞), the gate is > 39",)
    assert evaluate(f"{TRUE} or {UNKNOWN}", REPORT).reasons == ("point.loss is 0.25, the gate is > 0",)
    assert evaluate("density.width > 1", REPORT).reasons == ("density.width: this part has not run",)
    assert evaluate("trace.upper > 1", REPORT).reasons == ("trace.upper is not known",)


@pytest.mark.parametrize(
    ("expression", "position", "problem"),
    [
        ("", 0, "expected a key"),
        ("   ", 0, "expected a key"),
        ("sharpness.lower", 15, "expected >"),
        ("sharpness.lower >", 17, "expected a number"),
        ("sharpness.lower > fifty", 18, "expected a number"),
        ("sharpness.lower > 5x", 18, "not part of the language"),
        ("sharpness.lower > nan", 18, "expected a number"),
        ("sharpness.lower > 1e999", 18, "too large"),
        ("sharpness.lower > ٣", 18, "not part of the language"),
        ("sharpness.lower == 5", 16, "not part of the language"),
        ("sharpness.lower >== 5", 16, "not part of the language"),
        ("sharpness.lower > 5 6", 20, "expected `and`, `or`"),
        ("sharpness.lower > 5)", 19, "expected `and`, `or`"),
        ("(sharpness.lower > 5", 20, "expected `)`"),
        ("sharpness.lower > 5 and", 23, "expected a key"),
        ("sharpness.lower > 5 and or", 24, "expected a key"),
        ("5 > sharpness.lower", 0, "expected a key"),
        ("not sharpness.lower > 5", 0, "no report has a number at not"),
        ("__import__('os')", 11, "not part of the language"),
        ("sharpness.value.__class__ > 1", 0, "no report has a number"),
        ("point.loss > 0 or sharpness.width > 5", 18, "no report has a number at sharpness.width"),
        ("sharpness > 5", 0, "no report has a number"),
        ("sharpness.status > 5", 0, "no report has a number"),
        ("sharpness.largest_stable_step > 5", 0, "no report has a number"),
        ("blocks.rows > 5", 0, "no report has a number"),
        ("blocks.rows[0] > 5", 0, "no report has a number"),
        ("blocks.rows.value > 5", 0, "no report has a number"),
        ("sharpness[0] > 5", 0, "no report has a number"),
        ("sharpness..lower > 5", 0, "names joined by dots"),
        ("blocks.rows[x].value > 5", 0, "names joined by dots"),
        ("blocks.rows[-1].value > 5", 14, "not part of the language"),
        ("(" * 100_000, 50, "more than 50 brackets"),
    ],
)
def test_mistakes_are_shown_with_a_caret(expression: str, position: int, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(expression)
    first, shown, caret, *rest = str(caught.value).split("\n")
    assert problem in first
    assert shown == f"  {expression}"
    assert caret == "  " + " " * position + "^"
    assert any(line.startswith("  sharpness: value, lower, upper, confidence") for line in rest)
    assert max(map(len, rest)) <= 100


def test_a_mistake_shows_even_where_the_rest_decides() -> None:
    with pytest.raises(UsageError, match=r"sharpness\.width"):
        evaluate(f"{TRUE} or sharpness.width > 5", REPORT)


@pytest.mark.parametrize("key", ["name", "exact"])
def test_configuration_that_is_no_number(key: str) -> None:
    with pytest.raises(UsageError, match=f"provenance.config.{key} is no number"):
        evaluate(f"provenance.config.{key} > 1", REPORT)


def test_every_listed_key_can_be_asked_for() -> None:
    listed = keys()
    assert {"sharpness.lower", "blocks.rows[i].value", "density.grid[i]", "cost.seconds", "point.loss"} <= set(listed)
    assert not {"status", "schema_version", "sharpness.status", "blocks.rows[i].name"} & set(listed)
    for key in listed:
        assert parse(f"{key.replace('[i]', '[0]')} > 1").expression.endswith("> 1")


@given(st.text(alphabet="sharpness.lower[]()<>=0123456789e+- andor\t", max_size=60))
def test_any_text_is_either_a_gate_or_a_usage_error(text: str) -> None:
    try:
        gate = parse(text)
    except UsageError:
        return
    assert gate.evaluate(REPORT).outcome in Outcome


def test_the_interval_of_fresh_data_can_be_gated() -> None:
    report = {"sharpness": {"value": 3.0, "sampling": {"value": 3.0, "lower": 2.5, "upper": 3.5}}}
    assert evaluate("sharpness.sampling.upper < 4", report).outcome is Outcome.FAIL
    assert evaluate("sharpness.sampling.value > 3.2", report).outcome is Outcome.INCONCLUSIVE
    assert evaluate("sharpness.sampling.upper > 4", {"sharpness": {"value": 3.0}}).outcome is Outcome.INCONCLUSIVE
