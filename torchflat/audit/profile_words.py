"""What the flatness profile in a report says, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchflat.numerals import number

__all__ = ["order_words", "profile_sentences", "radius_words"]


def profile_sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the profile of a report says: its order, how far it was followed, and the two radii."""
    part = report.get("variation")
    if not part or not part["radii"]:
        return
    norm = report.get("point", {}).get("parameter_norm")
    order = order_words(part["order"])
    if order:
        yield f"For small r the loss changes by at most {order} within a distance r of this point."
    if part["values"][-1] is not None:
        furthest = radius_words(part["radii"][-1], norm)
        yield f"Within {furthest} it changes by at most {number(part['values'][-1])}, as far as the search found."
    if part.get("curvature_radius") is not None:
        yield f"Curvature shows beyond {radius_words(part['curvature_radius'], norm)}."
    if part.get("doubling_radius") is not None:
        how = "doubled" if part["signs"][-1] > 0 else "changed by its own size"
        yield f"The loss can have {how} at {radius_words(part['doubling_radius'], norm)}."


def order_words(order: Mapping[str, Any] | None) -> str:
    """Return a·r^p in words, such as ``0.137 r`` or ``about 2.3 r^1.9``."""
    if order is None or order["p"]["value"] is None:
        return ""
    p, about = order["p"]["value"], "" if order["exact"] else "about "
    power = "r" if p == 1 else f"r^{p:.3g}"
    return f"{about}{number(order['modulus']['value'])} {power}"


def radius_words(radius: float, norm: float | None) -> str:
    """Return ``r = 0.0123 (0.41 % of |x|)``: a distance, and its share of the norm of the parameters."""
    share = f" ({number(100 * radius / norm, 2)} % of |x|)" if norm else ""
    return f"r = {number(radius, 3)}{share}"
