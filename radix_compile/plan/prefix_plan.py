"""Which rows of a batch are distinct, and which node of the prefix tree each row belongs to.

A *row* is one token of one sequence, its *key* the per-token integer inputs there, its *path* the keys of its
sequence from the start through the row.  A causal, token-wise model computes the same value for rows of equal
path, so one row per node of the prefix tree is enough: ``compact = full[fold]`` and ``full = compact[scatter]``.
The idea is that of RadixMLP, arXiv 2601.15013.

Plans are made of whole sequences: sort them, take the common prefix of sorted neighbours, and number the rest of
each sequence in one stretch.  The published function of RadixMLP can be imported from here too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import SupportsIndex

import numpy as np
import torch

from radix_compile.plan.arrays import Array, Int64, as_array, as_multiple, short_of_power_of_two
from radix_compile.plan.fold_and_scatter import compute_fold_and_scatter, compute_fold_and_scatter_torch
from radix_compile.plan.prefix_sort import sort_equal_lengths, sort_ragged

__all__ = ["PrefixPlan", "compute_fold_and_scatter", "compute_fold_and_scatter_torch"]

PIECE_SIZE = 64
"""Rows that one worker adds up at most, in sums over the rows of a node: longer lists are done in pieces."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The nodes of a plan whose rows are read themselves, not only by later rows.

    Attributes:
        nodes: int64 ``[H]``, ascending; if there is one only, or a multiple is asked for, the first comes again behind.
        places: int64 ``[T']``, the place of each node among them, -1 for the others.
        plan: the plan with these nodes alone: its `fold`, `scatter` and `row_lists` are right, but it is no tree.
    """

    nodes: Int64
    places: Int64
    plan: PrefixPlan


@dataclass(frozen=True, slots=True, eq=False)
class PrefixPlan:
    """The distinct rows of a padded ``[B, S]`` batch, numbered depth first through its prefix tree.

    Rows that get a node of their own are no part of the tree: their nodes are numbered behind it.

    Attributes:
        fold: int64 ``[T']``, the flat row index ``b * S + s`` of one row per node, then any padding.
        scatter: int64 ``[B * S]``, the node of every row, -1 for rows left out.
        order: int64 ``[N]``, the sequences in lexicographic order of their row keys.
        shared: int64 ``[N]``, for each sequence of `order` the length of the prefix that it shares with the one
            before it (0 for the first).
        bounds: int64 ``[N + 1]``, the flat index of the first row of each sequence, then ``B * S``. ``N`` is ``B``
            and all are of length ``S``, unless several sequences are packed in a row.
        begin: int64 ``[N]``, the flat index of the row at which the paths of each sequence begin.
        first_nodes: int64 ``[N + 1]``, for each sequence of `order` how many nodes of the tree those before it have:
            what it has new are the nodes from there to the next one's. The last is how many are in the tree.
        head: the nodes of the rows that are read themselves, if the program asks for them.
    """

    fold: Int64
    scatter: Int64
    order: Int64
    shared: Int64
    bounds: Int64
    begin: Int64
    first_nodes: Int64
    head: Head | None = None

    def with_head(self, read: Array, pad_multiple_of: SupportsIndex | None = None) -> PrefixPlan:
        """This plan with the `Head` of the rows that are read, bool ``[B, S]``, each of which must have a node."""
        is_read = np.zeros(len(self.fold), np.bool_)
        is_read[self.scatter[read.ravel()]] = True
        nodes = np.flatnonzero(is_read)
        places = np.full(len(self.fold) + 1, -1)  # the last is for rows without a node
        places[nodes] = np.arange(len(nodes))
        places, scatter = places[:-1], places[self.scatter]
        multiple = as_multiple(pad_multiple_of)
        nodes = _padded(nodes, multiple if len(nodes) > 1 else max(multiple, 2))
        return replace(self, head=Head(nodes, places, replace(self, fold=self.fold[nodes], scatter=scatter)))

    @property
    def tree_nodes(self) -> int:
        """Number of nodes in the tree."""
        return int(self.first_nodes[-1])

    @property
    def tokens(self) -> int:
        """Number of rows that are not left out."""
        return int(np.count_nonzero(self.scatter >= 0))

    @property
    def compact_tokens(self) -> int:
        """Number of nodes, padding of `fold` not counted."""
        return int(self.scatter.max(initial=-1)) + 1

    def row_lists(self, filled_up: bool = False) -> tuple[Int64, Int64, Int64]:
        """The rows of each node in CSR form, for sums over them: ``rows``, ``starts`` and ``pieces``.

        ``rows`` is ``[B * S]``, ``starts`` ``[T' + 1]``. The rows of node ``n`` are ``rows[starts[n]:starts[n + 1]]``,
        those of sequences earlier in `order` first. What of `rows` lies behind ``starts[T']`` is 0: rows that are left
        out are in no list, and padding of `fold` has an empty one. ``pieces`` ``[P]`` are the places in `rows` where
        the pieces of `PIECE_SIZE` entries start, of lists that are longer than one; often there are none. With
        `filled_up`, the last of them comes again, up to a power of two, and nobody reads its further sums.
        """
        sequences, count, nodes = len(self.order), len(self.scatter), len(self.fold)
        starts = np.zeros(nodes + 1, np.int64)
        np.cumsum(np.bincount(self.scatter + 1, minlength=nodes + 1)[1:], out=starts[1:])
        # The rows of a node lie in neighbouring sequences of the order, one in each, that of `fold` first. So a row's
        # place in its list is how far its sequence is from that one. Rows without a node go behind the end.
        place = np.empty(sequences, np.int64)
        place[self.order] = np.arange(sequences)
        place = place.repeat(np.diff(self.bounds))  # of each row
        target = np.append(starts[:-1] - place[self.fold], 0)[self.scatter]
        target += place
        target[self.scatter < 0] = count
        rows = np.zeros(count + 1, np.int64)
        rows[target] = np.arange(count)
        pieces = _pieces(starts) if sequences > PIECE_SIZE else np.empty(0, np.int64)
        if filled_up:
            pieces = np.append(pieces, pieces[-1:].repeat(short_of_power_of_two(len(pieces))))
        return rows[:-1], starts, pieces

    def tree(self, shown: Array | None = None) -> tuple[Int64, Int64]:
        """The ancestors of each node, by two numbers: ``begin`` and ``end``, both ``[T']``.

        Node ``j`` is ``i`` or an ancestor of it if ``j <= i < end[j]``. The rows on the way to node ``i`` are those
        from ``begin[i]`` to ``fold[i]``, so that ``scatter[begin[i]:fold[i]]`` are its ancestors from the root on, and
        ``fold[i] - begin[i]`` is its depth. Outside of the tree ``begin`` is ``fold`` and ``end`` is 0. With `shown`,
        bool ``[B * S]``, ``end`` is 0 for the nodes of other rows too, which so are ancestors of none.
        """
        inside = slice(0, self.tree_nodes)
        begin, end = self.fold.copy(), np.zeros_like(self.fold)
        begin[inside] = self._begin_of_nodes()
        depth = self.fold[inside] - begin[inside]
        # From the last sequence to the first: where the next one that parts before each column begins.
        following = np.full(int(np.diff(self.bounds).max(initial=0)), self.tree_nodes)
        edges = self.first_nodes.tolist()
        for i, parts_at in zip(range(len(edges) - 2, -1, -1), self.shared[::-1].tolist(), strict=True):
            new = slice(edges[i], edges[i + 1])
            end[new] = following[depth[new]]
            following[parts_at:] = edges[i]
        if shown is not None:
            end *= shown[self.fold]
        return begin, end

    def columns(self, seq: int) -> Int64:
        """The column of each node, ``[T']``, from the start of its path; outside of the tree, from the first."""
        inside = slice(0, self.tree_nodes)
        columns: Int64 = self.fold % seq
        columns[inside] = self.fold[inside] - self._begin_of_nodes()
        return columns

    @property
    def pairs(self) -> int:
        """How many pairs of a node and an ancestor of it, or itself, there are."""
        return int((self.fold[: self.tree_nodes] - self._begin_of_nodes() + 1).sum())

    def _begin_of_nodes(self) -> Int64:
        """For each node of the tree, the flat index of the row at which its path begins."""
        return self.begin[self.order].repeat(np.diff(self.first_nodes))

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
        needed: Array | torch.Tensor | None = None,
        start: Array | torch.Tensor | None = None,
        breaks: Array | torch.Tensor | None = None,
        pad_multiple_of: SupportsIndex | None = None,
    ) -> PrefixPlan:
        """Plan for a batch whose row key at ``(b, s)`` is ``(keys[0][b, s], keys[1][b, s], ...)``.

        Args:
            keys: one or more integer or bool arrays or tensors, each ``[B, S]``; dtypes may differ.
            unique: bool ``[B, S]``, rows that get a node of their own though other rows have their path.  The
                rows after them are merged as usual.  Must be equal on rows of equal path.
            needed: bool ``[B, S]``, the rows that must have a node.  The others have one only if they share it.
            start: integer ``[B]``, the column at which each sequence starts, for rows that do not depend on their
                column.  The rows in front of it are in no path and get nodes of their own.
            breaks: bool ``[B, S]``, the rows with which a sequence begins, for several packed in a row; column 0
                always does.  Not together with `start`.
            pad_multiple_of: repeat ``fold[0]`` at the end of `fold` up to a multiple of this (an empty `fold`
                stays empty).

        Raises:
            TypeError: an argument is no array or tensor, a key is not integer or bool, a mask is not bool,
                `pad_multiple_of` is not an integer.
            ValueError: no key, a shape that is not the ``[B, S]`` of ``keys[0]``, both `start` and `breaks`,
                `pad_multiple_of` below 1.
        """
        if not keys:
            raise ValueError("keys: at least one array is needed")
        columns = [as_array(f"keys[{i}]", key, "biu") for i, key in enumerate(keys)]
        shape = columns[0].shape
        if len(shape) != 2:
            raise ValueError(f"keys[0] must have shape [B, S], got {list(shape)}")
        own = None if unique is None else as_array("unique", unique, "b")
        kept = None if needed is None else as_array("needed", needed, "b")
        first = None if breaks is None else as_array("breaks", breaks, "b")
        named = {f"keys[{i}]": column for i, column in enumerate(columns)}
        for name, array in (*named.items(), ("unique", own), ("needed", kept), ("breaks", first)):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must have the shape {list(shape)} of keys[0], got {list(array.shape)}")
        multiple = as_multiple(pad_multiple_of)
        if first is not None and start is not None:
            raise ValueError("start and breaks cannot be given together")
        if first is not None and first[:, 1:].any():
            return _from_packed(columns, own, kept, first, multiple)

        length = shape[1]
        turn = None if start is None else _turn(as_array("start", start, "iu"), shape)
        if turn is not None:
            columns = [np.take_along_axis(column, turn, 1) for column in columns]
            kept = None if kept is None else np.take_along_axis(kept, turn, 1)
            in_front = turn < turn[:, :1]
            columns.append(in_front)  # or what is in front of one sequence may look like the end of another
            own = in_front if own is None else np.take_along_axis(own, turn, 1) | in_front
        order, shared = sort_equal_lengths(columns)
        offset = np.arange(length)
        new = offset >= shared[:, None]
        own = None if own is None else own[order].ravel()
        kept = None if kept is None else kept[order].ravel()
        nodes, places, first_nodes = _number(new.ravel(), own, kept, shared, np.arange(shape[0]) * length)

        scatter = np.empty(shape, np.int64)
        row = (order * length)[:, None] + (offset if turn is None else turn[order])
        if turn is None:
            scatter[order] = nodes.reshape(shape)
        else:
            scatter[order[:, None], turn[order]] = nodes.reshape(shape)
        bounds = np.arange(shape[0] + 1) * length
        begin = bounds[:-1] if turn is None else bounds[:-1] + turn[:, 0]
        return cls(_padded(row.ravel()[places], multiple), scatter.ravel(), order, shared, bounds, begin, first_nodes)


def _from_packed(
    columns: list[Array], own: Array | None, kept: Array | None, first: Array, multiple: int
) -> PrefixPlan:
    """`PrefixPlan.from_rows` for sequences of any lengths, which begin where `first` is true, and in column 0."""
    begins = first.copy()
    begins[:, 0] = True
    bounds = np.append(np.flatnonzero(begins), begins.size)
    order, shared = sort_ragged([column.ravel() for column in columns], bounds.tolist())
    lengths = np.diff(bounds)[order]
    end = lengths.cumsum()
    offset = np.arange(begins.size) - (end - lengths).repeat(lengths)
    row = bounds[order].repeat(lengths) + offset  # in the order of the tree
    new = offset >= shared.repeat(lengths)
    own = None if own is None else own.ravel()[row]
    kept = None if kept is None else kept.ravel()[row]
    scatter = np.empty(begins.size, np.int64)
    scatter[row], places, first_nodes = _number(new, own, kept, shared, end - lengths)
    return PrefixPlan(_padded(row[places], multiple), scatter, order, shared, bounds, bounds[:-1], first_nodes)


def _number(
    new: Array, own: Array | None, kept: Array | None, shared: Int64, begin: Int64
) -> tuple[Int64, Int64, Int64]:
    """The nodes of rows in the order of the tree, in which sequence ``i`` starts at ``begin[i]``; the place there of
    the first row of each node; and `PrefixPlan.first_nodes`. `new` and `own` are overwritten.
    """
    if own is not None:
        new &= ~own
    places = np.flatnonzero(new)
    nodes = np.zeros(len(new), np.int64)
    nodes[places] = np.arange(len(places))
    before = 0
    for prefix, here in zip(shared.tolist(), begin.tolist(), strict=True):
        # One copy per sequence: maximum.accumulate down the columns does the same, ten times slower.
        nodes[here : here + prefix] = nodes[before : before + prefix]
        before = here
    in_tree = len(places)
    if own is not None:
        places = np.append(places, np.flatnonzero(own))
        nodes[own] = np.arange(in_tree, len(places))
    if kept is not None:
        stays = np.zeros(len(places), np.bool_)
        stays[nodes[kept]] = True
        nodes = np.where(stays, stays.cumsum() - 1, -1)[nodes]
        in_tree, places = int(stays[:in_tree].sum()), places[stays]
    return nodes, places, np.append(places[:in_tree].searchsorted(begin), in_tree)


def with_earlier_rows(read: Array, hidden: Array | None = None, breaks: Array | None = None) -> Array:
    """The rows ``[B, S]`` that are read, and those in front of them in their sequences, but for hidden ones.

    Sequences begin in column 0, and where ``breaks`` is true.
    """
    if not read.size:
        return read
    begins = np.zeros(read.shape, np.bool_) if breaks is None else breaks.copy()
    begins[:, 0] = True
    bounds = np.append(np.flatnonzero(begins), read.size)
    row = np.arange(read.size)
    last = np.maximum.reduceat(np.where(read.ravel(), row, -1), bounds[:-1])
    earlier: Array = (row <= last.repeat(np.diff(bounds))).reshape(read.shape)
    return earlier if hidden is None else (earlier & ~hidden) | read


def _padded(fold: Int64, multiple: int) -> Int64:
    """With the first entry repeated at the end up to a multiple."""
    missing = -len(fold) % multiple
    return np.append(fold, fold[:1].repeat(missing)) if missing else fold


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
    long = np.flatnonzero(sizes > PIECE_SIZE)
    counts = -(-sizes[long] // PIECE_SIZE)
    nth = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    pieces: Int64 = np.repeat(starts[long], counts) + nth * PIECE_SIZE
    return pieces
