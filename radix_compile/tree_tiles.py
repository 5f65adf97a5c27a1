"""Which keys each tile of nodes attends to: worked out once per call, on the host, for all layers.

The keys of a tile are the ancestors of its first node and the tile itself. Of the ancestors, those of all its nodes
that come in long stretches are listed as stretches, to be read without a mask and without an index; the rest one by
one. A path is a few stretches of nodes, one for each sequence that it has something new of, so all this is done on
stretches, not on nodes.

The other way round, for gradients of keys, the queries of a tile are its descendants: the nodes up to the largest
``end``. Those of a prefix that is everybody's are many more than others', and so are divided into parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from radix_compile.arrays import Int64
from radix_compile.prefix_plan import PrefixPlan

ROWS = 64
"""Nodes of a tile, as queries."""
KEYS = 64
"""And as keys that gradients are for."""
LEAST = 256
"""No tile is divided into parts of fewer queries,"""
PARTS = 128
"""nor all queries of all tiles into many more: each part of a divided tile takes memory. Heads multiply this."""
BLOCK = 64
"""Stretches are whole multiples of that many keys, and so are lists of single ones."""


@dataclass(frozen=True, slots=True, eq=False)
class TreeTiles:
    """The keys in front of each tile of `ROWS` nodes, but for those that are in the tile.

    Attributes:
        runs: int64 ``[R, 3]``, stretches of keys: the first node, the node behind the last, the depth of the first.
            All nodes of the tile see all of these keys, windows aside.
        run_starts: int64 ``[tiles + 1]``, those of tile ``t`` are ``runs[run_starts[t]:run_starts[t + 1]]``.
        keys: int64 ``[K]``, single keys, -1 where there is none.
        key_starts: int64 ``[tiles + 1]``, as `run_starts`.
        parts: int64 ``[P, 4]``, stretches of queries: the tile of keys they are descendants of, the first node, the
            node behind the last, and what number the part has among those of divided tiles, or -1.
        divided: int64 ``[D, 3]``, each tile that has several parts: the tile, and from which to which number they are.
    """

    runs: Int64
    run_starts: Int64
    keys: Int64
    key_starts: Int64
    parts: Int64
    divided: Int64

    @property
    def arrays(self) -> tuple[Int64, ...]:
        return self.runs, self.run_starts, self.keys, self.key_starts, self.parts, self.divided


def tree_tiles(plan: PrefixPlan, begin: Int64, end: Int64) -> TreeTiles:
    """The tiles of a plan, from its ``tree``; keys that are hidden from all, with an ``end`` of 0, are in no list."""
    first, shared, new = plan.first_nodes().tolist(), plan.shared.tolist(), _stretches(plan, begin, end)
    runs: list[tuple[int, int, int]] = []
    singles: list[tuple[int, int, int]] = []
    run_starts = [0]
    path: list[_Stretch] = []
    tile = 0
    for i, limit in enumerate(shared):
        _cut(path, limit)
        path += new[i]
        while tile < first[i + 1]:
            outside = tile + ROWS > plan.tree_nodes
            common = 0 if outside and len(plan.fold) > plan.tree_nodes else _common_depth(shared, first, i, tile + ROWS)
            for node, depth, length in path:
                ahead = min(length, tile - node)
                whole = max(min(ahead, common - depth), 0) // BLOCK * BLOCK
                if whole:
                    runs.append((node, node + whole, depth))
                if whole < ahead:
                    singles.append((len(run_starts) - 1, node + whole, ahead - whole))
            run_starts.append(len(runs))
            tile += ROWS
    count = -(-len(plan.fold) // ROWS)
    run_starts += [len(runs)] * (count + 1 - len(run_starts))
    return TreeTiles(
        np.array(runs, np.int64).reshape(-1, 3),
        np.array(run_starts),
        *_keys(np.array(singles, np.int64).reshape(-1, 3), count),
        *_parts(end),
    )


def _keys(singles: Int64, count: int) -> tuple[Int64, Int64]:
    """`keys` and `key_starts`, from stretches of them: the tile, the first key, and how many they are."""
    tile, first, length = singles.T
    wanted = np.bincount(tile, length, count).astype(np.int64)
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(-(-wanted // BLOCK) * BLOCK, out=starts[1:])
    keys = np.full(starts[-1], -1)
    behind = np.cumsum(length)
    place = np.arange(length.sum())  # if nothing were filled up
    keys[place + np.repeat(starts[tile] - (np.cumsum(wanted) - wanted)[tile], length)] = place + np.repeat(
        first - behind + length, length
    )
    return keys, starts


def _parts(end: Int64) -> tuple[Int64, Int64]:
    """`parts` and `divided`."""
    first = np.arange(0, len(end), KEYS)
    queries = np.maximum(np.maximum.reduceat(end, first) - first, 0)
    room = max(LEAST, int(queries.sum()) // PARTS // KEYS * KEYS)
    counts = np.maximum(-(-queries // room), 1)
    tile = np.repeat(np.arange(len(first)), counts)
    behind = np.cumsum(counts)
    low = first[tile] + (np.arange(len(tile)) - (behind - counts)[tile]) * room
    high = np.minimum(low + room, (first + queries)[tile])
    several = counts > 1
    shared = several[tile]
    slot = np.where(shared, np.cumsum(shared) - 1, -1)
    slots = np.cumsum(np.where(several, counts, 0))
    divided = np.stack([np.flatnonzero(several), (slots - counts)[several], slots[several]], 1)
    return np.stack([tile, low, high, slot], 1), divided


_Stretch = tuple[int, int, int]
"""Nodes of a path that follow each other: the first, its depth, and how many they are."""


def _stretches(plan: PrefixPlan, begin: Int64, end: Int64) -> list[list[_Stretch]]:
    """What each sequence has new, without hidden keys."""
    row, root = plan.fold[: plan.tree_nodes], begin[: plan.tree_nodes]
    seen = end[: plan.tree_nodes] > 0
    follows = np.zeros(plan.tree_nodes + 1, np.bool_)
    follows[1:-1] = (row[1:] == row[:-1] + 1) & (root[1:] == root[:-1]) & (seen[1:] == seen[:-1])
    edges = np.flatnonzero(~follows)
    kept = seen[edges[:-1]]
    starts, lengths = edges[:-1][kept], np.diff(edges)[kept]
    found: list[list[_Stretch]] = [[] for _ in plan.order]
    sequences = plan.first_nodes().searchsorted(starts, side="right") - 1
    depths = row[starts] - root[starts]
    for sequence, *stretch in zip(*(one.tolist() for one in (sequences, starts, depths, lengths)), strict=True):
        found[sequence].append(tuple(stretch))
    return found


def _cut(path: list[_Stretch], limit: int) -> None:
    """Leave what is less deep than ``limit``."""
    while path and path[-1][1] >= limit:
        path.pop()
    if path:
        node, depth, length = path[-1]
        path[-1] = node, depth, min(length, limit - depth)


def _common_depth(shared: list[int], first: list[int], sequence: int, stop: int) -> int:
    """How much of its path the sequence has in common with all that have something new before the node ``stop``."""
    common, i = 1 << 62, sequence + 1
    while i < len(shared) and first[i] < stop:
        common = min(common, shared[i])
        i += 1
    return common
