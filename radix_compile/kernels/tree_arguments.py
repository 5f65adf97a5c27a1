"""What the code of ``tree_attention`` is given, by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TreeArrays(NamedTuple):
    """The plan: int64, see ``PrefixPlan`` and its ``tree``, and ``TreeTiles`` for the last four.

    ``end`` is 0 at keys that are hidden.
    """

    fold: Tensor
    scatter: Tensor
    begin: Tensor
    end: Tensor
    runs: Tensor | None = None
    run_starts: Tensor | None = None
    keys: Tensor | None = None
    key_starts: Tensor | None = None


class Carried(NamedTuple):
    """``sinks`` ``[H]``: one more score for each head, of a key whose value is zero. ``window``: how many of the last
    columns a node sees, its own included. ``softcap``: scores are ``softcap * tanh(score / softcap)``.
    """

    sinks: Tensor | None
    scale: float
    window: int | None = None
    softcap: float | None = None


def heads_inside(like: Tensor, features: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty ``[1, H, T', features]`` like ``[1, H, T', E]``: in memory ``[1, T', H, features]``, for projections.

    So are all results laid out, whatever code runs.
    """
    _, heads, nodes, size = like.shape
    shape = 1, nodes, heads, size if features is None else features
    return like.new_empty(shape, dtype=dtype or like.dtype).transpose(1, 2)


def row_bytes(query: Tensor, value: Tensor) -> int:
    """The width of the widest row of a head, padded to a power of two entries, at least 16."""
    widest = max(16, query.shape[-1], value.shape[-1])
    return (1 << (widest - 1).bit_length()) * query.dtype.itemsize
