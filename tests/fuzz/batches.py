"""Random batches that are prefix trees: sequences that branch off earlier ones, of different lengths, padded or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from tests.fuzz.draw import Sizes

Rows = list[list[int]]

KEYS = ("positions", "padding", "kinds", "columns", "given")
"""The inputs that a program may have next to ``ids``: ``[B, S]``, ``[1, S]`` for ``columns``.

``given`` is a mask of ``[B, 1, S, S]`` or ``[1, 1, S, S]``, mostly causal.
"""


def draw_inputs(random: Random) -> tuple[str, ...]:
    return tuple(name for name in KEYS if random.random() < (0.5 if name == "padding" else 0.3))


@dataclass(frozen=True)
class Given:
    """What is the same about the masks of all batches of a program: is there one for all sequences, and of floats?"""

    one_for_all: bool = False
    floats: bool = False


def draw_batch(
    random: Random, sizes: Sizes, inputs: tuple[str, ...], mask: torch.dtype, given: Given, packed: bool = False
) -> dict[str, Tensor]:
    """``ids`` and the given inputs; ``mask`` is the type of the padding mask.

    What is not random in them is a function of each sequence from its start, so that equal prefixes stay equal.
    """
    rows, starts = _packed(random, sizes) if packed else (_tree(random, sizes, whole=random.random() < 0.3), [])
    hidden = _pad(random, rows, sizes.S)
    ids = torch.tensor(rows)
    padding = (~torch.tensor(hidden)).to(mask)
    batch = {
        "ids": ids,
        "positions": _positions(random, ids, padding),
        "padding": padding,
        "kinds": ids.remainder(2) if random.random() < 0.5 else ids.cumsum(1).remainder(2),
        "columns": torch.arange(sizes.S)[None, :].remainder(random.randint(1, sizes.S)),
        "given": _mask(random, ids, given),
    }
    if packed and random.random() < 0.8:
        batch["positions"] = torch.tensor(starts)
    return {name: batch[name] for name in ("ids", *inputs)}


def _tree(random: Random, sizes: Sizes, whole: bool) -> Rows:
    """Each sequence goes on where an earlier one is left; with few tokens to choose from, some meet by chance."""
    rows: Rows = []
    for _ in range(sizes.B):
        parent = random.choice(rows) if rows and random.random() < 0.85 else []
        length = sizes.S if whole else random.randint(1, sizes.S)
        kept = parent[: max(random.randint(0, length), random.randint(0, length))]
        rows.append(kept + [random.randrange(1, sizes.V) for _ in range(length - len(kept))])
    return rows


def _packed(random: Random, sizes: Sizes) -> tuple[Rows, Rows]:
    """Rows full of sequences of a tree, cut where a row ends, and their positions."""
    rows: Rows = [[] for _ in range(sizes.B)]
    positions: Rows = [[] for _ in range(sizes.B)]
    sequences = _tree(random, replace(sizes, B=sizes.B * sizes.S, S=random.randint(2, 6)), whole=False)
    for row, columns in zip(rows, positions, strict=True):
        while len(row) < sizes.S:
            sequence = sequences.pop()[: sizes.S - len(row)]
            first = random.choice([0, 0, 0, 0, len(row)])
            row += sequence
            columns += [min(first + place, sizes.S - 1) for place in range(len(sequence))]
    return rows, positions


def _pad(random: Random, rows: Rows, length: int) -> list[list[bool]]:
    """Pad with token 0, mostly on the right; returns which entries the padding mask hides, maybe tokens too."""
    hide = random.choice([None, None, random.randrange(1, 4)])
    on_the_left = random.random() < 0.3
    hidden = []
    for row in rows:
        count = length - len(row)
        mask = [token == hide for token in row]
        row[:] = [0] * count + row if on_the_left else row + [0] * count
        hidden.append([True] * count + mask if on_the_left else mask + [True] * count)
    return hidden


def _mask(random: Random, ids: Tensor, given: Given) -> Tensor:
    """Some earlier keys are hidden, by the tokens at both ends; one time in eight the mask is not causal."""
    seen = (ids[:, :, None] * random.randint(1, 5) + ids[:, None, :]) % random.randint(2, 4) != 0
    if random.random() < 7 / 8:
        seen = seen.tril() | torch.eye(ids.shape[1], dtype=torch.bool)
    seen = seen[: 1 if given.one_for_all else len(ids), None]
    floor = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    return torch.where(seen, 0.0, floor) if given.floats else seen


def _positions(random: Random, ids: Tensor, padding: Tensor) -> Tensor:
    """From 0 to ``S - 1``: columns, tokens so far, columns of packed documents, or just anything."""
    shape = ids.shape
    columns = torch.arange(shape[1]).expand(shape)
    match random.choice(["columns", "tokens", "documents", "anything"]):
        case "columns":
            positions = columns
        case "tokens":
            positions = (padding.long().cumsum(1) - 1).clamp(min=0)
        case "documents":
            starts = torch.where((ids == 1) | (columns == 0), columns, 0).cummax(1).values
            positions = columns - starts
        case _:
            positions = torch.tensor([[random.randrange(shape[1]) for _ in range(shape[1])] for _ in range(shape[0])])
    return positions.contiguous()
