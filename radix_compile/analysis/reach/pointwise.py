"""Ops whose entries are computed from the entries that line up with them; zero times anything reads no column."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from radix_compile.analysis.arguments import is_tensor, source_of
from radix_compile.analysis.reach.column_reach import NO_COLUMN, Reach, Reaches, reach
from radix_compile.analysis.reach.operands import aligned, latest, zero_products
from radix_compile.torch_internals import val


def elementwise_reach(node: fx.Node, reaches: Reaches) -> Reach:
    operands, batch = aligned([arg for arg in node.all_input_nodes if is_tensor(arg)], reaches)
    return reach(latest([operand.last for operand in operands]), batch=batch)


def product(node: fx.Node, reaches: Reaches) -> Reach:
    operands, batch = aligned([arg for arg in node.args if is_tensor(arg)], reaches)  # type: ignore[misc]
    return reach(latest([operand.last for operand in operands]), zero_products(operands), batch)


def quotient(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of a quotient, which is zero where the dividend is."""
    operands, batch = aligned([arg for arg in node.args if is_tensor(arg)], reaches)  # type: ignore[misc]
    first = operands[:1] if is_tensor(node.args[0]) else []
    known = zero_products(first) if first else np.nan
    return reach(latest([operand.last for operand in operands]), known, batch)


def total(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of a sum or difference, which is zero where both operands are."""
    operands, batch = aligned([arg for arg in node.args[:2] if is_tensor(arg)], reaches)  # type: ignore[misc]
    zero = [operand.known == 0 for operand in operands]
    zero += [np.array(arg == 0) for arg in node.args[:2] if not is_tensor(arg)]
    both = np.logical_and(zero[0], zero[-1])
    return reach(latest([operand.last for operand in operands]), np.where(both, 0.0, np.nan), batch)


def negative(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    return reach(source.last, -source.known, source.batch)


def exp(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    with np.errstate(over="ignore"):
        return reach(source.last, np.exp(source.known), source.batch)


def masked_fill(node: fx.Node, reaches: Reaches) -> Reach:
    source, mask, value = node.args
    return _where(mask, value, source, reaches)


def where(node: fx.Node, reaches: Reaches) -> Reach:
    condition, if_true, if_false = node.args
    return _where(condition, if_true, if_false, reaches)


def _where(condition: Any, if_true: Any, if_false: Any, reaches: Reaches) -> Reach:
    """Return the reach of ``torch.where``, whose choices may be tensors or numbers."""
    tensors = [arg for arg in (condition, if_true, if_false) if is_tensor(arg)]
    operands, batch = aligned(tensors, reaches)
    by_node = dict(zip(tensors, operands, strict=True))
    choices = [by_node[arg] if is_tensor(arg) else reach([NO_COLUMN], float(arg)) for arg in (if_true, if_false)]
    chooser = by_node[condition]
    is_decided = ~np.isnan(chooser.known)
    last = np.where(chooser.known != 0, choices[0].last, choices[1].last)
    known = np.where(chooser.known != 0, choices[0].known, choices[1].known)
    undecided = latest([chooser.last, *(choice.last for choice in choices)])
    return reach(np.where(is_decided, last, undecided), np.where(is_decided, known, np.nan), batch)


def same_entries(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    keeps_known = val(node).dtype.is_floating_point or val(node).dtype == val(source_of(node)).dtype
    known = np.where((source.known == 0) | np.isinf(source.known), source.known, np.nan)  # other numbers may be rounded
    return reach(source.last, known if keeps_known else np.nan, source.batch)


def zeros_like(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    return reach(np.full((1,) * source.rank, NO_COLUMN), 0.0, source.batch)
