"""Entries move, none is computed. What agrees along a dimension stays of size one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.reach.column_reach import NOTHING, OutOfReach, Reach, Reaches, reach
from radix_compile.analysis.reach.operands import Array, aligned, dim_of, moved, refuse_if_apart
from radix_compile.torch_internals import val

aten = torch.ops.aten


def reshape(node: fx.Node, reaches: Reaches) -> Reach:
    """Dimensions that are merged or cut together stay small if all of them are."""
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
        small = all(source.last.shape[dim] == 1 for dim in dims)
        shapes.append(tuple(1 if small else before[dim] for dim in dims))
        result += [1 if small else size for size in sizes]
    spread = [size for shape in shapes for size in shape]
    return moved(source, lambda array: np.broadcast_to(array, spread).reshape(result), batch)


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dimensions of one shape, and the sizes of the other that they become, in the smallest groups."""
    result: list[tuple[list[int], list[int]]] = []
    dim = new = 0
    while dim < len(before) or new < len(after):
        dims: list[int] = []
        sizes: list[int] = []
        while not dims or not sizes or math.prod(before[d] for d in dims) != math.prod(sizes):
            fewer = math.prod(before[d] for d in dims) < math.prod(sizes)
            if dim < len(before) and (not dims or fewer or new == len(after)):
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
    more = len(reaches.shape(node)) - source.rank
    batch = None if source.batch is None else source.batch + more
    return moved(source, lambda array: array.reshape((1,) * more + array.shape), batch)


