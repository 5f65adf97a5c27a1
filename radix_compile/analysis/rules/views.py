"""Views and copies: entries move, none is computed. Reshapes are followed atom by atom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from radix_compile.analysis.arguments import argument, operand, source_of
from radix_compile.analysis.rules.masks import in_other_dtype
from radix_compile.ir.axes import (
    SEQ,
    Atom,
    Axes,
    Axis,
    Feature,
    Layout,
    Longer,
    Mixes,
    Size,
    Token,
    Uniform,
    as_size,
    feature,
    has_tokens,
    is_longer,
    plain_axes,
    plain_axis,
    shape_of,
)
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Fact, Filled, Index, Masked, Ones, PerRow, Predicate, negation, remap, stored
from radix_compile.ir.value import Value, broadcast, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def _moved(fact: Fact | None, old_rank: int, new_rank: int, dims: Mapping[int, int]) -> Fact | None:
    """The fact after dimension ``d`` (from the left) of ``old_rank`` has become ``dims[d]`` of ``new_rank``."""
    return remap(fact, {old - old_rank: new - new_rank for old, new in dims.items()})


def type_as(node: fx.Node, layout: Layout) -> Value:
    """A cast; of the other tensor only the dtype is read."""
    return same_entries(node, layout)


def same_entries(node: fx.Node, layout: Layout) -> Value:
    """The same entries, perhaps in another dtype. Facts about exact values do not survive a cast to floating point."""
    source = source_of(node)
    value = value_of(source)
    before, after = val(source).dtype, val(node).dtype
    return Value(value.axes, fact=_cast(value.fact, before, after))


def _cast(fact: Fact | None, before: torch.dtype, after: torch.dtype) -> Fact | None:
    if isinstance(fact, Filled):
        return stored(fact, after)
    if before == after:
        return fact
    if before.is_floating_point and after.is_floating_point:
        return in_other_dtype(fact, after)
    if isinstance(fact, Masked) and fact.zero and after == torch.bool and fact.floor <= -torch.finfo(before).tiny:
        return Predicate(negation(fact.visible))
    if isinstance(fact, Predicate) and before == torch.bool:
        return Ones(fact.formula)
    if isinstance(fact, Ones):
        return Predicate(fact.formula) if after == torch.bool else fact
    if not isinstance(fact, Index | PerRow):
        return None
    if isinstance(fact, PerRow) and after == torch.bool:
        return replace(fact, exact=False)
    wider = after.itemsize > before.itemsize or (after.itemsize == before.itemsize and before.is_signed)
    return fact if after.is_signed and not after.is_floating_point and (wider or before == torch.bool) else None


def reshape(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    axes, dims = regroup(layout, source.axes, shape_of(node))
    return Value(axes, fact=_moved(source.fact, len(source.axes), len(axes), dims))


def regroup(layout: Layout, axes: Axes, shape: Sequence[Size]) -> tuple[Axes, dict[int, int]]:
    """The axes after a reshape to ``shape``, and which dimensions survive it as they are.

    Entries keep their order in memory, so walking both shapes from the left says exactly which atoms make up each new
    dimension. A feature dimension may be cut anywhere, a token axis never.
    """
    queue: list[tuple[Atom, int]] = [(atom, dim) for dim, axis in enumerate(axes) for atom in axis]
    queue.reverse()
    result: list[Axis] = []
    dims: dict[int, int] = {}
    for new, size in enumerate(shape):
        taken: list[tuple[Atom, int]] = []
        left = size
        while left != 1:
            if not queue:
                raise Mixes("cannot follow the tokens through this reshape", RefusalCode.UNCLEAR_DIMENSIONS)
            atom, dim = queue.pop()
            atom_size = layout.atom_size(atom)
            ratio = left / atom_size
            if not ratio.is_integer:
                if isinstance(atom, Token):
                    raise Mixes("a reshape cuts through a token axis", RefusalCode.MIXES_TOKENS)
                rest = atom_size / left
                if not rest.is_integer:
                    raise Mixes("cannot follow the tokens through this reshape", RefusalCode.UNCLEAR_DIMENSIONS)
                queue.append((type(atom)(rest), -1))
                atom, dim, ratio = type(atom)(left), -1, sympy.Integer(1)
            taken.append((atom, dim))
            left = ratio
        result.append(_tidy(tuple(atom for atom, _ in taken)))
        whole_dims = {dim for _, dim in taken}
        if len(whole_dims) == 1 and (dim := whole_dims.pop()) >= 0 and len(taken) == len(axes[dim]):
            dims[dim] = new
    if queue:
        raise Mixes("cannot follow the tokens through this reshape", RefusalCode.UNCLEAR_DIMENSIONS)
    return tuple(result), dims


def _tidy(axis: Axis) -> Axis:
    """One atom for each run of features; of uniform ones, which stay apart, as of something repeated."""
    result: list[Atom] = []
    for atom in axis:
        last = result[-1] if result else None
        if isinstance(atom, Feature) and isinstance(last, Feature):
            result[-1] = Feature(last.size * atom.size)
        elif isinstance(atom, Uniform) and isinstance(last, Uniform):
            result[-1] = Uniform(last.size * atom.size)
        else:
            result.append(atom)
    return tuple(result)


def expand(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    shape = shape_of(node)
    axes: list[Axis] = [(Uniform(size),) if size != 1 else () for size in shape]
    offset = len(shape) - len(source.axes)
    for dim, axis in enumerate(source.axes):
        if axis:
            axes[dim + offset] = axis
    return Value(tuple(axes), fact=source.fact)


def unsqueeze(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    rank = len(source.axes) + 1
    at = argument(node, "dim") % rank
    dims = {dim: dim + (dim >= at) for dim in range(rank - 1)}
    return Value((*source.axes[:at], (), *source.axes[at:]), fact=_moved(source.fact, rank - 1, rank, dims))


def squeeze(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    rank = len(source.axes)
    named = argument(node, "dim")
    gone = {dim % rank for dim in ([named] if isinstance(named, int) else named)}
    if any(has_tokens(source.axes[dim]) for dim in gone):
        raise Mixes("squeezes a token axis", RefusalCode.UNCLEAR_DIMENSIONS)
    kept = [dim for dim in range(rank) if dim not in gone or source.axes[dim] != ()]
    dims = {dim: new for new, dim in enumerate(kept)}
    return Value(tuple(source.axes[dim] for dim in kept), fact=_moved(source.fact, rank, len(kept), dims))


def permute(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    rank = len(source.axes)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in argument(node, "dims")]
    elif node.target is aten.numpy_T.default:
        order.reverse()
    elif rank > 1:
        first, second = (
            (argument(node, "dim0"), argument(node, "dim1")) if node.target is aten.transpose.int else (-2, -1)
        )
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    dims = {dim: new for new, dim in enumerate(order)}
    return Value(tuple(source.axes[dim] for dim in order), fact=_moved(source.fact, rank, rank, dims))


def slice_(node: fx.Node, layout: Layout) -> Value:
    source = source_of(node)
    value = value_of(source)
    dim = argument(node, "dim") % len(value.axes)
    before, after = shape_of(source)[dim], shape_of(node)[dim]
    start, step = argument(node, "start") or 0, argument(node, "step")
    if before == after and step == 1:
        return Value(value.axes, fact=value.fact, identity=source)
    if is_longer(value.axes[dim]) and start == 0 and step == 1 and after == layout.seq:
        return Value((*value.axes[:dim], (SEQ,), *value.axes[dim + 1 :]), fact=value.fact)
    feature(value.axes[dim], "slices")
    axes = (*value.axes[:dim], plain_axis(after), *value.axes[dim + 1 :])
    from_start = step == 1 and start == 0
    return Value(axes, fact=value.fact if from_start else _shifted(value.fact, dim - len(axes), start, step))


def _shifted(fact: Fact | None, dim: int, start: object, step: object) -> Fact | None:
    if isinstance(fact, Filled):
        return fact
    if isinstance(fact, Index) and fact.dim == dim and isinstance(start, int) and start >= 0 and step == 1:
        return Index(dim, fact.offset + start)
    return None


def select(node: fx.Node, layout: Layout) -> Value:
    value = value_of(source_of(node))
    dim = argument(node, "dim") % len(value.axes)
    feature(value.axes[dim], "takes one entry of")
    rank = len(value.axes)
    dims = {other: other - (other > dim) for other in range(rank) if other != dim}
    return Value((*value.axes[:dim], *value.axes[dim + 1 :]), fact=_moved(value.fact, rank, rank - 1, dims))


def split(node: fx.Node, layout: Layout) -> tuple[Value, ...]:
    value = value_of(source_of(node))
    dim = argument(node, "dim") % len(value.axes)
    feature(value.axes[dim], "splits")
    pieces = [piece.shape[dim] for piece in val(node)]
    return tuple(Value((*value.axes[:dim], plain_axis(as_size(size)), *value.axes[dim + 1 :])) for size in pieces)


def unbind(node: fx.Node, layout: Layout) -> tuple[Value, ...]:
    value = value_of(source_of(node))
    dim = argument(node, "dim") % len(value.axes)
    feature(value.axes[dim], "takes apart")
    return tuple(Value((*value.axes[:dim], *value.axes[dim + 1 :])) for _ in val(node))


def cat(node: fx.Node, layout: Layout) -> Value:
    # torch ignores one-dimensional empty tensors here: an empty key-value cache is one.
    tensors = [arg for arg in argument(node, "tensors") if tuple(val(arg).shape) != (0,)]
    rank = len(shape_of(node))
    if len(tensors) == 1:
        value = value_of(tensors[0])
        if val(tensors[0]).dtype != val(node).dtype:  # a cast, as under autocast
            return Value(value.axes)
        return Value(value.axes, fact=value.fact, identity=tensors[0])
    dim = argument(node, "dim") % rank
    if _are_scores(value_of(tensors[0]), dim):
        return _with_sinks(tensors, dim, shape_of(node)[dim], layout)
    if any(has_tokens(value_of(tensor).axes[dim]) for tensor in tensors) and any(
        t.op == "placeholder" for t in tensors
    ):
        raise Mixes(
            "appends rows to an input, as to a cache that is filled: prompts fold if they come in one call",
            RefusalCode.FILLED_CACHE,
        )
    parts = []
    for tensor in tensors:
        axes = value_of(tensor).axes
        feature(axes[dim], "joins tensors along")
        parts.append(operand(tensor, (*axes[:dim], (), *axes[dim + 1 :])))
    axes, uses = broadcast(layout, parts, exact=True)
    return Value((*axes[:dim], plain_axis(shape_of(node)[dim]), *axes[dim + 1 :]), operands=uses)


def _are_scores(value: Value, dim: int) -> bool:
    """Masked scores whose keys lie in that dimension?"""
    return value.is_pair and value.axes[dim] == (SEQ,) and isinstance(value.fact, Masked)


def _with_sinks(tensors: list[fx.Node], dim: int, size: Size, layout: Layout) -> Value:
    """Scores, and after them for each query some that belong to no key (attention sinks, which take up weight)."""
    scores, *sinks = (value_of(tensor) for tensor in tensors)
    for value in sinks:
        feature(value.axes[dim], "joins tensors along")
    parts = [operand(t, (*value_of(t).axes[:dim], (), *value_of(t).axes[dim + 1 :])) for t in tensors]
    axes, uses = broadcast(layout, parts, exact=True)
    # A sink may be as large as it likes: what is hidden is still far below the keys that the row sees.
    keys = (Longer("keys", size - layout.seq),)
    return Value((*axes[:dim], keys, *axes[dim + 1 :]), fact=scores.fact, operands=uses)


def view_as_complex(node: fx.Node, layout: Layout) -> Value:
    axes = value_of(source_of(node)).axes
    feature(axes[-1], "takes two entries of")
    return Value(axes[:-1])


def view_as_real(node: fx.Node, layout: Layout) -> Value:
    return Value((*value_of(source_of(node)).axes, *plain_axes(node)[-1:]))


def slice_scatter(node: fx.Node, layout: Layout) -> Value:
    """Some features written over; the rest, and the rows, are where they were."""
    source, written = source_of(node), argument(node, "src")
    dim = argument(node, "dim") % len(shape_of(node))
    parts = []
    for part in (source, written):
        axes = value_of(part).axes
        feature(axes[dim], "writes along")
        parts.append(operand(part, (*axes[:dim], (), *axes[dim + 1 :])))
    axes, uses = broadcast(layout, parts, exact=True)
    return Value((*axes[:dim], plain_axis(shape_of(node)[dim]), *axes[dim + 1 :]), operands=uses)


def stack(node: fx.Node, layout: Layout) -> Value:
    tensors = argument(node, "tensors")
    dim = argument(node, "dim") % len(shape_of(node))
    axes, uses = broadcast(layout, [operand(tensor) for tensor in tensors], exact=True)
    return Value((*axes[:dim], plain_axis(shape_of(node)[dim]), *axes[dim:]), operands=uses)


def repeat(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    repeats = [val(times) if isinstance(times, fx.Node) else times for times in argument(node, "repeats")]
    axes: Axes = ((),) * (len(repeats) - len(source.axes)) + source.axes
    for axis, times in zip(axes, repeats, strict=True):
        if times != 1:
            feature(axis, "repeats")
    before = [() if times == 1 else (Uniform(as_size(times)),) for times in repeats]
    return Value(tuple(_tidy((*more, *axis)) for more, axis in zip(before, axes, strict=True)))


def repeat_interleave(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    named = argument(node, "dim")
    if named is None:
        if not source.is_constant:
            raise Mixes("repeats the flattened tensor", RefusalCode.UNCLEAR_DIMENSIONS)
        return Value(plain_axes(node))
    dim = named % len(source.axes)
    feature(source.axes[dim], "repeats along")
    return Value((*source.axes[:dim], plain_axis(shape_of(node)[dim]), *source.axes[dim + 1 :]))


def flip(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    for dim in argument(node, "dims"):
        feature(source.axes[dim], "reverses")
    return Value(source.axes)


def pad(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    rank = len(source.axes)
    amounts = argument(node, "pad")
    axes = list(source.axes)
    for position, amount in enumerate(amounts):
        dim = rank - 1 - position // 2
        if amount != 0:
            feature(axes[dim], "pads")
            axes[dim] = plain_axis(shape_of(node)[dim])
    return Value(tuple(axes))
