"""Samples of rows in sorted order."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, arranged, compact, constant, full, refused
from radix_compile.testing.recorder import BATCH, FEATURES, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.experts import EXPERTS, by_token, experts, order_read_as_numbers
from tests.analysis.rules.samples.patterns import (
    column_numbers,
    counted,
    counted_from_one,
    numbers,
    rolled,
    swapped,
    table_of_numbers,
)

aten = torch.ops.aten

SORTING: dict[OpOverload | str, list[Sample]] = {
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
        refused("without weights", experts(aten._grouped_mm.default, by_token)),
    ],
    "transformers::grouped_mm_fallback": [
        arranged(experts()),
        refused("without weights", experts(choose=by_token)),
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
        refused("order of other rows", experts(divisor=3)),
        refused("order of other rows", experts(place="order")),
        refused("not known to leave them in place", counted_from_one),
        refused("not known to leave them in place", lambda t, op: t(op, t.x, [t(aten.remainder.Scalar, t.ids, BATCH)])),
        refused("selects along the sequence", lambda t, op: t(op, t.x, [None, t(aten.arange.default, SEQ)])),
        refused("skips others", lambda t, op: t(op, t.x, [None, t(aten.remainder.Scalar, t.ids, SEQ)])),
        refused(
            "lines up with the batch",
            lambda t, op: t(op, t.square, [column_numbers(t, BATCH, 0, 3), table_of_numbers(t)]),
        ),
    ],
}
