"""Which rows the results of ops are computed from, given those of their inputs (see ``analysis.row_numbers``).

A rule gets the numbers of one argument, and returns the numbers of the result; None if any entry of the result may be
computed from any of these rows. Its claim: an entry of the result does not change if other rows than those of its
number are replaced by zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from radix_compile.analysis import row_numbers
from radix_compile.analysis.arguments import argument, is_tensor, source_of
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.row_numbers import NO_MORE_ROWS, NumbersProgram, RowNumbers
from radix_compile.ir.axes import Size, shape_of
from radix_compile.torch_internals import val

aten = torch.ops.aten

RowNumbersRule: TypeAlias = Callable[[fx.Node, fx.Node, RowNumbers, NumbersProgram], RowNumbers | None]


def of_first(rule: RowNumbersRule) -> RowNumbersRule:
    """Return a rule for rows in the first argument: from rows in another one, any entry may be computed."""

    @functools.wraps(rule)
    def checked(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
        return rule(node, rows, source, program) if node.args[0] is rows else None

    return checked


# -------------------------------------------------------------------------------------------------------------- views


@of_first
def same(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """An op whose result has an entry for each entry of its first argument."""
    return source


@of_first
def permute(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    order = [dim % source.rank for dim in argument(node, "dims")]
    return _permuted(source, order, program)


@of_first
def transpose(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    order = list(range(source.rank))
    first, second = (argument(node, name) % source.rank for name in ("dim0", "dim1"))
    order[first], order[second] = second, first
    return _permuted(source, order, program)


@of_first
def swap_last(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """``t`` and ``mT``."""
    order = [*range(source.rank - 2), *reversed(range(max(source.rank - 2, 0), source.rank))]
    return _permuted(source, order, program)


def _permuted(source: RowNumbers, order: list[int], program: NumbersProgram) -> RowNumbers:
    dims = frozenset(new for new, old in enumerate(order) if old in source.dims)
    return replace(source, node=program.call(aten.permute.default, source.node, order), dims=dims)


@of_first
def unsqueeze(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    at = argument(node, "dim") % (source.rank + 1)
    dims = frozenset(dim + (dim >= at) for dim in source.dims)
    return replace(source, node=program.call(aten.unsqueeze.default, source.node, at), rank=source.rank + 1, dims=dims)


@of_first
def squeeze(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    given = argument(node, "dim")
    sizes = shape_of(source_of(node))
    dims = {dim % source.rank for dim in ([given] if isinstance(given, int) else given)}
    return _without(source, {dim for dim in dims if sizes[dim] == 1}, program)


def _without(source: RowNumbers, removed: set[int], program: NumbersProgram) -> RowNumbers:
    """Remove dimensions in which there is one number."""
    kept = [dim for dim in range(source.rank) if dim not in removed]
    numbers = program.call(aten.squeeze.dims, source.node, sorted(removed)) if removed else source.node
    dims = frozenset(new for new, old in enumerate(kept) if old in source.dims)
    return replace(source, node=numbers, rank=len(kept), dims=dims)


@of_first
def expand(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    numbers, new = source.node, len(val(node).shape) - source.rank
    for _ in range(new):
        numbers = program.call(aten.unsqueeze.default, numbers, 0)
    return replace(source, node=numbers, rank=source.rank + new, dims=frozenset(dim + new for dim in source.dims))


@of_first
def reshape(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """Dimensions of rows may be merged and split, if none of features is merged with them."""
    before, after = shape_of(source_of(node)), shape_of(node)
    shape: list[Any] = []
    dims: set[int] = set()
    for old, new in _groups(before, after):
        of_rows = [dim for dim in old if dim in source.dims]
        if not of_rows:
            shape += [1] * len(new)
            continue
        if any(before[dim] != 1 for dim in old if dim not in source.dims):
            return None
        sizes = [program.size(after[dim]) for dim in new]
        if None in sizes:
            return None
        dims.update(dim for dim in new if after[dim] != 1)
        shape += sizes
    return replace(
        source, node=program.call(aten.reshape.default, source.node, shape), rank=len(after), dims=frozenset(dims)
    )


def _groups(before: tuple[Size, ...], after: tuple[Size, ...]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions become which: the shortest stretches with the same number of entries."""
    entries = [list(accumulate(sizes, mul, initial=sympy.Integer(1))) for sizes in (before, after)]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    for stop in range(1, len(before) + 1):
        for other in range(j + 1, len(after) + 1):
            if sympy.expand(entries[0][stop] - entries[1][other]) == 0:
                groups.append((list(range(i, stop)), list(range(j, other))))
                i, j = stop, other
                break
    if not groups:
        return [(list(range(len(before))), list(range(len(after))))]
    groups[-1][0].extend(range(i, len(before)))  # sizes of one
    groups[-1][1].extend(range(j, len(after)))
    return groups


