"""How the rows of a strided tensor lie in memory, for kernels that move whole rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A tensor seen as ``[B, S, outer, inner]``: rows of ``outer * inner`` entries, all strides in entries.

    Row ``r`` of the flattened batch starts at ``(r // S) * batch_stride + (r % S) * seq_stride``, its entry ``c`` lies
    ``(c // inner) * outer_stride + (c % inner) * inner_stride`` further on.
    """

    seq: int
    width: int
    inner: int
    batch_stride: int
    seq_stride: int
    outer_stride: int
    inner_stride: int

    @property
    def flat(self) -> bool:
        """Do rows follow each other at one stride, over the borders of sequences too?"""
        return self.batch_stride == self.seq * self.seq_stride


def in_rows(tensor: Tensor, batch_dim: int, seq_dim: int) -> tuple[Tensor, RowLayout]:
    """The tensor and its layout. Where two feature strides are not enough to describe it, a copy of it."""
    rows = tensor.movedim((batch_dim, seq_dim), (0, 1))
    features = _merged(list(zip(rows.shape[2:], rows.stride()[2:], strict=True)))
    if len(features) > 2:
        rows = rows.contiguous()
        features = [(rows[0, 0].numel(), 1)]
    (outer, outer_stride), (inner, inner_stride) = [*[(1, 0)] * 2, *features][-2:]
    batch_stride, seq_stride = rows.stride()[:2]
    if rows.shape[0] == 1:
        batch_stride = rows.shape[1] * seq_stride
    return rows, RowLayout(rows.shape[1], outer * inner, inner, batch_stride, seq_stride, outer_stride, inner_stride)


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
