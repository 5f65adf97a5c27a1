"""The keys of tiles against the tree: each ancestor in one list, and in the other one what nobody hides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radix_compile.prefix_plan import PrefixPlan
from radix_compile.tree_tiles import BLOCK, ROWS, tree_tiles
from tests.kernels.test_tree_attention import BATCHES, few, prefixes

IDS = {
    **BATCHES,
    "long prefix": prefixes(6, 700, (600, 6)),
    "long levels": prefixes(8, 900, (300, 8), (700, 2)),
    "one-row suffixes": prefixes(400, 200, (199, 400)),
    "wide": few(800, 6),
}


@pytest.mark.parametrize("variant", ["", "hidden", "blind", "padded", "skip"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_each_ancestor_is_listed_once(ids: torch.Tensor, variant: str) -> None:
    batch, seq = ids.shape
    shown = np.ones((batch, seq), np.bool_)
    if variant == "hidden":
        shown = (np.arange(seq) < seq - np.arange(batch)[:, None] % 3) & (np.arange(seq) != seq // 3)
    if variant in ("blind", "skip"):
        shown = np.arange(seq) >= np.arange(batch)[:, None] % 2
    options = {"unique": ~shown} if variant == "blind" else {"skip": ~shown} if variant == "skip" else {}
    plan = PrefixPlan.from_rows(ids, shown, **options, pad_multiple_of=64 if variant == "padded" else None)
    begin, end = plan.tree(shown.ravel())
    tiles = tree_tiles(plan, begin, end)
    count = -(-len(plan.fold) // ROWS)
    assert len(tiles.run_starts) == len(tiles.key_starts) == count + 1
    assert (tiles.key_starts % BLOCK == 0).all()
    depth = plan.fold - begin
    for tile in range(count):
        start, stop = tile * ROWS, min((tile + 1) * ROWS, len(plan.fold))
        found = tiles.keys[tiles.key_starts[tile] : tiles.key_starts[tile + 1]].tolist()
        keys = [key for key in found if key >= 0]
        for first, last, at in tiles.runs[tiles.run_starts[tile] : tiles.run_starts[tile + 1]]:
            assert (last - first) % BLOCK == 0
            assert depth[first:last].tolist() == list(range(at, at + last - first))
            assert (end[first:last] >= stop).all()
            assert stop <= plan.tree_nodes
            keys += range(first, last)
        nodes = np.arange(start)
        needed = np.flatnonzero((nodes <= start) & (end[:start] > start)) if start < plan.tree_nodes else []
        assert sorted(keys) == list(needed)


def test_most_of_a_long_prefix_is_read_in_stretches() -> None:
    plan = PrefixPlan.from_rows(prefixes(6, 2303, (2047, 6)))
    tiles = tree_tiles(plan, *plan.tree())
    inside = np.diff(tiles.runs[:, :2]).sum()
    assert inside > 0.9 * (inside + (tiles.keys >= 0).sum())
