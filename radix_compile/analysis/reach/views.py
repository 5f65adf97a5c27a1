"""Ops that move entries and compute none. A dimension of size one in the arrays (all entries equal) stays so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.reach.column_reach import NO_COLUMN, OutOfReach, Reach, Reaches, reach
from radix_compile.analysis.reach.operands import Array, aligned, dim_of, moved, refuse_if_batched_constant
from radix_compile.torch_internals import val

aten = torch.ops.aten


def reshape(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of a reshape. Dimensions that are merged or split together stay of size one if all are."""
    source = reaches.of(source_of(node))
    before, after = reaches.shape(source_of(node)), reaches.shape(node)
    shapes: list[tuple[int, ...]] = []
    result: list[int] = []
    batch = None
    for dims, sizes in groups(before, after):
        if source.batch in dims:
            if len(sizes) != 1 or any(before[dim] != 1 for dim in dims if dim != source.batch):
                raise OutOfReach
            batch = len(result)
        is_equal = all(source.last.shape[dim] == 1 for dim in dims)
        shapes.append(tuple(1 if is_equal else before[dim] for dim in dims))
        result += [1 if is_equal else size for size in sizes]
    broadcast = [size for shape in shapes for size in shape]
    return moved(source, lambda array: np.broadcast_to(array, broadcast).reshape(result), batch)


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of dimensions of ``before`` and sizes of ``after`` with equal products."""
    result: list[tuple[list[int], list[int]]] = []
    dim = new = 0
    while dim < len(before) or new < len(after):
        dims: list[int] = []
        sizes: list[int] = []
        while not dims or not sizes or math.prod(before[d] for d in dims) != math.prod(sizes):
            is_smaller = math.prod(before[d] for d in dims) < math.prod(sizes)
            if dim < len(before) and (not dims or is_smaller or new == len(after)):
                dims.append(dim)
                dim += 1
            elif new < len(after):
                sizes.append(after[new])
                new += 1
            else:
                break
        result.append((dims, sizes))
    return result


def expand(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    num_new = len(reaches.shape(node)) - source.rank
    batch = None if source.batch is None else source.batch + num_new
    return moved(source, lambda array: array.reshape((1,) * num_new + array.shape), batch)


def unsqueeze(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = argument(node, "dim") % (source.rank + 1)
    batch = None if source.batch is None else source.batch + (source.batch >= dim)
    return moved(source, lambda array: np.expand_dims(array, dim), batch)


def squeeze(node: fx.Node, reaches: Reaches) -> Reach:
    source, shape = reaches.of(source_of(node)), reaches.shape(source_of(node))
    given = argument(node, "dim")
    dims = [dim % source.rank for dim in ([given] if isinstance(given, int) else given)]
    removed = tuple(dim for dim in dims if shape[dim] == 1)
    if source.batch in removed:
        raise OutOfReach
    batch = None if source.batch is None else source.batch - sum(dim < source.batch for dim in removed)
    return moved(source, lambda array: array.squeeze(removed), batch)


def permute(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    order = list(range(source.rank))
    if node.target is aten.permute.default:
        order = [dim % source.rank for dim in argument(node, "dims")]
    elif source.rank > 1:
        has_dims = node.target is aten.transpose.int
        dim0, dim1 = (argument(node, "dim0"), argument(node, "dim1")) if has_dims else (-2, -1)
        order[dim0], order[dim1] = order[dim1], order[dim0]
    batch = None if source.batch is None else order.index(source.batch)
    return moved(source, lambda array: array.transpose(order), batch)


def slice_(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = argument(node, "dim") % source.rank
    size = reaches.shape(source_of(node))[dim]
    part = _slice_of(node, reaches)
    if dim == source.batch and part.indices(size) != (0, size, 1):
        raise OutOfReach
    varies = source.last.shape[dim] != 1 or size == 1
    index = (slice(None),) * dim + (part if varies else slice(None),)
    return moved(source, lambda array: array[index], source.batch)


def _slice_of(node: fx.Node, reaches: Reaches) -> slice:
    """Return the op's arguments ``start``, ``end`` and ``step`` as a slice."""
    start, end = (argument(node, name) for name in ("start", "end"))
    first, stop = (None if place is None else reaches.number(place) for place in (start, end))
    return slice(first, stop, reaches.number(argument(node, "step")))


