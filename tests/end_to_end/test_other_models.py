"""Models from outside of transformers, as people write them by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from tests.models import VOCABULARY, assert_as_exact, build, in_float64, shared_batch
from tests.tiers import slow_unless


class NanoGPT(nn.Module):
    """A model like nanoGPT: learned positions, tied weights, attention fused or with a mask in a buffer."""

    def __init__(self, fused: bool = True, width: int = 32, heads: int = 4, layers: int = 2, longest: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads, longest, fused) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, longest: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("mask", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.qkv(self.first(hidden)).split(width, dim=2)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-1])
            is_hidden = self.mask[:, :, :length, :length] == 0
            mixed = F.softmax(scores.masked_fill(is_hidden, float("-inf")), dim=-1) @ value
        hidden = hidden + self.out(mixed.transpose(1, 2).contiguous().view(batch, length, width))
        return hidden + self.mlp(self.second(hidden))


class TitanLlama(nn.Module):
    """A model like torchtitan's Llama: complex rotary positions, repeated keys and values, RMS norms."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(TitanLayer(width, heads, groups) for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        angles = torch.outer(torch.arange(64).float(), 1e4 ** -(torch.arange(0, width // heads, 2) / (width // heads)))
        self.register_buffer("rotary", torch.polar(torch.ones_like(angles), angles))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden, self.rotary)
        return self.output(self.norm(hidden))


class TitanLayer(nn.Module):
    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.size = width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * width, width, bias=False)
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, hidden: Tensor, rotary: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        x = self.first(hidden)
        query, key, value = (w(x).view(batch, length, -1, self.size) for w in (self.wq, self.wk, self.wv))
        query, key = _rotated(query, rotary[:length]), _rotated(key, rotary[:length])
        repeats = query.shape[2] // key.shape[2]
        key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.wo(mixed.transpose(1, 2).contiguous().view(batch, length, -1))
        x = self.second(hidden)
        return hidden + self.w2(F.silu(self.w1(x)) * self.w3(x))


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary.view(1, x.shape[1], 1, -1)).flatten(3).type_as(x)


class Encoder(nn.Module):
    """Torch's encoder with a causal mask."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)
        self.is_causal = is_causal

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=self.head.weight.dtype)
        return self.head(self.encoder(self.embedding(ids), mask=mask, is_causal=self.is_causal))


MODELS = {
    "nanoGPT": NanoGPT,
    "nanoGPT, attention written out": lambda: NanoGPT(fused=False),
    "torchtitan's Llama": TitanLlama,
    "nn.TransformerEncoder": Encoder,
    "nn.TransformerEncoder, mask only": lambda: Encoder(is_causal=False),
}


@pytest.fixture
def unfused() -> Iterator[None]:
    """Disable torch's fast path, which runs each encoder layer as one op outside of training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def check(program: Any, ids: Tensor, exact: Tensor) -> None:
    """Check that every layer folds, and that the outputs are those of the plain program."""
    options = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    with torch.no_grad():
        assert not radix_compile.explain(program, ids).refusals
        radix_compile.reset_stats()
        ours, plain = torch.compile(program, backend="radix", options=options)(ids), program(ids)
    assert_as_exact(ours, plain, exact.double())
    assert radix_compile.stats().folded_calls == 1


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize(
    ("name", "training"),
    slow_unless(
        lambda name, training: training == ("Llama" in name) and name != "nn.TransformerEncoder",
        itertools.product(MODELS, [False, True]),
    ),
)
def test_folds_every_layer(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    ids = shared_batch(4, 12, 8)
    with torch.no_grad():
        exact = in_float64(model)(ids)
    check(model, ids, exact)


def test_a_fused_encoder_layer_is_refused_with_advice() -> None:
    model = Encoder().eval()
    with torch.no_grad():
        (refusal, *_) = radix_compile.explain(model, shared_batch(4, 12, 8)).refusals
    assert "set_fastpath_enabled(False)" in refusal.reason


def test_functional_call() -> None:
    torch.manual_seed(0)
    model = TitanLlama().eval()
    weights = {name: tensor * 1.5 for name, tensor in model.named_parameters()}
    ids = shared_batch(4, 12, 8)

    def program(ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (ids,))

    with torch.no_grad():
        exact = torch.func.functional_call(
            in_float64(model), {name: tensor.double() for name, tensor in weights.items()}, (ids,)
        )
    check(program, ids, exact)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_weights_quantised_to_integers(inner: str) -> None:
    """Each weight is a tensor subclass around two tensors: integers and scales."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model, ids = build("Qwen3"), shared_batch(4, 16, 9)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    options = {"inner_backend": inner, "fold": "always", "verify": True}
    compiled = torch.compile(model, backend="radix", options=options)
    with torch.no_grad():
        ours, plain = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        assert_as_exact(ours, plain, plain.double())
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert stats.compact_tokens < stats.tokens
    assert len(radix_compile.explain(model, ids, use_cache=False).regions) == 1
