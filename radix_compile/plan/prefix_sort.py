"""The lexicographic order of sequences, and what neighbours in it share.

Sequences are sorted and compared whole, as bytes, and not token by token.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from radix_compile.plan.arrays import Array, Int64

# Sorted sequences are compared in blocks of about this many bytes.
BLOCK_BYTES = 1 << 18


def sort_equal_lengths(columns: list[Array]) -> tuple[Int64, Int64]:
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


def sort_ragged(columns: list[Array], bounds: list[int]) -> tuple[Int64, Int64]:
    """As `sort_equal_lengths` for packed columns ``[T]``; memory is O(T) however the lengths differ."""
    keys = columns[0]
    if len(columns) > 1:
        keys = np.stack([c.astype(np.int64) for c in columns], axis=-1)  # uint64 wraps around, as above
    data, width = keys.tobytes(), keys.nbytes // max(len(keys), 1)
    sequences = [data[start * width : end * width] for start, end in pairwise(bounds)]
    order = np.array(sorted(range(len(sequences)), key=sequences.__getitem__))
    edges = np.array(bounds)
    start, length = edges[:-1][order], np.diff(edges)[order]
    # Neighbours are compared over the length of the shorter, all of them in one long array.
    span = np.minimum(length[1:], length[:-1])
    end = span.cumsum()
    begin = end - span
    at = np.arange(end[-1]) if len(end) else np.arange(0)
    differs = keys[at + (start[1:] - begin).repeat(span)] != keys[at + (start[:-1] - begin).repeat(span)]
    differs = differs if differs.ndim == 1 else differs.any(1)
    found = np.append(differs.nonzero()[0], len(at))
    shared = np.zeros_like(length)
    np.minimum(found[found.searchsorted(begin)] - begin, span, out=shared[1:])
    return order, shared
