"""What the laws of a network, their account in training, and its flattest representative say in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_FLOOR
from typing import Any

from torchflat.numerals import confidence, count, number, span

__all__ = ["account_sentences", "coupling_cells", "law_rows", "laws_sentences", "orbit_sentences"]

# A headroom below this is not worth a rescaling.
NOTABLE = 1.05
# A law contradicted by so much of what it is made of does not hold.
LOOSE = 0.1


def orbit_sentences(orbit: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield how much of λ₁ rescaling explains, what is proved of λ₁★, and where the least is."""
    if not orbit or orbit["value"] is None or orbit["headroom"] is None:
        return
    value, between = span(orbit["after"]["value"], orbit["after"]["lower"], orbit["after"]["upper"])
    factor = number(orbit["headroom"], 3)
    where = f"the flattest that was found has λ₁★ = {value} {between}"
    if orbit["headroom"] >= NOTABLE:
        yield (
            f"Rescaling alone explains a factor {factor} of this sharpness: of the networks that compute the same "
            f"function, {where}."
        )
    else:
        yield f"Rescaling explains next to nothing of this sharpness (a factor {factor}): {where}."
    if orbit.get("before_from") == "orbit":
        before, interval = span(orbit["before"]["value"], orbit["before"]["lower"], orbit["before"]["upper"])
        yield f"λ₁ without rescaling is {before} {interval}, as the search for λ₁★ measured it on its way."
    yield _proof(orbit)
    if orbit["attained"] is False:
        yield (
            f"Some log-scales reached the bound of {number(orbit['max_log_scale'], 2)}: the least may lie beyond, or "
            "at infinity."
        )
    for row in orbit["frozen"]:
        yield f"Left as it is: {row['name']}: {row['reason']}."


def _proof(orbit: Mapping[str, Any]) -> str:
    level = confidence(orbit["confidence"])
    if orbit["lower"] is not None:
        why = {
            "gauss_newton": "the Gauss–Newton matrix is positive semidefinite",
            "semidefinite": "no negative curvature was found",
        }.get(orbit["proof"] or "", "the curvature is not negative")
        lower = number(orbit["lower"], rounding=ROUND_FLOOR)
        return f"No rescaling gets below {lower}: that is proved with {level}, because {why}."
    seen = orbit["negative"]
    part = "" if not seen else f" (down to {number(seen, 2)} λ₁ at the flattest point)"
    return f"That no rescaling gets lower is not proved, because the Hessian has negative curvature{part}."


def laws_sentences(laws: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what the laws of a network are: how many, which is least balanced, and what stopped the search."""
    if not laws:
        return
    rows = laws["couplings"]
    if not rows:
        yield "No rescaling of its parameters leaves the function of this network as it is."
    else:
        known = [row for row in rows if row["imbalance"] is not None]
        numbers = _many(sum(row["laws"] for row in rows), "number is", "numbers are")
        said = f"{numbers} conserved along gradient flow, in {_many(len(rows), 'coupling')}"
        if known:
            worst = max(known, key=lambda row: row["imbalance"])
            said += f"; the least balanced is {worst['name']}, at {number(worst['imbalance'], 2)} of 1"
        yield f"{said}."
        yield from _centred_sentence(rows)
    loose = [row for row in laws["approximate"] if (row["residual"] or 0) >= LOOSE]
    if loose:
        worst = max(loose, key=lambda row: row["residual"])
        yield (
            f"{_many(len(loose), 'law means', 'laws mean')} nothing here of the {count(len(laws['approximate']))} that "
            f"hold as ε → 0, {worst['name']} least of all (residual {number(worst['residual'], 2)} of 1): the variance "
            "that is normalised there is not large beside ε."
        )
    for row in laws["unknown"]:
        yield f"There is no rule for {row['operator']} (at {row['place']}): what it touches was taken to be fixed."
    for row in laws["dropped"]:
        yield f"Dropped, because a gradient contradicts it: {row['name']} (residual {number(row['residual'], 2)})."


def _centred_sentence(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    centred = [row for row in rows if row["kind"] == "centred"]
    if centred:
        parameter, buffer = next(iter(centred[0]["centres"].items()))
        yield (
            f"In {_many(len(centred), 'coupling')} of kind centred a bias b counts from the fixed mean μ that is "
            f"subtracted from it: |w|² + (b − μ)² − |readers|² is conserved; in {centred[0]['name']} b − μ is "
            f"{parameter} − {buffer}."
        )


def account_sentences(part: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield whether the steps of training explain how the conserved quantities changed, and where not."""
    if not part or not part["rows"]:
        return
    kept = [row for row in part["rows"] if not row["refused"]]
    broken = [row for row in kept if row["unexplained"] > 1]
    steps = count(part["steps"])
    if kept and not broken:
        worst = max(row["unexplained"] for row in kept)
        many = f"{count(len(kept))} conserved quantities" if len(kept) > 1 else "conserved quantity"
        yield (
            f"The {many} of which there is an account changed in {steps} steps by what the lengths of the steps "
            f"explain, up to {number(worst, 2)} of what rounding may do: nothing else moved these parameters."
        )
    for row in broken:
        yield (
            f"The conservation law {row['name']} was broken by something other than the size of the steps: it changed "
            f"by {number(row['drift'], 3)} in {steps} steps, which explain {number(row['explained'], 3)}; what is left "
            f"is {number(row['unexplained'], 2)} times what rounding may do."
        )
    if broken and not part["same_point"]:
        yield (
            "The norm of the parameters is not the one that the tracker's state was saved with: they are of another "
            "step, or were changed after training."
        )
    for reason in dict.fromkeys(row["refused"] for row in part["rows"] if row["refused"]):
        names = [row["name"] for row in part["rows"] if row["refused"] == reason]
        others = f" and {count(len(names) - 1)} more" if len(names) > 1 else ""
        yield f"There is no account of {names[0]}{others}: {reason}."


def coupling_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    """Return kind, channels, laws, imbalance, |writers|/|readers| and degenerate channels of a coupling, in words."""
    ratios = row["ratios"]
    between = "–" if ratios is None else _range(ratios)
    return (
        row["kind"],
        count(row["channels"]),
        count(row["laws"]),
        number(row["imbalance"], 2),
        between,
        count(row["degenerate"]) if row["degenerate"] else "",
    )


def law_rows(laws: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield the table of all laws: name, kind, channels, laws, imbalance, and |writers|/|readers| or a remark."""
    yield "law", "kind", "channels", "laws", "imbalance", "|writers|/|readers|"
    for row in laws["couplings"]:
        *cells, between, degenerate = coupling_cells(row)
        yield (row["name"], *cells, f"{between}; {degenerate} degenerate" if degenerate else between)
    for row in laws["linear"]:
        yield row["name"], "linear", "", count(row["laws"]), "", ""
    for row in laws["approximate"]:
        kind, channels, numbers, imbalance, *_ = coupling_cells(row)
        yield row["name"], kind, channels, numbers, imbalance, f"as ε → 0; here to {number(row['residual'], 2)}"


def _range(ratios: Sequence[float]) -> str:
    low, high = number(ratios[0], 2), number(ratios[-1], 2)
    return low if low == high else f"{low} to {high}"


def _many(number_of: int, one: str, more: str | None = None) -> str:
    return f"{count(number_of)} {one if number_of == 1 else more or one + 's'}"
