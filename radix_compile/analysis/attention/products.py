"""The two products of attention in several ops: queries times keys, and weights times values."""

from __future__ import annotations

import torch
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.attention.rows import NotOnTree, Order, Rows
from radix_compile.analysis.rules.contractions import labels_of
from radix_compile.ir.axes import Mixes
from radix_compile.torch_internals import val

aten = torch.ops.aten

MATRIX_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def is_product_of_scores(node: fx.Node) -> bool:
    """May the node be the product of queries and keys?"""
    return node.target in (*MATRIX_PRODUCTS, aten.baddbmm.default, aten.einsum.default)


def queries_and_keys(node: fx.Node) -> tuple[Rows, Rows]:
    """Return the queries and keys of a product ``[..., queries, keys]``. Raises :class:`NotOnTree`."""
    if node.target is aten.einsum.default:
        (queries, keys), (query_term, key_term), result = _equation(node)
        if result[-2] not in query_term:
            queries, keys, query_term, key_term = keys, queries, key_term, query_term
        *leading, query, key = list(result)
        (feature,) = _summed(query_term, key_term, result)
        by_query, by_key = [*leading, query, feature], [*leading, key, feature]
        return _by_label(queries, query_term, by_query), _by_label(keys, key_term, by_key)
    names = ("batch1", "batch2") if node.target is aten.baddbmm.default else ("self", _second_name(node))
    query, key = (argument(node, name) for name in names)
    last_dims = {-1, -2, val(key).ndim - 1, val(key).ndim - 2}
    if key.target is aten.mT.default or (key.target is aten.transpose.int and last_dims.issuperset(key.args[1:])):
        return Rows(query), Rows(key.args[0])
    rank = val(key).ndim
    return Rows(query), Rows(key, (*range(rank - 2), rank - 1, rank - 2))


def weights_and_values(node: fx.Node) -> tuple[fx.Node, Rows, Order]:
    """Return the factors of the last product, and the order of its result as ``[..., queries, features]``.

    An equation must have the weights first, ``[..., queries, keys]``. Raises :class:`NotOnTree`.
    """
    if node.target in MATRIX_PRODUCTS:
        return argument(node, "self"), Rows(argument(node, _second_name(node))), ()
    if node.target is not aten.einsum.default:
        raise NotOnTree(f"it ends in {node.target}, not in a product of weights and values")
    (weights, values), (weight_term, value_term), result = _equation(node)
    *leading, query, key = list(weight_term)
    features = [label for label in result if label not in weight_term]
    if _summed(weight_term, value_term, result) != [key] or len(features) != 1 or len(result) != len(leading) + 2:
        raise NotOnTree("its last equation is not a product of weights and values")
    order = _order(result, [*leading, query, *features])
    return weights, _by_label(values, value_term, [*leading, key, *features]), order


def _second_name(node: fx.Node) -> str:
    """Return the name of the second factor of a matrix product."""
    return "mat2" if node.target is aten.bmm.default else "other"


def _equation(node: fx.Node) -> tuple[list[fx.Node], list[str], str]:
    """Return the two tensors of an equation, their labels, and the labels of the result. Raises :class:`NotOnTree`."""
    tensors = argument(node, "tensors")
    try:
        terms, result = labels_of(argument(node, "equation"), len(tensors))
    except Mixes as reason:
        raise NotOnTree(str(reason)) from reason
    if len(tensors) != 2 or len(result) < 2:
        raise NotOnTree("its equation does not have two tensors")
    return list(tensors), terms, result


def _summed(first: str, second: str, result: str) -> list[str]:
    """Return the label over which the equation sums, in a list. Raises :class:`NotOnTree`."""
    summed = [label for label in dict.fromkeys(first + second) if label not in result]
    if len(summed) != 1 or summed[0] not in first or summed[0] not in second:
        raise NotOnTree("its equation does not sum over exactly one dimension, of both tensors")
    return summed


def _by_label(node: fx.Node, term: str, labels: list[str]) -> Rows:
    """Return rows with the dimensions in the order of ``labels``; a dimension that the tensor lacks has size one."""
    if set(term) - set(labels):
        raise NotOnTree("its equation has dimensions that do not line up")
    return Rows(node, _order(term, labels))


def _order(term: str, labels: list[str]) -> Order:
    order = tuple(term.index(label) if label in term else None for label in labels)
    return () if order == tuple(range(len(term))) else order
