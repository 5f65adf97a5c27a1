"""Bounds of a tensor's entries, by interval arithmetic: enough for position biases (ALiBi).

Rounding is ignored: the bounds are compared with numbers that are orders of magnitude away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, is_tensor
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.axes import shape_of
from radix_compile.ir.facts import Filled, Index
from radix_compile.ir.graph import facts, set_facts
from radix_compile.ir.value import value_of
from radix_compile.torch_internals import val

Bounds = tuple[float, float]
"""The least and the greatest possible entry."""


def bounds_of(value: Any) -> Bounds | None:
    """Return the bounds of a tensor's entries or of a Python number; None if unknown."""
    if isinstance(value, bool | int | float):
        return (float(value), float(value))
    if not is_tensor(value) or val(value).dtype.is_complex:
        return None
    bounds = facts(value).bounds
    if bounds == ():
        bounds = _in_dtype(_compute(value), val(value).dtype)
        set_facts(value, replace(facts(value), bounds=bounds))
    return bounds or None


def _compute(node: fx.Node) -> Bounds | None:
    fact = value_of(node).fact
    if isinstance(fact, Filled):
        return (fact.value, fact.value)
    if isinstance(fact, Index):
        size = shape_of(node)[fact.dim]
        return (fact.offset, fact.offset + int(size) - 1) if size.is_Integer else None
    compute = info_of(node.target).bounds
    return compute(node) if compute else None


def _in_dtype(bounds: Bounds | None, dtype: torch.dtype) -> Bounds | None:
    """Return the bounds after storing numbers in ``dtype``: integers may wrap around, others may become infinite."""
    if dtype == torch.bool:
        return (0.0, 1.0)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if bounds is not None and limits.min <= bounds[0] <= bounds[1] <= limits.max:
        return bounds if dtype.is_floating_point else (float(math.floor(bounds[0])), float(math.ceil(bounds[1])))
    return None if dtype.is_floating_point else (float(limits.min), float(limits.max))


# ---------------------------------------------------------------------------------- functions for the table of ops


def of_inputs(node: fx.Node) -> Bounds | None:
    """Return the bounds of an op whose entries are entries of its inputs."""
    inputs = [bounds_of(arg) for arg in node.all_input_nodes if is_tensor(arg)]
    known = [bounds for bounds in inputs if bounds is not None]
    if len(known) < len(inputs) or not known:
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def of_operands(compute: Callable[..., Sequence[float] | None]) -> Callable[[fx.Node], Bounds | None]:
    """Return the rule of an arithmetic op.

    ``compute`` gets the bounds of the first two arguments, and returns numbers whose minimum and maximum bound the
    result, or None if unknown.
    """

    def bounds(node: fx.Node) -> Bounds | None:
        inputs = [bounds_of(arg) for arg in node.args[:2]]
        if None in inputs or _argument_or(node, "alpha", 1) != 1:
            return None
        results = compute(*inputs)
        return None if results is None else (min(results), max(results))

    return bounds


def _argument_or(node: fx.Node, name: str, default: Any) -> Any:
    """Return the argument, or the default if the op has no argument of that name."""
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    return argument(node, name) if name in names else default


def _corners(compute: Callable[[float, float], float]) -> Callable[[Bounds, Bounds], list[float]]:
    """Return the results at the ends of both intervals, for functions that are monotonic in each operand."""
    return lambda left, right: [compute(a, b) for a, b in itertools.product(left, right)]


def _quotient(dividend: Bounds, divisor: Bounds) -> Sequence[float] | None:
    if divisor[0] <= 0 <= divisor[1]:
        return None
    return _corners(lambda a, b: a / b)(dividend, divisor)


def _power(base: Bounds, exponent: Bounds) -> Sequence[float] | None:
    if base[0] <= 0:
        return None
    try:
        return _corners(math.pow)(base, exponent)
    except OverflowError:
        return None


total = of_operands(_corners(lambda a, b: a + b))
difference = of_operands(_corners(lambda a, b: a - b))
difference_reversed = of_operands(_corners(lambda a, b: b - a))
product = of_operands(_corners(lambda a, b: a * b))
quotient = of_operands(_quotient)
negative = of_operands(lambda bounds: [-bound for bound in bounds])
reciprocal = of_operands(lambda bounds: _quotient((1.0, 1.0), bounds))
power = of_operands(_power)
