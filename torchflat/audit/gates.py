"""The language of ``--fail-on``: comparisons of numbers of the report, with three answers.

    gate        =  conjunction { "or" conjunction }
    conjunction =  term { "and" term }
    term        =  "(" gate ")"  |  key ( ">" | ">=" | "<" | "<=" ) number
    key         =  name { "." name | "[" digits "]" }           as in  blocks.rows[0].value

``X.value > 5``, where X has an interval, is true if the interval lies above 5, false if it lies below, and otherwise
unknown. ``X.lower > 5`` and ``X.upper > 5`` are plain numbers, and so is all that has no interval. What is unknown goes
through ``and`` and ``or`` as in Kleene's logic: ``unknown or true`` is true, ``unknown and true`` is unknown.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torchflat.audit.report import schema
from torchflat.errors import UsageError
from torchflat.numerals import span

__all__ = ["Gate", "Outcome", "Verdict", "evaluate", "keys", "parse"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))|(?P<key>[A-Za-z_][\w.\[\]]*)"
    r"|(?P<operator>[<>]=?(?!=))|(?P<bracket>[()]))",
    re.ASCII,
)
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*|\[\d{1,9}\])*", re.ASCII)
_DEEPEST = 50


class Outcome(enum.Enum):
    """What a gate says. The value is the sentence that explains it."""

    PASS = "the gate did not trip"
    FAIL = "the gate tripped"
    INCONCLUSIVE = "what was measured does not decide the gate"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a gate, and one line for every comparison that had a part in it."""

    outcome: Outcome
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Comparison:
    key: str
    path: tuple[str | int, ...]
    operator: str
    threshold: float
    written: str

    def decide(self, report: Mapping[str, Any]) -> tuple[bool | None, list[str]]:
        holder = _follow(report, self.path[:-1])
        if holder is None:
            return None, [f"{self.key}: this part has not run"]
        value, compare = _follow(holder, self.path[-1:]), _OPERATORS[self.operator]
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UsageError(f"--fail-on: {self.key} is no number here but {value!r}")
        if self.path[-1] == "value" and isinstance(holder, Mapping) and {"lower", "upper"} <= holder.keys():
            lower, upper = holder["lower"], holder["upper"]
            answers = {
                compare(-math.inf if lower is None else lower, self.threshold),
                compare(math.inf if upper is None else upper, self.threshold),
            }
            shown = "{} {}".format(*span(value, lower, upper))
            return (answers.pop() if len(answers) == 1 else None), [
                f"{self.key} is {shown}, the gate is {self.written}"
            ]
        if value is None:
            return None, [f"{self.key} is not known"]
        return compare(value, self.threshold), [f"{self.key} is {value!r}, the gate is {self.written}"]


@dataclasses.dataclass(frozen=True)
class _Junction:
    terms: tuple[_Comparison | _Junction, ...]
    decisive: bool  # the answer of one term that settles the whole: True for `or`, False for `and`

    def decide(self, report: Mapping[str, Any]) -> tuple[bool | None, list[str]]:
        decided = [term.decide(report) for term in self.terms]
        answers = [answer for answer, _ in decided]
        whole = self.decisive if self.decisive in answers else None if None in answers else not self.decisive
        return whole, [reason for answer, reasons in decided if answer is whole for reason in reasons]


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gate that has been read and whose keys exist. Made by :func:`parse`."""

    expression: str
    _root: _Comparison | _Junction

    def evaluate(self, report: Mapping[str, Any]) -> Verdict:
        """Return the verdict on a report: FAIL if the expression is true of it, PASS if it is false."""
        answer, reasons = self._root.decide(report)
        outcome = {True: Outcome.FAIL, False: Outcome.PASS, None: Outcome.INCONCLUSIVE}[answer]
        return Verdict(outcome, tuple(reasons))


def evaluate(expression: str, report: Mapping[str, Any]) -> Verdict:
    """Return the verdict of the gate ``expression`` on the dict of a report.

    Raises :class:`~torchflat.errors.UsageError` if the expression is not of the language, or names a key that no report
    can have.

    >>> report = {"sharpness": {"value": 3.467, "lower": 3.460, "upper": 3.471}}
    >>> evaluate("sharpness.value > 3", report).outcome.name
    'FAIL'
    >>> evaluate("sharpness.value > 3.465 and sharpness.lower > 1", report).reasons
    ('sharpness.value is 3.467 [3.460, 3.471], the gate is > 3.465',)
    """
    return parse(expression).evaluate(report)


def parse(expression: str) -> Gate:
    """Read a gate, so that a mistake shows before an audit is spent on it. Raises as :func:`evaluate`."""
    return Gate(expression, _Parser(expression).gate())


def keys() -> list[str]:
    """Return all keys that hold numbers, with ``[i]`` for the index of a list."""
    return list(_numbers(schema(), ""))


# ---- the report and its schema -------------------------------------------------------------------------------------


def _follow(content: Any, path: Sequence[str | int]) -> Any:
    """Return what lies at ``path``, or None where the path leaves the report."""
    for step in path:
        if isinstance(step, str) and isinstance(content, Mapping):
            content = content.get(step)
        elif isinstance(step, int) and isinstance(content, list) and step < len(content):
            content = content[step]
        else:
            return None
    return content


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the node behind references and ``anyOf`` with null."""
    while True:
        if "$ref" in node:
            node = schema()["$defs"][node["$ref"].removeprefix("#/$defs/")]
        elif "anyOf" in node:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        else:
            return node