def select(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = dim_of(node, source)
    index = reaches.number(argument(node, "index")) if source.last.shape[dim] != 1 else 0
    batch = None if source.batch is None else source.batch - (dim < source.batch)
    return moved(source, lambda array: array.take(index, dim), batch)


def split(node: fx.Node, reaches: Reaches) -> tuple[Reach, ...]:
    source = reaches.of(source_of(node))
    dim = dim_of(node, source)
    sizes = [reaches.number(part.shape[dim]) for part in val(node)]
    varies = source.last.shape[dim] != 1

    def part(size: int, end: int) -> Reach:
        index = (slice(None),) * dim + (slice(end - size, end) if varies else slice(None),)
        return moved(source, lambda array: array[index], source.batch)

    return tuple(part(size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True))


def unbind(node: fx.Node, reaches: Reaches) -> tuple[Reach, ...]:
    source = reaches.of(source_of(node))
    dim = dim_of(node, source)
    batch = None if source.batch is None else source.batch - (dim < source.batch)
    varies = source.last.shape[dim] != 1

    def part(index: int) -> Reach:
        return moved(source, lambda array: array.take(index if varies else 0, dim), batch)

    return tuple(map(part, range(reaches.shape(source_of(node))[dim])))


def flip(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dims = tuple(dim % source.rank for dim in argument(node, "dims"))
    if source.batch in dims:
        raise OutOfReach
    return moved(source, lambda array: np.flip(array, dims), source.batch)


def pad(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of padding with a number."""
    source = reaches.of(source_of(node))
    amounts = [reaches.number(amount) for amount in argument(node, "pad")]
    if node.target is aten.pad.default and argument(node, "mode") != "constant":
        raise OutOfReach
    value = argument(node, "value") or 0.0
    shape = reaches.shape(source_of(node))
    result = source
    for position in range(0, len(amounts), 2):
        dim, (before, after) = source.rank - 1 - position // 2, amounts[position : position + 2]
        if before == after == 0:
            continue
        if dim == source.batch or before < 0 or after < 0:
            raise OutOfReach
        broadcast = [shape[dim] if other == dim else size for other, size in enumerate(result.last.shape)]
        widths = [(before, after) if other == dim else (0, 0) for other in range(source.rank)]
        last = np.pad(np.broadcast_to(result.last, broadcast), widths, constant_values=NO_COLUMN)
        known = np.pad(np.broadcast_to(result.known, broadcast), widths, constant_values=value)
        result = reach(last, known, source.batch)
    return result


def cat(node: fx.Node, reaches: Reaches) -> Reach:
    tensors = [arg for arg in argument(node, "tensors") if reaches.shape(arg) != (0,)]
    parts, batch = aligned(tensors, reaches)
    dim = argument(node, "dim") % parts[0].rank
    if dim == batch:
        raise OutOfReach
    shape = np.broadcast_shapes(*((*part.last.shape[:dim], 1, *part.last.shape[dim + 1 :]) for part in parts))
    shapes = [(*shape[:dim], reaches.shape(tensor)[dim], *shape[dim + 1 :]) for tensor in tensors]

    def joined(arrays: Sequence[Array]) -> Array:
        return np.concatenate([np.broadcast_to(*pair) for pair in zip(arrays, shapes, strict=True)], dim)

    return reach(joined([part.last for part in parts]), joined([part.known for part in parts]), batch)


def repeat_interleave(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    if argument(node, "dim") is None:
        raise OutOfReach
    dim = dim_of(node, source)
    repeats = reaches.number(argument(node, "repeats")) if source.last.shape[dim] != 1 else 1
    return moved(source, lambda array: array.repeat(repeats, dim), source.batch)


def written_over(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of ``select_scatter`` and ``slice_scatter``, which overwrite entries along a dimension."""
    source, written = argument(node, "self"), argument(node, "src")
    base, part = reaches.of(source), reaches.of(written)
    dim = dim_of(node, base)
    size = reaches.shape(source)[dim]
    if node.target is aten.select_scatter.default:
        index = reaches.number(argument(node, "index")) % size
        overwritten = slice(index, index + 1)
        batch = None if part.batch is None else part.batch + (part.batch >= dim)
        part = moved(part, lambda array: np.expand_dims(array, dim), batch)
    else:
        overwritten = _slice_of(node, reaches)
    batches = {batch for batch in (base.batch, part.batch) if batch is not None}
    if len(batches) > 1 or dim in batches:
        raise OutOfReach
    for batch in batches:
        refuse_if_batched_constant(source, batch, reaches)
        written_dim = batch - (len(reaches.shape(written)) < base.rank and batch > dim)
        refuse_if_batched_constant(written, written_dim, reaches)
    shape = list(np.broadcast_shapes(_without(base.last.shape, dim), _without(part.last.shape, dim)))
    shape.insert(dim, size)

    def overwrite(array: Array, new: Array) -> Array:
        result = np.broadcast_to(array, shape).copy()
        result[(slice(None),) * dim + (overwritten,)] = new
        return result

    return reach(overwrite(base.last, part.last), overwrite(base.known, part.known), batches.pop() if batches else None)


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
