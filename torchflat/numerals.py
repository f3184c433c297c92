"""Numbers and names as people read them: rounded as far as they are known, in as few columns as they need."""

from __future__ import annotations

import decimal
import unicodedata
from decimal import Decimal

__all__ = ["columns", "confidence", "count", "duration", "memory", "number", "printable", "share", "shorten", "span"]


def number(
    value: float | None, digits: int = 4, place: int | None = None, rounding: str = decimal.ROUND_HALF_EVEN
) -> str:
    """Return ``value`` rounded to ``digits`` significant digits, or to fewer if ``10**place`` is the last to be shown.

    Two digits are always left. Numbers below 1e-4, from 1e6 on, or without a digit at the units are written with an
    exponent; an unknown number is a dash.

    >>> number(3.46729), number(3.46729, place=-1), number(4.6e-12), number(-123456.7), number(None)
    ('3.467', '3.5', '4.600e-12', '-1.235e5', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    exact = Decimal(repr(value))
    leading = exact.adjusted()
    last = leading - digits + 1 if place is None else min(max(place, leading - digits + 1), leading - 1)
    rounded = exact.quantize(Decimal(1).scaleb(last), rounding=rounding)
    leading = rounded.adjusted()
    if last <= 0 and -4 <= leading < 6:
        return f"{rounded:f}"
    return f"{rounded.scaleb(-leading):f}e{leading}"


def span(value: float | None, lower: float | None, upper: float | None, digits: int = 6) -> tuple[str, str]:
    """Return a number and its interval with the digits that the width of the interval supports, and one more.

    The bounds are rounded outwards, so that the interval that is shown holds whenever the true one does.

    >>> span(3.46729, 3.4603, 3.4709)
    ('3.467', '[3.460, 3.471]')
    >>> span(3.46729, 3.4603, None)
    ('3.467', '[3.460, ∞)')
    """
    if lower is None or upper is None:
        digits, place = min(digits, 4), None
    elif upper == lower:
        place = None
    else:
        # In Decimal: the difference of two huge floats of opposite sign can overflow.
        place = (Decimal(repr(upper)) - Decimal(repr(lower))).adjusted() - 1
    low = "(−∞" if lower is None else "[" + number(lower, digits, place, decimal.ROUND_FLOOR)
    high = "∞)" if upper is None else number(upper, digits, place, decimal.ROUND_CEILING) + "]"
    return number(value, digits, place), f"{low}, {high}"


def confidence(value: float | None) -> str:
    """Return a probability in per cent, rounded down: 0.99 is ``99 %``, and nothing below 1 becomes ``100 %``."""
    if value is None:
        return "–"
    percent = (100 * Decimal(repr(value))).quantize(Decimal("0.01"), rounding=decimal.ROUND_FLOOR)
    return f"{percent.normalize():f} %"


def count(value: float | None) -> str:
    """Return a count with separators; fractions (half a pass) keep one decimal. ``12,345``, ``17.5``, ``–``."""
    if value is None:
        return "–"
    if value >= 1e12:
        return number(value)
    return f"{value:,.1f}".removesuffix(".0")


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it: ``0.42 s``, ``12.4 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{count(whole // 3600)} h {whole % 3600 // 60} min"


def memory(size: float | None) -> str:
    """Return a number of bytes in binary units: ``512 B``, ``1.5 GiB``."""
    if size is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def share(value: float | None) -> str:
    """Return a share (0 to 1) in per cent: ``37 %``, ``<1 %``."""
    if value is None:
        return "–"
    return "<1 %" if 0 < value < 0.005 else f"{100 * min(value, 1):.0f} %"


def printable(text: str) -> str:
    """Return ``text`` on one line, with what a terminal would obey rather than show replaced by ``�``."""
    return "".join(character if character.isprintable() else "�" for character in " ".join(text.split()))


def shorten(text: str, width: int) -> str:
    """Return ``text``, printable, in at most ``width`` columns: the middle of what is longer becomes ``…``.

    >>> shorten("transformer.layers.11.attention.query.weight", 24)
    'transformer…query.weight'
    """
    text = printable(text)
    if columns(text) <= width:
        return text
    head = tail = ""
    while True:
        longer = (head + text[len(head)], tail) if len(head) < len(tail) else (head, text[-1 - len(tail)] + tail)
        if columns("".join(longer)) + 1 > width:
            return f"{head}…{tail}"
        head, tail = longer


def columns(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
