"""Views and copies, which move entries and compute none. Reshapes are followed atom by atom."""

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
from radix_compile.ir.facts import Fact, Filled, Index, Masked, Ones, PerRow, Predicate, cast_filled, negation, remap
from radix_compile.ir.value import Value, broadcast, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def _moved(fact: Fact | None, old_rank: int, new_rank: int, dims: Mapping[int, int]) -> Fact | None:
    """Return the fact after dimension ``d`` (from the left) of ``old_rank`` becomes ``dims[d]`` of ``new_rank``."""
    return remap(fact, {old - old_rank: new - new_rank for old, new in dims.items()})


def type_as(node: fx.Node, layout: Layout) -> Value:
    """Return the value of a cast. Only the dtype of the other tensor is read."""
    return same_entries(node, layout)


def same_entries(node: fx.Node, layout: Layout) -> Value:
    """Return the value of a copy or a cast. A cast from integers to floating point loses facts about exact values."""
    source = source_of(node)
    value = value_of(source)
    before, after = val(source).dtype, val(node).dtype
    return Value(value.axes, fact=_cast(value.fact, before, after))


def _cast(fact: Fact | None, before: torch.dtype, after: torch.dtype) -> Fact | None:
    if isinstance(fact, Filled):
        return cast_filled(fact, after)
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
    """Return the axes after a reshape to ``shape``, and a map from unchanged dimensions to their new numbers.

    A reshape keeps the order of entries, so walking both shapes from the left tells which atoms make up each new
    dimension. A feature atom may be split anywhere, a token atom never.
    """
    queue: list[tuple[Atom, int]] = [(atom, dim) for dim, axis in enumerate(axes) for atom in axis]
    queue.reverse()
    result: list[Axis] = []
    dims: dict[int, int] = {}
    for new, size in enumerate(shape):
        taken: list[tuple[Atom, int]] = []
        remaining = size
        while remaining != 1:
            if not queue:
                raise Mixes("cannot follow the tokens through this reshape", RefusalCode.UNCLEAR_DIMENSIONS)
            atom, dim = queue.pop()
            atom_size = layout.atom_size(atom)
            ratio = remaining / atom_size
            if not ratio.is_integer:
                if isinstance(atom, Token):
                    raise Mixes("a reshape cuts through a token axis", RefusalCode.MIXES_TOKENS)
                rest = atom_size / remaining
                if not rest.is_integer:
                    raise Mixes("cannot follow the tokens through this reshape", RefusalCode.UNCLEAR_DIMENSIONS)
                queue.append((type(atom)(rest), -1))
                atom, dim, ratio = type(atom)(remaining), -1, sympy.Integer(1)
            taken.append((atom, dim))
            remaining = ratio
        result.append(_merge_runs(tuple(atom for atom, _ in taken)))
        old_dims = {dim for _, dim in taken}
        if len(old_dims) == 1 and (dim := old_dims.pop()) >= 0 and len(taken) == len(axes[dim]):
            dims[dim] = new
    if queue:
        raise Mixes("cannot follow the tokens through this reshape", RefusalCode.UNCLEAR_DIMENSIONS)
    return tuple(result), dims


def _merge_runs(axis: Axis) -> Axis:
    """Merge each run of feature atoms into one, and each run of uniform atoms into one."""
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
    new = argument(node, "dim") % rank
    dims = {dim: dim + (dim >= new) for dim in range(rank - 1)}
    return Value((*source.axes[:new], (), *source.axes[new:]), fact=_moved(source.fact, rank - 1, rank, dims))


