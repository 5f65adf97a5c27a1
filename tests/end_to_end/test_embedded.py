"""Graphs that start at embeddings: rows are compared by content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import radix_compile
from tests.models import build, compare, paths, shared_batch
from tests.tiers import slow_unless

OPTIONS = {"inner_backend": "aot_eager", "fold": "always", "verify": True}
RIGHT = (torch.arange(16) < torch.tensor([16, 12, 14, 16])[:, None]).long()


def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        embeddings: Tensor = model.get_input_embeddings()(ids)  # type: ignore[operator]
    return embeddings


@pytest.mark.parametrize("kind", slow_unless(lambda kind: kind != "Llama", ["Qwen3", "GPT2", "Llama"]))
def test_inputs_embeds(kind: str) -> None:
    model, ids = build(kind), shared_batch(4, 16, 9)
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    compare(model, compiled, inputs_embeds=embedded(model, ids))
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert stats.compact_tokens == paths(ids) < stats.tokens


def test_with_a_mask_and_other_lengths() -> None:
    """The mask is part of the row key, and new sizes stop causing recompilation."""
    model = build("Qwen3")
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    for length in (16, 14, 15, 13):
        ids, mask = shared_batch(4, length, 9), RIGHT[:, :length]
        radix_compile.reset_stats()
        compare(model, compiled, inputs_embeds=embedded(model, ids), attention_mask=mask)
        assert radix_compile.stats().compact_tokens == paths(ids, mask)
    assert radix_compile.stats().folded_compiles == 0


def test_two_embedded_inputs() -> None:
    """Rows are equal only if both inputs are."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, rows: Tensor, factors: Tensor) -> Tensor:
            hidden: Tensor = self.down(self.up(rows).tanh()) * factors
            return hidden

    model, ids = Two().double(), shared_batch(4, 16, 9)
    table = torch.randn(97, 8, dtype=torch.float64)
    factors = table[shared_batch(4, 16, 6, seed=1)]
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(table[ids], factors), model(table[ids], factors))
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert stats.compact_tokens == paths(ids, shared_batch(4, 16, 6, seed=1))


def test_what_is_no_sequence_of_rows_is_right() -> None:
    """Inputs of the right shape whose rows are mixed do not fold."""

    class Mixes(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dim, self.up, self.down = dim, nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, rows: Tensor) -> Tensor:
            return self.down(self.up(rows.flip(self.dim) - rows.mean(self.dim, keepdim=True)).tanh())

    table = torch.randn(97, 8, dtype=torch.float64)
    rows = table[shared_batch(4, 16, 9)]
    for dim in (0, 1):
        model = Mixes(dim).double()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="radix", options=OPTIONS)
        with torch.no_grad(), pytest.warns(UserWarning, match="radix: nothing folds"):
            torch.testing.assert_close(compiled(rows), model(rows))
    assert radix_compile.stats().folded_calls == 0


def test_a_gradient_of_the_embeddings_is_that_of_every_row() -> None:
    model, ids = build("Qwen3"), shared_batch(4, 16, 9)
    compiled = torch.compile(model, backend="radix", options=OPTIONS)

    def gradient(run: Any) -> Tensor:
        rows = embedded(model, ids).requires_grad_()
        run(inputs_embeds=rows, use_cache=False).logits.pow(2).sum().backward()
        assert rows.grad is not None
        return rows.grad

    with pytest.warns(UserWarning, match="the input embeddings have a gradient.*pass input_ids"):
        ours = gradient(compiled)
    torch.testing.assert_close(ours, gradient(model))
    assert radix_compile.stats().folded_calls == 0


def test_frozen_embeddings_train_the_rest() -> None:
    """Embedded rows without a gradient fold in training too."""
    model, ids = build("GPT2").double(), shared_batch(4, 16, 9)  # it has no ops in float32
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    rows = embedded(model, ids)

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        run(inputs_embeds=rows, use_cache=False).logits.cos().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients(compiled)
    assert radix_compile.stats().folded_calls == 1
    for gradient, expected in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_layers_one_by_one() -> None:
    """As in regional compilation, each graph takes hidden states and rotary tables."""
    model, ids = build("Llama"), shared_batch(4, 16, 9)
    plain = model(ids, use_cache=False).logits.detach()
    for layer in model.model.layers:
        layer.compile(backend="radix", options=OPTIONS)
    with torch.no_grad():
        ours = model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, plain)
    stats = radix_compile.stats()
    assert stats.folded_calls == 2
    assert stats.compact_tokens == 2 * paths(ids)
