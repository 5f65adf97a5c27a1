"""Replace causal masks in buffers by the ops that would compute them in ``forward``, which the analyses understand."""

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
READS_STRIDES = (aten.as_strided.default, aten.view.dtype)
"""Ops whose result depends on the strides of their input. A slice of a buffer and a new mask have different strides."""


def expand_mask_buffers(gm: fx.GraphModule) -> None:
    """Replace each buffer that holds a triangle, and its leading square slices, by ``full`` and ``tril`` or ``triu``.

    Sets the facts ``triangles`` (the buffers) and ``triangle_sizes`` (the numbers of rows that are read). Each call
    checks that the buffers still hold these triangles.
    """
    if any(node.target in READS_STRIDES for node in gm.graph.nodes):
        return
    triangles: dict[fx.Node, Triangle] = {}
    sizes: list[int | torch.SymInt] = []
    returned = _returned_inputs(gm.graph)
    for buffer in gm.graph.find_nodes(op="placeholder"):
        buffer_triangle = facts(buffer).triangle
        if buffer_triangle is None or buffer in returned:
            continue
        for node, triangle in list(_slices_and_casts(buffer, buffer_triangle)):
            size = _size(node)
            # flex_attention is no aten op: it keeps the buffer
            readers = [user for user in node.users if _is_aten(user) and not _is_slice_or_cast(user)]
            if size is None or not readers:
                continue
            mask = _emit_triangle(gm.graph, node, triangle, size)
            for reader in readers:
                reader.replace_input_with(node, mask)
            triangles[buffer] = buffer_triangle
            sizes.append(val(node).shape[-1])
    set_graph_facts(gm, replace(graph_facts(gm), triangles=triangles, triangle_sizes=tuple(sizes)))


def _slices_and_casts(node: fx.Node, triangle: Triangle) -> Iterator[tuple[fx.Node, Triangle]]:
    """Yield ``node``, its leading slices and casts, and theirs, each with its triangle."""
    yield node, triangle
    for user in node.users:
        if _is_slice_or_cast(user):
            yield from _slices_and_casts(user, triangle.cast(val(user).dtype))


def _is_aten(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "aten"


def _returned_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the outputs and all nodes, among them inputs, of which an output is a view."""
    returned: set[fx.Node] = set()
    queue = list(graph.output_node().all_input_nodes)
    while queue:
        node = queue.pop()
        if node in returned:
            continue
        returned.add(node)
        if isinstance(node.target, OpOverload):
            is_view = any(result.alias_info is not None for result in node.target._schema.returns)
            queue += node.all_input_nodes if is_view else ()
    return returned


def _is_slice_or_cast(node: fx.Node) -> bool:
    """Whether a node is a slice from the first entry on, or a cast that keeps a triangle's values."""
    if node.target in CASTS:
        before, after = val(node.args[0]).dtype, val(node).dtype  # type: ignore[arg-type]
        if after not in DTYPES:
            return False
        return after == torch.bool or after.is_floating_point or not before.is_floating_point
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    start, step = node.args[2:3], node.args[4:5]
    return start in ((), (0,), (None,)) and step in ((), (1,))


def _size(node: fx.Node) -> int | fx.Node | None:
    """Return the number of rows and columns of a square matrix, as a number or its node; None if it is not square."""
    *leading, rows, columns = val(node).shape
    if any(size != 1 for size in leading) or as_size(rows) != as_size(columns):
        return None
    if isinstance(columns, int):
        return columns
    while node.op == "call_function":  # a symbolic size is the end of a slice; a cast has its input's size
        ends = [end for end in node.args[3:4] if isinstance(end, fx.Node)]
        if ends and as_size(val(ends[0])) == as_size(columns):
            return ends[0]
        node = node.all_input_nodes[0]
    return None


def _emit_triangle(graph: fx.Graph, node: fx.Node, triangle: Triangle, size: int | fx.Node) -> fx.Node:
    value = val(node)
    shape = [*value.shape[:-2], size, size]
    options = {"dtype": value.dtype, "device": value.device}
    successor = node.next
    while successor.op == "placeholder":
        successor = successor.next
    with graph.inserting_before(successor):
        filled = graph.call_function(aten.full.default, (shape, triangle.number), options)
        internals.evaluate(filled)
        target, args = (aten.triu.default, (filled, 1)) if triangle.upper else (aten.tril.default, (filled,))
        mask = graph.call_function(target, args)
        internals.evaluate(mask)
    trace_back(node, "expand_mask_buffers", filled, successor)
    return mask
