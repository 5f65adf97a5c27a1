"""The gradient of attention on the prefix tree as Triton kernels: see ``triton_attention``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, dense, heads_inside
from radix_compile.kernels.triton_launch import kernel
from radix_compile.kernels.triton_tree import (
    bias_of,
    bias_rows,
    depths,
    depths_of,
    features,
    keys_of,
    keys_of_run,
    lists_of,
    numbers_of,
    parts_of,
    scores_of,
    shape_of,
    stretch_of,
    strides_of,
    tile_of,
)

AT_ONCE = 8
"""Keys of which a program adds up the parts."""


@triton.jit
def _weights(
    q, k, summed, visible, scale, softcap,
    MASKED: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights of a tile again, and by what a gradient of scores is multiplied on its way through a soft cap."""
    scores = scores_of(q, k, scale, softcap, CAPPED, PRECISION)
    slope = scores
    if CAPPED:
        slope = 1 - (scores / softcap) * (scores / softcap)
    scores -= summed
    if BIASED:
        scores += visible
    elif MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    return tl.exp2(scores), slope


@triton.jit
def _by_query_from(
    found, q, g, summed, delta, keys, values, visible, scale, softcap,
    MASKED: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    weights, slope = _weights(q, tl.trans(keys), summed, visible, scale, softcap, MASKED, BIASED, CAPPED, PRECISION)
    by_scores = weights * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - delta)
    if CAPPED:
        by_scores *= slope
    return tl.dot(by_scores.to(keys.dtype), keys, found, input_precision=PRECISION)


