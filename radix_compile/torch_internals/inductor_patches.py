"""Patches and settings of inductor for programs with unbacked sizes such as T'. Importing applies the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor import config
from torch._inductor.dependencies import Dep, StarDep, WeakDep
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FlexibleLayout, StorageBox, TensorBox, get_stride_order
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.sizevars import SizeVarAllocator
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._ordered_set import OrderedSet

UNBACKED_SIZE_SETTINGS: dict[str, Any] = {}
"""Settings of inductor for programs with unbacked sizes."""
if hasattr(SizeVarAllocator, "size_hint") and hasattr(config.triton, "mix_order_reduction_split_size"):
    # By default inductor needs a hint of the number of rows to split a reduction (the gradient of a norm), and fails.
    UNBACKED_SIZE_SETTINGS["triton.mix_order_reduction_split_size"] = 32
if hasattr(config.triton, "prefer_nd_tiling"):
    # In one dimension each entry divides to find its row, in 64 bits where there may be more than 2**31 entries. In
    # two dimensions the gradient of 13,312 x 151,936 logits takes 1.9 ms on an H200, not 4.8.
    UNBACKED_SIZE_SETTINGS["triton.prefer_nd_tiling"] = True

LIKELY_NODES = 8192
"""The hint of T' by which inductor weighs fusions: a constant, so that no program depends on a batch."""


def _use_hints_of_unbacked_sizes() -> None:
    """Make inductor weigh fusions by the hints of unbacked sizes; torch 2.11 counts tensors of such sizes as empty.

    Two ops that share only empty tensors are not fused, which leaves a third more kernels in a layer of Qwen3.
    """
    if hasattr(SizeVarAllocator, "all_unbacked_explicitly_hinted"):
        return
    get_dep_size_hint = GraphLowering.get_dep_size_hint

    def size_with_hints(graph: GraphLowering, dep: Any, count_bytes: bool = True) -> int:
        size = get_dep_size_hint(graph, dep, count_bytes)
        if size == 0 and graph.try_get_buffer(dep.name) is not None:
            symbols = free_unbacked_symbols(dep.get_numel())
            if symbols and symbols <= graph.sizevars.var_to_hint_override.keys():
                size = dep.numbytes_hint() if count_bytes else dep.numel_hint()
                graph.dep_size_hint_cache[dep, count_bytes] = size
        return size

    GraphLowering.get_dep_size_hint = size_with_hints  # type: ignore[assignment,method-assign]


_use_hints_of_unbacked_sizes()


def _lay_out_unbacked_contiguously() -> None:
    """Make inductor lay out tensors with unbacked strides contiguously where it would sort dimensions by stride.

    It sorts where a 4-d tensor may be in channels-last format, and raises for strides that cannot be guarded. The
    backward pass assumes a contiguous layout too.
    """
    same_ordered = FlexibleLayout.same_ordered

    def contiguous_if_unbacked(sizes: Sequence[Any], stride: Sequence[Any]) -> Sequence[Any]:
        if free_unbacked_symbols(stride):
            return FlexibleLayout.contiguous_strides(sizes)
        return same_ordered(sizes, stride)

    FlexibleLayout.same_ordered = staticmethod(contiguous_if_unbacked)  # type: ignore[method-assign]


_lay_out_unbacked_contiguously()


def _keep_strides_for_backward() -> None:
    """Make inductor lay out tensors saved for backward in the stride order that the backward pass was traced with.

    Inductor does so itself, or tells AOTAutograd of another order, unless strides depend on unbacked sizes. Then it may
    choose another order, or make a tensor a view of a larger one (as ``cat`` does), and the backward pass raises.
    """
    call_function = GraphLowering.call_function

    def call_in_order(graph: GraphLowering, target: Any, args: Any, kwargs: Any) -> Any:
        result = call_function(graph, target, args, kwargs)
        node, value = graph.current_node, graph.current_node.meta.get("val")
        if not isinstance(result, TensorBox) or not isinstance(value, torch.Tensor):
            return result
        if isinstance(result.data, StorageBox) and free_unbacked_symbols(value.stride()) and _is_output(node):
            result.realize()
            if isinstance(result.get_layout(), FlexibleLayout):
                strides = [sympy.sympify(stride) for stride in value.stride()]
                result.freeze_layout_with_stride_order(get_stride_order(strides, graph.sizevars.shape_env))
        return result

    GraphLowering.call_function = call_in_order  # type: ignore[assignment,method-assign]


def _is_output(node: fx.Node) -> bool:
    """Is the node, or a view of it, an output of its graph?"""

    def is_view(user: fx.Node) -> bool:
        return isinstance(user.target, OpOverload) and any(ret.alias_info for ret in user.target._schema.returns)

    return any(user.op == "output" or (is_view(user) and _is_output(user)) for user in node.users)


_keep_strides_for_backward()


def _keep_added_dependencies() -> None:
    """Make inductor keep the dependencies that it has added to a node by hand when it computes the node's sizes anew.

    Torch 2.11 drops them, torch 2.13 does not. One of them is that sums into a buffer come behind its zeros: without
    it, code for CPUs lost the gradient of a table, or read a variable that was not there yet.
    """
    recompute = SchedulerNode.recompute_size_and_body

    def recompute_and_keep(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        added: list[Dep] = [dep for dep in node.read_writes.reads if isinstance(dep, WeakDep | StarDep)]
        recompute(node, *args, **kwargs)
        if dropped := OrderedSet(added) - node.read_writes.reads:
            node.set_read_writes(node.read_writes.with_read(dropped).rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_and_keep  # type: ignore[method-assign,assignment]


_keep_added_dependencies()


def _keep_storages_of_operands() -> None:
    """Make inductor keep the fake tensor of ``x`` where it replaces ``x * 1`` or ``x + 0`` by ``x``.

    It puts the fake tensor of the product there, which has a storage of its own. If ``x`` is a view of a tensor saved
    for backward, AOTAutograd no longer sees that the result shares memory with it, and the backward pass overwrites
    the caller's result.
    """
    remove_no_ops = joint_graph.remove_no_ops

    def remove_and_keep(gm: fx.GraphModule, *args: Any) -> None:
        values = {node: node.meta["val"] for node in gm.graph.nodes if "val" in node.meta}
        remove_no_ops(gm, *args)
        for node in gm.graph.nodes:
            if node in values:
                node.meta["val"] = values[node]

    joint_graph.remove_no_ops = remove_and_keep  # type: ignore[assignment]


_keep_storages_of_operands()
