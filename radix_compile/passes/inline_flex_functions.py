"""Inline flex_attention's ``mask_mod`` and ``score_mod`` on all pairs of query and key, for analysis."""

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
    """Add nodes that compute ``mask_mod`` and ``score_mod`` of all pairs, ``[B, H, S, S]``.

    They are for ``mark_token_axes``, which finds them by the facts ``visible`` and ``scores`` of each flex_attention.
    No other node reads them, and they never run.
    """
    for node in gm.graph.find_nodes(op="call_function", target=FLEX):
        flex = arguments_of(node)
        with gm.graph.inserting_before(node):
            indices = _indices(gm.graph, flex.query, flex.key)
            visible = _inline(gm, flex.mask_mod, [*indices, *flex.mask_buffers], node)
            product = _scores(gm.graph, flex.query, flex.key)
            scores = _inline(gm, flex.score_mod, [product, *indices, *flex.score_buffers], node)
        set_facts(node, replace(facts(node), visible=visible, scores=scores))


def _call(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    node = graph.call_function(op, args)
    internals.evaluate(node)
    return node


def _indices(graph: fx.Graph, query: fx.Node, key: fx.Node) -> list[fx.Node]:
    """Return the indices of batch, head, query and key, each along its own of four dimensions."""
    batch, heads, num_queries, _ = val(query).shape
    indices = []
    for dim, size in enumerate((batch, heads, num_queries, val(key).shape[2])):
        options = {"dtype": torch.int32, "device": val(query).device}  # flex_attention's index dtype
        node = graph.call_function(aten.arange.default, (size,), options)
        internals.evaluate(node)
        for other in range(4):
            node = node if other == dim else _call(graph, aten.unsqueeze.default, node, other)
        indices.append(node)
    return indices


def _scores(graph: fx.Graph, query: fx.Node, key: fx.Node) -> fx.Node:
    """Return queries times queries: they have the axes of queries times keys, and no heads to repeat."""
    if not internals.same_size(val(query).shape[2], val(key).shape[2]):
        return query  # with another number of keys, the scores are not analysed
    return _call(graph, aten.matmul.default, query, _call(graph, aten.transpose.int, query, 2, 3))


def _inline(gm: fx.GraphModule, name: fx.Node, inputs: Sequence[fx.Node], like: fx.Node) -> fx.Node:
    """Copy the nodes of a subgraph into the graph, with the source line of ``like``. Return its result."""
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
    copied: fx.Node = copies[result]
    return copied


def _constant(gm: fx.GraphModule, tensor: torch.Tensor, like: fx.Node) -> fx.Node:
    """Register a constant of a subgraph with the graph, and return its node."""
    name = f"radix_{like.name}_{id(tensor)}"
    gm.register_buffer(name, tensor, persistent=False)
    node = gm.graph.get_attr(name)
    internals.copy_place(node, like)
    internals.set_val(node, val(like))
    return node


def _outputs(body: fx.GraphModule) -> Sequence[fx.Node]:
    result = body.graph.output_node().args[0]
    return result if isinstance(result, tuple | list) else (result,)  # type: ignore[return-value]
