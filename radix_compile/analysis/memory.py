"""Memory layout: which tensors of a graph share memory, which ops read strides, and the order of dimensions in memory.

Scatter returns contiguous rows, whatever the strides of the captured tensor are. Most ops do not depend on strides. But
callers may view an output in another shape, or write to an output that shares memory with another tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import sympy
import torch
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.axes import as_size
from radix_compile.torch_internals import HigherOrderOperator, OpOverload, val


def reads_layout(node: fx.Node) -> bool:
    """May the op's result depend on the strides of its inputs? Assumed of all ops of other packages."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return isinstance(node.target, HigherOrderOperator)
    return info_of(node.target).reads_layout or node.target.namespace not in ("aten", "prims")


def root(node: fx.Node) -> fx.Node:
    """Return the node that owns the memory of a node's result."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the node that a view is a view of; None for any other op."""
    if node.op != "call_function":
        return None
    is_item = not isinstance(node.target, OpOverload) and is_tensor(node)  # getitem
    is_view = isinstance(node.target, OpOverload) and any(ret.alias_info for ret in node.target._schema.returns)
    return node.all_input_nodes[0] if is_view or (is_item and _viewed(node.all_input_nodes[0])) else None


def outputs_of(graph: fx.Graph) -> list[fx.Node]:
    (results,) = graph.output_node().args
    return [result for result in results if is_tensor(result)]  # type: ignore[union-attr,misc]


def views_to_keep(graph: fx.Graph, hints: Mapping[sympy.Symbol, int]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the views that must stay views of the same tensor as in the captured graph, each with that tensor.

    These views lead to outputs that share memory with another output or with an input (a caller that writes to one
    changes the other), or whose entries have gaps or overlap in memory.
    """
    outputs = list(dict.fromkeys(outputs_of(graph)))
    roots = [root(node) for node in outputs]
    for node, base in zip(outputs, roots, strict=True):
        shared = base.op == "placeholder" or roots.count(base) > 1
        if shared or not _is_dense(node, hints):
            while node is not base:
                yield node, base
                (node, *_) = node.all_input_nodes


def _is_dense(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> bool:
    """Do the tensor's entries fill a range of memory, without gaps or overlaps? True if sizes are unknown."""
    shape, strides = numbers(val(node).shape, hints), numbers(val(node).stride(), hints)
    if shape is None or strides is None:
        return True
    num_entries = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != num_entries:
            return False
        num_entries *= size
    return True


def numbers(sizes: Sequence[int | torch.SymInt], hints: Mapping[sympy.Symbol, int]) -> list[int] | None:
    """Return the sizes or strides in the call that is compiled for; None if any is unknown."""
    values = [as_size(size).subs(hints) for size in sizes]
    return [int(value) for value in values] if all(value.is_Integer for value in values) else None


def order_in_memory(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> list[int]:
    """Return the dimensions of a captured tensor, from the largest to the smallest stride."""
    strides = numbers(val(node).stride(), hints)
    rank = val(node).ndim
    return list(range(rank)) if strides is None else sorted(range(rank), key=lambda dim: -strides[dim])
