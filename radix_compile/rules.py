"""The functions and types with which rules for ops are written and registered. docs/add-an-op.md has an example."""

from radix_compile.analysis.arguments import argument, operand, source_of, tensor_inputs
from radix_compile.analysis.op_info import Rule
from radix_compile.analysis.rules.custom import register_rule
from radix_compile.ir.axes import Layout, Mixes, feature, plain_axis, shape_of
from radix_compile.ir.value import Value, broadcast, value_of

__all__ = [
    "Layout",
    "Mixes",
    "Rule",
    "Value",
    "argument",
    "broadcast",
    "feature",
    "operand",
    "plain_axis",
    "register_rule",
    "shape_of",
    "source_of",
    "tensor_inputs",
    "value_of",
]
