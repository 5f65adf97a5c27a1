"""Ops that make tensors from shapes and numbers, and do not read the entries of their inputs."""

from __future__ import annotations

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.rules.elementwise import broadcast_inputs
from radix_compile.analysis.rules.masks import as_formula, if_representable, is_hidden
from radix_compile.ir.axes import Layout, feature, plain_axes, uniform_axes
from radix_compile.ir.facts import (
    Diff,
    Fact,
    Filled,
    Formula,
    Index,
    Masked,
    Ones,
    Predicate,
    cast_filled,
    conjunction,
    negation,
)
from radix_compile.ir.value import Value, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def arange(node: fx.Node, layout: Layout) -> Value:
    start, step = (0, 1) if node.target is aten.arange.default else (argument(node, "start"), 1)
    if node.target is aten.arange.start_step:
        step = argument(node, "step")
    # A narrower dtype might wrap around, here or in later arithmetic.
    is_index = isinstance(start, int) and step == 1 and val(node).dtype in (torch.int32, torch.int64)
    return Value(plain_axes(node), fact=if_representable(node, Index(-1, start)) if is_index else None)


def _fill_value(node: fx.Node) -> float | None:
    """Return the number with which the op fills a tensor, or None if unknown."""
    name = node.target._schema.name.removeprefix("aten::") if hasattr(node.target, "_schema") else ""
    if "ones" in name:
        return 1.0
    if "zeros" in name:
        return 0.0
    if "empty" in name:
        return None
    filled = argument(node, "s" if name == "scalar_tensor" else "fill_value")
    return float(filled) if isinstance(filled, bool | int | float) else None


def _filled(node: fx.Node) -> Fact | None:
    value = _fill_value(node)
    return None if value is None else cast_filled(Filled(value), val(node).dtype)


def fill(node: fx.Node, layout: Layout) -> Value:
    return Value(uniform_axes(node), fact=_filled(node))


def fill_like(node: fx.Node, layout: Layout) -> Value:
    axes, uses = broadcast_inputs(node, layout)
    return Value(axes, fact=_filled(node), operands=uses)


def triangle(node: fx.Node, layout: Layout) -> Value:
    """Return the value of ``tril`` or ``triu``: the triangle of ones is a predicate, of minus infinity a mask."""
    value = value_of(source_of(node))
    if not value.is_constant and not value.is_pair:
        return _features_only(value)
    diagonal = argument(node, "diagonal")
    axes = value.axes
    if value.is_constant:  # the last two dimensions are no longer uniform
        axes = (*axes[:-2], *plain_axes(node)[-2:])
    if not isinstance(diagonal, int):
        return Value(axes)
    kept: Formula = Diff(-1, -2, diagonal) if node.target is aten.tril.default else Diff(-2, -1, -diagonal)
    return Value(axes, fact=_triangle_fact(value, kept, val(node).dtype))


def _features_only(value: Value) -> Value:
    """Return the value of a triangle of the last two dimensions, which must not have tokens."""
    for axis in value.axes[-2:]:
        feature(axis, "takes a triangle of")
    return Value(value.axes)


def _triangle_fact(value: Value, kept: Formula, dtype: torch.dtype) -> Fact | None:
    """Return the fact of a tensor whose entries are zero except where ``kept`` holds."""
    fact = value.fact
    if dtype == torch.bool:
        return Predicate(conjunction(kept, as_formula(value)))
    if isinstance(fact, Filled) and dtype.is_floating_point and is_hidden(fact, dtype):
        return Masked.of(negation(kept), fact.value, 0.0, zero=True)
    if isinstance(fact, Filled) and fact.value == 1:
        return Ones(kept)
    return None
