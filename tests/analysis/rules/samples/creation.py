"""Samples of creation."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, constant
from radix_compile.testing.recorder import FEATURES, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.patterns import (
    filling,
    filling_like,
    filling_new,
    hidden_by_triu,
    shown_by_tril,
    triangles,
    written_over,
)

aten = torch.ops.aten

CREATION: dict[OpOverload | str, list[Sample]] = {
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
}
