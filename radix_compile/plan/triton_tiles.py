"""Tiles of nodes for the Triton kernels of attention: worked out once per call, on the host, for all layers.

The keys of a tile are the ancestors of its first node and the tile itself. Of the ancestors, those of all its nodes
that come in long stretches are listed as stretches, to be read without a mask and without an index; the rest one by
one. A path is a few stretches of nodes, one for each sequence that it has something new of, so all this is done on
stretches, not on nodes.

The other way round, for gradients of keys, the queries of a tile are its descendants: the nodes up to the largest
``end``. Those of a prefix that is everybody's are many more than others', and so are divided into parts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from radix_compile.plan.arrays import Int64, short_of_power_of_two
from radix_compile.plan.prefix_plan import PrefixPlan

ROWS = 64
"""Nodes of a tile, as queries."""
KEYS = 64
"""And as keys that gradients are for."""
MIN_PART_KEYS = 256
"""No tile is divided into parts of fewer queries,"""
PARTS = 128
"""nor all queries of all tiles into many more: each part of a divided tile takes memory. Heads multiply this."""
BLOCK = 64
"""Stretches are whole multiples of that many keys, and so are lists of single ones."""


@dataclass(frozen=True, slots=True, eq=False)
class TritonTiles:
    """The keys in front of each tile of `ROWS` nodes, but for those that are in the tile.

    Attributes:
        stretches: int64 ``[R, 3]``, keys that follow each other: the first node, the node behind the last, the depth of
            the first. All nodes of the tile see all of these keys, windows aside.
        stretch_starts: int64 ``[tiles + 1]``, those of tile ``t`` are from ``stretch_starts[t]`` up to
            ``stretch_starts[t + 1]``.
        keys: int64 ``[K]``, single keys, -1 where there is none.
        key_starts: int64 ``[tiles + 1]``, as `stretch_starts`.
        parts: int64 ``[P, 4]``, stretches of queries: the tile of keys they are descendants of, the first node, the
            node behind the last, and what number the part has among those of divided tiles, or -1.
        divided: int64 ``[D, 3]``, each tile that has several parts: the tile, and from which to which number they are.
    """

    stretches: Int64
    stretch_starts: Int64
    keys: Int64
    key_starts: Int64
    parts: Int64
    divided: Int64

    def by_name(self) -> dict[str, Int64]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def filled_up(self) -> TritonTiles:
        """With entries that do nothing behind each list, up to a power of two, so that calls differ in size less often.

        No tile reads the further keys. The further parts have no queries, and numbers of their own; with the further
        tiles of `divided` they belong to a tile behind the last.
        """
        missing = short_of_power_of_two(len(self.parts))
        slots = self.divided[:, 2].max(initial=0) + np.arange(missing)
        nothing = len(self.stretch_starts) - 1, 0, 0
        parts = np.column_stack([np.full((missing, 3), nothing), slots])
        return replace(
            self,
            stretches=_filled_up(self.stretches, 0),
            keys=_filled_up(self.keys, -1),
            parts=np.concatenate([self.parts, parts]),
            divided=_filled_up(self.divided, nothing),
        )


def _filled_up(array: Int64, filler: int | tuple[int, ...]) -> Int64:
    more = np.full((short_of_power_of_two(len(array)), *array.shape[1:]), filler)
    return np.concatenate([array, more])


def triton_tiles(plan: PrefixPlan, begin: Int64, end: Int64) -> TritonTiles:
    """The tiles of a plan, from its ``tree``; keys that are hidden from all, with an ``end`` of 0, are in no list."""
    count = -(-len(plan.fold) // ROWS)
    first = np.arange(0, plan.tree_nodes, ROWS)  # node of each tile that has any in the tree
    sequence = plan.first_nodes.searchsorted(first, side="right") - 1
    path, paths = _paths(plan, begin, end, sequence)
    # Each stretch of the path of each tile, as far as it is in front of the tile.
    lengths = np.diff(paths)[sequence]
    tile = np.arange(len(first)).repeat(lengths)
    of_tile = np.arange(len(tile)) - (lengths.cumsum() - lengths).repeat(lengths)
    node, depth, length = path[paths[sequence].repeat(lengths) + of_tile].T
    ahead = np.clip(first[tile] - node, 0, length)
    whole = np.clip(_common_depths(plan, first, sequence)[tile] - depth, 0, ahead) // BLOCK * BLOCK
    in_runs, alone = whole > 0, whole < ahead
    stretches = np.stack([node, node + whole, depth], 1)[in_runs]
    keys = _keys(tile[alone], (node + whole)[alone], (ahead - whole)[alone], count)
    return TritonTiles(stretches, _starts(np.bincount(tile[in_runs], minlength=count)), *keys, *_parts(end))


def _starts(counts: Int64) -> Int64:
    """Where each one starts that has so many, and where the last one ends."""
    return np.append(0, counts.cumsum())


def _keys(tile: Int64, first: Int64, length: Int64, count: int) -> tuple[Int64, Int64]:
    """`keys` and `key_starts`, from stretches of keys: the tile, the first key, and how many they are."""
    wanted = np.bincount(tile, length, count).astype(np.int64)
    starts = _starts(-(-wanted // BLOCK) * BLOCK)
    keys = np.full(starts[-1], -1)
    place = np.arange(length.sum())  # if nothing were filled up
    filled_up = starts[:-1] - (wanted.cumsum() - wanted)
    keys[place + filled_up[tile].repeat(length)] = place + (first - length.cumsum() + length).repeat(length)
    return keys, starts


def _parts(end: Int64) -> tuple[Int64, Int64]:
    """`parts` and `divided`."""
    first = np.arange(0, len(end), KEYS)
    queries = np.maximum(np.maximum.reduceat(end, first) - first, 0)
    room = max(MIN_PART_KEYS, int(queries.sum()) // PARTS // KEYS * KEYS)
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


def _paths(plan: PrefixPlan, begin: Int64, end: Int64, wanted: Int64) -> tuple[Int64, Int64]:
    """The paths of sequences in stretches of nodes that follow each other, without hidden keys.

    Each stretch is ``[3]``: the first node, its depth, and how many they are. Those of sequence ``i`` are
    ``result[starts[i]:starts[i + 1]]``, of which there are none if it is not ``wanted`` (ascending, may repeat).
    """
    row, root = plan.fold[: plan.tree_nodes], begin[: plan.tree_nodes]
    seen = end[: plan.tree_nodes] > 0
    follows = np.zeros(plan.tree_nodes + 1, np.bool_)
    follows[1:-1] = (row[1:] == row[:-1] + 1) & (root[1:] == root[:-1]) & (seen[1:] == seen[:-1])
    edges = np.flatnonzero(~follows)
    kept = seen[edges[:-1]]
    starts, lengths = edges[:-1][kept], np.diff(edges)[kept]
    stretches = list(zip(starts.tolist(), (row[starts] - root[starts]).tolist(), lengths.tolist(), strict=True))
    new = starts.searchsorted(plan.first_nodes).tolist()
    is_wanted = np.bincount(wanted, minlength=len(plan.order)).astype(np.bool_).tolist()
    found: list[tuple[int, int, int]] = []
    ends = [0]
    path: list[tuple[int, int, int]] = []
    for i, shared in enumerate(plan.shared.tolist()):
        while path and path[-1][1] >= shared:
            path.pop()
        if path:
            node, depth, length = path[-1]
            path[-1] = node, depth, min(length, shared - depth)
        for stretch in stretches[new[i] : new[i + 1]]:
            node, depth, length = path[-1] if path else (0, 0, 0)
            if (node + length, depth + length) == stretch[:2]:  # it goes on where the sequence before it ended
                path[-1:] = [(node, depth, length + stretch[2])]
            else:
                path.append(stretch)
        if is_wanted[i]:
            found += path
        ends.append(len(found))
    return np.array(found, np.int64).reshape(-1, 3), np.array(ends)


def _common_depths(plan: PrefixPlan, first: Int64, sequence: Int64) -> Int64:
    """How much of its path the first node of each tile has in common with all other nodes of the tile."""
    stop = first + ROWS
    # The sequences that have something new in the tile, behind that of its first node.
    low, high = sequence + 1, plan.first_nodes[:-1].searchsorted(stop)
    shared = np.append(plan.shared, 0)
    common = np.minimum.reduceat(shared, np.stack([low, high], 1).ravel())[::2] if len(first) else low
    common = np.where(low < high, common, len(plan.scatter))
    beside_the_tree = (stop > plan.tree_nodes) & (plan.tree_nodes < len(plan.fold))  # nodes with no path
    return np.where(beside_the_tree, 0, common)
