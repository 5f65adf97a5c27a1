"""Samples of elementwise ops."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, compact, constant, pair, refused
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
    aten.frexp.Tensor: [
        compact(first_of()),
        compact(second_of()),
        refused("no rule", lambda t, op: t.item(t(op, rolled(t)), 0)),
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
