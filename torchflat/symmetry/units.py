"""Units inference: an interpreter that carries log-scales, in place of numbers, through an exported graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from torchflat.symmetry.equations import Equations
from torchflat.symmetry.forms import Form, compact
from torchflat.symmetry.mixing import Mixing

__all__ = ["RULES", "Rule", "Units", "Weight", "rule"]


@dataclass(frozen=True)
class Rule:
    """An entry of the table. ``lazy``: it takes parameters that have no units yet as they are, as :class:`Weight`."""

    apply: Callable[..., Any]
    lazy: bool


RULES: dict[str, Rule] = {}


def rule(*operators: str, lazy: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table: ``@rule("relu", "neg")`` for all overloads of these ATen operators.

    It is called with the interpreter and the operator's own arguments, forms in the place of floating tensors, and
    returns a form that broadcasts to the result, or a tuple where the operator has several. None stands for tensors
    that carry no units: integers, booleans, statistics nobody uses.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for operator in operators:
            RULES[operator] = Rule(function, lazy)
        return function

    return enter


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, or a view of it, that nothing has given units yet: ``view`` is the view, on the meta device."""

    name: str
    view: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the view."""
        return self.view.shape


@dataclass
class Units:
    """What the rules share: equations, the mixing partition, and the units of the parameters as they come to be known.

    ``limit`` takes the ε of normalisations for zero. ``centres`` names the fixed means that biases count from, and
    ``subtracting`` the calls that subtract these. ``node`` is the call that is being interpreted.
    """

    limit: bool = False
    centres: Mapping[str, str] = field(default_factory=dict)
    subtracting: frozenset[fx.Node] = frozenset()
    equations: Equations = field(default_factory=Equations)
    mixing: Mixing = field(default_factory=Mixing)
    parameters: dict[str, Form] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    node: fx.Node | None = None
    _partial: dict[str, tuple[Tensor, list[tuple[float, Tensor]]]] = field(default_factory=dict)

    # What rules are made of.

    def zero(self, form: Form) -> None:
        """Pin: demand that nothing here is rescaled."""
        self.equations.zero(form)

    def equal(self, a: Form, b: Form) -> Form:
        """Demand that two tensors that are added, joined or compared scale alike; return the form of the result."""
        self.zero(a - b)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        simple = min((a, b), key=lambda form: (len(form.axes()), len(form.terms)))
        return simple.expand(shape)

    def alike(self, form: Form, axes: set[int]) -> Form:
        """Demand equal units along ``axes``; return the form without them, as axes of size 1."""
        first = form.first(axes)
        if axes & form.axes():
            self.zero(form - first.expand(form.shape))
        return first

    def separate(self, form: Form) -> Form:
        """Say that a function acts on every entry by itself, so that its channels cannot be mixed; return the form."""
        self.mixing.separate(form)
        return form

    def fresh(self, shape: tuple[int, ...] | torch.Size, axes: set[int] | None = None) -> Form:
        """Return the form of new variables, one for each index along ``axes``."""
        return Form.of(self.equations.fresh(tuple(shape), axes))

    def simple(self, form: Form) -> Form:
        """Name a sum of terms by new variables, so that what uses it next sees one term."""
        if len(form.terms) < 2:
            return form
        named = self.fresh(form.shape, form.axes())
        self.zero(form - named)
        return named

    # The units of parameters.

    def form(self, value: Form | Weight) -> Form:
        """Return the units of a weight, new ones for each entry that has none yet."""
        if isinstance(value, Form):
            return value
        known = self.known(value)
        return known if known is not None else self.assign(value, self.fresh(value.shape))

    def known(self, weight: Weight) -> Form | None:
        """Return the units of a weight, or None if no entry of the view has any."""
        whole = self.parameters.get(weight.name)
        if whole is not None:
            return whole.map(lambda labels: _view(labels, weight.view), weight.shape)
        if weight.name not in self._partial:
            return None
        assigned, _ = self._partial[weight.name]
        inside = _view(assigned, weight.view)
        if not bool(inside.any()):
            return None
        if not bool(inside.all()):
            self._fill(weight, inside)
        _, terms = self._partial[weight.name]
        found = tuple((c, compact(_view(labels, weight.view))) for c, labels in terms)
        return Form(weight.shape, tuple((c, labels) for c, labels in found if bool(labels.any())))

    def assign(self, weight: Weight, form: Form) -> Form:
        """Give a view of a parameter that has no units yet the units ``form``; return them."""
        base = weight.view._base if weight.view._base is not None else weight.view
        if base is weight.view:
            self.parameters[weight.name] = form
            return form
        number = base.numel()
        assigned, terms = self._partial.setdefault(weight.name, (torch.zeros(number, dtype=torch.bool), []))
        _strided(assigned, weight.view).fill_(True)
        free = list(range(len(terms)))
        for c, labels in form.terms:
            slot = next((i for i in free if terms[i][0] == c), None)
            if slot is None:
                terms.append((c, torch.zeros(number, dtype=torch.int64)))
                slot = len(terms) - 1
            else:
                free.remove(slot)
            _strided(terms[slot][1], weight.view).copy_(labels)
        if bool(assigned.all()):
            del self._partial[weight.name]
            whole = tuple((c, compact(labels.view(base.shape))) for c, labels in terms)
            self.parameters[weight.name] = Form(base.shape, whole)
        return form

    def _fill(self, weight: Weight, inside: Tensor) -> None:
        """Give each entry of the view that has no units yet a variable of its own."""
        assigned, terms = self._partial[weight.name]
        rest = torch.zeros(len(assigned), dtype=torch.bool)
        _strided(rest, weight.view).copy_(~inside)
        labels = torch.zeros(len(assigned), dtype=torch.int64)
        labels[rest] = self.equations.fresh((int(rest.sum()),))
        terms.append((1.0, labels))
        assigned |= rest

    def close(self, shapes: dict[str, torch.Size]) -> None:
        """Settle parameters of which only a part was used: the rest does not count."""
        for name, (_, terms) in self._partial.items():
            self.parameters[name] = Form(shapes[name], tuple((c, compact(t.view(shapes[name]))) for c, t in terms))
        self._partial.clear()


def _view(labels: Tensor, view: Tensor) -> Tensor:
    return _strided(labels.contiguous().view(-1), view) if view._base is not None else labels


def _strided(flat: Tensor, view: Tensor) -> Tensor:
    return flat.as_strided(view.shape, view.stride(), view.storage_offset())
