"""Cumulative ops and differences along the sequence, which are causal, and dropout."""

from __future__ import annotations

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.rules.sorting import ends_of_groups
from radix_compile.ir.axes import BATCH, SEQ, Layout, Mixes, has_tokens, plain_axes, plain_axis, shape_of
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Break, PerRow, Step
from radix_compile.ir.value import Value, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def cumulative(node: fx.Node, layout: Layout) -> Value:
    value = value_of(source_of(node))
    if value.arrangement:
        return ends_of_groups(node, value.arrangement)
    dim = argument(node, "dim") % max(len(value.axes), 1)
    axis = value.axes[dim]
    if not has_tokens(axis):
        axes = (*value.axes[:dim], plain_axis(shape_of(node)[dim]), *value.axes[dim + 1 :])
        return Value(axes, fact=_runs(node, value, dim))
    _along_sequence(value, dim, "accumulates over")
    return Value(value.axes, full_only=True, fact=_runs(node, value, dim))


def _along_sequence(value: Value, dim: int, what: str) -> None:
    """Raise :class:`Mixes` unless ``dim`` is the sequence and no row is fully masked in an earlier layer."""
    if value.axes[dim] != (SEQ,) or not value.is_row:
        if BATCH in value.axes[dim]:
            raise Mixes(f"{what} the batch axis", RefusalCode.MIXES_SEQUENCES)
        raise Mixes(f"{what} the key axis", RefusalCode.ATTENTION_NOT_UNDERSTOOD)
    if value.fully_masked:
        raise Mixes("reads rows that are fully masked in an earlier layer", RefusalCode.ROWS_WITHOUT_KEYS)


def _runs(node: fx.Node, value: Value, dim: int) -> PerRow | None:
    """Return the fact of a running count of breaks in positions, which numbers packed sequences, or None."""
    is_count = node.target is aten.cumsum.default and _is_integer(node)
    if not is_count or not isinstance(value.fact, Break) or dim != len(value.axes) - 1:
        return None
    return PerRow(node, -1, counted_from=value.fact.source)


def _is_integer(node: fx.Node) -> bool:
    """Is the dtype an integer wide enough for any column or position?"""
    return val(node).dtype in (torch.int32, torch.int64)


def diff(node: fx.Node, layout: Layout) -> Value:
    """Return the value of the differences between columns, with a column prepended so that each row has one."""
    source = source_of(node)
    value = value_of(source)
    prepend = argument(node, "prepend")
    if value.mixed is not None:
        return value
    dim = argument(node, "dim") % max(len(value.axes), 1)
    is_step = argument(node, "n") == 1 and argument(node, "append") is None
    is_step = is_step and _is_first_column_less_one(prepend, source, dim)
    fact = value.fact
    # Inexact positions, narrow dtypes (which may wrap around) and other dimensions do not give steps of positions.
    is_exact = isinstance(fact, PerRow) and fact.exact and fact.dim == dim - len(value.axes) == -1
    step = Step(fact.source) if is_step and isinstance(fact, PerRow) and is_exact and _is_integer(node) else None
    if all(value_of(arg).is_constant for arg in node.all_input_nodes):
        # The first difference may be 1 and the others 0, also where the source is uniform.
        return Value((*value.axes[:dim], *plain_axes(node)[dim : dim + 1], *value.axes[dim + 1 :]), fact=step)
    if not is_step:
        raise Mixes("takes differences along the sequence", RefusalCode.MIXES_TOKENS)
    _along_sequence(value, dim, "takes differences along")
    return Value(value.axes, full_only=True, fact=step)


def _is_first_column_less_one(node: fx.Node | None, source: fx.Node, dim: int) -> bool:
    """Is the node ``x[:, :1] - 1``, for the same ``x`` as in ``diff(x)``, so that the first difference is 1?"""
    if node is None or node.target is not aten.sub.Tensor or node.args[1] != 1 or argument(node, "alpha") != 1:
        return False
    first = source_of(node)
    if first.target is not aten.slice.Tensor or (argument(first, "start") or 0, argument(first, "end")) != (0, 1):
        return False
    value, origin = value_of(source), value_of(source_of(first))
    is_same = source_of(first) is source or (isinstance(value.fact, PerRow) and origin.fact == value.fact)
    return is_same and argument(first, "dim") % len(value.axes) == dim


def dropout(node: fx.Node, layout: Layout) -> Value:
    value = value_of(source_of(node))
    if node.target is aten.native_dropout.default:
        raise Mixes("dropout is random", RefusalCode.DROPOUT)
    if argument(node, "train") and argument(node, "p") != 0:
        raise Mixes("dropout is on, so equal rows get different values", RefusalCode.DROPOUT)
    return Value(value.axes, fact=value.fact)
