"""Reading a node: its arguments by name, and its tensors with their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from radix_compile.ir.axes import Axes
from radix_compile.ir.value import Operand, value_of
from radix_compile.torch_internals import OpOverload, val


def argument(node: fx.Node, name: str) -> Any:
    """Return the argument of that name, or its default in the op's schema."""
    assert isinstance(node.target, OpOverload)
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value if parameter.has_default_value() else None)
    raise KeyError(f"{node.target} has no argument {name!r}")


def source_of(node: fx.Node) -> fx.Node:
    """Return the op's first argument, which must be a tensor."""
    source = node.args[0]
    assert isinstance(source, fx.Node), f"{node.target} starts with something that is not a tensor"
    return source


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(val(node), torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the op's inputs that are tensors, without duplicates."""
    return [arg for arg in node.all_input_nodes if is_tensor(arg)]


def operand(node: fx.Node, axes: Axes | None = None) -> Operand:
    """Return a tensor as an operand of :func:`~radix_compile.ir.value.broadcast`, with other axes if given."""
    value = value_of(node)
    return Operand(node, value, value.axes if axes is None else axes)
