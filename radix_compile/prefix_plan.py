"""Which rows of a batch are distinct, and which node of the prefix tree each row belongs to.

A *row* is one token of one sequence, its *key* the per-token integer inputs there, its *path* the keys of its
sequence from the start through the row.  A causal, token-wise model computes the same value for rows of equal
path, so one row per node of the prefix tree is enough: ``compact = full[fold]`` and ``full = compact[scatter]``.
The idea is that of RadixMLP, arXiv 2601.15013.

Everything here works on whole sequences: sort them, take the common prefix of sorted neighbours, and number the
rest of each sequence in one stretch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Int64: TypeAlias = NDArray[np.int64]
UInt32: TypeAlias = NDArray[np.uint32]

# Below this many tokens, `compute_fold_and_scatter` walks the tree token by token: the fixed cost of the NumPy
# calls of the other way, some 30 us, is more than the whole walk takes.  The one loop over tokens in this module.
TOKEN_LOOP_LIMIT = 128

UINT32 = np.dtype(np.uint32)

# Sorted sequences are compared in blocks of about this many bytes.
BLOCK_BYTES = 1 << 18


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
        pad_multiple_of: SupportsIndex | None = None,
    ) -> PrefixPlan:
        """Plan for a batch whose row key at ``(b, s)`` is ``(keys[0][b, s], keys[1][b, s], ...)``.

        Args:
            keys: one or more integer or bool arrays or tensors, each ``[B, S]``; dtypes may differ.
            unique: bool ``[B, S]``, rows that get a node of their own though other rows have their path.  The
                rows after them are merged as usual.  Must be equal on rows of equal path.
            skip: bool ``[B, S]``, rows that get no node.  Must be equal on rows of equal path.
            pad_multiple_of: repeat ``fold[0]`` at the end of `fold` up to a multiple of this (an empty `fold`
                stays empty).

        Raises:
            TypeError: an argument is no array or tensor, a key is not integer or bool, a mask is not bool,
                `pad_multiple_of` is not an integer.
            ValueError: no key, a shape that is not the ``[B, S]`` of ``keys[0]``, `pad_multiple_of` below 1.
        """
        if not keys:
            raise ValueError("keys: at least one array is needed")
        columns = [_as_array(f"keys[{i}]", key, "biu") for i, key in enumerate(keys)]
        shape = columns[0].shape
        if len(shape) != 2:
            raise ValueError(f"keys[0] must have shape [B, S], got {list(shape)}")
        own = None if unique is None else _as_array("unique", unique, "b")
        left_out = None if skip is None else _as_array("skip", skip, "b")
        for name, array in (*((f"keys[{i}]", c) for i, c in enumerate(columns)), ("unique", own), ("skip", left_out)):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must have the shape {list(shape)} of keys[0], got {list(array.shape)}")
        multiple = _as_multiple(pad_multiple_of)

        length = shape[1]
        order, shared = _sort_equal_lengths(columns)
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
        scatter[order] = nodes
        fold = ((order * length)[:, None] + offset)[new]
        if extra := -fold.size % multiple if fold.size else 0:
            fold = np.concatenate([fold, np.full(extra, fold[0])])
        return cls(fold, scatter.ravel(), order, shared)


def compute_fold_and_scatter(
    input_ids: UInt32,
    position_ids: UInt32,
    cu_seq_lengths: UInt32,
    pad_multiple_of: SupportsIndex | None = None,
    bound_checks: bool | None = None,
) -> tuple[UInt32, UInt32, UInt32, UInt32]:
    """Fold and scatter indices of a packed batch: the published function of RadixMLP (arXiv 2601.15013).

    Nodes are numbered in the order of their first row, as the radix-mlp package does.

    Args:
        input_ids: uint32 ``[T]``, the tokens of all sequences, one sequence after the other.
        position_ids: uint32 ``[T]``.
        cu_seq_lengths: uint32 ``[B + 1]``, where each sequence starts, then `T`; may be empty where `T` is 0.
        pad_multiple_of: append zeros to all outputs but the scatter index up to a multiple of this; a batch
            without tokens stays empty.
        bound_checks: False where the caller vouches for `cu_seq_lengths`, which is otherwise checked.

    Returns:
        ``(compact_input_ids [T'], compact_position_ids [T'], scatter_indices [T], fold_gather [T'])``, uint32.

    Raises:
        TypeError: an array is no uint32 NumPy array, `pad_multiple_of` is not an integer.
        ValueError: an array is not one-dimensional, the ids differ in length, `cu_seq_lengths` does not run from
            0 to `T` without decreasing, `pad_multiple_of` is below 1.
    """
    named = (("input_ids", input_ids), ("position_ids", position_ids), ("cu_seq_lengths", cu_seq_lengths))
    for name, array in named:
        if not isinstance(array, np.ndarray) or array.dtype != UINT32:
            raise TypeError(f"{name} must be a uint32 NumPy array, got {_describe(array)}")
        if array.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got {array.ndim}")
    tokens = len(input_ids)
    if len(position_ids) != tokens:
        raise ValueError(f"position_ids must be as long as input_ids, got {len(position_ids)} and {tokens}")
    bounds: list[int] = cu_seq_lengths.tolist()
    whole = bounds[0] == 0 and bounds[-1] == tokens and bounds == sorted(bounds) if bounds else not tokens
    if not whole and bound_checks is not False:
        raise ValueError(f"cu_seq_lengths must rise from 0 to the {tokens} tokens of input_ids")
    multiple = _as_multiple(pad_multiple_of)

    split = _fold_and_scatter_by_token if tokens <= TOKEN_LOOP_LIMIT else _fold_and_scatter_by_sequence
    first, fold, scatter = split(input_ids, position_ids, bounds)
    compact = [input_ids[first], position_ids[first], fold]
    if extra := -fold.size % multiple:
        padding = np.zeros(extra, np.uint32)
        compact = [np.concatenate([array, padding]) for array in compact]
    return compact[0], compact[1], scatter, compact[2]


def compute_fold_and_scatter_torch(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seq_lengths: torch.Tensor,
    pad_multiple_of: SupportsIndex | None = None,
    bound_checks: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`compute_fold_and_scatter` for integer tensors of any dtype, all on one device.

    The work is done on the host.  Values are taken as 32-bit patterns, so that -1 and 2**32 - 1 are one token.

    Returns:
        ``(compact_input_ids [T'], compact_position_ids [T'], scatter_indices [T], fold_gather [T'])``, int32 on
        the device of the inputs; ids from 2**31 up come back as the negative int32 of the same bits.

    Raises:
        TypeError: an argument is no tensor of integers, `pad_multiple_of` is not an integer.
        ValueError: the devices differ, a value is outside ``[-2**31, 2**32)``, or as `compute_fold_and_scatter`.
    """
    arrays = []
    named = (("input_ids", input_ids), ("position_ids", position_ids), ("cu_seq_lengths", cu_seq_lengths))
    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor of integers, got {_describe(tensor)}")
        if tensor.device != input_ids.device:
            raise ValueError(f"{name} must be on {input_ids.device} as input_ids is, got {tensor.device}")
        array = _as_array(name, tensor, "iu")
        # Cut to 32 bits, ids that differ above would be merged.
        if array.itemsize > 4 and array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**32):
            raise ValueError(f"{name} must have values in [-2**31, 2**32)")
        arrays.append(array.astype(np.uint32, copy=False))
    outputs = compute_fold_and_scatter(arrays[0], arrays[1], arrays[2], pad_multiple_of, bound_checks)
    ids, positions, scatter, fold = (torch.from_numpy(a.view(np.int32)).to(input_ids.device) for a in outputs)
    return ids, positions, scatter, fold


def _describe(value: object) -> str:
    return f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def _as_array(name: str, value: Array | torch.Tensor, kinds: str) -> Array:
    """`value` as an array on the host; TypeError unless its dtype is of one of the NumPy `kinds`."""
    if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex() or value.is_quantized):
        value = value.numpy(force=True)  # the others have no NumPy form, or one that is refused below
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        wanted = {"biu": "integers or bools", "iu": "integers", "b": "bools"}[kinds]
        raise TypeError(f"{name} must be an array or tensor of {wanted}, got {_describe(value)}")
    return value


