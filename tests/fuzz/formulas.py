"""Random masks: formulas of terms that compare columns, rows, lengths and tables of query and key."""

from __future__ import annotations

from tests.fuzz.draw import Draw
from tests.fuzz.masks import CAUSAL, NOT_CAUSAL, padding_mask, window

AS_KEY, AS_QUERY = "[:, None, None, :]", "[:, None, :, None]"
RUN = "(torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)"
FROM_PADDING = "(padding.long().cumsum(-1) - 1).clamp(min=0)"
"""Positions that start after left padding."""

SINKS = (
    "((keys < {0}) | {1})",
    "({1} | (torch.arange(S) < {0})[None])",
    "~(~{1} & ~(keys < {0}))",
    "~(~(torch.arange(S)[None, :] < {0}) & ~{1})",
    "((queries >= {0}) | {1})",
    "((torch.arange(S) // {0})[None] == (torch.arange(S) // {0})[:, None]) | {1}",
)
"""Windows that also show the first columns to every query."""

WRAPPING = (
    "({0}[None] + {1} <= {0}[:, None] + {1})",
    "({0}[None] + 2**30 + ({1} - 2**30) <= {0}[:, None] + 2**30 + ({1} - 2**30))",
    "({0}[None] - {1} - 10 <= {0}[:, None] - {1} - 10)",
    "({0}[None] - {0}[:, None] + {1} <= {1})",
    "~({0}[None] + {1} > {0}[:, None] + {1})",
)
"""Causal comparisons of columns. The integers may wrap around."""


def row_numbers(d: Draw) -> str:
    """``[B, S]``: integers of rows, from the inputs or counted."""
    inputs = [name for name in ("ids", "kinds", "positions", "documents") if name == "ids" or d.has(name)]
    if d.relative and d.chance(0.9):  # counts depend on the column
        inputs += ["far"] * d.has("far") + ["table[:, :S]"] * d.has("table") + [f"{d.one_of(*inputs)} % 2"]
        return f"({d.one_of(*inputs)})"
    counted = [f"(ids == {d.token()}).cumsum(-1)", "ids.cumsum(-1)", "F.pad(ids, (1, 0))[:, :S]", "ids % 2"]
    if d.has("positions"):
        counted += [RUN, RUN, "positions - 1", "positions // 2", "positions.int()", "(positions == 0).cumsum(-1)"]
    if d.has("padding"):
        counted += [FROM_PADDING, FROM_PADDING, "padding.long()", "padding.cumsum(-1)"]
    if d.has("documents"):
        counted += ["documents", "documents * (documents > 0)", "documents.to(torch.int16)"]
    if d.has("table"):  # one row for all sequences
        counted += ["table[:, :S]", "table.expand(B, -1)[:, :S]", "(table != 0)[:, :S].long()", "table[..., :S] % 2"]
    if d.has("far"):
        counted += ["far", f"far + {d.number(-2, 3)}", "far.long()"]
    mixed = ["ids.roll(1, 1)", "ids.flip(1)", "torch.arange(B * S).view(B, S)"]
    return f"({d.one_of(*[d.one_of(*counted)] * 4, *[d.one_of(*inputs)] * 4, d.one_of(*mixed))})"


def documents(d: Draw) -> str:
    """``[B, S]``: numbers of packed sequences, if an input has them; otherwise any integers."""
    numbers = ["documents"] * 2 * d.has("documents") + [RUN, RUN, "(positions == 0).cumsum(-1)"] * d.has("positions")
    return f"({d.one_of(*numbers)})" if numbers else row_numbers(d)