def unsqueeze(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = argument(node, "dim") % (source.rank + 1)
    batch = None if source.batch is None else source.batch + (source.batch >= dim)
    return moved(source, lambda array: np.expand_dims(array, dim), batch)


def squeeze(node: fx.Node, reaches: Reaches) -> Reach:
    source, shape = reaches.of(source_of(node)), reaches.shape(source_of(node))
    named = argument(node, "dim")
    dims = [dim % source.rank for dim in ([named] if isinstance(named, int) else named)]
    gone = tuple(dim for dim in dims if shape[dim] == 1)
    if source.batch in gone:
        raise OutOfReach
    batch = None if source.batch is None else source.batch - sum(dim < source.batch for dim in gone)
    return moved(source, lambda array: array.squeeze(gone), batch)


def permute(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    order = list(range(source.rank))
    if node.target is aten.permute.default:
        order = [dim % source.rank for dim in argument(node, "dims")]
    elif source.rank > 1:
        named = node.target is aten.transpose.int
        one, other = (argument(node, "dim0"), argument(node, "dim1")) if named else (-2, -1)
        order[one], order[other] = order[other], order[one]
    batch = None if source.batch is None else order.index(source.batch)
    return moved(source, lambda array: array.transpose(order), batch)


def slice_(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = argument(node, "dim") % source.rank
    size = reaches.shape(source_of(node))[dim]
    start, end = (argument(node, name) for name in ("start", "end"))
    first, behind = (None if one is None else reaches.number(one) for one in (start, end))
    part = slice(first, behind, reaches.number(argument(node, "step")))
    if dim == source.batch and part.indices(size) != (0, size, 1):
        raise OutOfReach
    cut = source.last.shape[dim] != 1 or size == 1
    place = (slice(None),) * dim + (part if cut else slice(None),)
    return moved(source, lambda array: array[place], source.batch)


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
    whole = source.last.shape[dim] != 1

    def part(size: int, end: int) -> Reach:
        place = (slice(None),) * dim + (slice(end - size, end) if whole else slice(None),)
        return moved(source, lambda array: array[place], source.batch)

    return tuple(part(size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True))


def unbind(node: fx.Node, reaches: Reaches) -> tuple[Reach, ...]:
    source = reaches.of(source_of(node))
    dim = dim_of(node, source)
    batch = None if source.batch is None else source.batch - (dim < source.batch)
    whole = source.last.shape[dim] != 1

    def part(place: int) -> Reach:
        return moved(source, lambda array: array.take(place if whole else 0, dim), batch)

    return tuple(map(part, range(reaches.shape(source_of(node))[dim])))


def flip(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dims = tuple(dim % source.rank for dim in argument(node, "dims"))
    if source.batch in dims:
        raise OutOfReach
    return moved(source, lambda array: np.flip(array, dims), source.batch)


def pad(node: fx.Node, reaches: Reaches) -> Reach:
    """In front and behind, by a number."""
    source = reaches.of(source_of(node))
    amounts = [reaches.number(amount) for amount in argument(node, "pad")]
    if node.target is aten.pad.default and argument(node, "mode") != "constant":
        raise OutOfReach
    value = argument(node, "value") or 0.0
    shape = reaches.shape(source_of(node))
    result = source
    for position in range(0, len(amounts), 2):
        dim, (front, behind) = source.rank - 1 - position // 2, amounts[position : position + 2]
        if front == behind == 0:
            continue
        if dim == source.batch or front < 0 or behind < 0:
            raise OutOfReach
        spread = [shape[dim] if other == dim else size for other, size in enumerate(result.last.shape)]
        around = [(front, behind) if other == dim else (0, 0) for other in range(source.rank)]
        last = np.pad(np.broadcast_to(result.last, spread), around, constant_values=NOTHING)
        known = np.pad(np.broadcast_to(result.known, spread), around, constant_values=value)
        result = reach(last, known, source.batch)
    return result


def cat(node: fx.Node, reaches: Reaches) -> Reach:
    tensors = [arg for arg in argument(node, "tensors") if reaches.shape(arg) != (0,)]
    found, batch = aligned(tensors, reaches)
    dim = argument(node, "dim") % found[0].rank
    if dim == batch:
        raise OutOfReach
    shape = np.broadcast_shapes(*((*one.last.shape[:dim], 1, *one.last.shape[dim + 1 :]) for one in found))
    parts = []
    for tensor in tensors:
        size = reaches.shape(tensor)[dim]
        parts.append((*shape[:dim], size, *shape[dim + 1 :]))

    def joined(arrays: Sequence[Array]) -> Array:
        return np.concatenate([np.broadcast_to(a, part) for a, part in zip(arrays, parts, strict=True)], dim)

    return reach(joined([one.last for one in found]), joined([one.known for one in found]), batch)


def repeat_interleave(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    if argument(node, "dim") is None:
        raise OutOfReach
    dim = dim_of(node, source)
    times = reaches.number(argument(node, "repeats")) if source.last.shape[dim] != 1 else 1
    return moved(source, lambda array: array.repeat(times, dim), source.batch)


def written_over(node: fx.Node, reaches: Reaches) -> Reach:
    """One entry along a dimension, or some of them, written over."""
    source, written = argument(node, "self"), argument(node, "src")
    base, part = reaches.of(source), reaches.of(written)
    dim = dim_of(node, base)
    size = reaches.shape(source)[dim]
    if node.target is aten.select_scatter.default:
        index = reaches.number(argument(node, "index")) % size
        place = slice(index, index + 1)
        batch = None if part.batch is None else part.batch + (part.batch >= dim)
        part = moved(part, lambda array: np.expand_dims(array, dim), batch)
    else:
        start, end = (argument(node, name) for name in ("start", "end"))
        first, behind = (None if one is None else reaches.number(one) for one in (start, end))
        place = slice(first, behind, reaches.number(argument(node, "step")))
    batches = {one for one in (base.batch, part.batch) if one is not None}
    if len(batches) > 1 or dim in batches:
        raise OutOfReach
    for batch in batches:
        refuse_if_apart(source, batch, reaches)
        refuse_if_apart(written, batch - (len(reaches.shape(written)) < base.rank and batch > dim), reaches)
    whole = list(np.broadcast_shapes(_without(base.last.shape, dim), _without(part.last.shape, dim)))
    whole.insert(dim, size)

    def over(array: Array, own: Array) -> Array:
        result = np.broadcast_to(array, whole).copy()
        result[(slice(None),) * dim + (place,)] = own
        return result

    return reach(over(base.last, part.last), over(base.known, part.known), batches.pop() if batches else None)


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
