"""flex_attention: masks and scores are read off its functions, tables of blocks are looked at in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import radix_compile
from radix_compile.op_rules.flex import BlockTables, listed_blocks
from radix_compile.row_contents import RunsPlain
from tests.models import VOCABULARY, paths, shared_batch

B, S, H, E, BLOCK = 4, 48, 2, 8, 16
IDS = shared_batch(B, S, 35)
SLOPES = 0.5 ** torch.arange(1, H + 1)
PADDING = (torch.arange(S) < torch.tensor([S, 40, S, 37])[:, None]).long()
Mod = Callable[..., Tensor]


class Model(nn.Module):
    def __init__(self, score_mod: Mod | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = H * E
        self.embedding, self.qkv = nn.Embedding(VOCABULARY, width), nn.Linear(width, 3 * width)
        self.after = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.score_mod = score_mod

    def forward(self, ids: Tensor, mask: BlockMask) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (part.reshape(*ids.shape, H, E).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = flex_attention(q, k, v, score_mod=self.score_mod, block_mask=mask)
        return self.after(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[union-attr, no-any-return]


def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
    return query >= key


def blocks(mask_mod: Mod, batch: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, batch, None, S, S, device="cpu", BLOCK_SIZE=BLOCK)


def run(mask: BlockMask, score_mod: Mod | None = None, ids: Tensor = IDS) -> radix_compile.Stats:
    model = Model(score_mod).double()
    compiled = torch.compile(model, backend="radix", options={"inner": "aot_eager", "threshold": 1.0})
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, mask), model(ids, mask), rtol=1e-9, atol=1e-9)
    return radix_compile.stats()


FOLDS: dict[str, tuple[Mod, Mod | None]] = {
    "causal": (causal, None),
    "window": (lambda b, h, query, key: (query >= key) & (query - key < 20), None),
    "distances": (causal, lambda score, b, h, query, key: score + SLOPES[h] * (key - query)),
    "soft-cap": (causal, lambda score, b, h, query, key: 5 * torch.tanh(score / 5)),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    mask_mod, score_mod = FOLDS[name]
    stats = run(blocks(mask_mod), score_mod)
    assert stats.folded_calls == 1
    assert stats.compact_tokens == paths(IDS) < stats.tokens


def test_padding_is_part_of_the_key() -> None:
    mask = blocks(lambda b, h, query, key: (query >= key) & (PADDING[b, key] != 0), B)
    stats = run(mask)
    assert stats.folded_calls == 1
    assert stats.compact_tokens < stats.tokens


REFUSED: dict[str, tuple[Mod, Mod | None, str]] = {
    "bidirectional": (lambda b, h, query, key: query >= 0, None, "lets a token see later ones"),
    "one ahead": (lambda b, h, query, key: query + 1 >= key, None, "lets a token see later ones"),
    "other scores in every sequence": (
        causal,
        lambda score, b, h, query, key: score * (b + 1),
        "the score_mod a table lines up with the batch axis",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    mask_mod, score_mod, reason = REFUSED[name]
    mask = blocks(mask_mod)
    with pytest.warns(UserWarning, match="radix: nothing folds"):
        stats = run(mask, score_mod)
    assert stats.folded_calls == 0
    torch._dynamo.reset()
    with torch.no_grad(), pytest.warns(UserWarning, match="radix: nothing folds"):
        explanation = radix_compile.explain(Model(score_mod).double(), IDS, mask)
    assert any(reason in refusal.reason for refusal in explanation.refusals), explanation


def tables(count: Any, index: Any, full_count: Any, full_index: Any) -> list[Tensor]:
    return [torch.tensor(table, dtype=torch.int32) for table in (count, index, full_count, full_index)]


PLACES = BlockTables((0, 1), (2, 3), 2, 2)


def test_a_full_block_behind_its_queries_runs_plain() -> None:
    """Two blocks of two: the first query block lists the second key block as full."""
    good = tables([[[1, 1]]], [[[[0, 1], [1, 0]]]], [[[0, 1]]], [[[[0, 0], [0, 1]]]])
    assert listed_blocks(PLACES, good, (3, 4)) is None
    bad = tables([[[1, 1]]], [[[[0, 1], [1, 0]]]], [[[1, 0]]], [[[[1, 0], [0, 1]]]])
    with pytest.raises(RunsPlain, match="keys behind its queries"):
        listed_blocks(PLACES, bad, (3, 4))


def test_what_is_not_listed_does_not_count() -> None:
    count, index, full, full_index = tables(
        [[[1, 1]], [[1, 1]], [[1, 2]]],
        [[[[0, 1], [1, 0]]], [[[0, 0], [1, 1]]], [[[0, 1], [1, 0]]]],
        [[[0, 1]]] * 3,
        [[[[0, 0], [0, 1]]]] * 3,
    )
    numbers = listed_blocks(PLACES, [count, index, full, full_index], (3, 4))
    assert numbers is not None
    assert np.array_equal(numbers[0], numbers[1])
    assert np.array_equal(numbers[0] == numbers[2], [True, True, False, False])


def test_other_tables_tell_rows_apart() -> None:
    """A table that hides a block from one sequence alone: what that computes is its own."""
    mask = blocks(causal, B)
    counts = mask.full_kv_num_blocks
    assert counts is not None
    counts[0, :, 1:] = 0  # the first sequence sees nothing but its own block
    stats = run(mask)
    assert stats.folded_calls == 1
    alone, rest = S, paths(IDS[1:])
    assert stats.compact_tokens == alone + rest - BLOCK  # the first block of all is the same
