"""Lookups: embeddings, gather and scatter, and indexing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, operand, tensor_inputs
from radix_compile.analysis.rules.sorting import rearranged
from radix_compile.ir.axes import Axis, Layout, Mixes, feature, has_tokens, plain_axes, shape_of
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Fact, Index, PerRow
from radix_compile.ir.value import Value, broadcast, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def embedding(node: fx.Node, layout: Layout) -> Value:
    weight, indices = value_of(argument(node, "weight")), value_of(argument(node, "indices"))
    if not weight.is_constant:
        raise Mixes("the table differs from row to row", RefusalCode.DIFFERS_BY_ROW)
    # The gradient depends on how often a token occurs in the batch.
    return Value((*indices.axes, *weight.axes[1:]), full_only=bool(argument(node, "scale_grad_by_freq")))


def gather(node: fx.Node, layout: Layout) -> Value:
    """Return the value of features read or written by index. Other dimensions line up, and must have equal sizes."""
    rank = len(shape_of(node))
    dim = argument(node, "dim") % rank
    tensors = tensor_inputs(node)
    from_table = node.target is aten.gather.default and value_of(tensors[0]).is_constant
    parts = []
    for part in tensors:
        axes = value_of(part).axes
        if len(axes) != rank:
            raise Mixes("looks up rows with an index of another rank", RefusalCode.UNSUPPORTED_ARGUMENTS)
        if not from_table:
            feature(axes[dim], "looks up along")
        parts.append(operand(part, (*axes[:dim], (), *axes[dim + 1 :])))
    for other, sizes in enumerate(zip(*map(shape_of, tensors), strict=True)):
        if other != dim and len(set(sizes)) != 1:
            raise Mixes("looks up only a part of the rows", RefusalCode.INDEXES_ROWS)
    axes, uses = broadcast(layout, parts, exact=True)
    axis = value_of(tensors[1]).axes[dim] if from_table else ()
    axis = axis if has_tokens(axis) else plain_axes(node)[dim]
    return Value((*axes[:dim], axis, *axes[dim + 1 :]), operands=uses)


def index_select(node: fx.Node, layout: Layout) -> Value:
    source, indices = value_of(argument(node, "self")), value_of(argument(node, "index"))
    dim = argument(node, "dim") % len(source.axes)
    feature(source.axes[dim], "selects along")
    if not indices.is_constant:
        if not source.is_constant:
            raise Mixes("selects by an index that differs from row to row", RefusalCode.DIFFERS_BY_ROW)
        return Value((*source.axes[:dim], *indices.axes, *source.axes[dim + 1 :]))
    return Value((*source.axes[:dim], *plain_axes(node)[dim : dim + 1], *source.axes[dim + 1 :]))


def index(node: fx.Node, layout: Layout) -> Value:
    """Return the value of ``source[i, j, ...]``: a table lookup, or indices that count ``0, 1, 2, ...``."""
    source, indices = argument(node, "self"), argument(node, "indices")
    value = value_of(source)
    if any(value_of(i).arrangement for i in (source, *indices) if i is not None):
        return rearranged(source, indices, layout)
    if any(i is None for i in indices):
        return _some_features(node, value, indices)
    if any(val(i).dtype in (torch.bool, torch.uint8) for i in indices):
        raise Mixes("selects by a mask", RefusalCode.INDEXES_ROWS)
    if all(value_of(i).is_constant for i in indices):
        reordered = _reordered(node, value, source, indices)
        if reordered is not None:
            return reordered
    if not value.is_constant:
        raise Mixes("looks up rows by an index that is not known to leave them in place", RefusalCode.INDEXES_ROWS)
    axes, uses = broadcast(layout, [operand(i) for i in indices])
    return Value((*axes, *value.axes[len(indices) :]), operands=uses)


def _some_features(node: fx.Node, value: Value, indices: list[fx.Node | None]) -> Value:
    """Return the value of ``source[..., i]`` with a single index that is constant, along features."""
    (dim, index), *others = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if others or not value_of(index).is_constant or len(shape_of(index)) != 1:
        raise Mixes("indexes some dimensions and skips others", RefusalCode.UNSUPPORTED_ARGUMENTS)
    feature(value.axes[dim], "selects along")
    return Value((*value.axes[:dim], *plain_axes(node)[dim : dim + 1], *value.axes[dim + 1 :]))


def _reordered(node: fx.Node, value: Value, source: fx.Node, indices: list[fx.Node]) -> Value | None:
    """Return the value if the lookup only reorders dimensions, else None.

    It does if each index is ``arange`` over the whole source dimension, along a separate dimension of the result.
    """
    if len(indices) != len(value.axes):
        return None
    rank = len(shape_of(node))
    axes: list[Axis] = [()] * rank
    moved: dict[int, int] = {}
    sizes = shape_of(source)
    for dim, counter in enumerate(indices):
        fact = value_of(counter).fact
        own = [size for size in shape_of(counter) if size != 1]
        if value.axes[dim] == () and own == []:
            continue  # a dimension of size one has a single entry to look up
        if not isinstance(fact, Index) or fact.offset != 0 or own != [sizes[dim]] or fact.dim in moved.values():
            return None
        axes[fact.dim] = value.axes[dim]
        moved[dim - len(indices)] = fact.dim
    return Value(tuple(axes), fact=_moved_fact(value.fact, moved), full_only=not value.is_constant)


def _moved_fact(fact: Fact | None, moved: dict[int, int]) -> Fact | None:
    return replace(fact, dim=moved[fact.dim]) if isinstance(fact, PerRow | Index) else None
