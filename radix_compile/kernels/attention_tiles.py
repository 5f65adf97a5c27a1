"""Attention on the prefix tree by tiles of nodes, in torch: each tile is one ordinary attention. This runs on CPUs.

The keys of a tile are those of its first node and the tile itself (``tree_attention`` says why), and a mask hides what
is no ancestor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, bias_places, dense, heads_inside

aten = torch.ops.aten

MIN_TILE_NODES = 64
"""Rows of a tile, about, or a quarter of the keys in front of it if that is more. What it hides of itself is waste."""


class Tile(NamedTuple):
    """Queries from ``start`` to ``stop``; the keys are ``nodes``. ``mask`` ``[m, L]``, 0 or minus infinity, is None if
    the tile is plainly causal. ``fully_masked`` are the queries that see no key, if there are any.
    """

    start: int
    stop: int
    nodes: Tensor
    mask: Tensor | None
    fully_masked: Tensor | None


def stretches(plan: TreeArrays, causal: bool) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end. With ``causal``, one may be of any length if it has nothing in front of it."""
    rows, begin = plan.fold.numpy(), plan.begin.numpy()
    depth = rows - begin
    same = (rows[1:] == rows[:-1] + 1) & (begin[1:] == begin[:-1])  # the next row of the same sequence
    bounds = [0, *(np.flatnonzero(~same) + 1).tolist(), len(rows)]
    start = 0
    for first, stop in pairwise(bounds):
        limit = max(MIN_TILE_NODES, int(depth[start]) // 4)
        if first > start and (stop - start > limit or depth[first] + MIN_TILE_NODES < depth[start]):
            yield start, first
            start = first
            limit = max(MIN_TILE_NODES, int(depth[start]) // 4)
        if stop - start > limit:  # then it is one sequence
            parts = 1 if causal and depth[start] == 0 else (stop - start) // limit
            edges = np.linspace(start, stop, parts + 1).astype(int).tolist()
            yield from pairwise(edges)
            start = stop
    if start < len(rows):
        yield start, len(rows)


def tiles(plan: TreeArrays, window: int | None, causal: bool, dtype: torch.dtype) -> Iterator[Tile]:
    """The tiles of a plan on the host. With ``causal``, one that is plainly so has no mask."""
    causal = causal and window is None
    depth = plan.fold - plan.begin
    for start, stop in stretches(plan, causal):
        own = torch.arange(start, stop)
        path = plan.scatter[plan.begin[start] : plan.fold[start]]
        if causal and not len(path) and bool((plan.end[start:stop] >= stop).all()):
            yield Tile(start, stop, own, None, None)
            continue
        path = path[(path >= 0) & (path < start)]
        nodes = torch.cat([path, own])
        hidden = own[:, None] >= plan.end[nodes]
        hidden[:, len(path) :] |= own > own[:, None]  # those on the path are all in front
        if window is not None:
            hidden |= depth[own, None] - depth[nodes] >= window
            seen = ~hidden.all(0)
            seen[-1] = True  # a tile outside of the tree sees none, and attention of no keys has no shape
            nodes, hidden = nodes[seen], hidden[:, seen]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        fully_masked = hidden.all(1)
        yield Tile(start, stop, nodes, mask, fully_masked if fully_masked.any() else None)


Listed = dict[tuple[int | None, bool, torch.dtype], list[Tile]]

_latest: tuple[tuple[weakref.ref[Tensor], ...], Listed] = ((), {})
"""The plan that was asked for last, and its tiles: layers ask for the same ones, one after the other."""


def _tiles(plan: TreeArrays, window: int | None, causal: bool, dtype: torch.dtype) -> list[Tile]:
    """The tiles of a plan, kept while it is the latest. Another thread may replace them, and never changes them."""
    global _latest
    arrays, (known, found) = plan[:4], _latest
    if len(known) != len(arrays) or any(ref() is not one for ref, one in zip(known, arrays, strict=True)):
        found = {}
        _latest = tuple(map(weakref.ref, arrays)), found
    about = window, causal, dtype
    if about not in found:
        on_host = TreeArrays(*(one.cpu() for one in arrays))
        found[about] = list(tiles(on_host, window, causal, dtype))
    return found[about]


def _rows(tensor: Tensor) -> Tensor:
    """``[T', H * E]`` from ``[1, H, T', E]``: rows that can be moved whole."""
    return tensor[0].transpose(0, 1).flatten(1).contiguous()


def _keys(rows: Tensor, tile: Tile, heads: int) -> Tensor:
    """The tile's keys, ``[1, H, L, E]``."""
    own = rows[tile.start : tile.stop] if tile.mask is None else rows.index_select(0, tile.nodes.to(rows.device))
    return own.view(len(own), heads, -1).transpose(0, 1)[None]


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: TreeArrays, score_options: ScoreOptions
) -> tuple[Tensor, Tensor]:
    """The op ``tree_attention``."""
    (_, heads, count, _), groups, exact = query.shape, key.shape[1], torch.promote_types(query.dtype, torch.float32)
    sinks, bias, scale, window, softcap = score_options
    query = dense(query)  # torch's op would read others wrong; keys and values are moved anyway
    result = heads_inside(query, value.shape[3])
    total = query.new_empty((heads, count), dtype=exact)
    fused = _can_fuse(query, value, score_options)
    keys, values = _rows(key), _rows(value)
    for tile in _tiles(plan, window, _may_be_causal(fused, score_options), query.dtype if fused else exact):
        q, k, v = query[:, :, tile.start : tile.stop], _keys(keys, tile, groups), _keys(values, tile, groups)
        mask, fully_masked = _mask(tile, bias, plan, exact)
        attended, summed = _fused(q, k, v, mask, scale) if fused else _spelled(q, k, v, mask, scale, softcap)
        result[:, :, tile.start : tile.stop] = attended
        total[:, tile.start : tile.stop] = summed[0]
        if fully_masked is not None:
            result[:, :, tile.start : tile.stop].masked_fill_(fully_masked[..., None], 0)
            total[:, tile.start : tile.stop].masked_fill_(fully_masked, float("inf"))
    if sinks is not None:
        own = sinks.to(exact)[:, None]
        with_sinks = torch.where(total == float("inf"), own, torch.logaddexp(total, own))
        result *= (total.clamp(max=torch.finfo(exact).max) - with_sinks).exp().clamp(max=1)[None, ..., None]
        total = with_sinks
    return result, total


def _mask(tile: Tile, bias: Tensor | None, plan: TreeArrays, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The numbers added to the scores of a tile, ``[m, L]`` or ``[H or 1, m, L]``, and which queries see no key."""
    mask, fully_masked, device = tile.mask, tile.fully_masked, plan.fold.device
    if mask is None:
        return None, None
    mask = mask.to(device)
    if bias is None:
        return mask, fully_masked if fully_masked is None else fully_masked.to(device)
    nodes = tile.nodes.to(device)
    more = bias_places(plan, bias.shape[3]).of(bias, torch.arange(tile.start, tile.stop, device=device), nodes)
    if more.dtype == torch.bool:
        more = torch.zeros_like(more, dtype=dtype).masked_fill_(~more, float("-inf"))
    # Not added: what a key that is hidden finds may be anything, infinite too.
    mask = more.to(dtype).masked_fill(mask == float("-inf"), float("-inf"))
    return mask, mask.amax(-1) == float("-inf")


def _can_fuse(query: Tensor, value: Tensor, score_options: ScoreOptions) -> bool:
    """Is there an op of torch for a tile's attention?"""
    return score_options.softcap is None and query.shape[3] == value.shape[3] and query.device.type == "cpu"


def _may_be_causal(fused: bool, score_options: ScoreOptions) -> bool:
    """May tiles go without a mask? Else torch multiplies what it has hidden: NaN (2.13)."""
    return fused and score_options.bias is None and score_options.scale > 0


def _about(mask: Tensor | None, scale: float) -> dict[str, Any]:
    """The options of torch's attention, and of its gradient."""
    with_batch_and_head = None if mask is None else mask[(None,) * (4 - mask.ndim)]
    return {"is_causal": mask is None, "attn_mask": with_batch_and_head, "scale": scale}


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    found: tuple[Tensor, Tensor] = op(q, k, v, **_about(mask, scale))
    return found


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """``[1, H, m, E]`` as ``[1, groups, H / groups * m, E]``: heads that share keys are queries of one head."""
    return tensor.reshape(1, groups, -1, tensor.shape[3])


def _spelled(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    heads, exact = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    scores, _ = _scores(_grouped(q, k.shape[1]).to(exact), k.to(exact), mask, scale, softcap)
    total = scores.logsumexp(-1)
    attended = (scores - total[..., None]).exp_() @ v.to(exact)
    return attended.reshape(1, heads, -1, v.shape[3]), total.reshape(1, heads, -1)


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """The scores, hidden ones minus infinity, and what a soft cap has made of them, from -1 to 1."""
    assert mask is not None
    scores, capped = q @ k.mT * scale, None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores = capped * softcap
    groups, members = scores.shape[1], scores.shape[2] // mask.shape[-2]
    if mask.ndim > 2 and len(mask) > 1:
        mask = mask.unflatten(0, (groups, members))
    scores = scores.unflatten(2, (members, -1)) + mask
    return scores.flatten(2, 3), capped


def tree_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    total: Tensor,
    plan: TreeArrays,
    score_options: ScoreOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``tree_attention_backward``. Adds up in float32 at least."""
    exact, groups = total.dtype, key.shape[1]
    grad, query, result = map(dense, (grad, query, result))
    by_query = heads_inside(query)
    by_key, by_value = (heads_inside(one, dtype=exact).zero_() for one in (key, value))
    _, bias, scale, window, softcap = score_options
    fused = _can_fuse(query, value, score_options)
    keys, values = _rows(key), _rows(value)
    for tile in _tiles(plan, window, _may_be_causal(fused, score_options), exact):
        own = slice(tile.start, tile.stop)
        g, q, attended = (one[:, :, own].to(exact) for one in (grad, query, result))
        k, v = (_keys(one, tile, groups).to(exact) for one in (keys, values))
        mask, summed = _mask(tile, bias, plan, exact)[0], total[None, :, own]
        if fused:
            found = _fused_backward(g, q, k, v, attended, summed, mask, scale)
        else:
            found = _spelled_backward(g, q, k, v, summed, mask, scale, softcap)
        by_query[:, :, own] = found[0]
        for sums, more in zip((by_key, by_value), found[1:], strict=True):
            if mask is None:  # then the keys are the queries
                sums[:, :, own] += more
            else:
                sums.index_add_(2, tile.nodes.to(query.device), more)
    return by_query, by_key.to(key.dtype), by_value.to(value.dtype)


def _fused_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, total: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    found: tuple[Tensor, Tensor, Tensor] = op(g, q, k, v, result, total, dropout_p=0.0, **_about(mask, scale))
    return found


def _spelled_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, shape = k.shape[1], q.shape
    q, g, total = (_grouped(one, groups) for one in (q, g, total[..., None]))
    scores, capped = _scores(q, k, mask, scale, softcap)
    weights = (scores - total).exp_()
    by_value = weights.mT @ g
    by_weights = g @ v.mT
    # As softmax has it, and not from the results: nothing is left of the gradient of a single key.
    by_weights -= (weights * by_weights).sum(-1, keepdim=True)
    by_scores = weights.mul_(by_weights).mul_(scale)
    if capped is not None:
        by_scores *= 1 - capped * capped
    return (by_scores @ k).reshape(shape), by_scores.mT @ q, by_value
