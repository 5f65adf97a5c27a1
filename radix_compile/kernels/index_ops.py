"""The index ops that the rewrite inserts: rows to nodes, nodes to rows, columns to nodes.

They are registered as ``radix::`` ops so that a rewritten graph says what it does, and implemented in torch as
``CompositeImplicitAutograd``: whatever traces them sees ``index_select`` and views, differentiates those, and may fuse
the gather with its neighbours. Importing this module registers the ops.

``batch_dim`` and ``seq_dim`` are the token axes of the full tensor (``B`` sequences, ``S`` columns). In compact form
the batch axis has size one and the sequence axis has one entry for each node (``T'``).
"""

from __future__ import annotations

import torch

_library = torch.library.Library("radix", "DEF")
_library.define("fold_rows(Tensor full, Tensor fold, int batch_dim, int seq_dim) -> Tensor")
_library.define(
    "scatter_rows(Tensor compact, Tensor scatter, SymInt batch, SymInt seq, int batch_dim, int seq_dim,"
    " bool holes=False) -> Tensor"
)
_library.define("gather_columns(Tensor table, Tensor fold, SymInt seq, int dim) -> Tensor")


def fold_rows(full: torch.Tensor, fold: torch.Tensor, batch_dim: int, seq_dim: int) -> torch.Tensor:
    """One row for each node.

    ``full`` ``[..., B, ..., S, ...]``, any dtype; ``fold`` ``[T']``, integer, each entry ``b * S + s``.
    Returns ``[..., 1, ..., T', ...]``.
    """
    rows = full.movedim((batch_dim, seq_dim), (0, 1)).flatten(0, 1)
    return rows.index_select(0, fold).unsqueeze(0).movedim((0, 1), (batch_dim, seq_dim))


def scatter_rows(
    compact: torch.Tensor,
    scatter: torch.Tensor,
    batch: int,
    seq: int,
    batch_dim: int,
    seq_dim: int,
    holes: bool = False,
) -> torch.Tensor:
    """The node of each row.

    ``compact`` ``[..., 1, ..., T', ...]``, any dtype; ``scatter`` ``[B * S]``, integer, each entry a node. With
    ``holes`` an entry of -1 is a row that was left out, and comes back as zeros.
    Returns ``[..., B, ..., S, ...]``.
    """
    nodes = compact.movedim((batch_dim, seq_dim), (0, 1)).flatten(0, 1)
    if holes:
        rows = nodes.index_select(0, scatter.clamp(min=0))
        left_out = (scatter < 0).view(-1, *[1] * (rows.ndim - 1))
        rows = rows.masked_fill(left_out, 0)
    else:
        rows = nodes.index_select(0, scatter)
    # view, not unflatten: the latter asks whether B * S is right and so pins their product.
    return rows.view(batch, seq, *rows.shape[1:]).movedim((0, 1), (batch_dim, seq_dim))


def gather_columns(table: torch.Tensor, fold: torch.Tensor, seq: int, dim: int) -> torch.Tensor:
    """The entry for each node's column, of a table ``[..., S, ...]`` with one entry for each column (at ``dim``)."""
    return table.index_select(dim, fold % seq)


for _op in (fold_rows, scatter_rows, gather_columns):
    _library.impl(_op.__name__, _op, "CompositeImplicitAutograd")
