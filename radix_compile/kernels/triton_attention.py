"""Attention on the prefix tree as Triton kernels: a program has a tile of nodes and one head.

After FlashAttention-2 (Dao, arXiv 2307.08691): online softmax, and a backward pass that computes the weights again from
the sums. What is new is where the keys are. Forward and for the gradient of queries, they are the ancestors of the
tile's first node, in stretches that need no mask where they can be (``TreeTiles``), and the tile itself. For the
gradients of keys, the queries are the descendants of the tile: one stretch of nodes, up to the largest ``end``. Nothing
is repeated for the heads of a group, and no result depends on the order in which programs run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.tree_arguments import Carried, TreeArrays, heads_inside
from radix_compile.tree_tiles import ROWS

LOG2E = math.log2(math.e)

TILES = {
    "forward": {"M": ROWS, "N": 64, "num_warps": 8, "num_stages": 3},
    "query": {"M": ROWS, "N": 64, "num_warps": 8, "num_stages": 3},
    "key": {"M": 64, "N": 32, "num_warps": 4, "num_stages": 2},
}
"""Of heads of 128 half-width numbers at most: nodes of a tile (``M``), and keys or queries at a time (``N``)."""
WIDE = {"M": ROWS, "N": 32, "num_warps": 8, "num_stages": 2}
WIDEST = {"M": ROWS, "N": 16, "num_warps": 8, "num_stages": 1}


@triton.jit
def _features(pointer, at, there, SIZE: tl.constexpr, ROOM: tl.constexpr, WHOLE: tl.constexpr):
    """``[rows, ROOM]``, the rows that start ``at`` these entries; ``WHOLE`` if all of them are there."""
    column = tl.arange(0, ROOM)
    if WHOLE and SIZE == ROOM:
        return tl.load(pointer + at[:, None] + column[None, :])
    if SIZE == ROOM:
        return tl.load(pointer + at[:, None] + column[None, :], mask=there[:, None], other=0.0)
    return tl.load(pointer + at[:, None] + column[None, :], mask=there[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _scores(q, k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log 2. ``scale`` is of the scores in those units, or with a soft cap of what the cap is given."""
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = softcap * (1 - 2 / (tl.exp2(scores) + 1))
    return scores


@triton.jit
def _depths(fold, begin, nodes, there):
    return (tl.load(fold + nodes, mask=there, other=0) - tl.load(begin + nodes, mask=there, other=0)).to(tl.int32)


@triton.jit
def _visible(i, depth_i, j, depth_j, stop, window, WINDOW: tl.constexpr):
    """Of the queries ``i``, which see which of the keys ``j``, that are ancestors of nodes before ``stop``?"""
    visible = (j[None, :] <= i[:, None]) & (i[:, None] < stop[None, :])
    if WINDOW:
        visible &= depth_i[:, None] - depth_j[None, :] < window
    return visible


@triton.jit
def _attend_to(
    largest, total, result, q, keys, values, visible, scale, softcap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    scores = _scores(q, tl.trans(keys), scale, softcap, CAPPED, PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1))
    base = largest_now
    if MASKED:
        # A row that has seen no key yet: its largest score is minus infinity, which must not be subtracted from itself.
        base = tl.where(largest_now == float("-inf"), 0.0, largest_now)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(largest - base)
    result = result * decay[:, None]
    result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
    return largest_now, total * decay + tl.sum(weights, 1), result


