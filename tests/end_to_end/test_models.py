"""Unmodified models with every form of input: equal outputs on every row, and one node for each distinct path."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import radix_compile
from tests.models import assert_as_exact, build, compare, in_float64, paths, shared_batch
from tests.tiers import slow_unless

FORMS = [
    "no mask",
    "no mask, no cache",
    "ones",
    "right padding",
    "left padding",
    "left padding, positions",
    "positions",
    "restarting positions",
]


def inputs(form: str, ids: Tensor) -> dict[str, Any]:
    """The keyword arguments of a form. Sequences 0 and 1 share their padding and their text."""
    if form == "no mask":
        return {}
    if form == "no mask, no cache":
        return {"use_cache": False}
    if form == "positions":
        return {"position_ids": 5 + torch.arange(ids.shape[1]).repeat(ids.shape[0], 1), "use_cache": False}
    if form == "restarting positions":
        # Two documents in each sequence: the positions prove that they do not see each other.
        first = ids.shape[1] // 2
        positions = torch.cat([torch.arange(first), torch.arange(ids.shape[1] - first)])
        return {"position_ids": positions.repeat(ids.shape[0], 1), "use_cache": False}
    mask = torch.ones_like(ids)
    if form == "right padding":
        ids[1] = ids[0]
        mask[0, -3:] = mask[1, -3:] = mask[2, -1:] = 0
    if form.startswith("left padding"):
        ids[1, :-2] = ids[0, :-2]
        mask[0, :3] = mask[1, :3] = 0
        mask[2, :1] = int(form != "left padding")  # eager attention in float64 needs a sequence without padding
    ids[mask == 0] = 0
    if form == "left padding, positions":
        # Sequence 3 is sequence 0 without its last token, one column further left.
        ids[3], mask[3] = torch.roll(ids[0], -1), torch.roll(mask[0], -1)
        ids[3, -1], mask[3, -1] = 5, 1
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    return {"attention_mask": mask, "use_cache": form == "ones"}


def nodes(form: str, ids: Tensor, kwargs: dict[str, Any]) -> int:
    """The expected number of nodes."""
    keys = [ids, *(value for value in kwargs.values() if isinstance(value, Tensor))]
    if form == "left padding, positions":
        rows = torch.stack(keys, -1)
        texts = [list(map(tuple, rows[b][mask == 1].tolist())) for b, mask in enumerate(kwargs["attention_mask"])]
        padded = int((kwargs["attention_mask"] == 0).sum())
        return padded + len({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})
    unique = kwargs["attention_mask"].cumsum(1) == 0 if form == "left padding" else None
    return paths(*keys, unique=unique)


CASES = [
    *(("Qwen3", attention, form) for attention in ("sdpa", "eager") for form in FORMS),
    # The other families differ in their layers, not in how masks and positions reach them.
    *(("Llama", "sdpa", form) for form in ("no mask", "right padding")),
    *(("GPT2", "sdpa", form) for form in ("no mask", "ones", "right padding", "positions", "left padding, positions")),
    *(("GPT2", "eager", form) for form in ("right padding", "left padding")),
]
QUICK = (
    ("Qwen3", "eager", "left padding"),
    ("Llama", "sdpa", "right padding"),
    ("GPT2", "sdpa", "left padding, positions"),
)
"""One case of each kind. The others combine these, and the compatibility tests have every form of Qwen3."""


@pytest.mark.parametrize(
    ("kind", "attention", "form"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_folds_with_the_outputs_of_the_plain_model(kind: str, attention: str, form: str) -> None:
    model = build(kind, attention=attention)
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    for batch, seq in [(4, 12), (4, 17)]:  # static shapes, then a symbolic sequence length
        radix_compile.reset_stats()
        ids = shared_batch(batch, seq, shared=seq - 4, seed=seq)
        kwargs = inputs(form, ids)
        compare(model, compiled, ids, **kwargs)
        stats = radix_compile.stats()
        assert (stats.calls, stats.folded_calls) == (1, 1)
        assert stats.tokens == batch * seq
        assert stats.compact_tokens == nodes(form, ids, kwargs) < stats.tokens


@pytest.mark.parametrize(
    ("head", "form"),
    slow_unless(
        lambda head, form: (head == "Model") == (form == "right padding"),
        [(head, form) for head in ("Model", "ForSequenceClassification") for form in ("no mask", "right padding")],
    ),
)
def test_folds_under_other_heads(head: str, form: str) -> None:
    model = build("Qwen3", head=head, num_labels=3)
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    ids = shared_batch(4, 12, shared=8)
    kwargs = inputs(form, ids)
    compare(model, compiled, ids, **kwargs)
    assert radix_compile.stats().compact_tokens == nodes(form, ids, kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16(attention: str) -> None:
    model = build("Qwen3", attention=attention).bfloat16()
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    ids = shared_batch(4, 12, shared=8)
    compare(model, compiled, ids, **inputs("right padding", ids))
    assert radix_compile.stats().folded_calls == 1


def test_shapes_that_change_together_or_alone() -> None:
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    for batch, seq in [(4, 12), (4, 17), (7, 17), (5, 9), (3, 30), (9, 12)]:
        ids = shared_batch(batch, seq, shared=seq // 2, seed=batch)
        kwargs = inputs("right padding", ids)
        radix_compile.reset_stats()
        compare(model, compiled, ids, **kwargs)
        assert radix_compile.stats().compact_tokens == nodes("right padding", ids, kwargs)
    assert radix_compile.stats().graphs == 0  # the last shapes compiled nothing


@pytest.mark.parametrize(
    ("inside", "inner", "attention"),
    slow_unless(
        lambda inside, inner, attention: inside == (inner == "aot_eager") == (attention == "sdpa"),
        itertools.product([False, True], ["eager", "aot_eager"], ["sdpa", "eager"]),
    ),
)
def test_autocast_around_the_call_and_inside_it(inside: bool, inner: str, attention: str) -> None:
    model = build("Qwen3", num_hidden_layers=1, attention=attention)
    ids = shared_batch(4, 12, 8)
    mask = torch.ones_like(ids)

    def program(autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits: torch.Tensor = model(ids, attention_mask=mask, use_cache=False).logits
        return logits

    options = {"inner_backend": inner, "fold": "always", "strict": True}
    with torch.inference_mode():
        plain = program(True)
        exact = in_float64(model)(ids, attention_mask=mask, use_cache=False).logits
        if inside:
            ours = torch.compile(program, backend="radix", options=options)(True)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                compiled = torch.compile(model, backend="radix", options=options)
                ours = compiled(ids, attention_mask=mask, use_cache=False).logits
    assert plain.dtype == torch.bfloat16
    assert_as_exact(ours, plain, exact)
    # Without the casts, the result would be more exact than the plain model's, and have another dtype.
    assert (ours.double() - exact).abs().max() > 0.1 * (plain.double() - exact).abs().max()
    assert radix_compile.stats().folded_calls == 1
    assert radix_compile.stats().tree_pairs


def test_the_same_op_inside_and_outside_autocast_is_two() -> None:
    embedding, linear = torch.nn.Embedding(97, 16), torch.nn.Linear(16, 16)

    def program(ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = embedding(ids)
        with torch.autocast("cpu", torch.bfloat16):
            inside = linear(hidden)
        return inside, linear(hidden)

    ids = shared_batch(4, 12, 8)
    options = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    with torch.no_grad():
        ours, plain = torch.compile(program, backend="radix", options=options)(ids), program(ids)
    for result, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(result, expected)  # compares dtypes too
    assert radix_compile.stats().folded_calls == 1
