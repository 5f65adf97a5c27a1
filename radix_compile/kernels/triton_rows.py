"""The index ops as Triton kernels: whole rows, several tensors in one launch, no atomics.

A kernel is compiled for the number, widths and dtypes of the tensors it moves. Its grid is row blocks times column
blocks, where the columns of all tensors count on after each other. Row offsets are 64-bit.

A sum starts with the one row that ``fold`` gives for a node, whose load waits for no list, and adds the rest of the
node's list. So that a node with thousands of rows does not keep one program busy after all others are done, a list
longer than ``STRETCH`` is divided at multiples of ``STRETCH``: ``_stretch_sums`` adds up each stretch, ``_long_sums``
what is before the first of them and then the stretches. The order of additions depends on the plan alone. (A node has
no more rows than there are sequences, so batches of up to ``STRETCH`` sequences need no such thing.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.row_layout import RowLayout, empty_rows, in_rows

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = {
    "fold_rows": _FLOATS + _OTHERS,
    "place_rows": _FLOATS + _OTHERS,
    "foreach_scatter_rows": _FLOATS + _OTHERS,
    "foreach_sum_rows": _FLOATS,
}
"""What each op moves. There are no gradients, and so no sums, of other dtypes."""
_SUM_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

TILE = 4096
"""Bytes that one program moves at a time."""
WARPS = 4
STRETCH = 64
"""Rows of one node that one program adds up at most."""
STRETCHES = 16
"""Stretches that one program looks at: nearly all belong to short lists, and a program that finds that still costs."""
AHEAD = 32
"""Rows of a long list that are loaded before the first is added."""
LONG_COLUMNS = 256
"""Columns of one program for long lists. Few, so that many programs share the work of one node."""


@triton.jit
def _start_of(row, seq, batch_stride, seq_stride, FLAT: tl.constexpr):
    """Where a row starts, in entries. 64-bit, like the row: there may be more than 2**31 of them."""
    if FLAT:
        return row * seq_stride
    else:
        # Rows are fewer than 2**31, and dividing 64-bit numbers takes longer than loading the row.
        batch = row.to(tl.int32) // seq
        return batch * batch_stride + (row - batch * seq) * seq_stride


@triton.jit
def _offset_of(column, outer_stride, inner_stride, INNER: tl.constexpr, WIDTH: tl.constexpr):
    if INNER == WIDTH:
        return column * inner_stride
    else:
        return (column // INNER) * outer_stride + (column % INNER) * inner_stride


@triton.jit
def _copy_rows(
    targets,
    sources,
    strides,
    index,
    guard,
    batch,
    length,
    source_seq,
    WIDTHS: tl.constexpr,
    INNERS: tl.constexpr,
    FLATS: tl.constexpr,
    GUARDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``target[r] = source[index[r]]``, zero if that is negative, or if guarded and ``guard[index[r]] != r``.

    Programs that follow each other take the same columns of the batch's sequences: their sources are often the same,
    and then still in the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    column_in_sequence = (program // batch) * ROWS + tl.arange(0, ROWS)
    inside = column_in_sequence < length
    row = (program % batch) * length + column_in_sequence
    origin = tl.load(index + row, mask=inside, other=-1)
    keep = origin >= 0
    if GUARDED:
        keep = keep & (tl.load(guard + origin, mask=keep, other=-1) == row)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = (column < WIDTHS[i])[None, :]
            start = _start_of(origin, source_seq, strides[i][0], strides[i][1], FLATS[i])
            offset = _offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            value = tl.load(sources[i] + start[:, None] + offset[None, :], mask=keep[:, None] & wanted, other=0)
            tl.store(targets[i] + row[:, None] * WIDTHS[i] + column[None, :], value, mask=inside[:, None] & wanted)
        first_block += blocks


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
        start = _start_of(row, seq, batch_stride, seq_stride, FLAT)
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
            offset = _offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            start = _start_of(first, seq, strides[i][0], strides[i][1], FLATS[i])
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
    any_node, begins, ends = _long_list(several + tl.arange(0, STRETCHES), scatter, rows, starts, nodes, STRETCH)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks) & (tl.max(ends - begins, 0) > 0):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = _offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            for k in range(STRETCHES):
                stretch = several + k + tl.arange(0, 1)
                node, first, last = _long_list(stretch, scatter, rows, starts, nodes, STRETCH)
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
    any_node, begins, ends = _long_list(several + tl.arange(0, STRETCHES), scatter, rows, starts, nodes, STRETCH)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks) & (tl.max(ends - begins, 0) > 0):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = column < WIDTHS[i]
            offset = _offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
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


class _Moved:
    """Tensors that move together: as rows, with the sizes and constants that their kernels take."""

    def __init__(self, tensors: Sequence[Tensor], axes: Sequence[tuple[int, int]]) -> None:
        rows = [in_rows(as_bytes(one), *at) for one, at in zip(tensors, axes, strict=True)]
        self.sources = tuple(source for source, _ in rows)
        layouts: list[RowLayout] = [layout for _, layout in rows]
        self.seq = layouts[0].seq
        self.strides = tuple((of.batch_stride, of.seq_stride, of.outer_stride, of.inner_stride) for of in layouts)
        self.widths = tuple(of.width for of in layouts)
        self.constants: dict[str, Any] = {
            "WIDTHS": self.widths,
            "INNERS": tuple(of.inner for of in layouts),
            "FLATS": tuple(of.flat for of in layouts),
            "num_warps": WARPS,
        }
        entries = TILE // max(source.element_size() for source in self.sources)
        # A tile is as wide as the narrowest tensor, so that no part of it is idle; but at least half a KiB.
        narrowest, widest = (triton.next_power_of_2(max(1, f(self.widths))) for f in (min, max))
        self.columns = min(max(narrowest, entries // 8), widest, entries)
        self.at_once = entries // self.columns
        """Rows in one tile."""

    def blocks(self, columns: int) -> int:
        return sum(triton.cdiv(width, columns) for width in self.widths)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _copied(
    tensors: Sequence[Tensor],
    axes: Sequence[tuple[int, int]],
    index: Tensor,
    guard: Tensor | None,
    batch: int,
    seq: int,
) -> list[Tensor]:
    """``[..., batch, ..., seq, ...]`` tensors whose row ``r`` is the source's row ``index[r]``."""
    results = [empty_rows(one, batch, seq, *at) for one, at in zip(tensors, axes, strict=True)]
    moved = _Moved(tensors, axes)
    blocks = moved.blocks(moved.columns)
    if batch * seq and blocks:
        if seq < 4 * moved.at_once:
            batch, seq = 1, batch * seq
        with torch.cuda.device_of(index):
            _copy_rows[batch * triton.cdiv(seq, moved.at_once), blocks](
                tuple(map(as_bytes, results)), moved.sources, moved.strides, index, guard, batch, seq, moved.seq,
                GUARDED=guard is not None, ROWS=moved.at_once, COLUMNS=moved.columns, **moved.constants,
            )  # fmt: skip
    return results


def fold_rows(full: Tensor, fold: Tensor, scatter: Tensor, batch_dim: int, seq_dim: int) -> Tensor:
    return _copied([full], [(batch_dim, seq_dim)], fold, None, 1, fold.shape[0])[0]


def place_rows(
    compact: Tensor, fold: Tensor, scatter: Tensor, batch: int, seq: int, batch_dim: int, seq_dim: int
) -> Tensor:
    return _copied([compact], [(batch_dim, seq_dim)], scatter, fold, batch, seq)[0]


def foreach_scatter_rows(
    compact: Sequence[Tensor],
    scatter: Tensor,
    fold: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    batch: int,
    seq: int,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
    holes: bool,
) -> list[Tensor]:
    return _copied(compact, list(zip(batch_dims, seq_dims, strict=True)), scatter, None, batch, seq)


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
    moved = _Moved(full, axes)
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
