"""Samples of views."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, compact, constant, pair, refused
from radix_compile.testing.recorder import BATCH, FEATURES, HEADS, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.patterns import (
    MERGED,
    RESHAPE,
    UNARY,
    VIEW_REFUSED,
    first_of,
    hidden_by_buffer,
    numbers,
    over_features,
    rolled,
    second_of,
    sinks,
    with_sinks,
    written_over,
)

aten = torch.ops.aten

VIEWS: dict[OpOverload | str, list[Sample]] = {
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
        constant(hidden_by_buffer),
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
