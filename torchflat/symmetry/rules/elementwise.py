"""Functions of single entries, and sums, products and choices of entries in the same place."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from torchflat.symmetry.forms import Form
from torchflat.symmetry.units import Units, rule

__all__: list[str] = []

Operand = Form | Tensor | int | float | bool | None


@rule("relu", "leaky_relu", "abs")
def _homogeneous(u: Units, x: Form, *_: Any) -> Form:
    """f(t x) = t f(x) for t > 0."""
    return u.separate(x)


@rule("neg", "clone", "alias", "detach", "positive", "_to_copy", "contiguous", "lift_fresh_copy", "_conj")
def _linear(u: Units, x: Form, *_: Any, **__: Any) -> Form:
    return x


@rule("_prelu_kernel", "prelu")
def _prelu(u: Units, x: Form, slope: Form) -> Form:
    """Slopes must stay, because the positive side does not see them."""
    u.zero(slope)
    return u.separate(x)


@rule(
    *("gelu", "silu", "mish", "elu", "selu", "celu", "softplus", "sigmoid", "tanh", "hardtanh", "hardswish"),
    *("hardsigmoid", "log_sigmoid_forward", "erf", "exp", "expm1", "log", "log1p", "log2", "log10", "sin", "cos"),
    *("tan", "atan", "sinh", "cosh", "threshold", "round", "floor", "ceil", "trunc", "exp2", "asin", "acos"),
    *("asinh", "acosh", "atanh", "erfc", "logit", "softshrink", "hardshrink", "_softmax", "_log_softmax"),
    *("logsumexp", "_safe_softmax"),
)
def _inhomogeneous(u: Units, x: Form, *_: Any, **__: Any) -> None:
    """f(t x) is no power of t: the argument must stay as it is."""
    u.zero(x)


@rule("sign", "heaviside")
def _sign(u: Units, x: Form, *_: Any) -> None:
    u.separate(x)


@rule("clamp", "clamp_min", "clamp_max")
def _clamp(u: Units, x: Form, low: Operand = None, high: Operand = None) -> Form | None:
    bounds = (low, high)
    # F.normalize divides by max(|x|, ε).
    if all(_scale_free(bound) for bound in bounds if bound is not None) or (u.limit and high is None and _small(low)):
        return u.separate(x)
    for bound in bounds:
        u.zero(bound) if isinstance(bound, Form) else None
    u.zero(x)
    return None


@rule("add", "sub", "rsub")
def _add(u: Units, x: Operand, y: Operand, *_: Any, **scale: Any) -> Form | None:
    return _alike(u, x, y)


@rule("maximum", "minimum", "fmax", "fmin")
def _maximum(u: Units, x: Operand, y: Operand) -> Form | None:
    for side in (x, y):
        u.separate(side) if isinstance(side, Form) else None
    return _alike(u, x, y)


def _alike(u: Units, x: Operand, y: Operand) -> Form | None:
    """Return the units of what both are added, compared or chosen from; literals other than 0 have none."""
    forms = [side for side in (x, y) if isinstance(side, Form)]
    literals = [side for side in (x, y) if not isinstance(side, Form) and side is not None]
    if len(forms) == 2:
        return u.equal(*forms)
    if all(_scale_free(value) for value in literals) or (u.limit and _guards_a_division(u, literals)):
        return forms[0]
    u.zero(forms[0])
    return None


def _scale_free(value: Operand) -> bool:
    return isinstance(value, (int, float)) and (value == 0 or math.isinf(value))


def _small(value: Operand) -> bool:
    return isinstance(value, float) and 0 < value <= 1e-3


def _guards_a_division(u: Units, literals: list[Any]) -> bool:
    """Tell whether this adds an ε under a root or in a denominator."""
    assert u.node is not None
    roots = ("rsqrt", "sqrt", "pow", "reciprocal", "div")
    return all(map(_small, literals)) and all(str(user.target).split(".")[1] in roots for user in u.node.users)


@rule("mul")
def _mul(u: Units, x: Operand, y: Operand) -> Form | None:
    return _times(u, x, y, 1.0)


@rule("div")
def _div(u: Units, x: Operand, y: Operand, rounding_mode: str | None = None) -> Form | None:
    if rounding_mode is not None:
        for side in (x, y):
            u.zero(side) if isinstance(side, Form) else None
        return None
    return _times(u, x, y, -1.0)


def _times(u: Units, x: Operand, y: Operand, power: float) -> Form | None:
    """Return the units of x · y^power. Where y varies along an axis, x cannot be mixed along it, and vice versa."""
    if isinstance(x, Form) and isinstance(y, Form):
        for one, other in ((x, y), (y, x)):
            lead = len(one.shape) - len(other.shape)
            u.mixing.fibres(
                one, {axis for axis in range(len(one.shape)) if axis < lead or other.shape[axis - lead] == 1}
            )
        return x + y.scaled(power)
    if isinstance(x, Form):
        return x
    return u.separate(y).scaled(power) if isinstance(y, Form) else None


@rule("reciprocal")
def _reciprocal(u: Units, x: Form) -> Form:
    return u.separate(x).scaled(-1.0)


@rule("sqrt")
def _sqrt(u: Units, x: Form) -> Form:
    return u.separate(x).scaled(0.5)


@rule("rsqrt")
def _rsqrt(u: Units, x: Form) -> Form:
    return u.separate(x).scaled(-0.5)


@rule("square")
def _square(u: Units, x: Form) -> Form:
    return u.separate(x).scaled(2.0)


@rule("pow")
def _pow(u: Units, x: Operand, exponent: Operand) -> Form | None:
    if isinstance(x, Form) and isinstance(exponent, (int, float)):
        return u.separate(x).scaled(float(exponent))
    for side in (x, exponent):
        u.zero(side) if isinstance(side, Form) else None
    return None


@rule("where")
def _where(u: Units, condition: Any, x: Operand, y: Operand) -> Form | None:
    for side in (x, y):
        u.separate(side) if isinstance(side, Form) else None
    return _alike(u, x, y)


@rule("masked_fill")
def _masked_fill(u: Units, x: Form, mask: Any, value: Operand) -> Form | None:
    u.separate(x)
    return _alike(u, x, value)


@rule("gt", "lt", "ge", "le", "eq", "ne")
def _compare(u: Units, x: Operand, y: Operand) -> None:
    for side in (x, y):
        u.separate(side) if isinstance(side, Form) else None
    _alike(u, x, y)


@rule("native_dropout")
def _dropout(u: Units, x: Form, p: float, training: bool | None) -> tuple[Form, None]:
    return (u.separate(x) if p and training else x), None


@rule("dropout", "alpha_dropout")
def _maybe_dropout(u: Units, x: Form, p: float, training: bool) -> Form:
    return u.separate(x) if p and training else x
