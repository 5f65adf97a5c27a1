"""The pieces of random programs: text that computes ``y`` from ``x``, both ``[B, S, D]``.

A piece may also read ``z`` (an earlier value), the inputs, and its own weights. Position-wise and causal pieces keep
rows prefix-determined, mixing pieces do not, and pieces of any kind may or may not.
"""

from __future__ import annotations

from tests.fuzz import attentions, biases, experts, regions, roulette, scans  # noqa: F401 - importing them registers their pieces
from tests.fuzz.draw import PIECES, Draw, Kind, Piece, activated, piece

__all__ = ["PIECES", "Piece"]


# --------------------------------------------------------------------------------------------------- position-wise


@piece(Kind.POSITION_WISE)
def linear(d: Draw) -> str:
    return "y = " + d.one_of(
        "F.linear(x, w(D, D), w(D))",
        "x @ w(D, D) + w(D)",
        "(w(D, D) @ x[..., None]).squeeze(-1)",
        "torch.bmm(x, w(D, D).expand(B, D, D))",
    )


@piece(Kind.POSITION_WISE)
def merged_rows(d: Draw) -> str:
    return "y = " + d.one_of(
        "F.linear(x.contiguous().view(-1, D), w(D, D)).view(B, S, D)",
        "torch.addmm(w(D), x.reshape(B * S, D), w(D, D)).view(B, S, D)",
        "torch.mm(x.flatten(0, 1), w(D, D)).unflatten(0, (B, S))",
        activated(d, "x.transpose(0, 1).reshape(S * B, D)") + ".reshape(S, B, D).transpose(0, 1)",
        activated(d, "x.reshape(B * S * H, E) * w(E)") + ".view(B, S, D)",
        activated(d, "x.reshape(B, S * D)") + ".reshape(B, S, D)",
    )


@piece(Kind.POSITION_WISE)
def mlp(d: Draw) -> str:
    wide = d.number(1, 2 * d.sizes.D)
    hidden = activated(d, f"F.linear(x, w({wide}, D))")
    if d.chance(0.5):
        hidden = f"({hidden}) * F.linear(x, w({wide}, D))"
    return f"y = F.linear({hidden}, w(D, {wide}))"


@piece(Kind.POSITION_WISE)
def norm(d: Draw) -> str:
    return d.one_of(
        "y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * w(D)",
        "centred = x - x.mean(-1, keepdim=True)\n"
        "y = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w(D) + w(D)",
        "y = F.layer_norm(x, (D,), w(D), w(D), eps=1e-3)",
        "y = F.rms_norm(x, (D,), w(D), eps=1e-3)",
        "y = x / (x.norm(dim=-1, keepdim=True) + 1e-1)",
        "y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()",
    )


@piece(Kind.POSITION_WISE)
def pointwise(d: Draw) -> str:
    return "y = " + d.one_of(
        activated(d, "x"), "x.clamp(-1, 1)", "x.abs()", "1.5 * x - 0.5", "x * w(D)", "torch.lerp(x, z, 0.3)"
    )


@piece(Kind.POSITION_WISE)
def rotary(d: Draw) -> str:
    column = d.column_numbers()
    view, inverse, dims = d.one_of(
        ("x.reshape(B, S, H, E)", "y.reshape(B, S, D)", "[..., None, None]"),
        (
            "x.reshape(B, S, H, E).transpose(1, 2)",
            "y.transpose(1, 2).reshape(B, S, D)",
            "[:, None]" if column == "torch.arange(S)" else "[:, None, :, None]",
        ),
    )
    return (
        f"angle = {column}{dims} / (1 + torch.arange(E // 2))\n"
        f"left, right = {view}.chunk(2, -1)\n"
        "y = torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)\n"
        f"y = {inverse}"
    )


@piece(Kind.POSITION_WISE)
def seen_as_another_type(d: Draw) -> str:
    """Views of pairs of features as complex numbers, and of numbers as their bits."""
    column = d.column_numbers()
    return d.one_of(
        "h = torch.view_as_complex(x.reshape(B, S, D // 2, 2).contiguous())\n"
        f"turn = torch.polar(torch.ones(()), {column}[..., None] / (1.0 + torch.arange(D // 2)))\n"
        "y = torch.view_as_real(h * turn).flatten(2)",
        "y = x + x.detach().view(torch.int64).bitwise_and(-256).view(torch.float64)",
        "y = x + ids.view(torch.int32).view(B, S, 2).sum(-1, keepdim=True)",
    )


