"""Small unmodified models with random weights, batches that share prefixes, and comparisons of outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 97
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _tiny(kind: str, attention: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    config._attn_implementation = attention
    return config


def build(kind: str, head: str = "ForCausalLM", attention: str = "sdpa", **changes: Any) -> nn.Module:
    """A model of this kind (``Qwen3``, ``Llama``, ``GPT2``, ...) in eval mode, with the same weights every time."""
    if kind == "GPT2":
        head = {"ForCausalLM": "LMHeadModel"}.get(head, head)
        changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **changes}
    config = _tiny(kind, attention, **changes)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
    return model.eval()


def shared_batch(batch: int, seq: int, shared: int, seed: int = 0) -> torch.Tensor:
    """``[batch, seq]`` token ids whose first ``shared`` columns are the same in every sequence, no padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, seq), generator=generator)
    ids[:, :shared] = ids[0, :shared]
    return ids


def paths(*keys: torch.Tensor, unique: torch.Tensor | None = None) -> int:
    """The number of distinct paths, counted row by row. Each row of ``unique`` counts separately."""
    distinct: set[object] = set()
    rows, columns = keys[0].shape
    for b in range(rows):
        path: tuple[object, ...] = ()
        for s in range(columns):
            path += (tuple(int(key[b, s]) for key in keys),)
            alone = unique is not None and bool(unique[b, s])
            distinct.add((b, s) if alone else path)
    return len(distinct)


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def assert_as_exact(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, factor: float = 4.0) -> None:
    """Check that the error of ``ours`` is at most ``factor`` times the error of ``plain``, which has the same dtype.

    ``exact`` is the result of the plain model in float64. One rounding of the largest entry is added to the error of
    ``plain``, because the plain model may be exact by chance.
    """
    assert ours.shape == plain.shape
    assert ours.dtype == plain.dtype
    # In float64, eager attention adds float64's lowest number before a softmax in float32: fully masked rows are NaN.
    known = ~exact.isnan()
    torch.testing.assert_close(ours[~known], plain[~known])
    ours, plain, exact = ours[known], plain[known], exact[known]
    assert len(exact)
    allowed = (plain.double() - exact).abs().max() + torch.finfo(plain.dtype).eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    assert error <= factor * allowed, f"error {error:.2e}, the plain model's own {allowed:.2e}"


def tensors(output: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in a model's output, caches included, in a fixed order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, transformers.DynamicCache):
        return [tensor for layer in output.layers for tensor in (layer.keys, layer.values)]
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in tensors(value)]
    return []


def features_apart(heads: torch.Tensor) -> torch.Tensor:
    """The same tensor ``[..., S, E]``, laid out as ``[..., E, S]``: the features of a head are not contiguous."""
    return heads.mT.contiguous().mT


def compare(model: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run the compiled model, the plain model and the model in float64, and compare every output tensor."""
    with torch.no_grad():
        ours, plain = tensors(compiled(*args, **kwargs)), tensors(model(*args, **kwargs))
        exact = tensors(in_float64(model)(*args, **kwargs))
    assert len(ours) == len(plain) > 0
    for result, expected, reference in zip(ours, plain, exact, strict=True):
        assert_as_exact(result, expected, reference.double())
