"""Ops that read along a dimension: sums, triangles, products of matrices, substitution, convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.analysis.reach.column_reach import LARGEST, NOTHING, OutOfReach, Reach, Reaches, reach
from radix_compile.analysis.reach.operands import aligned, dim_of, latest, refuse_if_apart, zero_products
from radix_compile.analysis.rules.contractions import labels_of
from radix_compile.ir.axes import Mixes

aten = torch.ops.aten


def triangle(node: fx.Node, reaches: Reaches) -> Reach:
    source, (rows, columns) = reaches.of(source_of(node)), reaches.shape(node)[-2:]
    if source.batch in (source.rank - 2, source.rank - 1):
        raise OutOfReach
    cut = np.tril if node.target is aten.tril.default else np.triu
    kept = cut(np.ones((rows, columns), bool), reaches.number(argument(node, "diagonal")))
    return reach(source.last, np.where(kept, source.known, 0.0), source.batch)


def reduce(node: fx.Node, reaches: Reaches) -> Reach:
    source = reaches.of(source_of(node))
    named = argument(node, "dim")
    dims = tuple(range(source.rank)) if not named else tuple(dim % source.rank for dim in named)
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
    """Weights that are constants of the call."""
    source, *others = (reaches.of(arg) for arg in node.all_input_nodes)
    if source.batch == source.rank - 1 or any(one.batch is not None or one.last.max() != NOTHING for one in others):
        raise OutOfReach
    if len(reaches.shape(argument(node, "weight"))) != 2:
        raise OutOfReach
    return reach(source.last.max(axis=-1, keepdims=True), batch=source.batch)


def matmul(node: fx.Node, reaches: Reaches) -> Reach:
    left, right = node.args[:2]
    ranks = [len(reaches.shape(one)) for one in (left, right)]  # type: ignore[arg-type]
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
    """Sums of products. A product with a factor that is zero reads nothing."""
    summed = sorted({name for own in labels for name in own} - set(result))
    order = [*result, *summed]
    lasts, knowns, batches = [], [], set()
    for tensor, own in zip(tensors, labels, strict=True):
        one = reaches.of(tensor)
        if one.batch is not None:
            batches.add(own[one.batch])
        turned = [own.index(name) for name in order if name in own]
        shape = [one.last.shape[own.index(name)] if name in own else 1 for name in order]
        lasts.append(one.last.transpose(turned).reshape(shape))
        knowns.append(one.known.transpose(turned).reshape(shape))
    if len(batches) > 1 or not batches.isdisjoint(summed):
        raise OutOfReach
    for tensor, own in zip(tensors, labels, strict=True):
        for name in batches.intersection(own):
            refuse_if_apart(tensor, own.index(name), reaches)
    if math.prod(np.broadcast_shapes(*(last.shape for last in lasts))) > 4 * LARGEST:
        raise OutOfReach
    products = reach(latest(lasts), zero_products([Reach(a, b) for a, b in zip(lasts, knowns, strict=True)]))
    along = tuple(range(len(result), len(order)))
    zero = (products.known == 0).all(axis=along)
    batch = order.index(batches.pop()) if batches else None
    return reach(products.last.max(axis=along), np.where(zero, 0.0, np.nan), batch)


def solve_triangular(node: fx.Node, reaches: Reaches) -> Reach:
    """Forward substitution: a row of the result reads the rows of both sides up to its own."""
    matrix, right = node.args[:2]
    if argument(node, "upper") or not argument(node, "left"):
        raise OutOfReach
    found, batch = aligned([matrix, right], reaches)  # type: ignore[list-item]
    if batch is not None and batch >= found[0].rank - 2:
        raise OutOfReach
    rows = reaches.shape(node)[-2]
    sides = []
    for side, one in enumerate(found):
        last = np.broadcast_to(one.last, (*one.last.shape[:-2], rows, one.last.shape[-1]))
        if side == 0:  # only its lower triangle is read
            last = np.broadcast_to(last, (*last.shape[:-1], rows))
            last = np.where(np.tril(np.ones((rows, rows), bool)), last, NOTHING).max(axis=-1, keepdims=True)
        sides.append(np.maximum.accumulate(last, axis=-2))
    return reach(latest(sides), batch=batch)


def conv1d(node: fx.Node, reaches: Reaches) -> Reach:
    """``[N, C, L]`` with weights that are constants of the call."""
    source, *others = (reaches.of(arg) for arg in node.all_input_nodes)
    if source.rank != 3 or source.batch == 1 or source.batch == 2:
        raise OutOfReach
    if any(one.batch is not None or one.last.max() != NOTHING for one in others):
        raise OutOfReach
    padding = argument(node, "padding")
    if isinstance(padding, str):
        raise OutOfReach
    stride, amount, dilation = (
        reaches.number(one[0] if isinstance(one, list | tuple) else one)
        for one in (argument(node, "stride"), padding, argument(node, "dilation"))
    )
    length, out = reaches.shape(source_of(node))[2], reaches.shape(node)[2]
    taps = reaches.shape(argument(node, "weight"))[2]
    last = np.broadcast_to(source.last.max(axis=1, keepdims=True), (*source.last.shape[:1], 1, length))
    padded = np.pad(last, ((0, 0), (0, 0), (amount, amount)), constant_values=NOTHING)
    windows = np.arange(out)[:, None] * stride + np.arange(taps) * dilation
    return reach(padded[..., windows].max(axis=-1), batch=source.batch)
