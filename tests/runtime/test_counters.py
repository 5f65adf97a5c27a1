"""Counts over calls: by model, with reasons and the histogram, and what moves and is saved, by hand."""

from __future__ import annotations

import re

import pytest
import torch

import radix_compile
from radix_compile.runtime.counters import Stats
from tests.models import build, paths, shared_batch

OPTIONS = {"inner_backend": "eager", "fold": 0.9}


def run(model: torch.nn.Module, *batches: torch.Tensor, **options: object) -> Stats:
    compiled = torch.compile(model, backend="radix", options={**OPTIONS, **options}, dynamic=False)
    with torch.no_grad():
        for ids in batches:
            compiled(ids, use_cache=False)
    return radix_compile.stats()


def test_by_model_and_reason() -> None:
    radix_compile.reset_stats()
    run(build("Qwen3"), shared_batch(4, 12, 8), torch.arange(48).view(4, 12), shared_batch(4, 12, 8))
    counted = run(build("Llama"), shared_batch(8, 12, 11))
    assert list(counted.models) == ["Qwen3ForCausalLM", "LlamaForCausalLM"]
    qwen, llama = counted.models.values()
    assert (qwen.calls, qwen.folded_calls, llama.calls) == (3, 2, 1)
    assert qwen.plain_calls == {"too little is shared": 1}
    assert counted.calls == 4
    assert qwen.histogram == [0, 0, 0, 0, 2, 0, 0, 0, 0, 0]  # 24 of 48
    assert llama.histogram == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # 19 of 96
    assert qwen.plan_seconds + llama.plan_seconds == pytest.approx(counted.plan_seconds)
    printed = str(counted)
    assert "Qwen3ForCausalLM: 3 calls, 2 folded" in printed
    assert "ran plain: 1 x too little is shared" in printed
    assert "96 rows, 96 read, 48 distinct (2.00x)" in printed
    assert "2 at 0.4 to 0.5" in printed


def test_copies_do_not_change() -> None:
    radix_compile.reset_stats()
    before = run(build("Qwen3"), shared_batch(4, 12, 8))
    run(build("Qwen3"), shared_batch(4, 12, 8))
    assert (
        before.histogram[4]
        == before.models["Qwen3ForCausalLM"].histogram[4]
        == before.models["Qwen3ForCausalLM"].calls
        == 1
    )


def test_bytes_and_flops_by_hand() -> None:
    """Ids go in, hidden states of 32 float32 come out; with attention in full form also its Q, K, V and results."""
    ids = shared_batch(4, 12, 8)
    rows, nodes = ids.numel(), paths(ids)
    layers, heads, groups, size = 2, 4, 2, 8
    model = build("Qwen3", head="Model", num_hidden_layers=layers)
    radix_compile.reset_stats()
    counted = run(model, ids)
    ids_folded, hidden_scattered = 8 * nodes, 4 * 32 * rows
    assert counted.moved_bytes == 2 * (ids_folded + hidden_scattered)
    with torch.no_grad():
        explanation = radix_compile.explain(model, ids, use_cache=False)
    assert counted.flops_saved == pytest.approx(explanation.flops_before - explanation.flops_after)
    radix_compile.reset_stats()
    torch._dynamo.reset()
    counted = run(model, ids, fold_attention=False)
    scattered = layers * 4 * size * (heads + 2 * groups) * rows
    folded = layers * 4 * size * heads * nodes
    assert counted.moved_bytes == 2 * (ids_folded + hidden_scattered + scattered + folded)


def test_prometheus_text() -> None:
    """As the format's grammar has it, and with the numbers that were counted."""
    radix_compile.reset_stats()
    counted = run(build("Qwen3"), shared_batch(4, 12, 8), torch.arange(48).view(4, 12))
    text = counted.to_prometheus()
    sample = r'[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+'
    for line in text.splitlines():
        assert re.fullmatch(rf"# (HELP|TYPE) radix_[a-z_]+ .+|{sample}", line), line
    assert 'radix_calls_total{model="Qwen3ForCausalLM"} 2' in text
    assert 'radix_plain_calls_total{model="Qwen3ForCausalLM",reason="too little is shared"} 1' in text
    assert 'radix_compression_bucket{model="Qwen3ForCausalLM",le="0.4"} 0' in text
    assert 'radix_compression_bucket{model="Qwen3ForCausalLM",le="0.5"} 1' in text
    assert 'radix_compression_sum{model="Qwen3ForCausalLM"} 0.5' in text
    assert 'radix_compression_count{model="Qwen3ForCausalLM"} 1' in text
    types = re.findall(r"# TYPE (\w+) (\w+)", text)
    assert len(types) == len(dict(types))
    odd = Stats(models={'a "b"\n': Stats()})
    assert r'{model="a \"b\"\n"}' in odd.to_prometheus()