@piece(Kind.POSITION_WISE)
def learned_columns(d: Draw) -> str:
    return "y = x + " + d.one_of(
        f"F.embedding({d.column_numbers()}, w(S, D))",
        "w(S, D)",
        "w(S, D).expand(B, S, D)",
        "w(S, D).mean(-1, keepdim=True)",
        "w(S, D)[torch.arange(S), ids % D][..., None]",
        "torch.where((torch.arange(S) % 2 == 0)[:, None], w(S, D), 0.5)",
        "w(S, D).expand(B, S, D).gather(2, (ids % D)[..., None])",
        "torch.cat([w(S, D)[:, :1].expand(B, S, 1), x[..., 1:]], -1)",
    )


@piece(Kind.POSITION_WISE)
def heads(d: Draw) -> str:
    return d.one_of(
        f"y = ({activated(d, 'x.reshape(B, S, H, E).transpose(1, 2)')} * w(H, 1, 1)).transpose(1, 2).reshape(B, S, D)",
        "y = (x.reshape(B, S, H, E).permute(2, 0, 1, 3) @ w(H, 1, E, E))\ny = y.permute(1, 2, 0, 3).reshape(B, S, D)",
        "y = x.reshape(B, S, H, E).transpose(2, 3).reshape(B, S, D)",
        "y = x.reshape(B, S, H, E).mean(2, keepdim=True).expand(B, S, H, E).reshape(B, S, D)",
        "h = x.reshape(B, S, H, E)\ny = ((h @ h.mT).softmax(-1) @ h).reshape(B, S, D)",  # among the heads of a row
    )


@piece(Kind.POSITION_WISE)
def by_token(d: Draw) -> str:
    token, keys = d.token(), d.keys()
    return "y = " + d.one_of(
        f"torch.where({keys}[..., None] == {token}, x, w(D))",
        f"x.masked_fill(({keys} == {token})[..., None], 0.5)",
        f"x * ({keys} > {token})[..., None]",
        f"x + F.embedding({keys}.long(), w(K, D))",
        f"x + w(K, D)[{keys}.long()]",
        f"x * torch.where({keys} == {token}, 0.5, ({keys} % 3).double())[..., None]",
    )


@piece(Kind.POSITION_WISE)
def looked_up_features(d: Draw) -> str:
    width = d.number(1, d.sizes.D)
    return d.one_of(
        "y = x + x.gather(-1, (ids % D)[..., None])",
        "y = x.gather(-1, (ids[..., None] + torch.arange(D)) % D)",
        f"best, at = x.topk({width}, -1)\ny = x + best.sum(-1, keepdim=True) + w(D)[at].mean(-1, keepdim=True)",
        "order = w(D).argsort()\ny = x.index_select(-1, order)",
        "y, order = x.sort(-1)\ny = y + order",
        "y = torch.where(x >= x.amax(-1, keepdim=True), x, 0.1 * x)",
        "y = x.log_softmax(-1) + x.softmax(-1) - x.logsumexp(-1, keepdim=True)",
        "y = x + x.argmax(-1, keepdim=True)",
    )


@piece(Kind.POSITION_WISE)
def joined_features(d: Draw) -> str:
    width = d.number(1, d.sizes.D - 1)
    return d.one_of(
        f"a, b = x.split([{width}, D - {width}], -1)\ny = torch.cat([b, a.tanh()], -1)",
        "a, b = x.chunk(2, -1)\ny = torch.stack([b, 2 * a], -1).reshape(B, S, D)",
        f"y = F.pad(x[..., {width}:], (0, {width}))",
        "y = torch.cat([x, z], -1) @ w(2 * D, D)",
        "y = x.flip(-1) + x.cumsum(-1)",
        "y = torch.stack(x.reshape(B, S, H, E).unbind(2)[::-1], 2).reshape(B, S, D)",
        f"y = x[..., {width - 1}:{width}].repeat(1, 1, D) + x[..., :1].repeat_interleave(D, -1)",
        "y = torch.cat([x, w(D).expand(B, S, D)], -1).reshape(B, S, 2, D).sum(2)",
    )


@piece(Kind.POSITION_WISE)
def with_earlier(d: Draw) -> str:
    return "y = " + d.one_of(
        "x * torch.sigmoid(z)", "x + z", "torch.where(z > 0.1, x, w(D))", "x * (x * z).sum(-1, keepdim=True)"
    )


