"""The rule table: for every ATen op, what its result is to the tokens, given what its inputs are.

A rule is a function ``(node, layout) -> Value`` (or a tuple of them for an op with several results). It says that the
op is position-wise by returning a value with one ``BATCH`` and one ``SEQ`` atom, that it is causal by setting
``Value.full_only``, and that it is neither by raising :class:`~radix_compile.ir.axes.Mixes` with the reason. An op
without a row is mixing, except those that torch itself tags as pointwise. Adding an op means adding one row; the sweep
in the tests executes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx

from radix_compile.ir.axes import Axes, Layout
from radix_compile.ir.value import Marks, Operand, value_of
from radix_compile.torch_internals import OpOverload

Rule = Callable[[fx.Node, Layout], Marks]
R = TypeVar("R", bound=Rule)
RULES: dict[OpOverload | str, Rule] = {}

SHAPE_ARGUMENT: dict[OpOverload | str, str] = {}
"""Position-wise ops that name their output's shape, and the argument: the rewrite derives it again from the axes."""

VIEW_LIKE: set[OpOverload | str] = set()
"""Ops that move entries of their first input without computing: free next to a boundary, in either form."""

MIXED_INPUTS_ALLOWED: set[OpOverload | str] = set()
"""Ops whose rule looks at mixed inputs itself: it does not read their values, or recognises a pattern."""


ARRANGEMENTS_ALLOWED: set[OpOverload | str] = set()
"""Ops whose rule knows what to do with the order that a sort gave to rows."""


def rule(
    *ops: OpOverload | str,
    view_like: bool = False,
    shape: str | None = None,
    any_input: bool = False,
    arranged: bool = False,
) -> Callable[[R], R]:
    """Register one rule for the given overloads; for those of other packages by name, ``library::op.overload``."""

    def register(function: R) -> R:
        for op in ops:
            assert op not in RULES, f"two rules for {op}"
            RULES[op] = function
            if view_like:
                VIEW_LIKE.add(op)
            if shape:
                SHAPE_ARGUMENT[op] = shape
            if any_input:
                MIXED_INPUTS_ALLOWED.add(op)
            if arranged:
                ARRANGEMENTS_ALLOWED.add(op)
        return function

    return register


def knows_arrangements(op: Any) -> bool:
    return op in ARRANGEMENTS_ALLOWED or (isinstance(op, OpOverload) and op.name() in ARRANGEMENTS_ALLOWED)


def argument(node: fx.Node, name: str) -> Any:
    """The argument of that name in the op's schema, or its default."""
    assert isinstance(node.target, OpOverload)
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value if parameter.has_default_value() else None)
    raise KeyError(f"{node.target} has no argument {name!r}")


def source_of(node: fx.Node) -> fx.Node:
    """The op's first argument, where that is a tensor."""
    source = node.args[0]
    assert isinstance(source, fx.Node), f"{node.target} starts with something that is not a tensor"
    return source


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if is_tensor(arg)]


def operand(node: fx.Node, axes: Axes | None = None) -> Operand:
    value = value_of(node)
    return Operand(node, value, value.axes if axes is None else axes)
