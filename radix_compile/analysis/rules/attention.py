"""Attention as one op (``scaled_dot_product_attention``)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.rules.contractions import attend
from radix_compile.analysis.rules.masks import added_to_products, as_formula
from radix_compile.ir.axes import SEQ, Axes, Layout, Mixes, feature, has_tokens
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import And, Diff, Formula, Masked, Weights, implies_causal
from radix_compile.ir.value import Operand, Uses, Value, broadcast, value_of
from radix_compile.torch_internals import val


def fused_encoder_layer(node: fx.Node, layout: Layout) -> Value:
    raise Mixes(
        "a whole layer in one op: torch.backends.mha.set_fastpath_enabled(False) makes its parts visible",
        RefusalCode.FUSED_LAYER,
    )


def scaled_dot_product_attention(node: fx.Node, layout: Layout) -> Value:
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    q, k, v = value_of(query), value_of(key), value_of(value)
    if argument(node, "dropout_p"):
        raise Mixes("attention dropout is on", RefusalCode.DROPOUT)
    for name, source in (("query", q), ("key", k), ("value", v)):
        if not source.is_row or source.axes[-2] != (SEQ,) or has_tokens(source.axes[-1]):
            raise Mixes(
                f"the {name} of attention does not have one vector for each row", RefusalCode.ATTENTION_NOT_UNDERSTOOD
            )
    grouped = argument(node, "enable_gqa")
    for source in (q, k, v) if grouped else ():
        feature(source.axes[-3], "groups heads along")
    pairs = ((query, q), (key, k), (value, v))
    heads, _ = broadcast(layout, [Operand(arg, source, _leading(source, grouped)) for arg, source in pairs])
    leading = q.axes[:-2] if grouped else heads[:-2]
    scores = Operand(query, q, (*leading, (SEQ,), (SEQ,)))
    visible, uses = _visible(node, layout, scores)
    if not implies_causal(visible, -2, -1):
        if visible == And(()):
            raise Mixes("attention is bidirectional", RefusalCode.BIDIRECTIONAL)
        raise Mixes(
            "the attention mask lets a token see later ones (or is not understood)", RefusalCode.MASK_NOT_CAUSAL
        )
    mask = argument(node, "attn_mask")
    keys = (k, v) if mask is None else (k, v, value_of(mask))
    attended = attend((*leading, (SEQ,), v.axes[-1]), Weights(visible, -2, -1), *keys)
    return replace(attended, operands=uses)


def _leading(value: Value, grouped: bool) -> Axes:
    """Return the axes without tokens and features, to broadcast. (With ``enable_gqa`` the numbers of heads differ.)"""
    leading = (*value.axes[:-3], ()) if grouped else value.axes[:-2]
    return (*leading, (), ())


def _visible(node: fx.Node, layout: Layout, scores: Operand) -> tuple[Formula, Uses]:
    """Return the formula of the visible keys, and how the mask lines up with the scores (``Value.operands``)."""
    mask = argument(node, "attn_mask")
    if argument(node, "is_causal"):
        return Diff(-1, -2, 0), ()
    if mask is None:
        return And(()), ()
    marks = value_of(mask)
    _, uses = broadcast(layout, [scores, Operand(mask, marks, marks.axes)])
    if val(mask).dtype == torch.bool:
        return as_formula(marks), uses
    if isinstance(marks.fact, Masked) and added_to_products(marks.fact).is_certain:
        return marks.fact.visible, uses
    raise Mixes("the attention mask is not understood", RefusalCode.MASK_NOT_UNDERSTOOD)
