"""The segment sums as Triton kernels: no atomics, and an order of additions that depends on the plan alone.

A sum starts with the one row that ``fold`` gives for a node, whose load waits for no list, and adds the rest of the
node's list. So that a node with thousands of rows does not keep one program busy after all others are done, a list
longer than ``STRETCH`` is divided at multiples of ``STRETCH``: ``_stretch_sums`` adds up each stretch, ``_long_sums``
what is before the first of them and then the stretches. (A node has no more rows than there are sequences, so batches
of up to ``STRETCH`` sequences need no such thing.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.row_layout import empty_rows
from radix_compile.kernels.triton_rows import Moved, offset_of, start_of

STRETCH = 64
"""Rows of one node that one program adds up at most."""
STRETCHES = 16
"""Stretches that one program looks at: nearly all belong to short lists, and a program that finds that still costs."""
AHEAD = 32
"""Rows of a long list that are loaded before the first is added."""
LONG_COLUMNS = 256
"""Columns of one program for long lists. Few, so that many programs share the work of one node."""

_SUM_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _list_sum(
    source, rows, begin, end, seq, batch_stride, seq_stride, offset, wanted,
    FLAT: tl.constexpr, SUM: tl.constexpr, LISTS: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the rows ``rows[begin:end]``, or ``begin:end`` without ``rows``, for each of ``LISTS``."""
    total = tl.zeros([LISTS, AHEAD, COLUMNS], SUM)
    ahead = tl.arange(0, AHEAD)[None, :]
    longest = tl.max(end - begin, 0)
    done = 0
    while done < longest:
        at = (begin + done)[:, None] + ahead
        inside = at < end[:, None]
        row = at
        if rows is not None:
            row = tl.load(rows + at, mask=inside, other=0)
        start = start_of(row, seq, batch_stride, seq_stride, FLAT)
        at = source + start[:, :, None] + offset[None, None, :]
        total += tl.load(at, mask=inside[:, :, None] & wanted[None, None, :], other=0).to(SUM)
        done += AHEAD
    return tl.sum(total, 1)


@triton.jit
def _node_sums(
    targets, sources, strides, fold, rows, starts, nodes, seq,
    WIDTHS: tl.constexpr, INNERS: tl.constexpr, FLATS: tl.constexpr, SUMS: tl.constexpr,
    LONGEST: tl.constexpr, NODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``target[n]``: the sum over the list of node ``n``, if that has no more than ``LONGEST`` entries."""
    node = tl.program_id(0).to(tl.int64) * NODES + tl.arange(0, NODES)
    inside = node < nodes
    first = tl.load(fold + node, mask=inside, other=0)
    begin = tl.load(starts + node, mask=inside, other=0)
    end = tl.load(starts + node + 1, mask=inside, other=0)
    empty = end == begin
    inside = inside & (end - begin <= LONGEST)
    end = tl.where(inside, end, begin)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            start = start_of(first, seq, strides[i][0], strides[i][1], FLATS[i])
            total = tl.load(sources[i] + start[:, None] + offset[None, :], mask=wanted[None, :], other=0).to(SUMS[i])
            total = tl.where(empty[:, None], 0, total)
            total += _list_sum(
                sources[i], rows, begin + 1, end, seq, strides[i][0], strides[i][1], offset, wanted,
                FLATS[i], SUMS[i], NODES, 1, COLUMNS,
            )  # fmt: skip
            at = targets[i] + node[:, None] * WIDTHS[i] + column[None, :]
            tl.store(at, total.to(targets[i].dtype.element_ty), mask=inside[:, None] & wanted[None, :])
        first_block += blocks


@triton.jit
def _long_list(stretch, scatter, rows, starts, nodes, STRETCH: tl.constexpr):
    """The node whose list the stretch begins in, and that list; an empty one if it is no longer than ``STRETCH``."""
    listed = stretch * STRETCH < tl.load(starts + nodes)
    node = tl.load(scatter + tl.load(rows + stretch * STRETCH, mask=listed, other=0), mask=listed, other=0)
    begin = tl.load(starts + node, mask=listed, other=0)
    end = tl.load(starts + node + 1, mask=listed, other=0)
    return node, begin, tl.where(end - begin > STRETCH, end, begin)


@triton.jit
def _stretch_sums(
    partials, sources, strides, scatter, rows, starts, nodes, seq,
    WIDTHS: tl.constexpr, INNERS: tl.constexpr, FLATS: tl.constexpr, SUMS: tl.constexpr,
    STRETCH: tl.constexpr, STRETCHES: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``partials[b]``: the sum over list entries ``[b * STRETCH, (b + 1) * STRETCH)`` that are of one long list."""
    several = tl.program_id(0).to(tl.int64) * STRETCHES
    _any_node, begins, ends = _long_list(several + tl.arange(0, STRETCHES), scatter, rows, starts, nodes, STRETCH)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks) & (tl.max(ends - begins, 0) > 0):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            for k in range(STRETCHES):
                stretch = several + k + tl.arange(0, 1)
                _node, _first, last = _long_list(stretch, scatter, rows, starts, nodes, STRETCH)
                begin = stretch * STRETCH
                end = tl.minimum(last, begin + STRETCH)
                if tl.max(end - begin, 0) > 0:
                    total = _list_sum(
                        sources[i], rows, begin, end, seq, strides[i][0], strides[i][1], offset, wanted,
                        FLATS[i], SUMS[i], 1, AHEAD, COLUMNS,
                    )  # fmt: skip
                    tl.store(partials[i] + stretch[:, None] * WIDTHS[i] + column[None, :], total, mask=wanted[None, :])
        first_block += blocks


