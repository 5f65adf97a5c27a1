"""Attention on the prefix tree in torch: each tile of the plan is one ordinary attention. This runs on CPUs.

``plan.torch_tiles`` lists the keys of each tile, and a mask hides the keys that are no ancestors of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, bias_places, dense, heads_inside
from radix_compile.plan.torch_tiles import NO_WINDOW, with_small_masks

aten = torch.ops.aten


class Tile(NamedTuple):
    """The queries are the nodes from ``start`` to ``stop``, the keys ``nodes``.

    ``mask`` ``[m, L]``, 0 or minus infinity, is None if the queries are the keys and attention is plainly causal.
    ``fully_masked`` ``[m]`` are the queries that see no key; None if each of them sees one.
    """

    start: int
    stop: int
    nodes: Tensor
    mask: Tensor | None
    fully_masked: Tensor | None


def tiles(plan: TreeArrays, window: int | None, causal: bool) -> Iterator[Tile]:
    """The tiles of a plan. With ``causal``, a tile that is plainly causal has no mask."""
    windows, window_starts, listed, keys, masks = plan.given(
        "windows", "window_starts", "tiles", "tile_keys", "tile_masks"
    )
    place = windows.tolist().index(NO_WINDOW if window is None else window)
    first, last = window_starts[place : place + 2].tolist()
    for start, stop, first_key, last_key, first_pair, fully_masked in listed[first:last].tolist():
        if first_key < last_key:
            nodes = keys[first_key:last_key]
            mask = masks[first_pair : first_pair + (stop - start) * len(nodes)].view(-1, len(nodes))
            yield Tile(start, stop, nodes, mask, mask.amax(1) == float("-inf") if fully_masked else None)
        elif causal:
            yield Tile(start, stop, torch.arange(start, stop, device=keys.device), None, None)
        else:
            yield from _with_masks(start, stop, keys.device)


def _with_masks(start: int, stop: int, device: torch.device) -> Iterator[Tile]:
    """A tile that is plainly causal, in parts that have masks."""
    for first, last in with_small_masks(start, stop):
        nodes = torch.arange(start, last, device=device)
        hidden = nodes > nodes[first - start :, None]
        yield Tile(first, last, nodes, torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf), None)


def _rows(tensor: Tensor) -> Tensor:
    """``[T', H * E]`` from ``[1, H, T', E]``: rows that can be moved whole."""
    return tensor[0].transpose(0, 1).flatten(1).contiguous()


def _keys(rows: Tensor, tile: Tile, heads: int) -> Tensor:
    """The tile's keys, ``[1, H, L, E]``."""
    own = rows[tile.start : tile.stop] if tile.mask is None else rows.index_select(0, tile.nodes)
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
    for tile in tiles(plan, window, _may_be_causal(fused, score_options)):
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
    mask = tile.mask
    if mask is None or bias is None:
        return mask, tile.fully_masked
    queries = torch.arange(tile.start, tile.stop, device=mask.device)
    more = bias_places(plan, bias.shape[3]).of(bias, queries, tile.nodes)
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


def _about(mask: Tensor | None, dtype: torch.dtype, scale: float) -> dict[str, Any]:
    """The options of torch's attention of queries of this dtype, and of its gradient."""
    if mask is not None:  # with float64 queries, torch reads a mask of float32 as float64 (2.13)
        mask = mask.to(torch.promote_types(dtype, torch.float32))[(None,) * (4 - mask.ndim)]
    return {"is_causal": mask is None, "attn_mask": mask, "scale": scale}


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    found: tuple[Tensor, Tensor] = op(q, k, v, **_about(mask, q.dtype, scale))
    return found


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """``[1, H, m, E]`` as ``[1, groups, H / groups * m, E]``: heads that share keys are queries of one head."""
    return tensor.reshape(1, groups, -1, tensor.shape[3])


def _spelled(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    heads, exact = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    scores, _ = _scores(_grouped(q, k.shape[1]).to(exact), k.to(exact), mask, scale, softcap)
    attended = _softmax(scores, None) @ v.to(exact)
    return attended.reshape(1, heads, -1, v.shape[3]), scores.logsumexp(-1).reshape(1, heads, -1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights of keys, given a further score that broadcasts to scores; zero in rows that are fully masked.

    Each row starts from its largest score. Log-sum-exp has no digits left for the sum where scores are large.
    """
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    largest = largest.clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - largest).exp_()
    sums = weights.sum(-1, keepdim=True)
    if sinks is not None:
        sums = sums + (sinks - largest).exp()
    return weights / sums.masked_fill(sums == 0, 1)


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
    sinks, bias, scale, window, softcap = score_options
    fused = _can_fuse(query, value, score_options) and not _are_large(total)
    keys, values = _rows(key), _rows(value)
    for tile in tiles(plan, window, _may_be_causal(fused, score_options)):
        own = slice(tile.start, tile.stop)
        g, q, attended = (one[:, :, own].to(exact) for one in (grad, query, result))
        k, v = (_keys(one, tile, groups).to(exact) for one in (keys, values))
        mask, summed = _mask(tile, bias, plan, exact)[0], total[None, :, own]
        if fused:
            found = _fused_backward(g, q, k, v, attended, summed, mask, scale)
        else:
            found = _spelled_backward(g, q, k, v, sinks, mask, scale, softcap)
        by_query[:, :, own] = found[0]
        for sums, more in zip((by_key, by_value), found[1:], strict=True):
            if mask is None:  # then the keys are the queries
                sums[:, :, own] += more
            else:
                sums.index_add_(2, tile.nodes, more)
    return by_query, by_key.to(key.dtype), by_value.to(value.dtype)


LARGE = 1000.0
"""Log-sum-exp of this size has an error of 1e-4 in float32, and so have all weights that are computed from it."""


def _are_large(total: Tensor) -> bool:
    """Has a row log-sum-exp so large that weights lose digits? It is infinite in rows that are fully masked."""
    return bool(((total.abs() > LARGE) & total.isfinite()).any())


def _fused_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, total: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    found: tuple[Tensor, Tensor, Tensor] = op(g, q, k, v, result, total, dropout_p=0.0, **_about(mask, q.dtype, scale))
    return found


def _spelled_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, shape = k.shape[1], q.shape
    if sinks is not None:
        sinks = _grouped(sinks.to(q.dtype)[None, :, None, None].expand(*shape[:3], 1), groups)
    q, g = (_grouped(one, groups) for one in (q, g))
    scores, capped = _scores(q, k, mask, scale, softcap)
    weights = _softmax(scores, sinks)
    by_value = weights.mT @ g
    by_weights = g @ v.mT
    # As softmax has it, and not from the results: nothing is left of the gradient of a single key.
    by_weights -= (weights * by_weights).sum(-1, keepdim=True)
    by_scores = weights.mul_(by_weights).mul_(scale)
    if capped is not None:
        by_scores *= 1 - capped * capped
    return (by_scores @ k).reshape(shape), by_scores.mT @ q, by_value
