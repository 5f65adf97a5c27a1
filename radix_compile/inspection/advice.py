"""What would have to change for a refused op to fold."""

from __future__ import annotations

import re

_ADVICE = (
    (
        r"no rule for this op",
        "If it reads no later token and no other sequence, give it a rule (register_rule, docs/add-an-op.md).",
    ),
    (r"dropout", "Put the model in evaluation mode (model.eval()), or set its dropout to 0 for training."),
    (
        r"bidirectional",
        "If it is meant to be causal, pass is_causal=True or a causal mask. Behind one that is not, nothing folds.",
    ),
    (
        r"without a mask that is understood|mask is not understood|is finite and is added",
        "Mask with minus infinity or the lowest number of the dtype, and make the mask of positions (k <= q), padding"
        " and windows, in forward: of buffers only plain triangles are read.",
    ),
    (
        r"lets a token see later ones",
        "Pass is_causal=True, or make a mask in forward that implies k <= q: of buffers only plain triangles are read.",
    ),
    (
        r"tells? sequences apart|lines up with the batch|combines different sequences|the batch axis",
        "Make what is mixed into the batch the same for all sequences, or do it after the model's token-wise part.",
    ),
    (r"differs? from row to row|whose? index", "Use the same weights for every row, or gather them by a known op."),
    (
        r"cache that is filled",
        "Send prompts in one call: with use_cache=True a first call folds, steps of decoding do not.",
    ),
    (r"no token ids", "Compile the whole model, from its embedding on, not a part behind it."),
    (r"embedded input has a gradient", "Pass input_ids instead of inputs_embeds, or run under torch.no_grad()."),
    (
        r"autograd.Function|made of several tensors",
        "Run under torch.no_grad(), or use the op without a gradient of its own.",
    ),
    (r"vmap|block mask", "Make the block mask outside of the compiled function, and pass it in."),
    (r"fastpath", "torch.backends.mha.set_fastpath_enabled(False) before compiling."),
    (r"is a symbol", "Compile without dynamic=True, or mark only the batch and the sequence as dynamic."),
    (
        r"sequence axis|along the sequence|over the rows of a sequence|cuts through a token axis",
        "Move it behind the model (pooling, picking the last token), or write it as attention, a running sum or a"
        " convolution that reads earlier tokens only.",
    ),
    (r"one sequence|one token", "Send several sequences that share prefixes in one batch."),
)


def advice_on(reason: str) -> str:
    """What to do about a refusal, by its reason; what there is to do about any, if nothing else is known."""
    for pattern, advice in _ADVICE:
        if re.search(pattern, reason):
            return advice
    return "If equal prefixes do give equal values here, it is a rule that is missing: please report it."
