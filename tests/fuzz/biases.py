"""Attention with biases, changed scores, masks of large numbers, or sinks."""

from __future__ import annotations

from tests.fuzz.attentions import floor, merged_heads, projections, scores
from tests.fuzz.draw import Draw, Kind, piece
from tests.fuzz.formulas import formula_mask
from tests.fuzz.masks import CAUSAL, INDICES, LOWEST, causal_mask, padding_mask


def separate_heads(d: Draw) -> list[str]:
    """Lines that compute ``q``, ``k`` and ``v`` with equal numbers of heads."""
    lines, grouped = projections(d)
    if grouped:
        lines.append("k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)")
    return lines


def any_mask(d: Draw) -> tuple[str, bool]:
    return formula_mask(d) if d.packed or d.chance(0.4) else causal_mask(d)


@piece(Kind.CAUSAL)
def with_sinks(d: Draw) -> str:
    """A softmax with a sink: an extra entry behind the keys."""
    mask, fully_masked = causal_mask(d)
    lines, grouped = projections(d)
    if grouped:
        lines.append("k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)")
    sink = d.one_of("w(H, 1, 1).expand(B, H, S, 1)", "x.mean(-1)[:, None, :, None].expand(B, H, S, 1)")
    lines += [
        INDICES,
        f"scores = torch.where({mask}, {scores(d)}, {floor(d, fully_masked)})",
        *d.one_of([], [], ["scores = scores - scores.amax(-1, keepdim=True)"]),
        f"scores = torch.cat([scores, {sink}], -1)",
        *d.one_of([], [], [f"scores = scores {d.one_of('* 0.5', '/ 3')}"]),
        *d.one_of([], ["scores = scores - scores.amax(-1, keepdim=True)"]),
        *d.one_of([], ["scores = scores - scores.max(-1, keepdim=True).values"]),
        "y = scores.softmax(-1)[..., :S] @ v",
    ]
    return "\n".join([*lines, merged_heads(d)])


@piece(Kind.CAUSAL)
def biased_by_distance(d: Draw) -> str:
    """ALiBi: a slope for each head times a distance or a position."""
    mask, fully_masked = causal_mask(d)
    lines, grouped = projections(d)
    if grouped:
        lines.append("k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)")
    slopes = d.one_of("0.5 ** torch.arange(1, H + 1)", "1 / torch.arange(1, H + 1)", "w(H)")
    lines += [INDICES, f"slopes = ({slopes})[:, None, None]"]
    distances = ["slopes * (keys - queries)", "slopes * torch.arange(S)", "slopes * (1 - queries)"]
    distances += ["torch.log(queries - keys + 1.0)", "(queries - keys < 3)", "(10 * (queries - keys)).to(torch.int8)"]
    distances += ["w(H, S, S)", "(ids[:, None, :, None] == ids[:, None, None, :])"]
    if d.has("padding"):
        distances.append("slopes * ((padding.long().cumsum(-1) - 1) * padding)[:, None, None, :]")
    lines.append(f"bias = {d.one_of(*distances)}")
    if d.chance(0.4):
        merged = "q.reshape(B * H, S, E), k.reshape(B * H, S, E).mT"
        lines.append(f"scores = torch.baddbmm((bias + q.new_zeros(B, H, 1, S)).reshape(B * H, -1, S), {merged})")
        lines.append("scores = scores.view(B, H, S, S)")
    else:
        lines.append("scores = q @ k.mT + bias")
    lines.append(f"y = torch.where({mask}, scores, {floor(d, fully_masked)}).softmax(-1) @ v")
    return "\n".join([*lines, merged_heads(d)])


def _selection(d: Draw) -> str:
    """A predicate over rows, queries or keys that selects the scores to change."""
    column, side = d.number(1, d.sizes.S - 1), d.one_of("[None]", "[:, None]")
    return d.one_of(
        f"(torch.arange(S) < {column}){side}",
        f"~(torch.arange(S){side} < {column})",
        f"(torch.arange(S) == {column}){side}",
        f"(ids == {d.token()}){d.one_of('[:, None, None, :]', '[:, None, :, None]')}",
        f"(queries - keys < {column})",
        f"(queries - keys == {column}) | (keys < {d.number(0, 2)})",
        f"(torch.arange(S) // 2){side} == 0",
    )


def boost(d: Draw) -> str:
    """A line that changes some scores, or all scores by a table."""
    selected = _selection(d)
    table = d.one_of("torch.arange(S)", "w(S)", *["table[0, :S]", "table[:, :S][0]"] * d.has("table"))
    side = d.one_of("[None]", "[:, None]")
    by_row = "positions" if d.has("positions") else "ids"
    return "scores = " + d.one_of(
        f"torch.where({selected}, 3 * scores, scores)",
        f"torch.where({selected}, scores, scores - 1.5)",
        f"scores.masked_fill({selected}, {d.one_of('0.5', '0.0', '-3.0')})",
        f"scores + 0.1 * ({selected})",
        f"scores + 0.1 * {table}{side}",
        f"scores * (1 + {table}{side}) / S",
        f"scores * torch.log(2.0 + {table}{side}.abs())",
        f"scores + w(K, H)[{by_row} % K].permute(0, 2, 1)[..., None]",
        f"scores + w(K)[{by_row} % K][:, None, None]",
        f"scores + w(K, H)[({by_row}[:, None] - {by_row}[..., None]).abs() % K].permute(0, 3, 1, 2)",
        "scores + w(K, H)[(queries - keys).clamp(min=0) % K].permute(2, 0, 1)",
        "scores + w(H, K)[:, (queries - keys) % K]",
    )


