"""Helpers of the rules for reach: lining up operands, products with zeros."""

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
    """Return a broadcasting op's operands, padded to the rank of its result, and the result's batch dimension."""
    rank = max(len(reaches.shape(operand)) for operand in operands)
    result = []
    for operand in operands:
        own = reaches.of(operand)
        shape = (1,) * (rank - own.rank) + own.last.shape
        batch = None if own.batch is None else own.batch + rank - own.rank
        result.append(Reach(own.last.reshape(shape), own.known.reshape(shape), batch))
    batches = {padded.batch for padded in result if padded.batch is not None}
    if len(batches) > 1:
        raise OutOfReach
    batch = batches.pop() if batches else None
    if batch is not None:
        for operand in operands:
            refuse_if_batched_constant(operand, batch - rank + len(reaches.shape(operand)), reaches)
    return result, batch


def refuse_if_batched_constant(operand: fx.Node, dim: int, reaches: Reaches) -> None:
    """Raise if the operand is a constant whose entries may differ along ``dim``, which lines up with the batch."""
    if dim < 0 or reaches.of(operand).batch is not None or reaches.shape(operand)[dim] == 1:
        return
    if reaches.may_vary(operand, dim):
        raise OutOfReach


def latest(arrays: Sequence[Array]) -> Array:
    """Return the elementwise maximum of the arrays, broadcast to each other."""
    result = arrays[0]
    for array in arrays[1:]:
        result = np.maximum(result, array)
    return result


def zero_products(operands: Sequence[Reach]) -> Array:
    """Return the known entries of a product: zero where a factor is zero, NaN elsewhere."""
    zero = operands[0].known == 0
    for operand in operands[1:]:
        zero = zero | (operand.known == 0)
    return np.where(zero, 0.0, np.nan)


def moved(source: Reach, move: Callable[[Array], Array], batch: int | None) -> Reach:
    """Return the reach of an op that moves entries by ``move``; ``batch`` is the result's batch dimension."""
    return reach(move(source.last), move(source.known), batch)


def dim_of(node: fx.Node, source: Reach) -> int:
    """Return the op's argument ``dim``, counted from the left. Raises if that is the batch dimension."""
    dim: int = argument(node, "dim") % source.rank
    if dim == source.batch:
        raise OutOfReach
    return dim
