"""The parts of an attention, and those that the op ``radix::tree_attention`` carries over."""

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
    ``sinks``    one more score for each head, ``[H]``.
    ``grouped``  keys may have fewer heads than queries in a dimension of heads of the same rank.
    ``product``  that of queries and keys, if it is an op of its own.
    ``zero``     a row that sees no key is zero. (Written out, it attends to all keys alike, or is not a number.)
    ``masks``    what hides keys, of which the formula of the attention (``Weights``) says the same.
    ``biases``   what is added to the scores besides.
    ``order``    of the result's dimensions, as that of :class:`Rows`.
    ``blocks``   the tables of blocks of flex_attention: that they say what its mask does is seen in every call.
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

    ``biases`` are read in full form: those of its parts, and its masks where nothing simpler can be said of them.
    ``needs_visible_keys`` if it is right only in calls in which every row sees a key. ``dtype`` is that of its
    products: under autocast not that of what they read.
    """

    parts: Parts
    visible: Visible
    biases: tuple[Bias, ...]
    needs_visible_keys: bool
    dtype: torch.dtype

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As queries and values that the op will be given, but for all dimensions except the last."""
        query, value = (
            val(rows.node).new_empty((rows.heads()[1],), dtype=self.dtype)
            for rows in (self.parts.query, self.parts.value)
        )
        return query, value

    @property
    def inputs(self) -> list[fx.Node]:
        """All that the op reads in compact form: no mask, and what hides keys is in the plan."""
        parts = self.parts
        nodes = [parts.query.node, parts.key.node, parts.value.node]
        return [*nodes, parts.sinks] if parts.sinks is not None else nodes


def is_attention(node: fx.Node) -> bool:
    """Does it attend, causally: attention as one op, or the last product of attention written out?"""
    return node.op == "call_function" and node.target is not operator.getitem and values_of(node)[0].attends is not None


def attention_steps(node: fx.Node) -> list[fx.Node]:
    """The products that an attention on the tree stands for: one op, or the two of attention written out."""
    parts = facts(node).parts
    return [node, parts.product] if isinstance(parts, Parts) and parts.product is not None else [node]
