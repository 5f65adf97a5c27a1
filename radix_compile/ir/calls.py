"""Calls of ops in a graph with all arguments by position, read and written by name."""

from __future__ import annotations

from typing import Any

from torch import fx

from radix_compile.torch_internals import OpOverload


def parameters(op: OpOverload) -> list[str]:
    """Return the names of an op's arguments, in order."""
    return [parameter.name for parameter in op._schema.arguments]


def call(graph: fx.Graph, op: OpOverload, **arguments: Any) -> fx.Node:
    """Add a call to the graph. Every argument of the op is required."""
    return graph.call_function(op, tuple(arguments[name] for name in parameters(op)))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments by name of a call with all arguments by position, as :func:`call` makes it."""
    assert isinstance(node.target, OpOverload)
    return dict(zip(parameters(node.target), node.args, strict=True))


def set_arguments(node: fx.Node, **changes: Any) -> None:
    """Replace some arguments of a call with all arguments by position."""
    assert isinstance(node.target, OpOverload)
    arguments = arguments_of(node) | changes
    node.args = tuple(arguments[name] for name in parameters(node.target))
