"""The parts of a captured attention, and its description for the op ``radix::tree_attention``."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from radix_compile.analysis.attention.bias import Bias
from radix_compile.analysis.attention.masks import Visible
from radix_compile.analysis.attention.rows import Order, Rows
from radix_compile.analysis.rules.flex import Blocks
from radix_compile.ir.graph import facts
from radix_compile.ir.value import values_of
from radix_compile.torch_internals import val


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an attention.

    ``softcap``  the scores are ``softcap * tanh(scale * product / softcap)``.
    ``sinks``    an extra score for each head, ``[H]``, that belongs to no key.
    ``grouped``  keys may have fewer heads than queries (``enable_gqa``).
    ``product``  the product of queries and keys, if that is a node of its own.
    ``zero``     fully masked rows are zero. (Otherwise they attend to all keys equally, or are NaN.)
    ``masks``    the masks; the formula of the attention (``Weights``) describes them.
    ``biases``   the other terms that are added to the scores.
    ``order``    the order of the result's dimensions, as in :class:`Rows`.
    ``blocks``   the block tables of flex_attention; every call checks that they agree with the mask.
    """

    query: Rows
    key: Rows
    value: Rows
    scale: float
    softcap: float | None = None
    sinks: fx.Node | None = None
    grouped: bool = False
    product: fx.Node | None = None
    zero: bool = False
    masks: tuple[Bias, ...] = ()
    biases: tuple[Bias, ...] = ()
    order: Order = ()
    blocks: Blocks | None = None


@dataclass(frozen=True, slots=True)
class TreeAttention:
    """An attention in terms of ``radix::tree_attention``. Keys and values may have fewer heads than queries.

    ``biases`` are read in full form: the biases of its parts, and masks without a simpler description.
    ``needs_visible_keys`` if it is right only in calls without fully masked rows. ``dtype`` is the dtype of the
    products, which under autocast is not the dtype of their inputs.
    """

    parts: Parts
    visible: Visible
    biases: tuple[Bias, ...]
    needs_visible_keys: bool
    dtype: torch.dtype

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tensors with the dtype, device and last dimension of the op's queries and values."""
        query, value = (
            val(rows.node).new_empty((rows.heads()[1],), dtype=self.dtype)
            for rows in (self.parts.query, self.parts.value)
        )
        return query, value

    @property
    def inputs(self) -> list[fx.Node]:
        """Return the nodes that the op reads in compact form. (Masks are part of the plan.)"""
        parts = self.parts
        nodes = [parts.query.node, parts.key.node, parts.value.node]
        return [*nodes, parts.sinks] if parts.sinks is not None else nodes


def is_attention(node: fx.Node) -> bool:
    """Is the node a causal attention: attention as one op, or the last product of attention in several ops?"""
    return node.op == "call_function" and node.target is not operator.getitem and values_of(node)[0].attends is not None


def attention_steps(node: fx.Node) -> list[fx.Node]:
    """Return the products that attention on the tree replaces: one op, or two products of attention in several ops."""
    parts = facts(node).parts
    return [node, parts.product] if isinstance(parts, Parts) and parts.product is not None else [node]
