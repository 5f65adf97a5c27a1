"""Random batches that form prefix trees: sequences of different lengths branch off earlier ones, padded or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from tests.fuzz.draw import Sizes

Rows = list[list[int]]

KEYS = ("positions", "padding", "kinds", "columns", "given", "documents", "far", "lengths", "prefix", "table")
"""The inputs that a program may have besides ``ids``. All are ``[B, S]``, except

``columns``  ``[1, S]``
``given``    ``[B, 1, S, S]`` or ``[1, 1, S, S]``: a mask, mostly causal
``lengths``  ``[B]``: the number of tokens without padding
``prefix``   ``[B]`` or ``[B, 1]``: the number of tokens that may see later tokens
``table``    ``[1, N]`` with ``N`` of at least ``S``, like a buffer

``documents`` are the numbers of packed sequences. ``far`` are positions near the largest int32.
"""

SHARES = {"padding": 0.5, "positions": 0.3, "documents": 0.25, "kinds": 0.25, "columns": 0.2, "given": 0.3}


def draw_inputs(random: Random) -> tuple[str, ...]:
    return tuple(name for name in KEYS if random.random() < SHARES.get(name, 0.12))


@dataclass(frozen=True)
class Given:
    """Properties of the inputs that are the same in all batches of a program.

    ``one_for_all``  one mask for all sequences.
    ``floats``       the mask has a float dtype.
    ``prefix_dims``  the number of dimensions of ``prefix``.
    ``longer``       the number of columns of ``table`` after the last column of the sequence.
    ``as_batch``     ``table`` has ``B * S`` columns instead.
    """

    one_for_all: bool = False
    floats: bool = False
    prefix_dims: int = 1
    longer: int = 0
    as_batch: bool = False

    def table_size(self, sizes: Sizes) -> int:
        return sizes.B * sizes.S if self.as_batch else sizes.S + self.longer


def draw_given(random: Random) -> Given:
    longer = random.choice([0, 0, 1, 2, random.randint(1, 9)])
    shares = random.random() < 1 / 3, random.random() < 1 / 2
    return Given(*shares, random.choice([1, 2]), longer, random.random() < 0.3)


def draw_batch(
    random: Random,
    sizes: Sizes,
    inputs: tuple[str, ...],
    mask: torch.dtype,
    given: Given,
    packed: bool = False,
    padded: bool = False,
) -> dict[str, Tensor]:
    """``ids`` and the named inputs. ``mask`` is the dtype of the padding mask.

    Inputs that are not random are functions of the tokens from the start of a sequence, so that equal prefixes stay
    equal. With ``padded``, padding is mostly on the left, and positions start after it.
    """
    on_the_left = random.random() < (0.7 if padded else 0.3)
    rows = _tree(random, sizes, whole=random.random() < 0.3)
    starts, numbers = [], []
    if packed:
        rows, starts, numbers = _packed(random, sizes, short=padded or random.random() < 0.2)
    hide = random.choice([None, None, random.randrange(1, 4)])
    hidden = _pad(rows, sizes.S, hide, on_the_left)
    ids = torch.tensor(rows)
    padding = (~torch.tensor(hidden)).to(mask)
    positions = _positions(random, ids, padding, padded)
    documents = _documents(random, ids)
    if packed and random.random() < 0.8:
        positions = torch.tensor(_filled(starts, sizes.S, on_the_left))
    if packed and random.random() < 0.8:
        documents = torch.tensor(_filled(numbers, sizes.S, on_the_left))
    table_columns = torch.arange(given.table_size(sizes))[None, :]
    prefix = torch.tensor([random.randint(0, sizes.S) for _ in range(sizes.B)])
    batch = {
        "ids": ids,
        "positions": positions,
        "padding": padding,
        "kinds": ids.remainder(2) if random.random() < 0.5 else ids.cumsum(1).remainder(2),
        "columns": torch.arange(sizes.S)[None, :].remainder(random.randint(1, sizes.S)),
        "given": _mask(random, ids, given),
        "documents": documents,
        "far": _far(random, positions),
        "lengths": padding.long().sum(1),
        "prefix": prefix if given.prefix_dims == 1 else prefix[:, None],
        "table": _table(random, table_columns),
    }
    return {name: batch[name] for name in ("ids", *inputs)}


def _tree(random: Random, sizes: Sizes, whole: bool) -> Rows:
    """Sequences that branch off earlier ones. With few tokens to choose from, some also agree by chance."""
    rows: Rows = []
    for _ in range(sizes.B):
        parent = random.choice(rows) if rows and random.random() < 0.85 else []
        length = sizes.S if whole else random.randint(1, sizes.S)
        kept = parent[: max(random.randint(0, length), random.randint(0, length))]
        rows.append(kept + [random.randrange(1, sizes.V) for _ in range(length - len(kept))])
    return rows


def _packed(random: Random, sizes: Sizes, short: bool) -> tuple[Rows, Rows, Rows]:
    """Rows of packed sequences from a tree, with their positions and the numbers of the sequences.

    The last sequence of a row is cut off at the end. With ``short``, some rows have fewer than ``S`` tokens.
    """
    rows, positions, numbers = ([[] for _ in range(sizes.B)] for _ in range(3))
    sequences = _tree(random, replace(sizes, B=sizes.B * sizes.S, S=random.randint(2, 6)), whole=False)
    used: Rows = []
    number_of = random.choice([lambda count: count, lambda count: count + 1, lambda count: count % 2 + 1])
    for row, columns, counts in zip(rows, positions, numbers, strict=True):
        length = random.randint(2, sizes.S) if short else sizes.S
        while len(row) < length:
            used.append(random.choice(used) if used and random.random() < 0.3 else sequences.pop())
            sequence = used[-1][: length - len(row)]
            first = random.choice([0, 0, 0, 0, len(row)])
            counts += [number_of(len(set(counts)))] * len(sequence)
            row += sequence
            columns += [min(first + place, sizes.S - 1) for place in range(len(sequence))]
    return rows, positions, numbers


def _filled(rows: Rows, length: int, on_the_left: bool) -> Rows:
    """The rows, filled up with zeros like :func:`_pad`."""
    padding = [[0] * (length - len(row)) for row in rows]
    return [zeros + row if on_the_left else row + zeros for zeros, row in zip(padding, rows, strict=True)]


def _pad(rows: Rows, length: int, hide: int | None, on_the_left: bool) -> list[list[bool]]:
    """Pad with token 0, in place. Returns the entries that the padding mask hides: padding and the token ``hide``."""
    hidden = []
    for row in rows:
        count = length - len(row)
        mask = [token == hide for token in row]
        row[:] = [0] * count + row if on_the_left else row + [0] * count
        hidden.append([True] * count + mask if on_the_left else mask + [True] * count)
    return hidden


def _far(random: Random, positions: Tensor) -> Tensor:
    """Positions up to the largest int32, or slightly beyond it, so that they wrap around."""
    last = 2**31 - 1 - int(positions.max()) + random.choice([-2, -1, 0, 0, 2])
    return (random.choice([positions, torch.arange(positions.shape[1]).expand_as(positions)]) + last).int()


def _table(random: Random, columns: Tensor) -> Tensor:
    """Numbers of columns, in order, reversed or remainders, or zeros and ones by remainder."""
    rest = columns.remainder(random.randint(2, 5))
    return random.choice([columns, columns.flip(1), rest, (rest != 1).long(), (rest != 0).long()]).contiguous()


def _documents(random: Random, ids: Tensor) -> Tensor:
    """Numbers of sequences: counts of a token, the tokens up to 2, or random numbers."""
    anything = [[random.randint(0, 2) for _ in row] for row in ids.tolist()]
    counted = (ids == 1).cumsum(1)
    return random.choice([counted, counted, ids.clamp(max=2), torch.tensor(anything)]).contiguous()


def _mask(random: Random, ids: Tensor, given: Given) -> Tensor:
    """A mask that hides some earlier keys, by the tokens of query and key. One mask in eight is not causal."""
    visible = (ids[:, :, None] * random.randint(1, 5) + ids[:, None, :]) % random.randint(2, 4) != 0
    if random.random() < 7 / 8:
        visible = visible.tril() | torch.eye(ids.shape[1], dtype=torch.bool)
    visible = visible[: 1 if given.one_for_all else len(ids), None]
    floor = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    return torch.where(visible, 0.0, floor) if given.floats else visible


def _positions(random: Random, ids: Tensor, padding: Tensor, padded: bool) -> Tensor:
    """From 0 to ``S - 1``: columns, counts of tokens, columns of packed documents, or random numbers."""
    shape = ids.shape
    columns = torch.arange(shape[1]).expand(shape)
    match random.choice(["columns", "tokens", "documents", "anything", *["tokens"] * 6 * padded]):
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
