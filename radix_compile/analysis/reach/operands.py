"""Helpers of the rules for columns: operands lined up, products with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.reach.column_reach import OutOfReach, Reach, Reaches, reach

Array = NDArray[Any]


def aligned(operands: Sequence[fx.Node], reaches: Reaches) -> tuple[list[Reach], int | None]:
    """The operands of a broadcasting op with as many dimensions as its result, and the dimension of the sequences."""
    rank = max(len(reaches.shape(operand)) for operand in operands)
    found = []
    for operand in operands:
        one = reaches.of(operand)
        shape = (1,) * (rank - one.rank) + one.last.shape
        batch = None if one.batch is None else one.batch + rank - one.rank
        found.append(Reach(one.last.reshape(shape), one.known.reshape(shape), batch))
    batches = {one.batch for one in found if one.batch is not None}
    if len(batches) > 1:
        raise OutOfReach
    batch = batches.pop() if batches else None
    if batch is not None:
        for operand in operands:
            refuse_if_apart(operand, batch - rank + len(reaches.shape(operand)), reaches)
    return found, batch


def refuse_if_apart(operand: fx.Node, dim: int, reaches: Reaches) -> None:
    """If that is a constant with other entries for each sequence, which are along that dimension."""
    if dim < 0 or reaches.of(operand).batch is not None or reaches.shape(operand)[dim] == 1:
        return
    if reaches.may_vary(operand, dim):
        raise OutOfReach


def latest(arrays: Sequence[Array]) -> Array:
    result = arrays[0]
    for array in arrays[1:]:
        result = np.maximum(result, array)
    return result


def zero_products(operands: Sequence[Reach]) -> Array:
    """The entries of products that are known: zero where a factor is."""
    zero = operands[0].known == 0
    for one in operands[1:]:
        zero = zero | (one.known == 0)
    return np.where(zero, 0.0, np.nan)


def moved(source: Reach, move: Callable[[Array], Array], batch: int | None) -> Reach:
    return reach(move(source.last), move(source.known), batch)


def dim_of(node: fx.Node, source: Reach) -> int:
    dim: int = argument(node, "dim") % source.rank
    if dim == source.batch:
        raise OutOfReach
    return dim
