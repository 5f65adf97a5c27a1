"""Rows that no result depends on are not computed: counted by hand, with results and gradients of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from tests.models import build, shared_batch
from tests.tiers import slow_unless

OPTIONS = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
BATCH, SEQ = 4, 12
LENGTHS = (7, 9, 9, 12)
IGNORED = -100


def batch(left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids that share six tokens, padded to ``SEQ``, and their mask."""
    ids, mask = shared_batch(BATCH, SEQ, shared=6), torch.zeros(BATCH, SEQ, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, SEQ - length :] = 1
    if not left:
        mask = mask.flip(1)
    return ids.where(mask.bool(), 0), mask


def distinct(read: Tensor, mask: Tensor | None, *keys: Tensor) -> int:
    """The paths that end in a row that is read, or in an earlier one of its sequence that ``mask`` does not hide."""
    paths = set()
    for b in range(len(read)):
        last = max((s for s in range(read.shape[1]) if read[b, s]), default=-1)
        for s in range(last + 1):
            if read[b, s] or mask is None or mask[b, s]:
                paths.add(tuple(tuple(key[b, : s + 1].tolist()) for key in keys))
    return len(paths)


def last_row(mask: Tensor) -> Tensor:
    """The last column of each sequence that is no padding, ``[B]``."""
    return (torch.arange(mask.shape[1]) * mask).argmax(1)


def marked(columns: Tensor) -> Tensor:
    """The rows ``(b, columns[b])``, as bool ``[B, S]``."""
    return torch.arange(SEQ) == columns[:, None]


Head = Callable[[Tensor, Tensor], Tensor]
"""Takes hidden states ``[B, S, D]`` and the mask ``[B, S]``."""

