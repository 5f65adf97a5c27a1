"""Attention, fused or written out, with causal masks and with similar masks that are not causal."""

from __future__ import annotations

from tests.fuzz.draw import Draw, Kind, piece
from tests.fuzz.formulas import formula_mask
from tests.fuzz.masks import INDICES, LOWEST, NOT_CAUSAL, causal_mask, window


def projections(d: Draw) -> tuple[list[str], bool]:
    """Lines that compute ``q``, ``k`` and ``v``, ``[B, H, S, E]``, and whether keys and values have fewer heads."""
    lines, grouped = _projected(d)
    if d.chance(0.15):  # the features of a head are not contiguous
        lines.append("q, k, v = (t.mT.contiguous().mT for t in (q, k, v))")
    return lines, grouped


def _projected(d: Draw) -> tuple[list[str], bool]:
    as_heads = "reshape(B, S, H, E).transpose(1, 2)"
    groups = d.one_of(*(g for g in range(1, d.sizes.H + 1) if d.sizes.H % g == 0))
    if d.chance(0.4):
        return [f"q, k, v = (t.{as_heads} for t in F.linear(x, w(3 * D, D)).chunk(3, -1))"], False
    if d.chance(0.5):
        return [f"q, k, v = F.linear(x, w(D, D)).{as_heads}, x.{as_heads}, {d.one_of('x', 'z')}.{as_heads}"], False
    lines = [f"q = F.linear(x, w(D, D)).{as_heads}"]
    for name in "kv":
        lines.append(f"{name} = F.linear(x, w({groups} * E, D)).reshape(B, S, {groups}, E).transpose(1, 2)")
    if d.chance(0.3) and groups < d.sizes.H:
        return lines, True
    repeated = d.one_of(
        f"[:, :, None].expand(B, {groups}, H // {groups}, S, E).reshape(B, H, S, E)",
        f".repeat_interleave(H // {groups}, 1)",
    )
    return [*lines, f"k, v = k{repeated}, v{repeated}"], False


def rotated(d: Draw) -> list[str]:
    """Lines that apply rotary positions to queries and keys, or something like it that is more than that."""
    column = "torch.arange(S)" if d.chance(0.4) else d.column_numbers()
    dims = "[:, None]" if column == "torch.arange(S)" else "[:, None, :, None]"
    if d.chance(0.6):
        both, turned = "torch.cat([{0}, {0}], -1)", "torch.cat([-t[..., E // 2:], t[..., : E // 2]], -1)"
    else:
        both, turned = "({0}).repeat_interleave(2, -1)", "torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)"
    lines = [f"angle = {column}{dims}.double() / (1 + torch.arange(E // 2))"]
    common = d.one_of("angle", "angle", "angle / 4", "angle ** 2" if d.chance(0.3) else "angle")
    for name in "qk" if d.chance(0.9) else d.one_of("q", "k"):
        own = d.one_of("-angle", "angle + 1", "2 * angle", "angle % 2") if d.chance(0.1) else common
        text = f"t * {both.format(own)}.cos() + {turned} * {both.format(own)}.sin()"
        if d.chance(0.1):
            factor = d.one_of("1.5", "(1 + angle[..., :1])", "1.1 ** angle[..., :1]", "0.9 ** angle[..., :1]")
            text = f"({text}) * {factor}"
        lines.append(f"{name} = (lambda t: {text})({name})")
    if d.chance(0.1):  # another reader of rotated rows
        lines.append(d.one_of("v = v + k.mean(1, keepdim=True)", "z = z + q.transpose(1, 2).reshape(B, S, D)"))
    return lines


def merged_heads(d: Draw) -> str:
    """Lines that merge the heads of ``y``, perhaps followed by a projection."""
    merged = "y = y.transpose(1, 2).reshape(B, S, D)"
    return f"{merged}\ny = F.linear(y, w(D, D))" if d.chance(0.5) else merged


def floor(d: Draw, fully_masked: bool) -> str:
    """The number that hides a score. With minus infinity, fully masked rows and their results are NaN."""
    return (
        LOWEST
        if fully_masked and d.chance(0.5 if d.relative else 0.75)
        else d.one_of(LOWEST, "-math.inf", 'float("-inf")')
    )


def can_be_negated(mask: str) -> bool:
    """Is the negated mask understood? Inequality of rows is not, and does not fold (see ``odd_attention``)."""
    return "] == " not in mask


def fused(d: Draw, mask: str, fully_masked: bool) -> str:
    lines, grouped = projections(d)
    if d.chance(0.4):
        lines += rotated(d)
    hide = floor(d, fully_masked)
    ways = ["mask", f"torch.where(mask, 0.0, {hide})"]
    if can_be_negated(mask):
        ways += ["~mask.logical_not()", f"torch.where(mask.logical_not(), {hide}, 0.0)"]
        ways += [f"torch.zeros(S, S).masked_fill(~mask, {hide})"] * (fully_masked is False)
        ways += [f"(1.0 - mask.double()) * {LOWEST}", f"(~mask).double() * {LOWEST}"]
    applied = d.one_of(*ways)
    options = ", enable_gqa=True" if grouped else d.one_of("", ", scale=0.3")
    lines += [INDICES, f"mask = {mask}", f"y = F.scaled_dot_product_attention(q, k, v, {applied}{options})"]
    return "\n".join([*lines, merged_heads(d)])


