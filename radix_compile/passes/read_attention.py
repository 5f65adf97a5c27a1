"""Recognise attention that is written as matrix product, mask, softmax and matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """Set the :class:`Parts` of each product of weights and values, or :class:`Declined` if it is not recognised.

    Needs ``mark_token_axes``, which has the formulas of the masks.
    """
    for node in gm.graph.nodes:
        if is_attention(node) and node.target is not aten.scaled_dot_product_attention.default:
            parts: Parts | Declined
            try:
                parts = _parts(node)
            except NotOnTree as error:
                parts = Declined(str(error))
            set_facts(node, replace(facts(node), parts=parts))


def _parts(node: fx.Node) -> Parts:
    if node.target is FLEX:
        return _flex_parts(node)
    weights, values, order = weights_and_values(node)
    softmax, is_sliced = _softmax(weights)
    attends = value_of(node).attends
    assert attends is not None
    scores = _Scores(softmax.args[0], attends.visible)
    if is_sliced != (scores.sinks is not None):
        raise NotOnTree("its softmax has entries that are neither keys nor sinks")
    return Parts(
        *queries_and_keys(scores.product),
        values,
        *scores.scaling(),
        scores.sinks,
        product=scores.product,
        zero=is_sliced,
        masks=tuple(scores.masks),
        biases=tuple(scores.biases),
        order=order,
    )


def _flex_parts(node: fx.Node) -> Parts:
    """Return the parts of flex_attention, whose functions ``inline_flex_functions`` has inlined."""
    if any(user.args[1] != 0 for user in node.users):
        raise NotOnTree("its log-sum-exp is read")
    flex = arguments_of(node)
    scores = _Scores(inlined(node)[1], mask_of(node))
    scale, softcap = scores.scaling()
    scale *= flex.scale
    return Parts(
        Rows(flex.query),
        Rows(flex.key),
        Rows(flex.value),
        scale,
        softcap,
        grouped=True,
        zero=True,
        biases=tuple(scores.biases),
        blocks=flex.blocks,
    )


def _softmax(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return the softmax that computes the weights, and whether its last entries (sinks) are sliced off."""
    is_sliced = False
    while node.target is not aten.softmax.int:
        if node.target is aten.slice.Tensor and not is_sliced:
            is_sliced = True  # mark_token_axes has proved that the remaining entries are those of the keys
        elif not val(node).is_floating_point() or not (info_of(node.target).keeps_order or _is_no_dropout(node)):
            raise NotOnTree(f"its weights go through {node.target}")
        (node, *_) = node.all_input_nodes
    if argument(node, "dim") not in (-1, val(node).ndim - 1):
        raise NotOnTree("its softmax is not over the last dimension")
    return node, is_sliced


def _is_no_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and (argument(node, "train") is False or argument(node, "p") == 0)


