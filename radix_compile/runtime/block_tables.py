"""The tables of blocks that flex_attention is called with, looked at in every call (see ``analysis.rules.flex``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from radix_compile.ir.errors import RunsPlain

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class BlockTables:
    """Where in a call's inputs the tables are: see ``analysis.rules.flex.Blocks``."""

    partial: tuple[int, int]
    full: tuple[int, int] | None
    query_size: int
    key_size: int


def listed_blocks(tables: BlockTables, args: Sequence[Any], shape: tuple[int, int]) -> NDArray[np.int64] | None:
    """Numbers ``[B, S]``, equal for rows whose tables list the same blocks; None if one table is for all sequences.

    Raises :class:`RunsPlain` if a block that is listed as full has a key behind one of its queries.
    """
    listed = [_listed(args[count], args[index]) for count, index in filter(None, (tables.partial, tables.full))]
    if tables.full is not None:
        full = listed[-1]
        last = (full + 1) * tables.key_size - 1
        first = np.arange(full.shape[2])[None, None, :, None] * tables.query_size
        if ((full >= 0) & (last > first)).any():
            raise RunsPlain("a block that flex_attention's block mask lists as full has keys behind its queries")
    if all(one.shape[0] == 1 for one in listed):
        return None
    batch, seq = shape
    blocks = max(one.shape[2] for one in listed)
    rows = [np.broadcast_to(one, (batch, *one.shape[1:])).swapaxes(1, 2).reshape(batch, blocks, -1) for one in listed]
    _, numbers = np.unique(np.concatenate(rows, -1).reshape(batch * blocks, -1), axis=0, return_inverse=True)
    column = np.arange(seq) // tables.query_size
    result: NDArray[np.int64] = numbers.astype(np.int64).reshape(batch, blocks)[:, column]
    return result


def _listed(count: torch.Tensor, index: torch.Tensor) -> NDArray[np.int64]:
    """The listed key blocks of each query block, and -1 behind them."""
    blocks = index.numpy(force=True).astype(np.int64)
    place = np.arange(blocks.shape[-1])
    return np.where(place < count.numpy(force=True)[..., None], blocks, -1)


def agree_with_mask(
    tables: BlockTables,
    args: Sequence[Any],
    shown: BoolArray,
    window: int | None = None,
    sequence_ids: NDArray[Any] | None = None,
) -> bool:
    """Do the tables hide and show nothing that a mask does not?

    The mask shows earlier keys and the row itself: those that are ``shown`` ``[B, S]``, at most ``window`` columns back
    (the row's own included), with the same number in ``sequence_ids`` ``[B, S]``. The answer is no as well if that
    takes more than a look at the blocks to see, as it does where a window and padding meet.
    """
    places = tuple(filter(None, (tables.partial, tables.full)))
    partial, *full = [_as_sets(args[count], args[index]) for count, index in places]
    listed = partial | full[0] if full else partial
    # A block that is listed twice counts twice.
    counts = [args[count].numpy(force=True) for count, _ in places]
    twice = any((one.sum(-1) != count).any() for one, count in zip((partial, *full), counts, strict=True))
    if twice or (full and (partial & full[0]).any()):
        return False
    seq = shown.shape[1]
    first_query, last_query = _bounds(listed.shape[2], tables.query_size, seq)
    first_key, last_key = _bounds(listed.shape[3], tables.key_size, seq)
    first_query, last_query = first_query[:, None], last_query[:, None]
    possible = (first_key <= last_query) & (first_key < seq) & (first_query < seq)
    certain = last_key <= first_query
    if window is not None:
        possible &= first_query - last_key < window
        certain &= last_query - first_key < window
    seen = [shown[:, a : b + 1] for a, b in zip(first_key, last_key, strict=True)]
    possible = possible & np.stack([one.any(1) for one in seen], 1)[:, None]
    certain = certain & np.stack([one.all(1) for one in seen], 1)[:, None]
    if sequence_ids is not None:
        queries = first_query[:, 0], last_query[:, 0]
        low_query, high_query = (one[:, :, None] for one in _extremes(sequence_ids, *queries))
        low_key, high_key = (one[:, None] for one in _extremes(sequence_ids, first_key, last_key))
        possible &= (low_query <= high_key) & (low_key <= high_query)
        certain &= (low_query == high_query) & (low_key == high_key) & (low_query == low_key)
    hides = possible[:, None] & ~listed
    shows = full[0] & ~certain[:, None] if full else np.zeros(1, np.bool_)
    return not hides.any() and not shows.any()


def _as_sets(count: torch.Tensor, index: torch.Tensor) -> BoolArray:
    """Which key blocks are listed, ``[B or 1, H or 1, query blocks, key blocks]``."""
    listed = _listed(count, index)
    found = np.zeros((*listed.shape[:-1], listed.shape[-1] + 1), np.bool_)
    np.put_along_axis(found, listed, True, -1)  # -1 is the last place, which is dropped
    result: BoolArray = found[..., :-1]
    return result


def _bounds(blocks: int, size: int, seq: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first and the last column of each block."""
    first = np.arange(blocks) * size
    return first, np.minimum(first + size, seq) - 1


def _extremes(ids: NDArray[Any], first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
    """The smallest and the largest number of each block, ``[B, blocks]``; a block behind the end has none."""
    parts = [ids[:, a : b + 1] if a <= b else ids[:, -1:] for a, b in zip(first, last, strict=True)]
    return np.stack([one.min(1) for one in parts], 1), np.stack([one.max(1) for one in parts], 1)
