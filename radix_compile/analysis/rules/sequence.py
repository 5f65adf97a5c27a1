"""Ops along the sequence that are causal by nature, and the random ones that are not random here."""

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
    if value.axes[dim] != (SEQ,) or not value.is_row:
        if BATCH in value.axes[dim]:
            raise Mixes(f"{what} the batch axis", RefusalCode.MIXES_SEQUENCES)
        raise Mixes(f"{what} the key axis", RefusalCode.ATTENTION_NOT_UNDERSTOOD)
    if value.fully_masked:
        raise Mixes("reads rows that saw no key in an earlier layer", RefusalCode.ROWS_WITHOUT_KEYS)


def _runs(node: fx.Node, value: Value, dim: int) -> PerRow | None:
    """Counting the breaks in the positions so far numbers their runs, in a type that does not overflow."""
    counts = node.target is aten.cumsum.default and _counts(node)
    if not counts or not isinstance(value.fact, Break) or dim != len(value.axes) - 1:
        return None
    return PerRow(node, -1, counted_from=value.fact.source)


def _counts(node: fx.Node) -> bool:
    return val(node).dtype in (torch.int32, torch.int64)


def diff(node: fx.Node, layout: Layout) -> Value:
    """The step from each column to the next, in the one form that is row by row: something put in front of column 0."""
    source = source_of(node)
    value = value_of(source)
    prepend = argument(node, "prepend")
    if value.mixed is not None:
        return value
    dim = argument(node, "dim") % max(len(value.axes), 1)
    steps = argument(node, "n") == 1 and argument(node, "append") is None
    steps = steps and _is_first_column_less_one(prepend, source, dim)
    fact = value.fact
    # The truth of positions, differences that wrap around or run over the batch are not steps of the positions.
    exact = isinstance(fact, PerRow) and fact.exact and fact.dim == dim - len(value.axes) == -1
    step = Step(fact.source) if steps and isinstance(fact, PerRow) and exact and _counts(node) else None
    if all(value_of(one).is_constant for one in node.all_input_nodes):
        # Its entries may all be equal, and steps are not: the first may be one.
        return Value((*value.axes[:dim], *plain_axes(node)[dim : dim + 1], *value.axes[dim + 1 :]), fact=step)
    if not steps:
        raise Mixes("takes differences along the sequence", RefusalCode.MIXES_TOKENS)
    _along_sequence(value, dim, "takes differences along")
    return Value(value.axes, full_only=True, fact=step)


def _is_first_column_less_one(node: fx.Node | None, source: fx.Node, dim: int) -> bool:
    """``x[:, :1] - 1`` of the same ``x``, in front of ``diff(x)``: the first step is one by construction."""
    if node is None or node.target is not aten.sub.Tensor or node.args[1] != 1 or argument(node, "alpha") != 1:
        return False
    cut = source_of(node)
    if cut.target is not aten.slice.Tensor or (argument(cut, "start") or 0, argument(cut, "end")) != (0, 1):
        return False
    value, origin = value_of(source), value_of(source_of(cut))
    same = source_of(cut) is source or (isinstance(value.fact, PerRow) and origin.fact == value.fact)
    return same and argument(cut, "dim") % len(value.axes) == dim


def dropout(node: fx.Node, layout: Layout) -> Value:
    value = value_of(source_of(node))
    if node.target is aten.native_dropout.default:
        raise Mixes("dropout is random", RefusalCode.DROPOUT)
    if argument(node, "train") and argument(node, "p") != 0:
        raise Mixes("dropout is on, so equal rows get different values", RefusalCode.DROPOUT)
    return Value(value.axes, fact=value.fact)