def columns(d: Draw) -> str:
    """``[S]``: numbers of columns, or a table by column."""
    divisor, limit = d.number(1, d.sizes.S), d.one_of("2**31 - 1 - S", "2**31 - S", "2**31 - 2")
    numbers = d.one_of(
        *["torch.arange(S)"] * 3,
        f"torch.arange(S) // {divisor}",
        f"torch.div(torch.arange(S), {divisor}, rounding_mode='floor')",
        f"torch.arange(S) % {divisor}",
        "torch.arange(1, S + 1)",
        "torch.arange(S, dtype=torch.int32)",
        "torch.arange(S).to(torch.uint8)",
        "torch.arange(S - 1, -1, -1)",
        "(-torch.arange(S))",
        f"torch.arange({limit} - 1, {limit} - 1 + S).int()",
        f"(torch.arange(S, dtype=torch.int32) + ({limit}))",
        "torch.arange(S) * 2**30",
        "torch.arange(B * S)[-S:]",
        *["columns[0]"] * 2 * d.has("columns"),
        *["table[:, :S][0]", "table[0, :S]", "table.flatten()[:S]"] * d.has("table"),
    )
    return f"({numbers})"


def lengths(d: Draw) -> str:
    """``[B]``: one number for each sequence."""
    numbers = ["(ids != 0).sum(-1)", "ids[:, 0]", "ids.amax(-1)"]
    numbers += ["padding.long().sum(-1)", "padding.long().argmax(-1)"] * d.has("padding")
    numbers += ["lengths"] * 4 * d.has("lengths") + ["prefix.flatten()", "prefix.reshape(-1)"] * 2 * d.has("prefix")
    return d.one_of(*numbers)


def term(d: Draw) -> str:
    """A comparison that broadcasts to ``[B, 1, S, S]``."""
    sign, token, column = d.one_of("<", "<=", ">", ">=", "==", "!="), d.token(), d.number(0, d.sizes.S)
    side, other = d.one_of((AS_KEY, AS_QUERY), (AS_QUERY, AS_KEY))
    at, across = d.one_of(("[None, :]", "[:, None]"), ("[:, None]", "[None, :]"), ("[None]", "[:, None]"))
    rows, table, other_table, divisor = row_numbers(d), columns(d), columns(d), d.number(1, 3)
    offset = d.one_of("", "", "", f" + {d.number(1, 3)}", f" - {d.number(1, 3)}")
    terms = [
        *[f"({rows}{side} == {rows}{other})"] * 2,
        f"({rows}{side} {sign} {rows}{other}{offset})",
        f"({rows}{side} {sign} {row_numbers(d)}{other})",
        f"({rows} {sign} {token}){side}",
        f"({table}{at} {sign} {table}{across}{offset})",
        f"({table}{at} {sign} {other_table}{across}{offset})",
        *[f"({table} {sign} {column}){at}", f"({table}{at} {sign} {column})"],
        f"((torch.arange(S) // {divisor}){at} {sign} (torch.arange(S) // {divisor}){across})",
        f"({d.one_of('keys', 'queries')} {sign} {rows}{side}{offset})",
        f"({d.one_of('keys', 'queries')} {sign} {lengths(d)}[:, None, None, None])",
        f"({d.one_of('keys', 'queries')} {sign} {lengths(d)}.view(B, 1, 1, 1){offset})",
        f"(queries - keys < {table}{at})",
        f"(keys > queries - 1 - {table}{at})",
        f"((queries - keys) % {divisor + 1} == 0)",
        f"((queries - keys).abs() {sign} {column})",
        window(d),
        *[padding_mask(d), "(padding == 0)[:, None, :, None]"] * d.has("padding"),
        d.one_of("torch.ones(S, S, dtype=torch.bool)", "torch.ones(1, 1, dtype=torch.bool)", "(keys == queries)"),
        f"(z.mean(-1) > 0){side}",
    ]
    return d.one_of(*terms)


