"""Sorting rows and restoring their order: how mixtures of experts group the rows of each expert.

The sorted order of one number per row (or of several per row) depends on all rows, and differs between full and compact
form. But a program that sorts rows, computes on each sorted row alone or by its key, and restores the order is
position-wise. So rows in sorted order are tracked along an axis of their own (:class:`~radix_compile.ir.axes.Sorted`),
and numbers about the order as an ``Arrangement``: each form of the program computes its own order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.rules.elementwise import elementwise
from radix_compile.analysis.rules.reductions import along
from radix_compile.ir.axes import (
    Arrangement,
    ArrangementKind,
    Layout,
    Mixes,
    Size,
    Sorted,
    feature,
    has_tokens,
    plain_axes,
    shape_of,
    uniform_axes,
)
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Index
from radix_compile.ir.value import Marks, Value, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten

_USES_ORDER = "computes with the order of the rows, which depends on all rows"
_INTEGERS = (torch.int32, torch.int64)
_EXACT = (*_INTEGERS, torch.float32, torch.float64)
"""Dtypes that represent the index of an expert exactly."""


def _arranged(by: Sorted, kind: ArrangementKind, number: int = 1) -> Value:
    return Value((), arrangement=Arrangement(kind, by, number))


def sort(node: fx.Node, layout: Layout) -> Marks:
    value = value_of(source_of(node))
    if value.arrangement:
        return _inverse(node, value.arrangement)
    dim = argument(node, "dim") % max(len(value.axes), 1)
    if not any(map(has_tokens, value.axes[dim : dim + 1])):
        return along(node, layout)
    if len(value.axes) != 1 or value.axes[0][: len(layout.row)] != layout.row:
        feature(value.axes[dim], "sorts along")
    by = Sorted("sorted", node, value.axes[0])
    order = _arranged(by, ArrangementKind.ORDER)
    return order if node.target is aten.argsort.default else (Value(((by,),)), order)


def _inverse(node: fx.Node, order: Arrangement) -> Value:
    """Return the value of ``argsort(order)``: the place of each entry in the order."""
    ascending = not argument(node, "descending")
    if node.target is aten.argsort.default and ascending and (order.kind, order.number) == (ArrangementKind.ORDER, 1):
        return _arranged(order.by, ArrangementKind.PLACE)
    raise Mixes(_USES_ORDER, RefusalCode.ORDER_OF_ROWS)


def floor_divide(node: fx.Node, layout: Layout) -> Marks:
    """Return the value of a quotient: the index of an entry, divided by the entries per row, is its row's index."""
    order, divisor = value_of(source_of(node)).arrangement, node.args[1]
    if order is None:
        return elementwise(node, layout)
    if order.kind is not ArrangementKind.ORDER or not isinstance(divisor, int) or divisor < 1:
        raise Mixes(_USES_ORDER, RefusalCode.ORDER_OF_ROWS)
    return _arranged(order.by, ArrangementKind.ORDER, order.number * divisor)


def rearranged(source: fx.Node, indices: Sequence[fx.Node | None], layout: Layout) -> Value:
    """Return the value of ``rows[order]`` (which sorts rows) or ``sorted_rows[place]`` (which restores their order)."""
    value = value_of(source)
    arrangement = value_of(indices[0]).arrangement if len(indices) == 1 and indices[0] is not None else None
    if arrangement is None or value.arrangement or not value.axes:
        raise Mixes(_USES_ORDER, RefusalCode.ORDER_OF_ROWS)
    by, first = arrangement.by, value.axes[0]
    if arrangement.kind is ArrangementKind.PLACE and first == (by,):
        return Value((by.axis, *value.axes[1:]))
    slots = by.axis[len(first) :]
    is_order_of_rows = arrangement.kind is ArrangementKind.ORDER and (*first, *slots) == by.axis
    if is_order_of_rows and value.is_row and layout.axis_size(slots) == arrangement.number:
        return Value(((by,), *value.axes[1:]))
    raise Mixes("looks up rows by the order of other rows", RefusalCode.ORDER_OF_ROWS)


def empty_like(node: fx.Node, layout: Layout) -> Value:
    order = value_of(source_of(node)).arrangement
    if order is None:
        return Value(uniform_axes(node))
    if order.kind is not ArrangementKind.ORDER:
        raise Mixes(_USES_ORDER, RefusalCode.ORDER_OF_ROWS)
    return _arranged(order.by, ArrangementKind.BLANK)


