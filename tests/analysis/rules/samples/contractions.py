"""Samples of contractions."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, compact, constant, full, pair, refused
from radix_compile.testing.recorder import BATCH, HEADS, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.patterns import (
    MERGED,
    additive,
    attention,
    biased_by_mask,
    columns_weights,
    grouped_attention,
    grouped_over_sequences,
    head_weights,
    heads_bias,
    merged_heads,
    over_features,
    padded,
    repeated_weight,
    rolled,
)

aten = torch.ops.aten

CONTRACTIONS: dict[OpOverload | str, list[Sample]] = {
    aten.linear.default: [
        compact(lambda t, op: t(op, t.x, t.weight, t.bias)),
        compact(lambda t, op: t(op, t.wide, t.square)),
        constant(  # equal weights, but a bias that is not: transposed, it lines up with the columns
            lambda t, op: t(
                aten.add.Tensor,
                t.x,
                t(aten.t.default, t(op, t.square, t(aten.ones.default, [SEQ, SEQ], dtype=torch.float64), t.bias)),
            )
        ),
        refused("contracts the sequence", lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), t.weight)),
        refused(
            "contracts the batch",
            lambda t, op: t(op, t(aten.permute.default, t.x, [1, 2, 0]), t(aten.view.default, t.sequences, [1, BATCH])),
        ),
        refused("differ from row to row", lambda t, op: t(op, t.weight, t(aten.view.default, t.x, MERGED))),
    ],
    aten.mm.default: [
        compact(lambda t, op: t(op, t(aten.view.default, t.x, MERGED), t.weight)),
        constant(lambda t, op: t(aten.add.Tensor, t.x, t(op, t.square, t.weight))),
        refused(
            "sums over the rows",
            lambda t, op: t(
                op, t(aten.t.default, t(aten.view.default, t.x, MERGED)), t(aten.view.default, t.x, MERGED)
            ),
        ),
    ],
    aten.einsum.default: [
        compact(lambda t, op: t(op, "bsd,ed->bse", [t.x, t.weight])),
        compact(lambda t, op: t(op, "bsi,bsj->bsij", [t.x, t.x])),
        compact(lambda t, op: t(op, "bhse,hef->bhsf", [t.heads, head_weights(t)])),
        compact(lambda t, op: t(op, "bsd,d,bse->bsed", [t.x, t.bias, t.x])),
        compact(lambda t, op: t(op, "bsd->sb", [t.x])),
        pair(lambda t, op: t(op, "bhqe,bhke->bhqk", [t.heads, t.heads])),
        full(lambda t, op: t(op, "bhqk,bkhe->bqhe", [t.weights, t.wide])),
        full(lambda t, op: t(op, "bkhe,bhqk->bqhe", [t.wide, t.weights])),
        full(lambda t, op: t(op, "bhqk,bqhe->bqhe", [t.weights, t.wide])),
        refused("sums over the rows", lambda t, op: t(op, "bsd,bsd->bd", [t.x, t.x])),
        refused("sums over the rows", lambda t, op: t(op, "bhqk,bkhe->bqhe", [t.full_weights, t.wide])),
        refused("other than a value vector", lambda t, op: t(op, "bhqk,bkhe->bkhe", [t.weights, t.wide])),
        refused("other than a value vector", lambda t, op: t(op, "bhqk,bhkj->bhqj", [t.weights, t.scores])),
        refused("sums over the rows", lambda t, op: t(op, "bsd,bsd->sd", [t.x, t.x])),
        refused("different sequences", lambda t, op: t(op, "bsd,ase->bsa", [t.x, t.x])),
        refused("sums over the rows", lambda t, op: t(op, "bsd,bde->bse", [t.x, t.x])),
        refused(
            "table lines up", lambda t, op: t(op, "bsd,bed->bse", [t.x, t(aten.mul.Tensor, t.weight, t.sequences)])
        ),
        refused("table lines up", lambda t, op: t(op, "bsd,sde->bse", [t.x, columns_weights(t)])),
        refused("unsupported equation", lambda t, op: t(op, "...d,ed->...e", [t.x, t.weight])),
        refused("unsupported equation", lambda t, op: t(op, "bsd,ed", [t.x, t.weight])),
    ],
    aten.to.dtype: [
        compact(over_features(torch.float64)),
        refused("no rule", lambda t, op: t(op, rolled(t), torch.float32)),
    ],
    aten.to.dtype_layout: [
        compact(over_features(dtype=torch.float64)),
        refused("no rule", lambda t, op: t(op, rolled(t), dtype=torch.float32)),
    ],
    aten.baddbmm.default: [
        pair(lambda t, op: t(op, t.square, t.x, t(aten.transpose.int, t.x, 1, 2))),
        pair(lambda t, op: t(op, t.x, t.x, t(aten.transpose.int, t.x, 1, 2), beta=0.5, alpha=2)),
        pair(lambda t, op: t(op, t(aten.repeat.default, heads_bias(t), [BATCH, 1, 1]), *merged_heads(t))),
        pair(biased_by_mask),
        refused(
            "table lines up with tokens and something else",
            lambda t, op: t(op, t(aten.repeat_interleave.self_int, heads_bias(t), BATCH, 0), *merged_heads(t)),
        ),
        refused("not a product of queries and keys", lambda t, op: t(op, t.bias, t.x, repeated_weight(t))),
        refused("sums over the rows", lambda t, op: t(op, t.square, t(aten.transpose.int, t.x, 1, 2), t.x)),
        refused("table lines up with the batch", lambda t, op: t(op, t.sequences, t.x, t(aten.mT.default, t.x))),
    ],
    aten.bmm.default: [
        compact(lambda t, op: t(op, t.x, repeated_weight(t))),
        pair(lambda t, op: t(op, t.x, t(aten.transpose.int, t.x, 1, 2))),
        refused("sums over the rows", lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), t.x)),
        refused(
            "table lines up with the batch",
            lambda t, op: t(op, t.x, t(aten.mul.Tensor, t.weight, t.sequences)),
        ),
        refused(
            "lines up with tokens and something else",
            lambda t, op: t(
                op,
                t(aten.reshape.default, t.heads, [BATCH * HEADS, SEQ, SEQ]),
                t(aten.ones.default, [BATCH * HEADS, SEQ, SEQ], dtype=torch.float64),
            ),
        ),
    ],
    aten.matmul.default: [
        compact(lambda t, op: t(op, t.x, t.weight)),
        compact(lambda t, op: t(op, t.x, t.bias)),
        compact(lambda t, op: t(op, t.heads, t.weight)),
        compact(  # weights that differ from column to column
            lambda t, op: t(
                op,
                t(aten.unsqueeze.default, t.x, 2),
                t(aten.mul.Tensor, t.weight, t(aten.unsqueeze.default, t.columns, 1)),
            )
        ),
        pair(lambda t, op: t(op, t.heads, t(aten.transpose.int, t.heads, 2, 3))),
        full(lambda t, op: t(op, t.weights, t.heads)),
        full(lambda t, op: t(op, t(aten.div.Tensor, t.weights, 2.0), t.heads)),
        refused("sums over the rows", lambda t, op: t(op, t.full_weights, t.heads)),
        refused("sums over the rows", lambda t, op: t(op, t(aten.transpose.int, t.weights, 2, 3), t.heads)),
        refused("sums over the rows", lambda t, op: t(op, t.square, t.x)),
        refused("other than a value vector for each row", lambda t, op: t(op, t.weights, t.weights)),
        refused("differs from row to row", lambda t, op: t(op, t.bias, t.x)),
        refused("mean different things", lambda t, op: t(op, t.heads, t(aten.permute.default, t.heads, [1, 0, 3, 2]))),
    ],
    aten.addmm.default: [
        compact(lambda t, op: t(op, t.bias, t(aten.view.default, t.x, MERGED), t.weight)),
        constant(
            lambda t, op: t(
                aten.add.Tensor,
                t.x,
                t(aten.t.default, t(op, t.bias, t.square, t(aten.ones.default, [SEQ, SEQ], dtype=torch.float64))),
            )
        ),
        refused("not a bias", lambda t, op: t(op, t.square, t.weight, t.weight)),
        refused(
            "weights differ",
            lambda t, op: t(
                op, t(aten.select.int, t.bias, 0, 0), t.weight, t(aten.t.default, t(aten.view.default, t.x, MERGED))
            ),
        ),
    ],
    aten.scaled_dot_product_attention.default: [
        full(attention(is_causal=True)),
        full(attention(lambda t: t.causal)),
        full(attention(lambda t: t.key_minus_query_at_most(0), scale=0.3)),
        full(attention(padded)),
        full(attention(additive)),
        full(grouped_attention),
        refused("bidirectional", attention()),
        refused("lets a token see later ones", attention(lambda t: t.key_minus_query_at_most(1))),
        refused("lets a token see later ones", attention(lambda t: t.visible_keys)),
        refused("which rows the mask leaves without a key", attention(lambda t: t.key_minus_query_at_most(-1))),
        refused("not understood", attention(lambda t: t.square)),
        refused("dropout is on", attention(is_causal=True, dropout_p=0.5)),
        refused("groups heads along the batch", grouped_over_sequences),
        refused("does not have one vector for each row", lambda t, op: t(op, t.wide, t.wide, t.wide, is_causal=True)),
    ],
}
