"""Advice: the change that would let a refused op, or a graph, fold."""

from __future__ import annotations

from radix_compile.ir.errors import RefusalCode
from radix_compile.passes.report import GraphReport

_MASK_OUT_OF_GRAPH = "Make the block mask outside of the compiled function, and pass it in."

ADVICE = {
    RefusalCode.NO_RULE: (
        "If it reads no later token and no other sequence, give it a rule (register_rule, docs/add-an-op.md)."
    ),
    RefusalCode.CUSTOM_RULE: (
        "If equal prefixes do give equal values here, mend the rule that was given to it (docs/add-an-op.md)."
    ),
    RefusalCode.MIXES_TOKENS: (
        "Move it behind the model (pooling, picking the last token), or write it as attention, a running sum or a"
        " convolution that reads earlier tokens only."
    ),
    RefusalCode.MIXES_SEQUENCES: (
        "Make what is mixed into the batch the same for all sequences, or do it after the model's token-wise part."
    ),
    RefusalCode.DIFFERS_BY_ROW: "Use the same weights for every row, or gather them by a known op.",
    RefusalCode.DROPOUT: "Put the model in evaluation mode (model.eval()), or set its dropout to 0 for training.",
    RefusalCode.BIDIRECTIONAL: (
        "If it is meant to be causal, pass is_causal=True or a causal mask. Behind one that is not, nothing folds."
    ),
    RefusalCode.MASK_NOT_CAUSAL: (
        "Pass is_causal=True, or make a mask in forward that implies k <= q: of buffers only plain triangles are read."
    ),
    RefusalCode.MASK_NOT_UNDERSTOOD: (
        "Mask with minus infinity or the lowest number of the dtype, and make the mask of positions (k <= q), padding"
        " and windows, in forward: of buffers only plain triangles are read."
    ),
    RefusalCode.FUSED_LAYER: "torch.backends.mha.set_fastpath_enabled(False) before compiling.",
    RefusalCode.BLOCK_MASK_IN_GRAPH: _MASK_OUT_OF_GRAPH,
    RefusalCode.FILLED_CACHE: (
        "Send prompts in one call: with use_cache=True a first call folds, steps of decoding do not."
    ),
    RefusalCode.SWITCHED_OFF: 'Set fold="auto" (the default), or "always".',
    RefusalCode.NOTHING_TO_SHARE: "Send several sequences that share prefixes in one batch.",
    RefusalCode.NO_TOKEN_IDS: (
        "Compile the whole model, from its embedding on, not a part behind it, with token ids [batch, sequence]."
    ),
    RefusalCode.EMBEDDINGS_WITH_GRADIENT: "Pass input_ids instead of inputs_embeds, or run under torch.no_grad().",
    RefusalCode.SYMBOLIC_SIZE: "Compile without dynamic=True, or mark only the batch and the sequence as dynamic.",
    RefusalCode.TORCH_FUNC: _MASK_OUT_OF_GRAPH,
    RefusalCode.UNSUPPORTED_GRADIENT: "Run under torch.no_grad(), or use the op without a gradient of its own.",
    RefusalCode.INTERNAL_ERROR: "It is a mistake in radix_compile, not in the model: please report it.",
}
"""By the code of a refusal or of a graph's verdict."""


def advice_on(code: RefusalCode) -> str:
    """Advice on a refusal, or the advice that fits any."""
    return ADVICE.get(
        code, "If equal prefixes do give equal values here, it is a rule that is missing: please report it."
    )


def advice_on_graph(report: GraphReport) -> str:
    """Advice on a graph that does not fold, where its refusals have none; empty if there is none."""
    if report.code is None or any(refusal.code is report.code for refusal in report.refusals):
        return ""
    return ADVICE.get(report.code, "")
