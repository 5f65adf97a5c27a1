"""Regions with and without gradients, detached parts, and tables that the program computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fuzz.attentions import merged_heads, projections
from tests.fuzz.draw import Draw, Kind, piece
from tests.fuzz.masks import INDICES, LOWEST, causal_mask

WITHOUT = ("with torch.no_grad():", "with torch.no_grad():", "with torch.set_grad_enabled(False):")
WITH = ("with torch.enable_grad():", "with torch.set_grad_enabled(True):")


def inside(region: str, *lines: str) -> list[str]:
    """The lines, indented below the ``with`` statement ``region``."""
    return [region, *(f"    {line}" for line in lines)]


def _value(d: Draw) -> tuple[list[str], str]:
    """Lines to run first, and the text of a value computed from ``x``."""
    return d.one_of(
        (["t = w(D, D)"], "F.linear(x, t)"),
        (["t = w(D, D)"], "torch.tanh(F.linear(x, t))"),
        (["t = w(D)"], "x * t"),
        (["t = w(S, D)"], "x + t"),
        (["t = w(S, D)"], "x * t.sigmoid()"),
        (["t = w(S, D)"], "F.embedding(torch.arange(S), t) * x"),
        (["t = w(K, D)"], "F.embedding(ids, t) + x"),
        (["t = w(K, D)"], "x * t[ids]"),
        (["t = w(1, D)"], "F.layer_norm(x, (D,), t[0])"),
        ([], "x.softmax(-1)"),
        ([], "torch.sin(x)"),
        ([], "x.cumsum(1) / S"),
        ([], "torch.arange(S)[:, None] * x / S"),
    )


@piece(Kind.POSITION_WISE)
def the_same_twice(d: Draw) -> str:
    """One value, computed in a region without gradients and outside of it."""
    first, value = _value(d)
    detached, attached = inside(d.one_of(*WITHOUT), f"a = {value}"), [f"b = {value}"]
    if d.chance(0.3):
        attached = inside(d.one_of(*WITH), *attached)
    if d.chance(0.2):
        detached = inside(d.one_of(*WITH), *inside(d.one_of(*WITHOUT), f"a = {value}"))
    if d.chance(0.2):
        detached = [
            *detached,
            *inside(d.one_of(*WITHOUT), "c = torch.sin(x)"),
            "a = a + c + torch.sin(x)",
        ]
    order = [*detached, *attached] if d.chance(0.7) else [*attached, *detached]
    joined = d.one_of("a * b", "a + 2 * b", "b - a", "b / (1 + a.abs())", "torch.where(a > 0, b, -b)", "b + 0 * a")
    return "\n".join([*first, *order, f"y = {joined}"])


@piece(Kind.POSITION_WISE)
def cut_off(d: Draw) -> str:
    """A value of which some part is detached."""
    first, value = _value(d)
    ways = [
        ["y = a.detach() * a"],
        ["y = a + (a.round() - a).detach()"],
        ["y = a.detach() + x"],
        ["y = x.detach() + a"],
        [*inside(d.one_of(*WITHOUT), "b = a.abs().amax(-1, keepdim=True)"), "y = a / (1 + b)"],
        [*inside(d.one_of(*WITHOUT), "b = a.log_softmax(-1)"), "y = x + b.gather(-1, ids[..., None] % D)"],
        [*inside(d.one_of(*WITHOUT), "b = a.softmax(-1)"), "y = (a.log_softmax(-1) - b.log()) * b"],
        [*inside(d.one_of(*WITHOUT), "b = a.log_softmax(-1)"), "y = a.log_softmax(-1) + b.exp()"],
        [*inside(d.one_of(*WITH), "b = a * 2"), "y = a * 2 + b"],
    ]
    return "\n".join([*first, f"a = {value}", *d.one_of(*ways)])


class Times(torch.autograd.Function):
    """A product with a hand-written gradient that is twice the true one, so that no other gradient agrees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, factor = ctx.saved_tensors
        return 2 * grad * factor, 2 * (grad * x).sum((0, 1))


@piece(Kind.POSITION_WISE, when=lambda d: d.traced)
def with_its_own_gradient(d: Draw) -> str:
    """A custom gradient. Mostly, gradients are enabled for this op alone, even in calls without gradients."""
    lines = [f"y = Times.apply({d.one_of('x', 'F.linear(x, w(D, D))')}, w(D))"]
    return "\n".join(inside(d.one_of(*WITH), *lines) if d.chance(0.8) else lines)


@piece(Kind.CAUSAL)
def attention_cut_off(d: Draw) -> str:
    """Attention of which some part is detached."""
    mask, _ = causal_mask(d)
    lines, grouped = projections(d)
    if grouped:
        lines.append("k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)")
    hidden = f"torch.where(mask, q @ {{}}.mT, {LOWEST}).softmax(-1)"
    whole = "F.scaled_dot_product_attention({}, {}, {}, mask)"
    no_grad = d.one_of(*WITHOUT)
    ways = [
        [f"y = {hidden.format('k')}.detach() @ v"],
        [f"y = {hidden.format('k.detach()')} @ v"],
        [f"y = {hidden.format('k')} @ v.detach()"],
        [*inside(no_grad, f"weights = {hidden.format('k')}"), "y = weights @ v"],
        [*inside(no_grad, f"weights = {hidden.format('k')}"), f"y = {hidden.format('k')} @ v + weights @ v"],
        [*inside(no_grad, f"a = {hidden.format('k')} @ v"), f"y = a * ({hidden.format('k')} @ v)"],
        [f"y = {whole.format('q', 'k.detach()', 'v')}"],
        [f"y = {whole.format('q.detach()', 'k', 'v')}"],
        [f"y = {whole.format('q', 'k', 'v.detach()')} + {whole.format('q', 'k', 'v')}"],
        [*inside(no_grad, f"a = {whole.format('q', 'k', 'v')}"), f"y = a + {whole.format('q', 'k', 'v')}"],
        [*inside(no_grad, f"y = {whole.format('q', 'k', 'v')}")],
    ]
    return "\n".join([*lines, INDICES, f"mask = {mask}", *d.one_of(*ways), merged_heads(d)])


