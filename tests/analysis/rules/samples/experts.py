"""Samples of rows in sorted order: a mixture of experts, whole, and with one thing wrong in each of several places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - importing it registers its grouped product
from torch import fx

from radix_compile.testing.recorder import BATCH, FEATURES, SEQ, Recorder

aten = torch.ops.aten
ROWS, SLOTS, EXPERTS = BATCH * SEQ, 2, FEATURES


def by_router(t: Recorder, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The weights and numbers of each row's experts, ``[ROWS, SLOTS]``."""
    chosen = t(aten.topk.default, logits, SLOTS)
    return t.item(chosen, 0), t.item(chosen, 1)


def by_token(t: Recorder, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Numbers that may be anything."""
    weights, _ = by_router(t, logits)
    numbers = t(aten.remainder.Scalar, t(aten.view.default, t.ids, [ROWS, 1]), EXPERTS)
    return weights, t(aten.cat.default, [numbers, numbers], 1)


def experts(
    product: Any = torch.ops.transformers.grouped_mm_fallback.default,
    choose: Callable[[Recorder, fx.Node], tuple[fx.Node, fx.Node]] = by_router,
    divisor: int = SLOTS,
    descending: bool = False,
    bins: tuple[int, int, int] = (EXPERTS, 0, EXPERTS - 1),
    exact: torch.dtype = torch.float64,
    first: int = 0,
    place: str = "index_put",
) -> Callable[[Recorder, Any], fx.Node]:
    """``[B, S, D]``, as transformers computes it; the arguments are what may be wrong."""

    def build(t: Recorder, _: Any) -> fx.Node:
        small = product is aten._grouped_mm.default  # takes bfloat16 only: whole numbers are exact in it
        dtype = torch.bfloat16 if small else torch.float64
        whole = t(aten.round.default, t.x) if small else t.x
        rows = t(aten._to_copy.default, t(aten.view.default, whole, [ROWS, FEATURES]), dtype=dtype)
        weight, numbers = choose(t, t(aten.view.default, t(aten.linear.default, t.x, t.weight), [ROWS, EXPERTS]))
        keys_of = t(aten.view.default, numbers, [ROWS * SLOTS])
        in_order = t(aten.sort.default, keys_of, -1, descending)
        keys, order = t.item(in_order, 0), t.item(in_order, 1)
        scale = t(aten.view.default, t(aten.arange.default, EXPERTS, dtype=dtype), [EXPERTS, 1, 1])
        weights = t(aten._to_copy.default, t(aten.unsqueeze.default, t.weight, 0), dtype=dtype)
        if small:
            weights = t(aten.round.default, weights)
            rows = t(aten.constant_pad_nd.default, rows, [0, 2])  # rows of 16 bytes are the least it takes
            weights = t(aten.constant_pad_nd.default, weights, [0, 2, 0, 2])
        moved = t(aten.index.Tensor, rows, [t(aten.floor_divide.default, order, divisor)])
        counts = t(aten.histc.default, t(aten._to_copy.default, keys, dtype=exact), *bins)
        until = t(aten.cumsum.default, counts, 0, dtype=torch.int32)
        done = t(product, moved, t(aten.mul.Tensor, weights, scale), until)
        if small:
            done = t(aten.slice.Tensor, done, 1, 0, FEATURES)
        share = t(aten.index.Tensor, t(aten.view.default, weight, [ROWS * SLOTS]), [order])
        done = t(aten.mul.Tensor, done, t(aten.unsqueeze.default, share, -1))
        back = t(aten.index.Tensor, done, [_place(t, order, place, first)])
        both = t(aten.view.default, back, [ROWS, SLOTS, FEATURES])
        return t(aten.view.default, t(aten.sum.dim_IntList, both, [1]), [BATCH, SEQ, FEATURES])

    return build


def _place(t: Recorder, order: fx.Node, how: str, first: int) -> fx.Node:
    if how == "argsort":
        return t(aten.argsort.default, order)
    if how == "argsort, descending":
        return t(aten.argsort.default, order, -1, True)
    if how == "order":
        return order
    count = t(aten.arange.start, first, first + ROWS * SLOTS)
    if first:
        count = t(aten.remainder.Scalar, count, ROWS * SLOTS)
    return t(aten.index_put.default, t(aten.empty_like.default, order), [order], count)


def order_read_as_numbers(t: Recorder, op: Any) -> fx.Node:
    order = t.item(t(aten.sort.default, t(aten.view.default, t.ids, [ROWS])), 1)
    return t(
        aten.add.Tensor,
        t.x,
        t(aten.view.default, t(op, order, t(aten.full.default, [ROWS], 2, dtype=torch.int64)), [BATCH, SEQ, 1]),
    )