@triton.jit
def _long_sums(
    targets, partials, sources, strides, scatter, rows, starts, nodes, seq,
    WIDTHS: tl.constexpr, INNERS: tl.constexpr, FLATS: tl.constexpr, SUMS: tl.constexpr,
    STRETCH: tl.constexpr, STRETCHES: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``target[n]`` for a node with a long list: by the program of the first stretch that begins in it."""
    several = tl.program_id(0).to(tl.int64) * STRETCHES
    _any_node, begins, ends = _long_list(several + tl.arange(0, STRETCHES), scatter, rows, starts, nodes, STRETCH)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks) & (tl.max(ends - begins, 0) > 0):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            for k in range(STRETCHES):
                stretch = several + k + tl.arange(0, 1)
                node, begin, end = _long_list(stretch, scatter, rows, starts, nodes, STRETCH)
                mine = (begin < end) & (stretch * STRETCH - begin < STRETCH)
                if tl.max(mine.to(tl.int32), 0) > 0:
                    total = _list_sum(
                        sources[i], rows, begin, stretch * STRETCH, seq, strides[i][0], strides[i][1], offset, wanted,
                        FLATS[i], SUMS[i], 1, AHEAD, COLUMNS,
                    )  # fmt: skip
                    total += _list_sum(
                        partials[i], None, stretch, (end + STRETCH - 1) // STRETCH, 1, 0, WIDTHS[i], column, wanted,
                        True, SUMS[i], 1, AHEAD, COLUMNS,
                    )  # fmt: skip
                    at = targets[i] + node[:, None] * WIDTHS[i] + column[None, :]
                    tl.store(at, total.to(targets[i].dtype.element_ty), mask=wanted[None, :])
        first_block += blocks


# ----------------------------------------------------------------------------------------------------------- launches


def foreach_sum_rows(
    full: Sequence[Tensor],
    scatter: Tensor,
    fold: Tensor,
    rows: Tensor,
    starts: Tensor,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
) -> list[Tensor]:
    axes = list(zip(batch_dims, seq_dims, strict=True))
    nodes, listed = fold.shape[0], scatter.shape[0]
    results = [empty_rows(one, 1, nodes, *at) for one, at in zip(full, axes, strict=True)]
    moved = Moved(full, axes)
    blocks = moved.blocks(moved.columns)
    if not (nodes and blocks):
        return results
    dtypes = [torch.promote_types(one.dtype, torch.float32) for one in full]
    constants = moved.constants | {"SUMS": tuple(_SUM_DTYPES[dtype] for dtype in dtypes)}
    targets = tuple(results)
    plan = rows, starts, nodes, moved.seq
    divided = full[0].shape[batch_dims[0]] > STRETCH
    with torch.cuda.device_of(scatter):
        _node_sums[triton.cdiv(nodes, moved.at_once), blocks](
            targets, moved.sources, moved.strides, fold, *plan,
            LONGEST=STRETCH if divided else listed, NODES=moved.at_once, COLUMNS=moved.columns, **constants,
        )  # fmt: skip
        if divided:
            columns = min(moved.columns, LONG_COLUMNS)
            stretches = triton.cdiv(listed, STRETCH)
            grid = triton.cdiv(stretches, STRETCHES), moved.blocks(columns)
            partials = tuple(
                scatter.new_empty((stretches, width), dtype=dtype)
                for width, dtype in zip(moved.widths, dtypes, strict=True)
            )
            constants |= {"STRETCH": STRETCH, "STRETCHES": STRETCHES, "AHEAD": AHEAD, "COLUMNS": columns}
            _stretch_sums[grid](partials, moved.sources, moved.strides, scatter, *plan, **constants)
            _long_sums[grid](targets, partials, moved.sources, moved.strides, scatter, *plan, **constants)
    return results
