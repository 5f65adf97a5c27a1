"""Shared by the Triton kernels of attention on the prefix tree: where keys are, scores, and the sizes of tiles."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile import torch_internals as internals
from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, row_bytes
from radix_compile.plan.triton_tiles import KEYS, ROWS

LOG2E = math.log2(math.e)

COARSE = {
    "forward": {"N": 64, "num_warps": 4, "num_stages": 3},
    "query": {"N": 64, "num_warps": 4, "num_stages": 2},
    "key": {"N": 32, "num_warps": 4, "num_stages": 2},
}
"""Keys or queries at a time (``N``): what is fastest on an H100 for heads of 128 half-width numbers."""
MEDIUM = {"N": 32, "num_warps": 8, "num_stages": 2}
"""For what would not fit into registers or shared memory then: wider heads, or a bias, a tile of scores more."""
FINE = {"N": 16, "num_warps": 8, "num_stages": 2}


@triton.jit
def features(pointer, at, there, SIZE: tl.constexpr, ROOM: tl.constexpr, WHOLE: tl.constexpr):
    """``[rows, ROOM]``, the rows that start ``at`` these entries; ``WHOLE`` if all of them are there."""
    column = tl.arange(0, ROOM)
    if WHOLE and SIZE == ROOM:
        return tl.load(pointer + at[:, None] + column[None, :])
    if SIZE == ROOM:
        return tl.load(pointer + at[:, None] + column[None, :], mask=there[:, None], other=0.0)
    return tl.load(pointer + at[:, None] + column[None, :], mask=there[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def scores_of(q, k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log 2. ``scale`` is of the scores in those units, or with a soft cap of what the cap is given."""
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = softcap * (1 - 2 / (tl.exp2(scores) + 1))
    return scores


@triton.jit
def depths(fold, begin, nodes, there):
    return (tl.load(fold + nodes, mask=there, other=0) - tl.load(begin + nodes, mask=there, other=0)).to(tl.int32)


@triton.jit
def bias_rows(fold, begin, i, there, columns, b_batch, b_row, b_key):
    """Where the queries ``i`` find the bias of their first keys (``BiasPlaces`` says why there)."""
    row, first = tl.load(fold + i, mask=there, other=0), tl.load(begin + i, mask=there, other=0)
    return row // columns * b_batch + row % columns * b_row + first % columns * b_key


@triton.jit
def bias_of(bias, at, visible):
    """In units of log 2, minus infinity where ``visible`` is not."""
    if bias.dtype.element_ty == tl.int1:
        return tl.where(tl.load(bias + at, mask=visible, other=0), 0.0, float("-inf"))
    return tl.load(bias + at, mask=visible, other=float("-inf")).to(tl.float32) * 1.4426950408889634


@triton.jit
def depths_of(fold, begin, i, inside, window, WINDOW: tl.constexpr):
    """The depths of queries, and of the first key that the least deep one sees; neither is needed without a window."""
    depth, nearest = i, 0
    if WINDOW:
        depth = depths(fold, begin, i, inside)
        nearest = tl.maximum(tl.min(tl.where(inside, depth, 2147483647), 0) - window + 1, 0)
    return depth, nearest


@triton.jit
def stretch_of(stretches, stretch, nearest, N: tl.constexpr, WINDOW: tl.constexpr, BIASED: tl.constexpr):
    """Where a stretch of keys begins and ends, and how deep; without blocks that are in front of every window."""
    start, behind = tl.load(stretches + 3 * stretch).to(tl.int32), tl.load(stretches + 3 * stretch + 1).to(tl.int32)
    depth = 0
    if WINDOW or BIASED:
        depth = tl.load(stretches + 3 * stretch + 2).to(tl.int32)
    if WINDOW:
        out_of_sight = tl.maximum(nearest - depth, 0) // N * N
        start += out_of_sight
        depth += out_of_sight
    return start, behind, depth


