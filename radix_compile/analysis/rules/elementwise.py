"""The default of the table: ops that torch tags as pointwise, and the few that it forgot to."""

from __future__ import annotations

from torch import fx

from radix_compile.analysis.arguments import operand, tensor_inputs
from radix_compile.analysis.rules.masks import elementwise_fact
from radix_compile.ir.axes import Axes, Layout
from radix_compile.ir.value import Marks, Uses, Value, broadcast
from radix_compile.torch_internals import val


def elementwise(node: fx.Node, layout: Layout) -> Marks:
    """Each entry of the result, or of all results, reads the entries that line up with it."""
    axes, uses = lined_up(node, layout)
    results = val(node)
    if isinstance(results, tuple | list):
        return tuple(Value(axes, operands=uses) for _ in results)
    return Value(axes, fact=elementwise_fact(node), operands=uses)


def lined_up(node: fx.Node, layout: Layout) -> tuple[Axes, Uses]:
    """The axes of what is broadcast from all tensors of the op, and ``Value.operands``."""
    return broadcast(layout, [operand(arg) for arg in tensor_inputs(node)])