def by_hand(d: Draw, mask: str, fully_masked: bool) -> str:
    lines, grouped = projections(d)
    if grouped:
        lines.append("k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)")
    if d.chance(0.4):
        lines += rotated(d)
    hide = floor(d, fully_masked)
    lines += [INDICES, f"mask = {mask}", f"scores = {scores(d)}"]
    if d.chance(0.2):  # queries last
        lines += [
            f"weights = scores.where(mask, {hide}).mT.softmax(-2)",
            "y = weights.mT @ v",
        ]
        return "\n".join([*lines, merged_heads(d)])
    ways = [f"torch.where(mask, scores, {hide})", f"scores + torch.where(mask, 0.0, {hide})"]
    if can_be_negated(mask):
        ways.append(f"scores.masked_fill(~mask, {hide})")
    hidden = d.one_of(*ways)
    lines += [
        f"weights = ({hidden}).softmax(-1)",
        d.one_of("y = weights @ v", "y = torch.matmul(weights, v)", "y = weights @ (weights @ v)"),
    ]
    return "\n".join([*lines, merged_heads(d)])


def scores(d: Draw) -> str:
    """Scaled products of queries and keys, perhaps with a soft cap."""
    product = d.one_of("q @ k.transpose(-1, -2)", "torch.matmul(q, k.mT)")
    scaled = d.one_of(f"({product}) / math.sqrt(E)", f"({product}) * 0.5", "(q * 0.7) @ k.mT")
    return f"4 * torch.tanh(({scaled}) / 4)" if d.chance(0.25) else scaled


def plain_causal(d: Draw) -> str:
    lines, grouped = projections(d)
    if d.chance(0.4):
        lines += rotated(d)
    options = ", enable_gqa=True" if grouped else ""
    return "\n".join([*lines, f"y = F.scaled_dot_product_attention(q, k, v, is_causal=True{options})", merged_heads(d)])


# ---------------------------------------------------------------------------------------------------------- causal


@piece(Kind.CAUSAL, when=lambda d: not d.padded)
def fused_causal(d: Draw) -> str:
    return plain_causal(d)


@piece(Kind.CAUSAL)
def fused_masked(d: Draw) -> str:
    return fused(d, *causal_mask(d))


@piece(Kind.CAUSAL)
def written_out(d: Draw) -> str:
    return by_hand(d, *causal_mask(d))


@piece(Kind.ANY, when=lambda d: d.has("given"))
def masked_by_the_caller(d: Draw) -> str:
    """A mask from the caller, bool or float."""
    lines, grouped = projections(d)
    if grouped:
        lines.append("k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)")
    written = f"(({scores(d)}) + torch.where(given == 0, 0.0, {LOWEST})).softmax(-1) @ v"
    as_bool = "given if given.dtype == torch.bool else given == 0"
    way = d.one_of(
        "y = F.scaled_dot_product_attention(q, k, v, given)",
        "y = F.scaled_dot_product_attention(q, k, v, given)",
        f"y = F.scaled_dot_product_attention(q, k, v, ({as_bool}) & torch.ones(S, S, dtype=torch.bool).tril())",
        f"y = (({scores(d)}) + given).softmax(-1) @ v",
        f"y = {written}",
        "y = (q @ k.mT * (given == 0) / S) @ v",
        "y = F.scaled_dot_product_attention(q, k, v, given) + given.double().clamp(min=-1).mean(-1)[..., None]",
    )
    return "\n".join([*lines, way, merged_heads(d)])


@piece(Kind.CAUSAL, when=lambda d: d.has("positions") and not d.padded)
def packed_documents(d: Draw) -> str:
    """Attention within packed documents, which are runs of consecutive positions."""
    first = "torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1)"
    key, query = "positions[:, None, None, :]", "positions[:, None, :, None]"
    ordered = d.one_of("keys <= queries", f"{key} <= {query}", f"{key} < {query} + 1", "~(keys > queries)")
    mask = f"(run[:, None, None, :] == run[:, None, :, None]) & ({ordered})"
    if d.chance(0.3):
        width = d.number(1, d.sizes.S)
        mask += d.one_of(f" & ({key} > {query} - {width})", f" & ({query} < {key} + {width})", f" & {window(d)}")
    text = d.one_of(fused, by_hand)(d, mask, False)
    if d.chance(0.1):
        text += "\ny = y + run[..., None]"
    counted = d.one_of(f"({first} != 1).cumsum(-1)", *["(ids == 1).cumsum(-1)", "ids.clamp(max=2)"] * d.chance(0.2))
    if "positions" not in counted:
        text = text.replace(ordered, "keys <= queries")
    return f"run = {counted}\n{text}"


# ---------------------------------------------------------------------------------------------------------- mixing


