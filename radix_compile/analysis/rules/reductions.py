"""Ops that read along given dimensions: sums, norms, softmax, topk. Position-wise if these have no tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.rules.contractions import attend
from radix_compile.ir.axes import SEQ, Axes, Layout, Mixes, as_size, feature, has_tokens, is_longer, plain_axis
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Masked, RowMax, Weights, implies_causal
from radix_compile.ir.value import Marks, Value, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten


def _results(node: fx.Node, axes: Axes) -> Marks:
    """Return a value with these axes for each result."""
    outputs = val(node)
    return tuple(Value(axes) for _ in outputs) if isinstance(outputs, tuple | list) else Value(axes)


def _dims(given: int | Sequence[int] | None, rank: int) -> set[int]:
    """Return the dimensions that an op reduces, counted from the left: all if none is given."""
    if given is None or (not isinstance(given, int) and len(given) == 0):
        return set(range(rank))
    return {dim % max(rank, 1) for dim in ([given] if isinstance(given, int) else given)}


def reduce(node: fx.Node, layout: Layout) -> Marks:
    source = source_of(node)
    value = value_of(source)
    rank = len(value.axes)
    dims = _dims(argument(node, "dim"), rank)
    if node.target in (aten.amax.default, aten.max.dim) and value.is_pair and isinstance(value.fact, Masked):
        return _largest_score(node, source, *dims)
    for dim in dims:
        feature(value.axes[dim], "reduces over")
    keep = argument(node, "keepdim")
    axes = tuple(() if dim in dims else axis for dim, axis in enumerate(value.axes) if keep or dim not in dims)
    return _results(node, axes)


def _largest_score(node: fx.Node, source: fx.Node, *dims: int) -> Marks:
    """Return the value of a maximum over the keys of causally masked scores.

    Hidden entries are never the largest in rows that see a key.
    """
    value = value_of(source)
    (dim,) = dims if len(dims) == 1 else (0,)
    if not (len(dims) == 1 and argument(node, "keepdim")):
        raise Mixes(
            "reduces scores over more than their keys, or without keepdim", RefusalCode.ATTENTION_NOT_UNDERSTOOD
        )
    weights = _weights(value, dim)
    axes = (*value.axes[:dim], (), *value.axes[dim + 1 :])
    index = attend(axes, weights, value)
    largest = index.with_fact(RowMax(source))
    if node.target is aten.amax.default:
        return largest
    if any(user.args[1] == 1 and user.users for user in node.users):  # the index of a key is its column
        raise Mixes("reads the index of the key with the largest score", RefusalCode.ATTENTION_NOT_UNDERSTOOD)
    return largest, index


def reduce_all(node: fx.Node, layout: Layout) -> Marks:
    value = value_of(source_of(node))
    for axis in value.axes:
        feature(axis, "reduces over")
    return Value(())


def along(node: fx.Node, layout: Layout) -> Marks:
    """Return the value of an op that reads and writes along one dimension, which ``topk`` also shortens."""
    value = value_of(source_of(node))
    dim = argument(node, "dim") % max(len(value.axes), 1)
    feature(value.axes[dim], "reads along")
    outputs = val(node)
    size = (outputs[0] if isinstance(outputs, tuple | list) else outputs).shape[dim]
    axis = plain_axis(as_size(size))  # also if the source is uniform, because indices are not
    return _results(node, (*value.axes[:dim], axis, *value.axes[dim + 1 :]))


def softmax(node: fx.Node, layout: Layout) -> Value:
    """Return the value of a softmax: position-wise over features, attention weights over causally masked scores."""
    value = value_of(source_of(node))
    rank = len(value.axes)
    dim = argument(node, "dim") % rank
    if not has_tokens(value.axes[dim]):
        return Value(value.axes)
    return Value(value.axes, fact=_weights(value, dim))


def _weights(value: Value, dim: int) -> Weights:
    """Return the fact of a softmax of causally masked scores over the keys in ``dim``. Raises for other scores."""
    rank, axis = len(value.axes), value.axes[dim]
    if not value.is_pair or not (axis == (SEQ,) or is_longer(axis)):
        feature(axis, "normalises over")
    fact = value.fact
    if not isinstance(fact, Masked):
        raise Mixes(
            "attention scores reach the softmax without a mask that is understood", RefusalCode.MASK_NOT_UNDERSTOOD
        )
    if not fact.is_certain:
        raise Mixes(
            "the mask is finite and is added to something that could be as large as it", RefusalCode.MASK_NOT_UNDERSTOOD
        )
    query = next((other for other, axis in enumerate(value.axes) if other != dim and SEQ in axis), None)
    if query is None or not implies_causal(fact.visible, query - rank, dim - rank):
        raise Mixes(
            "the attention mask lets a token see later ones (or is not understood)", RefusalCode.MASK_NOT_CAUSAL
        )
    return Weights(fact.visible, query - rank, dim - rank, undefined=fact.is_strict and not is_longer(axis))


def layer_norm(node: fx.Node, layout: Layout) -> Marks:
    value = value_of(source_of(node))
    num_dims = len(argument(node, "normalized_shape"))
    for axis in value.axes[len(value.axes) - num_dims :]:
        feature(axis, "normalises over")
    for weight in node.all_input_nodes[1:]:
        if not value_of(weight).is_constant:
            raise Mixes("the norm's weights differ from row to row", RefusalCode.DIFFERS_BY_ROW)
    leading = value.axes[: len(value.axes) - num_dims]
    axes = (*leading, *(plain_axis(as_size(size)) for size in argument(node, "normalized_shape")))
    if node.target is aten.native_layer_norm.default:
        statistics = (*leading, *((),) * num_dims)
        return Value(axes), Value(statistics), Value(statistics)
    return Value(axes)
