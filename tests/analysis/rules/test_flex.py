"""flex_attention: masks and scores are read off its functions, tables of blocks are looked at in every call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

import radix_compile
from radix_compile.ir.errors import RunsPlain
from radix_compile.runtime.block_tables import BlockTables, agree_with_mask, listed_blocks
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
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, mask), model(ids, mask), rtol=1e-9, atol=1e-9)
    return radix_compile.stats()


FOLDS: dict[str, tuple[Mod, Mod | None]] = {
    "causal": (causal, None),
    "window": (lambda b, h, query, key: (query >= key) & (query - key < 20), None),
    "distances": (causal, lambda score, b, h, query, key: score + SLOPES[h] * (key - query)),
    "soft-cap": (causal, lambda score, b, h, query, key: 5 * torch.tanh(score / 5)),
    "scaled": (causal, lambda score, b, h, query, key: score * 0.5),
    "all of it": (
        lambda b, h, query, key: (query >= key) & (query - key < 9),
        lambda score, b, h, query, key: 5 * torch.tanh(score / 5) + SLOPES[h] * (key - query),
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    mask_mod, score_mod = FOLDS[name]
    stats = run(blocks(mask_mod), score_mod)
    assert stats.folded_calls == 1
    assert stats.compact_tokens == paths(IDS) < stats.tokens
    assert stats.tree_pairs < stats.pairs


def test_padding_is_part_of_the_key() -> None:
    mask = blocks(lambda b, h, query, key: (query >= key) & (PADDING[b, key] != 0), B)
    stats = run(mask)
    assert stats.folded_calls == 1
    assert stats.compact_tokens < stats.tokens
    assert stats.tree_pairs


@pytest.mark.parametrize(
    ("mask_mod", "score_mod", "reason"),
    [
        (lambda b, h, q, k: (q >= k) & ((q - k < 5) | (k < 3)), None, "by one of several conditions"),
        (causal, lambda score, b, h, q, k: 5 * torch.tanh((score + SLOPES[h] * (k - q)) / 5), "under a soft cap"),
        (causal, lambda score, b, h, q, k: torch.where(q - k < 9, score, -torch.inf), "may show what its mask hides"),
    ],
)
def test_in_full_form_with_a_reason(mask_mod: Mod, score_mod: Mod | None, reason: str) -> None:
    mask = blocks(mask_mod)
    with torch.no_grad():
        explanation = radix_compile.explain(Model(score_mod).double(), IDS, mask)
    assert reason in explanation.graphs[0].attentions[0].full_form
    torch._dynamo.reset()
    assert run(mask, score_mod).folded_calls == 1


def test_heads_of_a_group_and_sizes_that_change() -> None:
    class Grouped(Model):
        def forward(self, ids: Tensor, mask: BlockMask) -> Tensor:
            x = self.embedding(ids)
            q, k, v = (part.reshape(*ids.shape, H, E).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            mixed = flex_attention(q, k[:, :1], v[:, :1], self.score_mod, mask, enable_gqa=True)
            return self.after(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[union-attr, no-any-return]

    model = Grouped().double()
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    for batch in (4, 6, 9):
        ids = shared_batch(batch, S, 35)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, blocks(causal)), model(ids, blocks(causal)), rtol=1e-9, atol=1e-9)
    assert radix_compile.stats().folded_calls == 3
    assert radix_compile.stats().tree_pairs
    assert radix_compile.stats().graphs == 2


def test_blocks_of_a_size_that_is_a_symbol_are_refused() -> None:
    model = Model().double()
    options = {"inner_backend": "aot_eager", "fold": "always"}
    compiled = torch.compile(model, backend="radix", options=options, dynamic=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="without dynamic=True"):
        torch.testing.assert_close(compiled(IDS, blocks(causal)), model(IDS, blocks(causal)), rtol=1e-9, atol=1e-9)


def test_a_table_that_hides_more_than_the_mask_runs_off_the_tree() -> None:
    mask = blocks(causal)
    counts = mask.full_kv_num_blocks
    assert counts is not None
    counts[..., 1:] = 0
    stats = run(mask)
    assert stats.folded_calls == 1
    assert stats.tree_pairs == 0


DOCUMENTS = torch.tensor([[0] * 20 + [1] * 28, [0] * S, [0] * 5 + [1] * 27 + [2] * 16, [0] * 32 + [1] * 16])
MASKS: dict[str, tuple[Mod, dict[str, Any]]] = {
    "causal": (causal, {}),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < 10), {"window": 10}),
    "padding": (lambda b, h, q, k: (q >= k) & (PADDING[b, k] != 0), {"shown": PADDING.numpy() != 0}),
    "documents": (
        lambda b, h, q, k: (q >= k) & (DOCUMENTS[b, q] == DOCUMENTS[b, k]),
        {"sequence_ids": DOCUMENTS.numpy()},
    ),
}


def arguments(mask: BlockMask) -> list[Tensor | None]:
    return [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]


@pytest.mark.parametrize("size", [16, 10])
@pytest.mark.parametrize("name", MASKS)
def test_tables_made_from_a_mask_leave_it_alone(name: str, size: int) -> None:
    mask_mod, says = MASKS[name]
    mask = create_block_mask(mask_mod, B, None, S, S, device="cpu", BLOCK_SIZE=size)
    says = {"shown": np.ones((B, S), np.bool_), **says}
    tables = BlockTables((0, 1), (2, 3), size, size)
    assert agree_with_mask(tables, arguments(mask), **says)
    noticed = 0
    for other_mod, different in MASKS.values():
        says = {"shown": np.ones((B, S), np.bool_), **different}
        expected = create_mask(other_mod, B, 1, S, S, device="cpu")
        found = (in_blocks(mask.kv_num_blocks, mask.kv_indices, size) & expected) | in_blocks(
            mask.full_kv_num_blocks, mask.full_kv_indices, size
        )
        if agree_with_mask(tables, arguments(mask), **says):
            assert torch.equal(found, expected)
        else:
            noticed += 1
    assert noticed


def in_blocks(count: Tensor | None, index: Tensor | None, size: int) -> Tensor:
    """The pairs in listed blocks."""
    assert count is not None
    assert index is not None
    pairs = torch.zeros(B, 1, S, S, dtype=torch.bool)
    for b, i in itertools.product(range(B), range(count.shape[2])):
        for j in index[b, 0, i, : count[b, 0, i]].tolist():
            pairs[b, 0, i * size : (i + 1) * size, j * size : (j + 1) * size] = True
    return pairs


@pytest.mark.parametrize("change", ["one more in full", "one less in part", "one less in full", "twice", "in both"])
def test_a_table_that_was_changed_is_noticed(change: str) -> None:
    tables, shown = BlockTables((0, 1), (2, 3), BLOCK, BLOCK), np.ones((B, S), np.bool_)
    given = arguments(blocks(causal))
    assert agree_with_mask(tables, given, shown)
    count, index, full, full_index = (one.clone() for one in given if one is not None)
    assert count.flatten().tolist() == [1, 1, 1]
    assert full.flatten().tolist() == [0, 1, 2]
    if change == "one more in full":  # the block on the diagonal, of which half is hidden
        count[..., 0], full[..., 0], full_index[..., 0, 0] = 0, 1, 0
    elif change == "one less in part":
        count[..., 1] = 0
    elif change == "one less in full":
        full[..., 2] = 1
    elif change == "twice":
        full_index[..., 2, 1] = full_index[..., 2, 0]
    else:
        full[..., 1], full_index[..., 1, 1] = 2, 1
    assert not agree_with_mask(tables, [count, index, full, full_index], shown)


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
    assert (stats.folded_calls, stats.tree_pairs) == (1, 0)
    alone, rest = S, paths(IDS[1:])
    assert stats.compact_tokens == alone + rest - BLOCK  # the first block of all is the same