@piece(Kind.POSITION_WISE)
def counted_indices(d: Draw) -> str:
    return "y = x[torch.arange(B)[:, None, None], torch.arange(S)[:, None], torch.arange(D)]"


# ---------------------------------------------------------------------------------------------------------- causal


@piece(Kind.CAUSAL, when=lambda d: not d.padded)
def running_sum(d: Draw) -> str:
    return d.one_of(
        "y = x.cumsum(1) / (1 + torch.arange(S))[:, None]",
        "y = torch.sigmoid(x).cumprod(1)",
        "y = (x.reshape(B, S, H, E).transpose(1, 2).cumsum(2) / S).transpose(1, 2).reshape(B, S, D)",
        f"y = x / (1 + (ids == {d.token()}).cumsum(1))[..., None]",
        "state = (x.sigmoid()[..., None] * x[..., None, :]).cumsum(1) / S\ny = (x[..., None, :] @ state).squeeze(-2)",
        "y = (x.transpose(0, 1).cumsum(0) / S).transpose(0, 1)",
    )


# ---------------------------------------------------------------------------------------------------------- mixing


@piece(Kind.MIXING)
def over_the_sequence(d: Draw) -> str:
    return "y = " + d.one_of(
        "x - x.mean(1, keepdim=True)",
        "x.flip(1)",
        f"x.roll({d.one_of(-1, 1)}, 1)",
        "x.flip(1).cumsum(1).flip(1)",
        "x.sum(1, keepdim=True) - x.cumsum(1)",
        "x.sort(1).values",
        "x.softmax(1)",
        "x / (1 + x.amax((0, 1)).abs())",
        "x + x[:, -1:]",
        "torch.cat([x[:, 1:], x[:, :1]], 1)",
        "x - x.transpose(1, 2).mean(-1)[:, None]",
        "x.gather(1, (ids % S)[..., None].expand(B, S, D))",
        "x[torch.arange(B)[:, None], ids % S]",
        "x.reshape(B, S * D).softmax(-1).reshape(B, S, D)",
        "x[:, torch.arange(S - 1, -1, -1)]",
        "w(S, S) @ x",
        "F.conv1d(F.pad(x.mT, (0, 1)), torch.ones(D, D, 2)).mT",
    )


@piece(Kind.MIXING)
def over_the_batch(d: Draw) -> str:
    return "y = " + d.one_of(
        "x.softmax(0)",
        "x / (1 + x.abs().max())",
        "x.cumsum(0) / B",
        "x - x.mean(0, keepdim=True)",
        "x.flip(0)",
        "x.roll(1, 0)",
        "(x.transpose(0, 1) @ x.transpose(0, 1).mT).softmax(-1).matmul(x.transpose(0, 1)).transpose(0, 1)",
        "x[x.sum((1, 2)).argsort()]",
        "x[ids.sum(1).argsort()]",
        "F.batch_norm(x.reshape(B * S, D), None, None, training=True).reshape(B, S, D)",
        "x / x.reshape(B * S, D).norm(dim=0)",
        "x.sort(0).values",
        "x.reshape(-1).cumsum(0).reshape(B, S, D) / (B * S)",
    )


@piece(Kind.MIXING)
def tells_sequences_apart(d: Draw) -> str:
    return "y = x + " + d.one_of(
        "w(B, D)[:, None]",
        "F.embedding(torch.arange(B), w(B, D))[:, None]",
        "torch.arange(B)[:, None, None]",
        "w(B, V)[torch.arange(B)[:, None], ids % V][..., None]",
        "w(B, S, 1)",
        "w(B * S, D).reshape(B, S, D)",
        "torch.arange(B * S).reshape(B, S)[..., None] * w(D)",
    )


@piece(Kind.MIXING)
def later_keys(d: Draw) -> str:
    """Factors from the inputs that depend on later tokens: counts, positions, sorts."""
    return "y = x * " + d.one_of(
        "(ids == ids.flip(1))[..., None]",
        "(ids != 0).sum(1)[:, None, None]",
        "(ids - ids.amax(1, keepdim=True))[..., None]",
        "(1 + (ids != 0).sum(1, keepdim=True) - torch.arange(S))[..., None]",
        "ids.sum()",
        "torch.argsort(ids, dim=1, stable=True)[..., None]",
        "(ids == ids.transpose(0, 1).reshape(B, S))[..., None]",
        f"torch.cat([ids[:, 1:], ids[:, :1]], 1).eq({d.token()})[..., None]",
    )


