"""The gathers as Triton kernels: whole rows, several tensors in one launch.

A kernel is compiled for the number, widths and dtypes of the tensors it moves. Its grid is row blocks times column
blocks, where the columns of all tensors count on after each other. Row offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.row_layout import RowLayout, empty_rows, in_rows

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
DTYPES = FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
"""What is moved as it is. Anything else goes the way of the reference."""

TILE = 4096
"""Bytes that one program moves at a time."""
WARPS = 4


@triton.jit
def start_of(row, seq, batch_stride, seq_stride, FLAT: tl.constexpr):
    """Where a row starts, in entries. 64-bit, like the row: there may be more than 2**31 of them."""
    if FLAT:
        return row * seq_stride
    else:
        # Rows are fewer than 2**31, and dividing 64-bit numbers takes longer than loading the row.
        batch = (row.to(tl.int32) // seq).to(tl.int64)
        return batch * batch_stride + (row - batch * seq) * seq_stride


@triton.jit
def offset_of(column, outer_stride, inner_stride, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """Where an entry of a row is. 64-bit too: the features may be the outermost dimensions."""
    if INNER == WIDTH:
        return column.to(tl.int64) * inner_stride
    else:
        return (column // INNER).to(tl.int64) * outer_stride + (column % INNER).to(tl.int64) * inner_stride


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
            start = start_of(origin, source_seq, strides[i][0], strides[i][1], FLATS[i])
            offset = offset_of(column, strides[i][2], strides[i][3], INNERS[i], WIDTHS[i])
            value = tl.load(sources[i] + start[:, None] + offset[None, :], mask=keep[:, None] & wanted, other=0)
            tl.store(targets[i] + row[:, None] * WIDTHS[i] + column[None, :], value, mask=inside[:, None] & wanted)
        first_block += blocks


# ----------------------------------------------------------------------------------------------------------- launches


class Moved:
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
    moved = Moved(tensors, axes)
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
