"""Attention on the prefix tree as Triton kernels: a program has a tile of nodes and one head.

After FlashAttention-2 (Dao, arXiv 2307.08691): online softmax, and a backward pass that computes the weights again from
the sums. What is new is where the keys are. Forward and for the gradient of queries, they are the ancestors of the
tile's first node, gathered along the path, and the tile itself. For the gradients of keys, the queries are the
descendants of the tile: one stretch of nodes, up to the largest ``end``. Neither is listed anywhere, nothing is
repeated for the heads of a group, and no result depends on the order in which programs run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)

TILES = {
    "forward": {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3},
    "query": {"M": 128, "N": 64, "num_warps": 8, "num_stages": 2},
    "key": {"M": 128, "N": 64, "num_warps": 8, "num_stages": 2},
}
"""Of heads of 128 half-width numbers at most."""


@triton.jit
def _scores(q, k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log 2. ``scale`` is of the scores in those units, or with a soft cap of what the cap is given."""
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = softcap * (1 - 2 / (tl.exp2(scores) + 1))
    return scores


@triton.jit
def _attend_to(
    j, there, depth_j,
    i, depth_i, q, largest, total, result,
    key, value, key_stride, value_stride, end, window, scale, softcap,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, with the keys ``j``."""
    e, v = tl.arange(0, E_BLOCK), tl.arange(0, V_BLOCK)
    stop = tl.load(end + j, mask=there, other=0)
    place = j.to(tl.int64)
    keys = tl.load(key + place[None, :] * key_stride + e[:, None], mask=there[None, :] & (e < E)[:, None], other=0.0)
    scores = _scores(q, keys, scale, softcap, CAPPED, PRECISION)
    visible = (j[None, :] <= i[:, None]) & (i[:, None] < stop[None, :])
    if WINDOW:
        visible &= depth_i[:, None] - depth_j[None, :] < window
    scores = tl.where(visible, scores, float("-inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen no key yet: its largest score is minus infinity, which must not be subtracted from itself.
    base = tl.where(largest_now == float("-inf"), 0.0, largest_now)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(largest - base)
    values = tl.load(
        value + place[:, None] * value_stride + v[None, :], mask=there[:, None] & (v < V)[None, :], other=0.0
    )
    result = result * decay[:, None]
    result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
    return largest_now, total * decay + tl.sum(weights, 1), result


@triton.jit
def _forward(
    query, key, value, result, sums, fold, scatter, begin, end, sinks, nodes, window, scale, softcap,
    q_head, q_node, k_head, k_node, v_head, v_node, r_head, r_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # those with long paths first
    first = tile * M
    i = first + tl.arange(0, M)
    inside = i < nodes
    e, v = tl.arange(0, E_BLOCK), tl.arange(0, V_BLOCK)
    q = tl.load(
        query + head * q_head + i.to(tl.int64)[:, None] * q_node + e[None, :],
        mask=inside[:, None] & (e < E)[None, :], other=0.0,
    )  # fmt: skip
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    root = tl.load(begin + first)
    path, own = root, tl.load(fold + first)
    depth_i = i
    if WINDOW:
        depth_i = (tl.load(fold + i, mask=inside, other=0) - tl.load(begin + i, mask=inside, other=0)).to(tl.int32)
        nearest = tl.min(tl.where(inside, depth_i, 2147483647), 0)
        path += tl.maximum(nearest - window + 1, 0)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    attended = tl.zeros([M, V_BLOCK], tl.float32)
    for row in range(path, own, N):
        rows = row + tl.arange(0, N)
        j = tl.load(scatter + rows, mask=rows < own, other=-1).to(tl.int32)
        there = (j >= 0) & (j < first)  # not what is left out, or outside of the tree
        largest, total, attended = _attend_to(
            tl.where(there, j, 0), there, (rows - root).to(tl.int32), i, depth_i, q, largest, total, attended,
            key, value, k_node, v_node, end, window, scale, softcap,
            E, E_BLOCK, V, V_BLOCK, WINDOW, CAPPED, PRECISION,
        )  # fmt: skip
    for start in range(first, tl.minimum(first + M, nodes), N):
        j = start + tl.arange(0, N)
        there = j < nodes
        depth_j = j
        if WINDOW:
            depth_j = (tl.load(fold + j, mask=there, other=0) - tl.load(begin + j, mask=there, other=0)).to(tl.int32)
        largest, total, attended = _attend_to(
            j, there, depth_j, i, depth_i, q, largest, total, attended,
            key, value, k_node, v_node, end, window, scale, softcap,
            E, E_BLOCK, V, V_BLOCK, WINDOW, CAPPED, PRECISION,
        )  # fmt: skip
    blind = total == 0
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        base = tl.maximum(largest, sink)
        decay = tl.exp2(largest - base)
        total = total * decay + tl.exp2(sink - base)
        attended = attended * decay[:, None]
        largest = base
    weight = tl.where(blind, 0.0, 1 / tl.where(total == 0, 1.0, total))
    attended = attended * weight[:, None]
    logarithm = (largest + tl.log2(tl.where(total == 0, 1.0, total))) / 1.4426950408889634
    if not SINKS:
        logarithm = tl.where(blind, float("inf"), logarithm)
    tl.store(sums + head * nodes + i, logarithm, mask=inside)
    tl.store(
        result + head * r_head + i.to(tl.int64)[:, None] * r_node + v[None, :],
        attended.to(result.dtype.element_ty), mask=inside[:, None] & (v < V)[None, :],
    )  # fmt: skip


@triton.jit
def _weights(
    q, keys, summed, visible, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The weights of a tile again, and by what a gradient of scores is multiplied on its way through a soft cap."""
    scores = _scores(q, keys, scale, softcap, CAPPED, PRECISION)
    weights = tl.exp2(tl.where(visible, scores - summed, float("-inf")))
    slope = weights
    if CAPPED:
        capped = scores / softcap
        slope = 1 - capped * capped
    return weights, slope


@triton.jit
def _by_query_from(
    j, there, depth_j,
    i, depth_i, q, g, summed, delta, by_query,
    key, value, key_stride, value_stride, end, window, scale, softcap,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    e, v = tl.arange(0, E_BLOCK), tl.arange(0, V_BLOCK)
    stop = tl.load(end + j, mask=there, other=0)
    place = j.to(tl.int64)
    keys = tl.load(key + place[None, :] * key_stride + e[:, None], mask=there[None, :] & (e < E)[:, None], other=0.0)
    visible = (j[None, :] <= i[:, None]) & (i[:, None] < stop[None, :])
    if WINDOW:
        visible &= depth_i[:, None] - depth_j[None, :] < window
    weights, slope = _weights(q, keys, summed[:, None], visible, scale, softcap, CAPPED, PRECISION)
    values = tl.load(
        value + place[None, :] * value_stride + v[:, None], mask=there[None, :] & (v < V)[:, None], other=0.0
    )
    by_weights = tl.dot(g, values, input_precision=PRECISION)
    by_scores = weights * (by_weights - delta[:, None])
    if CAPPED:
        by_scores *= slope
    return tl.dot(by_scores.to(keys.dtype), tl.trans(keys), by_query, input_precision=PRECISION)


@triton.jit
def _backward_query(
    grad, query, key, value, sums, deltas, by_query, fold, scatter, begin, end, nodes,
    window, scale, softcap, factor,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, b_head, b_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first = tile * M
    i = first + tl.arange(0, M)
    inside = i < nodes
    place = i.to(tl.int64)[:, None]
    e, v = tl.arange(0, E_BLOCK), tl.arange(0, V_BLOCK)
    own_e, own_v = inside[:, None] & (e < E)[None, :], inside[:, None] & (v < V)[None, :]
    q = tl.load(query + head * q_head + place * q_node + e[None, :], mask=own_e, other=0.0)
    g = tl.load(grad + head * g_head + place * g_node + v[None, :], mask=own_v, other=0.0)
    summed = tl.load(sums + head * nodes + i, mask=inside, other=float("inf")) * 1.4426950408889634
    delta = tl.load(deltas + head * nodes + i, mask=inside, other=0.0)
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    root = tl.load(begin + first)
    path, own = root, tl.load(fold + first)
    depth_i = i
    if WINDOW:
        depth_i = (tl.load(fold + i, mask=inside, other=0) - tl.load(begin + i, mask=inside, other=0)).to(tl.int32)
        nearest = tl.min(tl.where(inside, depth_i, 2147483647), 0)
        path += tl.maximum(nearest - window + 1, 0)
    found = tl.zeros([M, E_BLOCK], tl.float32)
    for row in range(path, own, N):
        rows = row + tl.arange(0, N)
        j = tl.load(scatter + rows, mask=rows < own, other=-1).to(tl.int32)
        there = (j >= 0) & (j < first)
        found = _by_query_from(
            tl.where(there, j, 0), there, (rows - root).to(tl.int32), i, depth_i, q, g, summed, delta, found,
            key, value, k_node, v_node, end, window, scale, softcap,
            E, E_BLOCK, V, V_BLOCK, WINDOW, CAPPED, PRECISION,
        )  # fmt: skip
    for start in range(first, tl.minimum(first + M, nodes), N):
        j = start + tl.arange(0, N)
        there = j < nodes
        depth_j = j
        if WINDOW:
            depth_j = (tl.load(fold + j, mask=there, other=0) - tl.load(begin + j, mask=there, other=0)).to(tl.int32)
        found = _by_query_from(
            j, there, depth_j, i, depth_i, q, g, summed, delta, found,
            key, value, k_node, v_node, end, window, scale, softcap,
            E, E_BLOCK, V, V_BLOCK, WINDOW, CAPPED, PRECISION,
        )  # fmt: skip
    target = by_query + head * b_head + place * b_node + e[None, :]
    tl.store(target, (found * factor).to(by_query.dtype.element_ty), mask=own_e)


@triton.jit
def _backward_key(
    grad, query, key, value, sums, deltas, by_key, by_value, fold, begin, end, nodes,
    window, scale, softcap, factor,
    g_head, g_node, q_head, q_node, k_head, k_node, v_head, v_node, bk_head, bk_node, bv_head, bv_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``M`` keys, and ``N`` queries at a time."""
    first, group = tl.program_id(0) * M, tl.program_id(1)  # the first keys have most descendants
    j = first + tl.arange(0, M)
    inside = j < nodes
    place = j.to(tl.int64)
    e, v = tl.arange(0, E_BLOCK), tl.arange(0, V_BLOCK)
    own_e, own_v = inside[:, None] & (e < E)[None, :], inside[:, None] & (v < V)[None, :]
    keys = tl.load(key + group * k_head + place[:, None] * k_node + e[None, :], mask=own_e, other=0.0)
    values = tl.load(value + group * v_head + place[:, None] * v_node + v[None, :], mask=own_v, other=0.0)
    stop = tl.load(end + j, mask=inside, other=0)
    depth_j = j
    if WINDOW:
        depth_j = (tl.load(fold + j, mask=inside, other=0) - tl.load(begin + j, mask=inside, other=0)).to(tl.int32)
    last = tl.max(stop, 0)
    found_k = tl.zeros([M, E_BLOCK], tl.float32)
    found_v = tl.zeros([M, V_BLOCK], tl.float32)
    for start in range(first, last, N):
        i = (start + tl.arange(0, N)).to(tl.int32)
        there = i < nodes
        visible = (j[:, None] <= i[None, :]) & (i[None, :] < stop[:, None]) & there[None, :]
        if WINDOW:
            depth_i = (tl.load(fold + i, mask=there, other=0) - tl.load(begin + i, mask=there, other=0)).to(tl.int32)
            visible &= depth_i[None, :] - depth_j[:, None] < window
        row = i.to(tl.int64)
        for member in range(GROUP):
            head = group * GROUP + member
            q = tl.load(
                query + head * q_head + row[None, :] * q_node + e[:, None],
                mask=there[None, :] & (e < E)[:, None], other=0.0,
            )  # fmt: skip
            g = tl.load(
                grad + head * g_head + row[:, None] * g_node + v[None, :],
                mask=there[:, None] & (v < V)[None, :], other=0.0,
            )  # fmt: skip
            summed = tl.load(sums + head * nodes + i, mask=there, other=float("inf")) * 1.4426950408889634
            delta = tl.load(deltas + head * nodes + i, mask=there, other=0.0)
            weights, slope = _weights(keys, q, summed[None, :], visible, scale, softcap, CAPPED, PRECISION)
            found_v = tl.dot(weights.to(g.dtype), g, found_v, input_precision=PRECISION)
            by_weights = tl.dot(values, tl.trans(g), input_precision=PRECISION)
            by_scores = weights * (by_weights - delta[None, :])
            if CAPPED:
                by_scores *= slope
            found_k = tl.dot(by_scores.to(q.dtype), tl.trans(q), found_k, input_precision=PRECISION)
    to_key = by_key + group * bk_head + place[:, None] * bk_node + e[None, :]
    tl.store(to_key, (found_k * factor).to(by_key.dtype.element_ty), mask=own_e)
    to_value = by_value + group * bv_head + place[:, None] * bv_node + v[None, :]
    tl.store(to_value, found_v.to(by_value.dtype.element_ty), mask=own_v)


def _blocks(size: int) -> int:
    """A power of two, and no less than what a matrix product takes."""
    return max(16, int(triton.next_power_of_2(size)))


def _shape(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> dict[str, Any]:
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "E": query.shape[3],
        "E_BLOCK": _blocks(query.shape[3]),
        "V": value.shape[3],
        "V_BLOCK": _blocks(value.shape[3]),
        "WINDOW": window is not None,
        "CAPPED": softcap is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }


def _tile(query: Tensor, value: Tensor, kernel: str) -> dict[str, int]:
    """Nodes of a tile (``M``), and keys or queries at a time (``N``), of the kernel "forward", "query" or "key"."""
    width = max(_blocks(query.shape[3]), _blocks(value.shape[3])) * query.dtype.itemsize
    if width > 512:
        return {"M": 64, "N": 32, "num_warps": 4, "num_stages": 1}
    if width > 256:
        return {"M": 64, "N": 32, "num_warps": 4, "num_stages": 2}
    return TILES[kernel]


def _units(scale: float, softcap: float | None) -> tuple[float, float]:
    """``scale`` and ``softcap`` as :func:`_scores` takes them."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2 * scale / softcap * LOG2E, softcap * LOG2E


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in (tensor.stride(1), tensor.stride(2))]


def _dense(tensor: Tensor) -> Tensor:
    """With the features side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fold: Tensor,
    scatter: Tensor,
    begin: Tensor,
    end: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The op ``tree_attention``."""
    query, key, value = map(_dense, (query, key, value))
    heads, nodes = query.shape[1:3]
    result = query.new_empty((1, nodes, heads, value.shape[3])).transpose(1, 2)
    total = query.new_empty((heads, nodes), dtype=torch.float32)
    tile = _tile(query, value, "forward")
    _forward[(triton.cdiv(nodes, tile["M"]), heads)](
        query, key, value, result, total, fold, scatter, begin, end, sinks, nodes, window or 0, *_units(scale, softcap),
        *_strides(query, key, value, result),
        **_shape(query, key, value, window, softcap), SINKS=sinks is not None, **tile,
    )  # fmt: skip
    return result, total


def tree_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    total: Tensor,
    fold: Tensor,
    scatter: Tensor,
    begin: Tensor,
    end: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``tree_attention_backward``."""
    grad, query, key, value = map(_dense, (grad, query, key, value))
    (heads, nodes), groups = query.shape[1:3], key.shape[1]
    deltas = (grad[0] * result[0]).sum(-1, dtype=torch.float32).contiguous()
    by_query, by_key, by_value = (
        one.new_empty((1, nodes, one.shape[1], one.shape[3])).transpose(1, 2) for one in (query, key, value)
    )
    about = _shape(query, key, value, window, softcap)
    carried = window or 0, *_units(scale, softcap), scale
    tile = _tile(query, value, "query")
    _backward_query[(triton.cdiv(nodes, tile["M"]), heads)](
        grad, query, key, value, total, deltas, by_query, fold, scatter, begin, end, nodes, *carried,
        *_strides(grad, query, key, value, by_query), **about, **tile,
    )  # fmt: skip
    tile = _tile(query, value, "key")
    _backward_key[(triton.cdiv(nodes, tile["M"]), groups)](
        grad, query, key, value, total, deltas, by_key, by_value, fold, begin, end, nodes, *carried,
        *_strides(grad, query, key, value, by_key, by_value), **about, **tile,
    )  # fmt: skip
    return by_query, by_key, by_value
