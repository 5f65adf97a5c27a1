"""Entries that are computed from those that line up with them; zero times anything reads nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from radix_compile.analysis.arguments import is_tensor, source_of
from radix_compile.analysis.reach.column_reach import NOTHING, Reach, Reaches, reach
from radix_compile.analysis.reach.operands import aligned, latest, zero_products
from radix_compile.torch_internals import val


def elementwise_reach(node: fx.Node, reaches: Reaches) -> Reach:
    operands, batch = aligned([arg for arg in node.all_input_nodes if is_tensor(arg)], reaches)
    return reach(latest([one.last for one in operands]), batch=batch)


def product(node: fx.Node, reaches: Reaches) -> Reach:
    operands, batch = aligned([arg for arg in node.args if is_tensor(arg)], reaches)  # type: ignore[misc]
    return reach(latest([one.last for one in operands]), zero_products(operands), batch)


def quotient(node: fx.Node, reaches: Reaches) -> Reach:
    """Zero where the first operand is."""
    operands, batch = aligned([arg for arg in node.args if is_tensor(arg)], reaches)  # type: ignore[misc]
    first = operands[:1] if is_tensor(node.args[0]) else []
    known = zero_products(first) if first else np.nan
    return reach(latest([one.last for one in operands]), known, batch)


def total(node: fx.Node, reaches: Reaches) -> Reach:
    """Zero where both are."""
    operands, batch = aligned([arg for arg in node.args[:2] if is_tensor(arg)], reaches)  # type: ignore[misc]
    zero = [one.known == 0 for one in operands] + [np.array(arg == 0) for arg in node.args[:2] if not is_tensor(arg)]
    both = np.logical_and(zero[0], zero[-1])
    return reach(latest([one.last for one in operands]), np.where(both, 0.0, np.nan), batch)


def negative(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    return reach(source.last, -source.known, source.batch)


def exp(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    with np.errstate(over="ignore"):
        return reach(source.last, np.exp(source.known), source.batch)


def masked_fill(node: fx.Node, reaches: Reaches) -> Reach:
    source, mask, value = node.args
    return _chosen(mask, value, source, reaches)


def where(node: fx.Node, reaches: Reaches) -> Reach:
    condition, this, other = node.args
    return _chosen(condition, this, other, reaches)


def _chosen(condition: Any, this: Any, other: Any, reaches: Reaches) -> Reach:
    """``this`` where the condition is true, else ``other``: tensors or numbers."""
    tensors = [one for one in (condition, this, other) if is_tensor(one)]
    found, batch = aligned(tensors, reaches)
    by_node = dict(zip(tensors, found, strict=True))
    numbers = [by_node[one] if is_tensor(one) else reach([NOTHING], float(one)) for one in (this, other)]
    chosen = by_node[condition]
    decided = ~np.isnan(chosen.known)
    last = np.where(chosen.known != 0, numbers[0].last, numbers[1].last)
    known = np.where(chosen.known != 0, numbers[0].known, numbers[1].known)
    unsure = latest([chosen.last, *(one.last for one in numbers)])
    return reach(np.where(decided, last, unsure), np.where(decided, known, np.nan), batch)


def same_entries(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    exact = val(node).dtype.is_floating_point or val(node).dtype == val(source_of(node)).dtype
    kept = np.where((source.known == 0) | np.isinf(source.known), source.known, np.nan)  # the others may be rounded
    return reach(source.last, kept if exact else np.nan, source.batch)


def zeros_like(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    return reach(np.full((1,) * source.rank, NOTHING), 0.0, source.batch)