@piece(Kind.MIXING, when=lambda d: d.sizes.B == d.sizes.H)
def batch_and_heads_swapped(d: Draw) -> str:
    d.fixed = True
    return "h = x.reshape(B, S, H, E)\n" + d.one_of(
        "y = h.transpose(0, 2).reshape(B, S, D)",
        "y = (h + h.transpose(0, 2)).reshape(B, S, D)",
        "y = F.scaled_dot_product_attention(*[h.transpose(1, 2).transpose(0, 1)] * 3, is_causal=True)\n"
        "y = y.permute(0, 2, 1, 3).reshape(B, S, D)",
        "y = (h * w(B, 1, 1, 1)).reshape(B, S, D)",
        "y = (h.transpose(1, 2) * h.permute(2, 0, 1, 3)).transpose(1, 2).reshape(B, S, D)",
    )


@piece(Kind.MIXING, when=lambda d: d.sizes.S == d.sizes.D)
def columns_and_features_swapped(d: Draw) -> str:
    d.fixed = True
    return "y = " + d.one_of(
        "x + x.mT",
        "x.mT.contiguous()",
        "(x.mT @ w(D, D)).mT",
        "x * x.mean(1)[..., None]",
        "torch.where((torch.arange(S)[:, None] >= torch.arange(D)), x.mT, x)",
        "F.layer_norm(x.mT, (S,), w(D))",
    )


@piece(Kind.MIXING, when=lambda d: d.sizes.B == d.sizes.S)
def sequences_and_columns_swapped(d: Draw) -> str:
    d.fixed = True
    return "y = " + d.one_of("x + x.transpose(0, 1)", "x * ids.T[..., None]", "x + x.mean(0)[:, None]")


# ------------------------------------------------------------------------------------------------------------- any


@piece(Kind.ANY)
def causal_but_unknown(d: Draw) -> str:
    return "y = " + d.one_of(
        "F.pad(x, (0, 0, 1, 0))[:, :S]",
        "torch.cat([torch.zeros(B, 1, D), x[:, :-1]], 1)",
        "x + x[:, :1]",
        "x.cummax(1).values",
        "F.conv1d(F.pad(x.mT, (1, 0)), torch.ones(D, D, 2)).mT / D",
        "x.cumsum(1).flip(1).flip(1)",
        "x + torch.diff(x, dim=1, prepend=x[:, :1])",
        "torch.stack([x[:, :s + 1].mean(1) for s in range(S)], 1)",
        "x[:, :, [D - 1 - i for i in range(D)]]",
        "x[x.sum((1, 2)).argsort()][x.sum((1, 2)).argsort().argsort()]",
    )


@piece(Kind.ANY)
def einsum(d: Draw) -> str:
    return "y = " + d.one_of(
        "torch.einsum('bsd,de->bse', x, w(D, D))",
        "torch.einsum('bshe,hef->bshf', x.reshape(B, S, H, E), w(H, E, E)).reshape(B, S, D)",
        "torch.einsum('bsd,ts->btd', x, w(S, S))",
        "torch.einsum('bsd,bs->bsd', x, z.sum(-1))",
        "torch.einsum('bsd,btd->bst', x, z).tril() @ x / S",
        "torch.einsum('bsd,csd->bsd', x, z) / B",
    )


@piece(Kind.ANY)
def axes_swapped(d: Draw) -> str:
    return "y = " + d.one_of(
        "x.transpose(0, 1).reshape(B, S, D)", "x.reshape(S, B, D).transpose(0, 1)", "x.mT.reshape(B, S, D)"
    )


@piece(Kind.ANY)
def odd_tables(d: Draw) -> str:
    return "y = " + d.one_of(
        "torch.cat([x.reshape(B * S, D), torch.ones(D).expand(B * S, D)], -1).reshape(B, S, 2 * D)[..., :D]",
        "torch.bmm(x.reshape(B, S, H, E).transpose(1, 2).reshape(B * H, S, E), w(E, E)"
        ".expand(B * H, E, E)).reshape(B, H, S, E).transpose(1, 2).reshape(B, S, D)",
        "x + torch.zeros(S, 1) * w(D)",
        "x + torch.ones(1, S, 1).cumsum(1)",
        "x + torch.eye(S)[torch.arange(S)] @ w(S, D)",
        "x + w(B, 1, D)[:1]",
        "x * torch.full((B, 1, 1), 0.5) + w(1, S, 1)",
        "x + (x.sum() * 0)",
        "x + torch.zeros(S).sort(stable=True).indices[:, None]",
        f"x * {d.column_numbers()}[..., None]",
    )