def sees_itself(d: Draw) -> str:
    """A term that mostly holds where query and key are the same row."""
    rows, table, divisor = row_numbers(d), columns(d), d.number(1, max(2, d.sizes.S // 2))
    at = d.one_of("[None, :]", "[:, None]")
    return d.one_of(
        f"((torch.arange(S) // {divisor})[None] == (torch.arange(S) // {divisor})[:, None])",
        f"({table}[None] == {table}[:, None])",
        f"({table}[None] {d.one_of('<=', '>=')} {table}[:, None])",
        f"({rows}{AS_KEY} == {rows}{AS_QUERY})",
        f"(queries - keys < 1 + {table}{at} % 3)",
        window(d),
        *[f"(({table} {d.one_of('<', '>=', '==')} {divisor}){d.one_of('[None]', '[:, None]')} | {window(d)})"] * 2,
        *[d.one_of(*SINKS).format(divisor, window(d))] * (4 if d.relative else 1),
        *[f"({formula(d, d.number(0, 2))} | {d.one_of('(keys == queries)', window(d))})"] * 4,
        f"({window(d)} | ({rows} == {d.token()}){AS_KEY})",
        f"~({term(d)} & (keys != queries))",
    )


def formula(d: Draw, depth: int) -> str:
    """Terms, joined by operators up to ``depth`` levels."""
    if depth == 0 or d.chance(0.3):
        return d.one_of(f"~{term(d)}", term(d), term(d), term(d))
    left, right = formula(d, depth - 1), formula(d, depth - 1)
    return d.one_of(
        *[f"({left} & {right})"] * 4,
        *[f"({left} | {right})"] * 3,
        f"~({left} | {right})",
        f"~({left} & {right})",
        f"torch.logical_and({left}, {right})",
        f"({left} ^ {right})",
        f"torch.where({left}, {right}, {formula(d, 0)})",
        f"({left} * {right})",
    )


def ordered(d: Draw) -> str:
    """A term that hides later keys, with rare exceptions."""
    share = d.random.random()
    if share < 0.8:
        return f"({d.one_of(*CAUSAL)})"
    if share < 0.88:
        rows = d.one_of(
            FROM_PADDING if d.has("padding") else "ids", *["positions"] * d.has("positions"), row_numbers(d)
        )
        return f"({rows}{AS_KEY} <= {rows}{AS_QUERY})"
    if share < 0.95:
        numbers = "torch.arange(S, dtype=torch.int32)", d.one_of("(2**31 - 4)", "(2**31 - S)", "(2**31 - 1)", "2**20")
        return d.one_of(*WRAPPING).format(*numbers)
    return f"({d.one_of(*NOT_CAUSAL)})"


def far_apart(d: Draw) -> str:
    """A mask of runs of positions near the largest int32."""
    offset = d.one_of("", f" + {d.number(1, 5)}")
    run = RUN.replace("positions", "far")
    return f"({run}{AS_KEY} == {run}{AS_QUERY}) & ((far{offset}){AS_KEY} <= (far{offset}){AS_QUERY})"


def formula_mask(d: Draw) -> tuple[str, bool]:
    """A mask, and whether rows may be fully masked. Most masks are causal, with further terms in any order."""
    if d.has("far") and d.chance(0.4):
        return far_apart(d), False
    terms = [ordered(d), *(sees_itself(d) for _ in range(d.one_of(0, 1, 1 if d.relative else 2)))]
    if d.packed and d.chance(0.95):
        number = documents(d)
        terms.append(f"({number}{AS_QUERY} == {number}{AS_KEY})")
    if d.has("padding") and ((d.padded and d.chance(0.9)) or d.chance(0.3)):
        terms.append(padding_mask(d))
    d.random.shuffle(terms)
    mask, share = _joined(d, terms), d.random.random()
    if share < 0.7 or d.relative:
        return mask, True
    if share < 0.8:
        mask = d.one_of(f"{mask} | (keys == queries)", f"torch.eye(S, dtype=torch.bool) | ({mask})")
        return mask, False
    if share < 0.86:
        return f"({ordered(d)} & {formula(d, 1)}) | ({mask})", True
    if share < 0.93:
        return f"({mask}) {d.one_of('|', '&')} {formula(d, 1)}", True
    return formula(d, 3), True


def _joined(d: Draw, terms: list[str]) -> str:
    """The conjunction of the terms in their order, perhaps nested or negated twice."""
    if len(terms) > 2 and d.chance(0.3):
        return f"{terms[0]} & ({_joined(d, terms[1:])})"
    if d.chance(0.1):
        return f"~({' | '.join(f'~{term}' for term in terms)})"
    return " & ".join(terms)
