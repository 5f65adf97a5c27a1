"""The model families of the compatibility page: small unmodified models of transformers with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 97
SIZES = {
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
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "pad_token_id": 0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


WIDTHS = ("hidden_size", "head_dim", "n_embd", "d_model", "word_embed_proj_dim", "query_pre_attn_scalar")
"""The sizes that are proportional to the width of a head."""


@dataclass(frozen=True)
class Family:
    """The sizes of a family (``own``, or ``SIZES`` with ``changes``) and its classes in transformers."""

    changes: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] | None = None
    config: str = ""
    model: str = ""
    note: str = ""
    causal: bool = True
    images: bool = False


FAMILIES = {
    "Qwen2": Family(),
    "Qwen3": Family(),
    "Llama": Family(),
    "Mistral": Family({"sliding_window": 8}, note="sliding window"),
    "Gemma": Family(),
    "Gemma2": Family(
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}, note="soft-cap, windows"
    ),
    "Gemma3": Family(
        {"sliding_window": 8, "query_pre_attn_scalar": 8},
        config="Gemma3TextConfig",
        note="alternating windows, q/k norm",
    ),
    "Phi": Family(),
    "Phi3": Family(),
    "GPT2": Family(own={**GPT, **SPECIAL}, model="GPT2LMHeadModel", note="learned positions, Conv1D"),
    "GPTBigCode": Family(own={**GPT, **SPECIAL}, note="multi-query"),
    "GPTJ": Family(own={**GPT, **SPECIAL, "rotary_dim": 4}, note="parallel residual"),
    "GPTNeoX": Family({"rotary_pct": 0.25}, note="parallel residual, partial rotary"),
    "CodeGen": Family(own={**GPT, **SPECIAL, "rotary_dim": 4}),
    "OPT": Family({"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "XGLM": Family(
        own={
            **SPECIAL,
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 256,
        }
    ),
    "Bloom": Family({"n_layer": 2, "n_head": 4}, note="ALiBi"),
    "Mpt": Family(
        own={"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, note="ALiBi"
    ),
    "Falcon": Family(
        own={
            **SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "max_position_embeddings": 256,
        },
        note="multi-query, parallel residual",
    ),
    "StableLm": Family(),
    "Starcoder2": Family({"sliding_window": None}),
    "Olmo": Family(),
    "Olmo2": Family(),
    "Cohere": Family(),
    "Cohere2": Family({"sliding_window": 8}, note="alternating windows"),
    "Granite": Family(),
    "SmolLM3": Family(),
    "Glm": Family(),
    "Glm4": Family(),
    "Ernie4_5": Family(),
    "Exaone4": Family({"sliding_window": 8}, note="alternating windows"),
    "SeedOss": Family(),
    "Helium": Family(),
    "Nemotron": Family(),
    "Persimmon": Family(),
    "GptOss": Family({**EXPERTS, "sliding_window": 8}, note="sinks, experts"),
    "Qwen3Moe": Family({**MOE, "decoder_sparse_step": 1}, note="experts"),
    "Mixtral": Family(EXPERTS, note="experts"),
    "DeepseekV3": Family(
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
        note="latent attention, experts",
    ),
    "Qwen3Next": Family(
        {
            **MOE,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        note="linear attention, experts",
    ),
    "Mamba2": Family(
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
        note="state space",
    ),
    "Lfm2": Family({"layer_types": ["conv", "full_attention"]}, note="convolution"),
    "Qwen3ForSequenceClassification": Family(
        {"num_labels": 3}, config="Qwen3Config", model="Qwen3ForSequenceClassification", note="classifies sequences"
    ),
    "Qwen3ForTokenClassification": Family(
        {"num_labels": 3}, config="Qwen3Config", model="Qwen3ForTokenClassification", note="classifies tokens"
    ),
    "Bert": Family(model="BertForMaskedLM", note="bidirectional", causal=False),
    "ModernBert": Family(
        {"cls_token_id": 1, "sep_token_id": 2}, model="ModernBertForMaskedLM", note="bidirectional", causal=False
    ),
    "XLMRoberta": Family(model="XLMRobertaForMaskedLM", note="bidirectional", causal=False),
    "T5Encoder": Family(
        own={
            **SPECIAL,
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        },
        config="T5Config",
        model="T5EncoderModel",
        note="bidirectional",
        causal=False,
    ),
    "ViT": Family(
        own={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        model="ViTModel",
        note="images",
        causal=False,
        images=True,
    ),
}


def attentions(name: str) -> list[str]:
    """The attention implementations of the family. The first is the default of transformers."""
    model = _model_class(FAMILIES[name], name)
    flex = ["flex_attention"] if getattr(model, "_supports_flex_attn", False) else []
    return [*(["sdpa"] if getattr(model, "_supports_sdpa", False) else []), "eager", *flex]


def _model_class(family: Family, name: str) -> Any:
    return getattr(transformers, family.model or f"{name}ForCausalLM")


def build_family(name: str, attention: str) -> nn.Module:
    """The model in eval mode, with the same weights every time, large enough that rows give different results."""
    family = FAMILIES[name]
    sizes = {**SIZES, **family.changes} if family.own is None else family.own
    if attention == "flex_attention":  # inductor's kernel for CPUs is wrong for narrow heads
        sizes = {name: 4 * size if name in WIDTHS else size for name, size in sizes.items()}
    config = getattr(transformers, family.config or f"{name}Config")(**sizes)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: nn.Module = _model_class(family, name)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model
