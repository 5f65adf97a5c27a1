"""Where a graph records gradients. (``torch.no_grad()`` and ``torch.enable_grad()`` are nodes of the graph.)"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from radix_compile.ir.graph import facts
from radix_compile.torch_internals import SET_GRAD_ENABLED, val


def grad_modes(graph: fx.Graph, outside: bool) -> dict[fx.Node, bool]:
    """Map each node to whether gradients are recorded there; ``outside`` is the mode in which the program is called."""
    modes: dict[fx.Node, bool] = {}
    mode = outside
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SET_GRAD_ENABLED:
            mode = bool(node.args[0])
        modes[node] = mode
    return modes


def with_gradient(graph: fx.Graph, records: Mapping[fx.Node, bool]) -> set[fx.Node]:
    """Return the nodes that get a gradient: differentiable from an input that needs one, and used by an output.

    ``records`` are the graph's :func:`grad_modes`. An input needs a gradient unless its ``needs_gradient`` is False.
    """
    requires_grad: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_continuous(val(node)):
            continue
        if node.op == "placeholder":
            requires = facts(node).needs_gradient is not False
        else:
            detached = node.target is torch.ops.aten.detach.default or not records[node]
            requires = not detached and any(arg in requires_grad for arg in node.all_input_nodes)
        if requires:
            requires_grad.add(node)
    result = requires_grad.intersection(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node in result:
            result.update(requires_grad.intersection(node.all_input_nodes))
    return result


def _is_continuous(value: object) -> bool:
    """Is the value a floating-point or complex tensor, or a tuple or list with such a tensor?"""
    if isinstance(value, tuple | list):
        return any(map(_is_continuous, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
