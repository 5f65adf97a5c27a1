"""How the rows of a strided tensor lie in memory, for kernels that move whole rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A tensor seen as ``[B, S, outer, inner]``: rows of ``outer * inner`` entries, all strides in entries.

    Row ``r`` of the flattened batch starts at ``(r // S) * batch_stride + (r % S) * seq_stride``, its entry ``c`` lies
    ``(c // inner) * outer_stride + (c % inner) * inner_stride`` further on. Where two feature strides are not enough
    to describe a tensor, it is the layout of a copy of it.
    """

    seq: int
    width: int
    inner: int
    batch_stride: int
    seq_stride: int
    outer_stride: int
    inner_stride: int
    of_copy: bool = False

    @property
    def flat(self) -> bool:
        """Do rows follow each other at one stride, over the borders of sequences too?"""
        return self.batch_stride == self.seq * self.seq_stride

    def applied(self, tensor: Tensor, batch_dim: int, seq_dim: int) -> Tensor:
        """The tensor that this is the layout of: the one that it was made for, or a copy."""
        return tensor.movedim((batch_dim, seq_dim), (0, 1)).contiguous() if self.of_copy else tensor


def row_layout(shape: Sequence[int], strides: Sequence[int], batch_dim: int, seq_dim: int) -> RowLayout:
    features = _merged([(shape[d], strides[d]) for d in range(len(shape)) if d not in (batch_dim, seq_dim)])
    batch, seq = shape[batch_dim], shape[seq_dim]
    batch_stride, seq_stride = strides[batch_dim], strides[seq_dim]
    of_copy = len(features) > 2
    if of_copy:
        width = math.prod(size for size, _ in features)
        features, seq_stride, batch_stride = [(width, 1)], width, seq * width
    (outer, outer_stride), (inner, inner_stride) = [*[(1, 0)] * 2, *features][-2:]
    if batch == 1:
        batch_stride = seq * seq_stride
    return RowLayout(seq, outer * inner, inner, batch_stride, seq_stride, outer_stride, inner_stride, of_copy)


def _merged(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ``(size, stride)`` that one stride describes, as one."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def empty_rows(like: Tensor, batch: int, seq: int, batch_dim: int, seq_dim: int) -> Tensor:
    """An uninitialised tensor with ``like``'s features whose rows are contiguous: ``[B, S, features]`` in memory."""
    features = like.movedim((batch_dim, seq_dim), (0, 1)).shape[2:]
    return like.new_empty((batch, seq, *features)).movedim((0, 1), (batch_dim, seq_dim))


@functools.lru_cache(maxsize=4096)
def rows_geometry(
    shape: tuple[int, ...], batch: int, seq: int, batch_dim: int, seq_dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes and strides of ``empty_rows`` for a tensor of that shape."""
    sizes = [batch if d == batch_dim else seq if d == seq_dim else size for d, size in enumerate(shape)]
    strides = [0] * len(sizes)
    step = 1
    for d in (*reversed([d for d in range(len(sizes)) if d not in (batch_dim, seq_dim)]), seq_dim, batch_dim):
        strides[d] = step
        step *= max(sizes[d], 1)
    return tuple(sizes), tuple(strides)
