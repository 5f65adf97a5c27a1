"""The rule of elementwise ops: all ops that torch tags as pointwise, and a few that it does not tag."""

from __future__ import annotations

from torch import fx

from radix_compile.analysis.arguments import operand, tensor_inputs
from radix_compile.analysis.rules.masks import elementwise_fact
from radix_compile.ir.axes import Axes, Layout
from radix_compile.ir.value import Marks, Uses, Value, broadcast
from radix_compile.torch_internals import val


def elementwise(node: fx.Node, layout: Layout) -> Marks:
    """Return the value of an op whose results' entries read the entries that line up with them."""
    axes, uses = broadcast_inputs(node, layout)
    results = val(node)
    if isinstance(results, tuple | list):
        return tuple(Value(axes, operands=uses) for _ in results)
    return Value(axes, fact=elementwise_fact(node), operands=uses)


def broadcast_inputs(node: fx.Node, layout: Layout) -> tuple[Axes, Uses]:
    """Broadcast all tensors of the op. Return the axes of the result and ``Value.operands``."""
    return broadcast(layout, [operand(arg) for arg in tensor_inputs(node)])
