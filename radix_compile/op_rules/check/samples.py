"""What each row of the rule table is executed on, and the verdict that is expected.

A sample is a function of a :class:`~.recorder.Recorder` ``t`` (its inputs, and ``t(op, ...)`` to record one more op)
and of the op under test; it returns the result to compare. ``t.x`` is ``[B, S, D]``, ``t.heads`` is ``[B, H, S, E]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from radix_compile.op_rules.check.expert_samples import EXPERTS, by_token, experts, order_read_as_numbers
from radix_compile.op_rules.check.recorder import BATCH, FEATURES, HEADS, SEQ, Recorder

aten = torch.ops.aten
LOWEST = torch.finfo(torch.float64).min
Build = Callable[[Recorder, Any], fx.Node]


@dataclass(frozen=True)
class Sample:
    """``verdict`` on the op: "compact", "full", "pair", "constant", "arranged" or "refused", then for ``reason``."""

    build: Build
    verdict: str
    reason: str = ""


def compact(build: Build) -> Sample:
    return Sample(build, "compact")


def full(build: Build) -> Sample:
    """Determined, in full form only. (Later rows are perturbed, and earlier results must stay.)"""
    return Sample(build, "full")


def pair(build: Build) -> Sample:
    return Sample(build, "pair")


def constant(build: Build) -> Sample:
    return Sample(build, "constant")


def arranged(build: Build) -> Sample:
    """Rows in sorted order or numbers about it, other ones in compact form."""
    return Sample(build, "arranged")


def refused(reason: str, build: Build) -> Sample:
    return Sample(build, "refused", reason)


# ------------------------------------------------------------------------------------------ patterns of several rows


def unary(t: Recorder, op: Any) -> fx.Node:
    return t(op, t.x)


def on_mixed(t: Recorder, op: Any) -> fx.Node:
    """Two operands that line up in shape only: the sequences of one are heads of the other."""
    return t(op, t.heads, t(aten.transpose.int, t.heads, 0, 1))


def rolled(t: Recorder) -> fx.Node:
    """``[B, S, D]``, mixed: each row is a later one."""
    return t(aten.roll.default, t.x, [-1], [1])


def repeated_weight(t: Recorder) -> fx.Node:
    """``[B, D, D]``, the same matrix for every sequence."""
    return t(aten.expand.default, t.weight, [BATCH, FEATURES, FEATURES])


def head_weights(t: Recorder) -> fx.Node:
    """``[H, E, E]``"""
    return t(aten.add.Tensor, t.square, t(aten.reshape.default, t.sequences, [HEADS, 1, 1]))


def columns_weights(t: Recorder) -> fx.Node:
    """``[S, D, D]``, another matrix for each column."""
    return t(aten.mul.Tensor, t.weight, t(aten.unsqueeze.default, t.columns, 2))


def heads_bias(t: Recorder) -> fx.Node:
    """``[H, 1, S]``, a bias for each head and column."""
    return t(aten.mul.Tensor, t(aten.reshape.default, t.sequences, [HEADS, 1, 1]), t(aten.mT.default, t.columns))


def merged_heads(t: Recorder) -> tuple[fx.Node, fx.Node]:
    """``[B * H, S, E]`` and ``[B * H, E, S]``: queries and keys."""
    merged = t(aten.reshape.default, t.heads, [BATCH * HEADS, SEQ, SEQ])
    return merged, t(aten.transpose.int, merged, 1, 2)


def table_rows(t: Recorder) -> fx.Node:
    """``[B, S, D]``, for each row numbers of rows of a table that is as long as the sequence."""
    rows = t(aten.unsqueeze.default, t(aten.remainder.Scalar, t.ids, SEQ), 2)
    return t(aten.repeat.default, rows, [1, 1, FEATURES])


def same_table_rows(t: Recorder) -> fx.Node:
    """``[1, D, D]``, the same for all rows of the batch."""
    return t(aten.zeros.default, [1, FEATURES, FEATURES], dtype=torch.int64)


UNARY = [compact(unary), refused("no rule", lambda t, op: t(op, rolled(t)))]


def over_features(*args: Any, **kwargs: Any) -> Build:
    return lambda t, op: t(op, t.x, *args, **kwargs)


def first_of(*args: Any, **kwargs: Any) -> Build:
    return lambda t, op: t.item(t(op, t.x, *args, **kwargs), 0)


def second_of(*args: Any, **kwargs: Any) -> Build:
    return lambda t, op: t.item(t(op, t.x, *args, **kwargs), 1)


def reducing(dim: Any, other: Any, batch: Any) -> list[Sample]:
    """Over features; over columns; over sequences."""
    return [
        compact(over_features(dim, True)),
        compact(over_features(dim)),
        refused("reduces over the sequence", over_features(other)),
        refused("reduces over the batch", over_features(batch, True)),
    ]


def reducing_to_two(dim: int, other: int) -> list[Sample]:
    return [
        compact(first_of(dim, True)),
        compact(second_of(dim)),
        refused("reduces over the sequence", first_of(other)),
        refused("reduces over the batch", second_of(0)),
    ]


def truth(t: Recorder) -> fx.Node:
    return t(aten.gt.Scalar, t.x, 0)


def numbers(t: Recorder) -> fx.Node:
    """``[B, S, D]``, integers that are computed from x."""
    return t(aten._to_copy.default, t(aten.mul.Tensor, t.x, 10), dtype=torch.int64)


def reducing_all() -> list[Sample]:
    return [
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.square))),
        refused("reduces over", unary),
    ]


def reducing_truth(dim: int, other: int) -> list[Sample]:
    return [
        compact(lambda t, op: t(op, truth(t), dim)),
        refused("reduces over the sequence", lambda t, op: t(op, truth(t), other)),
    ]


def logic() -> list[Sample]:
    return [
        compact(lambda t, op: t(op, truth(t), t(aten.lt.Scalar, t.columns, 0.1))),
        compact(lambda t, op: t(op, numbers(t), numbers(t))),
        pair(lambda t, op: t(op, t.causal, t.same_token)),
        refused("lines up with the batch", lambda t, op: t(op, truth(t), t(aten.gt.Scalar, t.sequences, 0))),
    ]


def filling(*args: Any) -> list[Sample]:
    """A table of equal entries, one for each column and feature, where it meets rows and where it is joined to them."""
    return [
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, [SEQ, 1], *args, dtype=torch.float64))),
        constant(lambda t, op: t(aten.cat.default, [t.x, t(op, [BATCH, SEQ, 1], *args, dtype=torch.float64)], 2)),
    ]


def filling_new(*args: Any) -> list[Sample]:
    return [
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.x, [SEQ, 1], *args))),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, rolled(t), [SEQ, 1], *args))),  # its values are not read
    ]


def filling_like(*args: Any) -> list[Sample]:
    return [compact(over_features(*args)), refused("no rule", lambda t, op: t(op, rolled(t), *args))]


def written_over(t: Recorder, op: Any) -> fx.Node:
    """As multi-head latent attention joins the two parts of its keys."""
    like = (t.x,) if op is aten.new_empty.default else ()
    options = {} if like else {"dtype": torch.float64}
    empty = t(op, *like, [BATCH, SEQ, 2 * FEATURES], **options)
    half = t(aten.slice_scatter.default, empty, t.x, 2, 0, FEATURES)
    return t(aten.slice_scatter.default, half, t.x, 2, FEATURES, 2 * FEATURES)


def encoder_layer(t: Recorder, op: Any) -> fx.Node:
    x, weight, bias = (t(aten.detach.default, one) for one in (t.x, t.weight, t.bias))  # it has no gradient
    three = t(aten.cat.default, [weight] * 3, 0), t(aten.cat.default, [bias] * 3, 0)
    return t(op, x, FEATURES, 2, *three, weight, bias, True, True, 1e-5, *[bias] * 4, weight, bias, weight, bias)


def triangle(t: Recorder, op: Any, size: list[int], diagonal: int = 0) -> fx.Node:
    return t(op, t(aten.full.default, size, 1.0, dtype=torch.float64), diagonal)


def triangles(causal_mask: Build) -> list[Sample]:
    return [
        constant(lambda t, op: t(aten.add.Tensor, t.x, triangle(t, op, [SEQ, FEATURES], 1))),
        constant(causal_mask),
        compact(lambda t, op: t(op, t.wide)),
        pair(lambda t, op: t(op, t.scores)),
        refused("takes a triangle of the sequence", lambda t, op: t(op, t.x)),
    ]


def shown_by_tril(t: Recorder, op: Any) -> fx.Node:
    hidden = t(aten.eq.Scalar, triangle(t, op, [SEQ, SEQ]), 0)
    return t(aten.softmax.int, t(aten.masked_fill.Scalar, t.scores, hidden, float("-inf")), -1)


def hidden_by_triu(t: Recorder, op: Any) -> fx.Node:
    mask = t(op, t(aten.full.default, [SEQ, SEQ], float("-inf"), dtype=torch.float64), 1)
    return t(aten.softmax.int, t(aten.add.Tensor, t.scores, mask), -1)


def with_sinks(t: Recorder, scores: fx.Node) -> fx.Node:
    """``[B, H, S, S + 1]``."""
    by_head = t(aten.view.default, t(aten.slice.Tensor, t.bias, 0, 0, HEADS), [1, HEADS, 1, 1])
    return t(aten.cat.default, [scores, t(aten.expand.default, by_head, [BATCH, HEADS, SEQ, 1])], -1)


def centred(t: Recorder, scores: fx.Node, largest: Any = aten.amax.default) -> fx.Node:
    by_row = t(largest, scores, [-1], True) if largest is aten.amax.default else t.item(t(largest, scores, -1, True), 0)
    return t(aten.sub.Tensor, scores, by_row)


def weighted(t: Recorder, weights: fx.Node) -> fx.Node:
    """Without those of the sinks."""
    return t(aten.matmul.default, t(aten.slice.Tensor, weights, 3, 0, SEQ), t.heads)


def sinks(floor: float = float("-inf"), largest: Any = aten.amax.default) -> Build:
    """Attention with sinks, as GPT-OSS has it written out."""

    def build(t: Recorder, op: Any) -> fx.Node:
        scores = centred(t, with_sinks(t, t.masked(t.causal, floor)), largest)
        return weighted(t, t(aten.softmax.int, scores, -1))

    return build


def which_key(t: Recorder, op: Any) -> fx.Node:
    return t.item(t(op, t.masked(t.causal), -1, True), 1)


def of_masked(dim: int, keep: bool = True, bound: int = 0) -> Build:
    """The largest scores along a dimension."""

    def build(t: Recorder, op: Any) -> fx.Node:
        return t(op, t.masked(t.key_minus_query_at_most(bound)), [dim], keep)

    return build


def attention(mask: Callable[[Recorder], fx.Node] | None = None, **kwargs: Any) -> Build:
    def build(t: Recorder, op: Any) -> fx.Node:
        return t(op, t.heads, t.heads, t.heads, mask(t) if mask else None, **kwargs)

    return build


def grouped_attention(t: Recorder, op: Any) -> fx.Node:
    pairs = t(aten.slice.Tensor, t.heads, 1, 0, HEADS // 2)
    return t(op, t.heads, pairs, pairs, None, is_causal=True, enable_gqa=True)


def grouped_over_sequences(t: Recorder, op: Any) -> fx.Node:
    """Three dimensions, so that the "heads" to group are sequences."""
    twice = t(aten.reshape.default, t(aten.stack.default, [t.x, t.x]), [2 * BATCH, SEQ, FEATURES])
    return t(op, twice, t.x, t.x, None, is_causal=True, enable_gqa=True)


def padded(t: Recorder) -> fx.Node:
    return t(aten.__and__.Tensor, t.causal, t.visible_keys)


def additive(t: Recorder) -> fx.Node:
    return t(aten.where.Scalar, t.causal, 0.0, float("-inf"))


def table_of_numbers(t: Recorder) -> fx.Node:
    """``[B, S, D]``, indices into features."""
    return t(aten.remainder.Scalar, t(aten.abs.default, numbers(t)), FEATURES)


def packed(t: Recorder, runs: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Attention inside packed documents, of which ``runs`` makes the numbers from where positions break."""
    first = t(aten.sub.Tensor, t(aten.slice.Tensor, t.positions, 1, 0, 1), 1)
    breaks = t(aten.ne.Scalar, t(aten.diff.default, t.positions, 1, -1, first), 1)

    def meet(node: fx.Node, op: OpOverload) -> fx.Node:
        return t(op, t(aten.unsqueeze.default, node, 1), t(aten.unsqueeze.default, node, 2))

    visible = t(aten.__and__.Tensor, meet(runs(breaks), aten.eq.Tensor), meet(t.positions, aten.le.Tensor))
    scores = t(aten.matmul.default, t.x, t(aten.transpose.int, t.x, 1, 2))
    weights = t(aten.softmax.int, t(aten.where.ScalarOther, visible, scores, float("-inf")), -1)
    return t(aten.matmul.default, weights, t.x)


