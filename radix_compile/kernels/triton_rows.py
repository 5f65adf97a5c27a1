"""The index ops as Triton kernels: whole rows, several tensors in one launch, no atomics.

A kernel is compiled for the number, widths and dtypes of the tensors it moves. Its grid is row blocks times column
blocks, where the columns of all tensors count on after each other. Row offsets are 64-bit.

Sums are those of a segmented reduction over the row lists (``rows``, ``starts``) in two launches, so that one node with
thousands of rows does not make one program run for all of them: ``_partial_sums`` adds up those stretches of the
list, ``STRETCH`` entries from a multiple of ``STRETCH`` on, that begin inside a long node; ``_node_sums`` adds the
rest of each node's list, then its stretches. The order of additions depends on the plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.row_layout import RowLayout, empty_rows, in_rows

DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
WARPS = 4
STRETCH = 64
"""Rows of one node that one program adds up at most, before the work is divided."""


@triton.jit
def _start_of(row, seq, batch_stride, seq_stride, FLAT: tl.constexpr):  # noqa: N803 - constexpr by convention
    """Where a row starts, in entries. 64-bit: there may be more than 2**31 of them."""
    if FLAT:
        return row * seq_stride
    else:
        return (row // seq) * batch_stride + (row % seq) * seq_stride


@triton.jit
def _offset_of(column, outer_stride, inner_stride, INNER: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
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
    rows,
    seq,
    WIDTHS: tl.constexpr,  # noqa: N803
    INNERS: tl.constexpr,  # noqa: N803
    FLATS: tl.constexpr,  # noqa: N803
    GUARDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """``target[r] = source[index[r]]``, zero if that is negative, or if guarded and ``guard[index[r]] != r``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
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
            start = _start_of(origin, seq, strides[i][0], strides[i][1], FLATS[i])
            offset = _offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            value = tl.load(sources[i] + start[:, None] + offset[None, :], mask=keep[:, None] & wanted, other=0)
            tl.store(targets[i] + row[:, None] * WIDTHS[i] + column[None, :], value, mask=inside[:, None] & wanted)
        first_block += blocks


