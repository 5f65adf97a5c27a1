"""Read a node: its arguments by name, and its tensors with everything known of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from radix_compile.ir.axes import Axes
from radix_compile.ir.value import Operand, value_of
from radix_compile.torch_internals import OpOverload, val


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
    return isinstance(node, fx.Node) and isinstance(val(node), torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if is_tensor(arg)]


def operand(node: fx.Node, axes: Axes | None = None) -> Operand:
    value = value_of(node)
    return Operand(node, value, value.axes if axes is None else axes)
