"""Linear attention in chunks, recurrent states, convolutions: causal ones, and similar ones that are not causal."""

from __future__ import annotations

from tests.fuzz.draw import Draw, Kind, piece


def in_chunks(d: Draw, diagonal: int = 0) -> tuple[int, list[str]]:
    """The size of a chunk, and lines that compute ``parts`` ``[B, n, size, D]`` of ``x`` and ``inner`` products."""
    size = d.number(1, 4)
    return size, [
        f"n = -(-S // {size})",
        f"parts = F.pad(x, (0, 0, 0, n * {size} - S)).reshape(B, n, {size}, D)",
        f"lower = torch.ones({size}, {size}, dtype=torch.bool).tril({diagonal})",
        "total = -parts.mean(-1).abs().cumsum(-1)",
        "decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -math.inf).exp()",
        "inner = " + d.one_of("parts @ parts.mT * decay", "torch.einsum('bnid,bnjd->bnij', parts, parts) * decay"),
    ]


def scan(d: Draw) -> str:
    """A causal scan in chunks."""
    size, lines = in_chunks(d)
    kind = d.one_of("within", "equation", "delta rule", "handed on", "one by one", "summed")
    if kind == "within":
        lines.append("y = inner @ parts")
    elif kind == "equation":
        lines.append("y = torch.einsum('bnij,bnjd->bnid', inner, parts)")
    elif kind == "delta rule":
        lines.append("y = torch.linalg.solve_triangular(inner, parts, upper=False, unitriangular=True)")
    elif kind == "handed on":
        lines += [
            "state = torch.einsum('bnid,bnie->bnde', parts, parts).cumsum(1)",
            "state = torch.cat([torch.zeros_like(state[:, :1]), state], 1)[:, :-1]",
            "y = inner @ parts + parts @ state",
        ]
    elif kind == "one by one":
        lines += [
            "state, y = x.new_zeros(B, D, D), torch.zeros_like(parts)",
            "for i in range(n):",
            "    y[:, i] = parts[:, i] @ state + inner[:, i] @ parts[:, i]",
            "    state = state * total[:, i, -1].exp()[:, None, None] + parts[:, i].mT @ parts[:, i]",
        ]
    else:
        lines.append("y = parts.cumsum(2) + F.pad(parts.sum(2, keepdim=True), (0, 0, 0, 0, 1, 0))[:, :-1]")
    return "\n".join([*lines, f"y = y.reshape(B, n * {size}, D)[:, :S] / S"])


@piece(Kind.CAUSAL, when=lambda d: not d.padded and not d.packed)
def scanned(d: Draw) -> str:
    return scan(d)


@piece(Kind.CAUSAL, when=lambda d: not d.padded and not d.packed)
def convolved(d: Draw) -> str:
    taps, dilation = d.number(1, 4), d.number(1, 2)
    behind = (taps - 1) * dilation
    weight, groups = d.one_of((f"w(D, 1, {taps})", "D"), (f"w(D, D, {taps})", "1"))
    return f"y = F.conv1d(x.mT, {weight}, w(D), padding={behind}, dilation={dilation}, groups={groups})[..., :S].mT"


@piece(Kind.CAUSAL, when=lambda d: not d.padded and not d.packed)
def short_convolution(d: Draw) -> str:
    """Written out: left padding and windows, or a sum of shifted copies."""
    taps = d.number(2, 4)
    padded = f"F.pad(x, (0, 0, {taps - 1}, 0))"
    return "y = " + d.one_of(
        f"({padded}.unfold(1, {taps}, 1) * w(D, {taps})).sum(-1)",
        f"torch.einsum('bsdt,edt->bse', {padded}.unfold(1, {taps}, 1), w(D, D, {taps}))",
        f"F.conv1d({padded}.mT, w(D, 1, {taps}), groups=D).mT",
        f"F.silu(F.conv1d(F.pad(x.mT, ({taps - 1}, 0)), w(D, D, {taps}))).mT",
        f"sum({padded}[:, i : i + S] * t for i, t in enumerate(w({taps}, D)))",
        f"sum(F.pad(x, (0, 0, i, 0))[:, :S] * 0.5**i for i in range({taps}))",
        f"torch.stack([{padded}[:, i : i + S] for i in range({taps})], -1).mean(-1)",
        "torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)",
        "torch.diff(x, dim=1, prepend=torch.zeros(B, 1, D))",
    )


@piece(Kind.CAUSAL, when=lambda d: not d.padded and not d.packed)
def means_so_far(d: Draw) -> str:
    counts = d.one_of(
        "torch.arange(1, S + 1)[:, None]",
        "torch.ones(S).cumsum(0)[:, None]",
        "torch.ones_like(x).cumsum(1)",
        "(1 + (ids != 0).cumsum(1))[..., None]",
    )
    return d.one_of(
        f"y = x.cumsum(1) / {counts}",
        f"y = x - x.cumsum(1) / {counts}",
        "y = (torch.ones(S, S).tril() / torch.arange(1, S + 1)[:, None]) @ x",
        "y = torch.softmax(torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1) == 1, -math.inf), -1) @ x",
        "y = x.cummax(1).values",
        "y = x.logcumsumexp(1)",
        "state, rows = torch.zeros(B, D), []\nfor i in range(S):\n    state = 0.5 * state + x[:, i]\n"
        "    rows.append(state)\ny = torch.stack(rows, 1)",
    )


@piece(Kind.CAUSAL, when=lambda d: not d.padded and not d.packed)
def linear_attention(d: Draw) -> str:
    scores = d.one_of("(x @ x.mT).tril()", "x @ x.mT * torch.ones(S, S).tril()", "(x @ x.mT).sigmoid().tril()")
    return f"y = ({scores}) @ {d.one_of('x', 'z')} / S"


@piece(Kind.ANY)
def nearly_scanned(d: Draw) -> str:
    """A scan with a mistake: off by a column or a chunk, or reversed. Some are still causal."""
    size, lines = in_chunks(d, d.number(-1, 1))
    lines += [
        "y = "
        + d.one_of(
            "inner @ parts",
            "inner.mT @ parts",
            "inner @ parts.flip(1)",
            "inner @ parts + parts.mean(2, keepdim=True)",
            "parts @ (parts.mT @ parts)",
            "parts.cumsum(1)",
            "parts.flip(2).cumsum(2).flip(2)",
            "torch.linalg.solve_triangular(inner.mT, parts, upper=True, unitriangular=True)",
            "parts.roll(1, 1)",
            "inner @ parts.roll(1, 0)",
            "(inner + 0.1) @ parts",
        ),
        f"y = y.reshape(B, n * {size}, D)",
        d.one_of("y = y[:, :S] / S", f"y = y[:, n * {size} - S:] / S"),
    ]
    return "\n".join(lines)


@piece(Kind.ANY)
def nearly_convolved(d: Draw) -> str:
    """A convolution whose padding is cut off at any column."""
    taps = d.number(2, 4)
    first = d.number(0, taps - 1)
    return f"y = F.conv1d(x.mT, w(D, D, {taps}), padding={taps - 1})[..., {first}:S + {first}].mT"
