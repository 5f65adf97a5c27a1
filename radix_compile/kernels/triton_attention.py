"""Attention on the prefix tree as Triton kernels: a program has a tile of nodes and one head.

After FlashAttention-2 (Dao, arXiv 2307.08691): online softmax, and a backward pass that computes the weights again from
the sums. What is new is where the keys are. Forward and for the gradient of queries, they are the ancestors of the
tile's first node, in stretches that need no mask where they can be (``TritonTiles``), and the tile itself. For the
gradients of keys, the queries are the descendants of the tile: one stretch of nodes, up to the largest ``end``. Nothing
is repeated for the heads of a group, and no result depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, dense, heads_inside
from radix_compile.kernels.triton_launch import kernel
from radix_compile.kernels.triton_tree import (
    bias_rows,
    depths_of,
    features,
    keys_of,
    keys_of_run,
    lists_of,
    numbers_of,
    scores_of,
    shape_of,
    stretch_of,
    strides_of,
    tile_of,
)


@triton.jit
def _attend_to(
    largest, total, result, q, keys, values, visible, scale, softcap,
    MASKED: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax. ``visible`` is a bias if they are ``BIASED``."""
    if FUSED:  # the scale is part of the difference from the largest
        scores, unit = tl.dot(q, tl.trans(keys), input_precision=PRECISION), scale
    else:
        scores, unit = scores_of(q, tl.trans(keys), scale, softcap, CAPPED, PRECISION), 1.0
    if BIASED:
        scores += visible
    elif MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1) * unit)
    base = largest_now
    if MASKED or BIASED:
        # A row that has seen no key yet: its largest score is minus infinity, which must not be subtracted from itself.
        base = tl.where(largest_now == float("-inf"), 0.0, largest_now)
    weights = tl.exp2(scores * unit - base[:, None])
    decay = tl.exp2(largest - base)
    result = result * decay[:, None]
    result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
    return largest_now, total * decay + tl.sum(weights, 1), result


@kernel
def _forward(
    query, key, value, result, sums, fold, begin, end, stretches, stretch_starts, keys, key_starts, sinks, bias,
    nodes, window, scale, softcap, columns, b_batch, b_head, b_row, b_key,
    q_head, q_node, k_head, k_node, v_head, v_node, r_head, r_node,
    GROUP: tl.constexpr, E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    FUSED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # long paths first
    i = tile * ROWS + tl.arange(0, ROWS)
    inside = i < nodes
    place = i.to(tl.int64)
    q = features(query + head * q_head, place * q_node, inside, E, E_BLOCK, False)
    key += (head // GROUP) * k_head
    value += (head // GROUP) * v_head
    depth_i, nearest = depths_of(fold, begin, i, inside, window, WINDOW)
    at = i
    if BIASED:
        bias += head * b_head
        at = bias_rows(fold, begin, i, inside, columns, b_batch, b_row, b_key)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, V_BLOCK], tl.float32)
    step = tl.arange(0, N)
    for stretch in range(tl.load(stretch_starts + tile), tl.load(stretch_starts + tile + 1)):
        start, behind, depth = stretch_of(stretches, stretch, nearest, N, WINDOW, BIASED)
        for block in range(start, behind, N):
            k, v, visible = keys_of_run(
                key, value, k_node, v_node, block, step, depth + block - start, inside, depth_i, window,
                bias, at, b_key, E, E_BLOCK, V, V_BLOCK, WINDOW, BIASED,
            )  # fmt: skip
            largest, total, attended = _attend_to(
                largest, total, attended, q, k, v, visible, scale, softcap, WINDOW, BIASED, CAPPED, FUSED, PRECISION
            )
    for block in range(tl.load(key_starts + tile), tl.load(key_starts + tile + 1), N):
        j = tl.load(keys + block + step).to(tl.int32)
        there = j >= 0
        k, v, visible = keys_of(
            key, value, k_node, v_node, tl.where(there, j, 0), there, i, depth_i, fold, begin, end, window,
            bias, at, b_key, E, E_BLOCK, V, V_BLOCK, WINDOW, BIASED,
        )  # fmt: skip
        largest, total, attended = _attend_to(
            largest, total, attended, q, k, v, visible, scale, softcap, True, BIASED, CAPPED, FUSED, PRECISION
        )
    for block in range(tile * ROWS, tl.minimum(tile * ROWS + ROWS, nodes), N):
        j = block + step
        there = j < nodes
        k, v, visible = keys_of(
            key, value, k_node, v_node, j, there, i, depth_i, fold, begin, end, window,
            bias, at, b_key, E, E_BLOCK, V, V_BLOCK, WINDOW, BIASED,
        )  # fmt: skip
        largest, total, attended = _attend_to(
            largest, total, attended, q, k, v, visible, scale, softcap, True, BIASED, CAPPED, FUSED, PRECISION
        )
    fully_masked = total == 0
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        base = tl.maximum(largest, sink)
        decay = tl.exp2(largest - base)
        total = total * decay + tl.exp2(sink - base)
        attended = attended * decay[:, None]
        largest = base
    total = tl.where(total == 0, 1.0, total)
    attended = attended * tl.where(fully_masked, 0.0, 1 / total)[:, None]
    logarithm = (largest + tl.log2(total)) / 1.4426950408889634
    if not SINKS:
        logarithm = tl.where(fully_masked, float("inf"), logarithm)
    tl.store(sums + head * nodes + i, logarithm, mask=inside)
    column = tl.arange(0, V_BLOCK)
    tl.store(
        result + head * r_head + place[:, None] * r_node + column[None, :],
        attended.to(result.dtype.element_ty), mask=inside[:, None] & (column < V)[None, :],
    )  # fmt: skip


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreeArrays,
    score_options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    """The op ``tree_attention``."""
    query, key, value = map(dense, (query, key, value))
    heads, nodes = query.shape[1:3]
    result = heads_inside(query, value.shape[3])
    total = query.new_empty((heads, nodes), dtype=torch.float32)
    tile = tile_of(query, value, score_options, "forward")
    sinks = None if score_options.sinks is None else score_options.sinks.contiguous()
    fused = score_options.scale > 0 and score_options.softcap is None and score_options.bias is None
    _forward(
        (-(-nodes // tile["ROWS"]), heads),
        (query, key, value, result, total, *lists_of(plan), sinks, score_options.bias),
        (nodes, *numbers_of(score_options), *strides_of(query, key, value, result)),
        **shape_of(query, key, value, score_options),
        SINKS=sinks is not None,
        FUSED=fused,
        **tile,
    )
    return result, total
