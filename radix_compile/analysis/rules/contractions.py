"""Matrix products: rows times weights (position-wise), queries times keys (scores), attention weights times values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, operand
from radix_compile.analysis.rules.masks import biased_scores
from radix_compile.ir.axes import SEQ, Axes, Layout, Mixes, feature, has_tokens, plain_axes
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Score, Weights, fully_masked_rows, hides
from radix_compile.ir.value import Operand, Value, broadcast, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def constant_weights(*nodes: fx.Node | None) -> None:
    """Raise :class:`Mixes` unless the weights are the same for all rows."""
    for node in nodes:
        if node is not None and not value_of(node).is_constant:
            raise Mixes("the weights differ from row to row", RefusalCode.DIFFERS_BY_ROW)


def linear(node: fx.Node, layout: Layout) -> Value:
    source, weight, bias = argument(node, "input"), argument(node, "weight"), argument(node, "bias")
    constant_weights(weight, bias)
    axes = value_of(source).axes
    feature(axes[-1], "contracts")
    return Value((*axes[:-1], *plain_axes(node)[len(axes) - 1 :]))  # the bias may vary where the weights are uniform


def mm(node: fx.Node, layout: Layout) -> Value:
    return product(node, argument(node, "self"), argument(node, "mat2"), layout)


def bmm(node: fx.Node, layout: Layout) -> Value:
    return product(node, argument(node, "self"), argument(node, "mat2"), layout)


def matmul(node: fx.Node, layout: Layout) -> Value:
    return product(node, argument(node, "self"), argument(node, "other"), layout)


def addmm(node: fx.Node, layout: Layout) -> Value:
    constant_weights(argument(node, "self"), argument(node, "mat2"))
    bias = argument(node, "self")
    if len(value_of(bias).axes) > 1:
        raise Mixes("adds a matrix that is not a bias", RefusalCode.UNSUPPORTED_ARGUMENTS)
    result = product(node, argument(node, "mat1"), argument(node, "mat2"), layout)
    return replace(result, axes=(*result.axes[:-1], *plain_axes(node)[-1:]))  # as in linear


def baddbmm(node: fx.Node, layout: Layout) -> Value:
    """Return the value of scores with a bias, as in ALiBi."""
    bias = argument(node, "self")
    result = product(node, argument(node, "batch1"), argument(node, "batch2"), layout)
    if not result.is_pair:
        raise Mixes("adds to a product that is not a product of queries and keys", RefusalCode.ATTENTION_NOT_UNDERSTOOD)
    axes, uses = broadcast(layout, [Operand(node, result, result.axes), operand(bias)])
    fact = biased_scores(bias, argument(node, "beta"), argument(node, "alpha"), val(node).dtype)
    return Value(axes, fact=fact, operands=(*result.operands, *uses))


def product(node: fx.Node, left: fx.Node, right: fx.Node, layout: Layout) -> Value:
    """Return the value of ``left @ right``, with leading dimensions broadcast."""
    a, b = value_of(left), value_of(right)
    if len(a.axes) < 2 or len(b.axes) < 2:
        return _vector_product(a, b)
    contracted = a.axes[-1], b.axes[-2]
    if SEQ in contracted[0] or SEQ in contracted[1]:
        return _weighted_sum(node, left, right, layout)
    for axis in contracted:
        feature(axis, "contracts")
    # Leading dimensions line up; of the last two, each operand has one.
    sides = [Operand(left, a, (*a.axes[:-2], (), ())), Operand(right, b, (*b.axes[:-2], (), ()))]
    axes, uses = broadcast(layout, sides, exact=node.target in (aten.bmm.default, aten.baddbmm.default))
    result = Value((*axes[:-2], a.axes[-2], b.axes[-1]), operands=uses)
    return result.with_fact(Score()) if result.is_pair else result


def einsum(node: fx.Node, layout: Layout) -> Value:
    """Return the value of an equation: rows times weights, queries times keys, or attention weights times values."""
    tensors = argument(node, "tensors")
    terms, result = labels_of(argument(node, "equation"), len(tensors))
    summed = [label for label in dict.fromkeys("".join(terms)) if label not in result]
    order = [*summed, *result]
    operands = []
    for tensor, term in zip(tensors, terms, strict=True):
        value = value_of(tensor)
        by_label = dict(zip(term, value.axes, strict=True))
        operands.append(Operand(tensor, value, tuple(by_label.get(label, ()) for label in order)))
    axes, uses = broadcast(layout, operands)
    if any(how != "pairs" for _, _, how in uses):
        raise Mixes("a table lines up with tokens in an equation", RefusalCode.UNCLEAR_DIMENSIONS)
    token_sums = [(label, axis) for label, axis in zip(summed, axes, strict=False) if has_tokens(axis)]
    result_axes = axes[len(summed) :]
    if not token_sums:
        value = Value(result_axes, operands=uses)
        return value.with_fact(Score()) if value.is_pair else value
    (label, axis), *others = token_sums
    by_fact = sorted(zip(tensors, terms, strict=True), key=lambda pair: not isinstance(value_of(pair[0]).fact, Weights))
    (weights, term), *rows = by_fact
    fact = value_of(weights).fact
    if others or len(rows) != 1 or axis != (SEQ,) or not isinstance(fact, Weights):
        raise Mixes("sums over the rows of a sequence", RefusalCode.MIXES_TOKENS)
    ((source, _),) = rows
    if term.find(label) - len(term) != fact.key or not value_of(source).is_row:
        raise Mixes(
            "attention weights are multiplied by something other than a value vector for each row",
            RefusalCode.ATTENTION_NOT_UNDERSTOOD,
        )
    return attend(result_axes, fact, value_of(weights), value_of(source))


def labels_of(equation: str, count: int) -> tuple[list[str], str]:
    """Return the labels of the dimensions of each operand of an equation, and of the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or len(terms) != count or any(len(set(term)) < len(term) for term in [*terms, right]):
        raise Mixes(
            "an unsupported equation: with '...', with a label twice, or without '->'",
            RefusalCode.UNSUPPORTED_ARGUMENTS,
        )
    return terms, right


