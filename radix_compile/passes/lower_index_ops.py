"""Move what can move together in one op."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

radix = torch.ops.radix


def lower_index_ops(gm: fx.GraphModule) -> fx.GraphModule:
    """Join scatters that do not wait for each other, as those of a layer's Q, K and V, to one op for all of them.

    They move in one launch then, and their gradients too. A scatter moves down to the first reader of one of those it
    is joined with.
    """
    waiting: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in list(gm.graph.nodes):
        for key, group in list(waiting.items()):
            if any(arg in group for arg in node.all_input_nodes):
                _join(waiting.pop(key), before=node)
        if node.target is radix.scatter_rows.default:
            plan_and_size, holes, region = node.args[1:7], node.args[9], node.meta.get("ac_graph_id")
            waiting.setdefault((*plan_and_size, holes, region), []).append(node)
    return gm


def _join(group: list[fx.Node], before: fx.Node) -> None:
    if len(group) == 1:
        return
    graph = before.graph
    compact, batch_dims, seq_dims = ([node.args[i] for node in group] for i in (0, 7, 8))
    plan_and_size, holes = group[0].args[1:7], group[0].args[9]
    with graph.inserting_before(before):
        arguments = (compact, *plan_and_size, batch_dims, seq_dims, holes)
        together = graph.call_function(radix.foreach_scatter_rows.default, arguments)
        together.meta.update(group[-1].meta)
        for position, node in enumerate(group):
            one = graph.call_function(operator.getitem, (together, position))
            one.meta.update(node.meta)
            node.replace_all_uses_with(one)
            graph.erase_node(node)