@triton.jit
def _forward(
    query, key, value, result, sums, fold, begin, end, runs, run_starts, keys, key_starts, sinks, nodes,
    window, scale, softcap, q_head, q_node, k_head, k_node, v_head, v_node, r_head, r_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # those with long paths first
    first = tile * M
    i = first + tl.arange(0, M)
    inside = i < nodes
    q = _features(query + head * q_head, i.to(tl.int64) * q_node, inside, E, E_BLOCK, False)
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    depth_i, nearest = i, 0
    if WINDOW:
        depth_i = _depths(fold, begin, i, inside)
        nearest = tl.maximum(tl.min(tl.where(inside, depth_i, 2147483647), 0) - window + 1, 0)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    attended = tl.zeros([M, V_BLOCK], tl.float32)
    step = tl.arange(0, N)
    for run in range(tl.load(run_starts + tile), tl.load(run_starts + tile + 1)):
        start, behind = tl.load(runs + 3 * run), tl.load(runs + 3 * run + 1)
        depth = 0
        if WINDOW:
            depth = tl.load(runs + 3 * run + 2).to(tl.int32)
            start += tl.maximum(nearest - depth, 0) // N * N
            depth += tl.maximum(nearest - depth, 0) // N * N
        for block in range(start, behind, N):
            k = _features(key + block * k_node, step * k_node, step >= 0, E, E_BLOCK, True)
            v = _features(value + block * v_node, step * v_node, step >= 0, V, V_BLOCK, True)
            visible = inside[:, None]
            if WINDOW:
                depth_j = depth + (block - start).to(tl.int32) + step
                visible = depth_i[:, None] - depth_j[None, :] < window
            largest, total, attended = _attend_to(
                largest, total, attended, q, k, v, visible, scale, softcap, WINDOW, CAPPED, PRECISION
            )
    for block in range(tl.load(key_starts + tile), tl.load(key_starts + tile + 1), N):
        j = tl.load(keys + block + step).to(tl.int32)
        there = j >= 0
        j = tl.where(there, j, 0)
        k = _features(key, j.to(tl.int64) * k_node, there, E, E_BLOCK, False)
        v = _features(value, j.to(tl.int64) * v_node, there, V, V_BLOCK, False)
        depth_j = j
        if WINDOW:
            depth_j = _depths(fold, begin, j, there)
        visible = _visible(i, depth_i, j, depth_j, tl.load(end + j, mask=there, other=0), window, WINDOW)
        largest, total, attended = _attend_to(
            largest, total, attended, q, k, v, visible, scale, softcap, True, CAPPED, PRECISION
        )
    for block in range(first, tl.minimum(first + M, nodes), N):
        j = block + step
        there = j < nodes
        k = _features(key, j.to(tl.int64) * k_node, there, E, E_BLOCK, False)
        v = _features(value, j.to(tl.int64) * v_node, there, V, V_BLOCK, False)
        depth_j = j
        if WINDOW:
            depth_j = _depths(fold, begin, j, there)
        visible = _visible(i, depth_i, j, depth_j, tl.load(end + j, mask=there, other=0), window, WINDOW)
        largest, total, attended = _attend_to(
            largest, total, attended, q, k, v, visible, scale, softcap, True, CAPPED, PRECISION
        )
    blind = total == 0
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        base = tl.maximum(largest, sink)
        decay = tl.exp2(largest - base)
        total = total * decay + tl.exp2(sink - base)
        attended = attended * decay[:, None]
        largest = base
    total = tl.where(total == 0, 1.0, total)
    attended = attended * tl.where(blind, 0.0, 1 / total)[:, None]
    logarithm = (largest + tl.log2(total)) / 1.4426950408889634
    if not SINKS:
        logarithm = tl.where(blind, float("inf"), logarithm)
    tl.store(sums + head * nodes + i, logarithm, mask=inside)
    column = tl.arange(0, V_BLOCK)
    tl.store(
        result + head * r_head + i.to(tl.int64)[:, None] * r_node + column[None, :],
        attended.to(result.dtype.element_ty), mask=inside[:, None] & (column < V)[None, :],
    )  # fmt: skip


@triton.jit
def _weights(
    q, k, summed, visible, scale, softcap, MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The weights of a tile again, and by what a gradient of scores is multiplied on its way through a soft cap."""
    scores = _scores(q, k, scale, softcap, CAPPED, PRECISION)
    slope = scores
    if CAPPED:
        slope = 1 - (scores / softcap) * (scores / softcap)
    scores -= summed
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    return tl.exp2(scores), slope


@triton.jit
def _by_query_from(
    found, q, g, summed, delta, keys, values, visible, scale, softcap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    weights, slope = _weights(q, tl.trans(keys), summed, visible, scale, softcap, MASKED, CAPPED, PRECISION)
    by_scores = weights * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - delta)
    if CAPPED:
        by_scores *= slope
    return tl.dot(by_scores.to(keys.dtype), keys, found, input_precision=PRECISION)


@triton.jit
def _backward_query(
    grad, query, key, value, sums, deltas, by_query, fold, begin, end, runs, run_starts, keys, key_starts, nodes,
    window, scale, softcap, factor,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, b_head, b_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = tile * M
    i = first + tl.arange(0, M)
    inside = i < nodes
    place = i.to(tl.int64)
    q = _features(query + head * q_head, place * q_node, inside, E, E_BLOCK, False)
    g = _features(grad + head * g_head, place * g_node, inside, V, V_BLOCK, False)
    summed = tl.load(sums + head * nodes + i, mask=inside, other=float("inf"))[:, None] * 1.4426950408889634
    delta = tl.load(deltas + head * nodes + i, mask=inside, other=0.0)[:, None]
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    depth_i, nearest = i, 0
    if WINDOW:
        depth_i = _depths(fold, begin, i, inside)
        nearest = tl.maximum(tl.min(tl.where(inside, depth_i, 2147483647), 0) - window + 1, 0)
    found = tl.zeros([M, E_BLOCK], tl.float32)
    step = tl.arange(0, N)
    for run in range(tl.load(run_starts + tile), tl.load(run_starts + tile + 1)):
        start, behind = tl.load(runs + 3 * run), tl.load(runs + 3 * run + 1)
        depth = 0
        if WINDOW:
            depth = tl.load(runs + 3 * run + 2).to(tl.int32)
            start += tl.maximum(nearest - depth, 0) // N * N
            depth += tl.maximum(nearest - depth, 0) // N * N
        for block in range(start, behind, N):
            k = _features(key + block * k_node, step * k_node, step >= 0, E, E_BLOCK, True)
            v = _features(value + block * v_node, step * v_node, step >= 0, V, V_BLOCK, True)
            visible = inside[:, None]
            if WINDOW:
                depth_j = depth + (block - start).to(tl.int32) + step
                visible = depth_i[:, None] - depth_j[None, :] < window
            found = _by_query_from(found, q, g, summed, delta, k, v, visible, scale, softcap, WINDOW, CAPPED, PRECISION)
    for block in range(tl.load(key_starts + tile), tl.load(key_starts + tile + 1), N):
        j = tl.load(keys + block + step).to(tl.int32)
        there = j >= 0
        j = tl.where(there, j, 0)
        k = _features(key, j.to(tl.int64) * k_node, there, E, E_BLOCK, False)
        v = _features(value, j.to(tl.int64) * v_node, there, V, V_BLOCK, False)
        depth_j = j
        if WINDOW:
            depth_j = _depths(fold, begin, j, there)
        visible = _visible(i, depth_i, j, depth_j, tl.load(end + j, mask=there, other=0), window, WINDOW)
        found = _by_query_from(found, q, g, summed, delta, k, v, visible, scale, softcap, True, CAPPED, PRECISION)
    for block in range(first, tl.minimum(first + M, nodes), N):
        j = block + step
        there = j < nodes
        k = _features(key, j.to(tl.int64) * k_node, there, E, E_BLOCK, False)
        v = _features(value, j.to(tl.int64) * v_node, there, V, V_BLOCK, False)
        depth_j = j
        if WINDOW:
            depth_j = _depths(fold, begin, j, there)
        visible = _visible(i, depth_i, j, depth_j, tl.load(end + j, mask=there, other=0), window, WINDOW)
        found = _by_query_from(found, q, g, summed, delta, k, v, visible, scale, softcap, True, CAPPED, PRECISION)
    column = tl.arange(0, E_BLOCK)
    target = by_query + head * b_head + place[:, None] * b_node + column[None, :]
    tl.store(target, (found * factor).to(by_query.dtype.element_ty), mask=inside[:, None] & (column < E)[None, :])


@triton.jit
def _by_key_from(
    found_k, found_v, keys, values, queries, grads, sums, deltas, start, nodes, j, depth_j, stop, fold, begin,
    window, scale, softcap, q_node, g_node,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What the queries from ``start`` on add to the gradients of keys and values."""
    step = tl.arange(0, N)
    i = start + step
    there = i < nodes
    q = _features(queries + tl.cast(start, tl.int64) * q_node, step * q_node, there, E, E_BLOCK, not MASKED)
    g = _features(grads + tl.cast(start, tl.int64) * g_node, step * g_node, there, V, V_BLOCK, not MASKED)
    summed = tl.load(sums + i, mask=there, other=float("inf"))[None, :] * 1.4426950408889634
    delta = tl.load(deltas + i, mask=there, other=0.0)[None, :]
    visible = there[None, :]
    if MASKED:
        visible = (j[:, None] <= i[None, :]) & (i[None, :] < stop[:, None]) & there[None, :]
    if WINDOW:
        visible &= _depths(fold, begin, i, there)[None, :] - depth_j[:, None] < window
    weights, slope = _weights(keys, tl.trans(q), summed, visible, scale, softcap, MASKED or WINDOW, CAPPED, PRECISION)
    found_v = tl.dot(weights.to(g.dtype), g, found_v, input_precision=PRECISION)
    by_scores = weights * (tl.dot(values, tl.trans(g), input_precision=PRECISION) - delta)
    if CAPPED:
        by_scores *= slope
    return tl.dot(by_scores.to(q.dtype), q, found_k, input_precision=PRECISION), found_v


@triton.jit
def _backward_key(
    grad, query, key, value, sums, deltas, by_key, by_value, fold, begin, end, nodes,
    window, scale, softcap, factor,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, bk_head, bk_node, bv_head, bv_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``M`` keys, and ``N`` queries at a time: no mask where all of the keys are ancestors of all of the queries."""
    first, group = tl.program_id(0) * M, tl.program_id(1)  # the first keys have most descendants
    j = first + tl.arange(0, M)
    inside = j < nodes
    place = j.to(tl.int64)
    keys = _features(key + group * k_head, place * k_node, inside, E, E_BLOCK, False)
    values = _features(value + group * v_head, place * v_node, inside, V, V_BLOCK, False)
    stop = tl.load(end + j, mask=inside, other=0).to(tl.int32)
    depth_j = j
    if WINDOW:
        depth_j = _depths(fold, begin, j, inside)
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
        for start in range(first, own, N):
            found_k, found_v = _by_key_from(
                found_k, found_v, keys, values, queries, grads, sums + head * nodes, deltas + head * nodes,
                start, tl.minimum(own, nodes), j, depth_j, stop, fold, begin, window, scale, softcap, q_node, g_node,
                E, E_BLOCK, V, V_BLOCK, WINDOW, True, CAPPED, PRECISION, N,
            )  # fmt: skip
        for start in range(own, whole, N):
            found_k, found_v = _by_key_from(
                found_k, found_v, keys, values, queries, grads, sums + head * nodes, deltas + head * nodes,
                start, nodes, j, depth_j, stop, fold, begin, window, scale, softcap, q_node, g_node,
                E, E_BLOCK, V, V_BLOCK, WINDOW, False, CAPPED, PRECISION, N,
            )  # fmt: skip
        for start in range(whole, last, N):
            found_k, found_v = _by_key_from(
                found_k, found_v, keys, values, queries, grads, sums + head * nodes, deltas + head * nodes,
                start, nodes, j, depth_j, stop, fold, begin, window, scale, softcap, q_node, g_node,
                E, E_BLOCK, V, V_BLOCK, WINDOW, True, CAPPED, PRECISION, N,
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


def _blocks(size: int) -> int:
    """A power of two, and no less than what a matrix product takes."""
    return max(16, int(triton.next_power_of_2(size)))


def _shape(query: Tensor, key: Tensor, value: Tensor, carried: Carried) -> dict[str, Any]:
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "E": query.shape[3],
        "E_BLOCK": _blocks(query.shape[3]),
        "V": value.shape[3],
        "V_BLOCK": _blocks(value.shape[3]),
        "WINDOW": carried.window is not None,
        "CAPPED": carried.softcap is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }


def _tile(query: Tensor, value: Tensor, kernel: str) -> dict[str, int]:
    width = max(_blocks(query.shape[3]), _blocks(value.shape[3])) * query.dtype.itemsize
    return TILES[kernel] if width <= 256 else WIDE if width <= 512 else WIDEST


def _lists(plan: TreeArrays) -> tuple[Tensor, ...]:
    """What leads to the keys of a tile."""
    arrays = plan.fold, plan.begin, plan.end, plan.runs, plan.run_starts, plan.keys, plan.key_starts
    if any(one is None for one in arrays):
        raise RuntimeError("on this device tree_attention needs tiles: pass runs, run_starts, keys and key_starts")
    return arrays  # type: ignore[return-value]


def _numbers(carried: Carried) -> tuple[int, float, float]:
    """``window``, and ``scale`` and ``softcap`` as :func:`_scores` takes them."""
    window, scale, softcap = carried.window or 0, carried.scale, carried.softcap
    if softcap is None:
        return window, scale * LOG2E, 0.0
    return window, 2 * scale / softcap * LOG2E, softcap * LOG2E


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in (tensor.stride(1), tensor.stride(2))]


def _dense(tensor: Tensor) -> Tensor:
    """With the features side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreeArrays,
    carried: Carried,
) -> tuple[Tensor, Tensor]:
    """The op ``tree_attention``."""
    query, key, value = map(_dense, (query, key, value))
    heads, nodes = query.shape[1:3]
    result = heads_inside(query, value.shape[3])
    total = query.new_empty((heads, nodes), dtype=torch.float32)
    tile = _tile(query, value, "forward")
    _forward[(triton.cdiv(nodes, tile["M"]), heads)](
        query, key, value, result, total, *_lists(plan), carried.sinks, nodes, *_numbers(carried),
        *_strides(query, key, value, result),
        **_shape(query, key, value, carried), SINKS=carried.sinks is not None, **tile,
    )  # fmt: skip
    return result, total


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
    grad, query, key, value = map(_dense, (grad, query, key, value))
    (heads, nodes), groups = query.shape[1:3], key.shape[1]
    deltas = (grad[0] * result[0]).sum(-1, dtype=torch.float32).contiguous()
    by_query, by_key, by_value = map(heads_inside, (query, key, value))
    about, numbers = _shape(query, key, value, carried), (*_numbers(carried), carried.scale)
    tile = _tile(query, value, "query")
    _backward_query[(triton.cdiv(nodes, tile["M"]), heads)](
        grad, query, key, value, total, deltas, by_query, *_lists(plan), nodes, *numbers,
        *_strides(grad, query, key, value, by_query), **about, **tile,
    )  # fmt: skip
    tile = _tile(query, value, "key")
    _backward_key[(triton.cdiv(nodes, tile["M"]), groups)](
        grad, query, key, value, total, deltas, by_key, by_value, plan.fold, plan.begin, plan.end, nodes, *numbers,
        *_strides(grad, query, key, value, by_key, by_value), **about, **tile,
    )  # fmt: skip
    return by_query, by_key, by_value
