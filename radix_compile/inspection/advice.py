"""The advice for each kind of refusal: what the user can change so that the op or the graph folds."""

from __future__ import annotations

from radix_compile.ir.errors import RefusalCode
from radix_compile.passes.report import GraphReport

_MASK_OUT_OF_GRAPH = "Create the block mask outside the compiled function, and pass it as an argument."
_TRIANGLES_ONLY = "(a mask in a buffer is only understood if it is a plain triangle)"

ADVICE = {
    RefusalCode.NO_RULE: (
        "If this op reads no later token and no other sequence, register a rule for it (register_rule,"
        " docs/add-an-op.md)."
    ),
    RefusalCode.CUSTOM_RULE: (
        "If equal prefixes give equal values here, correct the rule that was registered for this op"
        " (docs/add-an-op.md)."
    ),
    RefusalCode.MIXES_TOKENS: (
        "Move it behind the model (pooling, picking the last token), or write it as attention, a running sum or a"
        " convolution that reads earlier tokens only."
    ),
    RefusalCode.MIXES_SEQUENCES: (
        "Use a value that is the same for all sequences, or move this op behind the token-wise part of the model."
    ),
    RefusalCode.DIFFERS_BY_ROW: "Use the same weights for every row, or gather them with an op that has a rule.",
    RefusalCode.DROPOUT: "Call model.eval(), or set the dropout to 0 for training.",
    RefusalCode.BIDIRECTIONAL: (
        "If it is meant to be causal, pass is_causal=True or a causal mask. Nothing folds behind bidirectional"
        " attention."
    ),
    RefusalCode.MASK_NOT_CAUSAL: (
        f"Pass is_causal=True, or compute a mask in forward that implies k <= q {_TRIANGLES_ONLY}."
    ),
    RefusalCode.MASK_NOT_UNDERSTOOD: (
        "Mask with minus infinity or the lowest number of the dtype, and compute the mask in forward from positions"
        f" (k <= q), padding and windows {_TRIANGLES_ONLY}."
    ),
    RefusalCode.FUSED_LAYER: "Call torch.backends.mha.set_fastpath_enabled(False) before compiling.",
    RefusalCode.BLOCK_MASK_IN_GRAPH: _MASK_OUT_OF_GRAPH,
    RefusalCode.FILLED_CACHE: (
        "Send whole prompts in one call: with use_cache=True the first call folds, and decoding steps do not."
    ),
    RefusalCode.SWITCHED_OFF: 'Set fold="auto" (the default), or "always".',
    RefusalCode.NOTHING_TO_SHARE: "Send several sequences that share prefixes in one batch.",
    RefusalCode.NO_TOKEN_IDS: (
        "Compile the whole model, including its embedding, and call it with token ids of shape [batch, sequence]."
    ),
    RefusalCode.EMBEDDINGS_WITH_GRADIENT: "Pass input_ids instead of inputs_embeds, or run under torch.no_grad().",
    RefusalCode.SYMBOLIC_SIZE: "Compile without dynamic=True, or mark only the batch and the sequence as dynamic.",
    RefusalCode.TORCH_FUNC: _MASK_OUT_OF_GRAPH,
    RefusalCode.UNSUPPORTED_GRADIENT: "Run under torch.no_grad(), or avoid the op with a custom gradient.",
    RefusalCode.INTERNAL_ERROR: "This is a bug in radix_compile, not in the model: please report it.",
}
"""The advice by the code of a refusal, or of a graph that does not fold."""


def advice_on(code: RefusalCode) -> str:
    """Return the advice on a refusal, or a general one if there is none for its code."""
    return ADVICE.get(code, "If equal prefixes give equal values here, a rule is missing: please report it.")


def advice_on_graph(report: GraphReport) -> str:
    """Return the advice on a graph that does not fold; empty if a refusal of it has the advice, or there is none."""
    if report.code is None or any(refusal.code is report.code for refusal in report.refusals):
        return ""
    return ADVICE.get(report.code, "")
