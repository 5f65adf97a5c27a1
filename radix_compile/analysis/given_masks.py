"""Attention masks that are inputs, ``[B, H, S, S]``: assumed causal when compiling, and checked in every call."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from radix_compile import torch_internals as internals
from radix_compile.ir.axes import BATCH, SEQ, Axis, as_size, plain_axes, plain_axis
from radix_compile.ir.facts import Given, Masked, Predicate
from radix_compile.ir.graph import facts
from radix_compile.ir.value import Value
from radix_compile.torch_internals import val


def given_masks(graph: fx.Graph, ids: fx.Node) -> list[fx.Node]:
    """Return the inputs with an entry for each pair of rows of a sequence; their batch dimension may be 1."""
    return [node for node in graph.find_nodes(op="placeholder") if _is_given_mask(node, ids)]


def _is_given_mask(node: fx.Node, ids: fx.Node) -> bool:
    tensor, (batch, seq) = val(node), val(ids).shape[:2]
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or facts(node).is_static:
        return False
    if not (tensor.dtype == torch.bool or tensor.dtype.is_floating_point):
        return False
    first, _, query, key = tensor.shape
    is_square = internals.same_size(query, seq) and internals.same_size(key, seq)
    return is_square and (as_size(first) == 1 or internals.same_size(first, batch))


def given_mask_value(node: fx.Node) -> Value:
    """Return the value of a given mask, assuming that every call checks it (``runtime.checks``)."""
    tensor = val(node)
    visible = Given(node, -2, -1)
    is_bool = tensor.dtype == torch.bool
    fact = Predicate(visible) if is_bool else Masked.of(visible, torch.finfo(tensor.dtype).min / 2, 0.0)
    if as_size(tensor.shape[0]) == 1:
        return Value(plain_axes(node), fact=fact)
    heads: Axis = plain_axis(as_size(tensor.shape[1]))
    return Value(((BATCH,), heads, (SEQ,), (SEQ,)), fact=fact)
