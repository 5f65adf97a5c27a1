"""Masks as text: causal ones, and similar ones that are not causal.

``queries`` and ``keys`` are column numbers, ``[S, 1]`` and ``[1, S]``.
"""

from __future__ import annotations

from tests.fuzz.draw import Draw

CAUSAL = (
    "keys <= queries",
    "queries >= keys",
    "~(keys > queries)",
    "keys < queries + 1",
    "keys - 1 < queries",
    "torch.ones(S, S, dtype=torch.bool).tril()",
    "~torch.ones(S, S, dtype=torch.bool).triu(1)",
    "torch.ones(S, S).tril() == 1",
    "torch.tril(torch.ones(S, S)) != 0",
    "torch.full((S, S), True).tril()",
    "queries - keys >= 0",
    "keys - queries < 1",
)
NOT_CAUSAL = (
    "keys <= queries + 1",
    "keys >= queries",
    "~(keys < queries)",
    "torch.ones(S, S, dtype=torch.bool).tril(1)",
    "torch.ones(S, S, dtype=torch.bool).triu()",
    "(keys <= queries).mT",
    "~(keys > queries + 1)",
    "keys < queries + 2",
    "(keys <= queries) | (keys == queries + 1)",
    "(keys <= queries) | (ids[:, None, None, :] == ids[:, None, :, None])",
    "(keys <= queries) | (keys > 1)",
    "keys * 0 <= queries",
    "keys != queries",
    "torch.arange(1)[None, :] <= queries",
    "keys <= S - 1 - queries",
    "queries - keys > -2",
    "keys - queries >= 0",
    "(queries - keys) * 2 >= -1",
)
INDICES = "queries, keys = torch.arange(S)[:, None], torch.arange(S)[None, :]"
LOWEST = "torch.finfo(x.dtype).min"


def window(d: Draw) -> str:
    """A window over the last columns, the query's own included."""
    width = d.number(1, d.sizes.S)
    return d.one_of(
        f"(keys > queries - {width})",
        f"(queries < keys + {width})",
        f"~(keys <= queries - {width})",
        f"(queries - keys < {width})",
    )


def padding_mask(d: Draw) -> str:
    """A mask of the keys that are no padding."""
    return d.one_of(
        "(padding != 0)[:, None, None, :]", "padding[:, None, None, :].bool()", "(padding[:, None, None] != 0)"
    )


def causal_mask(d: Draw) -> tuple[str, bool]:
    """A causal mask, ``[S, S]`` or ``[B, 1, S, S]``, and whether rows may be fully masked."""
    mask, fully_masked = f"({d.one_of(*CAUSAL)})", False
    if d.chance(0.3):
        mask += f" & {window(d)}"
    if d.chance(0.2) and not d.padded:
        name = d.one_of("ids", *(name for name in ("kinds",) if d.has(name)))
        mask += f" & ({name}[:, None, None, :] == {name}[:, None, :, None])"
    elif d.has("padding") and (d.padded or d.chance(0.6)):
        mask += f" & {padding_mask(d)}"
        fully_masked = True
        if d.chance(0.25) and not d.padded:
            mask, fully_masked = f"{mask} | (keys == queries)", False
    return mask, fully_masked
