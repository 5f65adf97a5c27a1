"""Join independent scatters to one op, which needs one kernel launch."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from radix_compile.ir.calls import arguments_of, call
from radix_compile.ir.graph import facts, set_facts
from radix_compile.passes.fold import Fold
from radix_compile.torch_internals import checkpoint_region

radix = torch.ops.radix


def lower_index_ops(fold: Fold) -> None:
    """Join scatters that do not depend on each other, such as those of a layer's Q, K and V, to one op.

    Forward and backward then take one launch each. Nodes that depend on a scatter are moved as late as possible, but
    not past an op with a side effect (such as the end of an autocast region). Scatters with and without a gradient are
    not joined: the results without would seem to have one.
    """
    order: list[fx.Node] = []
    remaining = list(fold.program.graph.nodes)
    while remaining:
        remaining = _schedule(remaining, order)
    previous, *rest = order
    for node in rest:
        previous.append(node)
        previous = node


def _schedule(nodes: list[fx.Node], order: list[fx.Node]) -> list[fx.Node]:
    """Append to ``order`` the nodes that depend on no scatter, then the joined scatters. Return the other nodes."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    blocked: dict[fx.Node, None] = {}
    for position, node in enumerate(nodes):
        has_effect = node.op == "output" or node.is_impure()
        if has_effect and (groups or blocked):
            blocked |= dict.fromkeys(nodes[position:])
            break
        if any(arg in blocked for arg in node.all_input_nodes):
            blocked[node] = None
        elif node.target is radix.scatter_rows.default:
            blocked[node] = None
            key = (*_shared_arguments(node).values(), checkpoint_region(node), facts(node).has_gradient)
            groups.setdefault(key, []).append(node)
        else:
            order.append(node)
    for group in groups.values():
        for node in group:
            del blocked[node]
        order.extend(_join(group))
    return list(blocked)


def _shared_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments that joined scatters must have in common: the plan arrays, the sizes and ``holes``."""
    own = ("compact", "batch_dim", "seq_dim")
    return {name: value for name, value in arguments_of(node).items() if name not in own}


def _join(group: list[fx.Node]) -> list[fx.Node]:
    """Replace scatters by one op. Return the nodes in order: the op and the results."""
    if len(group) == 1:
        return group
    graph = group[0].graph
    arguments = [arguments_of(node) for node in group]
    with graph.inserting_after(group[-1]):
        joined = call(
            graph,
            radix.foreach_scatter_rows.default,
            compact=[scatter["compact"] for scatter in arguments],
            batch_dims=[scatter["batch_dim"] for scatter in arguments],
            seq_dims=[scatter["seq_dim"] for scatter in arguments],
            **_shared_arguments(group[0]),
        )
    joined.meta.update(group[-1].meta)
    set_facts(joined, replace(facts(joined), form=None, origin=None))
    new_nodes = [joined]
    for position, node in enumerate(group):
        with graph.inserting_after(new_nodes[-1]):
            new_nodes.append(graph.call_function(operator.getitem, (joined, position)))
        new_nodes[-1].meta.update(node.meta)
        node.replace_all_uses_with(new_nodes[-1])
        graph.erase_node(node)
    return new_nodes
