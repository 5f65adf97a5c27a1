"""padding="skip": hidden rows are left out of results that have every row, and come back as zeros there."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import radix_compile
from tests.models import build, compare, paths, shared_batch
from tests.tiers import slow_unless

SKIP = {"inner_backend": "aot_eager", "fold": "always", "strict": True, "padding": "skip"}


def padded(batch: int = 4, seq: int = 12, left: bool = False) -> tuple[Tensor, Tensor]:
    ids = shared_batch(batch, seq, shared=6)
    mask = torch.ones_like(ids)
    for row, count in enumerate([5, 3, 3, 0]):
        if left:
            mask[row, :count] = 0
        else:
            mask[row, seq - count :] = 0
    return ids.where(mask.bool(), 0), mask


@pytest.mark.parametrize(
    ("attention", "left"),
    slow_unless(
        lambda attention, left: left == (attention == "eager"), itertools.product(["sdpa", "eager"], [False, True])
    ),
)
def test_skipped_rows_are_zero_and_the_others_right(attention: str, left: bool) -> None:
    model = build("Qwen3", attention=attention)
    ids, mask = padded(left=left)
    compiled = torch.compile(model, backend="radix", options=SKIP)
    with torch.no_grad():
        ours = compiled(ids, attention_mask=mask, use_cache=False).logits
        plain = model(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], plain[real])
    assert left or plain[~real].abs().max() > 0
    assert ours[~real].abs().max() == 0
    stats = radix_compile.stats()
    assert stats.read_tokens == int(mask.sum())
    # The path of a real row includes the padding before it, so count the paths that end in a real row.
    assert stats.compact_tokens == real_paths(ids, mask)


def real_paths(ids: Tensor, mask: Tensor) -> int:
    """The number of distinct paths that end in a real row."""
    distinct = set()
    for b in range(ids.shape[0]):
        for s in range(ids.shape[1]):
            if mask[b, s]:
                distinct.add((tuple(ids[b, : s + 1].tolist()), tuple(mask[b, : s + 1].tolist())))
    return len(distinct)


def test_off_without_a_padding_mask() -> None:
    model = build("Qwen3")
    ids = shared_batch(4, 12, 8)
    with torch.no_grad():
        explanation = radix_compile.explain(model, ids, options={"padding": "skip"})
    assert any("no padding mask" in note for note in explanation.graphs[0].notes)
    assert explanation.compact_tokens == paths(ids)


def test_mean_over_padding_reads_it() -> None:
    model = build("Qwen3", head="Model")

    def pooled(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, use_cache=False).last_hidden_state.mean(1)

    ids, mask = padded()
    with torch.no_grad():
        ours: Any = torch.compile(pooled, backend="radix", options=SKIP)(ids, mask)
        torch.testing.assert_close(ours, pooled(ids, mask))
    assert radix_compile.stats().compact_tokens == paths(ids, mask)


@pytest.mark.parametrize("padding", slow_unless(lambda padding: padding == "exact", ["exact", "skip"]))
def test_a_sliding_window_blinds_padding_far_from_text(padding: str) -> None:
    """Right padding beyond the window is fully masked: its rows are nodes of their own."""
    model = build("Mistral", attention="eager", sliding_window=3)
    ids, mask = padded()
    ids[2], mask[2] = ids[1], mask[1]
    mask[1:3, 6:] = 0
    compiled = torch.compile(model, backend="radix", options={**SKIP, "padding": padding})
    if padding == "exact":
        compare(model, compiled, ids, attention_mask=mask, use_cache=False)
        count = mask.cumsum(1)
        fully_masked = count - torch.cat([torch.zeros(4, 3, dtype=torch.long), count[:, :-3]], 1) == 0
        assert fully_masked[1:3].any()
        assert radix_compile.stats().compact_tokens == paths(ids, mask, unique=fully_masked)
    else:
        with torch.no_grad():
            ours = compiled(ids, attention_mask=mask, use_cache=False).logits
            plain = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(ours[mask.bool()], plain[mask.bool()])
        assert radix_compile.stats().compact_tokens == real_paths(ids, mask)


def test_off_where_attention_weights_are_an_output() -> None:
    model = build("Qwen3", attention="eager")
    ids, mask = padded()
    with torch.no_grad():
        explanation = radix_compile.explain(
            model, ids, attention_mask=mask, use_cache=False, output_attentions=True, options={"padding": "skip"}
        )
    assert explanation.folded
    assert any('padding="skip" is off: all are returned' in note for note in explanation.graphs[0].notes)


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_a_mask_that_the_model_computes(padding: str) -> None:
    """A mask computed from compact rows has entries by column, which must not move, and no zeros for omitted rows."""
    torch.manual_seed(0)
    table, weight = torch.randn(11, 8), torch.randn(8, 8)
    table[:5, 0], table[5:, 0] = 1.0, -1.0  # visible tokens, and hidden ones
    ids = torch.tensor([[7, 3, 2, 1], [8, 9, 6, 3], [7, 3, 2, 4]])

    def program(ids: Tensor) -> Tensor:
        x = torch.nn.functional.embedding(ids, table)
        q = (x @ weight)[:, None]
        column = torch.arange(ids.shape[1])
        mask = (x[..., 0] > 0)[:, None, None, :] & (column[None, :] <= column[:, None])
        bias = torch.where(mask, 0.0, torch.finfo(x.dtype).min)
        return x + torch.nn.functional.scaled_dot_product_attention(q, q, q, bias)[:, 0] @ weight

    options = {"inner_backend": "eager", "fold": "always", "padding": padding}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = torch.compile(program, backend="radix", options=options)(ids)
    torch.testing.assert_close(ours, program(ids))
    assert radix_compile.stats().folded_calls == 1