class _Scores:
    """The scores of an attention, read from the softmax back to the product of queries and keys.

    A mask is read as a mask only if the weights hide all that it hides (``visible``). They need not: after a soft cap,
    or a small scale, a score that was hidden is an ordinary one.
    """

    def __init__(self, node: Any, visible: Formula) -> None:
        self.visible_terms = set(terms_of(visible))
        self.outer = self.inner = 1.0
        self.is_capped = False
        self.sinks: fx.Node | None = None
        self.masks: list[Bias] = []
        self.biases: list[Bias] = []
        while not is_product_of_scores(node):
            node = self._read_op(node)
        self.product: fx.Node = node
        if node.target is aten.baddbmm.default:
            if beta := float(argument(node, "beta")):
                self._add(argument(node, "self"), node, beta)
            self._scale(float(argument(node, "alpha")))

    def scaling(self) -> tuple[float, float | None]:
        """Return ``scale`` and ``softcap`` of :class:`Parts`."""
        return (self.outer * self.inner, self.outer) if self.is_capped else (self.outer, None)

    def _read_op(self, node: fx.Node) -> fx.Node:
        """Record one op on the scores, and return the scores that it reads."""
        target, args = node.target, node.args
        dtype = val(node).dtype

        def is_floor(operand: Any) -> bool:
            return is_hidden(fact_of(operand), dtype)

        if info_of(target).keeps_order and dtype.is_floating_point:
            return node.all_input_nodes[0]
        if target is aten.cat.default and self.sinks is None:
            if self.outer != 1 or self.is_capped or self.masks or self.biases:
                raise NotOnTree("its sinks are scaled, capped, masked or biased")
            scores, *sinks = argument(node, "tensors")  # mark_token_axes has proved that the scores of keys are first
            self.sinks = _sinks_by_head(*sinks)
            return scores  # type: ignore[no-any-return]
        if target is aten.sub.Tensor and isinstance(fact := fact_of(args[1]), RowMax) and fact.of is args[0]:
            if self.sinks is not None or self.is_capped:  # then the maximum does not cancel in the softmax
                raise NotOnTree("the row maximum is subtracted from its scores before sinks or a soft cap")
            return args[0]
        if target is aten.tanh.default and not self.is_capped:
            self.is_capped = True
            return args[0]  # type: ignore[return-value]
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and is_hidden(fact_of(args[2]), dtype):
            self._check_mask(node)
            self.masks.append(Bias(args[1], node, hides=True))  # type: ignore[arg-type]
            return args[0]  # type: ignore[return-value]
        if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            self._check_mask(node)
            scores = _scores_operand(args[1], args[2], is_floor, "chooses between two scores")
            self.masks.append(Bias(args[0], node, hides=scores is args[2]))  # type: ignore[arg-type]
            return scores
        if target in (aten.maximum.default, aten.max.other):
            return _scores_operand(args[0], args[1], is_floor, "bounds its scores from below")
        if target is aten.add.Tensor and argument(node, "alpha") == 1:
            self._check_mask(node)
            scores = _scores_operand(args[0], args[1], _has_no_product, "adds one product to another")
            bias = args[1] if scores is args[0] else args[0]
            if not isinstance(bias, fx.Node):
                raise NotOnTree("it adds a number to its scores")
            self._add(bias, node)
            return scores
        if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            return self._read_scale(node)
        raise NotOnTree(f"its scores go through {target}")

    def _add(self, node: fx.Node, scores: fx.Node, factor: float = 1.0) -> None:
        bias = Bias(node, scores, self.outer * factor)
        if _is_mask(node) and self._stays_hidden(fact_of(node)):
            self.masks.append(bias)
        elif self.is_capped:
            raise NotOnTree("it adds a bias under a soft cap")
        else:
            self.biases.append(bias)

    def _scale(self, factor: float) -> None:
        if not 0 < factor < math.inf:
            raise NotOnTree("it multiplies its scores by a number that is not positive")
        if self.is_capped:
            self.inner *= factor
        else:
            self.outer *= factor

    def _stays_hidden(self, fact: Fact | None) -> bool:
        """Whether the weights hide all that a mask hides."""
        if not isinstance(fact, Masked):
            return False
        return all(term in self.visible_terms and is_known(term) for term in terms_of(fact.visible))

    def _check_mask(self, node: fx.Node) -> None:
        fact = fact_of(node)
        if isinstance(fact, Masked) and not self._stays_hidden(fact):
            raise NotOnTree("a later op may show what its mask hides")
        if not isinstance(fact, Masked) and node.target is not aten.add.Tensor:
            raise NotOnTree("its mask is not understood")

    def _read_scale(self, node: fx.Node) -> fx.Node:
        scores, factor = node.args[:2]
        if isinstance(fact_of(scores), Filled):
            scores, factor = factor, scores
        number = fact_of(factor)
        divides = node.target in (aten.div.Tensor, aten.div.Scalar)
        if not isinstance(number, Filled) or not number.value or not isinstance(scores, fx.Node):
            raise NotOnTree("it multiplies its scores by a tensor, or by zero")
        if divides and scores is not node.args[0]:
            raise NotOnTree("it divides by its scores")
        self._scale(1 / number.value if divides else number.value)
        return scores


def _scores_operand(first: Any, second: Any, is_other: Callable[[Any], bool], otherwise: str) -> fx.Node:
    """Return the scores, if the other operand fulfils ``is_other``. Raises :class:`NotOnTree` with ``otherwise``."""
    for other, scores in ((first, second), (second, first)):
        if is_other(other) and isinstance(scores, fx.Node):
            return scores
    raise NotOnTree(f"it {otherwise}")


def _has_no_product(operand: Any) -> bool:
    """Whether an operand is computed without a matrix product, so that it is not the scores."""
    return not isinstance(operand, fx.Node) or not any(map(flops, upstream(operand)))


def _is_mask(operand: Any) -> bool:
    fact = fact_of(operand)
    return isinstance(fact, Masked) and fact.zero


def _sinks_by_head(node: fx.Node) -> fx.Node:
    """Return the sinks ``[H]`` that are expanded to ``node``, ``[..., H, S, 1]``."""
    axes = value_of(node).axes
    while info_of(node.target).keeps_order:
        node = node.all_input_nodes[0]
    (size, *other_sizes), head_axis = shape_of(node) or (0,), axes[-3] if len(axes) > 2 else ()
    other_atoms = [atom for dim, axis in enumerate(axes) if dim != len(axes) - 3 for atom in axis]
    is_by_head = head_axis == (Feature(size),) and all(isinstance(atom, Uniform) for atom in other_atoms)
    if other_sizes or not is_by_head:
        raise NotOnTree("its sinks are not one number for each head")
    return node
