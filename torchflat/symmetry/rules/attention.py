"""Scaled dot-product attention as one operator."""

from __future__ import annotations

from typing import Any

from torchflat.symmetry.forms import Form
from torchflat.symmetry.rules.contractions import contract
from torchflat.symmetry.units import Units, rule

__all__: list[str] = []


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
)
def _attention(
    u: Units,
    q: Form,
    k: Form,
    v: Form,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Form:
    """softmax(Q Kᵀ + mask) V: the scores must stay, and all values that are averaged scale alike."""
    if enable_gqa:
        k, v = (
            x.map(
                lambda labels: labels.repeat_interleave(q.shape[-3] // labels.shape[-3], -3),
                (*q.shape[:-2], *x.shape[-2:]),
            )
            for x in (k, v)
        )
    rank = len(q.shape)
    queries, keys = (x.map(lambda labels, at=at: labels.unsqueeze(at)) for x, at in ((q, -2), (k, -3)))  # type: ignore[misc]
    scores = contract(u, queries, keys, {rank}, lambda labels: labels, lambda labels: labels)
    u.zero(scores)
    if isinstance(mask, Form):
        u.zero(mask)
    u.mixing.fibres(v, {rank - 1})
    return u.alike(v, {rank - 2})
