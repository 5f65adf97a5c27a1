"""Samples of reductions."""

from __future__ import annotations

import torch

from radix_compile.testing import Sample, arranged, compact, constant, full, pair, refused
from radix_compile.testing.recorder import FEATURES, HEADS, SEQ
from radix_compile.torch_internals import OpOverload
from tests.analysis.rules.samples.experts import experts
from tests.analysis.rules.samples.patterns import (
    LOWEST,
    SORTED,
    centred,
    first_of,
    of_masked,
    over_features,
    reducing,
    reducing_all,
    reducing_to_two,
    reducing_truth,
    second_of,
    sinks,
    sorted_ties,
    weighted,
    which_key,
    with_sinks,
)

aten = torch.ops.aten

REDUCTIONS: dict[OpOverload | str, list[Sample]] = {
    aten.mean.dim: reducing([2], [1], [0]),
    aten.sum.dim_IntList: reducing([-1], [-2], [0, 1]),
    aten.amax.default: [
        *reducing([-1], [-2], [0]),
        full(of_masked(-1)),
        full(sinks()),
        full(sinks(LOWEST)),
        refused("lets a token see later ones", of_masked(-1, bound=1)),
        refused("lets a token see later ones", of_masked(-2)),
        refused("without keepdim", of_masked(-1, keep=False)),
        refused("reduces over the sequence", lambda t, op: t(op, t.scores, [-1], True)),
    ],
    aten.amin.default: reducing([-1], [-2], [0]),
    aten.max.dim: [*reducing_to_two(2, 1), full(sinks(LOWEST, aten.max.dim)), refused("index of the key", which_key)],
    aten.min.dim: reducing_to_two(2, 1),
    aten.argmax.default: [*reducing(2, 1, 0), refused("reduces over", over_features(None))],
    aten.argmin.default: [*reducing(2, 1, 0), refused("reduces over", over_features(None))],
    aten.any.dim: reducing_truth(-1, 1),
    aten.all.dim: reducing_truth(-1, 1),
    aten.prod.dim_int: reducing(2, 1, 0),
    aten.logsumexp.default: reducing([2], [1], [0]),
    aten.var.correction: [compact(over_features([2])), refused("the sequence", over_features([1]))],
    aten.std.correction: [compact(over_features([2])), refused("the batch", over_features([0, 2]))],
    aten.linalg_vector_norm.default: [
        compact(over_features(2, [-1], True)),
        refused("the sequence", over_features(2, [1])),
        refused("reduces over", over_features()),
    ],
    aten.norm.ScalarOpt_dim: [compact(over_features(2, [-1], True)), refused("the sequence", over_features(2, [1]))],
    aten.mean.default: reducing_all(),
    aten.sum.default: reducing_all(),
    aten.max.default: reducing_all(),
    aten.min.default: reducing_all(),
    aten.any.default: reducing_all(),
    aten.all.default: reducing_all(),
    aten.log_softmax.int: [compact(over_features(-1)), refused("reads along the sequence", over_features(1))],
    aten.sort.default: SORTED,
    aten.sort.stable: [
        compact(lambda t, op: t.item(t(op, t.x, stable=True), 1)),
        constant(sorted_ties),
        refused("sorts along the sequence", lambda t, op: t.item(t(op, t.x, stable=True, dim=1), 0)),
    ],
    aten.topk.default: [
        compact(first_of(2)),
        compact(second_of(2)),
        refused("reads along the sequence", first_of(2, 1)),
    ],
    aten.argsort.default: [
        compact(over_features(-1)),
        arranged(experts(place="argsort")),
        refused("sorts along the sequence", over_features(1)),
        refused("computes with the order", experts(place="argsort, descending")),
    ],
    aten.softmax.int: [
        compact(over_features(-1)),
        pair(lambda t, op: t(op, t.masked(t.causal), -1)),
        pair(lambda t, op: t(op, t.masked(t.causal, LOWEST), -1)),
        pair(sinks()),
        pair(sinks(LOWEST)),
        pair(lambda t, op: weighted(t, t(op, with_sinks(t, t.masked(t.causal, LOWEST)), -1))),
        refused(
            "as large as it",  # what was far below zero need not be when zero has moved
            lambda t, op: t(op, t(aten.add.Tensor, centred(t, t.masked(t.causal, LOWEST)), t.square), -1),
        ),
        refused(
            "without a mask",
            lambda t, op: t(
                op,
                t(aten.sub.Tensor, t.masked(t.causal), t(aten.amax.default, t.masked(t.causal, LOWEST), [-1], True)),
                -1,
            ),
        ),
        refused("normalises over the sequence", over_features(1)),
        refused("without a mask", lambda t, op: t(op, t.scores, -1)),
        refused("lets a token see later ones", lambda t, op: t(op, t.masked(t.key_minus_query_at_most(1)), -1)),
        refused("lets a token see later ones", lambda t, op: t(op, t.masked(t.causal), -2)),
        refused("without a mask", lambda t, op: t(op, t.masked(t.causal, -50.0), -1)),
        refused("without a mask", lambda t, op: t(op, t.masked(t.causal, -1e9), -1)),
        refused(
            "as large as it",
            lambda t, op: t(op, t(aten.add.Tensor, t.masked(t.causal, LOWEST), t.square), -1),
        ),
    ],
    aten._softmax.default: [
        compact(over_features(-1, False)),
        pair(lambda t, op: t(op, t.masked(t.causal), -1, False)),
        refused("normalises over the sequence", over_features(1, False)),
    ],
    aten.layer_norm.default: [
        compact(lambda t, op: t(op, t.x, [FEATURES], t.bias, t.bias)),
        constant(
            lambda t, op: t(
                aten.add.Tensor,
                t.x,
                t(
                    aten.unsqueeze.default,
                    t(op, t(aten.ones.default, [SEQ], dtype=torch.float64), [SEQ], t.bias, t.bias),
                    1,
                ),
            )
        ),
        refused("normalises over the sequence", lambda t, op: t(op, t.x, [SEQ, FEATURES])),
        refused("normalises over the sequence", lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), [SEQ])),
    ],
    aten.native_layer_norm.default: [
        compact(lambda t, op: t.item(t(op, t.x, [FEATURES], t.bias, t.bias, 1e-5), 0)),
        compact(lambda t, op: t.item(t(op, t.wide, [HEADS, SEQ], None, None, 1e-5), 1)),
        refused("normalises over", lambda t, op: t.item(t(op, t.x, [SEQ, FEATURES], None, None, 1e-5), 0)),
    ],
    aten.rms_norm.default: [
        compact(lambda t, op: t(op, t.x, [FEATURES], t.bias, 1e-6)),
        refused("normalises over", lambda t, op: t(op, t.x, [SEQ, FEATURES])),
    ],
}