def packed_by(op: OpOverload) -> Build:
    return lambda t, _: packed(t, lambda breaks: t(op, breaks, -1))


def first_column_less_one(t: Recorder, node: fx.Node) -> fx.Node:
    return t(aten.sub.Tensor, t(aten.slice.Tensor, node, 1, 0, 1), 1)


def column_numbers(t: Recorder, size: int, dim: int, rank: int) -> fx.Node:
    node = t(aten.arange.default, size)
    return t(aten.view.default, node, [size if d == dim else 1 for d in range(rank)])


def counted(t: Recorder, op: Any) -> fx.Node:
    """``x[i, j, k]`` with indices that count: every entry stays where it is."""
    sizes = (BATCH, SEQ, FEATURES)
    return t(op, t.x, [column_numbers(t, size, dim, 3) for dim, size in enumerate(sizes)])


def counted_from_one(t: Recorder, op: Any) -> fx.Node:
    later = t(aten.clamp.default, t(aten.add.Tensor, column_numbers(t, SEQ, 1, 3), 1), None, SEQ - 1)
    return t(op, t.x, [column_numbers(t, BATCH, 0, 3), later, column_numbers(t, FEATURES, 2, 3)])


def swapped(t: Recorder, op: Any) -> fx.Node:
    """Columns and features change places."""
    sizes = ((BATCH, 0), (SEQ, 2), (FEATURES, 1))
    return t(op, t.x, [column_numbers(t, size, dim, 3) for size, dim in sizes])