# -------------------------------------------------------------------------------------------------------------- picks


@of_first
def slice_(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    dim = argument(node, "dim") % source.rank
    if dim not in source.dims:
        return source
    start, end, step = (program.given(argument(node, name)) for name in ("start", "end", "step"))
    for name, given in (("start", start), ("end", end)):
        if given is None and argument(node, name) is not None:
            return None
    program.has_picks = True
    return replace(source, node=program.call(aten.slice.Tensor, source.node, dim, start, end, step), is_whole=False)


@of_first
def select(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    dim, index = argument(node, "dim") % source.rank, argument(node, "index")
    if dim not in source.dims:
        return _without(source, {dim}, program)
    index = program.given(index)
    if index is None:
        return None
    dims = frozenset(old - (old > dim) for old in source.dims if old != dim)
    program.has_picks = True
    numbers = program.call(aten.select.int, source.node, dim, index)
    return replace(source, node=numbers, rank=source.rank - 1, dims=dims, is_whole=False)


@of_first
def index(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    indices = list(argument(node, "indices"))
    indices += [None] * (source.rank - len(indices))
    at = [dim for dim, one in enumerate(indices) if one is not None]
    given = program.given(indices)
    if given is None or not source.dims.issuperset(at) or any(val(indices[dim]).dtype == torch.bool for dim in at):
        return None
    rank = max(val(indices[dim]).ndim for dim in at)
    first = at[0] if at == list(range(at[0], at[0] + len(at))) else 0  # where the dimensions of the indices go
    kept = [dim for dim in range(source.rank) if dim not in at]
    places = [place if place < first else place + rank for place in range(len(kept))]
    dims = {place for place, dim in zip(places, kept, strict=True) if dim in source.dims}
    program.has_picks = True
    return RowNumbers(
        program.call(aten.index.Tensor, source.node, given),
        len(kept) + rank,
        frozenset(dims | set(range(first, first + rank))),
        is_whole=False,
        is_finite=source.is_finite,
    )


@of_first
def index_select(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    dim, indices = argument(node, "dim") % source.rank, program.given(argument(node, "index"))
    if dim not in source.dims:
        return source
    if indices is None:
        return None
    program.has_picks = True
    return replace(source, node=program.call(aten.index_select.default, source.node, dim, indices), is_whole=False)


@of_first
def gather(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    dim, indices = argument(node, "dim") % source.rank, argument(node, "index")
    before, after = shape_of(source_of(node)), shape_of(indices)
    if any(before[other] != after[other] for other in source.dims - {dim}):
        return None
    if dim not in source.dims:
        return source if _has_no_rows(indices, program) else None
    given = program.given(indices)
    if given is None:
        return None
    dims = frozenset(other for other in range(source.rank) if after[other] != 1)
    program.has_picks = True
    numbers = program.call(row_numbers.gather, source.node, dim, given)
    return RowNumbers(numbers, source.rank, dims, is_whole=False, is_finite=source.is_finite)


def _has_no_rows(node: Any, program: NumbersProgram) -> bool:
    return not isinstance(node, fx.Node) or program.is_given(node)


# --------------------------------------------------------------------------------------------------------- arithmetic


def elementwise(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """An op whose result has an entry for each entry of its largest argument, which is the one with the rows."""
    if len(val(node).shape) != source.rank:
        return None
    return replace(source, is_finite=source.is_finite and info_of(node.target).finite_at_zero)


@of_first
def reduce(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """A reduction over features alone."""
    given = argument(node, "dim")
    dims = {dim % source.rank for dim in ([given] if isinstance(given, int) else given or range(source.rank))}
    if not source.dims.isdisjoint(dims):
        return None
    source = replace(source, is_finite=False)
    return source if argument(node, "keepdim") else _without(source, dims, program)


@of_first
def along(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """``softmax`` and ``log_softmax`` of features."""
    return None if argument(node, "dim") % source.rank in source.dims else source


# -------------------------------------------------------------------------------------------------------------- hides


def shown_by(node: fx.Node, rows: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return the mask by which an op hides entries of the argument ``rows``, and the truth value that shows them."""
    match node.target:
        case aten.mul.Tensor:
            factor = next((arg for arg in node.all_input_nodes if arg is not rows), None)
            return (factor, True) if factor is not None and _is_mask(factor) else None
        case aten.where.self | aten.where.ScalarOther | aten.where.ScalarSelf:
            condition, first, second = (argument(node, name) for name in ("condition", "self", "other"))
            is_one_of_them = (first is rows) != (second is rows) and condition is not rows
            return (condition, first is rows) if is_one_of_them else None
        case aten.masked_fill.Scalar:
            return (argument(node, "mask"), False) if source_of(node) is rows else None
    return None


def _is_mask(factor: fx.Node) -> bool:
    """Is a factor an input ``[B, S]``, or integers that were cast? Then there may be zeros in it, unlike in a table."""
    if not is_tensor(factor):
        return False
    while info_of(factor.target).is_view:
        factor = source_of(factor)
    return not val(factor).dtype.is_floating_point or (factor.op == "placeholder" and val(factor).ndim == 2)


def _before_casts(node: fx.Node) -> fx.Node:
    """Return the value before casts, copies and expansions, which keep zeros and lose none."""
    while info_of(node.target).row_numbers in (same, expand) and val(node).ndim == val(source_of(node)).ndim:
        node = source_of(node)
    return node


def hide(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """A product with a mask, or a choice by one, does not depend on the rows that the mask hides.

    These may be replaced by zeros only as long as nothing infinite comes of it: zero times that is not a number.
    """
    found = shown_by(node, rows)
    if found is None or not source.is_finite:
        return elementwise(node, rows, source, program)
    mask, truth = _before_casts(found[0]), found[1]
    shown = program.given(mask)
    if shown is None or len(val(mask).shape) > source.rank or len(val(node).shape) != source.rank:
        return elementwise(node, rows, source, program)
    if not truth:
        shown = program.call(aten.logical_not.default, shown)
    program.masks.add(mask)
    return replace(source, node=program.call(row_numbers.hide, source.node, shown), is_whole=False)


@of_first
def cross_entropy(node: fx.Node, rows: fx.Node, source: RowNumbers, program: NumbersProgram) -> RowNumbers | None:
    """``cross_entropy_loss`` and ``nll_loss``: a row whose target is ignored has no loss and no gradient."""
    target, classes = argument(node, "target"), 1
    shown = program.given(target)
    if shown is None or val(target).ndim != source.rank - 1 or val(target).dtype.is_floating_point:
        return None
    if classes in source.dims:
        return None
    program.has_picks = True
    shown = program.call(aten.ne.Scalar, shown, argument(node, "ignore_index"))
    shown = program.call(aten.unsqueeze.default, shown, classes)
    numbers = program.call(row_numbers.hide, source.node, shown)
    if argument(node, "reduction"):
        program.read[numbers] = None
        return NO_MORE_ROWS
    return _without(replace(source, node=numbers, is_whole=False, is_finite=True), {classes}, program)
