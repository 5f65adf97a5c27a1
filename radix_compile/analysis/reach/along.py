"""Ops that read along a dimension: sums, triangles, products of matrices, substitution, convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.reach.column_reach import MAX_ENTRIES, NO_COLUMN, OutOfReach, Reach, Reaches, reach
from radix_compile.analysis.reach.operands import aligned, dim_of, latest, refuse_if_batched_constant, zero_products
from radix_compile.analysis.rules.contractions import labels_of
from radix_compile.ir.axes import Mixes

aten = torch.ops.aten


def triangle(node: fx.Node, reaches: Reaches) -> Reach:
    source, (rows, columns) = reaches.of(source_of(node)), reaches.shape(node)[-2:]
    if source.batch in (source.rank - 2, source.rank - 1):
        raise OutOfReach
    cut = np.tril if node.target is aten.tril.default else np.triu
    mask = cut(np.ones((rows, columns), bool), reaches.number(argument(node, "diagonal")))
    return reach(source.last, np.where(mask, source.known, 0.0), source.batch)


def reduce(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    given = argument(node, "dim")
    dims = tuple(range(source.rank)) if not given else tuple(dim % source.rank for dim in given)
    if source.batch in dims:
        raise OutOfReach
    keep = argument(node, "keepdim")
    batch = source.batch
    if batch is not None and not keep:
        batch -= sum(dim < batch for dim in dims)
    zero = (source.known == 0).all(axis=dims, keepdims=keep)
    return reach(source.last.max(axis=dims, keepdims=keep), np.where(zero, 0.0, np.nan), batch)


def softmax(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = dim_of(node, source)
    return reach(source.last.max(axis=dim, keepdims=True), batch=source.batch)


def cumsum(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    dim = dim_of(node, source)
    zero = np.logical_and.accumulate(source.known == 0, axis=dim)
    return reach(np.maximum.accumulate(source.last, axis=dim), np.where(zero, 0.0, np.nan), source.batch)


def linear(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of a product with constant weights."""
    source, *others = (reaches.of(arg) for arg in node.all_input_nodes)
    if source.batch == source.rank - 1:
        raise OutOfReach
    if any(other.batch is not None or other.last.max() != NO_COLUMN for other in others):
        raise OutOfReach
    if len(reaches.shape(argument(node, "weight"))) != 2:
        raise OutOfReach
    return reach(source.last.max(axis=-1, keepdims=True), batch=source.batch)


def matmul(node: fx.Node, reaches: Reaches) -> Reach:
    left, right = node.args[:2]
    ranks = [len(reaches.shape(factor)) for factor in (left, right)]  # type: ignore[arg-type]
    if min(ranks) < 2:
        raise OutOfReach
    names = [f"d{number}" for number in range(max(ranks) - 2)]
    labels = [[*names[len(names) - rank + 2 :], *ends] for rank, ends in zip(ranks, ("ik", "kj"), strict=True)]
    return contraction([left, right], labels, [*names, "i", "j"], reaches)


def einsum(node: fx.Node, reaches: Reaches) -> Reach:
    tensors = argument(node, "tensors")
    try:
        terms, result = labels_of(argument(node, "equation"), len(tensors))
    except Mixes:
        raise OutOfReach from None
    return contraction(tensors, [list(term) for term in terms], list(result), reaches)


def contraction(
    tensors: Sequence[Any], labels: Sequence[Sequence[str]], result: Sequence[str], reaches: Reaches
) -> Reach:
    """Return the reach of sums of products. A product with a zero factor reads no column."""
    summed = sorted({label for term in labels for label in term} - set(result))
    order = [*result, *summed]
    lasts, knowns, batches = [], [], set()
    for tensor, term in zip(tensors, labels, strict=True):
        operand = reaches.of(tensor)
        if operand.batch is not None:
            batches.add(term[operand.batch])
        permutation = [term.index(label) for label in order if label in term]
        shape = [operand.last.shape[term.index(label)] if label in term else 1 for label in order]
        lasts.append(operand.last.transpose(permutation).reshape(shape))
        knowns.append(operand.known.transpose(permutation).reshape(shape))
    if len(batches) > 1 or not batches.isdisjoint(summed):
        raise OutOfReach
    for tensor, term in zip(tensors, labels, strict=True):
        for label in batches.intersection(term):
            refuse_if_batched_constant(tensor, term.index(label), reaches)
    if math.prod(np.broadcast_shapes(*(last.shape for last in lasts))) > 4 * MAX_ENTRIES:
        raise OutOfReach
    products = reach(latest(lasts), zero_products([Reach(*arrays) for arrays in zip(lasts, knowns, strict=True)]))
    along = tuple(range(len(result), len(order)))
    zero = (products.known == 0).all(axis=along)
    batch = order.index(batches.pop()) if batches else None
    return reach(products.last.max(axis=along), np.where(zero, 0.0, np.nan), batch)


def solve_triangular(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of forward substitution: row i of the result reads the rows up to i of both operands."""
    matrix, right = node.args[:2]
    if argument(node, "upper") or not argument(node, "left"):
        raise OutOfReach
    operands, batch = aligned([matrix, right], reaches)  # type: ignore[list-item]
    if batch is not None and batch >= operands[0].rank - 2:
        raise OutOfReach
    num_rows = reaches.shape(node)[-2]
    lasts = []
    for position, operand in enumerate(operands):
        last = np.broadcast_to(operand.last, (*operand.last.shape[:-2], num_rows, operand.last.shape[-1]))
        if position == 0:  # only the lower triangle of the matrix is read
            last = np.broadcast_to(last, (*last.shape[:-1], num_rows))
            last = np.where(np.tril(np.ones((num_rows, num_rows), bool)), last, NO_COLUMN).max(axis=-1, keepdims=True)
        lasts.append(np.maximum.accumulate(last, axis=-2))
    return reach(latest(lasts), batch=batch)


def conv1d(node: fx.Node, reaches: Reaches) -> Reach:
    """Return the reach of a convolution of ``[N, C, L]`` with constant weights."""
    source, *others = (reaches.of(arg) for arg in node.all_input_nodes)
    if source.rank != 3 or source.batch == 1 or source.batch == 2:
        raise OutOfReach
    if any(other.batch is not None or other.last.max() != NO_COLUMN for other in others):
        raise OutOfReach
    padding = argument(node, "padding")
    if isinstance(padding, str):
        raise OutOfReach
    stride, num_padded, dilation = (
        reaches.number(arg[0] if isinstance(arg, list | tuple) else arg)
        for arg in (argument(node, "stride"), padding, argument(node, "dilation"))
    )
    length, length_out = reaches.shape(source_of(node))[2], reaches.shape(node)[2]
    kernel_size = reaches.shape(argument(node, "weight"))[2]
    last = np.broadcast_to(source.last.max(axis=1, keepdims=True), (*source.last.shape[:1], 1, length))
    padded = np.pad(last, ((0, 0), (0, 0), (num_padded, num_padded)), constant_values=NO_COLUMN)
    windows = np.arange(length_out)[:, None] * stride + np.arange(kernel_size) * dilation
    return reach(padded[..., windows].max(axis=-1), batch=source.batch)