@piece(Kind.MIXING)
def not_causal(d: Draw) -> str:
    mask = d.one_of(*NOT_CAUSAL)
    if d.chance(0.3):
        mask = f"({mask}) | (keys == queries)"
    return d.one_of(fused, by_hand)(d, mask, True)


@piece(Kind.MIXING)
def bidirectional(d: Draw) -> str:
    lines, grouped = projections(d)
    options = ", enable_gqa=True" if grouped else ""
    return "\n".join([*lines, f"y = F.scaled_dot_product_attention(q, k, v{options})", merged_heads(d)])


@piece(Kind.MIXING)
def nearly_masked(d: Draw) -> str:
    """A causal mask, used in a way that is not causal."""
    as_heads = "reshape(B, S, H, E).transpose(1, 2)"
    lines = [
        f"q, k, v = F.linear(x, w(D, D)).{as_heads}, x.{as_heads}, x.{as_heads}",
        "causal = torch.ones(S, S, dtype=torch.bool).tril()",
        "scores = q @ k.mT / math.sqrt(E)",
        "y = "
        + d.one_of(
            "(scores.softmax(-1) * causal) @ v",
            "(scores * causal).softmax(-1) @ v",
            "torch.where(causal, scores, -5.0).softmax(-1) @ v",
            "torch.where(causal, scores, -math.inf).softmax(-1).mT @ v",
            "torch.where(causal, scores, -math.inf).mT.softmax(-1) @ v",
            "torch.where(causal.mT, scores, -math.inf).softmax(-1) @ v",
            "torch.where(causal, scores, -math.inf).softmax(-2) @ v",
            f"(torch.where(causal, scores, {LOWEST}).softmax(-1) - 0.1) @ v",
            f"torch.where(causal, scores, {LOWEST}).tanh().softmax(-1) @ v",
            f"torch.where(causal, scores, {LOWEST}).clamp(min=-3).softmax(-1) @ v",
            "torch.where(causal, scores, -math.inf).softmax(-1).flip(-1) @ v",
            "torch.where(causal, scores, -math.inf).softmax(-1).roll(1, -2) @ v",
            "(torch.where(causal, scores, -math.inf).softmax(-1) @ v).flip(2)",
            "torch.where(causal, scores, -math.inf).softmax(-1) @ w(S, E)",
            "torch.where(causal, scores, -math.inf).softmax(-1) @ v.flip(2)",
            "F.scaled_dot_product_attention(q, k, v.flip(2), is_causal=True)",
            "F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)"
            ".transpose(1, 2)",
            "F.scaled_dot_product_attention(q, k.roll(1, 0), v, is_causal=True)",
            "F.scaled_dot_product_attention(*[t.transpose(0, 2) for t in (q, k, v)], is_causal=True).transpose(0, 2)",
        ),
    ]
    return "\n".join([*lines, merged_heads(d)])


# ------------------------------------------------------------------------------------------------------------- any


@piece(Kind.CAUSAL)
def masked_by_a_formula(d: Draw) -> str:
    return d.one_of(fused, by_hand)(d, *formula_mask(d))


@piece(Kind.ANY)
def odd_attention(d: Draw) -> str:
    """Unusual masks, biases and shapes, some of which are understood."""
    as_heads = "reshape(B, S, H, E).transpose(1, 2)"
    causal = "torch.ones(S, S, dtype=torch.bool).tril()"
    lines = [
        f"q, k, v = F.linear(x, w(D, D)).{as_heads}, x.{as_heads}, z.{as_heads}",
        f"scores = q @ k.mT + {d.one_of('0.0', 'w(S, S)', 'w(H, 1, 1)', '0.1 * torch.arange(S)')}",
        "y = "
        + d.one_of(
            f"torch.where({causal}, scores, -math.inf).softmax(-1) @ v",
            f"(torch.where({causal}, scores, {LOWEST}) + w(S, S)).softmax(-1) @ v",
            f"torch.where({causal}, scores, -1e9).softmax(-1) @ v",
            f"torch.where({causal}, scores, -math.inf).log_softmax(-1).exp() @ v",
            f"F.scaled_dot_product_attention(q, k, v, torch.where({causal}, w(S, S), -math.inf))",
            f"F.scaled_dot_product_attention(q, k, v, {causal} & (torch.arange(H)[:, None, None] >= 0))",
            "torch.einsum('bhqk,bhke->bhqe', torch.where(scores.tril() != 0, scores, -math.inf).softmax(-1), v)",
            "scores.masked_fill((ids[:, None, None] != ids[:, None, :, None]) | (scores.triu(1) != 0), -math.inf)"
            ".softmax(-1) @ v",
            f"torch.exp(scores.tanh()) * {causal} @ v",
            f"(scores * {causal}) @ v / S",
            "(scores.sigmoid().tril()) @ v / S",
            "F.scaled_dot_product_attention(q, k, v, torch.full((S, S), -math.inf).triu(1))",
            "F.scaled_dot_product_attention(q, k, v, w(S, S) + torch.full((S, S), -math.inf).triu(1))",
        ),
    ]
    return "\n".join([*lines, merged_heads(d)])
