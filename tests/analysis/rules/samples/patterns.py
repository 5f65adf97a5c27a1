"""What several samples are built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from radix_compile.testing.recorder import BATCH, FEATURES, HEADS, SEQ, Recorder
from radix_compile.testing.sample import Build, Sample, arranged, compact, constant, pair, refused
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.experts import experts

aten = torch.ops.aten
LOWEST = torch.finfo(torch.float64).min


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


def first_steps(t: Recorder, op: Any) -> fx.Node:
    """A table of the steps of a table, of which the first is one."""
    table = t(aten.mT.default, t.columns)
    steps = t(op, table, 1, 1, first_column_less_one(t, table))
    return t(aten.add.Tensor, t.x, t(aten.mT.default, steps))


def hidden_by_buffer(t: Recorder, op: Any) -> fx.Node:
    """Attention to the keys that a buffer shows, which has more columns than there are."""
    shown = t(aten.ne.Scalar, t(op, t.long_row, 1, 0, SEQ), 0)
    mask = t(aten.__and__.Tensor, t.causal, shown)
    return t(aten.matmul.default, t(aten.softmax.int, t.masked(mask, LOWEST), -1), t.heads)


def biased_by_mask(t: Recorder, op: Any) -> fx.Node:
    """Attention whose padding is hidden by what a product is added to."""
    zeros = t(aten.zeros.default, [BATCH, SEQ, SEQ], dtype=torch.float64)
    shown = t(aten.squeeze.dim, t.visible_keys, 1)
    scores = t(op, t(aten.where.ScalarOther, shown, zeros, LOWEST), t.x, t(aten.transpose.int, t.x, 1, 2))
    hidden = t(aten.where.ScalarOther, t.causal, scores, float("-inf"))
    return t(aten.bmm.default, t(aten.softmax.int, hidden, -1), t.x)


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
