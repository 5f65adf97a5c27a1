"""The source of random choices for programs: sizes that collide, weights, and the registry of pieces."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import TypeVar

T = TypeVar("T")

OTHER_SHAPES = ("columns", "given", "lengths", "prefix", "table")
"""The inputs that do not have one entry per row."""


class Kind(Enum):
    """How a piece reads rows, and so whether the pieces after it may fold."""

    POSITION_WISE = "position-wise"
    CAUSAL = "causal"
    MIXING = "mixing"
    ANY = "any"


@dataclass(frozen=True)
class Sizes:
    """``B`` sequences of ``S`` columns, ``D = H * E`` features in ``H`` heads, ``V`` tokens."""

    B: int
    S: int
    H: int
    E: int
    V: int

    @property
    def D(self) -> int:  # noqa: N802 - as in the programs
        return self.H * self.E

    @property
    def K(self) -> int:  # noqa: N802
        """A number that is larger than every entry of an integer input."""
        return max(self.V, self.S)


def draw_sizes(random: Random) -> Sizes:
    """Small sizes. Some are often equal, so that no size reveals the meaning of a dimension."""
    batch, columns = random.randint(2, 6), random.randint(2, 9)
    heads, width = random.randint(1, 4), random.choice([2, 2, 4])
    if random.random() < 0.4:
        batch = heads = random.randint(2, 4)
    match random.choice(["none", "columns and features", "columns and head", "columns and batch", "all"]):
        case "columns and features":
            columns = heads * width
        case "columns and head":
            columns = width
        case "columns and batch":
            columns = batch
        case "all":
            batch = columns = heads = width
    return Sizes(batch, columns, heads, width, random.choice([4, 6, 12]))


@dataclass
class Draw:
    """The source of all random choices for one program.

    ``inputs``    the inputs that the program may read besides ``ids``.
    ``shapes``    the shapes of the weights, by name.
    ``fixed``     the program works only for this number of sequences or columns.
    ``padded``    every causal mask hides the padding.
    ``packed``    attention mostly stays within packed sequences.
    ``relative``  rows depend on earlier rows, but mostly not on their column.
    ``only``      names of pieces to draw mostly.
    ``traced``    Dynamo traces the program, and so recognises an ``autograd.Function``.
    """

    random: Random
    sizes: Sizes
    inputs: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: bool = False
    padded: bool = False
    packed: bool = False
    relative: bool = False
    only: tuple[str, ...] = ()
    traced: bool = False

    def write(self, piece: Piece) -> str:
        """The piece's text, with a new parameter for every ``w(shape)`` in it."""
        return re.sub(r"\bw\(([^()]*)\)", lambda match: self._weight(match[1]), piece.write(self))

    def _weight(self, shape: str) -> str:
        name = f"w{len(self.shapes)}"
        self.shapes[name] = tuple(self._size(size) for size in shape.split(","))
        return f"self.{name}"

    def _size(self, text: str) -> int:
        factors = [factor.strip() for factor in text.split("*")]
        self.fixed |= "B" in factors or "S" in factors
        return math.prod(int(factor) if factor.isdigit() else getattr(self.sizes, factor) for factor in factors)

    def one_of(self, *choices: T) -> T:
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def number(self, least: int, most: int) -> int:
        return self.random.randint(least, max(least, most))

    def token(self) -> int:
        return self.random.randrange(self.sizes.V)

    def has(self, name: str) -> bool:
        return name in self.inputs

    def keys(self) -> str:
        """The name of an integer input with one entry per row."""
        return self.one_of("ids", *(name for name in self.inputs if name not in ("far", *OTHER_SHAPES)))

    def column_numbers(self) -> str:
        """Text for ``[S]``, ``[1, S]`` or ``[B, S]``: columns, mostly from a sequence's start if ``relative``."""
        if (self.packed or self.relative) and self.chance(0.95):
            return "positions" if self.has("positions") else "(ids % S)"
        if self.padded and self.chance(0.5):
            return "(padding.long().cumsum(-1) - 1).clamp(min=0)"
        return self.one_of("torch.arange(S)", *(name for name in ("columns", "positions") if self.has(name)))


@dataclass(frozen=True)
class Piece:
    """``write`` returns text that computes ``y`` from ``x`` and an earlier ``z``, all ``[B, S, D]``."""

    name: str
    kind: Kind
    write: Callable[[Draw], str]
    when: Callable[[Draw], bool]


PIECES: list[Piece] = []


def piece(
    kind: Kind, when: Callable[[Draw], bool] = lambda d: True
) -> Callable[[Callable[[Draw], str]], Callable[[Draw], str]]:
    """Register a piece for the draws where ``when`` holds."""

    def register(write: Callable[[Draw], str]) -> Callable[[Draw], str]:
        PIECES.append(Piece(write.__name__, kind, write, when))
        return write

    return register


ACTIVATIONS = ("F.gelu({})", "torch.tanh({})", "F.silu({})", "F.relu({})", "torch.sin({})", "torch.sigmoid({})")


def activated(d: Draw, text: str) -> str:
    return d.one_of(*ACTIVATIONS).format(text)