def swaps(op_on_x: Build, op_on_square: Build) -> list[Sample]:
    return [compact(op_on_x), constant(op_on_square)]


VIEW_REFUSED = refused("no rule", lambda t, op: t(op, rolled(t)))
MERGED = [BATCH * SEQ, FEATURES]


def shaped(shape: list[int]) -> Build:
    return lambda t, op: t(op, t.x, shape)


RESHAPE = [
    compact(shaped(MERGED)),
    compact(shaped([BATCH, SEQ, 2, 3])),
    compact(shaped([BATCH, SEQ * FEATURES])),
    compact(lambda t, op: t(op, t(aten.view.default, t.x, MERGED), [BATCH, SEQ, FEATURES])),
    compact(lambda t, op: t(op, t(aten.view.default, t.x, [BATCH * SEQ * FEATURES]), [BATCH * SEQ, 2, 3])),
    refused("cuts through a token axis", shaped([SEQ, BATCH, FEATURES])),
    refused("cuts through a token axis", shaped([2, 2, SEQ, FEATURES])),
]

SORTED = [
    compact(first_of(-1, False)),
    compact(second_of(-1, True)),
    refused("sorts along the sequence", first_of(1, False)),
    refused("sorts along the batch", second_of(0, False)),
    arranged(experts()),
]


def sorted_ties(t: Recorder, op: Any) -> fx.Node:
    """The order of equal entries counts them: where the source is uniform the result is not."""
    ties = t(aten.full.default, [SEQ], 1.0, dtype=torch.float64)
    return t(aten.add.Tensor, t.x, t(aten.unsqueeze.default, t.item(t(op, ties, stable=True, dim=0), 1), 1))


# -------------------------------------------------------------------------------------------------------- the table

