"""Samples of elementwise ops."""

from __future__ import annotations

import torch
from torch import fx

from radix_compile.testing import Recorder, Sample, compact, constant, pair, refused
from radix_compile.testing.recorder import BATCH, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.patterns import (
    UNARY,
    first_of,
    logic,
    numbers,
    on_mixed,
    over_features,
    rolled,
    second_of,
    truth,
)

aten = torch.ops.aten


def column(t: Recorder, dim: int) -> fx.Node:
    """``[S, 1]`` for queries, or ``[1, S]`` for keys."""
    return t(aten.unsqueeze.default, t(aten.arange.default, SEQ), dim)


def table_where(t: Recorder, condition: fx.Node) -> fx.Node:
    """Rows and a table ``[S, D]`` that is zero elsewhere."""
    return t(aten.add.Tensor, t.x, t(aten.where.ScalarOther, condition, t.square, 0.0))


BINARY = [
    compact(lambda t, op: t(op, t.x, t.columns)),
    refused("mean different things", on_mixed),
    refused("lines up with the batch", lambda t, op: t(op, t.x, t.sequences)),
]

WITH_NUMBER = [compact(over_features(2)), refused("no rule", lambda t, op: t(op, rolled(t), 2))]

COMPARISON = [
    *BINARY,
    constant(lambda t, op: table_where(t, t(op, column(t, 1), column(t, 0)))),
    pair(lambda t, op: t(op, t(aten.unsqueeze.default, t.ids, 2), t(aten.unsqueeze.default, t.ids, 1))),
]

COMPARISON_WITH_NUMBER = [
    *WITH_NUMBER,
    constant(lambda t, op: table_where(t, t(op, t(aten.sub.Tensor, column(t, 1), column(t, 0)), 1))),
]

NEGATION = [
    compact(lambda t, op: t(op, truth(t))),
    pair(lambda t, op: t(op, t.same_token)),
    refused("no rule", lambda t, op: t(op, t(aten.gt.Scalar, rolled(t), 0))),
]

ELEMENTWISE: dict[OpOverload | str, list[Sample]] = {
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
    aten.le.Tensor: COMPARISON,
    aten.lt.Tensor: COMPARISON,
    aten.ge.Tensor: COMPARISON,
    aten.gt.Tensor: COMPARISON,
    aten.eq.Tensor: COMPARISON,
    aten.le.Scalar: COMPARISON_WITH_NUMBER,
    aten.lt.Scalar: COMPARISON_WITH_NUMBER,
    aten.ge.Scalar: COMPARISON_WITH_NUMBER,
    aten.gt.Scalar: COMPARISON_WITH_NUMBER,
    aten.eq.Scalar: COMPARISON_WITH_NUMBER,
    aten.ne.Scalar: COMPARISON_WITH_NUMBER,
    aten.bitwise_and.Tensor: logic(),
    aten.logical_and.default: logic(),
    aten.bitwise_or.Tensor: logic(),
    aten.logical_or.default: logic(),
    aten.bitwise_not.default: NEGATION,
    aten.logical_not.default: NEGATION,
    aten.where.self: [
        compact(lambda t, op: t(op, t(aten.gt.Scalar, t.columns, 0), t.x, t.bias)),
        refused("lines up with the batch", lambda t, op: t(op, t(aten.gt.Scalar, t.sequences, 0), t.x, t.bias)),
    ],
    aten.masked_fill.Scalar: [
        compact(lambda t, op: t(op, t.x, truth(t), 0.0)),
        refused("lines up with the batch", lambda t, op: t(op, t.x, t(aten.gt.Scalar, t.sequences, 0), 0.0)),
    ],
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
    aten.sub.Tensor: BINARY,
    aten.rsub.Scalar: WITH_NUMBER,
    aten.mul.Scalar: WITH_NUMBER,
    aten.div.Tensor: BINARY,
    aten.div.Scalar: WITH_NUMBER,
    aten.neg.default: UNARY,
    aten.reciprocal.default: UNARY,
    aten.exp.default: UNARY,
    aten.pow.Tensor_Tensor: [
        compact(lambda t, op: t(op, t(aten.exp.default, t.x), t.columns)),
        refused("lines up with the batch", lambda t, op: t(op, t(aten.exp.default, t.x), t.sequences)),
    ],
    aten.pow.Tensor_Scalar: [compact(over_features(2)), refused("no rule", lambda t, op: t(op, rolled(t), 2))],
    aten.pow.Scalar: [compact(lambda t, op: t(op, 2, t.x)), refused("no rule", lambda t, op: t(op, 2, rolled(t)))],
    aten.maximum.default: [
        compact(lambda t, op: t(op, t.x, t.columns)),
        refused("mean different things", on_mixed),
    ],
    aten.max.other: BINARY,
    aten.tanh.default: UNARY,
}


POINTWISE: dict[OpOverload, list[Sample]] = {
    aten.frexp.Tensor: [compact(first_of()), compact(second_of())],
    aten.silu.default: UNARY,
    aten.gelu.default: UNARY,
    aten.rsqrt.default: [
        compact(lambda t, op: t(op, t(aten.exp.default, t.x))),
        refused("no rule", lambda t, op: t(op, t(aten.exp.default, rolled(t)))),
    ],
    aten.clamp.default: [
        compact(over_features(-0.5, 0.5)),
        refused("no rule", lambda t, op: t(op, rolled(t), -0.5, 0.5)),
    ],
    aten.addcmul.default: [
        compact(lambda t, op: t(op, t.x, t.columns, t.bias)),
        refused("lines up with the batch", lambda t, op: t(op, t.x, t.sequences, t.bias)),
    ],
}
