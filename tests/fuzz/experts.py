"""Mixtures of experts: rows sorted by expert, weights looked up, all experts at once, and routers that mix rows."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401 - importing it registers the ops

from tests.fuzz.draw import Draw, Kind, activated, piece

HAS_TRACEABLE_BACKWARD = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")
"""Can the backward pass of the grouped product be traced on a CPU? Older versions of transformers lack this op."""


@piece(Kind.POSITION_WISE)
def table_of_experts(d: Draw) -> str:
    """A router that gathers the weights of each row's experts."""
    experts = d.number(2, 4)
    return "\n".join(
        [
            f"share, chosen = F.linear(x, w({experts}, D)).softmax(-1).topk({d.number(1, 2)}, -1)",
            f"y = (x[:, :, None, None, :] @ w({experts}, D, D)[chosen]).squeeze(3)",
            "y = (y * share[..., None]).sum(2)",
        ]
    )


def _router(d: Draw, experts: int, slots: int) -> list[str]:
    return [
        "rows = x.reshape(B * S, D)",
        f"share, chosen = F.linear(rows, w({experts}, D)).softmax(-1).topk({slots}, -1)",
        "expert, order = chosen.reshape(-1).sort()",
        f"rows = rows[order // {slots}]",
    ]


def _product_by_expert(d: Draw, experts: int) -> str:
    grouped = (
        f"ends = torch.histc(expert.float(), {experts}, 0, {experts - 1}).cumsum(0, dtype=torch.int32)\n"
        f"rows = torch.ops.transformers.grouped_mm_fallback(rows, w({experts}, D, D), ends)"
    )
    each = "rows = " + activated(d, "rows @ w(D, D)")
    drawn = d.one_of(grouped, grouped, each)
    return drawn if HAS_TRACEABLE_BACKWARD else each


def _restored_order(d: Draw, slots: int) -> list[str]:
    inverse = d.one_of(
        "place = order.argsort()",
        f"place = torch.empty_like(order).index_put((order,), torch.arange(B * S * {slots}))",
        f"place = torch.empty_like(order)\nplace[order] = torch.arange(B * S * {slots})",
    )
    return [
        inverse,
        f"y = (rows[place].reshape(B * S, {slots}, D) * share[..., None]).sum(1).reshape(B, S, D)",
    ]


@piece(Kind.POSITION_WISE)
def sorted_experts(d: Draw) -> str:
    """A router that sorts rows by expert, and restores their order."""
    experts, slots = d.number(2, 4), d.number(1, 2)
    return "\n".join([*_router(d, experts, slots), _product_by_expert(d, experts), *_restored_order(d, slots)])


@piece(Kind.POSITION_WISE)
def all_experts(d: Draw) -> str:
    """Every expert computes every row. Most of the router's weights are zero."""
    experts, slots = d.number(2, 4), d.number(1, 2)
    lines = [f"share, chosen = F.linear(x, w({experts}, D)).softmax(-1).topk({slots}, -1)"]
    dense = f"share = torch.zeros(B, S, {experts}).scatter(-1, chosen, share)"
    alone = f"share = (F.one_hot(chosen, {experts}) * share[..., None]).sum(2)"
    lines.append(d.one_of(dense, alone))
    each = f"torch.einsum('bsd,ned->bsne', x, w({experts}, D, D))"
    hit = "share[..., i : i + 1] * F.linear(x, t[i])\n"
    ways = [
        f"y = ({activated(d, each)} * share[..., None]).sum(2)",
        f"y = torch.einsum('bsne,bsn->bse', {each}, share)",
        f"y = (torch.stack([F.linear(x, t) for t in w({experts}, D, D)], 2) * share[..., None]).sum(2)",
        f"t = w({experts}, D, D)\ny = torch.zeros_like(x)\nfor i in range({experts}):\n    y = y + {hit}",
        f"t = w({experts}, D, D)\nrows = x.reshape(1, B * S, D).expand({experts}, B * S, D)\n"
        f"y = (torch.bmm(rows, t) * share.reshape(B * S, {experts}).T[..., None]).sum(0).view(B, S, D)",
    ]
    return "\n".join([*lines, d.one_of(*ways).rstrip("\n")])


@piece(Kind.MIXING)
def limited_experts(d: Draw) -> str:
    """Experts with a limited number of rows, or weights that depend on the choices of all rows."""
    experts = d.number(2, 3)
    return "\n".join(
        [
            f"logits = F.linear(x.reshape(B * S, D), w({experts}, D))",
            f"taken = F.one_hot(logits.argmax(-1), {experts})",
            "y = x * "
            + d.one_of(
                "(taken.cumsum(0) <= S).mul(taken).sum(-1).view(B, S, 1)",
                "(taken.double().mean(0) * logits.softmax(-1)).sum(-1).view(B, S, 1)",
                "logits.softmax(0).sum(-1).view(B, S, 1)",
                "torch.zeros(B * S).index_fill(0, logits[:, 0].topk(S).indices, 1.0).view(B, S, 1)",
            ),
        ]
    )


@piece(Kind.MIXING)
def order_as_numbers(d: Draw) -> str:
    """A router that does not restore the order of rows, or that computes with the order itself."""
    slots = d.number(1, 2)
    start, back = _router(d, 3, slots), _restored_order(d, slots)
    summed = f".reshape(B, S, {slots}, D).sum(2)"
    return "\n".join(
        d.one_of(
            [*start, f"y = rows{summed}"],
            [*start, "rows = rows.cumsum(0) / (B * S)", *back],
            [*start, "rows = rows * order[:, None]", *back],
            [*start, "rows = rows - rows.mean(0)", *back],
            [*start, "rows = rows.flip(0)", *back],
            [*start, f"y = rows[order]{summed}"],
            [*start, back[0], f"y = rows[place] * place[:, None]\ny = y{summed} / (B * S)"],
            [*start, f"rows = rows + torch.arange(B * S * {slots})[:, None]", *back],
        )
    )
