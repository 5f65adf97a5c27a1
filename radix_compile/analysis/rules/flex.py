"""flex_attention: its mask has two parts, a predicate on pairs and tables of blocks.

In blocks listed as partial the predicate decides which pairs are visible; in blocks listed as full all pairs are
visible; blocks that are not listed are hidden. The predicate is read like any other mask. The tables are inputs, and
part of the row keys, because two rows see the same keys only if their tables agree. Each call checks that no full block
is above the diagonal (``block_tables``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from radix_compile.analysis.arguments import is_tensor, operand
from radix_compile.analysis.rules.masks import as_formula
from radix_compile.ir.axes import BATCH, SEQ, Layout, Mixes, has_tokens
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Formula, Given, Weights, disjunction, hides, implies_causal
from radix_compile.ir.graph import facts
from radix_compile.ir.value import Marks, Value, broadcast, value_of
from radix_compile.torch_internals import val

FLEX = torch.ops.higher_order.flex_attention


class Flex(NamedTuple):
    """The arguments of a flex_attention; ``blocks`` are its block tables."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    score_mod: fx.Node
    mask_mod: fx.Node
    blocks: Blocks
    scale: float
    score_buffers: Sequence[fx.Node]
    mask_buffers: Sequence[fx.Node]


@dataclass(frozen=True)
class Blocks:
    """Block tables: pairs of the number of listed key blocks and their indices.

    The number is ``[B or 1, H or 1, query blocks]``, the indices are ``[B or 1, H or 1, query blocks, key blocks]``.
    ``full`` lists the blocks in which all pairs are visible, None if there are none.
    """

    partial: tuple[fx.Node, fx.Node]
    full: tuple[fx.Node, fx.Node] | None
    query_size: int
    key_size: int

    @property
    def tables(self) -> tuple[fx.Node, ...]:
        return (*self.partial, *(self.full or ()))


def arguments_of(node: fx.Node) -> Flex:
    arguments: tuple[Any, ...] = node.args
    query, key, value, score_mod, mask, scale, _, *buffers = arguments
    _, _, count, index, full_count, full_index, *_, query_size, key_size, mask_mod = mask
    score_buffers, mask_buffers = (*buffers, (), ())[:2]
    full = None if full_count is None else (full_count, full_index)
    blocks = Blocks((count, index), full, query_size, key_size)
    return Flex(query, key, value, score_mod, mask_mod, blocks, scale, score_buffers, mask_buffers)


def flex_attention(node: fx.Node, layout: Layout) -> Marks:
    arguments = arguments_of(node)
    q, k, v = map(value_of, (arguments.query, arguments.key, arguments.value))
    batch = (BATCH,) if layout.batch != 1 else ()
    for name, source in (("query", q), ("key", k), ("value", v)):
        is_by_row = source.is_row and source.axes[0] == batch and source.axes[2] == (SEQ,)
        if not is_by_row or has_tokens(source.axes[1]) or has_tokens(source.axes[3]):
            raise Mixes(
                f"the {name} of attention does not have one vector for each row", RefusalCode.ATTENTION_NOT_UNDERSTOOD
            )
    if any(table.op != "placeholder" for table in arguments.blocks.tables):
        raise Mixes(
            "the block mask is made in the graph: make it outside of the compiled function",
            RefusalCode.BLOCK_MASK_IN_GRAPH,
        )
    if not all(isinstance(size, int) for size in (arguments.blocks.query_size, arguments.blocks.key_size)):
        raise Mixes(
            "the size of the block mask's blocks is a symbol: it is a number without dynamic=True",
            RefusalCode.SYMBOLIC_SIZE,
        )
    visible = _visible(node, layout)
    if arguments.blocks.full is not None:
        visible = disjunction(visible, Given(arguments.blocks.full[1], -2, -1))
    if not implies_causal(visible, -2, -1):
        raise Mixes("the mask_mod lets a token see later ones (or is not understood)", RefusalCode.MASK_NOT_CAUSAL)
    buffers = [arg for arg in (*arguments.score_buffers, *arguments.mask_buffers) if is_tensor(arg)]
    for source in (k, v, *map(value_of, buffers)):
        if not all(hides(visible, fully_masked, -1) for fully_masked in source.fully_masked):
            raise Mixes("other rows see a row that is fully masked in an earlier layer", RefusalCode.ROWS_WITHOUT_KEYS)
    # Fully masked rows are zero, so they are determined.
    weights = Weights(visible, -2, -1)
    result = Value((*q.axes[:3], v.axes[3]), full_only=True, attends=weights)
    statistics = Value(q.axes[:3], full_only=True)
    return (result, *(statistics for _ in val(node)[1:]))


def _visible(node: fx.Node, layout: Layout) -> Formula:
    """Return the formula of the keys that ``mask_mod`` shows. Raises :class:`Mixes` for unsupported functions."""
    mask_node, scores_node = inlined(node)
    mask, scores = value_of(mask_node), value_of(scores_node)
    for name, value in (("mask_mod", mask), ("score_mod", scores)):
        if value.mixed is not None:
            raise Mixes(f"the {name} {value.mixed.reason}", value.mixed.code)
    if not scores.is_pair:
        raise Mixes("the score_mod is not understood", RefusalCode.ATTENTION_NOT_UNDERSTOOD)
    try:
        broadcast(layout, [operand(scores_node), operand(mask_node)])
    except Mixes as verdict:
        raise Mixes(f"the mask_mod {verdict}", verdict.code) from verdict
    return mask_of(node)


def mask_of(node: fx.Node) -> Formula:
    """Return the formula of the keys that the ``mask_mod`` of a flex_attention shows."""
    return as_formula(value_of(inlined(node)[0]))


def inlined(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the nodes with the results of ``mask_mod`` and ``score_mod``. Requires ``inline_flex_functions``."""
    visible, scores = facts(node).visible, facts(node).scores
    assert visible is not None
    assert scores is not None
    return visible, scores
