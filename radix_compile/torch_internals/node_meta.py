"""The entries of ``node.meta`` that torch defines. (Passes keep their own facts there: see ``ir.graph``.)"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils.checkpoint import CheckpointPolicy


def val(node: fx.Node) -> Any:
    """Return the fake result of a node (with shape, strides and dtype), the symbol of a size, or None if unknown."""
    return node.meta.get("val")


def set_val(node: fx.Node, result: Any) -> None:
    node.meta["val"] = result


def forget_value(node: fx.Node) -> None:
    """Drop the fake result of a node whose result changed its form."""
    node.meta.pop("val", None)


def module_stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return the modules in which a node was traced, outermost first: their paths, and their classes or names."""
    return node.meta.get("nn_module_stack") or {}


def stack_trace(node: fx.Node) -> str:
    """Return the lines of the user's program that a node comes from, formatted as a Python traceback."""
    return node.meta.get("stack_trace") or ""


def copy_place(node: fx.Node, origin: fx.Node) -> None:
    """Give a node the place of ``origin`` in the user's program, unless it has one."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in origin.meta:
            node.meta.setdefault(key, origin.meta[key])


def set_made_from(node: fx.Node, origin: fx.Node, pass_name: str) -> None:
    """Record which node this node was made from, and by which pass, where torch and its tools look for that."""
    is_copy = node.op == origin.op and node.target == origin.target
    action = NodeSourceAction.REPLACE if is_copy else NodeSourceAction.CREATE
    node.meta["from_node"] = [NodeSource(origin, pass_name, action)]


def made_from(node: fx.Node) -> tuple[str, str] | None:
    """Return the name of the node this node was last made from, and the pass (ours or torch's) that made it."""
    sources = node.meta.get("from_node")
    return (sources[-1].name, sources[-1].pass_name) if sources else None


def tag_for_recompute(node: fx.Node, region: int) -> None:
    """Recompute a node in the backward pass, as part of an activation checkpointing region."""
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    node.meta["ac_graph_id"] = region


def keep_recompute_tag(node: fx.Node, origin: fx.Node) -> None:
    """Give a node made from ``origin`` the tag that :func:`tag_for_recompute` gave ``origin``, if any."""
    for key in ("recompute", "ac_graph_id"):
        if key in origin.meta:
            node.meta.setdefault(key, origin.meta[key])


def checkpoint_region(node: fx.Node) -> int | None:
    """Return the number of the activation checkpointing region that a node is in."""
    region: int | None = node.meta.get("ac_graph_id")
    return region
