"""The index ops in plain torch: what the kernels are tested against, and what runs where they do not.

The arguments are those of ``index_ops``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _rows_of(tensor: Tensor, batch_dim: int, seq_dim: int) -> Tensor:
    """``[B * S, features]``: a view where the strides permit."""
    return tensor.movedim((batch_dim, seq_dim), (0, 1)).flatten(0, 1)


def fold_rows(full: Tensor, fold: Tensor, scatter: Tensor, batch_dim: int, seq_dim: int) -> Tensor:
    compact = _rows_of(full, batch_dim, seq_dim).index_select(0, fold)
    return compact.unsqueeze(0).movedim((0, 1), (batch_dim, seq_dim))


def place_rows(
    compact: Tensor, fold: Tensor, scatter: Tensor, batch: int, seq: int, batch_dim: int, seq_dim: int
) -> Tensor:
    node = scatter.clamp(min=0)
    stands_for_node = (fold.index_select(0, node) == torch.arange(scatter.shape[0], device=fold.device)) & (
        scatter >= 0
    )
    return _looked_up(compact, node, stands_for_node, batch, seq, batch_dim, seq_dim)


def scatter_rows(
    compact: Tensor,
    scatter: Tensor,
    fold: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    pieces: Tensor | None,
    batch: int,
    seq: int,
    batch_dim: int,
    seq_dim: int,
    holes: bool,
) -> Tensor:
    if holes:
        return _looked_up(compact, scatter.clamp(min=0), scatter >= 0, batch, seq, batch_dim, seq_dim)
    return _looked_up(compact, scatter, None, batch, seq, batch_dim, seq_dim)


def _looked_up(
    compact: Tensor, node: Tensor, keep: Tensor | None, batch: int, seq: int, batch_dim: int, seq_dim: int
) -> Tensor:
    full = _rows_of(compact, batch_dim, seq_dim).index_select(0, node)
    if keep is not None:
        full = full.masked_fill(~keep.view(-1, *[1] * (full.ndim - 1)), 0)
    # view, not unflatten: the latter asks whether B * S is right and so pins their product.
    return full.view(batch, seq, *full.shape[1:]).movedim((0, 1), (batch_dim, seq_dim))


def sum_rows(
    full: Tensor,
    scatter: Tensor,
    fold: Tensor,
    rows: Tensor,
    starts: Tensor,
    pieces: Tensor,
    batch_dim: int,
    seq_dim: int,
) -> Tensor:
    if full.is_complex():  # a bag has none
        sums = sum_rows(torch.view_as_real(full), scatter, fold, rows, starts, pieces, batch_dim, seq_dim)
        return torch.view_as_complex(sums)
    flat = _rows_of(full, batch_dim, seq_dim)
    features = flat.shape[1:]
    table = flat.reshape(flat.shape[0], math.prod(features))
    # A bag of rows for each node: added up in the order of `rows`, in float32 for the half-width dtypes.
    listed = rows[: int(starts[-1])]
    sums = F.embedding_bag(listed, table, starts, mode="sum", include_last_offset=True)
    return sums.view(1, starts.shape[0] - 1, *features).movedim((0, 1), (batch_dim, seq_dim))


def gather_columns(table: Tensor, fold: Tensor, scatter: Tensor, batch: int, seq: int, dim: int) -> Tensor:
    """``table`` ``[..., S, ...]`` (``S`` at ``dim``), the entry for the column of each node: ``[..., T', ...]``."""
    return table.movedim(dim, 0).index_select(0, fold % seq).movedim(0, dim)


def foreach_scatter_rows(
    compact: Sequence[Tensor],
    scatter: Tensor,
    fold: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    pieces: Tensor | None,
    batch: int,
    seq: int,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
    holes: bool,
) -> list[Tensor]:
    axes = zip(batch_dims, seq_dims, strict=True)
    return [
        scatter_rows(one, scatter, fold, rows, starts, pieces, batch, seq, *at, holes)
        for one, at in zip(compact, axes, strict=True)
    ]


def foreach_sum_rows(
    full: Sequence[Tensor],
    scatter: Tensor,
    fold: Tensor,
    rows: Tensor,
    starts: Tensor,
    pieces: Tensor,
    batch_dims: Sequence[int],
    seq_dims: Sequence[int],
) -> list[Tensor]:
    axes = zip(batch_dims, seq_dims, strict=True)
    return [sum_rows(one, scatter, fold, rows, starts, pieces, *at) for one, at in zip(full, axes, strict=True)]
