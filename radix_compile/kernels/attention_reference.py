"""Attention on the prefix tree in plain torch, over all pairs of nodes: what the lowerings are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_pairs(fold: Tensor, begin: Tensor, end: Tensor, window: int | None = None) -> Tensor:
    """Bool ``[T', T']``: is node ``j`` a key of node ``i``, that is, ``i`` itself or an ancestor, and near enough?"""
    i, j = torch.meshgrid(*[torch.arange(len(fold), device=fold.device)] * 2, indexing="ij")
    visible = (j <= i) & (i < end)
    if window is None:
        return visible
    depth = fold - begin
    return visible & (depth[:, None] - depth < window)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fold: Tensor,
    scatter: Tensor,
    begin: Tensor,
    end: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The arguments and results of ``tree_attention``, in float32 at least."""
    exact = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    q, k, v = (one[0].to(exact) for one in (query, key, value))
    scores = q @ k.repeat_interleave(group, 0).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible_pairs(fold, begin, end, window), float("-inf"))
    if sinks is not None:
        own = sinks.to(exact)[:, None, None].expand(-1, scores.shape[1], 1)
        total = torch.cat([scores, own], -1).logsumexp(-1)
    else:
        total = scores.logsumexp(-1)
    total = total.masked_fill(total == float("-inf"), float("inf"))  # a node without a key is zero
    weights = (scores - total[..., None]).exp()
    result = weights @ v.repeat_interleave(group, 0)
    return result.to(query.dtype)[None], total
