"""The two products of attention that is written out: of queries and keys, and of weights and values."""

from __future__ import annotations

import torch
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.attention.rows import NotOnTree, Order, Rows
from radix_compile.analysis.rules.contractions import labels_of
from radix_compile.ir.axes import Mixes
from radix_compile.torch_internals import val

aten = torch.ops.aten

MATRIX = (aten.matmul.default, aten.bmm.default)


def is_product_of_scores(node: fx.Node) -> bool:
    """May it be one of queries and keys?"""
    return node.target in (*MATRIX, aten.baddbmm.default, aten.einsum.default)


def queries_and_keys(node: fx.Node) -> tuple[Rows, Rows]:
    """The queries and keys of a product ``[..., queries, keys]``. Raises :class:`NotOnTree`."""
    if node.target is aten.einsum.default:
        (one, other), (first, second), result = _equation(node)
        if result[-2] not in first:
            one, other, first, second = other, one, second, first
        *front, query, key = list(result)
        (feature,) = _summed(first, second, result)
        return _by_label(one, first, [*front, query, feature]), _by_label(other, second, [*front, key, feature])
    names = ("batch1", "batch2") if node.target is aten.baddbmm.default else ("self", _other(node))
    query, key = (argument(node, name) for name in names)
    last = {-1, -2, val(key).ndim - 1, val(key).ndim - 2}
    if key.target is aten.mT.default or (key.target is aten.transpose.int and last.issuperset(key.args[1:])):
        return Rows(query), Rows(key.args[0])
    rank = val(key).ndim
    return Rows(query), Rows(key, (*range(rank - 2), rank - 1, rank - 2))


def weights_and_values(node: fx.Node) -> tuple[fx.Node, Rows, Order]:
    """The factors of the last product, and its result's order as ``[..., queries, features]``. Raises ``NotOnTree``.

    Of an equation the weights come first, ``[..., queries, keys]``.
    """
    if node.target in MATRIX:
        return argument(node, "self"), Rows(argument(node, _other(node))), ()
    if node.target is not aten.einsum.default:
        raise NotOnTree(f"it ends in {node.target}, and not in a product of weights and values")
    (weights, values), (first, second), result = _equation(node)
    *front, query, key = list(first)
    features = [label for label in result if label not in first]
    if _summed(first, second, result) != [key] or len(features) != 1 or len(result) != len(front) + 2:
        raise NotOnTree("its last equation is not one of weights and values")
    return weights, _by_label(values, second, [*front, key, *features]), _order(result, [*front, query, *features])


def _other(node: fx.Node) -> str:
    return "mat2" if node.target is aten.bmm.default else "other"


def _equation(node: fx.Node) -> tuple[list[fx.Node], list[str], str]:
    tensors = argument(node, "tensors")
    try:
        terms, result = labels_of(argument(node, "equation"), len(tensors))
    except Mixes as reason:
        raise NotOnTree(str(reason)) from reason
    if len(tensors) != 2 or len(result) < 2:
        raise NotOnTree("its equation is not of two tensors")
    return list(tensors), terms, result


def _summed(first: str, second: str, result: str) -> list[str]:
    summed = [label for label in dict.fromkeys(first + second) if label not in result]
    if len(summed) != 1 or summed[0] not in first or summed[0] not in second:
        raise NotOnTree("its equation sums over other dimensions than one that both have")
    return summed


def _by_label(node: fx.Node, term: str, wanted: list[str]) -> Rows:
    """Rows with the dimensions of these labels; one that the tensor does not have is of size one."""
    if set(term) - set(wanted):
        raise NotOnTree("its equation has dimensions that do not line up")
    return Rows(node, _order(term, wanted))


def _order(term: str, wanted: list[str]) -> Order:
    order = tuple(term.index(label) if label in term else None for label in wanted)
    return () if order == tuple(range(len(term))) else order
