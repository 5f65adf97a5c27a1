"""Batches that keep shared prefixes together: only rows of one batch can be computed once for all of them.

Tools that embed or rerank often sort a data set by length, which scatters sequences of equal prefix over its batches.
In lexicographic order they are neighbours, but lengths are mixed, and padding may be computed, too. So several orders
are compared by what would be computed in their batches.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import Sampler

from radix_compile.plan.arrays import Array, Int64, describe

__all__ = ["SharedPrefixBatchSampler", "order_for_sharing", "sharing"]

Sequences: TypeAlias = Sequence[str] | Sequence[Sequence[int]] | Sequence[Array] | Sequence[torch.Tensor]
Key: TypeAlias = "str | array[int]"

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of the prefixes that neighbours share, those at which sequences are tried as groups."""

EXPECTED = (
    "a sequence of strings, or of lists, tuples, 1-D arrays or 1-D tensors of integers (int64), not of both kinds"
)


def order_for_sharing(sequences: Sequences, groups: Sequence[Hashable] | None = None) -> list[int]:
    """The indices of `sequences` in lexicographic order: neighbours share the longest prefixes.

    With `groups`, such as the query or the document of each sequence, those of a group come one after another, groups
    of short sequences first: batches then have little padding. Equal sequences keep their order.

    Args:
        sequences: strings, or lists, tuples, 1-D arrays or 1-D tensors of integers; lengths may differ, also be 0.
        groups: a hashable value for each sequence, equal for those of one group.

    Raises:
        TypeError: `sequences` is anything else, has both kinds, or an integer that int64 does not hold.
        ValueError: `groups` has another length than `sequences`.
    """
    tree = _Sorted(_keys(sequences))
    order: list[int] = (tree.ranks if groups is None else tree.by_group(_numbered(groups, len(tree.ranks)))).tolist()
    return order


def sharing(sequences: Sequences, batches: Iterable[Iterable[int]], *, padding: bool = False) -> float:
    """Rows that are computed per token, counted in each batch by itself: lower is better.

    These are the distinct prefixes of the batch, so that the result is at most 1.0: padding that no result reads is not
    computed. With `padding`, what of it is computed where every row is a result, in batches padded on the right, is
    counted too. What `PrefixPlan.compression` is for one batch, this is for all of them. Of strings the characters are
    counted.

    Args:
        sequences: as for `order_for_sharing`.
        batches: the indices of each batch, such as a `SharedPrefixBatchSampler`.
        padding: also count padding.

    Raises:
        TypeError: as `order_for_sharing`.
        IndexError: an index is out of range.
    """
    tree = _Sorted(_keys(sequences))
    places = tree.places
    ranks = [places[np.fromiter(batch, np.int64)] for batch in batches]
    tokens = sum(int(tree.lengths[tree.ranks[batch]].sum()) for batch in ranks)
    return sum(tree.computed(batch, padding) for batch in ranks) / tokens if tokens else 1.0


