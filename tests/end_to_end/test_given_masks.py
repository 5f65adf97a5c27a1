"""4-D masks from the caller: checked by value in every call, and part of the row key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import radix_compile
from radix_compile.ir.errors import RunsPlain
from radix_compile.runtime.checks import rows_seen
from tests.models import assert_as_exact, build, in_float64, shared_batch
from tests.tiers import slow_unless

BATCH, SEQ, SHARED = 4, 12, 8
IDS = shared_batch(BATCH, SEQ, SHARED)
LOWEST = torch.finfo(torch.float32).min


def causal(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    return torch.ones(seq, seq, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)


def as_floats(visible: Tensor, floor: float = LOWEST) -> Tensor:
    return torch.where(visible, 0.0, floor)


def run(attention: str, mask: Tensor, ids: Tensor = IDS, **options: Any) -> radix_compile.Stats:
    """The counts of one call, after a comparison with the plain model."""
    model = build("Qwen3", attention=attention)
    settings = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    compiled = torch.compile(model, backend="radix", options=settings, **options)
    radix_compile.reset_stats()
    compare(model, compiled, ids, mask)
    return radix_compile.stats()


def compare(model: Any, compiled: Callable[..., Any], ids: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        ours = compiled(ids, attention_mask=mask, use_cache=False).logits
        plain = model(ids, attention_mask=mask, use_cache=False).logits
        exact_mask = mask.double() if mask.is_floating_point() else mask
        exact = in_float64(model)(ids, attention_mask=exact_mask, use_cache=False).logits
    assert_as_exact(ours, plain, exact.double())


@pytest.mark.parametrize(
    ("attention", "floats", "one_for_all"),
    slow_unless(
        lambda attention, floats, one_for_all: floats == one_for_all or attention == "eager",
        [
            (attention, floats, one_for_all)
            for attention, floats in (("sdpa", False), ("sdpa", True), ("eager", True))
            for one_for_all in (False, True)
        ],
    ),
)
def test_a_causal_mask_folds(attention: str, floats: bool, one_for_all: bool) -> None:
    mask = as_floats(causal()) if floats else causal()
    stats = run(attention, mask[:1] if one_for_all else mask)
    assert stats.folded_calls == 1
    assert stats.compact_tokens == SHARED + BATCH * (SEQ - SHARED)


def test_rows_that_see_something_else_are_not_shared() -> None:
    """The second sequence hides a key of the prefix from row 5 on, so its rows share nothing from there on."""
    mask = causal()
    mask[1, :, 5:, 2] = False
    stats = run("sdpa", mask)
    assert stats.folded_calls == 1
    assert stats.compact_tokens == SHARED + (SHARED - 5) + BATCH * (SEQ - SHARED)


def test_documents_in_one_row_by_their_mask() -> None:
    half = SEQ // 2
    mask = causal()
    mask[:, :, half:, :half] = False
    assert run("sdpa", as_floats(mask)).compact_tokens == SHARED + BATCH * (SEQ - SHARED)


def test_sizes_that_change() -> None:
    model = build("Qwen3")
    options = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    compiled = torch.compile(model, backend="radix", options=options, dynamic=True)
    for batch, seq in ((4, 12), (3, 15)):
        compare(model, compiled, shared_batch(batch, seq, 6), causal(batch, seq))
    assert radix_compile.stats().folded_calls == 2


def changed(where: tuple[Any, ...], visible: bool) -> Tensor:
    mask = causal()
    mask[where] = visible
    return mask


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (changed((2, 0, 3, 4), True), "lets a token see later ones"),
        (changed((2, 0, 3, 3), False), "hides a token from itself"),
        (as_floats(causal(), -1e9), "one number near the lowest"),
        (as_floats(causal()) + 0.5, "one number near the lowest"),
    ],
)
def test_other_masks_run_plain_and_right(mask: Tensor, reason: str) -> None:
    model = build("Qwen3")
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    with torch.no_grad():
        ours = compiled(IDS, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(ours, model(IDS, attention_mask=mask, use_cache=False).logits)
        stats = radix_compile.stats()
        assert stats.folded_calls == 0
        ((message, calls),) = stats.plain_calls.items()
        assert reason in message
        assert calls == 1
        compiled(IDS, attention_mask=causal() if mask.dtype == torch.bool else as_floats(causal()), use_cache=False)
    assert radix_compile.stats().folded_calls == 1  # the next call may fold


def test_pairs_that_are_no_mask_run_plain() -> None:
    """Any input of this shape is assumed to be a mask. The check of its values finds the others."""
    torch.manual_seed(0)
    table, weight = torch.randn(97, 4 * 8), torch.randn(8, 8)

    def program(ids: Tensor, bias: Tensor) -> Tensor:
        q = torch.nn.functional.embedding(ids, table).unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, bias) @ weight

    compiled = torch.compile(program, backend="radix", options={"inner_backend": "eager", "fold": "always"})
    bias = torch.randn(BATCH, 1, SEQ, SEQ)
    torch.testing.assert_close(compiled(IDS, bias), program(IDS, bias))
    assert radix_compile.stats().folded_calls == 0


def test_numbers_of_rows() -> None:
    mask = causal(2, 4).repeat(1, 3, 1, 1)  # three heads
    assert np.array_equal(rows_seen(mask)[0], rows_seen(mask)[1])
    assert len(np.unique(rows_seen(mask))) == 4
    mask[1, 2, 3, 0] = False  # one head differs
    seen = rows_seen(mask)
    assert (seen[0] == seen[1]).tolist() == [True, True, True, False]
    assert rows_seen(mask[:1]) is None
    with pytest.raises(RunsPlain, match="later ones"):
        rows_seen(~mask)
    with pytest.raises(RunsPlain, match="one number"):
        rows_seen(as_floats(mask, -torch.inf).index_fill(3, torch.tensor([3]), LOWEST))
    assert np.array_equal(rows_seen(as_floats(mask, -torch.inf)), seen)
