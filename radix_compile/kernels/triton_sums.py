"""The segment sums as Triton kernels: no atomics, and an order of additions that depends on the plan alone.

A sum starts with the one row that ``fold`` gives for a node, whose load waits for no list, and adds the rest of the
node's list. So that a node with thousands of rows does not keep one program busy after all others are done, the plan
divides lists longer than ``PIECE_SIZE``: each piece is added up on its own, and ``_long_sums`` adds up the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.triton_rows import TILE, WARPS, Moved, offset_of, start_of
from radix_compile.plan.prefix_plan import PIECE_SIZE

LONG_TILE = 8192
"""Entries that one program of ``_long_sums`` loads before it adds the first."""
LONG_BLOCKS = 32
"""Programs that share the columns of a node with a long list, if that leaves 64 to 1024 columns to each."""
FEW_NODES = tl.constexpr(8)
"""Up to so many nodes of a program, the longest of their lists is found without the threads' waiting for each other."""

EARLY = 4
"""Blocks of columns whose pieces are added up along with one block of the nodes."""

_SUM_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _list_sum(
    source, rows, begin, end, longest, seq, batch_stride, seq_stride, offset, wanted,
    FLAT: tl.constexpr, SUM: tl.constexpr, LISTS: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the rows ``rows[begin:end]``, or ``begin:end`` without ``rows``, for each of ``LISTS``.

    None of them has more than ``longest`` rows.
    """
    total = tl.zeros([LISTS, AHEAD, COLUMNS], SUM)
    ahead = tl.arange(0, AHEAD)[None, :]
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
def _piece_sum(
    partials, sources, strides, scatter, rows, starts, pieces, seq, piece, block,
    WIDTHS: tl.constexpr, INNERS: tl.constexpr, FLATS: tl.constexpr, SUMS: tl.constexpr,
    PIECE_SIZE: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``partials[piece]``: the sum over that piece of a long list."""
    piece = piece + tl.arange(0, 1)
    begin = tl.load(pieces + piece)
    end = tl.minimum(begin + PIECE_SIZE, tl.load(starts + tl.load(scatter + tl.load(rows + begin)) + 1))
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            total = _list_sum(
                sources[i], rows, begin, end, PIECE_SIZE, seq, strides[i][0], strides[i][1], offset, wanted,
                FLATS[i], SUMS[i], 1, AHEAD, COLUMNS,
            )  # fmt: skip
            tl.store(partials[i] + piece[:, None] * WIDTHS[i] + column[None, :], total, mask=wanted[None, :])
        first_block += blocks


@triton.jit
def _longest_list(starts, nodes, first_node, lengths, LONGEST: tl.constexpr, NODES: tl.constexpr):
    """The maximum of ``lengths``, which lie in different warps: each thread works it out for itself if it can."""
    if NODES > 1 and NODES <= FEW_NODES:
        longest = tl.zeros([], tl.int64)
        for i in tl.static_range(NODES):
            # The end of a list is the beginning of the next: written so that the compiler sees it, and loads it once.
            end = tl.load(starts + tl.minimum(first_node + i + 1, nodes))
            length = end - tl.load(starts + tl.minimum(first_node + i, nodes))
            longest = tl.maximum(longest, tl.where(length <= LONGEST, length, 0))
        return longest
    else:
        return tl.max(lengths, 0)


@triton.jit
def _node_sums(
    targets, sources, strides, fold, rows, starts, nodes, seq, first_node, block,
    WIDTHS: tl.constexpr, INNERS: tl.constexpr, FLATS: tl.constexpr, SUMS: tl.constexpr,
    LONGEST: tl.constexpr, NODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``target[n]``: the sum over the list of node ``n``, if that is not a long one, for ``NODES`` nodes."""
    node = first_node + tl.arange(0, NODES)
    inside = node < nodes
    first = tl.load(fold + node, mask=inside, other=0)
    begin = tl.load(starts + node, mask=inside, other=0)
    end = tl.load(starts + node + 1, mask=inside, other=0)
    empty = end == begin
    inside = inside & (end - begin <= LONGEST)
    end = tl.where(inside, end, begin)
    longest = _longest_list(starts, nodes, first_node, end - begin, LONGEST, NODES)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            start = start_of(first, seq, strides[i][0], strides[i][1], FLATS[i])
            total = tl.load(sources[i] + start[:, None] + offset[None, :], mask=wanted[None, :], other=0)
            total = tl.where(empty[:, None], 0, total.to(SUMS[i]))
            total += _list_sum(
                sources[i], rows, begin + 1, end, longest - 1, seq, strides[i][0], strides[i][1], offset, wanted,
                FLATS[i], SUMS[i], NODES, 1, COLUMNS,
            )  # fmt: skip
            at = targets[i] + node[:, None] * WIDTHS[i] + column[None, :]
            tl.store(at, total.to(targets[i].dtype.element_ty), mask=inside[:, None] & wanted[None, :])
        first_block += blocks


@triton.jit(do_not_specialize=["nodes", "count"])
def _sum_rows(
    targets, partials, sources, strides, fold, scatter, rows, starts, pieces, nodes, count, seq,
    WIDTHS: tl.constexpr, INNERS: tl.constexpr, FLATS: tl.constexpr, SUMS: tl.constexpr,
    PIECE_SIZE: tl.constexpr, NODES: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For each block of columns, the first programs take one of ``count`` pieces each, the others ``NODES`` nodes.

    Both load ``NODES`` rows at a time: more, and the registers that takes slow down the others too. Pieces take
    longest, so their blocks of columns are done ``EARLY`` times as early: none is left when all nodes are done.
    """
    program, block = tl.program_id(0), tl.program_id(1)
    of_pieces = count * EARLY
    if program < of_pieces:
        _piece_sum(
            partials, sources, strides, scatter, rows, starts, pieces, seq,
            (program % count).to(tl.int64), block * EARLY + program // count,
            WIDTHS, INNERS, FLATS, SUMS, PIECE_SIZE, NODES, COLUMNS,
        )  # fmt: skip
    else:
        _node_sums(
            targets, sources, strides, fold, rows, starts, nodes, seq,
            (program - of_pieces).to(tl.int64) * NODES, block,
            WIDTHS, INNERS, FLATS, SUMS, PIECE_SIZE, NODES, COLUMNS,
        )  # fmt: skip


@triton.jit
def _long_sums(
    targets, partials, scatter, rows, starts, pieces,
    WIDTHS: tl.constexpr, SUMS: tl.constexpr, PIECE_SIZE: tl.constexpr, AHEAD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``target[n]`` for a node with a long list: by the program of its first piece."""
    piece = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    position = tl.load(pieces + piece)
    node = tl.load(scatter + tl.load(rows + position))
    begin = tl.load(starts + node)
    last = piece + (tl.load(starts + node + 1) - begin + PIECE_SIZE - 1) // PIECE_SIZE
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        mine = (position == begin) & (block >= first_block) & (block < first_block + blocks)
        if tl.max(mine.to(tl.int32), 0) > 0:
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            total = _list_sum(
                partials[i], None, piece, last, tl.max(last - piece, 0), 1, 0, WIDTHS[i], column, wanted,
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
    pieces: Tensor,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
) -> list[Tensor]:
    nodes, count = fold.shape[0], pieces.shape[0]
    # With several tensors, a program has more to do before it loads a row: smaller ones, and more at once, hide that.
    smaller = 1 if len(full) == 1 else 2
    moved = Moved.of(full, batch_dims, seq_dims, TILE // smaller)
    results = moved.empty(full, 1, nodes)
    blocks = moved.blocks(moved.columns)
    if not (nodes and blocks):
        return results
    targets = tuple(results)
    dtypes = [torch.promote_types(one.dtype, torch.float32) for one in full]
    partials = tuple(
        [scatter.new_empty((count, width), dtype=of) for width, of in zip(moved.widths, dtypes, strict=True)]
    )
    sums = {"SUMS": tuple(_SUM_DTYPES[dtype] for dtype in dtypes), "PIECE_SIZE": PIECE_SIZE}
    with torch.cuda.device_of(scatter):
        early = min(EARLY, blocks)
        _sum_rows[count * early + triton.cdiv(nodes, moved.at_once), blocks](
            targets, partials, moved.sources(full), moved.strides, fold, scatter, rows, starts, pieces, nodes, count,
            moved.seq, NODES=moved.at_once, COLUMNS=moved.columns, EARLY=early,
            num_warps=WARPS // smaller, **moved.constants, **sums,
        )  # fmt: skip
        if count:
            columns = min(max(triton.next_power_of_2(sum(moved.widths) // LONG_BLOCKS), 64), 1024)
            _long_sums[count, moved.blocks(columns)](
                targets, partials, scatter, rows, starts, pieces,
                WIDTHS=moved.widths, AHEAD=LONG_TILE // columns, COLUMNS=columns, num_warps=WARPS, **sums,
            )  # fmt: skip
    return results