def index_put(node: fx.Node, layout: Layout) -> Value:
    """Return the value of ``blank[order] = 0, 1, 2, ...``: the place of each entry in the order."""
    indices: list[fx.Node | None] = argument(node, "indices")
    values: fx.Node = argument(node, "values")
    blank = value_of(source_of(node)).arrangement
    if blank is None or len(indices) != 1 or indices[0] is None:
        raise Mixes("writes to rows by index", RefusalCode.INDEXES_ROWS)
    is_counter = value_of(values).fact == Index(-1, 0) and len(shape_of(values)) == 1 and shape_of(values) != (1,)
    arrangement = value_of(indices[0]).arrangement
    is_order = blank.kind is ArrangementKind.BLANK and arrangement == Arrangement(ArrangementKind.ORDER, blank.by)
    if not is_order or not is_counter or argument(node, "accumulate"):
        raise Mixes(_USES_ORDER, RefusalCode.ORDER_OF_ROWS)
    place = Arrangement(ArrangementKind.PLACE, blank.by)
    return Value((), arrangement=place, operands=((values, 0, "count"),))


def histc(node: fx.Node, layout: Layout) -> Value:
    """Return the value of the number of rows for each key, if each of the keys 0, 1, 2, ... has a bin of its own."""
    by = _sorted_by(source_of(node))
    bins, first, last = (argument(node, name) for name in ("bins", "min", "max"))
    if by is None or not isinstance(bins, int) or (first, last) != (0, bins - 1) or bins < 2:
        raise Mixes("counts values over rows", RefusalCode.ORDER_OF_ROWS)
    return _arranged(by, ArrangementKind.COUNTS, bins)


def _sorted_by(keys: fx.Node) -> Sorted | None:
    """Return the sorted axis of keys that are the result of an ascending sort, or None."""
    while keys.target is aten._to_copy.default and val(keys).dtype in _EXACT:
        keys = source_of(keys)
    is_sorted = keys.target is operator.getitem and keys.args[1] == 0 and _is_ascending_sort(keys.args[0])
    axes = value_of(keys).axes
    atom = axes[0][0] if len(axes) == 1 and len(axes[0]) == 1 else None
    return atom if is_sorted and isinstance(atom, Sorted) and atom.sort is keys.args[0] else None


def _is_ascending_sort(node: object) -> bool:
    sorts = (aten.sort.default, aten.sort.stable)
    return isinstance(node, fx.Node) and node.target in sorts and not argument(node, "descending")


def ends_of_groups(node: fx.Node, counts: Arrangement) -> Value:
    """Return the value of a running sum of counts: where the rows of each key end."""
    exact = node.target is aten.cumsum.default and val(node).dtype in _INTEGERS
    if counts.kind is not ArrangementKind.COUNTS or not exact:
        raise Mixes(_USES_ORDER, RefusalCode.ORDER_OF_ROWS)
    return _arranged(counts.by, ArrangementKind.ENDS, counts.number)


def grouped_mm(node: fx.Node, layout: Layout) -> Value:
    """Return the value of each row times the weights of its key, if the groups are the rows of each key.

    The arguments are ``(rows [N, K], weights [E, K, M], ends [E])``.
    """
    rows, weights, ends = node.args[:3]
    assert isinstance(rows, fx.Node) and isinstance(weights, fx.Node) and isinstance(ends, fx.Node)  # noqa: PT018
    groups, value = value_of(ends).arrangement, value_of(rows)
    in_order = groups is not None and groups.kind is ArrangementKind.ENDS and value.axes[:1] == ((groups.by,),)
    if groups is None or not in_order or len(value.axes) != 2 or not value_of(weights).is_constant:
        raise Mixes("multiplies groups of rows that may not be the rows of each key", RefusalCode.ORDER_OF_ROWS)
    num_experts = shape_of(weights)[0]
    num_keys = _num_keys(source_of(groups.by.sort))
    if num_experts != groups.number or num_keys is None or not bool(num_keys <= num_experts):
        raise Mixes(
            "a row may have a key without weights, which would shift the groups of other rows",
            RefusalCode.ORDER_OF_ROWS,
        )
    if any(argument(node, name) is not None for name in ("bias",) if _has(node, name)):
        raise Mixes("a grouped product with a bias", RefusalCode.UNSUPPORTED_ARGUMENTS)
    return Value(((groups.by,), *plain_axes(node)[1:]))


def _has(node: fx.Node, name: str) -> bool:
    return any(parameter.name == name for parameter in node.target._schema.arguments)  # type: ignore[union-attr]


def _num_keys(keys: fx.Node) -> Size | None:
    """Return the number of different keys if they are indices from ``topk``, as a router chooses experts; else None."""
    while info_of(keys.target).is_view or (keys.target is aten._to_copy.default and val(keys).dtype in _INTEGERS):
        keys = source_of(keys)
    topk = keys.args[0] if keys.target is operator.getitem and keys.args[1] == 1 else None
    if not isinstance(topk, fx.Node) or topk.target is not aten.topk.default:
        return None
    size: Size = shape_of(source_of(topk))[argument(topk, "dim")]
    return size
