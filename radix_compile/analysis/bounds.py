"""How large the entries of a tensor can be, by interval arithmetic: enough for position biases (ALiBi).

Roundings are left out: what the bounds are compared with is orders of magnitude away.
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
"""No entry is less than the one or more than the other."""


def bounds_of(value: Any) -> Bounds | None:
    """The bounds of a tensor's entries, or of a Python number; None if nothing is known."""
    if isinstance(value, bool | int | float):
        return (float(value), float(value))
    if not is_tensor(value) or val(value).dtype.is_complex:
        return None
    found = facts(value).bounds
    if found == ():
        found = _held(_computed(value), val(value).dtype)
        set_facts(value, replace(facts(value), bounds=found))
    return found or None


def _computed(node: fx.Node) -> Bounds | None:
    fact = value_of(node).fact
    if isinstance(fact, Filled):
        return (fact.value, fact.value)
    if isinstance(fact, Index):
        size = shape_of(node)[fact.dim]
        return (fact.offset, fact.offset + int(size) - 1) if size.is_Integer else None
    compute = info_of(node.target).bounds
    return compute(node) if compute else None


def _held(found: Bounds | None, dtype: torch.dtype) -> Bounds | None:
    """The bounds of what a dtype holds of these: whole numbers wrap around, the others become infinite."""
    if dtype == torch.bool:
        return (0.0, 1.0)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if found is not None and limits.min <= found[0] <= found[1] <= limits.max:
        return found if dtype.is_floating_point else (float(math.floor(found[0])), float(math.ceil(found[1])))
    return None if dtype.is_floating_point else (float(limits.min), float(limits.max))


# ------------------------------------------------------------------------------------------------ what rows name


def of_inputs(node: fx.Node) -> Bounds | None:
    """For ops whose entries are entries of their inputs."""
    found = [bounds_of(one) for one in node.all_input_nodes if is_tensor(one)]
    known = [one for one in found if one is not None]
    if len(known) < len(found) or not known:
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def of_operands(compute: Callable[..., Sequence[float] | None]) -> Callable[[fx.Node], Bounds | None]:
    """For arithmetic: ``compute`` gets the bounds of the first two arguments and returns numbers that bound the result.

    It returns None where nothing is known.
    """

    def bounds(node: fx.Node) -> Bounds | None:
        inputs = [bounds_of(one) for one in node.args[:2]]
        if None in inputs or _argument_or(node, "alpha", 1) != 1:
            return None
        results = compute(*inputs)
        return None if results is None else (min(results), max(results))

    return bounds


def _argument_or(node: fx.Node, name: str, default: Any) -> Any:
    """The argument, or what is taken for it where the op has none of that name."""
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    return argument(node, name) if name in names else default


def _corners(compute: Callable[[float, float], float]) -> Callable[[Bounds, Bounds], list[float]]:
    """For what grows or falls with each operand, whatever the other is."""
    return lambda one, other: [compute(a, b) for a, b in itertools.product(one, other)]


def _quotient(one: Bounds, other: Bounds) -> Sequence[float] | None:
    if other[0] <= 0 <= other[1]:
        return None
    return _corners(lambda a, b: a / b)(one, other)


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
negative = of_operands(lambda one: [-bound for bound in one])
reciprocal = of_operands(lambda one: _quotient((1.0, 1.0), one))
power = of_operands(_power)
