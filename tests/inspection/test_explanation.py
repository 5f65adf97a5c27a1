"""The report: what it says of a model that folds, of one that does not, and that it leaves everything as it was."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import radix_compile
from tests.end_to_end.test_refusals import Apply, Block
from tests.models import build, shared_batch


def test_a_model_that_folds(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("Qwen3")
    ids = shared_batch(4, 12, 8)
    with torch.no_grad():
        explanation = radix_compile.explain(model, ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert explanation.folded
    assert (explanation.tokens, explanation.compact_tokens) == (48, 8 + 4 * 4)
    assert explanation.refusals == []
    assert len(explanation.regions) == 1
    assert explanation.regions[0].first.endswith("embed_tokens")
    assert explanation.regions[0].last.endswith("lm_head")
    (graph,) = explanation.graphs
    assert [attention.causal for attention in graph.attentions] == [True, True]
    assert "layers.1.self_attn" in graph.attentions[1].module
    assert "sdpa_attention.py" in graph.attentions[1].source
    printed = capsys.readouterr().out
    assert "folded: 48 -> 24 tokens (2.00x)" in printed
    assert json.loads(explanation.to_json())["compact_tokens"] == 24


def test_flops_by_hand() -> None:
    """Two projections of 16 -> 64 -> 16 and the attention they stand beside, counted by hand."""
    model = build("Qwen3", head="Model", num_hidden_layers=1)
    ids = shared_batch(4, 12, 8)
    with torch.no_grad():
        explanation = radix_compile.explain(model, ids, use_cache=False)
    rows = 4 * 12
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    attention = 2 * 2 * 4 * 4 * 12 * 12 * 8
    rotary = 2 * 4 * 12  # which transformers 5.17 has as a product of matrices, and 5.23 has not
    assert explanation.flops_before - 2 * rows * projections - attention in (0, rotary)
    # Eight shared rows see one to eight keys, four more in each of four sequences nine to twelve.
    pairs = sum(range(1, 9)) + 4 * sum(range(9, 13))
    assert explanation.tree_pairs == pairs
    after = 2 * (rows // 2) * projections + attention * pairs // (4 * 12 * 12)
    assert explanation.flops_after - after in (0, rotary)


def test_a_model_that_does_not_fold_says_why_and_where() -> None:
    model = Block(Apply(lambda x: x.flip(1))).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="radix: nothing folds: .*flip.*reverses the sequence axis"):
        explanation = radix_compile.explain(model, shared_batch(4, 12, 8))
    assert not explanation.folded
    assert explanation.compact_tokens == 0
    assert explanation.flops_after == explanation.flops_before
    (refusal,) = explanation.refusals
    assert refusal.op == "aten.flip.default"
    assert refusal.module.endswith("between")
    assert "x.flip(1)" in refusal.source
    assert "refused: aten.flip.default" in str(explanation)


def test_one_warning_for_one_reason(recwarn: pytest.WarningsRecorder) -> None:
    model = Block(Apply(lambda x: x.flip(1))).eval()
    compiled = torch.compile(model, backend=radix_compile.RadixBackend(inner_backend="eager", fold="always"))
    with torch.no_grad():
        for seq in (12, 13, 14):
            compiled(shared_batch(4, seq, 8))
    assert len([warning for warning in recwarn if "radix" in str(warning.message)]) == 1


def test_a_graph_beside_the_model_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    """After a graph break there are often a few ops with no arithmetic in them."""
    torch.compile(lambda x: x * 2, backend=radix_compile.RadixBackend(inner_backend="eager", fold="always"))(
        torch.ones(4, 12)
    )
    assert radix_compile.stats().graphs == 1
    assert not [warning for warning in recwarn if "radix" in str(warning.message)]


def test_counts_of_the_process_are_left_alone() -> None:
    model = build("Qwen3", head="Model", num_hidden_layers=1)
    ids = shared_batch(4, 12, 8)
    with torch.no_grad():
        torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})(ids)
        before = radix_compile.stats()
        assert before.folded_calls == 1
        radix_compile.explain(model, ids)
    assert radix_compile.stats() == before


def test_a_compiled_model_is_explained_as_the_model_it_is() -> None:
    model = torch.compile(build("Qwen3", head="Model", num_hidden_layers=1), backend="inductor")
    with torch.no_grad():
        assert radix_compile.explain(model, shared_batch(4, 12, 8)).folded


def test_stats() -> None:
    model = build("Qwen3", head="Model", num_hidden_layers=1)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": 0.95})
    with torch.no_grad():
        for _ in range(3):
            compiled(shared_batch(4, 12, 8))
    stats = radix_compile.stats()
    assert (stats.calls, stats.folded_calls, stats.tokens, stats.compact_tokens) == (3, 3, 144, 72)
    assert (stats.graphs, stats.plain_compiles, stats.folded_compiles) == (1, 1, 1)
    assert stats.compression == 0.5
    assert stats.plan_seconds > 0
    radix_compile.reset_stats()
    assert radix_compile.stats() == radix_compile.Stats()


def test_the_log_shows_the_passes_at_work() -> None:
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("radix_compile"), Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with torch.no_grad():
            torch.compile(
                build("Qwen3", head="Model", num_hidden_layers=1), backend="radix", options={"inner_backend": "eager"}
            )(shared_batch(4, 12, 8))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    for name in ("mark_token_axes", "choose_cuts", "fold_graph"):
        assert any(message.startswith(name) for message in messages)
