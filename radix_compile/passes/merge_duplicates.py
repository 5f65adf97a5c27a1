"""Merge equal nodes: layers repeat their masks, positions and views of rotary tables."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from radix_compile.analysis.memory import outputs_of, root
from radix_compile.torch_internals import OpOverload, checkpoint_region


def merge_duplicates(gm: fx.GraphModule) -> None:
    """Keep the first of each group of equal deterministic nodes.

    Nodes are not merged across ops with a side effect (``_set_grad_enabled`` changes whether a value has a gradient),
    nor across regions of activation checkpointing. Two equal outputs are kept: the caller may write to one of them.
    """
    first: dict[Hashable, fx.Node] = {}
    returned = {root(node) for node in outputs_of(gm.graph)}
    region = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if not isinstance(node.target, OpOverload):
            region += node.is_impure()
        elif torch.Tag.nondeterministic_seeded not in node.target.tags:
            key = (region, checkpoint_region(node), node.target, _key(node.args), _key(node.kwargs))
            kept = first.setdefault(key, node)
            if kept is not node and not returned.issuperset((kept, node)):
                returned.update({kept} if node in returned else ())
                node.replace_all_uses_with(kept)
                gm.graph.erase_node(node)


def _key(argument: Any) -> Hashable:
    """Return a dictionary key for an argument. ``1``, ``1.0`` and ``True`` differ, as do ``0.0`` and ``-0.0``."""
    if isinstance(argument, list | tuple):
        return (type(argument).__name__, *map(_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in sorted(argument.items()))
    return argument if isinstance(argument, fx.Node) else (type(argument).__name__, repr(argument))
