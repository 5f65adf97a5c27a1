"""flex_attention: a mask in two parts, a predicate on pairs and a table of blocks.

In the blocks that the table lists as partial the predicate hides pairs; in full ones nothing is hidden, and blocks
that are not listed are. The predicate is read as any mask is. The tables are inputs: two rows see the same keys if
their tables say the same, so what those say is part of the rows' keys, and each call checks that no full block is
above the diagonal (:func:`listed_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from radix_compile.mask_facts import Formula, Given, Weights, disjunction, hides, implies_causal
from radix_compile.op_rules.masks import as_formula
from radix_compile.op_rules.table import is_tensor
from radix_compile.row_contents import RunsPlain
from radix_compile.token_axes import BATCH, SEQ, Layout, Marks, Mixes, Value, has_tokens, value_of

FLEX = torch.ops.higher_order.flex_attention


class Flex(NamedTuple):
    """The arguments of a flex_attention: ``blocks`` are its tables of blocks."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    score_mod: fx.Node
    mask_mod: fx.Node
    blocks: Blocks
    score_buffers: Sequence[fx.Node]
    mask_buffers: Sequence[fx.Node]


@dataclass(frozen=True)
class Blocks:
    """Tables ``[B or 1, H or 1, query blocks(, key blocks)]``: how many key blocks are listed, and which.

    ``full`` are those in which nothing is hidden, if there may be any.
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
    query, key, value, score_mod, mask, _, _, *buffers = arguments
    _, _, count, index, full_count, full_index, *_, query_size, key_size, mask_mod = mask
    score_buffers, mask_buffers = (*buffers, (), ())[:2]
    full = None if full_count is None else (full_count, full_index)
    blocks = Blocks((count, index), full, query_size, key_size)
    return Flex(query, key, value, score_mod, mask_mod, blocks, score_buffers, mask_buffers)


def flex_attention(node: fx.Node, layout: Layout) -> Marks:
    found = arguments_of(node)
    q, k, v = (value_of(one) for one in (found.query, found.key, found.value))
    for what, source in (("query", q), ("key", k), ("value", v)):
        batch = (BATCH,) if layout.batch != 1 else ()
        if not source.is_row or source.axes[0] != batch or source.axes[2] != (SEQ,):
            raise Mixes(f"the {what} of attention does not have one vector for each row")
        if has_tokens(source.axes[1]) or has_tokens(source.axes[3]):
            raise Mixes(f"the {what} of attention does not have one vector for each row")
    if any(table.op != "placeholder" for table in found.blocks.tables):
        raise Mixes("the block mask is made in the graph: make it outside of the compiled function")
    visible = _visible(node)
    if found.blocks.full is not None:
        visible = disjunction(visible, Given(found.blocks.full[1], -2, -1))
    if not implies_causal(visible, -2, -1):
        raise Mixes("the mask_mod lets a token see later ones (or is not understood)")
    buffers = [value_of(one) for one in (*found.score_buffers, *found.mask_buffers) if is_tensor(one)]
    for source in (k, v, *buffers):
        if not all(hides(visible, blind, -1) for blind in source.blind):
            raise Mixes("a row that sees no key in an earlier layer is seen by others here")
    # A row that sees no key is zero, whatever the others are.
    weights = Weights(visible, -2, -1)
    result = Value((*q.axes[:3], v.axes[3]), full_only=True, attends=weights)
    statistics = Value(q.axes[:3], full_only=True)
    return (result, *(statistics for _ in node.meta["val"][1:]))


def _visible(node: fx.Node) -> Formula:
    """What ``mask_mod`` shows, if ``score_mod`` makes scores out of scores."""
    mask, scores = value_of(node.meta["visible"]), value_of(node.meta["scores"])
    for what, value in (("mask_mod", mask), ("score_mod", scores)):
        if value.mixed is not None:
            raise Mixes(f"the {what} {value.mixed.reason}")
    if not scores.is_pair:
        raise Mixes("the score_mod is not understood")
    return as_formula(mask)


# ----------------------------------------------------------------------------------------------------- in every call


@dataclass(frozen=True)
class BlockTables:
    """Where in a call's inputs the tables are: see :class:`Blocks`."""

    partial: tuple[int, int]
    full: tuple[int, int] | None
    query_size: int
    key_size: int


def listed_blocks(tables: BlockTables, args: Sequence[Any], shape: tuple[int, int]) -> NDArray[np.int64] | None:
    """Numbers ``[B, S]``, equal for rows whose tables list the same blocks; None if one table is for all sequences.

    Raises :class:`RunsPlain` if a block that is listed as full has a key behind one of its queries.
    """
    listed = [_listed(args[count], args[index]) for count, index in filter(None, (tables.partial, tables.full))]
    if tables.full is not None:
        full = listed[-1]
        last = (full + 1) * tables.key_size - 1
        first = np.arange(full.shape[2])[None, None, :, None] * tables.query_size
        if ((full >= 0) & (last > first)).any():
            raise RunsPlain("a block that flex_attention's block mask lists as full has keys behind its queries")
    if all(one.shape[0] == 1 for one in listed):
        return None
    batch, seq = shape
    blocks = max(one.shape[2] for one in listed)
    rows = [np.broadcast_to(one, (batch, *one.shape[1:])).swapaxes(1, 2).reshape(batch, blocks, -1) for one in listed]
    _, numbers = np.unique(np.concatenate(rows, -1).reshape(batch * blocks, -1), axis=0, return_inverse=True)
    column = np.arange(seq) // tables.query_size
    result: NDArray[np.int64] = numbers.astype(np.int64).reshape(batch, blocks)[:, column]
    return result


def _listed(count: torch.Tensor, index: torch.Tensor) -> NDArray[np.int64]:
    """The listed key blocks of each query block, and -1 behind them."""
    blocks = index.numpy(force=True).astype(np.int64)
    place = np.arange(blocks.shape[-1])
    return np.where(place < count.numpy(force=True)[..., None], blocks, -1)