HEADS: dict[str, tuple[Head, Callable[[Tensor], Tensor]]] = {
    "index": (lambda x, mask: x[torch.arange(len(x)), mask.sum(1) - 1], lambda mask: marked(mask.sum(1) - 1)),
    "index by argmax": (lambda x, mask: x[torch.arange(len(x)), last_row(mask)], lambda mask: marked(last_row(mask))),
    "gather": (
        lambda x, mask: x.gather(1, (mask.sum(1) - 1)[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1),
        lambda mask: marked(mask.sum(1) - 1),
    ),
    "flattened": (
        lambda x, mask: x.flatten(0, 1).index_select(0, torch.arange(len(x)) * x.shape[1] + mask.sum(1) - 1),
        lambda mask: marked(mask.sum(1) - 1),
    ),
    "an index into padding": (
        lambda x, mask: x[torch.arange(len(x)), -mask[:, -1]],
        lambda mask: marked(-mask[:, -1] % SEQ),
    ),
    "last column": (lambda x, mask: x[:, -1], lambda mask: marked(torch.full((BATCH,), SEQ - 1))),
    "some columns": (lambda x, mask: x[:, 2:5].mT, lambda mask: (torch.arange(SEQ) - 3).abs().le(1).expand(BATCH, -1)),
    "mean": (
        lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        lambda mask: mask.bool(),
    ),
    "mean, expanded": (
        lambda x, mask: (x * mask[..., None].expand(x.size()).to(x.dtype)).sum(1),
        lambda mask: mask.bool(),
    ),
    "mean by a mask in floating point": (
        lambda x, mask: (x * mask.float()[..., None]).sum(1) / mask.float().sum(1, keepdim=True),
        lambda mask: mask.bool(),
    ),
    "max": (
        lambda x, mask: x.masked_fill(mask[..., None] == 0, -1e9).amax(1),
        lambda mask: mask.bool(),
    ),
    "where": (lambda x, mask: torch.where(mask[..., None] == 1, x, 0.5).mean((0, 1)), lambda mask: mask.bool()),
    "where not": (lambda x, mask: torch.where(mask[..., None] == 0, 0.5, x).mean((0, 1)), lambda mask: mask.bool()),
    "padding alone": (lambda x, mask: torch.where(mask[..., None] == 1, 0.5, x).sum(1), lambda mask: mask == 0),
    "some features of a column": (lambda x, mask: x[:, 3, 1:4] * 2, lambda mask: marked(torch.full((BATCH,), 3))),
    "first and last": (
        lambda x, mask: torch.cat([x[:, 0], x[torch.arange(len(x)), mask.sum(1) - 1]], -1),
        lambda mask: marked(mask.sum(1) - 1) | marked(torch.zeros(BATCH, dtype=torch.long)),
    ),
}  # fmt: skip

ALL_ROWS: dict[str, Head] = {
    "every row": lambda x, mask: x,
    "mean of all": lambda x, mask: x.mean(1),
    "a factor that is no mask": lambda x, mask: (x * torch.linspace(0, 1, SEQ, dtype=x.dtype)[:, None]).sum(1),
    "an index from the rows themselves": lambda x, mask: x[torch.arange(len(x)), x[..., 0].argmax(1)],
    "infinite slopes at zero": lambda x, mask: (x[:, 1:].abs().sqrt() * mask[:, 1:, None]).sum(1),
    "a mask from the rows themselves": lambda x, mask: x.masked_fill(x > 0, 0.0).sum(1),
    "rows of other sequences": lambda x, mask: (x.flip(0) * mask[..., None]).sum(1),
    "both sides of a choice": lambda x, mask: torch.where(mask[..., None] == 1, x, x.tanh()).sum(1),
    "both sides of a choice, of some columns": lambda x, mask: torch.where(
        mask[:, 1:, None] == 1, (y := x[:, 1:]), y.tanh()
    ).sum(1),
    "infinite and finite at zero, of some columns": lambda x, mask: (
        ((y := x[:, 1:]) + y / (y != 0)) * mask[:, 1:, None]
    ).sum(1),
    "a mask that is drawn": lambda x, mask: (x * (torch.rand(mask.shape) < 2)[..., None]).sum(1),
    "a mask and the value without it": lambda x, mask: (x * mask[..., None]).sum(1) + x.sum(1),
}


def run(program: Callable[..., Any], *args: Tensor, options: dict[str, Any] | None = None) -> Any:
    """Results of the compiled program, which are checked, and its statistics."""
    compiled = torch.compile(program, backend="radix", options=OPTIONS | (options or {}))
    with torch.no_grad():
        ours, plain = compiled(*args), program(*args)
    torch.testing.assert_close(ours, plain)
    stats = radix_compile.stats()
    assert stats.folded_calls == 1, stats.plain_calls
    return stats


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("Qwen3", head="Model")


def hidden(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", HEADS)
def test_only_rows_that_are_read_are_computed(name: str, model: nn.Module) -> None:
    (head, reads), (ids, mask) = HEADS[name], batch()
    stats = run(lambda ids, mask: head(hidden(model, ids, mask), mask), ids, mask)
    assert stats.compact_tokens == distinct(reads(mask), mask, ids, mask)
    assert stats.tokens == ids.numel()
    assert stats.compact_tokens <= stats.read_tokens < stats.tokens


@pytest.mark.parametrize("name", ALL_ROWS)
def test_every_row_is_computed(name: str, model: nn.Module) -> None:
    head, (ids, mask) = ALL_ROWS[name], batch()
    stats = run(lambda ids, mask: head(hidden(model, ids, mask), mask), ids, mask)
    everything = torch.ones_like(mask)
    assert stats.compact_tokens == distinct(everything, None, ids, mask)
    assert stats.read_tokens == stats.tokens


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", slow_unless(lambda attention: attention == "sdpa", ["sdpa", "eager"]))
@pytest.mark.parametrize("fold_attention", [False, True])
def test_where_attention_runs(fold_attention: bool, attention: str, left: bool) -> None:
    model, (ids, mask) = build("Qwen3", head="Model", attention=attention), batch(left)

    def pooled(ids: Tensor, mask: Tensor) -> Tensor:
        return hidden(model, ids, mask)[torch.arange(len(ids)), last_row(mask)]

    stats = run(pooled, ids, mask, options={"fold_attention": fold_attention})
    assert stats.compact_tokens == distinct(marked(last_row(mask)), mask, ids, mask)


def test_a_mask_given_in_floating_point(model: nn.Module) -> None:
    ids, mask = batch()
    weights = mask * torch.linspace(0.5, 1, SEQ)
    weights[2, :5] = 0

    def pooled(ids: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        return (hidden(model, ids, mask) * weights[..., None]).sum(1)

    stats = run(pooled, ids, mask, weights)
    assert stats.compact_tokens == distinct(weights != 0, mask, ids, mask)


def test_without_a_mask_rows_behind_the_last_are_not_computed(model: nn.Module) -> None:
    ids, _ = batch()
    stats = run(lambda ids: model(ids, use_cache=False).last_hidden_state[:, 7], ids)
    assert stats.compact_tokens == distinct(marked(torch.full((BATCH,), 7)), None, ids)


@pytest.mark.parametrize("kind", ["pad token", "no pad token"])
def test_classification_heads(kind: str) -> None:
    """Transformers picks the last token that is not the pad token, or the last column."""
    model = build("Qwen3", head="ForSequenceClassification", num_labels=3)
    ids, mask = batch()
    if kind == "no pad token":
        ids = ids.clamp(min=1)
    model.config.pad_token_id = 0
    picked = last_row(ids != 0)
    stats = run(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits, ids, mask)
    assert stats.compact_tokens == distinct(marked(picked), mask, ids, mask)


def test_a_mask_that_is_zero_in_the_middle(model: nn.Module) -> None:
    """Hidden rows are computed only where they are read: the last of a sequence may be hidden itself."""
    ids, mask = batch()
    mask[0, 2] = mask[1, 3] = mask[2, 3] = mask[3, 11] = 0
    rows = torch.tensor([6, 3, 8, 11])
    stats = run(lambda ids, mask, rows: hidden(model, ids, mask)[torch.arange(BATCH), rows], ids, mask, rows)
    assert stats.compact_tokens == distinct(marked(rows), mask, ids, mask)


def test_a_fully_masked_row_that_is_read(model: nn.Module) -> None:
    """It may attend to every row, so all are computed."""
    ids, mask = batch(left=True)
    stats = run(lambda ids, mask: hidden(model, ids, mask)[:, 1], ids, mask)
    assert stats.read_tokens == stats.tokens


def test_sizes_that_change(model: nn.Module) -> None:
    def pooled(ids: Tensor, mask: Tensor) -> Tensor:
        x = hidden(model, ids, mask)
        return torch.cat([x[torch.arange(x.shape[0]), mask.sum(1) - 1], x[:, 1:-1].flatten(0, 1)[: x.shape[0]]])

    compiled = torch.compile(pooled, backend="radix", options=OPTIONS, dynamic=True)
    ids, mask = batch()
    compiles = []
    with torch.no_grad():
        for columns, rows in ((12, 4), (10, 3), (9, 4)):
            given = ids[:rows, :columns].clone(), mask[:rows, :columns].clone()
            torch.testing.assert_close(compiled(*given), pooled(*given))
            compiles.append(radix_compile.stats().folded_compiles)
    stats = radix_compile.stats()
    assert len(set(compiles)) == 1
    assert stats.read_tokens < stats.tokens


# ------------------------------------------------------------------------------------------------------------ losses


def labels_of(ids: Tensor, mask: Tensor, prompt: int = 6) -> Tensor:
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :prompt] = IGNORED
    return labels


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten())


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The masked mean of a reinforcement-learning loss."""
    chosen = labels[:, 1:].clamp(min=0)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1)
    shown = (labels[:, 1:] != IGNORED).to(logps.dtype)
    return (logps * shown).sum() / shown.sum().clamp(min=1)


def loss_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(labels.shape)
    return losses.sum(1)


LOSSES = {"shifted": shifted_loss, "log-probabilities": log_probabilities, "by row": loss_by_row}


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    model = build("GPT2").double()  # Qwen3 computes its norms in float32
    model.loss_type = "ForCausalLM"
    return model


@pytest.mark.parametrize("labels", ["prompts", "a sequence without labels", "one label"])
@pytest.mark.parametrize("name", [*LOSSES, "transformers"])
def test_rows_without_labels(name: str, labels: str, language_model: nn.Module) -> None:
    ids, mask = batch()
    given = labels_of(ids, mask)
    if labels != "prompts":
        given[1] = IGNORED
    if labels == "one label":
        given[[0, 2]] = given[:, 8:] = IGNORED

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        if name == "transformers":
            return language_model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return LOSSES[name](language_model(ids, attention_mask=mask, use_cache=False).logits, labels)

    compiled = torch.compile(loss, backend="radix", options=OPTIONS)
    weights = list(language_model.parameters())
    ours, plain = compiled(ids, mask, given), loss(ids, mask, given)
    limit = 1e-5 if name == "transformers" else 1e-9  # transformers computes its loss in float32
    torch.testing.assert_close(ours, plain, rtol=limit, atol=limit)
    for gradient, expected in zip(
        torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(plain.sum(), weights), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=limit, atol=limit)
    stats = radix_compile.stats()
    assert stats.folded_calls == 1, stats.plain_calls
    read = F.pad(given[:, 1:] != IGNORED, (0, 1))
    assert stats.compact_tokens == distinct(read, mask, ids, mask)


def test_no_label_at_all(language_model: nn.Module) -> None:
    """No row is read, so there is nothing to fold: the plain program gives what it gives."""
    ids, mask = batch()

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return loss_by_row(language_model(ids, attention_mask=mask, use_cache=False).logits, labels)

    labels = torch.full_like(ids, IGNORED)
    torch.testing.assert_close(
        torch.compile(loss, backend="radix", options=OPTIONS)(ids, mask, labels), loss(ids, mask, labels)
    )
    assert radix_compile.stats().plain_calls == {"too little is shared": 1}
