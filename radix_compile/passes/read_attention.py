"""Read attention that is written out, as a product, a mask, a softmax and another product, as one attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.attention.bias import Bias
from radix_compile.analysis.attention.parts import Parts, is_attention
from radix_compile.analysis.attention.products import is_product_of_scores, queries_and_keys, weights_and_values
from radix_compile.analysis.attention.rows import NotOnTree, Rows
from radix_compile.analysis.flops import flops
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.rules.flex import FLEX, arguments_of, inlined, mask_of
from radix_compile.analysis.rules.masks import fact_of, is_hidden
from radix_compile.ir.axes import Feature, Uniform, shape_of
from radix_compile.ir.errors import Declined
from radix_compile.ir.facts import Fact, Filled, Formula, Masked, RowMax, is_known, terms_of
from radix_compile.ir.graph import facts, set_facts
from radix_compile.ir.source import upstream
from radix_compile.ir.value import value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def read_attention(gm: fx.GraphModule) -> None:
    """State the :class:`Parts` of each product of weights and values, or :class:`Declined` if they cannot be read.

    Needs ``mark_token_axes``, which has found what the masks say.
    """
    for node in gm.graph.nodes:
        if is_attention(node) and node.target is not aten.scaled_dot_product_attention.default:
            parts: Parts | Declined
            try:
                parts = _parts(node)
            except NotOnTree as verdict:
                parts = Declined(str(verdict))
            set_facts(node, replace(facts(node), parts=parts))


def _parts(node: fx.Node) -> Parts:
    if node.target is FLEX:
        return _flex_parts(node)
    weights, values, order = weights_and_values(node)
    softmax, sliced = _softmax(weights)
    attends = value_of(node).attends
    assert attends is not None
    scores = _Scores(softmax.args[0], attends.visible)
    if sliced != (scores.sinks is not None):
        raise NotOnTree("its softmax has entries of no key that are not sinks")
    return Parts(
        *queries_and_keys(scores.product),
        values,
        *scores.scaling(),
        scores.sinks,
        product=scores.product,
        zero=sliced,
        masks=tuple(scores.masks),
        biases=tuple(scores.biases),
        order=order,
    )


def _flex_parts(node: fx.Node) -> Parts:
    """The parts of flex_attention, whose functions ``inline_flex_functions`` has written out on products of queries."""
    if any(user.args[1] != 0 for user in node.users):
        raise NotOnTree("the sums of its weights are read")
    found = arguments_of(node)
    scores = _Scores(inlined(node)[1], mask_of(node))
    scale, softcap = scores.scaling()
    scale *= found.scale
    return Parts(
        Rows(found.query),
        Rows(found.key),
        Rows(found.value),
        scale,
        softcap,
        grouped=True,
        zero=True,
        biases=tuple(scores.biases),
        blocks=found.blocks,
    )


def _softmax(node: fx.Node) -> tuple[fx.Node, bool]:
    """The softmax that the weights come from, and whether its last entries are left out."""
    sliced = False
    while node.target is not aten.softmax.int:
        if node.target is aten.slice.Tensor and not sliced:
            sliced = True  # mark_token_axes has seen that what is left are weights of keys
        elif not val(node).is_floating_point() or not (info_of(node.target).keeps_order or _is_no_dropout(node)):
            raise NotOnTree(f"its weights go through {node.target}")
        (node, *_) = node.all_input_nodes
    if argument(node, "dim") not in (-1, val(node).ndim - 1):
        raise NotOnTree("its softmax is not over the last dimension")
    return node, sliced


def _is_no_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and (argument(node, "train") is False or argument(node, "p") == 0)


class _Scores:
    """Scores, taken apart from the softmax up to the product of queries and keys.

    A mask on the way is left out if what it says is said of the weights too (``visible``). It need not be: a soft cap
    makes a score of what was hidden, and so does a scale that lifts it off the floor.
    """

    def __init__(self, node: Any, visible: Formula) -> None:
        self.said = set(terms_of(visible))
        self.outer = self.inner = 1.0
        self.capped = False
        self.sinks: fx.Node | None = None
        self.masks: list[Bias] = []
        self.biases: list[Bias] = []
        while not is_product_of_scores(node):
            node = self._peeled(node)
        self.product: fx.Node = node
        if node.target is aten.baddbmm.default:
            if beta := float(argument(node, "beta")):
                self._add(argument(node, "self"), node, beta)
            self._scale(float(argument(node, "alpha")))

    def scaling(self) -> tuple[float, float | None]:
        """``scale`` and ``softcap`` of :class:`Parts`."""
        return (self.outer * self.inner, self.outer) if self.capped else (self.outer, None)

    def _peeled(self, node: fx.Node) -> fx.Node:
        target, args = node.target, node.args
        dtype = val(node).dtype
        if info_of(target).keeps_order and dtype.is_floating_point:
            return node.all_input_nodes[0]
        if target is aten.cat.default and self.sinks is None:
            if self.outer != 1 or self.capped or self.masks or self.biases:
                raise NotOnTree("something is done to its sinks")
            scores, *sinks = argument(node, "tensors")  # of which mark_token_axes has seen that those of keys are first
            self.sinks = _by_head(*sinks)
            return scores  # type: ignore[no-any-return]
        if target is aten.sub.Tensor and isinstance(fact := fact_of(args[1]), RowMax) and fact.of is args[0]:
            if self.sinks is not None or self.capped:  # of sinks nothing has been subtracted, and a cap is no sum
                raise NotOnTree("something was subtracted from its scores in front of sinks or a soft cap")
            return args[0]
        if target is aten.tanh.default and not self.capped:
            self.capped = True
            return args[0]  # type: ignore[return-value]
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and is_hidden(fact_of(args[2]), dtype):
            self._expect_said(node)
            self.masks.append(Bias(args[1], node, hides=True))  # type: ignore[arg-type]
            return args[0]  # type: ignore[return-value]
        if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            self._expect_said(node)
            scores = _other(args[1], args[2], lambda one: is_hidden(fact_of(one), dtype), "chooses between two scores")
            self.masks.append(Bias(args[0], node, hides=scores is args[2]))  # type: ignore[arg-type]
            return scores
        if target in (aten.maximum.default, aten.max.other):
            return _other(args[0], args[1], lambda one: is_hidden(fact_of(one), dtype), "bounds its scores from below")
        if target is aten.add.Tensor and argument(node, "alpha") == 1:
            self._expect_said(node)
            scores = _other(args[0], args[1], _has_no_product, "adds one product to another")
            bias = args[1] if scores is args[0] else args[0]
            if not isinstance(bias, fx.Node):
                raise NotOnTree("it adds a number to its scores")
            self._add(bias, node)
            return scores
        if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return self._scaled(node)
        raise NotOnTree(f"its scores go through {target}")

    def _add(self, node: fx.Node, scores: fx.Node, factor: float = 1.0) -> None:
        bias = Bias(node, scores, self.outer * factor)
        if _is_mask(node) and self._is_said(fact_of(node)):
            self.masks.append(bias)
        elif self.capped:
            raise NotOnTree("it adds a bias under a soft cap")
        else:
            self.biases.append(bias)

    def _scale(self, by: float) -> None:
        if not 0 < by < math.inf:
            raise NotOnTree("it multiplies its scores by what is not a positive number")
        if self.capped:
            self.inner *= by
        else:
            self.outer *= by

    def _is_said(self, fact: Fact | None) -> bool:
        """Is all that a mask hides hidden by the weights?"""
        return isinstance(fact, Masked) and all(term in self.said and is_known(term) for term in terms_of(fact.visible))

    def _expect_said(self, node: fx.Node) -> None:
        fact = fact_of(node)
        if isinstance(fact, Masked) and not self._is_said(fact):
            raise NotOnTree("not all that its masks hide stays hidden")
        if not isinstance(fact, Masked) and node.target is not aten.add.Tensor:
            raise NotOnTree("what its masks hide is not understood")

    def _scaled(self, node: fx.Node) -> fx.Node:
        scores, number = node.args[:2]
        if isinstance(fact_of(scores), Filled):
            scores, number = number, scores
        factor = fact_of(number)
        divides = node.target in (aten.div.Tensor, aten.div.Scalar)
        if not isinstance(factor, Filled) or not factor.value or not isinstance(scores, fx.Node):
            raise NotOnTree("it multiplies its scores by what is not a number")
        if divides and scores is not node.args[0]:
            raise NotOnTree("it divides by its scores")
        self._scale(1 / factor.value if divides else factor.value)
        return scores


def _other(one: Any, other: Any, is_ours: Any, what: str) -> fx.Node:
    """The one of two operands that is not about the mask."""
    for mask, scores in ((one, other), (other, one)):
        if is_ours(mask) and isinstance(scores, fx.Node):
            return scores
    raise NotOnTree(f"it {what}")


def _has_no_product(operand: Any) -> bool:
    """Scores have one."""
    return not isinstance(operand, fx.Node) or not any(map(flops, upstream(operand)))


def _is_mask(operand: Any) -> bool:
    fact = fact_of(operand)
    return isinstance(fact, Masked) and fact.zero


def _by_head(node: fx.Node) -> fx.Node:
    """``[H]``, from which a constant ``[..., H, S, 1]`` is expanded."""
    axes = value_of(node).axes
    while info_of(node.target).keeps_order:
        node = node.all_input_nodes[0]
    (size, *more), by_head = shape_of(node) or (0,), axes[-3] if len(axes) > 2 else ()
    alike = [axis for dim, axis in enumerate(axes) if dim != len(axes) - 3]
    if more or by_head != (Feature(size),) or not all(isinstance(atom, Uniform) for axis in alike for atom in axis):
        raise NotOnTree("its sinks are not one number for each head")
    return node