@triton.jit
def keys_of_run(
    key, value, k_node, v_node, block, step, depth, inside, depth_i, window, bias, at, b_key,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A block of a stretch of keys, from ``depth`` on, their values, and which queries see them (or their bias)."""
    k = features(key + tl.cast(block, tl.int64) * k_node, step * k_node, step >= 0, E, E_BLOCK, True)
    v = features(value + tl.cast(block, tl.int64) * v_node, step * v_node, step >= 0, V, V_BLOCK, True)
    visible = inside[:, None]
    if WINDOW:
        visible = depth_i[:, None] - (depth + step)[None, :] < window
    if BIASED:
        visible = bias_of(bias, at[:, None] + (depth + step)[None, :] * b_key, visible)
    return k, v, visible


@triton.jit
def keys_of(
    key, value, k_node, v_node, j, there, i, depth_i, fold, begin, end, window, bias, at, b_key,
    E: tl.constexpr, E_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The keys ``j``, their values, and which of the queries ``i`` see them (or their bias)."""
    k = features(key, j.to(tl.int64) * k_node, there, E, E_BLOCK, False)
    v = features(value, j.to(tl.int64) * v_node, there, V, V_BLOCK, False)
    stop = tl.load(end + j, mask=there, other=0)
    visible = (j[None, :] <= i[:, None]) & (i[:, None] < stop[None, :])
    if WINDOW:
        visible &= depth_i[:, None] - depths(fold, begin, j, there)[None, :] < window
    if BIASED:
        visible = bias_of(bias, at[:, None] + depths(fold, begin, j, there)[None, :] * b_key, visible)
    return k, v, visible


@functools.cache
def blocks(size: int) -> int:
    """A power of two, and no less than what a matrix product takes."""
    return max(16, int(triton.next_power_of_2(size)))


def shape_of(query: Tensor, key: Tensor, value: Tensor, score_options: ScoreOptions) -> dict[str, Any]:
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "E": query.shape[3],
        "E_BLOCK": blocks(query.shape[3]),
        "V": value.shape[3],
        "V_BLOCK": blocks(value.shape[3]),
        "WINDOW": score_options.window is not None,
        "CAPPED": score_options.softcap is not None,
        "BIASED": score_options.bias is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    }


def room(query: Tensor) -> int:
    """Bytes of shared memory; the interpreter needs none."""
    return internals.shared_memory(query.device) if query.is_cuda else sys.maxsize


def tile_of(query: Tensor, value: Tensor, score_options: ScoreOptions, kernel: str) -> dict[str, int]:
    """Nodes of a tile, keys or queries at a time, and how the kernel is compiled."""
    narrow, half = row_bytes(query, value) <= 256, query.dtype.itemsize == 2
    size = FINE
    if half and narrow and score_options.bias is None and room(query) >= 114 * 1024:
        size = COARSE[kernel]
    elif half and room(query) >= (75 if narrow else 137) * 1024:
        size = MEDIUM
    return {"ROWS": KEYS if kernel == "key" else ROWS, **size}


def lists_of(plan: TreeArrays) -> list[Tensor]:
    """The arrays that lead to the keys of a tile."""
    return plan.given("fold", "begin", "end", "stretches", "stretch_starts", "keys", "key_starts")


def parts_of(plan: TreeArrays) -> list[Tensor]:
    """The arrays that lead to the descendants of a tile."""
    return plan.given("parts", "divided")


def numbers_of(score_options: ScoreOptions) -> tuple[float, ...]:
    """``window``, ``scale`` and ``softcap`` as :func:`scores_of` takes them, and of the bias the columns of its rows
    and its strides by sequence, head, query and key; 0 for a size of one.
    """
    window, scale, softcap, bias = score_options.window or 0, score_options.scale * LOG2E, 0.0, score_options.bias
    if score_options.softcap is not None:
        scale, softcap = 2 * scale / score_options.softcap, score_options.softcap * LOG2E
    if bias is None:
        return window, scale, softcap, 1, 0, 0, 0, 0
    strides = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
    return window, scale, softcap, bias.shape[3], *strides


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in (tensor.stride(1), tensor.stride(2))]