class SharedPrefixBatchSampler(Sampler[list[int]]):
    """Each index of `sequences` once, in batches of which little has to be computed.

    For ``DataLoader(dataset, batch_sampler=...)``. Several orders are compared by the rows that would be computed in
    their batches, and the best is taken: lexicographic order, sequences that share long prefixes in groups that are
    sorted by length (the given `groups`, and those found at several lengths of prefixes), and sorted by length alone. A
    batch has `batch_size` indices, or up to a quarter fewer if that avoids cutting through sequences of a long common
    prefix, which both batches would compute; the last has what is left.

    Args:
        sequences: as for `order_for_sharing`, one per index of the data set.
        batch_size: number of indices in a batch, at most.
        groups: as for `order_for_sharing`.
        padding: compare by padding, too: it is computed where every row is a result. (Else it costs attention in
            full form, and memory.)
        shuffle: a new random order of the batches each time; what is in each batch stays the same.
        drop_last: only batches of exactly `batch_size`. What is left out, the end of the order, is the same each time.
        generator: for the random orders; None is torch's default one.

    Raises:
        TypeError: as `order_for_sharing`, or `batch_size` is not an int.
        ValueError: as `order_for_sharing`, or `batch_size` is below 1.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch_size: int,
        *,
        groups: Sequence[Hashable] | None = None,
        padding: bool = True,
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
        tree = _Sorted(_keys(sequences))
        numbers = None if groups is None else _numbered(groups, len(tree.lengths))
        self._batches = _best(tree, numbers, batch_size, padding, drop_last)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        places = torch.randperm(len(self), generator=self.generator).tolist() if self.shuffle else range(len(self))
        for place in places:
            yield list(self._batches[place])


def _best(tree: _Sorted, groups: Int64 | None, batch_size: int, padding: bool, drop_last: bool) -> list[list[int]]:
    """The batches of the order of which the least is computed."""
    count = len(tree.lengths)
    orders = [] if groups is None else [tree.by_group(groups)]
    orders += [tree.ranks, *(tree.by_group(tree.groups(least)) for least in tree.prefix_lengths())]
    even = [*range(0, count + 1, batch_size)] if drop_last else [*range(0, count, batch_size), count]
    candidates = [(order, even if drop_last else tree.bounds(order, batch_size)) for order in orders]
    candidates.append((np.lexsort((tree.places, tree.lengths)), even))
    least: tuple[int, list[list[int]]] | None = None
    for order, bounds in candidates:
        batches = [order[start:end] for start, end in pairwise(bounds)]
        computed = sum(tree.computed(tree.places[batch], padding) for batch in batches)
        if least is None or computed < least[0]:
            least = computed, [batch.tolist() for batch in batches]
    assert least is not None
    return [batch for batch in least[1] if batch]


class _Sorted:
    """Sequences in lexicographic order, and the prefix that each shares with the next.

    Attributes:
        lengths: int64 ``[N]``, by index.
        ranks: int64 ``[N]``, the indices in lexicographic order,
        places: int64 ``[N]``, and the place there of each.
        shared: int64 ``[N]``, the prefix that each sequence of the order shares with the next (0 for the last).
    """

    def __init__(self, keys: list[Key]) -> None:
        self.lengths = np.array([len(key) for key in keys], np.int64)
        self.ranks = np.array(_order(keys), np.int64)
        self.places = np.empty_like(self.ranks)
        self.places[self.ranks] = np.arange(len(keys))
        rows = [_tokens(keys[i]) for i in self.ranks]
        self.shared = np.array([*_shared_with_next(rows), 0][: len(keys)], np.int64)
        # The least of 1, 2, 4, ... entries of `shared` from each on: two of them cover any stretch.
        self._least = [self.shared]
        while len(self._least[-1]) > 1 << (len(self._least) - 1):
            step = 1 << (len(self._least) - 1)
            self._least.append(np.minimum(self._least[-1][:-step], self._least[-1][step:]))

    def computed(self, places: Int64, padding: bool) -> int:
        """The rows that are computed for the sequences at these places, as one batch."""
        if not len(places):
            return 0
        places = np.sort(places)
        lengths = self.lengths[self.ranks[places]]
        shared = self._common(places)
        nodes = int(lengths.sum() - shared.sum())
        if padding:
            is_first = np.append(True, (shared < lengths[1:]) | (shared < lengths[:-1]))  # of equal sequences
            nodes += int((lengths.max() - lengths)[is_first].sum())
        return nodes

    def _common(self, places: Int64) -> Int64:
        """The prefixes that neighbours of these places share. (A place may come again.)"""
        common: Int64 = self.lengths[self.ranks[places[:-1]]].copy()
        low, high = np.minimum(places[:-1], places[1:]), np.maximum(places[:-1], places[1:])
        levels = np.frexp(high - low)[1] - 1
        for level in np.unique(levels[levels >= 0]).tolist():
            at = np.flatnonzero(levels == level)
            least = self._least[level]
            common[at] = np.minimum(least[low[at]], least[high[at] - (1 << level)])
        return common

    def groups(self, least: int) -> Int64:
        """Numbers of groups ``[N]``, by index: neighbours of the order that share a prefix of at least this length."""
        numbers = np.zeros_like(self.ranks)
        numbers[self.ranks[1:]] = np.cumsum(self.shared[:-1] < least)
        return numbers

    def prefix_lengths(self) -> list[int]:
        """Lengths of shared prefixes by which groups may be told apart."""
        if len(self.shared) < 2:
            return []
        return sorted({max(int(length), 1) for length in np.quantile(self.shared[:-1], QUANTILES)})

    def by_group(self, groups: Int64) -> Int64:
        """The indices by group, groups of short sequences first, each in lexicographic order."""
        if not len(groups):
            return self.ranks
        longest = np.zeros(groups.max() + 1, np.int64)
        np.maximum.at(longest, groups, self.lengths)
        first = np.full(len(longest), len(groups))
        np.minimum.at(first, groups, self.places)
        order: Int64 = np.lexsort((self.places, first[groups], longest[groups]))
        return order

    def bounds(self, order: Int64, batch_size: int) -> list[int]:
        """Where batches of an order start, and the end.

        A batch ends before it is full where, in its last quarter, neighbours share least, and at most half of what they
        share where it is full: short common prefixes are often chance, and smaller batches have their cost too.
        """
        shared = self._common(self.places[order]).tolist()
        bounds = [0]
        while bounds[-1] + batch_size < len(order):
            end = bounds[-1] + batch_size
            lost = shared[end - batch_size // 4 - 1 : end][::-1]  # by how many indices the batch is short of full
            least = min(lost)
            bounds.append(end - lost.index(least) if 2 * least <= lost[0] else end)
        return [*bounds, len(order)] if len(order) else bounds


def _numbered(groups: Sequence[Hashable], count: int) -> Int64:
    if len(groups) != count:
        raise ValueError(f"groups must have one entry for each of the {count} sequences, not {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)


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
