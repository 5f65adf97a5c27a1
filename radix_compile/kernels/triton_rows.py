"""The gathers as Triton kernels: whole rows, several tensors in one launch.

A kernel is compiled for the number, widths and dtypes of the tensors it moves. Its grid is row blocks times column
blocks, where the columns of all tensors count on after each other. Row offsets are 64-bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels.row_layout import RowLayout, row_layout, rows_geometry

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
DTYPES = FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
"""The dtypes whose entries are moved as they are. Others go the way of the reference."""

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


@dataclass(frozen=True, slots=True)
class Moved:
    """How tensors of given shapes, strides and dtypes move together: the constants that their kernels take."""

    layouts: tuple[RowLayout, ...]
    axes: tuple[tuple[int, int], ...]
    columns: int
    """Columns of one tile."""
    at_once: int
    """Rows of one tile."""
    strides: tuple[tuple[int, int, int, int], ...]
    widths: tuple[int, ...]
    constants: dict[str, Any]

    @staticmethod
    def of(tensors: Sequence[Tensor], batch_dims: Sequence[int], seq_dims: Sequence[int], tile: int = TILE) -> Moved:
        """In tiles of ``tile`` bytes."""
        geometry = tuple([(one.shape, one.stride(), one.element_size()) for one in tensors])
        return _moved(geometry, tuple(batch_dims), tuple(seq_dims), tile)

    @property
    def seq(self) -> int:
        return self.layouts[0].seq

    def blocks(self, columns: int) -> int:
        return sum(-(-width // columns) for width in self.widths)

    def sources(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors whose strides these are, as a rule the ones that are moved."""
        moved = zip(tensors, self.layouts, self.axes, strict=True)
        return tuple([as_bytes(layout.applied(one, *at)) for one, layout, at in moved])

    def empty(self, tensors: Sequence[Tensor], batch: int, seq: int) -> list[Tensor]:
        """Uninitialised results: the features of the tensors, with contiguous rows."""
        return [
            one.new_empty_strided(*rows_geometry(one.shape, batch, seq, *at))
            for one, at in zip(tensors, self.axes, strict=True)
        ]


@functools.lru_cache(maxsize=4096)
def _moved(
    geometry: tuple[tuple[torch.Size, tuple[int, ...], int], ...],
    batch_dims: tuple[int, ...],
    seq_dims: tuple[int, ...],
    tile: int,
) -> Moved:
    """The same sizes come again for each layer, and working all this out takes longer than a launch."""
    axes = tuple(zip(batch_dims, seq_dims, strict=True))
    layouts = tuple(row_layout(shape, stride, *at) for (shape, stride, _), at in zip(geometry, axes, strict=True))
    strides = tuple((of.batch_stride, of.seq_stride, of.outer_stride, of.inner_stride) for of in layouts)
    widths = tuple(of.width for of in layouts)
    entries = tile // max(size for *_, size in geometry)
    # A tile is as wide as the narrowest tensor, so that no part of it is idle; but at least half a KiB.
    narrowest, widest = (triton.next_power_of_2(max(1, f(widths))) for f in (min, max))
    columns = min(max(narrowest, entries // 8), widest, entries)
    inners, flats = tuple(of.inner for of in layouts), tuple(of.flat for of in layouts)
    constants = {"WIDTHS": widths, "INNERS": inners, "FLATS": flats}
    return Moved(layouts, axes, columns, entries // columns, strides, widths, constants)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _copied(
    tensors: Sequence[Tensor],
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
    index: Tensor,
    guard: Tensor | None,
    batch: int,
    seq: int,
) -> list[Tensor]:
    """``[..., batch, ..., seq, ...]`` tensors whose row ``r`` is the source's row ``index[r]``."""
    moved = Moved.of(tensors, batch_dims, seq_dims)
    results = moved.empty(tensors, batch, seq)
    blocks = moved.blocks(moved.columns)
    if batch * seq and blocks:
        if seq < 4 * moved.at_once:
            batch, seq = 1, batch * seq
        with torch.cuda.device_of(index):
            _copy_rows[batch * -(-seq // moved.at_once), blocks](
                tuple(map(as_bytes, results)), moved.sources(tensors), moved.strides, index, guard, batch, seq,
                moved.seq, GUARDED=guard is not None, ROWS=moved.at_once, COLUMNS=moved.columns, num_warps=WARPS,
                **moved.constants,
            )  # fmt: skip
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
    fold: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    pieces: Tensor | None,
    batch: int,
    seq: int,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
    holes: bool,
) -> list[Tensor]:
    return _copied(compact, batch_dims, seq_dims, scatter, None, batch, seq)


def gather_columns(table: Tensor, fold: Tensor, scatter: Tensor, batch: int, seq: int, dim: int) -> Tensor:
    """A fold of the table repeated for each sequence, which takes no memory."""
    return fold_rows(table.expand(batch, *table.shape), fold, scatter, 0, dim + 1).squeeze(0)
