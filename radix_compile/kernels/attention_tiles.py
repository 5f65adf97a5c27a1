"""Attention on the prefix tree by tiles of nodes, in torch: each tile is one ordinary attention. This runs on CPUs.

The keys of a tile are those of its first node and the tile itself (``tree_attention`` says why), and a mask hides what
is no ancestor. The heads that share keys are queries of one head here, so that keys are not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radix_compile.kernels.tree_arguments import Carried, TreeArrays

aten = torch.ops.aten

LEAST = 64
"""Rows of a tile: that many at most, or a quarter of the keys in front of it. What a tile hides of itself is waste."""


class Tile(NamedTuple):
    """Queries from ``start`` to ``stop``; the keys are ``nodes``. ``visible`` ``[m, L]`` is None if plainly causal."""

    start: int
    stop: int
    nodes: Tensor
    visible: Tensor | None


def stretches(plan: TreeArrays, causal: bool) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end. With ``causal``, one may be of any length if it has nothing in front of it."""
    rows, begin = plan.fold.numpy(), plan.begin.numpy()
    depth = rows - begin
    same = (rows[1:] == rows[:-1] + 1) & (begin[1:] == begin[:-1])  # the next row of the same sequence
    bounds = [0, *(np.flatnonzero(~same) + 1).tolist(), len(rows)]
    start, limit = 0, LEAST
    for first, stop in pairwise(bounds):
        if first > start and (stop - start > limit or depth[first] + LEAST < depth[start]):
            yield start, first
            start = first
        if first == start:
            limit = max(LEAST, int(depth[start]) // 4)
            if causal and depth[start] == 0 and stop - start > limit:
                yield start, stop
                start = stop
        while stop - start > limit:
            yield start, start + limit
            start += limit
            limit = max(LEAST, int(depth[start]) // 4)
    if start < len(rows):
        yield start, len(rows)


def tiles(plan: TreeArrays, window: int | None, causal: bool) -> Iterator[Tile]:
    """The tiles of a plan. With ``causal``, one that is plainly so has no mask."""
    causal = causal and window is None
    for start, stop in stretches(plan, causal):
        own = torch.arange(start, stop)
        path = plan.scatter[plan.begin[start] : plan.fold[start]]
        if causal and not len(path) and bool((plan.end[start:stop] >= stop).all()):
            yield Tile(start, stop, own, None)
            continue
        path = path[(path >= 0) & (path < start)]
        nodes = torch.cat([path, own])
        visible = (nodes <= own[:, None]) & (own[:, None] < plan.end[nodes])
        if window is not None:
            depth = plan.fold - plan.begin
            visible &= depth[own, None] - depth[nodes] < window
            seen = visible.any(0)
            nodes, visible = nodes[seen], visible[:, seen]
        yield Tile(start, stop, nodes, visible)


def _keys(tensor: Tensor, tile: Tile) -> Tensor:
    """``[1, Hkv, T', E]``, the tile's keys of it, ``[1, Hkv, L, E]``."""
    if tile.visible is None:
        return tensor[:, :, tile.start : tile.stop]
    return tensor.index_select(2, tile.nodes)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreeArrays,
    carried: Carried,
) -> tuple[Tensor, Tensor]:
    """The op ``tree_attention``."""
    (_, heads, count, _), groups, exact = query.shape, key.shape[1], torch.promote_types(query.dtype, torch.float32)
    result = query.new_empty((1, count, heads, value.shape[3])).transpose(1, 2)
    total = query.new_empty((heads, count), dtype=exact)
    sinks, scale, window, softcap = carried
    fused = softcap is None and query.shape[3] == value.shape[3] and query.device.type == "cpu"
    on_host = TreeArrays(*(one.cpu() for one in plan[:4]))
    for tile in tiles(on_host, window, causal=fused):
        q = query[:, :, tile.start : tile.stop]
        if tile.visible is not None:
            q = q.reshape(1, groups, -1, q.shape[3])  # the heads that share keys, one after the other
        arguments = q, _keys(key, tile), _keys(value, tile), tile.visible, scale
        attended, summed = _fused(*arguments) if fused else _spelled(*arguments, softcap)
        result[:, :, tile.start : tile.stop] = attended.reshape(1, heads, -1, attended.shape[3])
        total[:, tile.start : tile.stop] = summed.reshape(heads, -1)
    if sinks is not None:
        own = sinks.to(exact)[:, None]
        with_sinks = torch.where(total == float("inf"), own, torch.logaddexp(total, own))
        result *= (total.clamp(max=torch.finfo(exact).max) - with_sinks).exp().clamp(max=1)[None, ..., None]
        total = with_sinks
    return result, total


def _mask(visible: Tensor, q: Tensor) -> Tensor:
    """What to add to the scores of a tile's queries, ``[G * m, L]``."""
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible.to(q.device), float("-inf"))
    return mask.repeat(q.shape[2] // len(visible), 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    fused = aten._scaled_dot_product_flash_attention_for_cpu.default
    if visible is None:
        return fused(q, k, v, is_causal=True, scale=scale)  # type: ignore[no-any-return]
    result, total = fused(q, k, v, attn_mask=_mask(visible, q), scale=scale)
    blind = ~visible.any(1)
    if blind.any():
        blind = blind.repeat(q.shape[2] // len(visible))
        total, result = total.masked_fill(blind, float("inf")), result.masked_fill(blind[:, None], 0)
    return result, total


def _spelled(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    assert visible is not None
    exact = torch.promote_types(q.dtype, torch.float32)
    scores, _ = _scores(q.to(exact), k.to(exact), visible, scale, softcap)
    total = scores.logsumexp(-1)
    total = total.masked_fill_(total == float("-inf"), float("inf"))
    return (scores - total[..., None]).exp_() @ v.to(exact), total


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The scores, hidden ones minus infinity, and what a soft cap has made of them, from -1 to 1."""
    scores, capped = q @ k.mT * scale, None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores = capped * softcap
    return scores.add_(_mask(visible, scores)) if capped is None else scores + _mask(visible, scores), capped


def tree_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    total: Tensor,
    plan: TreeArrays,
    carried: Carried,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``tree_attention_backward``. Adds up in float32 at least."""
    exact, (heads, groups) = total.dtype, (query.shape[1], key.shape[1])
    by_query = torch.empty_like(query)
    by_key, by_value = (torch.zeros(one.shape, dtype=exact, device=one.device) for one in (key, value))
    delta = (grad * result).sum(-1, keepdim=True, dtype=exact)
    _, scale, window, softcap = carried
    on_host = TreeArrays(*(one.cpu() for one in plan[:4]))
    for tile in tiles(on_host, window, causal=False):
        assert tile.visible is not None

        def of_queries(one: Tensor, tile: Tile = tile) -> Tensor:
            part = one[:, :, tile.start : tile.stop]
            return part.reshape(1, groups, -1, part.shape[3]).to(exact)

        q, g, d, summed = (of_queries(one) for one in (query, grad, delta, total[None, ..., None]))
        k, v = (_keys(one, tile).to(exact) for one in (key, value))
        nodes = tile.nodes.to(query.device)
        scores, capped = _scores(q, k, tile.visible, scale, softcap)
        weights = (scores - summed).exp_()
        by_value.index_add_(2, nodes, weights.mT @ g)
        by_scores = weights.mul_(g @ v.mT - d).mul_(scale)
        if capped is not None:
            by_scores *= 1 - capped * capped
        by_key.index_add_(2, nodes, by_scores.mT @ q)
        by_query[:, :, tile.start : tile.stop] = (by_scores @ k).reshape(1, heads, -1, k.shape[3])
    return by_query, by_key.to(key.dtype), by_value.to(value.dtype)