SAMPLES: dict[OpOverload | str, list[Sample]] = {
    # ---- contractions
    aten.linear.default: [
        compact(lambda t, op: t(op, t.x, t.weight, t.bias)),
        compact(lambda t, op: t(op, t.wide, t.square)),
        constant(  # equal weights, but a bias that is not: transposed, it lines up with the columns
            lambda t, op: t(
                aten.add.Tensor,
                t.x,
                t(aten.t.default, t(op, t.square, t(aten.ones.default, [SEQ, SEQ], dtype=torch.float64), t.bias)),
            )
        ),
        refused("contracts the sequence", lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), t.weight)),
        refused(
            "contracts the batch",
            lambda t, op: t(op, t(aten.permute.default, t.x, [1, 2, 0]), t(aten.view.default, t.sequences, [1, BATCH])),
        ),
        refused("differ from row to row", lambda t, op: t(op, t.weight, t(aten.view.default, t.x, MERGED))),
    ],
    aten.mm.default: [
        compact(lambda t, op: t(op, t(aten.view.default, t.x, MERGED), t.weight)),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.square, t.weight))),
        refused(
            "sums over the rows",
            lambda t, op: t(
                op, t(aten.t.default, t(aten.view.default, t.x, MERGED)), t(aten.view.default, t.x, MERGED)
            ),
        ),
    ],
    aten.einsum.default: [
        compact(lambda t, op: t(op, "bsd,ed->bse", [t.x, t.weight])),
        compact(lambda t, op: t(op, "bsi,bsj->bsij", [t.x, t.x])),
        compact(lambda t, op: t(op, "bhse,hef->bhsf", [t.heads, head_weights(t)])),
        compact(lambda t, op: t(op, "bsd,d,bse->bsed", [t.x, t.bias, t.x])),
        compact(lambda t, op: t(op, "bsd->sb", [t.x])),
        pair(lambda t, op: t(op, "bhqe,bhke->bhqk", [t.heads, t.heads])),
        full(lambda t, op: t(op, "bhqk,bkhe->bqhe", [t.weights, t.wide])),
        full(lambda t, op: t(op, "bkhe,bhqk->bqhe", [t.wide, t.weights])),
        full(lambda t, op: t(op, "bhqk,bqhe->bqhe", [t.weights, t.wide])),
        refused("sums over the rows", lambda t, op: t(op, "bsd,bsd->bd", [t.x, t.x])),
        refused("sums over the rows", lambda t, op: t(op, "bhqk,bkhe->bqhe", [t.full_weights, t.wide])),
        refused("one value vector", lambda t, op: t(op, "bhqk,bkhe->bkhe", [t.weights, t.wide])),
        refused("one value vector", lambda t, op: t(op, "bhqk,bhkj->bhqj", [t.weights, t.scores])),
        refused("sums over the rows", lambda t, op: t(op, "bsd,bsd->sd", [t.x, t.x])),
        refused("different sequences", lambda t, op: t(op, "bsd,ase->bsa", [t.x, t.x])),
        refused("sums over the rows", lambda t, op: t(op, "bsd,bde->bse", [t.x, t.x])),
        refused(
            "table lines up", lambda t, op: t(op, "bsd,bed->bse", [t.x, t(aten.mul.Tensor, t.weight, t.sequences)])
        ),
        refused("table lines up", lambda t, op: t(op, "bsd,sde->bse", [t.x, columns_weights(t)])),
        refused("not read", lambda t, op: t(op, "...d,ed->...e", [t.x, t.weight])),
        refused("not read", lambda t, op: t(op, "bsd,ed", [t.x, t.weight])),
    ],
    aten.to.dtype: [
        compact(over_features(torch.float64)),
        refused("no rule", lambda t, op: t(op, rolled(t), torch.float32)),
    ],
    aten.to.dtype_layout: [
        compact(over_features(dtype=torch.float64)),
        refused("no rule", lambda t, op: t(op, rolled(t), dtype=torch.float32)),
    ],
    aten.baddbmm.default: [
        pair(lambda t, op: t(op, t.square, t.x, t(aten.transpose.int, t.x, 1, 2))),
        pair(lambda t, op: t(op, t.x, t.x, t(aten.transpose.int, t.x, 1, 2), beta=0.5, alpha=2)),
        pair(lambda t, op: t(op, t(aten.repeat.default, heads_bias(t), [BATCH, 1, 1]), *merged_heads(t))),
        refused(
            "table lines up with tokens and something else",
            lambda t, op: t(op, t(aten.repeat_interleave.self_int, heads_bias(t), BATCH, 0), *merged_heads(t)),
        ),
        refused("not one of queries and keys", lambda t, op: t(op, t.bias, t.x, repeated_weight(t))),
        refused("sums over the rows", lambda t, op: t(op, t.square, t(aten.transpose.int, t.x, 1, 2), t.x)),
        refused("table lines up with the batch", lambda t, op: t(op, t.sequences, t.x, t(aten.mT.default, t.x))),
    ],
    aten.bmm.default: [
        compact(lambda t, op: t(op, t.x, repeated_weight(t))),
        pair(lambda t, op: t(op, t.x, t(aten.transpose.int, t.x, 1, 2))),
        refused("sums over the rows", lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), t.x)),
        refused(
            "table lines up with the batch",
            lambda t, op: t(op, t.x, t(aten.mul.Tensor, t.weight, t.sequences)),
        ),
        refused(
            "lines up with tokens and something else",
            lambda t, op: t(
                op,
                t(aten.reshape.default, t.heads, [BATCH * HEADS, SEQ, SEQ]),
                t(aten.ones.default, [BATCH * HEADS, SEQ, SEQ], dtype=torch.float64),
            ),
        ),
    ],
    aten.matmul.default: [
        compact(lambda t, op: t(op, t.x, t.weight)),
        compact(lambda t, op: t(op, t.x, t.bias)),
        compact(lambda t, op: t(op, t.heads, t.weight)),
        compact(  # weights that differ from column to column
            lambda t, op: t(
                op,
                t(aten.unsqueeze.default, t.x, 2),
                t(aten.mul.Tensor, t.weight, t(aten.unsqueeze.default, t.columns, 1)),
            )
        ),
        pair(lambda t, op: t(op, t.heads, t(aten.transpose.int, t.heads, 2, 3))),
        full(lambda t, op: t(op, t.weights, t.heads)),
        full(lambda t, op: t(op, t(aten.div.Tensor, t.weights, 2.0), t.heads)),
        refused("sums over the rows", lambda t, op: t(op, t.full_weights, t.heads)),
        refused("sums over the rows", lambda t, op: t(op, t(aten.transpose.int, t.weights, 2, 3), t.heads)),
        refused("sums over the rows", lambda t, op: t(op, t.square, t.x)),
        refused("not one value vector for each row", lambda t, op: t(op, t.weights, t.weights)),
        refused("differs from row to row", lambda t, op: t(op, t.bias, t.x)),
        refused("mean different things", lambda t, op: t(op, t.heads, t(aten.permute.default, t.heads, [1, 0, 3, 2]))),
    ],
    aten.addmm.default: [
        compact(lambda t, op: t(op, t.bias, t(aten.view.default, t.x, MERGED), t.weight)),
        constant(
            lambda t, op: t(
                aten.add.Tensor,
                t.x,
                t(aten.t.default, t(op, t.bias, t.square, t(aten.ones.default, [SEQ, SEQ], dtype=torch.float64))),
            )
        ),
        refused("not a bias", lambda t, op: t(op, t.square, t.weight, t.weight)),
        refused(
            "weights differ",
            lambda t, op: t(
                op, t(aten.select.int, t.bias, 0, 0), t.weight, t(aten.t.default, t(aten.view.default, t.x, MERGED))
            ),
        ),
    ],
    aten.scaled_dot_product_attention.default: [
        full(attention(is_causal=True)),
        full(attention(lambda t: t.causal)),
        full(attention(lambda t: t.key_minus_query_at_most(0), scale=0.3)),
        full(attention(padded)),
        full(attention(additive)),
        full(grouped_attention),
        refused("bidirectional", attention()),
        refused("lets a token see later ones", attention(lambda t: t.key_minus_query_at_most(1))),
        refused("lets a token see later ones", attention(lambda t: t.visible_keys)),
        refused("which rows the mask leaves without a key", attention(lambda t: t.key_minus_query_at_most(-1))),
        refused("not understood", attention(lambda t: t.square)),
        refused("dropout is on", attention(is_causal=True, dropout_p=0.5)),
        refused("groups heads along the batch", grouped_over_sequences),
        refused("does not have one vector for each row", lambda t, op: t(op, t.wide, t.wide, t.wide, is_causal=True)),
    ],
    # ---- elementwise, by row
    aten.__and__.Tensor: logic(),
    aten.__and__.Scalar: [
        compact(lambda t, op: t(op, numbers(t), 3)),
        refused("no rule", lambda t, op: t(op, t(aten.gt.Scalar, rolled(t), 0), True)),
    ],
    aten.__or__.Tensor: logic(),
    aten.__or__.Scalar: [
        compact(lambda t, op: t(op, numbers(t), 3)),
        refused("no rule", lambda t, op: t(op, t(aten.gt.Scalar, rolled(t), 0), True)),
    ],
    aten.__xor__.Tensor: logic(),
    aten.type_as.default: [
        compact(lambda t, op: t(op, t.x, t.ids)),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.bias, t.x))),
        refused("no rule", lambda t, op: t(op, rolled(t), t.ids)),
    ],
    aten.complex.default: [
        compact(lambda t, op: t(aten.abs.default, t(op, t.x, t.x))),
        refused("no rule", lambda t, op: t(aten.abs.default, t(op, t.x, rolled(t)))),
    ],
    aten.polar.default: [
        compact(lambda t, op: t(aten.view_as_real.default, t(op, t(aten.exp.default, t.x), t.x))),
        refused("no rule", lambda t, op: t(aten.view_as_real.default, t(op, t.x, rolled(t)))),
    ],
    aten.softplus.default: UNARY,
    aten.where.ScalarOther: [
        compact(lambda t, op: t(op, truth(t), t.x, 0.5)),
        compact(lambda t, op: t(op, t(aten.gt.Scalar, t.columns, 0), t.x, 0.5)),
        refused("lines up with the batch", lambda t, op: t(op, t(aten.gt.Scalar, t.sequences, 0), t.x, 0.5)),
    ],
    aten.where.ScalarSelf: [
        compact(lambda t, op: t(op, truth(t), 0.5, t.x)),
        refused("lines up with the batch", lambda t, op: t(op, t(aten.gt.Scalar, t.sequences, 0), 0.5, t.x)),
    ],
    aten.where.Scalar: [
        compact(lambda t, op: t(op, truth(t), 1.0, -1.0)),
        refused("no rule", lambda t, op: t(op, t(aten.gt.Scalar, rolled(t), 0), 1.0, -1.0)),
    ],
    # ---- creation
    aten.arange.default: [
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(aten.unsqueeze.default, t(op, SEQ), 1))),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, FEATURES))),
    ],
    aten.arange.start: [
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(aten.unsqueeze.default, t(op, 2, 2 + SEQ), 1)))
    ],
    aten.arange.start_step: [
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(aten.unsqueeze.default, t(op, 0, 2 * SEQ, 2), 1)))
    ],
    aten.full.default: filling(0.5),
    aten.zeros.default: filling(),
    aten.ones.default: filling(),
    aten.scalar_tensor.default: [constant(lambda t, op: t(aten.mul.Tensor, t.x, t(op, 0.5, dtype=torch.float64)))],
    aten.new_full.default: filling_new(0.5),
    aten.new_zeros.default: filling_new(),
    aten.new_ones.default: filling_new(),
    aten.new_empty.default: [constant(written_over)],
    aten.empty.memory_format: [constant(written_over)],
    aten.full_like.default: filling_like(0.5),
    aten.zeros_like.default: filling_like(),
    aten.ones_like.default: filling_like(),
    aten.tril.default: triangles(shown_by_tril),
    aten.triu.default: triangles(hidden_by_triu),
    # ---- indexing
    aten.embedding.default: [
        compact(lambda t, op: t(op, t.weight, table_of_numbers(t))),
        full(lambda t, op: t(op, t.table, t.ids, -1, True)),  # its gradient counts the tokens of the batch
        refused(
            "table differs",
            lambda t, op: t(op, t(aten.view.default, t.x, MERGED), t(aten.remainder.Scalar, t.ids, SEQ)),
        ),
    ],
    aten.gather.default: [
        compact(lambda t, op: t(op, t.x, 2, table_of_numbers(t))),
        compact(lambda t, op: t(op, t(aten.expand.default, t.square, [BATCH, SEQ, SEQ]), 2, table_of_numbers(t))),
        compact(lambda t, op: t(op, t(aten.repeat.default, t.square, [BATCH, 1, 1]), 1, table_rows(t))),
        constant(
            lambda t, op: t(aten.add.Tensor, t.x, t(op, t(aten.unsqueeze.default, t.weight, 0), 1, same_table_rows(t)))
        ),
        refused(
            "table lines up with the batch",
            lambda t, op: t(op, t(aten.mul.Tensor, t.square, t.sequences), 1, table_rows(t)),
        ),
        refused("looks up along the sequence", lambda t, op: t(op, t.x, 1, table_of_numbers(t))),
        refused("looks up along the batch", lambda t, op: t(op, t.x, 0, t(aten.remainder.Scalar, numbers(t), BATCH))),
        refused(
            "only a part",
            lambda t, op: t(op, t.wide, 3, t(aten.zeros.default, [BATCH, SEQ, 1, 1], dtype=torch.int64)),
        ),
        refused(
            "mean different things",
            lambda t, op: t(
                op, t(aten.transpose.int, t.wide, 0, 2), 3, t(aten.zeros_like.default, t.wide, dtype=torch.int64)
            ),
        ),
    ],
    aten.scatter.value: [
        compact(lambda t, op: t(op, t.x, 2, table_of_numbers(t), 0.5)),
        compact(lambda t, op: t(op, t(aten.zeros_like.default, t.x), 2, second_of(2)(t, aten.topk.default), 1)),
        refused("looks up along the sequence", lambda t, op: t(op, t.x, 1, table_of_numbers(t), 0.5)),
        refused(
            "only a part",
            lambda t, op: t(op, t.wide, 3, t(aten.zeros.default, [BATCH, SEQ, 1, 1], dtype=torch.int64), 1),
        ),
    ],
    aten.scatter.src: [
        compact(lambda t, op: t(op, t.x, 2, second_of(FEATURES)(t, aten.topk.default), t.x)),
        refused("looks up along the sequence", lambda t, op: t(op, t.x, 1, table_of_numbers(t), t.x)),
    ],
    aten.scatter_add.default: [
        compact(lambda t, op: t(op, t.x, 2, table_of_numbers(t), t.x)),
        refused(
            "looks up along the batch", lambda t, op: t(op, t.x, 0, t(aten.remainder.Scalar, numbers(t), BATCH), t.x)
        ),
    ],
    aten.index_put.default: [
        arranged(experts()),
        refused("computes with the order", experts(first=1)),
        refused("writes to rows by index", lambda t, op: t(op, t.x, [t(aten.zeros_like.default, t.ids)], t.bias)),
    ],
    # ---- rows in sorted order
    aten.floor_divide.default: [
        compact(lambda t, op: t(op, numbers(t), 2)),
        arranged(experts()),
        refused("computes with the order", order_read_as_numbers),
    ],
    aten.empty_like.default: [
        arranged(experts()),
        constant(lambda t, op: t(aten.mul.Tensor, t.x, t(aten.slice_scatter.default, t(op, t.x), t.x, 2))),
        refused("no rule", lambda t, op: t(aten.slice_scatter.default, t(op, rolled(t)), t.x, 2)),
    ],
    aten.histc.default: [
        arranged(experts()),
        refused("counts values over rows", experts(descending=True)),
        refused("counts values over rows", experts(bins=(EXPERTS, 1, EXPERTS))),
        refused("counts values over rows", experts(exact=torch.bfloat16)),
        refused(
            "counts values over rows", lambda t, op: t(aten.add.Tensor, t.x, t(op, t.x, FEATURES, 0, FEATURES - 1))
        ),
    ],
    "aten::_grouped_mm": [
        arranged(experts(aten._grouped_mm.default)),
        refused("no weights", experts(aten._grouped_mm.default, by_token)),
    ],
    "transformers::grouped_mm_fallback": [
        arranged(experts()),
        refused("no weights", experts(choose=by_token)),
    ],
    aten.index_select.default: [
        compact(lambda t, op: t(op, t.x, 2, t(aten.arange.start_step, 0, FEATURES, 2))),
        refused("selects along the sequence", lambda t, op: t(op, t.x, 1, t(aten.arange.default, SEQ))),
        refused("selects along the batch", lambda t, op: t(op, t.x, 0, t(aten.arange.default, BATCH))),
        compact(
            lambda t, op: t(op, t.square, 0, t(aten.view.default, t(aten.remainder.Scalar, t.ids, SEQ), [BATCH * SEQ])),
        ),
        refused(
            "index that differs",
            lambda t, op: t(op, t.x, 2, t(aten.view.default, t(aten.remainder.Scalar, t.ids, SEQ), [BATCH * SEQ])),
        ),
    ],
    aten.index.Tensor: [
        compact(lambda t, op: t(op, t.weight, [table_of_numbers(t)])),
        compact(
            lambda t, op: t(
                op, t.square, [t(aten.view.default, t(aten.arange.default, SEQ), [SEQ, 1]), table_of_numbers(t)]
            )
        ),
        compact(experts()),
        compact(experts(place="argsort")),
        compact(lambda t, op: t(op, t.x, [None, None, t(aten.arange.start_step, 0, FEATURES, 2)])),
        full(counted),
        full(swapped),
        refused("order that is not theirs", experts(divisor=3)),
        refused("order that is not theirs", experts(place="order")),
        refused("not known to leave them in place", counted_from_one),
        refused("not known to leave them in place", lambda t, op: t(op, t.x, [t(aten.remainder.Scalar, t.ids, BATCH)])),
        refused("selects along the sequence", lambda t, op: t(op, t.x, [None, t(aten.arange.default, SEQ)])),
        refused("skips others", lambda t, op: t(op, t.x, [None, t(aten.remainder.Scalar, t.ids, SEQ)])),
        refused(
            "lines up with the batch",
            lambda t, op: t(op, t.square, [column_numbers(t, BATCH, 0, 3), table_of_numbers(t)]),
        ),
    ],
    # ---- reductions
    aten.mean.dim: reducing([2], [1], [0]),
    aten.sum.dim_IntList: reducing([-1], [-2], [0, 1]),
    aten.amax.default: [
        *reducing([-1], [-2], [0]),
        full(of_masked(-1)),
        full(sinks()),
        full(sinks(LOWEST)),
        refused("lets a token see later ones", of_masked(-1, bound=1)),
        refused("lets a token see later ones", of_masked(-2)),
        refused("without keepdim", of_masked(-1, keep=False)),
        refused("reduces over the sequence", lambda t, op: t(op, t.scores, [-1], True)),
    ],
    aten.amin.default: reducing([-1], [-2], [0]),
    aten.max.dim: [*reducing_to_two(2, 1), full(sinks(LOWEST, aten.max.dim)), refused("which of the keys", which_key)],
    aten.min.dim: reducing_to_two(2, 1),
    aten.argmax.default: [*reducing(2, 1, 0), refused("reduces over", over_features(None))],
    aten.argmin.default: [*reducing(2, 1, 0), refused("reduces over", over_features(None))],
    aten.any.dim: reducing_truth(-1, 1),
    aten.all.dim: reducing_truth(-1, 1),
    aten.prod.dim_int: reducing(2, 1, 0),
    aten.logsumexp.default: reducing([2], [1], [0]),
    aten.var.correction: [compact(over_features([2])), refused("the sequence", over_features([1]))],
    aten.std.correction: [compact(over_features([2])), refused("the batch", over_features([0, 2]))],
    aten.linalg_vector_norm.default: [
        compact(over_features(2, [-1], True)),
        refused("the sequence", over_features(2, [1])),
        refused("reduces over", over_features()),
    ],
    aten.norm.ScalarOpt_dim: [compact(over_features(2, [-1], True)), refused("the sequence", over_features(2, [1]))],
    aten.mean.default: reducing_all(),
    aten.sum.default: reducing_all(),
    aten.max.default: reducing_all(),
    aten.min.default: reducing_all(),
    aten.any.default: reducing_all(),
    aten.all.default: reducing_all(),
    aten.log_softmax.int: [compact(over_features(-1)), refused("reads along the sequence", over_features(1))],
    aten.sort.default: SORTED,
    aten.sort.stable: [
        compact(lambda t, op: t.item(t(op, t.x, stable=True), 1)),
        constant(sorted_ties),
        refused("sorts along the sequence", lambda t, op: t.item(t(op, t.x, stable=True, dim=1), 0)),
    ],
    aten.topk.default: [
        compact(first_of(2)),
        compact(second_of(2)),
        refused("reads along the sequence", first_of(2, 1)),
    ],
    aten.argsort.default: [
        compact(over_features(-1)),
        arranged(experts(place="argsort")),
        refused("sorts along the sequence", over_features(1)),
        refused("computes with the order", experts(place="argsort, descending")),
    ],
    aten.softmax.int: [
        compact(over_features(-1)),
        pair(lambda t, op: t(op, t.masked(t.causal), -1)),
        pair(lambda t, op: t(op, t.masked(t.causal, LOWEST), -1)),
        pair(sinks()),
        pair(sinks(LOWEST)),
        pair(lambda t, op: weighted(t, t(op, with_sinks(t, t.masked(t.causal, LOWEST)), -1))),
        refused(
            "as large as it",  # what was far below zero need not be when zero has moved
            lambda t, op: t(op, t(aten.add.Tensor, centred(t, t.masked(t.causal, LOWEST)), t.square), -1),
        ),
        refused(
            "without a mask",
            lambda t, op: t(
                op,
                t(aten.sub.Tensor, t.masked(t.causal), t(aten.amax.default, t.masked(t.causal, LOWEST), [-1], True)),
                -1,
            ),
        ),
        refused("normalises over the sequence", over_features(1)),
        refused("without a mask", lambda t, op: t(op, t.scores, -1)),
        refused("lets a token see later ones", lambda t, op: t(op, t.masked(t.key_minus_query_at_most(1)), -1)),
        refused("lets a token see later ones", lambda t, op: t(op, t.masked(t.causal), -2)),
        refused("without a mask", lambda t, op: t(op, t.masked(t.causal, -50.0), -1)),
        refused("without a mask", lambda t, op: t(op, t.masked(t.causal, -1e9), -1)),
        refused(
            "as large as it",
            lambda t, op: t(op, t(aten.add.Tensor, t.masked(t.causal, LOWEST), t.square), -1),
        ),
    ],
    aten._softmax.default: [
        compact(over_features(-1, False)),
        pair(lambda t, op: t(op, t.masked(t.causal), -1, False)),
        refused("normalises over the sequence", over_features(1, False)),
    ],
    aten.layer_norm.default: [
        compact(lambda t, op: t(op, t.x, [FEATURES], t.bias, t.bias)),
        constant(
            lambda t, op: t(
                aten.add.Tensor,
                t.x,
                t(
                    aten.unsqueeze.default,
                    t(op, t(aten.ones.default, [SEQ], dtype=torch.float64), [SEQ], t.bias, t.bias),
                    1,
                ),
            )
        ),
        refused("normalises over the sequence", lambda t, op: t(op, t.x, [SEQ, FEATURES])),
        refused("normalises over the sequence", lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), [SEQ])),
    ],
    aten.native_layer_norm.default: [
        compact(lambda t, op: t.item(t(op, t.x, [FEATURES], t.bias, t.bias, 1e-5), 0)),
        compact(lambda t, op: t.item(t(op, t.wide, [HEADS, SEQ], None, None, 1e-5), 1)),
        refused("normalises over", lambda t, op: t.item(t(op, t.x, [SEQ, FEATURES], None, None, 1e-5), 0)),
    ],
    aten.rms_norm.default: [
        compact(lambda t, op: t(op, t.x, [FEATURES], t.bias, 1e-6)),
        refused("normalises over", lambda t, op: t(op, t.x, [SEQ, FEATURES])),
    ],
    # ---- along the sequence
    aten.cumsum.default: [
        compact(over_features(-1)),
        full(over_features(1)),
        full(packed_by(aten.cumsum.default)),
        arranged(experts()),
        refused("the batch axis", over_features(0)),
        refused("the key axis", lambda t, op: t(op, t.scores, -1)),
    ],
    aten.cumprod.default: [
        compact(over_features(-1)),
        full(over_features(1)),
        refused("the batch axis", over_features(0)),
    ],
    aten.diff.default: [
        full(lambda t, op: packed_by(aten.cumsum.default)(t, op)),
        full(lambda t, op: t(op, t.positions, 1, 1, first_column_less_one(t, t.positions))),
        refused("takes differences", over_features(1, 1)),
        refused("takes differences", lambda t, op: t(op, t.positions, 2, 1, first_column_less_one(t, t.positions))),
        refused("takes differences", lambda t, op: t(op, t.positions, 1, 1, first_column_less_one(t, t.ids))),
    ],
    aten.dropout.default: [compact(over_features(0.5, False)), refused("dropout is on", over_features(0.5, True))],
    aten._transformer_encoder_layer_fwd.default: [refused("set_fastpath_enabled", encoder_layer)],
    aten.native_dropout.default: [refused("random", first_of(0.5, True))],
    aten.feature_dropout.default: [
        compact(over_features(0.5, False)),
        refused("dropout is on", over_features(0.5, True)),
    ],
    # ---- views
    aten.alias.default: UNARY,
    aten.detach.default: UNARY,
    aten.clone.default: UNARY,
    aten.lift_fresh_copy.default: UNARY,
    aten._to_copy.default: [compact(over_features(dtype=torch.int64)), VIEW_REFUSED],
    aten.contiguous.default: UNARY,
    aten.view.default: RESHAPE,
    aten._unsafe_view.default: RESHAPE,
    aten.reshape.default: RESHAPE,
    aten.expand.default: [
        compact(lambda t, op: t(op, t(aten.unsqueeze.default, t.x, 2), [BATCH, SEQ, HEADS, FEATURES])),
        compact(lambda t, op: t(op, t.x, [HEADS, BATCH, SEQ, FEATURES])),
        constant(lambda t, op: t(aten.mul.Tensor, t.x, t(op, t.columns, [BATCH, SEQ, FEATURES]))),
        refused("no rule", lambda t, op: t(op, rolled(t), [BATCH, SEQ, FEATURES])),
    ],
    aten.unsqueeze.default: [
        compact(over_features(0)),
        compact(over_features(2)),
        refused("no rule", lambda t, op: t(op, rolled(t), 0)),
    ],
    aten.squeeze.dim: [
        compact(lambda t, op: t(op, t(aten.unsqueeze.default, t.x, 2), 2)),
        compact(over_features(2)),
        refused("squeezes a token axis", over_features(1)),
    ],
    aten.squeeze.dims: [
        compact(lambda t, op: t(op, t(aten.unsqueeze.default, t.x, 2), [2, 3])),
        refused("squeezes a token axis", over_features([0])),
    ],
    aten.permute.default: [
        compact(over_features([1, 0, 2])),
        compact(over_features([2, 1, 0])),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.square, [1, 0]))),
        refused("no rule", lambda t, op: t(op, rolled(t), [2, 1, 0])),
    ],
    aten.transpose.int: [
        compact(over_features(0, 1)),
        compact(over_features(1, 2)),
        refused("no rule", lambda t, op: t(op, rolled(t), 1, 2)),
    ],
    aten.t.default: [
        compact(lambda t, op: t(op, t(aten.view.default, t.x, MERGED))),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.square))),
        refused("no rule", lambda t, op: t(op, t(aten.roll.default, t.ids, [1], [1]))),
    ],
    aten.mT.default: UNARY,
    aten.numpy_T.default: UNARY,
    aten.slice.Tensor: [
        compact(over_features(2, 1, 4)),
        compact(over_features(-1, 0, 9223372036854775807, 2)),
        compact(over_features(1, 0, 9223372036854775807)),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.square, 0, 0, 1))),
        pair(sinks()),
        refused(
            "slices the sequence",
            lambda t, op: t(op, t(aten.softmax.int, with_sinks(t, t.masked(t.causal)), -1), 3, 1, SEQ + 1),
        ),
        refused("slices the sequence", over_features(1, 1, SEQ)),
        refused("slices the sequence", over_features(1, 0, -1)),
        refused("slices the batch", over_features(0, 0, 2)),
    ],
    aten.select.int: [
        compact(over_features(2, 1)),
        refused("takes one entry of the sequence", over_features(1, -1)),
        refused("takes one entry of the batch", over_features(0, 0)),
    ],
    aten.split.Tensor: [compact(second_of(2, 2)), refused("splits the sequence", first_of(SEQ, 1))],
    aten.split_with_sizes.default: [compact(second_of([2, 4], 2)), refused("splits the batch", first_of([3, 1], 0))],
    aten.chunk.default: [compact(second_of(2, 2)), refused("splits the sequence", first_of(2, 1))],
    aten.unbind.int: [compact(second_of(2)), refused("takes apart the sequence", first_of(1))],
    aten.cat.default: [
        compact(lambda t, op: t(op, [t.x, t.x], 2)),
        pair(sinks()),
        refused("joins tensors along the sequence", lambda t, op: with_sinks(t, t.scores)),
        refused("joins tensors along the sequence", lambda t, op: t(op, [t.masked(t.causal), t.scores], -1)),
        compact(lambda t, op: t(op, [t.x, t(aten.expand.default, t.columns, [BATCH, SEQ, 2])], -1)),
        compact(lambda t, op: t(op, [t(aten.zeros.default, [0], dtype=torch.float64), t.x], 1)),
        refused("joins tensors along the sequence", lambda t, op: t(op, [t.x, t.x], 1)),
        refused("joins tensors along the batch", lambda t, op: t(op, [t.x, t.x], 0)),
        # The empty tensor does not only vanish: it makes the result floating point.
        compact(lambda t, op: t(op, [t(aten.zeros.default, [0], dtype=torch.float64), numbers(t)], 1)),
        refused("mean different things", lambda t, op: t(op, [t.heads, t(aten.transpose.int, t.heads, 0, 1)], 3)),
        refused(
            "lines up with the batch",
            lambda t, op: t(op, [t.x, t(aten.expand.default, t.sequences, [BATCH, SEQ, 2])], 2),
        ),
    ],
    aten.view_as_complex.default: [
        compact(lambda t, op: t(aten.abs.default, t(op, t(aten.view.default, t.x, [BATCH, SEQ, 3, 2])))),
        refused(
            "no rule", lambda t, op: t(aten.abs.default, t(op, t(aten.view.default, rolled(t), [BATCH, SEQ, 3, 2])))
        ),
    ],
    aten.view_as_real.default: [
        compact(lambda t, op: t(op, t(aten.complex.default, t.x, t.x))),
        refused("no rule", lambda t, op: t(op, t(aten.complex.default, rolled(t), t.x))),
    ],
    aten.slice_scatter.default: [
        compact(lambda t, op: t(op, t.x, t(aten.slice.Tensor, t.x, 2, 0, 2), 2, 3, 5)),
        compact(lambda t, op: written_over(t, aten.new_empty.default)),
        refused(
            "writes along the sequence",
            lambda t, op: t(op, t.x, t(aten.zeros.default, [BATCH, 2, FEATURES], dtype=torch.float64), 1, 3, 5),
        ),
    ],
    aten.stack.default: [
        compact(lambda t, op: t(op, [t.x, t.x], 1)),
        compact(lambda t, op: t(op, [t.x, t(aten.expand.default, t.columns, [BATCH, SEQ, FEATURES])], -1)),
        refused("mean different things", lambda t, op: t(op, [t.heads, t(aten.transpose.int, t.heads, 0, 1)])),
        refused(
            "lines up with the batch",
            lambda t, op: t(op, [t.x, t(aten.expand.default, t.sequences, [BATCH, SEQ, FEATURES])]),
        ),
    ],
    aten.repeat.default: [
        compact(over_features([1, 1, 2])),
        compact(over_features([2, 1, 1, 1])),
        refused("repeats the sequence", over_features([1, 2, 1])),
        refused("repeats the batch", over_features([2, 1, 1])),
    ],
    aten.repeat_interleave.self_int: [
        compact(over_features(2, 2)),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.columns, FEATURES, 1))),
        refused("repeats along the sequence", over_features(2, 1)),
        refused("repeats the flattened tensor", over_features(2)),
    ],
    aten.flip.default: [
        compact(over_features([2])),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.columns, [0]))),
        refused("reverses the sequence", over_features([1])),
        refused("reverses the batch", over_features([2, 0])),
    ],
    aten.constant_pad_nd.default: [
        compact(over_features([1, 2, 0, 0])),
        refused("pads the sequence", over_features([0, 0, 1, -1])),
    ],
    aten.pad.default: [
        compact(over_features([1, 2], "reflect")),
        refused("pads the sequence", over_features([0, 0, 1, -1])),
    ],
}

