"""The published function of RadixMLP (arXiv 2601.15013), on the host.

It is there twice: in C, in the distribution radix-compile-native (the folder ``extension``), and in NumPy.  The C
takes contiguous arrays of a valid batch, which is nearly every call; the rest, and every call where that distribution
is not installed, is for the code below, which also knows the error messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch

from radix_compile.plan.arrays import Array, UInt32, as_array, as_multiple, describe
from radix_compile.plan.prefix_sort import sort_equal_lengths, sort_ragged

Outputs: TypeAlias = tuple[UInt32, UInt32, UInt32, UInt32]

extension: Callable[[object, object, object, SupportsIndex | None], Outputs | None] | None
try:
    from radix_compile_native import fold_and_scatter

    extension = fold_and_scatter
except ImportError:
    extension = None

UINT32 = np.dtype(np.uint32)


def compute_fold_and_scatter(
    input_ids: UInt32,
    position_ids: UInt32,
    cu_seq_lengths: UInt32,
    pad_multiple_of: SupportsIndex | None = None,
    bound_checks: bool | None = None,
) -> Outputs:
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
        All but the third may be parts of one block of memory.

    Raises:
        TypeError: an array is no uint32 NumPy array, `pad_multiple_of` is not an integer.
        ValueError: an array is not one-dimensional, the ids differ in length, `cu_seq_lengths` does not run from
            0 to `T` without decreasing, `pad_multiple_of` is below 1.
    """
    if extension is not None:
        outputs = extension(input_ids, position_ids, cu_seq_lengths, pad_multiple_of)
        if outputs is not None:
            return outputs

    named = (("input_ids", input_ids), ("position_ids", position_ids), ("cu_seq_lengths", cu_seq_lengths))
    for name, array in named:
        if not isinstance(array, np.ndarray) or array.dtype != UINT32:
            raise TypeError(f"{name} must be a uint32 NumPy array, got {describe(array)}")
        if array.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got {array.ndim}")
    tokens = len(input_ids)
    if len(position_ids) != tokens:
        raise ValueError(f"position_ids must be as long as input_ids, got {len(position_ids)} and {tokens}")
    bounds: list[int] = cu_seq_lengths.tolist()
    whole = bounds[0] == 0 and bounds[-1] == tokens and bounds == sorted(bounds) if bounds else not tokens
    if not whole and bound_checks is not False:
        raise ValueError(f"cu_seq_lengths must rise from 0 to the {tokens} tokens of input_ids")
    multiple = as_multiple(pad_multiple_of)
    if not tokens:
        return input_ids[:0].copy(), input_ids[:0].copy(), input_ids[:0].copy(), input_ids[:0].copy()

    new, fold, scatter = _split(input_ids, position_ids, bounds)
    compact = [input_ids[new], position_ids[new], fold]
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
            raise TypeError(f"{name} must be a tensor of integers, got {describe(tensor)}")
        if tensor.device != input_ids.device:
            raise ValueError(f"{name} must be on {input_ids.device} as input_ids is, got {tensor.device}")
        array = as_array(name, tensor, "iu")
        # Cut to 32 bits, ids that differ above would be merged.
        if array.itemsize > 4 and array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**32):
            raise ValueError(f"{name} must have values in [-2**31, 2**32)")
        arrays.append(array.astype(np.uint32, copy=False))
    outputs = compute_fold_and_scatter(arrays[0], arrays[1], arrays[2], pad_multiple_of, bound_checks)
    ids, positions, scatter, fold = (torch.from_numpy(a.view(np.int32)).to(input_ids.device) for a in outputs)
    return ids, positions, scatter, fold


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


def _split(ids: UInt32, positions: UInt32, bounds: list[int]) -> tuple[Array, UInt32, UInt32]:
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
        order, shared = sort_equal_lengths([ids.reshape(batch, -1), positions.reshape(batch, -1)])
        grid, spread = rows.reshape(batch, -1), np.s_[:, None]
    else:
        order, shared = sort_ragged([positions.astype(np.uint64) << np.uint64(32) | ids], bounds)
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