@piece(Kind.CAUSAL)
def boosted(d: Draw) -> str:
    """Scores that change before the mask, and perhaps after it."""
    mask, fully_masked = any_mask(d)
    hide = "-math.inf" if d.chance(0.7) else floor(d, fully_masked)  # minus infinity hides scores of any size
    lines = [*separate_heads(d), INDICES, f"scores = {scores(d)}", *(boost(d) for _ in range(d.one_of(1, 1, 2)))]
    lines.append(f"mask = {mask}")
    lines.append(
        f"scores = {d.one_of(f'torch.where(mask, scores, {hide})', f'scores + torch.where(mask, 0.0, {hide})')}"
    )
    after = ["scores = scores / 2", "scores = scores - scores.amax(-1, keepdim=True)", boost(d)]
    lines += [d.one_of(*after)] if d.chance(0.15 if d.relative else 0.3) else []
    return "\n".join([*lines, "y = scores.softmax(-1) @ v", merged_heads(d)])


FLOORS = (
    *("torch.finfo(torch.float16).min", "torch.finfo(torch.float32).min", "torch.finfo(torch.bfloat16).min"),
    *("-1e4", "-1e9", "-30000.0", "-65504.0"),
)
"""Numbers that hide scores if no large number is added."""

LARGE = ("1.0", "100.0", "3e4", "-3e4", "4e4", "1e9", "1e38")


@piece(Kind.CAUSAL)
def hidden_by_a_number(d: Draw) -> str:
    """A mask of numbers in a narrow dtype, perhaps widened, plus a bias that may be as large."""
    mask = d.one_of(*CAUSAL) if d.chance(0.6) else any_mask(d)[0]
    hide, dtype, large = d.one_of(
        ("torch.finfo(torch.float16).min", "torch.float16", "3e4"),
        ("torch.finfo(torch.float32).min", "torch.float32", "1e38"),
        (d.one_of(*FLOORS), d.one_of("torch.float16", "torch.bfloat16", "torch.float32", ""), d.one_of(*LARGE)),
    )
    made = f"mask = torch.where({mask}, 0.0, {hide})"
    if dtype and d.chance(0.3):
        made += f".to({dtype})"
    elif dtype and hide.startswith("torch") and dtype in hide:
        made = f"mask = torch.where({mask}, torch.tensor(0.0, dtype={dtype}), torch.tensor({hide}, dtype={dtype}))"
    lines = [*separate_heads(d), INDICES, made, *d.one_of([], ["mask = mask.double()"])]
    bias = d.one_of(
        f"{large} * (keys == {d.number(0, d.sizes.S)})",
        f"{large} * (ids == {d.token()})[:, None, None, :]",
        *[f"{large} * torch.arange(S) / S", f"{large} * torch.arange(S)", f"{large} / 10 * torch.arange(S)"],
        f"{large} * (queries - keys) / S",
        f"torch.full((S,), {large})",
        f"{large} * w(H, 1, 1)",
        "0.0",
    )
    lines.append(
        d.one_of(
            *[f"mask = mask + {bias}"] * 4,
            f"mask = mask - {bias}",
            f"mask = {bias} + mask",
            f"mask = mask * {d.one_of('0.5', '1e-3', '1e-6', '1e-9')}",
            f"mask = mask / {d.one_of('2', '1e4', '1e8')}",
            "mask = mask + mask",
            f"mask = mask.clamp(min=max({d.one_of('-10.0', '-1e4', '-1e9')}, torch.finfo(mask.dtype).min))",
        )
    )
    lines.append(
        d.one_of(
            "y = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype))",
            "y = (q @ k.mT + mask).softmax(-1) @ v",
            f"y = ({scores(d)} + mask).softmax(-1) @ v",
        )
    )
    return "\n".join([*lines, merged_heads(d)])


@piece(Kind.CAUSAL)
def added_by_baddbmm(d: Draw) -> str:
    """The mask is the first argument of ``baddbmm``, scaled by ``beta``."""
    mask, fully_masked = any_mask(d)
    hide = floor(d, fully_masked)
    later = []
    if d.has("padding") and d.chance(0.5):  # hide padding first, and later keys afterwards
        mask, lowest = padding_mask(d), d.one_of("-math.inf", LOWEST)
        later = [f"scores = torch.where({d.one_of(*CAUSAL)}, scores, {lowest})"]
    lines = [*separate_heads(d), INDICES, f"mask = torch.where({mask}, {d.one_of('0.0', '0.0', '1.0')}, {hide})"]
    beta = d.one_of("1", "1", "1.0", "0.5", "0", "2", "1e-6", "-1", "1e-320")
    alpha = d.one_of("1", "0.5", "0", "E ** -0.5")
    settings = d.one_of("", f", beta={beta}", f", alpha={alpha}", f", beta={beta}, alpha={alpha}")
    if d.chance(0.4):  # one head
        lines.append("mask = mask[:, 0] if mask.ndim == 4 else mask")
        lines.append(f"scores = torch.baddbmm(mask.expand(B, S, S), {d.one_of('x', 'x.tanh()')}, x.mT{settings})")
        return "\n".join([*lines, *later, "y = scores.softmax(-1) @ x"])
    merged = "q.reshape(B * H, S, E), k.reshape(B * H, S, E).mT"
    way = d.one_of("mask.expand(B, H, S, S).reshape(B * H, S, S)", "mask.expand(B, H, S, S).flatten(0, 1)")
    lines.append(f"scores = torch.baddbmm({way}, {merged}{settings}).view(B, H, S, S)")
    return "\n".join([*lines, *later, "y = scores.softmax(-1) @ v", merged_heads(d)])
