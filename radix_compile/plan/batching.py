"""Batches that keep shared prefixes together: only rows of one batch can be computed once for all of them.

Tools that embed or rerank often sort a data set by length, which scatters sequences of equal prefix over its batches.
In lexicographic order they are neighbours.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import Sampler

from radix_compile.plan.arrays import Array, describe

__all__ = ["SharedPrefixBatchSampler", "order_for_sharing", "sharing"]

Sequences: TypeAlias = Sequence[str] | Sequence[Sequence[int]] | Sequence[Array] | Sequence[torch.Tensor]
Key: TypeAlias = "str | array[int]"

EXPECTED = (
    "a sequence of strings, or of lists, tuples, 1-D arrays or 1-D tensors of integers (int64), not of both kinds"
)


def order_for_sharing(sequences: Sequences) -> list[int]:
    """The indices of `sequences` in lexicographic order: neighbours share the longest prefixes.

    Equal sequences keep their order. Lengths are mixed: padded batches of this order have more padding than those of
    a sort by length.

    Args:
        sequences: strings, or lists, tuples, 1-D arrays or 1-D tensors of integers; lengths may differ, also be 0.

    Raises:
        TypeError: `sequences` is anything else, has both kinds, or an integer that int64 does not hold.
    """
    return _order(_keys(sequences))


def sharing(sequences: Sequences, batches: Iterable[Iterable[int]]) -> float:
    """Distinct prefixes per token, counted in each batch by itself, without padding: lower is better, at most 1.0.

    What `PrefixPlan.compression` is for one batch, this is for all of them. Of strings the characters are counted.

    Args:
        sequences: as for `order_for_sharing`.
        batches: the indices of each batch, such as a `SharedPrefixBatchSampler`.

    Raises:
        TypeError: as `order_for_sharing`.
        IndexError: an index is out of range.
    """
    keys = _keys(sequences)
    tokens = shared = 0
    for batch in batches:
        rows = [_tokens(key) for key in sorted(keys[i] for i in batch)]
        tokens += sum(map(len, rows))
        shared += sum(_shared_with_next(rows))
    return (tokens - shared) / tokens if tokens else 1.0


class SharedPrefixBatchSampler(Sampler[list[int]]):
    """Each index of `sequences` once, in batches of neighbours in the order of `order_for_sharing`.

    For ``DataLoader(dataset, batch_sampler=...)``. A batch has `batch_size` indices, or up to a quarter fewer if that
    avoids cutting through sequences of a long common prefix, which both batches would compute; the last has what is
    left. As sequences are not sorted by length, there is more padding than in batches that are.

    Args:
        sequences: as for `order_for_sharing`, one per index of the data set.
        batch_size: number of indices in a batch, at most.
        shuffle: a new random order of the batches each time; what is in each batch stays the same.
        drop_last: only batches of exactly `batch_size`. What is left out, the end of the order, is the same each time.
        generator: for the random orders; None is torch's default one.

    Raises:
        TypeError: as `order_for_sharing`, or `batch_size` is not an int.
        ValueError: `batch_size` is below 1.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size must be an int, got {describe(batch_size)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.shuffle = shuffle
        self.generator = generator
        keys = _keys(sequences)
        self._order = _order(keys)
        if drop_last:
            self._bounds = [*range(0, len(keys) + 1, batch_size)]
        else:
            self._bounds = _bounds([keys[i] for i in self._order], batch_size)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[list[int]]:
        batches = [*pairwise(self._bounds)]
        places = torch.randperm(len(self), generator=self.generator).tolist() if self.shuffle else range(len(self))
        for place in places:
            start, end = batches[place]
            yield self._order[start:end]


def _bounds(keys: list[Key], batch_size: int) -> list[int]:
    """Where batches of the sorted `keys` start, and the end.

    A batch ends before it is full where, in its last quarter, neighbours share least, and at most half of what they
    share where it is full: short common prefixes are often chance, and smaller batches have their cost too.
    """
    bounds = [0]
    while bounds[-1] + batch_size < len(keys):
        end = bounds[-1] + batch_size
        last = [_tokens(key) for key in keys[end - batch_size // 4 - 1 : end + 1]]
        lost = _shared_with_next(last)[::-1]  # by how many indices the batch is short of full
        least = min(lost)
        bounds.append(end - lost.index(least) if 2 * least <= lost[0] else end)
    return [*bounds, len(keys)] if keys else bounds


def _order(keys: list[Key]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)


def _keys(sequences: Sequences) -> list[Key]:
    """Strings as they are, integers as arrays of int64: sorted quickly, without an object per token."""
    rows = _listed(sequences)
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise TypeError(f"sequences must be {EXPECTED}, got {describe(sequences)}")
    strings = len(rows) > 0 and isinstance(rows[0], str)
    return [_key(i, row, strings) for i, row in enumerate(rows)]


def _key(i: int, row: object, strings: bool) -> Key:
    if strings and isinstance(row, str):
        return row
    ids = _listed(row)
    if not strings and isinstance(ids, list | tuple):
        try:
            return array("q", ids)
        except (TypeError, OverflowError):
            pass  # what is in it is no integer, or too large a one
    raise TypeError(f"sequences must be {EXPECTED}, but sequences[{i}] is {describe(row)}")


def _listed(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value


def _tokens(key: Key) -> Array:
    # Lone surrogates are in texts that were decoded carelessly: they are characters like others here.
    return np.frombuffer(key.encode("utf-32-le", "surrogatepass"), "<u4") if isinstance(key, str) else np.asarray(key)


def _shared_with_next(rows: list[Array]) -> list[int]:
    """The length of the common prefix of each row and the next.

    In sorted rows the sum is the number of tokens whose path an earlier row has.
    """
    return [_common_prefix(row, following) for row, following in pairwise(rows)]


def _common_prefix(row: Array, other: Array) -> int:
    length = min(len(row), len(other))
    different = row[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
