"""Where in a graph gradients are recorded: ``torch.no_grad()`` and ``torch.enable_grad()`` in a program are nodes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from radix_compile.ir.graph import facts
from radix_compile.torch_internals import SET_GRAD_ENABLED, val


def grad_modes(graph: fx.Graph, outside: bool) -> dict[fx.Node, bool]:
    """For each node, whether gradients are recorded there; ``outside`` is the mode that the program is called in."""
    found: dict[fx.Node, bool] = {}
    mode = outside
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SET_GRAD_ENABLED:
            mode = bool(node.args[0])
        found[node] = mode
    return found


def with_gradient(graph: fx.Graph, records: Mapping[fx.Node, bool]) -> set[fx.Node]:
    """The nodes that a gradient comes back to: autograd follows them from an input to an output.

    ``records`` are the graph's :func:`grad_modes`. An input has a gradient unless its ``needs_gradient`` is False.
    """
    follows: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_continuous(val(node)):
            continue
        if node.op == "placeholder":
            has = facts(node).needs_gradient is not False
        else:
            stops = node.target is torch.ops.aten.detach.default or not records[node]
            has = not stops and any(arg in follows for arg in node.all_input_nodes)
        if has:
            follows.add(node)
    found = follows.intersection(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node in found:
            found.update(follows.intersection(node.all_input_nodes))
    return found


def _is_continuous(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_continuous, value))
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
