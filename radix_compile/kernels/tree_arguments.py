"""The arguments of ``tree_attention``, by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from radix_compile.ir.plan_arrays import Code


class TreeArrays(NamedTuple):
    """The plan: see ``PrefixPlan`` and its ``tree``. ``end`` is 0 at keys that are hidden.

    The rest are ``TorchTiles`` or ``TritonTiles``: the code that an attention is given tiles for runs it.
    """

    fold: Tensor
    scatter: Tensor
    begin: Tensor
    end: Tensor
    windows: Tensor | None = None
    window_starts: Tensor | None = None
    tiles: Tensor | None = None
    tile_keys: Tensor | None = None
    tile_masks: Tensor | None = None
    stretches: Tensor | None = None
    stretch_starts: Tensor | None = None
    keys: Tensor | None = None
    key_starts: Tensor | None = None
    parts: Tensor | None = None
    divided: Tensor | None = None

    @property
    def code(self) -> Code:
        """The code that these arrays are for."""
        return "torch" if self.stretches is None else "triton"

    def given(self, *names: str) -> list[Tensor]:
        """The arrays of these names. Raises ``RuntimeError`` if one is missing: the plan has no tiles for this code."""
        arrays = {name: getattr(self, name) for name in names}
        if missing := [name for name, array in arrays.items() if array is None]:
            raise RuntimeError(f"tree_attention was not given these arrays of the plan: {', '.join(missing)}")
        return list(arrays.values())


class ScoreOptions(NamedTuple):
    """``sinks`` ``[H]``: one more score for each head, of a key whose value is zero. ``window``: how many of the last
    columns a node sees, its own included. ``softcap``: scores are ``softcap * tanh(score / softcap)``. ``bias``, of
    rows: what is then added (or, if bool, which keys are seen), see ``BiasPlaces``.
    """

    sinks: Tensor | None
    bias: Tensor | None
    scale: float
    window: int | None = None
    softcap: float | None = None


class BiasPlaces(NamedTuple):
    """Where nodes find the entries of a bias ``[B or 1, H or 1, S or 1, S]``: in the row that stands for the query, at
    the key's column there. ``batch`` and ``query`` are those of nodes as queries; a key is ``depth`` columns behind
    ``first``, where the path of the query starts in that row.
    """

    batch: Tensor
    query: Tensor
    first: Tensor
    depth: Tensor

    def of(self, bias: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """``[H or 1, len(i), len(j)]``. What a key that is no ancestor finds means nothing."""
        batch = self.batch[i] if bias.shape[0] > 1 else torch.zeros_like(i)
        query = self.query[i] if bias.shape[2] > 1 else torch.zeros_like(i)
        column = (self.first[i, None] + self.depth[j]).clamp(max=bias.shape[3] - 1)
        return bias[batch[:, None], :, query[:, None], column].permute(2, 0, 1)


def bias_places(plan: TreeArrays, columns: int) -> BiasPlaces:
    """In rows of so many columns."""
    return BiasPlaces(plan.fold // columns, plan.fold % columns, plan.begin % columns, plan.fold - plan.begin)


def heads_inside(like: Tensor, features: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty ``[1, H, T', features]`` like ``[1, H, T', E]``: in memory ``[1, T', H, features]``, for projections.

    So are all results laid out, whatever code runs.
    """
    _, heads, nodes, size = like.shape
    shape = 1, nodes, heads, size if features is None else features
    return like.new_empty(shape, dtype=dtype or like.dtype).transpose(1, 2)


def dense(tensor: Tensor) -> Tensor:
    """With the features of a head side by side, as kernels read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_bytes(query: Tensor, value: Tensor) -> int:
    """The width of the widest row of a head, padded to a power of two entries, at least 16."""
    widest = max(16, query.shape[-1], value.shape[-1])
    return (1 << (widest - 1).bit_length()) * query.dtype.itemsize
