"""Write out the causal masks that are kept in buffers as they would be made in ``forward``, where they can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.ir.axes import as_size
from radix_compile.ir.graph import facts, graph_facts, set_graph_facts
from radix_compile.ir.source import trace_back
from radix_compile.ir.triangles import DTYPES, Triangle
from radix_compile.torch_internals import OpOverload, val

aten = torch.ops.aten

CASTS = (aten._to_copy.default, aten.to.dtype)
BY_LAYOUT = (aten.as_strided.default, aten.view.dtype)
"""Ops whose result depends on how their input lies in memory; a part of a buffer has gaps."""


def expand_mask_buffers(gm: fx.GraphModule) -> None:
    """Put ``full`` and ``tril`` or ``triu`` in place of a buffer that holds a triangle, or of the part of it in front.

    The facts ``triangles`` say which buffers they are and ``triangle_sizes`` how many rows of them are read: all calls
    must see to it that these still hold what they did.
    """
    if any(node.target in BY_LAYOUT for node in gm.graph.nodes):
        return
    found: dict[fx.Node, Triangle] = {}
    sizes: list[int | torch.SymInt] = []
    returned = _returned(gm.graph)
    for buffer in gm.graph.find_nodes(op="placeholder"):
        triangle = facts(buffer).triangle
        if triangle is None or buffer in returned:
            continue
        for node, what in list(_parts(buffer, triangle)):
            size = _size(node)
            readers = [user for user in node.users if _is_aten(user) and not _is_part(user)]  # flex_attention is not
            if size is None or not readers:
                continue
            made = _made(gm.graph, node, what, size)
            for reader in readers:
                reader.replace_input_with(node, made)
            found[buffer] = triangle
            sizes.append(val(node).shape[-1])
    set_graph_facts(gm, replace(graph_facts(gm), triangles=found, triangle_sizes=tuple(sizes)))


def _parts(node: fx.Node, triangle: Triangle) -> Iterator[tuple[fx.Node, Triangle]]:
    """The buffer, what is cut off at its front, and all that in other dtypes."""
    yield node, triangle
    for user in node.users:
        if _is_part(user):
            yield from _parts(user, triangle.cast(val(user).dtype))


def _is_aten(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "aten"


def _returned(graph: fx.Graph) -> set[fx.Node]:
    """The inputs that the caller is given back, or views of."""
    found: set[fx.Node] = set()
    queue = list(graph.output_node().all_input_nodes)
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        if isinstance(node.target, OpOverload):
            views = any(result.alias_info is not None for result in node.target._schema.returns)
            queue += node.all_input_nodes if views else ()
    return found


def _is_part(node: fx.Node) -> bool:
    if node.target in CASTS:
        before, after = (val(one).dtype for one in (node.args[0], node))  # type: ignore[arg-type]
        if after not in DTYPES:
            return False
        return after == torch.bool or after.is_floating_point or not before.is_floating_point
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    start, step = node.args[2:3], node.args[4:5]
    return start in ((), (0,), (None,)) and step in ((), (1,))


def _size(node: fx.Node) -> int | fx.Node | None:
    """The number of rows and columns of a part that has as many of both, and so is a triangle."""
    *front, rows, columns = val(node).shape
    if any(one != 1 for one in front) or as_size(rows) != as_size(columns):
        return None
    if isinstance(columns, int):
        return columns
    while node.op == "call_function":  # the size is that of a slice, or of one that a cast is of
        ends = [end for end in node.args[3:4] if isinstance(end, fx.Node)]
        if ends and as_size(val(ends[0])) == as_size(columns):
            return ends[0]
        node = node.all_input_nodes[0]
    return None


def _made(graph: fx.Graph, node: fx.Node, triangle: Triangle, size: int | fx.Node) -> fx.Node:
    value = val(node)
    shape = [*value.shape[:-2], size, size]
    options = {"dtype": value.dtype, "device": value.device}
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    with graph.inserting_before(behind):
        filled = graph.call_function(aten.full.default, (shape, triangle.number), options)
        internals.evaluate(filled)
        cut = (aten.triu.default, (filled, 1)) if triangle.upper else (aten.tril.default, (filled,))
        made = graph.call_function(*cut)
        internals.evaluate(made)
    trace_back(node, "expand_mask_buffers", filled, behind)
    return made
