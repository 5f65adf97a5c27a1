"""Tiles of nodes for attention in torch (``kernels.torch_attention``): worked out once per call, for all layers.

Each tile is one ordinary attention. Its queries are consecutive nodes, and its keys are the ancestors of the first of
them and the queries themselves: see ``kernels.tree_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from radix_compile.plan.arrays import Array, Float32, Int64
from radix_compile.plan.prefix_plan import PrefixPlan

MIN_TILE_NODES = 64
"""A tile has about this many nodes, or a quarter of the keys in front of it if that is more: a tile computes scores of
nodes that do not see each other, and hides them."""
NO_WINDOW = -1


@dataclass(frozen=True, slots=True, eq=False)
class TorchTiles:
    """The tiles of a plan, for each window of attention.

    Attributes:
        windows: int64 ``[W]``, the numbers of last columns that a node sees, or `NO_WINDOW`.
        window_starts: int64 ``[W + 1]``, the tiles of ``windows[w]`` are from ``window_starts[w]`` up to
            ``window_starts[w + 1]``.
        tiles: int64 ``[tiles, 6]``: the first query, the node behind the last, where keys start in ``tile_keys``, where
            they end, where the mask starts in ``tile_masks``, and 1 if a query sees no key.
        tile_keys: int64 ``[keys]``. A tile that has none there is plainly causal: its keys are its queries.
        tile_masks: float32, for each tile with keys ``[queries, keys]``: 0, or minus infinity where a key is hidden.
    """

    windows: Int64
    window_starts: Int64
    tiles: Int64
    tile_keys: Int64
    tile_masks: Float32

    def by_name(self) -> dict[str, Array]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def torch_tiles(plan: PrefixPlan, begin: Int64, end: Int64, windows: Sequence[int | None]) -> TorchTiles:
    """Return the tiles of a plan for these windows, given its ``tree``."""
    tiles: list[tuple[int, ...]] = []
    keys, masks, window_starts = [np.empty(0, np.int64)], [np.empty(0, np.float32)], [0]
    num_keys = num_pairs = 0
    for window in windows:
        for start, stop, own_keys, hidden in _tiles(plan, begin, end, window):
            fully_masked = bool(len(own_keys)) and bool(hidden.all(1).any())
            tiles.append((start, stop, num_keys, num_keys + len(own_keys), num_pairs, fully_masked))
            keys.append(own_keys)
            masks.append(np.where(hidden, np.float32("-inf"), np.float32(0)).ravel())
            num_keys, num_pairs = num_keys + len(own_keys), num_pairs + hidden.size
        window_starts.append(len(tiles))
    by_number = [NO_WINDOW if window is None else window for window in windows]
    listed = np.array(tiles, np.int64).reshape(-1, 6)
    return TorchTiles(np.array(by_number), np.array(window_starts), listed, np.concatenate(keys), np.concatenate(masks))


def _tiles(plan: PrefixPlan, begin: Int64, end: Int64, window: int | None) -> Iterator[tuple[int, int, Int64, Array]]:
    """The queries of each tile, from the first up to behind the last, its keys, and which are hidden, ``[m, keys]``.

    A tile that is plainly causal has no keys here.
    """
    depth = plan.fold - begin
    for start, stop in _stretches(plan.fold, begin, plain=window is None):
        path = plan.scatter[begin[start] : plan.fold[start]]
        path = path[(path >= 0) & (path < start)]
        parts = [(start, stop)]
        if not len(path) and window is None:
            if (end[start:stop] >= stop).all():
                yield start, stop, path, np.empty((stop - start, 0), np.bool_)
                continue
            parts = with_small_masks(start, stop)
        for first, last in parts:
            queries = np.arange(first, last)[:, None]
            keys = np.concatenate([path, np.arange(start, last)])
            if window is not None:
                keys = keys[(keys >= first) | (depth[keys] > depth[first:last].min() - window)]
            hidden = (queries >= end[keys]) | (queries < keys)
            if window is not None:
                hidden |= depth[queries] - depth[keys] >= window
            yield first, last, keys, hidden


def _stretches(rows: Int64, begin: Int64, plain: bool) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end. With ``plain``, nodes of one sequence with nothing in front of them are one tile."""
    depth = rows - begin
    follows = (rows[1:] == rows[:-1] + 1) & (begin[1:] == begin[:-1])  # the next row of the same sequence
    bounds = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(rows)]
    start = 0
    for first, stop in pairwise(bounds):
        limit = max(MIN_TILE_NODES, int(depth[start]) // 4)
        if first > start and (stop - start > limit or depth[first] + MIN_TILE_NODES < depth[start]):
            yield start, first
            start = first
            limit = max(MIN_TILE_NODES, int(depth[start]) // 4)
        if stop - start > limit:  # then it is one sequence
            parts = 1 if plain and depth[start] == 0 else (stop - start) // limit
            yield from _divided(start, stop, parts)
            start = stop
    if start < len(rows):
        yield start, len(rows)


def with_small_masks(start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of a tile with nothing in front of it: one mask of all its pairs would take memory."""
    return _divided(start, stop, max((stop - start) // MIN_TILE_NODES, 1))


def _divided(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """About equal parts: the first node of each, and the node behind its last."""
    return list(pairwise(np.linspace(start, stop, parts + 1).astype(int).tolist()))