def squeeze(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    rank = len(source.axes)
    given = argument(node, "dim")
    squeezed = {dim % rank for dim in ([given] if isinstance(given, int) else given)}
    if any(has_tokens(source.axes[dim]) for dim in squeezed):
        raise Mixes("squeezes a token axis", RefusalCode.UNCLEAR_DIMENSIONS)
    kept = [dim for dim in range(rank) if dim not in squeezed or source.axes[dim] != ()]
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
    starts_at_zero = step == 1 and start == 0
    return Value(axes, fact=value.fact if starts_at_zero else _shifted(value.fact, dim - len(axes), start, step))


def _shifted(fact: Fact | None, dim: int, start: object, step: object) -> Fact | None:
    """Return the fact after a slice along ``dim`` that does not start at zero, or has a step."""
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
    sizes = [part.shape[dim] for part in val(node)]
    return tuple(Value((*value.axes[:dim], plain_axis(as_size(size)), *value.axes[dim + 1 :])) for size in sizes)


def unbind(node: fx.Node, layout: Layout) -> tuple[Value, ...]:
    value = value_of(source_of(node))
    dim = argument(node, "dim") % len(value.axes)
    feature(value.axes[dim], "takes apart")
    return tuple(Value((*value.axes[:dim], *value.axes[dim + 1 :])) for _ in val(node))


def cat(node: fx.Node, layout: Layout) -> Value:
    # torch ignores one-dimensional empty tensors here, such as an empty key-value cache.
    tensors = [arg for arg in argument(node, "tensors") if tuple(val(arg).shape) != (0,)]
    rank = len(shape_of(node))
    if len(tensors) == 1:
        value = value_of(tensors[0])
        if val(tensors[0]).dtype != val(node).dtype:  # a cast, for example under autocast
            return Value(value.axes)
        return Value(value.axes, fact=value.fact, identity=tensors[0])
    dim = argument(node, "dim") % rank
    if _are_scores(value_of(tensors[0]), dim):
        return _with_sinks(tensors, dim, shape_of(node)[dim], layout)
    joins_rows = any(has_tokens(value_of(tensor).axes[dim]) for tensor in tensors)
    if joins_rows and any(tensor.op == "placeholder" for tensor in tensors):
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
    """Does the value hold masked scores, with keys along ``dim``?"""
    return value.is_pair and value.axes[dim] == (SEQ,) and isinstance(value.fact, Masked)


def _with_sinks(tensors: list[fx.Node], dim: int, size: Size, layout: Layout) -> Value:
    """Return the value of masked scores joined with entries that belong to no key (attention sinks)."""
    scores, *sinks = (value_of(tensor) for tensor in tensors)
    for value in sinks:
        feature(value.axes[dim], "joins tensors along")
    parts = [operand(t, (*value_of(t).axes[:dim], (), *value_of(t).axes[dim + 1 :])) for t in tensors]
    axes, uses = broadcast(layout, parts, exact=True)
    # A sink may be arbitrarily large: hidden entries are still far below the keys that the row sees.
    keys = (Longer("keys", size - layout.seq),)
    return Value((*axes[:dim], keys, *axes[dim + 1 :]), fact=scores.fact, operands=uses)


def view_as_complex(node: fx.Node, layout: Layout) -> Value:
    axes = value_of(source_of(node)).axes
    feature(axes[-1], "takes two entries of")
    return Value(axes[:-1])


def view_as_real(node: fx.Node, layout: Layout) -> Value:
    return Value((*value_of(source_of(node)).axes, *plain_axes(node)[-1:]))


def slice_scatter(node: fx.Node, layout: Layout) -> Value:
    """Return the value of a tensor with some features overwritten."""
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
    counts = [val(count) if isinstance(count, fx.Node) else count for count in argument(node, "repeats")]
    axes: Axes = ((),) * (len(counts) - len(source.axes)) + source.axes
    for axis, count in zip(axes, counts, strict=True):
        if count != 1:
            feature(axis, "repeats")
    repeats: list[Axis] = [() if count == 1 else (Uniform(as_size(count)),) for count in counts]
    return Value(tuple(_merge_runs((*outer, *axis)) for outer, axis in zip(repeats, axes, strict=True)))


def repeat_interleave(node: fx.Node, layout: Layout) -> Value:
    source = value_of(source_of(node))
    given = argument(node, "dim")
    if given is None:
        if not source.is_constant:
            raise Mixes("repeats the flattened tensor", RefusalCode.UNCLEAR_DIMENSIONS)
        return Value(plain_axes(node))
    dim = given % len(source.axes)
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