POINTWISE: dict[OpOverload, list[Sample]] = {
    aten.add.Tensor: [
        compact(lambda t, op: t(op, t.x, t.columns, alpha=2)),
        compact(lambda t, op: t(op, t.x, t.square)),
        pair(lambda t, op: t(op, t.scores, t.square)),
        refused("mean different things", on_mixed),
        refused("lines up with the batch", lambda t, op: t(op, t.x, t.sequences)),
    ],
    aten.mul.Tensor: [
        compact(lambda t, op: t(op, t.x, t(aten.ones.default, [BATCH, SEQ, 1], dtype=torch.float64))),
        pair(lambda t, op: t(op, t.x, t(aten.transpose.int, t.x, 1, 2))),
        refused("mean different things", on_mixed),
    ],
    aten.silu.default: UNARY,
    aten.gelu.default: UNARY,
    aten.tanh.default: UNARY,
    aten.rsqrt.default: [
        compact(lambda t, op: t(op, t(aten.exp.default, t.x))),
        refused("no rule", lambda t, op: t(op, t(aten.exp.default, rolled(t)))),
    ],
    aten.clamp.default: [
        compact(over_features(-0.5, 0.5)),
        refused("no rule", lambda t, op: t(op, rolled(t), -0.5, 0.5)),
    ],
    aten.pow.Tensor_Scalar: [compact(over_features(2)), refused("no rule", lambda t, op: t(op, rolled(t), 2))],
    aten.pow.Scalar: [compact(lambda t, op: t(op, 2, t.x)), refused("no rule", lambda t, op: t(op, 2, rolled(t)))],
    aten.where.self: [
        compact(lambda t, op: t(op, t(aten.gt.Scalar, t.columns, 0), t.x, t.bias)),
        refused("lines up with the batch", lambda t, op: t(op, t(aten.gt.Scalar, t.sequences, 0), t.x, t.bias)),
    ],
    aten.masked_fill.Scalar: [
        compact(lambda t, op: t(op, t.x, truth(t), 0.0)),
        refused("lines up with the batch", lambda t, op: t(op, t.x, t(aten.gt.Scalar, t.sequences, 0), 0.0)),
    ],
    aten.addcmul.default: [
        compact(lambda t, op: t(op, t.x, t.columns, t.bias)),
        refused("lines up with the batch", lambda t, op: t(op, t.x, t.sequences, t.bias)),
    ],
    aten.maximum.default: [
        compact(lambda t, op: t(op, t.x, t.columns)),
        refused("mean different things", on_mixed),
    ],
    aten.frexp.Tensor: [compact(lambda t, op: t.item(t(op, t.x), 0)), compact(lambda t, op: t.item(t(op, t.x), 1))],
}

NO_RULE: dict[str, str] = {
    "aten.conv1d.default": "causal or not by its padding: column_reach says which",
    "aten.cross_entropy_loss.default": "a loss over all rows, which the pass fold_cross_entropy is for",
    "aten.linalg_solve_triangular.default": "solves over the columns of a chunk: column_reach says which it reads",
    "aten.select_scatter.default": "writes column by column: column_reach follows them",
}
"""Ops that models use at which folding stops by intention, and why."""

NEVER_FOLDS = {aten.native_dropout.default, aten._transformer_encoder_layer_fwd.default}
"""Rows that only give their refusal a reason."""

NEVER_REFUSED = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.scalar_tensor.default,
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.empty.memory_format,
}
"""Rows that read no rows."""