UNIFORM = ("torch.ones({})", "torch.zeros({})", "torch.full(({},), 0.5)", "torch.ones({}, dtype=torch.int64)")


def made_table(d: Draw) -> str:
    """``[S]``: the result of an op on uniform tensors. Only some of these ops keep tensors uniform."""
    template, shorter_template, single = (d.one_of(*UNIFORM) for _ in range(3))
    whole, shorter = template.format("S"), shorter_template.format("S - 1")
    return d.one_of(
        *[f"{whole}.cumsum(0)", f"({whole} + 1).cumprod(0)", f"{whole}.roll(1)", f"{whole}.flip(0)"],
        f"torch.diff({whole}, prepend={single.format('1')})",
        f"torch.diff({whole}, append={single.format('1')})",
        f"torch.diff({whole}, prepend={whole}[:1] - 1)",
        f"torch.diff({whole}[None], prepend={whole}[None, :1] - 1)[0]",
        "torch.diff(torch.arange(S), prepend=torch.zeros(1, dtype=torch.int64))",
        "torch.diff(torch.arange(S) // 2, prepend=torch.arange(1))",
        f"F.pad({shorter}, (1, 0))",
        f"F.pad({shorter}, (0, 1), value=3)",
        f"F.pad({whole}, (1, 0))[:S]",
        f"F.pad({whole}, (1, -1))",
        f"torch.cat([{single.format('1')}, {shorter}])",
        f"torch.cat([{shorter}, {single.format('1')}])",
        f"torch.stack([{whole}, 2 * {whole}], -1).flatten()[:S]",
        "torch.ones(S, S).tril().sum(-1)",
        "torch.ones(S, S).triu(1).sum(0)",
        f"{whole}.double().softmax(0)",
        f"{whole}.double().logcumsumexp(0)",
        f"{whole}.index_fill(0, torch.zeros(1, dtype=torch.int64), 3)",
        f"{whole}.scatter(0, torch.zeros(1, dtype=torch.int64), 3)",
        f"{whole}.cummax(0).indices",
        f"torch.where(torch.arange(S) == 0, 2.0, {whole})",
        f"torch.eye(S).sum(0) * {whole}",
        "torch.eye(S)[0]",
        "torch.linspace(0, 1, S)",
        f"{whole}[None].expand(S, S).cumsum(0)[:, 0]",
        f"{whole}.repeat(2).cumsum(0)[:S]",
    )


@piece(Kind.POSITION_WISE)
def made_in_the_program(d: Draw) -> str:
    """A table that the program computes, applied to ``x``."""
    table = made_table(d)
    index = d.one_of("[:, None]", "[:, None].expand(S, D)", "[None, :, None]", "[:, None].expand(B, S, 1)")
    full_tensor = d.one_of(
        *["torch.ones_like(ids).cumsum(-1)[..., None]", "torch.zeros_like(ids).add(1).cumsum(1)[..., None]"],
        *["torch.ones(B, S).cumsum(1)[..., None]", "torch.ones(B, S).cumsum(0)[..., None]"],
        "torch.ones(B).cumsum(0)[:, None, None]",
        "F.pad(torch.zeros(B, S - 1), (1, 0), value=1.0)[..., None]",
        "torch.ones(B, S, D).cumsum(1)",
        "torch.cat([torch.zeros(B, 1), torch.ones(B, S - 1)], 1)[..., None]",
        "torch.zeros(B, S, 1).roll(1, 1)",
    )
    tensor = f"({table}){index}" if d.chance(0.8) else full_tensor
    lines = [f"t = {tensor}", d.one_of("y = x * t / S", "y = x + t", "y = F.linear(x + t, w(D, D))")]
    if d.chance(0.2):
        lines = [*inside(d.one_of(*WITHOUT), f"t = {tensor} * w(D)"), "y = x * t + t"]
    return "\n".join(lines)


@piece(Kind.CAUSAL)
def masked_by_a_made_table(d: Draw) -> str:
    """Attention with a mask that reads a table by column."""
    mask, _ = causal_mask(d)
    table = made_table(d)
    lines, grouped = projections(d)
    options = ", enable_gqa=True" if grouped else ""
    term = d.one_of(
        "(t[None] == t[:, None])",
        "(t[None] <= t[:, None])",
        "(t[None] != 0)",
        "(t[:, None] > 1)",
        "(keys <= t[:, None])",
    )
    terms = [f"({mask})", term]
    d.random.shuffle(terms)
    whole = f"{' & '.join(terms)} | (keys == queries)"
    lines += [INDICES, f"t = {table}", f"y = F.scaled_dot_product_attention(q, k, v, {whole}{options})"]
    return "\n".join([*lines, merged_heads(d)])
