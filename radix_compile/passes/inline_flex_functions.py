"""Write flex_attention's masks out on all pairs of query and key, so that they are read like any other mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.analysis.rules.flex import FLEX, arguments_of
from radix_compile.ir.graph import facts, set_facts
from radix_compile.torch_internals import val

aten = torch.ops.aten


def inline_flex_functions(gm: fx.GraphModule) -> None:
    """Add to the graph what ``mask_mod`` and ``score_mod`` say of all pairs, ``[B, H, S, S]``: nothing reads it.

    The nodes are for ``mark_token_axes`` alone: the facts ``visible`` and ``scores`` of each flex_attention lead to
    them, and they are never run.
    """
    for node in gm.graph.find_nodes(op="call_function", target=FLEX):
        found = arguments_of(node)
        with gm.graph.inserting_before(node):
            index = _indices(gm.graph, found.query, found.key)
            visible = _inlined(gm, found.mask_mod, [*index, *found.mask_buffers], node)
            product = _scores(gm.graph, found.query, found.key)
            scores = _inlined(gm, found.score_mod, [product, *index, *found.score_buffers], node)
        set_facts(node, replace(facts(node), visible=visible, scores=scores))


def _call(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    node = graph.call_function(op, args)
    internals.evaluate(node)
    return node


def _indices(graph: fx.Graph, query: fx.Node, key: fx.Node) -> list[fx.Node]:
    """The numbers of sequence, head, query and key, each along a dimension of its own."""
    batch, heads, rows, _ = val(query).shape
    made = []
    for dim, size in enumerate((batch, heads, rows, val(key).shape[2])):
        options = {"dtype": torch.int32, "device": val(query).device}  # as flex_attention counts
        node = graph.call_function(aten.arange.default, (size,), options)
        internals.evaluate(node)
        for other in range(4):
            node = node if other == dim else _call(graph, aten.unsqueeze.default, node, other)
        made.append(node)
    return made


def _scores(graph: fx.Graph, query: fx.Node, key: fx.Node) -> fx.Node:
    """Products of queries with queries, which are to rows what those with keys are, and have as many heads."""
    if not internals.same_size(val(query).shape[2], val(key).shape[2]):
        return query  # another number of keys: not read
    return _call(graph, aten.matmul.default, query, _call(graph, aten.transpose.int, query, 2, 3))


def _inlined(gm: fx.GraphModule, name: fx.Node, inputs: Sequence[fx.Node], like: fx.Node) -> fx.Node:
    """The result of a subgraph, with its nodes in the graph."""
    body: fx.GraphModule = getattr(gm, str(name.target))
    placeholders = body.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    for node in body.graph.nodes:
        if node.op == "get_attr":
            copies[node] = _constant(gm, getattr(body, str(node.target)), node)
        elif node.op == "call_function" and node.target is not aten._assert_tensor_metadata.default:
            copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
            internals.copy_place(copies[node], like)
            internals.evaluate(copies[node])
    (result,) = _outputs(body)
    made: fx.Node = copies[result]
    return made


def _constant(gm: fx.GraphModule, tensor: torch.Tensor, like: fx.Node) -> fx.Node:
    """A tensor of a subgraph as one of the graph's own."""
    name = f"radix_{like.name}_{id(tensor)}"
    gm.register_buffer(name, tensor, persistent=False)
    made = gm.graph.get_attr(name)
    internals.copy_place(made, like)
    internals.set_val(made, val(like))
    return made


def _outputs(body: fx.GraphModule) -> Sequence[fx.Node]:
    result = body.graph.output_node().args[0]
    return result if isinstance(result, tuple | list) else (result,)  # type: ignore[return-value]