def _as_multiple(pad_multiple_of: SupportsIndex | None) -> int:
    if pad_multiple_of is None:
        return 1
    try:
        multiple = operator.index(pad_multiple_of)
    except TypeError:
        raise TypeError(f"pad_multiple_of must be an integer, got {_describe(pad_multiple_of)}") from None
    if multiple < 1:
        raise ValueError(f"pad_multiple_of must be at least 1, got {multiple}")
    return multiple


def _sort_equal_lengths(columns: list[Array]) -> tuple[Int64, Int64]:
    """Lexicographic order of B sequences of S rows, and the prefix that each shares with the one before it.

    `columns` are the parts of the row key, each ``[B, S]``.  Keys compare as bytes, not as numbers: any total
    order over keys puts equal prefixes side by side.
    """
    batch, length = columns[0].shape
    # A column that is the same in every sequence (positions, mostly) tells no two of them apart.  The last
    # sequence alone rules that out for nearly all columns that do differ.
    varying = [c for c in columns if batch and not (c[0].tobytes() == c[-1].tobytes() and (c[1:] == c[:-1]).all())]
    shared = np.zeros(batch, np.int64)
    if not varying:
        shared[1:] = length
        return np.arange(batch), shared
    if len({c.dtype for c in varying}) > 1:
        varying = [c.astype(np.int64) for c in varying]  # uint64 wraps around, which keeps values apart
    keys = np.ascontiguousarray(varying[0][..., None] if len(varying) == 1 else np.stack(varying, axis=-1))
    order = keys.reshape(batch, -1).view(f"V{keys[0].nbytes}").ravel().argsort(kind="stable")
    # Neighbours are compared block by block, in memory that stays in the cache.
    block = max(1, BLOCK_BYTES // keys[0].nbytes)
    for i in range(1, batch, block):
        rows = keys[order[i - 1 : i + block]]
        parted = np.ones((len(rows) - 1, length + 1), np.bool_)  # they part after the last row at the latest
        np.not_equal(rows[1:, :, 0], rows[:-1, :, 0], out=parted[:, :-1])
        for part in range(1, len(varying)):
            parted[:, :-1] |= rows[1:, :, part] != rows[:-1, :, part]
        parted.argmax(1, out=shared[i : i + block])
    return order, shared


def _sort_ragged(keys: NDArray[np.uint64], bounds: list[int]) -> tuple[Int64, Int64]:
    """As `_sort_equal_lengths` for packed row keys ``[T]``; memory is O(T) however the lengths differ."""
    data, width = keys.tobytes(), keys.itemsize
    sequences = [data[start * width : end * width] for start, end in pairwise(bounds)]
    order = np.array(sorted(range(len(sequences)), key=sequences.__getitem__))
    edges = np.array(bounds)
    start, length = edges[:-1][order], np.diff(edges)[order]
    # Neighbours are compared over the length of the shorter, all of them in one long array.
    span = np.minimum(length[1:], length[:-1])
    end = span.cumsum()
    begin = end - span
    at = np.arange(end[-1])
    differs = keys[at + (start[1:] - begin).repeat(span)] != keys[at + (start[:-1] - begin).repeat(span)]
    found = np.append(differs.nonzero()[0], len(at))
    shared = np.zeros_like(length)
    np.minimum(found[found.searchsorted(begin)] - begin, span, out=shared[1:])
    return order, shared


def _first_sharers(order: list[int], shared: list[int]) -> list[tuple[int, int, int]]:
    """``(sequence, earlier sequence that shares the longest prefix with it, length of that prefix)``.

    Ascending, sequences that share nothing with an earlier one left out.  The sorted sequences are a linked list.
    Taken out from the last to the first, each has only earlier ones beside it when its turn comes, and no earlier
    sequence shares more with it than one of these two.
    """
    batch = len(order)
    ring = [batch, *order]  # `batch` closes the list and shares nothing
    left = dict(zip(order, ring, strict=False))
    right = dict(zip(ring, order, strict=False))
    left[batch], right[ring[-1]] = ring[-1], batch
    with_left = dict(zip(ring, [0, *shared], strict=True))
    sharers = []
    for b in range(batch - 1, 0, -1):
        before, after = left[b], right[b]
        before_shares, after_shares = with_left[b], with_left[after]
        if before_shares >= after_shares:
            if before_shares:
                sharers.append((b, before, before_shares))
        else:
            sharers.append((b, after, after_shares))
            with_left[after] = before_shares
        right[before], left[after] = after, before
    return sharers[::-1]


def _fold_and_scatter_by_sequence(ids: UInt32, positions: UInt32, bounds: list[int]) -> tuple[Array, UInt32, UInt32]:
    """Bool ``[T]`` of the rows that are the first of a node, their indices ``[T']``, and the scatter index ``[T]``.

    Passes over memory are what costs here, hence bools and uint32 where 64-bit indices would do.
    """
    edges = np.array(bounds)
    start, length = edges[:-1], edges[1:] - edges[:-1]
    batch = len(length)
    rows = np.arange(len(ids), dtype=np.uint32)
    grid: UInt32  # `rows` in a shape that per-sequence values, indexed by `spread`, go with
    spread: Any
    if (length == length[0]).all():
        order, shared = _sort_equal_lengths([ids.reshape(batch, -1), positions.reshape(batch, -1)])
        grid, spread = rows.reshape(batch, -1), np.s_[:, None]
    else:
        order, shared = _sort_ragged(positions.astype(np.uint64) << np.uint64(32) | ids, bounds)
        grid, spread = rows, np.arange(batch).repeat(length)
    sharers = _first_sharers(order.tolist(), shared.tolist())

    # A sequence has new nodes from the end of its prefix on, numbered in one stretch.
    prefix = np.zeros(batch, np.int64)
    prefix[[b for b, _, _ in sharers]] = [n for _, _, n in sharers]
    new = (grid >= (start + prefix).astype(np.uint32)[spread]).ravel()
    fold = rows[new]
    grid -= prefix.cumsum().astype(np.uint32)[spread]  # row less node
    for b, sharer, n in sharers:
        here, there = bounds[b], bounds[sharer]
        rows[here : here + n] = rows[there : there + n]
    return new, fold, rows


def _fold_and_scatter_by_token(ids: UInt32, positions: UInt32, bounds: list[int]) -> tuple[Array, UInt32, UInt32]:
    """`_fold_and_scatter_by_sequence` for a handful of tokens, by a walk through the tree."""
    keys = list(zip(ids.tolist(), positions.tolist(), strict=True))
    nodes: dict[tuple[int, tuple[int, int]], int] = {}
    fold: list[int] = []
    scatter: list[int] = []
    for start, end in pairwise(bounds):
        node = -1
        for row in range(start, end):
            node = nodes.setdefault((node, keys[row]), len(fold))
            if node == len(fold):
                fold.append(row)
            scatter.append(node)
    first = np.array(fold, np.uint32)
    return first, first, np.array(scatter, np.uint32)
