"""Samples of indexing."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, arranged, compact, constant, full, refused
from radix_compile.testing.recorder import BATCH, FEATURES, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.experts import experts
from tests.analysis.rules.samples.patterns import (
    MERGED,
    numbers,
    same_table_rows,
    second_of,
    table_of_numbers,
    table_rows,
)

aten = torch.ops.aten

INDEXING: dict[OpOverload | str, list[Sample]] = {
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
}
