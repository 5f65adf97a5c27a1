"""Which rows of a batch are distinct, and which node of the prefix tree each row belongs to.

A *row* is one token of one sequence, its *key* the per-token integer inputs there, its *path* the keys of its
sequence from the start through the row.  A causal, token-wise model computes the same value for rows of equal
path, so one row per node of the prefix tree is enough: ``compact = full[fold]`` and ``full = compact[scatter]``.
The idea is that of RadixMLP, arXiv 2601.15013.

Plans are made of whole sequences: sort them, take the common prefix of sorted neighbours, and number the rest of
each sequence in one stretch.  The published function of RadixMLP can be imported from here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch

from radix_compile.arrays import Array, Int64, as_array, as_multiple
from radix_compile.fold_and_scatter import compute_fold_and_scatter, compute_fold_and_scatter_torch
from radix_compile.prefix_sort import sort_equal_lengths

__all__ = ["PrefixPlan", "compute_fold_and_scatter", "compute_fold_and_scatter_torch"]

PIECE = 64
"""Rows that one worker adds up at most, in sums over the rows of a node: longer lists are done in pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixPlan:
    """The distinct rows of a padded ``[B, S]`` batch, numbered depth first through its prefix tree.

    Attributes:
        fold: int64 ``[T']``, the flat row index ``b * S + s`` of one row per node, then any padding.
        scatter: int64 ``[B * S]``, the node of every row, -1 for rows left out.
        order: int64 ``[B]``, the sequences in lexicographic order of their row keys.
        shared: int64 ``[B]``, for each sequence of `order` the length of the prefix that it shares with the one
            before it (0 for the first).
    """

    fold: Int64
    scatter: Int64
    order: Int64
    shared: Int64

    @property
    def tokens(self) -> int:
        """Number of rows that are not left out."""
        return int(np.count_nonzero(self.scatter >= 0))

    @property
    def compact_tokens(self) -> int:
        """Number of nodes, padding of `fold` not counted."""
        return int(self.scatter.max(initial=-1)) + 1

    def row_lists(self) -> tuple[Int64, Int64, Int64]:
        """The rows of each node in CSR form, for sums over them: ``rows``, ``starts`` and ``pieces``.

        ``rows`` is ``[B * S]``, ``starts`` ``[T' + 1]``. The rows of node ``n`` are ``rows[starts[n]:starts[n + 1]]``,
        those of sequences earlier in `order` first. What of `rows` lies behind ``starts[T']`` is 0: rows that are left
        out are in no list, and padding of `fold` has an empty one. ``pieces`` ``[P]`` are the places in `rows` where
        the pieces of `PIECE` entries start, of lists that are longer than one; often there are none.
        """
        batch, count, nodes = len(self.order), len(self.scatter), len(self.fold)
        length = count // max(batch, 1)
        node = self.scatter.reshape(batch, length)[self.order]
        starts = np.zeros(nodes + 1, np.int64)
        np.cumsum(np.bincount(node.ravel() + 1, minlength=nodes + 1)[1:], out=starts[1:])
        # The rows of a node lie in one column, in neighbouring sequences of the order, that of `fold` first. So a
        # row's place in its list is how far its sequence is from that one. Rows without a node go behind the end.
        place = np.empty(batch, np.int64)
        place[self.order] = np.arange(batch)
        offset = np.append(starts[:-1] - place[self.fold // max(length, 1)], 0)
        target = offset[node]
        target += np.arange(batch)[:, None]
        target[node < 0] = count
        rows = np.zeros(count + 1, np.int64)
        rows[target] = (self.order * length)[:, None] + np.arange(length)
        return rows[:-1], starts, _pieces(starts) if batch > PIECE else np.empty(0, np.int64)

    @property
    def compression(self) -> float:
        """Nodes per row: 1.0 where nothing is shared (and for a batch without rows), lower is better."""
        tokens = self.tokens
        return self.compact_tokens / tokens if tokens else 1.0

    @classmethod
    def from_rows(
        cls,
        *keys: Array | torch.Tensor,
        unique: Array | torch.Tensor | None = None,
        skip: Array | torch.Tensor | None = None,
        start: Array | torch.Tensor | None = None,
        pad_multiple_of: SupportsIndex | None = None,
    ) -> PrefixPlan:
        """Plan for a batch whose row key at ``(b, s)`` is ``(keys[0][b, s], keys[1][b, s], ...)``.

        Args:
            keys: one or more integer or bool arrays or tensors, each ``[B, S]``; dtypes may differ.
            unique: bool ``[B, S]``, rows that get a node of their own though other rows have their path.  The
                rows after them are merged as usual.  Must be equal on rows of equal path.
            skip: bool ``[B, S]``, rows that get no node.  Must be equal on rows of equal path.
            start: integer ``[B]``, the column at which each sequence starts, for rows that do not depend on their
                column.  The rows in front of it are in no path and get nodes of their own.
            pad_multiple_of: repeat ``fold[0]`` at the end of `fold` up to a multiple of this (an empty `fold`
                stays empty).

        Raises:
            TypeError: an argument is no array or tensor, a key is not integer or bool, a mask is not bool,
                `pad_multiple_of` is not an integer.
            ValueError: no key, a shape that is not the ``[B, S]`` of ``keys[0]``, `pad_multiple_of` below 1.
        """
        if not keys:
            raise ValueError("keys: at least one array is needed")
        columns = [as_array(f"keys[{i}]", key, "biu") for i, key in enumerate(keys)]
        shape = columns[0].shape
        if len(shape) != 2:
            raise ValueError(f"keys[0] must have shape [B, S], got {list(shape)}")
        own = None if unique is None else as_array("unique", unique, "b")
        left_out = None if skip is None else as_array("skip", skip, "b")
        for name, array in (*((f"keys[{i}]", c) for i, c in enumerate(columns)), ("unique", own), ("skip", left_out)):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must have the shape {list(shape)} of keys[0], got {list(array.shape)}")
        multiple = as_multiple(pad_multiple_of)

        length = shape[1]
        turn = None if start is None else _turn(as_array("start", start, "iu"), shape)
        if turn is not None:
            columns = [np.take_along_axis(column, turn, 1) for column in columns]
            left_out = None if left_out is None else np.take_along_axis(left_out, turn, 1)
            in_front = turn < turn[:, :1]
            columns.append(in_front)  # or what is in front of one sequence may look like the end of another
            own = in_front if own is None else np.take_along_axis(own, turn, 1) | in_front
        order, shared = sort_equal_lengths(columns)
        offset = np.arange(length)
        new = offset >= shared[:, None]
        if own is not None:
            own = own[order]
            new |= own
        if left_out is not None:
            left_out = left_out[order]
            new &= ~left_out
        nodes = new.cumsum().reshape(shape)
        nodes -= 1
        for i, prefix in enumerate(shared.tolist()):
            # One copy per sequence: maximum.accumulate down the columns does the same, ten times slower.
            if own is None:
                nodes[i, :prefix] = nodes[i - 1, :prefix]
            else:
                np.copyto(nodes[i, :prefix], nodes[i - 1, :prefix], where=~own[i, :prefix])
        if left_out is not None:
            nodes[left_out] = -1

        scatter = np.empty_like(nodes)
        fold = ((order * length)[:, None] + (offset if turn is None else turn[order]))[new]
        if turn is None:
            scatter[order] = nodes
        else:
            scatter[order[:, None], turn[order]] = nodes
        if extra := -fold.size % multiple if fold.size else 0:
            fold = np.concatenate([fold, np.full(extra, fold[0])])
        return cls(fold, scatter.ravel(), order, shared)


def _turn(start: Array, shape: tuple[int, ...]) -> Int64 | None:
    """The columns of each sequence, those in front of its start last; None if all start at the first."""
    batch, length = shape
    if start.shape != (batch,):
        raise ValueError(f"start must have shape [{batch}], got {list(start.shape)}")
    if ((start < 0) | (start >= max(length, 1))).any():
        raise ValueError(f"start must hold columns from 0 to {length - 1}, got {start.min()} to {start.max()}")
    if not start.any():
        return None
    turn: Int64 = (np.arange(length) + start.astype(np.int64)[:, None]) % max(length, 1)
    return turn


def _pieces(starts: Int64) -> Int64:
    sizes = np.diff(starts)
    long = np.flatnonzero(sizes > PIECE)
    counts = -(-sizes[long] // PIECE)
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    pieces: Int64 = np.repeat(starts[long], counts) + nth * PIECE
    return pieces
