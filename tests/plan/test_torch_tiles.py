"""The tiles for attention in torch against the tree: every node in one tile, with each key that it sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.plan.torch_tiles import MIN_TILE_NODES, NO_WINDOW, torch_tiles
from tests.plan.test_triton_tiles import IDS, VARIANTS, planned

WINDOWS = (None, 1, 5, 100)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_every_node_is_in_one_tile_with_the_keys_that_it_sees(ids: torch.Tensor, variant: str) -> None:
    plan, begin, end = planned(ids, variant)
    tiles = torch_tiles(plan, begin, end, WINDOWS)
    depth, node = plan.fold - begin, np.arange(len(plan.fold))
    assert tiles.windows.tolist() == [NO_WINDOW, 1, 5, 100]
    for place, window in enumerate(WINDOWS):
        listed = tiles.tiles[tiles.window_starts[place] : tiles.window_starts[place + 1]]
        assert [0, *listed[:, 1]] == [*listed[:, 0], len(node)]
        for start, stop, first, last, pair, is_fully_masked in listed.tolist():
            queries, keys = node[start:stop, None], tiles.tile_keys[first:last]
            visible = (node <= queries) & (queries < end)
            if window is not None:
                visible &= depth[queries] - depth < window
            if first == last:  # plain causal attention
                assert (visible == (node <= queries) & (node >= start)).all()
                continue
            mask = tiles.tile_masks[pair : pair + queries.size * keys.size].reshape(-1, keys.size)
            seen = np.zeros_like(visible)
            seen[:, keys] = mask == 0
            assert (seen == visible).all()
            assert is_fully_masked == (~visible).all(1).any()
            assert set(np.unique(mask)) <= {0, -np.inf}


def test_one_sequence_has_no_mask_and_with_hidden_keys_not_one_of_all_pairs() -> None:
    plan = PrefixPlan.from_rows(torch.arange(1000)[None])
    whole = torch_tiles(plan, *plan.tree(), [None])
    assert whole.tiles.tolist() == [[0, 1000, 0, 0, 0, 0]]
    assert not len(whole.tile_masks)
    hidden = torch_tiles(plan, *plan.tree(np.arange(1000) > 3), [None])
    assert len(hidden.tiles) == 1000 // MIN_TILE_NODES
    assert len(hidden.tile_masks) < 0.6 * 1000 * 1000
    narrow = torch_tiles(plan, *plan.tree(), [10])
    assert len(narrow.tile_masks) < 1000 * (2 * MIN_TILE_NODES + 10)