def _types(node: Mapping[str, Any]) -> Sequence[str]:
    kind = node.get("type", ())
    return [kind] if isinstance(kind, str) else kind


def _is_number(node: Mapping[str, Any]) -> bool:
    return bool({"number", "integer"} & set(_types(node)))


def _numbers(node: Mapping[str, Any], path: str) -> Iterator[str]:
    node = _resolved(node)
    if _is_number(node):
        yield path
    if "items" in node:
        yield from _numbers(node["items"], f"{path}[i]")
    for name, child in node.get("properties", {}).items():
        yield from _numbers(child, f"{path}.{name}" if path else name)


def _holds_a_number(path: Sequence[str | int]) -> bool:
    """Whether some report has a number at ``path``."""
    node: Mapping[str, Any] = schema()
    for step in path:
        node = _resolved(node)
        if "object" in _types(node) and "properties" not in node:
            return True  # the configuration: its keys are not fixed
        child = node.get("items") if isinstance(step, int) else node.get("properties", {}).get(step)
        if child is None:
            return False
        node = child
    return _is_number(_resolved(node))


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    position: int


class _Parser:
    """Recursive descent over the tokens of one expression, one method for each line of the grammar."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.tokens = list(self._read())
        self.depth = 0

    def gate(self) -> _Comparison | _Junction:
        root = self._disjunction()
        if self.tokens[0].kind != "end":
            raise self._fault(self.tokens[0], "expected `and`, `or` or the end")
        return root

    def _disjunction(self) -> _Comparison | _Junction:
        return self._joined("or", self._conjunction, decisive=True)

    def _conjunction(self) -> _Comparison | _Junction:
        return self._joined("and", self._term, decisive=False)

    def _joined(
        self, word: str, term: Callable[[], _Comparison | _Junction], decisive: bool
    ) -> _Comparison | _Junction:
        terms = [term()]
        while self.tokens[0].text == word:
            self.tokens.pop(0)
            terms.append(term())
        return terms[0] if len(terms) == 1 else _Junction(tuple(terms), decisive)

    def _term(self) -> _Comparison | _Junction:
        if self.tokens[0].text != "(":
            return self._comparison()
        opened = self.tokens.pop(0)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self._fault(opened, f"more than {_DEEPEST} brackets inside each other")
        inside = self._disjunction()
        if self.tokens[0].text != ")":
            raise self._fault(self.tokens[0], "expected `)`")
        self.tokens.pop(0)
        self.depth -= 1
        return inside

    def _comparison(self) -> _Comparison:
        key = self._take("key", "expected a key of the report, such as sharpness.lower")
        if key.text in ("and", "or"):
            raise self._fault(key, "expected a key of the report, such as sharpness.lower")
        if not _KEY.fullmatch(key.text):
            raise self._fault(key, "a key is names joined by dots, with [0], [1], … for lists")
        path = tuple(int(index) if index else name for name, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", key.text))
        if not _holds_a_number(path):
            raise self._fault(key, f"no report has a number at {key.text}")
        compare = self._take("operator", "expected >, >=, < or <=")
        threshold = self._take("number", "expected a number")
        value = float(threshold.text)
        if not math.isfinite(value):
            raise self._fault(threshold, "this number is too large for a float")
        return _Comparison(key.text, path, compare.text, value, f"{compare.text} {threshold.text}")

    def _take(self, kind: str, expected: str) -> _Token:
        if self.tokens[0].kind != kind:
            raise self._fault(self.tokens[0], expected)
        return self.tokens.pop(0)

    def _read(self) -> Iterator[_Token]:
        position, end = 0, len(self.expression.rstrip())
        while position < end:
            match = _TOKEN.match(self.expression, position)
            if match is None:
                blanks = len(self.expression[position:]) - len(self.expression[position:].lstrip())
                raise self._fault(_Token("none", "", position + blanks), "this is not part of the language of gates")
            kind = match.lastgroup or ""
            yield _Token(kind, match[kind], match.start(kind))
            position = match.end()
        yield _Token("end", "", end)

    def _fault(self, token: _Token, problem: str) -> UsageError:
        parts: dict[str, list[str]] = {}
        for key in keys():
            part, name = key.rsplit(".", 1)
            parts.setdefault(part, []).append(name)
        shown = re.sub(r"\s", " ", self.expression)  # one column each, so that the caret stands below
        listing = "\n".join(
            textwrap.fill(f"{part}: {', '.join(names)}", 100, initial_indent="  ", subsequent_indent="    ")
            for part, names in parts.items()
        )
        return UsageError(
            f"--fail-on: {problem}\n  {shown}\n  {' ' * token.position}^\n"
            f"A gate compares keys of the report with numbers (>, >=, <, <=), joined by and, or, ( ). Keys:\n{listing}"
        )
