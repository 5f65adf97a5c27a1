"""Floating-point operations of an ATen node, from the shapes in its metadata."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.op_info import info_of
from radix_compile.torch_internals import numel_hint, size_hint, val


def flops(node: fx.Node) -> int:
    """Return the number of multiplications and additions of a matrix product or an attention; 0 for other ops.

    Attention counts all pairs of query and key, masked or not, because a kernel that does not know the mask computes
    them all. Symbolic sizes count as their hints, unbacked sizes as 1.
    """
    count = info_of(node.target).flops
    return count(node) if count else 0


# ---------------------------------------------------------------------------------- functions for the table of ops


def product(weight: str, contracted: int) -> Callable[[fx.Node], int]:
    """Return a function that counts the FLOPs of a product, summed over a dimension of the argument ``weight``."""

    def count(node: fx.Node) -> int:
        return _product(node, argument(node, weight), contracted)

    return count


def grouped_product(node: fx.Node) -> int:
    """Count the FLOPs of ``(rows [N, K], weights [E, K, M], ...)``, where each row is multiplied by one weight."""
    return _product(node, node.args[1], -2)  # type: ignore[arg-type]


def _product(node: fx.Node, weight: fx.Node, contracted: int) -> int:
    shape = val(weight).shape
    return 2 * numel_hint(val(node)) * size_hint(shape[contracted] if len(shape) > 1 else shape[0])


def attention(node: fx.Node) -> int:
    return _attention(*(argument(node, name) for name in ("query", "key", "value")))


def flex_attention(node: fx.Node) -> int:
    return _attention(*node.args[:3])  # type: ignore[arg-type]


def _attention(*operands: fx.Node) -> int:
    query, key, value = map(val, operands)
    scores = numel_hint(query) // size_hint(query.shape[-1]) * size_hint(key.shape[-2])
    return 2 * scores * (size_hint(query.shape[-1]) + size_hint(value.shape[-1]))


def equation(node: fx.Node) -> int:
    terms = node.args[0].replace(" ", "").partition("->")[0].split(",")  # type: ignore[union-attr]
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        shape = val(tensor).shape
        sizes.update(zip(term, map(size_hint, shape), strict=False))  # an ellipsis is not counted
    return 2 * math.prod(sizes.values())
