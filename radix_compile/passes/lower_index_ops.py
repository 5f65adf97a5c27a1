"""Move what can move together in one op."""

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
    """Join scatters that do not wait for each other, as those of a layer's Q, K and V, to one op for all of them.

    They move in one launch then, and their gradients too. To that end what reads a scatter comes as late as it can,
    but not past an op with an effect (the border of an autocast region, say). Values without a gradient do not join
    those with one: they would seem to have one.
    """
    order: list[fx.Node] = []
    work = list(fold.program.graph.nodes)
    while work:
        work = _schedule(work, order)
    previous, *rest = order
    for node in rest:
        previous.append(node)
        previous = node


def _schedule(work: list[fx.Node], order: list[fx.Node]) -> list[fx.Node]:
    """Append to ``order`` what waits for no scatter, then the scatters, joined. Returns what is left."""
    waiting: dict[tuple[Any, ...], list[fx.Node]] = {}
    blocked: dict[fx.Node, None] = {}
    for position, node in enumerate(work):
        has_effect = node.op == "output" or node.is_impure()
        if has_effect and (waiting or blocked):
            blocked |= dict.fromkeys(work[position:])
            break
        if any(arg in blocked for arg in node.all_input_nodes):
            blocked[node] = None
        elif node.target is radix.scatter_rows.default:
            blocked[node] = None
            key = (*_shared_arguments(node).values(), checkpoint_region(node), facts(node).has_gradient)
            waiting.setdefault(key, []).append(node)
        else:
            order.append(node)
    for group in waiting.values():
        for node in group:
            del blocked[node]
        order.extend(_joined(group))
    return list(blocked)


def _shared_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that scatters must have in common to move together: the plan, the sizes, and what holes mean."""
    own = ("compact", "batch_dim", "seq_dim")
    return {name: value for name, value in arguments_of(node).items() if name not in own}


def _joined(group: list[fx.Node]) -> list[fx.Node]:
    if len(group) == 1:
        return group
    graph = group[0].graph
    each = [arguments_of(node) for node in group]
    with graph.inserting_after(group[-1]):
        together = call(
            graph,
            radix.foreach_scatter_rows.default,
            compact=[one["compact"] for one in each],
            batch_dims=[one["batch_dim"] for one in each],
            seq_dims=[one["seq_dim"] for one in each],
            **_shared_arguments(group[0]),
        )
    together.meta.update(group[-1].meta)
    set_facts(together, replace(facts(together), form=None, origin=None))
    results = [together]
    for position, node in enumerate(group):
        with graph.inserting_after(results[-1]):
            results.append(graph.call_function(operator.getitem, (together, position)))
        results[-1].meta.update(node.meta)
        node.replace_all_uses_with(results[-1])
        graph.erase_node(node)
    return results