def _vector_product(a: Value, b: Value) -> Value:
    if not b.is_constant:
        raise Mixes("a product with a vector that differs from row to row", RefusalCode.DIFFERS_BY_ROW)
    feature(a.axes[-1], "contracts")
    return Value((*a.axes[:-1], *(b.axes[:-2] + b.axes[-1:] if len(b.axes) > 1 else ())))


def _weighted_sum(node: fx.Node, left: fx.Node, right: fx.Node, layout: Layout) -> Value:
    """Return the value of attention weights times values: a sum over keys, which is causal if the weights are."""
    a, b = value_of(left), value_of(right)
    weights = a.fact
    if not isinstance(weights, Weights) or weights.key != -1 or a.axes[-1] != (SEQ,):
        raise Mixes("sums over the rows of a sequence", RefusalCode.MIXES_TOKENS)
    if b.axes[-2] != (SEQ,) or not b.is_row:
        raise Mixes(
            "attention weights are multiplied by something other than a value vector for each row",
            RefusalCode.ATTENTION_NOT_UNDERSTOOD,
        )
    axes, _ = broadcast(layout, [Operand(left, a, (*a.axes[:-2], (), ())), Operand(right, b, (*b.axes[:-2], (), ()))])
    if has_tokens(b.axes[-1]):
        raise Mixes(
            "attention weights are multiplied by something other than a value vector for each row",
            RefusalCode.ATTENTION_NOT_UNDERSTOOD,
        )
    return attend((*axes[:-2], a.axes[-2], b.axes[-1]), weights, a, b)


def attend(axes: Axes, weights: Weights, *sources: Value) -> Value:
    """Return the value of causal attention: determined except at fully masked rows."""
    fully_masked = fully_masked_rows(weights.visible, weights.query, weights.key)
    for source in sources:
        for earlier in source.fully_masked:
            if not hides(weights.visible, earlier, weights.key):
                raise Mixes(
                    "other rows see a row that is fully masked in an earlier layer", RefusalCode.ROWS_WITHOUT_KEYS
                )
    return Value(
        axes,
        full_only=True,
        fully_masked=frozenset() if fully_masked is None else frozenset({fully_masked}),
        attends=weights,
    )