@triton.jit
def _sum_of_list(
    source,
    rows,
    begin,
    end,
    seq,
    strides,
    column,
    WIDTH: tl.constexpr,  # noqa: N803
    INNER: tl.constexpr,  # noqa: N803
    FLAT: tl.constexpr,  # noqa: N803
    SUM: tl.constexpr,  # noqa: N803
    NODES: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """The sum of the source rows ``rows[begin:end]``, one list for each of ``NODES``, ``AHEAD`` entries at a time."""
    total = tl.zeros([NODES, AHEAD, COLUMNS], SUM)
    offset = _offset_of(column, strides[2], strides[3], INNER, WIDTH)[None, None, :]
    wanted = (column < WIDTH)[None, None, :]
    longest = tl.max(end - begin, 0)
    ahead = tl.arange(0, AHEAD)
    done = 0
    while done < longest:
        at = (begin + done)[:, None] + ahead[None, :]
        inside = at < end[:, None]
        row = tl.load(rows + at, mask=inside, other=0)
        start = _start_of(row, seq, strides[0], strides[1], FLAT)
        total += tl.load(source + start[:, :, None] + offset, mask=inside[:, :, None] & wanted, other=0).to(SUM)
        done += AHEAD
    return tl.sum(total, 1)


@triton.jit
def _partial_sums(
    partials,
    sources,
    strides,
    scatter,
    rows,
    starts,
    nodes,
    seq,
    WIDTHS: tl.constexpr,  # noqa: N803
    INNERS: tl.constexpr,  # noqa: N803
    FLATS: tl.constexpr,  # noqa: N803
    SUMS: tl.constexpr,  # noqa: N803
    STRETCH: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """``partials[b]``: the sum over list entries ``[b * STRETCH, (b + 1) * STRETCH)`` of the node of the first."""
    stretch = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    begin = stretch * STRETCH
    listed = begin < tl.load(starts + nodes)
    node = tl.load(scatter + tl.load(rows + begin, mask=listed, other=0), mask=listed, other=0)
    first = tl.load(starts + node, mask=listed, other=0)
    last = tl.load(starts + node + 1, mask=listed, other=0)
    end = tl.where(last - first > STRETCH, tl.minimum(begin + STRETCH, last), begin)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks) & (tl.max(end - begin, 0) > 0):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            total = _sum_of_list(
                sources[i],
                rows,
                begin,
                end,
                seq,
                strides[i],
                column,
                WIDTHS[i],
                INNERS[i],
                FLATS[i],
                SUMS[i],
                1,
                AHEAD,
                COLUMNS,
            )
            at = partials[i] + stretch[:, None] * WIDTHS[i] + column[None, :]
            tl.store(at, total, mask=(column < WIDTHS[i])[None, :])
        first_block += blocks


@triton.jit
def _node_sums(
    targets,
    sources,
    partials,
    strides,
    rows,
    starts,
    nodes,
    seq,
    WIDTHS: tl.constexpr,  # noqa: N803
    INNERS: tl.constexpr,  # noqa: N803
    FLATS: tl.constexpr,  # noqa: N803
    DIVIDED: tl.constexpr,  # noqa: N803
    SUMS: tl.constexpr,  # noqa: N803
    STRETCH: tl.constexpr,  # noqa: N803
    NODES: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """``target[n]``: the sum over the whole list of node ``n``; divided, with the help of ``partials``."""
    node = tl.program_id(0).to(tl.int64) * NODES + tl.arange(0, NODES)
    inside = node < nodes
    begin = tl.load(starts + node, mask=inside, other=0)
    end = tl.load(starts + node + 1, mask=inside, other=0)
    head = end
    if DIVIDED:
        head = tl.where(end - begin > STRETCH, (begin + STRETCH - 1) // STRETCH * STRETCH, end)
    block = tl.program_id(1)
    first_block = 0
    for i in tl.static_range(len(WIDTHS)):
        blocks = (WIDTHS[i] + COLUMNS - 1) // COLUMNS
        if (block >= first_block) & (block < first_block + blocks):
            column = (block - first_block) * COLUMNS + tl.arange(0, COLUMNS)
            wanted = (column < WIDTHS[i])[None, :]
            total = _sum_of_list(
                sources[i],
                rows,
                begin,
                head,
                seq,
                strides[i],
                column,
                WIDTHS[i],
                INNERS[i],
                FLATS[i],
                SUMS[i],
                NODES,
                AHEAD,
                COLUMNS,
            )
            if DIVIDED:
                stretch = head // STRETCH
                stretches = tl.where(head < end, (end + STRETCH - 1) // STRETCH - stretch, 0)
                most = tl.max(stretches, 0)
                done = 0
                while done < most:
                    at = partials[i] + (stretch + done)[:, None] * WIDTHS[i] + column[None, :]
                    total += tl.load(at, mask=(done < stretches)[:, None] & wanted, other=0)
                    done += 1
            at = targets[i] + node[:, None] * WIDTHS[i] + column[None, :]
            tl.store(at, total.to(targets[i].dtype.element_ty), mask=inside[:, None] & wanted)
        first_block += blocks


# ----------------------------------------------------------------------------------------------------------- launches

TILE = 8192
"""Bytes that one program moves: enough loads in flight for the memory, few enough registers for many programs."""
WIDEST = 1024
"""Columns of one program at most."""


def _columns(layouts: Sequence[RowLayout]) -> int:
    return min(triton.next_power_of_2(max(1, *(layout.width for layout in layouts))), WIDEST)


def _column_blocks(layouts: Sequence[RowLayout], columns: int) -> int:
    return sum(triton.cdiv(layout.width, columns) for layout in layouts)


def _strides(layouts: Sequence[RowLayout]) -> tuple[tuple[int, int, int, int], ...]:
    return tuple((of.batch_stride, of.seq_stride, of.outer_stride, of.inner_stride) for of in layouts)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _copied(
    moved: Sequence[Tensor],
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
    index: Tensor,
    guard: Tensor | None,
    batch: int,
    seq: int,
) -> list[Tensor]:
    """``[..., batch, ..., seq, ...]`` tensors whose row ``r`` is the source's row ``index[r]``."""
    axes = list(zip(batch_dims, seq_dims, strict=True))
    results = [empty_rows(one, batch, seq, *at) for one, at in zip(moved, axes, strict=True)]
    sources, layouts = zip(*(in_rows(_bytes(one), *at) for one, at in zip(moved, axes, strict=True)), strict=True)
    count = index.shape[0]
    columns = _columns(layouts)
    blocks = _column_blocks(layouts, columns)
    if count and blocks:
        rows = max(1, TILE // (columns * max(source.element_size() for source in sources)))
        with torch.cuda.device_of(index):
            _copy_rows[triton.cdiv(count, rows), blocks](
                tuple(map(_bytes, results)),
                sources,
                _strides(layouts),
                index,
                guard,
                count,
                layouts[0].seq,
                tuple(layout.width for layout in layouts),
                tuple(layout.inner for layout in layouts),
                tuple(layout.flat for layout in layouts),
                guard is not None,
                rows,
                columns,
                num_warps=WARPS,
            )
    return results


def fold_rows(full: Tensor, fold: Tensor, scatter: Tensor, batch_dim: int, seq_dim: int) -> Tensor:
    return _copied([full], [batch_dim], [seq_dim], fold, None, 1, fold.shape[0])[0]


def place_rows(
    compact: Tensor, fold: Tensor, scatter: Tensor, batch: int, seq: int, batch_dim: int, seq_dim: int
) -> Tensor:
    return _copied([compact], [batch_dim], [seq_dim], scatter, fold, batch, seq)[0]


def foreach_scatter_rows(
    compact: Sequence[Tensor],
    scatter: Tensor,
    rows: Tensor | None,
    starts: Tensor | None,
    batch: int,
    seq: int,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
    holes: bool = False,
) -> list[Tensor]:
    return _copied(compact, batch_dims, seq_dims, scatter, None, batch, seq)


def foreach_sum_rows(
    full: Sequence[Tensor],
    scatter: Tensor,
    rows: Tensor,
    starts: Tensor,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
) -> list[Tensor]:
    axes = list(zip(batch_dims, seq_dims, strict=True))
    nodes = starts.shape[0] - 1
    results = [empty_rows(one, 1, nodes, *at) for one, at in zip(full, axes, strict=True)]
    sources, layouts = zip(*(in_rows(one, *at) for one, at in zip(full, axes, strict=True)), strict=True)
    columns = _columns(layouts)
    blocks = _column_blocks(layouts, columns)
    if not (nodes and blocks):
        return results
    divided = full[0].shape[batch_dims[0]] > STRETCH  # a node has no more rows than there are sequences
    shapes = {
        "WIDTHS": tuple(layout.width for layout in layouts),
        "INNERS": tuple(layout.inner for layout in layouts),
        "FLATS": tuple(layout.flat for layout in layouts),
        "SUMS": tuple(_sum_dtype(source) for source in sources),
        "STRETCH": STRETCH,
        "COLUMNS": columns,
    }
    at_once = max(1, TILE // (columns * max(source.element_size() for source in sources)))
    # A program reads as many rows of a node at a time as nodes have on average.
    ahead = min(at_once, 8, triton.next_power_of_2(triton.cdiv(scatter.shape[0], nodes)))
    stretches = triton.cdiv(scatter.shape[0], STRETCH)
    plan = rows, starts, nodes, layouts[0].seq
    with torch.cuda.device_of(scatter):
        partials: tuple[Tensor, ...] = tuple(results)  # not read if not divided
        if divided:
            partials = tuple(
                torch.empty((stretches, layout.width), dtype=_partial_dtype(source), device=source.device)
                for source, layout in zip(sources, layouts, strict=True)
            )
            _partial_sums[stretches, blocks](
                partials, sources, _strides(layouts), scatter, *plan, **shapes, AHEAD=min(at_once, 8), num_warps=WARPS
            )
        _node_sums[triton.cdiv(nodes, at_once // ahead), blocks](
            tuple(results),
            sources,
            partials,
            _strides(layouts),
            *plan,
            **shapes,
            DIVIDED=divided,
            NODES=at_once // ahead,
            AHEAD=ahead,
            num_warps=WARPS,
        )
    return results


def _partial_dtype(tensor: Tensor) -> torch.dtype:
    if not tensor.is_floating_point():
        return torch.int64
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum_dtype(tensor: Tensor) -> tl.dtype:
    return {torch.float32: tl.float32, torch.float64: tl.float64, torch.int64: tl.int64}[_partial_dtype(tensor)]
