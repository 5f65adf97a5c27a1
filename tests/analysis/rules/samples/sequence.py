"""Samples of ops along the sequence."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, arranged, compact, constant, full, refused
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.experts import experts
from tests.analysis.rules.samples.patterns import (
    encoder_layer,
    first_column_less_one,
    first_of,
    first_steps,
    over_features,
    packed_by,
)

aten = torch.ops.aten

SEQUENCE: dict[OpOverload | str, list[Sample]] = {
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
        constant(first_steps),
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
}
