"""The gradient of attention on the prefix tree as Triton kernels: see ``triton_attention``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.tree_arguments import Carried, TreeArrays, heads_inside
from radix_compile.kernels.triton_tree import (
    bias_and_strides,
    bias_of,
    bias_rows,
    dense,
    depths,
    depths_of,
    features,
    keys_of,
    keys_of_run,
    lists_of,
    numbers_of,
    run_of,
    scores_of,
    shape_of,
    strides_of,
    tile_of,
)


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


@triton.jit
def _backward_query(
    grad, query, key, value, sums, deltas, by_query, fold, begin, end, runs, run_starts, keys, key_starts, nodes,
    window, scale, softcap, factor, bias, columns, b_batch, b_head, b_row, b_key,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, r_head, r_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = tile * M
    i = first + tl.arange(0, M)
    inside = i < nodes
    place = i.to(tl.int64)
    q = features(query + head * q_head, place * q_node, inside, E, E_BLOCK, False)
    g = features(grad + head * g_head, place * g_node, inside, V, V_BLOCK, False)
    summed = tl.load(sums + head * nodes + i, mask=inside, other=float("inf"))[:, None] * 1.4426950408889634
    delta = tl.load(deltas + head * nodes + i, mask=inside, other=0.0)[:, None]
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    depth_i, nearest = depths_of(fold, begin, i, inside, window, WINDOW)
    at = i
    if BIASED:
        bias += head * b_head
        at = bias_rows(fold, begin, i, inside, columns, b_batch, b_row, b_key)
    found = tl.zeros([M, E_BLOCK], tl.float32)
    step = tl.arange(0, N)
    for run in range(tl.load(run_starts + tile), tl.load(run_starts + tile + 1)):
        start, behind, depth = run_of(runs, run, nearest, N, WINDOW, BIASED)
        for block in range(start, behind, N):
            k, v, visible = keys_of_run(
                key, value, k_node, v_node, block, step, depth + (block - start).to(tl.int32), inside, depth_i, window,
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
    for block in range(first, tl.minimum(first + M, nodes), N):
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
    target = by_query + head * r_head + place[:, None] * r_node + column[None, :]
    tl.store(target, (found * factor).to(by_query.dtype.element_ty), mask=inside[:, None] & (column < E)[None, :])


@triton.jit
def _by_key_from(
    found_k, found_v, keys, values, queries, grads, sums, deltas, start, nodes, j, depth_j, stop, fold, begin,
    window, scale, softcap, bias, columns, b_batch, b_row, b_key, q_node, g_node,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """What the queries from ``start`` on add to the gradients of keys and values."""
    step = tl.arange(0, N)
    i = start + step
    there = i < nodes
    q = features(queries + tl.cast(start, tl.int64) * q_node, step * q_node, there, E, E_BLOCK, not MASKED)
    g = features(grads + tl.cast(start, tl.int64) * g_node, step * g_node, there, V, V_BLOCK, not MASKED)
    summed = tl.load(sums + i, mask=there, other=float("inf"))[None, :] * 1.4426950408889634
    delta = tl.load(deltas + i, mask=there, other=0.0)[None, :]
    visible = there[None, :]
    if MASKED:
        visible = (j[:, None] <= i[None, :]) & (i[None, :] < stop[:, None]) & there[None, :]
    if WINDOW:
        visible &= depths(fold, begin, i, there)[None, :] - depth_j[:, None] < window
    if BIASED:
        at = bias_rows(fold, begin, i, there, columns, b_batch, b_row, b_key)
        visible = bias_of(bias, at[None, :] + depth_j[:, None] * b_key, visible & (stop > 0)[:, None])
    weights, slope = _weights(
        keys, tl.trans(q), summed, visible, scale, softcap, MASKED or WINDOW, BIASED, CAPPED, PRECISION
    )
    found_v = tl.dot(weights.to(g.dtype), g, found_v, input_precision=PRECISION)
    by_scores = weights * (tl.dot(values, tl.trans(g), input_precision=PRECISION) - delta)
    if CAPPED:
        by_scores *= slope
    return tl.dot(by_scores.to(q.dtype), q, found_k, input_precision=PRECISION), found_v


@triton.jit
def _backward_key(
    grad, query, key, value, sums, deltas, by_key, by_value, fold, begin, end, nodes,
    window, scale, softcap, factor, bias, columns, b_batch, b_head, b_row, b_key,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, bk_head, bk_node, bv_head, bv_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``M`` keys, and ``N`` queries at a time: no mask where all of the keys are ancestors of all of the queries."""
    first, group = tl.program_id(0) * M, tl.program_id(1)  # the first keys have most descendants
    j = first + tl.arange(0, M)
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
    own = tl.minimum(first + M, last)
    common = tl.min(tl.where(stop > 0, stop, last), 0)
    whole = own + tl.maximum(common - own, 0) // N * N
    found_k = tl.zeros([M, E_BLOCK], tl.float32)
    found_v = tl.zeros([M, V_BLOCK], tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        queries, grads = query + head * q_head, grad + head * g_head
        biases = bias
        if BIASED:
            biases = bias + head * b_head
        for start in range(first, own, N):
            found_k, found_v = _by_key_from(
                found_k, found_v, keys, values, queries, grads, sums + head * nodes, deltas + head * nodes,
                start, tl.minimum(own, nodes), j, depth_j, stop, fold, begin, window, scale, softcap,
                biases, columns, b_batch, b_row, b_key, q_node, g_node,
                E, E_BLOCK, V, V_BLOCK, WINDOW, True, BIASED, CAPPED, PRECISION, N,
            )  # fmt: skip
        for start in range(own, whole, N):
            found_k, found_v = _by_key_from(
                found_k, found_v, keys, values, queries, grads, sums + head * nodes, deltas + head * nodes,
                start, nodes, j, depth_j, stop, fold, begin, window, scale, softcap,
                biases, columns, b_batch, b_row, b_key, q_node, g_node,
                E, E_BLOCK, V, V_BLOCK, WINDOW, False, BIASED, CAPPED, PRECISION, N,
            )  # fmt: skip
        for start in range(whole, last, N):
            found_k, found_v = _by_key_from(
                found_k, found_v, keys, values, queries, grads, sums + head * nodes, deltas + head * nodes,
                start, nodes, j, depth_j, stop, fold, begin, window, scale, softcap,
                biases, columns, b_batch, b_row, b_key, q_node, g_node,
                E, E_BLOCK, V, V_BLOCK, WINDOW, True, BIASED, CAPPED, PRECISION, N,
            )  # fmt: skip
    seen = (stop > 0)[:, None]
    column, inside = tl.arange(0, E_BLOCK), inside[:, None]
    found_k = tl.where(seen, found_k * factor, 0.0)
    to_key = by_key + group * bk_head + place[:, None] * bk_node + column[None, :]
    tl.store(to_key, found_k.to(by_key.dtype.element_ty), mask=inside & (column < E)[None, :])
    column = tl.arange(0, V_BLOCK)
    to_value = by_value + group * bv_head + place[:, None] * bv_node + column[None, :]
    found_v = tl.where(seen, found_v, 0.0)
    tl.store(to_value, found_v.to(by_value.dtype.element_ty), mask=inside & (column < V)[None, :])


def tree_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    total: Tensor,
    plan: TreeArrays,
    carried: Carried,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``tree_attention_backward``."""
    grad, query, key, value = map(dense, (grad, query, key, value))
    (heads, nodes), groups = query.shape[1:3], key.shape[1]
    deltas = (grad[0] * result[0]).sum(-1, dtype=torch.float32).contiguous()
    by_query, by_key, by_value = map(heads_inside, (query, key, value))
    about = shape_of(query, key, value, carried)
    numbers = *numbers_of(carried), carried.scale, *bias_and_strides(carried)
    tile = tile_of(query, value, carried, "query")
    _backward_query[(triton.cdiv(nodes, tile["M"]), heads)](
        grad, query, key, value, total, deltas, by_query, *lists_of(plan), nodes, *numbers,
        *strides_of(grad, query, key, value, by_query), **about, **tile,
    )  # fmt: skip
    tile = tile_of(query, value, carried, "key")
    _backward_key[(triton.cdiv(nodes, tile["M"]), groups)](
        grad, query, key, value, total, deltas, by_key, by_value, plan.fold, plan.begin, plan.end, nodes, *numbers,
        *strides_of(grad, query, key, value, by_key, by_value), **about, **tile,
    )  # fmt: skip
    return by_query, by_key, by_value
