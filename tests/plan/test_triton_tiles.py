"""The keys of tiles against the tree: each ancestor in one list, and in the other one what nobody hides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radix_compile.plan import triton_tiles as triton_tiles_module
from radix_compile.plan.arrays import Int64
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.plan.triton_tiles import BLOCK, KEYS, PARTS, ROWS, triton_tiles
from tests.kernels.test_tree_attention import BATCHES, few, prefixes

IDS = {
    **BATCHES,
    "long prefix": prefixes(6, 700, (600, 6)),
    "long levels": prefixes(8, 900, (300, 8), (700, 2)),
    "one-row suffixes": prefixes(400, 200, (199, 400)),
    "wide": few(800, 6),
}


VARIANTS = ["", "hidden", "fully masked", "padded", "needed"]


def planned(ids: torch.Tensor, variant: str) -> tuple[PrefixPlan, Int64, Int64]:
    """The plan of a batch and its ``tree``, in one of `VARIANTS`."""
    batch, seq = ids.shape
    shown = np.ones((batch, seq), np.bool_)
    if variant == "hidden":
        shown = (np.arange(seq) < seq - np.arange(batch)[:, None] % 3) & (np.arange(seq) != seq // 3)
    if variant in ("fully masked", "needed"):
        shown = np.arange(seq) >= np.arange(batch)[:, None] % 2
    options = {"unique": ~shown} if variant == "fully masked" else {"needed": shown} if variant == "needed" else {}
    plan = PrefixPlan.from_rows(ids, shown, **options, pad_multiple_of=64 if variant == "padded" else None)
    return plan, *plan.tree(shown.ravel())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_each_ancestor_is_listed_once(ids: torch.Tensor, variant: str) -> None:
    plan, begin, end = planned(ids, variant)
    tiles = triton_tiles(plan, begin, end)
    count = -(-len(plan.fold) // ROWS)
    assert len(tiles.stretch_starts) == len(tiles.key_starts) == count + 1
    assert (tiles.key_starts % BLOCK == 0).all()
    depth = plan.fold - begin
    for tile in range(count):
        start, stop = tile * ROWS, min((tile + 1) * ROWS, len(plan.fold))
        found = tiles.keys[tiles.key_starts[tile] : tiles.key_starts[tile + 1]].tolist()
        keys = [key for key in found if key >= 0]
        for first, last, at in tiles.stretches[tiles.stretch_starts[tile] : tiles.stretch_starts[tile + 1]]:
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
    tiles = triton_tiles(plan, *plan.tree())
    inside = np.diff(tiles.stretches[:, :2]).sum()
    assert inside > 0.9 * (inside + (tiles.keys >= 0).sum())


def test_what_goes_on_where_another_sequence_ended_is_one_stretch_with_it() -> None:
    """A conversation after each of its turns: what the longer ones share is new in several of the shorter ones."""
    seen = np.arange(600) < 100 * np.arange(1, 7)[:, None]
    plan = PrefixPlan.from_rows(np.broadcast_to(np.arange(600), seen.shape), seen, needed=seen)
    tiles = triton_tiles(plan, *plan.tree())
    assert tiles.stretches.tolist() == [[0, stop, 0] for stop in range(ROWS, 600, ROWS)]
    assert len(tiles.keys) == 0


@pytest.mark.parametrize("least", [64, 256])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_the_descendants_of_each_tile_are_in_its_parts(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, least: int
) -> None:
    monkeypatch.setattr(triton_tiles_module, "MIN_PART_KEYS", least)
    plan = PrefixPlan.from_rows(ids)
    begin, end = plan.tree()
    tiles = triton_tiles(plan, begin, end)
    slots = dict.fromkeys(range(tiles.parts[:, 3].max() + 1))
    for tile, first in enumerate(range(0, len(end), KEYS)):
        mine = tiles.parts[tiles.parts[:, 0] == tile]
        queries = [query for _, low, high, _ in mine for query in range(low, high)]
        assert queries == list(range(first, end[first : first + KEYS].max()))
        assert ((mine[:, 1] - first) % KEYS == 0).all()
        if len(mine) > 1:
            assert (mine[:-1, 2] - mine[:-1, 1] >= least).all()
            (low, high), *more = tiles.divided[tiles.divided[:, 0] == tile, 1:].tolist()
            assert not more
            assert mine[:, 3].tolist() == list(range(low, high))
            for slot in mine[:, 3].tolist():
                del slots[slot]
        else:
            assert mine[0, 3] == -1
    assert not slots


def test_parts_take_limited_memory() -> None:
    """However long the batch: of a tree of 50,000 nodes the parts of divided tiles are about as many as `PARTS`."""
    plan = PrefixPlan.from_rows(prefixes(100, 1000, (500, 100)))
    parts = triton_tiles(plan, *plan.tree()).parts
    assert 8 <= (parts[:, 3] >= 0).sum() <= PARTS + 8


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_lists_are_filled_up_to_powers_of_two(ids: torch.Tensor) -> None:
    plan = PrefixPlan.from_rows(ids)
    begin, end = plan.tree()
    tiles = triton_tiles(plan, begin, end)
    longer = tiles.filled_up()
    for name in ("stretches", "keys", "parts", "divided"):
        short, long = getattr(tiles, name), getattr(longer, name)
        assert long.dtype == np.int64
        assert len(short) <= len(long) == (1 << (len(short) - 1).bit_length() if len(short) else 0)
        np.testing.assert_array_equal(long[: len(short)], short)
    assert longer.stretch_starts is tiles.stretch_starts
    assert longer.key_starts is tiles.key_starts
    assert (longer.keys[len(tiles.keys) :] == -1).all()
    further = longer.parts[len(tiles.parts) :]
    assert (further[:, 1] == further[:, 2]).all()
    taken = tiles.parts[:, 3].max() + 1
    assert further[:, 3].tolist() == list(range(taken, taken + len(further)))
    behind = len(tiles.stretch_starts) - 1
    assert (further[:, 0] == behind).all()
    assert (longer.divided[len(tiles.divided) :] == [behind, 0, 0]).all()
