"""Models on a CUDA device, in bf16 and fp32, through inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import radix_compile
from tests.models import build, compare, paths, shared_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_folds_with_the_outputs_of_the_plain_model(attention: str, dtype: torch.dtype) -> None:
    model = build("Qwen3", attention=attention, head_dim=16).to("cuda", dtype)
    compiled = torch.compile(model, backend="radix", options={"fold": "always", "strict": True})
    for batch, seq in [(4, 12), (4, 40), (7, 33), (6, 50)]:
        radix_compile.reset_stats()
        ids = shared_batch(batch, seq, shared=seq - 4, seed=seq).cuda()
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        compare(model, compiled, ids, attention_mask=mask, use_cache=False)
        stats = radix_compile.stats()
        assert stats.folded_calls == 1
        assert stats.compact_tokens == paths(ids.cpu(), mask.cpu())


def test_left_padding_and_caches() -> None:
    model = build("Llama", head_dim=16).cuda()
    compiled = torch.compile(model, backend="radix", options={"fold": "always", "strict": True})
    ids = shared_batch(4, 24, 16).cuda()
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :3] = 0
    compare(model, compiled, ids, attention_mask=mask)
    assert radix_compile.stats().folded_calls == 1


def check_gradients(model: nn.Module, compiled: Callable[..., Any], ids: Tensor) -> None:
    """Compare the gradients with those of the plain model."""
    compiled(ids, use_cache=False).logits.square().mean().backward()
    assert radix_compile.stats().folded_calls == 1
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(ids, use_cache=False).logits.square().mean().backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_gradients() -> None:
    model = build("Qwen3", head_dim=16).cuda()
    compiled = torch.compile(model, backend="radix", options={"fold": "always", "strict": True})
    check_gradients(model, compiled, shared_batch(4, 24, 16).cuda())


def test_cuda_graphs() -> None:
    """One graph is recorded for each combination of plan sizes. Weights are not copied."""
    model = build("Qwen3", head_dim=16).cuda()
    options = {"fold": "always", "strict": True, "mode": "reduce-overhead"}
    compiled = torch.compile(model, backend="radix", options=options)
    counters.clear()
    batches = [shared_batch(6, 50, shared, seed=shared).cuda() for shared in (46, 30, 1)]
    for ids in (*batches, *batches, *batches):  # warms up, records, and replays
        compare(model, compiled, ids, use_cache=False)
    assert radix_compile.stats().folded_calls == 9
    assert counters["inductor"]["cudagraph_skips"] == 0
    plan = 10 + 6  # fold, scatter, begin, end, six arrays of tiles; and at most six sizes
    recorded = counters["inductor"]["cudagraph_recorded_non_static_inputs"]  # compiling replaces the counter
    assert 0 < recorded <= len(batches) * (1 + plan)
    radix_compile.reset_stats()
    longer_prefix = batches[0].clone()
    longer_prefix[1, 46] = longer_prefix[0, 46]
    compare(model, compiled, longer_prefix, use_cache=False)
    assert radix_compile.stats().compact_tokens == paths(longer_prefix.cpu()) != paths(batches[0].cpu())
    # Padding rounds both plans up to 72 nodes, so nothing new is recorded.
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] == recorded
    for ids in (*batches, *batches, *batches):
        model.zero_grad()
        radix_compile.reset_stats()
        check_gradients(model, compiled, ids)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one() -> None:
    model = build("Qwen3", head_dim=16).to("cuda:1")
    # Inductor's programs set the device themselves.
    options = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    compiled = torch.compile(model, backend="radix", options=options)
    ids = shared_batch(4, 24, 16).to("cuda:1")
    assert torch.cuda.current_device() == 0
    compare(model, compiled, ids, use_cache=False)
    radix_compile.reset_stats()
    check_gradients(model, compiled, ids)
