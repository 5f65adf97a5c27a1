"""Floating-point operations of an ATen node, from the shapes in its metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from radix_compile.analysis.rules.flex import FLEX
from radix_compile.analysis.rules.sorting import GROUPED_PRODUCTS
from radix_compile.analysis.rules.table import argument
from radix_compile.torch_internals import OpOverload, size_hint

aten = torch.ops.aten
_PRODUCTS = {
    aten.linear.default: ("weight", -1),
    aten.mm.default: ("mat2", 0),
    aten.bmm.default: ("mat2", -2),
    aten.matmul.default: ("other", -2),
    aten.addmm.default: ("mat2", 0),
    aten.baddbmm.default: ("batch2", -2),
}


def flops(node: fx.Node) -> int:
    """Multiplications and additions of a matrix product or an attention; 0 for anything else.

    Attention counts all pairs of query and key, masked or not, as it runs without knowledge of the mask. Symbolic sizes
    count with their hints, those that depend on the data as 1.
    """
    if node.op != "call_function":
        return 0
    if node.target in (aten.scaled_dot_product_attention.default, FLEX):
        query, key, value = (one.meta["val"] for one in _attended(node))
        return 2 * _numel(query) * size_hint(key.shape[-2]) + 2 * _numel(query) // size_hint(
            query.shape[-1]
        ) * size_hint(key.shape[-2]) * size_hint(value.shape[-1])
    if node.target is aten.einsum.default:
        return _equation_flops(node)
    if isinstance(node.target, OpOverload) and node.target.name() in GROUPED_PRODUCTS:
        weight, dim = node.args[1].meta["val"], -2  # type: ignore[union-attr]
    elif node.target in _PRODUCTS:
        name, dim = _PRODUCTS[node.target]
        weight = argument(node, name).meta["val"]
    else:
        return 0
    contracted = weight.shape[dim] if weight.ndim > 1 else weight.shape[0]
    return 2 * _numel(node.meta["val"]) * size_hint(contracted)


def _attended(node: fx.Node) -> Iterable[fx.Node]:
    """Query, key and value of attention as one op."""
    if node.target is FLEX:
        return node.args[:3]  # type: ignore[return-value]
    return (argument(node, name) for name in ("query", "key", "value"))


def _equation_flops(node: fx.Node) -> int:
    terms = node.args[0].replace(" ", "").partition("->")[0].split(",")  # type: ignore[union-attr]
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        shape = tensor.meta["val"].shape
        sizes.update(zip(term, map(size_hint, shape), strict=False))  # an ellipsis is not counted
    return 2 * math.prod(sizes.values())


def _numel(tensor: torch.Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size_hint(size)
    return count
