"""How tensors of a graph lie in memory: which share it, which ops look at it, and in which order their entries follow.

A value that comes back from the tree has its rows one after the other, whatever the captured tensor had. Most ops do
not notice. Outputs do: a caller may view them in another shape, and may write to one of two that share memory.
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
    """May the op return something else for inputs that lie otherwise in memory? Ops of other packages may."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return isinstance(node.target, HigherOrderOperator)
    return info_of(node.target).reads_layout or node.target.namespace not in ("aten", "prims")


def root(node: fx.Node) -> fx.Node:
    """The node whose memory a node's result is in."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function":
        return None
    one_of_several = not isinstance(node.target, OpOverload) and is_tensor(node)  # getitem
    shares = isinstance(node.target, OpOverload) and any(one.alias_info for one in node.target._schema.returns)
    return node.all_input_nodes[0] if shares or (one_of_several and _viewed(node.all_input_nodes[0])) else None


def outputs_of(graph: fx.Graph) -> list[fx.Node]:
    (results,) = graph.output_node().args
    return [one for one in results if is_tensor(one)]  # type: ignore[union-attr,misc]


def views_to_keep(graph: fx.Graph, hints: Mapping[sympy.Symbol, int]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Views that have to stay views of what the captured ones are of, each with what that is.

    They lead to outputs that share memory with another one or with an input, so that one changes when the caller writes
    to the other, or that have gaps between their entries, or the same one several times.
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
    shape, strides = numbers(val(node).shape, hints), numbers(val(node).stride(), hints)
    if shape is None or strides is None:
        return True
    size = 1
    for stride, length in sorted((t, n) for t, n in zip(strides, shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= length
    return True


def numbers(sizes: Sequence[int | torch.SymInt], hints: Mapping[sympy.Symbol, int]) -> list[int] | None:
    """The sizes or strides in the call that is compiled for; None if one is not known."""
    found = [as_size(size).subs(hints) for size in sizes]
    return [int(size) for size in found] if all(size.is_Integer for size in found) else None


def order_in_memory(node: fx.Node, hints: Mapping[sympy.Symbol, int]) -> list[int]:
    """The dimensions of a captured tensor, that with the longest steps first."""
    strides = numbers(val(node).stride(), hints)
    rank = val(node).ndim
    return list(range(rank)) if strides is None else sorted(range(rank), key=lambda dim: -strides[dim])