@kernel
def _backward_query(
    grad, query, key, value, result, sums, deltas, by_query,
    fold, begin, end, stretches, stretch_starts, keys, key_starts, bias,
    nodes, factor, window, scale, softcap, columns, b_batch, b_head, b_row, b_key,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, r_head, r_node, bq_head, bq_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and ``deltas`` for that of keys: the sum of each result times its gradient."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tile * ROWS + tl.arange(0, ROWS)
    inside = i < nodes
    place = i.to(tl.int64)
    q = features(query + head * q_head, place * q_node, inside, E, E_BLOCK, False)
    g = features(grad + head * g_head, place * g_node, inside, V, V_BLOCK, False)
    r = features(result + head * r_head, place * r_node, inside, V, V_BLOCK, False)
    delta = tl.sum(g.to(tl.float32) * r.to(tl.float32), 1)
    tl.store(deltas + head * nodes + i, delta, mask=inside)
    delta = delta[:, None]
    summed = tl.load(sums + head * nodes + i, mask=inside, other=float("inf"))[:, None] * 1.4426950408889634
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    depth_i, nearest = depths_of(fold, begin, i, inside, window, WINDOW)
    at = i
    if BIASED:
        bias += head * b_head
        at = bias_rows(fold, begin, i, inside, columns, b_batch, b_row, b_key)
    found = tl.zeros([ROWS, E_BLOCK], tl.float32)
    step = tl.arange(0, N)
    for stretch in range(tl.load(stretch_starts + tile), tl.load(stretch_starts + tile + 1)):
        start, behind, depth = stretch_of(stretches, stretch, nearest, N, WINDOW, BIASED)
        for block in range(start, behind, N):
            k, v, visible = keys_of_run(
                key, value, k_node, v_node, block, step, depth + block - start, inside, depth_i, window,
                bias, at, b_key, E, E_BLOCK, V, V_BLOCK, WINDOW, BIASED,
            )  # fmt: skip
            found = _by_query_from(
                found, q, g, summed, delta, k, v, visible, scale, softcap, WINDOW, BIASED, CAPPED, PRECISION
            )
    for block in range(tl.load(key_starts + tile), tl.load(key_starts + tile + 1), N):
        j = tl.load(keys + block + step).to(tl.int32)
        there = j >= 0
        k, v, visible = keys_of(
            key, value, k_node, v_node, tl.where(there, j, 0), there, i, depth_i, fold, begin, end, window,
            bias, at, b_key, E, E_BLOCK, V, V_BLOCK, WINDOW, BIASED,
        )  # fmt: skip
        found = _by_query_from(
            found, q, g, summed, delta, k, v, visible, scale, softcap, True, BIASED, CAPPED, PRECISION
        )
    for block in range(tile * ROWS, tl.minimum(tile * ROWS + ROWS, nodes), N):
        j = block + step
        there = j < nodes
        k, v, visible = keys_of(
            key, value, k_node, v_node, j, there, i, depth_i, fold, begin, end, window,
            bias, at, b_key, E, E_BLOCK, V, V_BLOCK, WINDOW, BIASED,
        )  # fmt: skip
        found = _by_query_from(
            found, q, g, summed, delta, k, v, visible, scale, softcap, True, BIASED, CAPPED, PRECISION
        )
    column = tl.arange(0, E_BLOCK)
    target = by_query + head * bq_head + place[:, None] * bq_node + column[None, :]
    tl.store(target, (found * factor).to(by_query.dtype.element_ty), mask=inside[:, None] & (column < E)[None, :])


@triton.jit
def _by_key_from(
    found_k, found_v, keys, values, queries, grads, sums, deltas, start, behind, nodes, j, depth_j, stop, fold, begin,
    window, scale, softcap, bias, columns, b_batch, b_head, b_row, b_key, q_head, q_node, g_head, g_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Add what the queries from ``start`` on give to the gradients of keys and values: rows, one for node and head."""
    row = start + tl.arange(0, N)
    there = row < behind
    i, member = row // GROUP, (row % GROUP).to(tl.int64)
    place = i.to(tl.int64)
    q = features(queries, member * q_head + place * q_node, there, E, E_BLOCK, not MASKED)
    g = features(grads, member * g_head + place * g_node, there, V, V_BLOCK, not MASKED)
    summed = tl.load(sums + member * nodes + i, mask=there, other=float("inf"))[None, :] * 1.4426950408889634
    delta = tl.load(deltas + member * nodes + i, mask=there, other=0.0)[None, :]
    visible = there[None, :]
    if MASKED:
        visible = (j[:, None] <= i[None, :]) & (i[None, :] < stop[:, None]) & there[None, :]
    if WINDOW:
        visible &= depths(fold, begin, i, there)[None, :] - depth_j[:, None] < window
    if BIASED:
        at = bias_rows(fold, begin, i, there, columns, b_batch, b_row, b_key) + member * b_head
        visible = bias_of(bias, at[None, :] + depth_j[:, None] * b_key, visible & (stop > 0)[:, None])
    weights, slope = _weights(
        keys, tl.trans(q), summed, visible, scale, softcap, MASKED or WINDOW, BIASED, CAPPED, PRECISION
    )
    found_v = tl.dot(weights.to(g.dtype), g, found_v, input_precision=PRECISION)
    by_scores = weights * (tl.dot(values, tl.trans(g), input_precision=PRECISION) - delta)
    if CAPPED:
        by_scores *= slope
    return tl.dot(by_scores.to(q.dtype), q, found_k, input_precision=PRECISION), found_v


@kernel
def _backward_key(
    grad, query, key, value, sums, deltas, by_key, by_value, more_k, more_v, fold, begin, end, parts, bias,
    nodes, factor, window, scale, softcap, columns, b_batch, b_head, b_row, b_key,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, bk_head, bk_node, bv_head, bv_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of keys and a part of its descendants, ``N`` rows of queries at a time: no mask where all of the keys are
    ancestors of all of the queries. What comes of the parts of a tile that has several is left for ``_add_parts``.
    """
    part, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(parts + 4 * part).to(tl.int32) * ROWS
    low, high = tl.load(parts + 4 * part + 1).to(tl.int32), tl.load(parts + 4 * part + 2).to(tl.int32)
    slot = tl.load(parts + 4 * part + 3)
    j = first + tl.arange(0, ROWS)
    inside = j < nodes
    place = j.to(tl.int64)
    keys = features(key + group * k_head, place * k_node, inside, E, E_BLOCK, False)
    values = features(value + group * v_head, place * v_node, inside, V, V_BLOCK, False)
    stop = tl.load(end + j, mask=inside, other=0).to(tl.int32)
    depth_j = j
    if WINDOW or BIASED:
        depth_j = depths(fold, begin, j, inside)
    # Keys that nobody sees are no reason for a mask: what they are given is dropped.
    last = tl.max(stop, 0)
    own = tl.minimum(first + ROWS, last)
    common = tl.min(tl.where(stop > 0, stop, last), 0)
    whole = own + tl.maximum(common - own, 0) // N * N
    found_k = tl.zeros([ROWS, E_BLOCK], tl.float32)
    found_v = tl.zeros([ROWS, V_BLOCK], tl.float32)
    head = group * GROUP
    query += head * q_head
    grad += head * g_head
    sums += head * nodes
    deltas += head * nodes
    if BIASED:
        bias += head * b_head
    for start in range(tl.maximum(own, low) * GROUP, tl.minimum(whole, high) * GROUP, N):
        found_k, found_v = _by_key_from(
            found_k, found_v, keys, values, query, grad, sums, deltas, start, nodes * GROUP, nodes, j, depth_j, stop,
            fold, begin, window, scale, softcap, bias, columns, b_batch, b_head, b_row, b_key,
            q_head, q_node, g_head, g_node, GROUP, E, E_BLOCK, V, V_BLOCK, WINDOW, False, BIASED, CAPPED, PRECISION, N,
        )  # fmt: skip
    # Before and behind those: the tile itself, and what descends from a few of its nodes only.
    early = tl.maximum(tl.minimum(own, high) - low, 0) * GROUP
    late = tl.maximum(whole, low) * GROUP
    count = tl.cdiv(early, N)
    for block in range(count + tl.cdiv(tl.maximum(high * GROUP - late, 0), N)):
        found_k, found_v = _by_key_from(
            found_k, found_v, keys, values, query, grad, sums, deltas,
            tl.where(block < count, low * GROUP + block * N, late + (block - count) * N),
            tl.where(block < count, low * GROUP + early, high * GROUP), nodes, j, depth_j, stop,
            fold, begin, window, scale, softcap, bias, columns, b_batch, b_head, b_row, b_key,
            q_head, q_node, g_head, g_node, GROUP, E, E_BLOCK, V, V_BLOCK, WINDOW, True, BIASED, CAPPED, PRECISION, N,
        )  # fmt: skip
    in_k, in_v = tl.arange(0, E_BLOCK)[None, :], tl.arange(0, V_BLOCK)[None, :]
    if slot < 0:
        seen, written = (stop > 0)[:, None], (j < nodes)[:, None]
        to_key = by_key + group * bk_head + place[:, None] * bk_node + in_k
        by_k = tl.where(seen, found_k * factor, 0.0).to(by_key.dtype.element_ty)
        tl.store(to_key, by_k, mask=written & (in_k < E))
        to_value = by_value + group * bv_head + place[:, None] * bv_node + in_v
        tl.store(to_value, tl.where(seen, found_v, 0.0).to(by_value.dtype.element_ty), mask=written & (in_v < V))
    else:
        at = (slot * tl.num_programs(1) + group) * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(more_k + at * E_BLOCK + in_k, found_k)
        tl.store(more_v + at * V_BLOCK + in_v, found_v)


@kernel
def _add_parts(
    by_key, by_value, more_k, more_v, end, divided, nodes, factor, bk_head, bk_node, bv_head, bv_node,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The gradients of a few keys of a tile whose descendants were divided, one part after the other."""
    some, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = some // (ROWS // AT_ONCE)
    row = some % (ROWS // AT_ONCE) * AT_ONCE + tl.arange(0, AT_ONCE)
    j = tl.load(divided + 3 * tile) * ROWS + row
    in_k, in_v = tl.arange(0, E_BLOCK)[None, :], tl.arange(0, V_BLOCK)[None, :]
    found_k = tl.zeros([AT_ONCE, E_BLOCK], tl.float32)
    found_v = tl.zeros([AT_ONCE, V_BLOCK], tl.float32)
    for slot in range(tl.load(divided + 3 * tile + 1), tl.load(divided + 3 * tile + 2)):
        at = (tl.cast(slot, tl.int64) * tl.num_programs(1) + group) * ROWS + row[:, None]
        found_k += tl.load(more_k + at * E_BLOCK + in_k)
        found_v += tl.load(more_v + at * V_BLOCK + in_v)
    inside = (j < nodes)[:, None]
    seen = (tl.load(end + j, mask=j < nodes, other=0) > 0)[:, None]
    to_key = by_key + group * bk_head + j[:, None] * bk_node + in_k
    tl.store(to_key, tl.where(seen, found_k * factor, 0.0).to(by_key.dtype.element_ty), mask=inside & (in_k < E))
    to_value = by_value + group * bv_head + j[:, None] * bv_node + in_v
    tl.store(to_value, tl.where(seen, found_v, 0.0).to(by_value.dtype.element_ty), mask=inside & (in_v < V))


def tree_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    total: Tensor,
    plan: TreeArrays,
    score_options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``tree_attention_backward``."""
    grad, query, key, value, result = map(dense, (grad, query, key, value, result))
    nodes, groups = query.shape[2], key.shape[1]
    parts, divided = parts_of(plan)
    by_query, by_key, by_value = map(heads_inside, (query, key, value))
    deltas = total.new_empty(total.shape)
    about = shape_of(query, key, value, score_options)
    numbers = nodes, score_options.scale, *numbers_of(score_options)
    tile = tile_of(query, value, score_options, "query")
    _backward_query(
        (-(-nodes // tile["ROWS"]), query.shape[1]),
        (grad, query, key, value, result, total, deltas, by_query, *lists_of(plan), score_options.bias),
        (*numbers, *strides_of(grad, query, key, value, result, by_query)),
        **about,
        **tile,
    )
    tile = tile_of(query, value, score_options, "key")
    slots = len(parts) - -(-nodes // tile["ROWS"]) + len(divided)
    more_k, more_v = (
        query.new_empty((slots, groups, tile["ROWS"], about[size]), dtype=torch.float32)
        for size in ("E_BLOCK", "V_BLOCK")
    )
    arrays = plan.fold, plan.begin, plan.end, parts, score_options.bias
    _backward_key(
        (len(parts), groups),
        (grad, query, key, value, total, deltas, by_key, by_value, more_k, more_v, *arrays),
        (*numbers, *strides_of(grad, query, key, value, by_key, by_value)),
        **about,
        **tile,
    )
    if len(divided):
        _add_parts(
            (len(divided) * tile["ROWS"] // AT_ONCE, groups),
            (by_key, by_value, more_k, more_v, plan.end, divided),
            (nodes, score_options.scale, *strides_of(by_key, by_value)),
            **{size: about[size] for size in ("E", "E_BLOCK", "V", "V_BLOCK")},
            ROWS=tile["ROWS"],
            AT_ONCE=AT_ONCE,
        )
    return by_query, by_key, by_value
