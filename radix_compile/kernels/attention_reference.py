"""Attention on the prefix tree in plain torch, over all pairs of nodes: what the lowerings are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, bias_places


def visible_pairs(plan: TreeArrays, window: int | None = None) -> Tensor:
    """Bool ``[T', T']``: is node ``j`` a key of node ``i``, that is, ``i`` itself or an ancestor, and near enough?"""
    i, j = torch.meshgrid(*[torch.arange(len(plan.fold), device=plan.fold.device)] * 2, indexing="ij")
    visible = (j <= i) & (i < plan.end)
    if window is None:
        return visible
    depth = plan.fold - plan.begin
    return visible & (depth[:, None] - depth < window)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreeArrays,
    score_options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    """The arguments and results of ``tree_attention``, in float32 at least."""
    exact = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    q, k, v = (one[0].to(exact) for one in (query, key, value))
    scores = q @ k.repeat_interleave(group, 0).mT * score_options.scale
    if score_options.softcap is not None:
        scores = score_options.softcap * torch.tanh(scores / score_options.softcap)
    if score_options.bias is not None:
        everyone = torch.arange(len(plan.fold), device=plan.fold.device)
        bias = bias_places(plan, score_options.bias.shape[3]).of(score_options.bias, everyone, everyone)
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    scores = scores.masked_fill(~visible_pairs(plan, score_options.window), float("-inf"))
    if score_options.sinks is not None:
        own = score_options.sinks.to(exact)[:, None, None].expand(-1, scores.shape[1], 1)
        total = torch.cat([scores, own], -1).logsumexp(-1)
    else:
        total = scores.logsumexp(-1)
    total = total.masked_fill(total == float("-inf"), float("inf"))  # a node without a key is zero
    largest = scores.amax(-1, keepdim=True)
    if score_options.sinks is not None:
        largest = torch.maximum(largest, own)
    largest = largest.clamp(min=torch.finfo(exact).min)
    weights = (scores - largest).exp()  # and not from log-sum-exp, which has too few digits for large scores
    sums = weights.sum(-1, keepdim=True)
    if score_options.sinks is not None:
        sums = sums + (own - largest).exp()
    weights = weights / sums.masked_fill(sums == 0, 1)
    result = weights @ v.repeat_interleave(group, 0)
    return result.to(query.dtype)[None], total
