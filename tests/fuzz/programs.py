"""Random programs over a hidden state ``[B, S, D]``, as text that can be read, run and made smaller."""

from __future__ import annotations

import itertools
import linecache
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 - importing it registers torch.ops.transformers
from torch import Tensor, nn

from tests.fuzz.draw import Draw, Kind, Piece, Sizes
from tests.fuzz.pieces import PIECES

Forward = Callable[..., tuple[Tensor, ...]]

_NUMBERS = itertools.count()

PACKED = ("packed_documents",)
"""The causal pieces that keep sequences apart of which there are several in a row."""


@dataclass(frozen=True)
class Block:
    """``text`` makes ``y`` from ``x``, the result of block number ``source``, and perhaps ``z``, that of ``other``."""

    title: str
    text: str
    source: int
    other: int


@dataclass(frozen=True)
class Program:
    """Block 0 makes the first hidden state from the ids. What the head makes is returned, and what nothing reads."""

    sizes: Sizes
    inputs: tuple[str, ...]
    blocks: tuple[Block, ...]
    head: str
    shapes: dict[str, tuple[int, ...]]
    seed: int
    fixed: bool

    def text(self) -> str:
        """``forward``, as it is run."""
        unused = set(range(len(self.blocks))) - {n for b in self.blocks[1:] for n in (b.source, b.other) if n >= 0}
        lines = ["B, S = ids.shape"]
        for number, block in enumerate(self.blocks):
            lines += ["", f"# {block.title}", *_assignments(block), *block.text.split("\n"), f"h{number} = y"]
        results = [f"h{number}" for number in sorted(unused)]
        if self.head:
            lines += ["", "# head", f"x = h{len(self.blocks) - 1}", *self.head.split("\n")]
            results.insert(0, "y")
        lines += ["", f"return ({', '.join(results)},)"]
        body = "\n".join(f"    {line}" if line else "" for line in lines)
        return f"def forward(self, {', '.join(('ids', *self.inputs))}):\n{body}\n"

    def __str__(self) -> str:
        sizes = self.sizes
        shapes = {name: shape for name, shape in self.shapes.items() if f"self.{name}" in self.text()}
        weights = "\n".join(f"# self.{name}: {list(shape)}" for name, shape in shapes.items())
        numbers = f"# B, S = {sizes.B}, {sizes.S}\nH, E, D, V = {sizes.H}, {sizes.E}, {sizes.D}, {sizes.V}"
        return f"{numbers}\n{weights}\n\n{self.text()}"

    def forward(self) -> Forward:
        """The text as a function of ``self``, which has the weights, and the inputs. A new one every time."""
        text, name = self.text(), f"<program {next(_NUMBERS)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)  # for the source lines of refusals
        names: dict[str, Any] = {"torch": torch, "F": F, "math": math, "H": self.sizes.H, "E": self.sizes.E}
        names |= {"D": self.sizes.D, "V": self.sizes.V}
        exec(compile(text, name, "exec"), names)
        forward: Forward = names["forward"]
        return forward

    def weights(self) -> dict[str, nn.Parameter]:
        """Of ordinary size, and the same ones for every program that was made from this one."""
        made = {}
        for number, (name, shape) in enumerate(self.shapes.items()):
            generator = torch.Generator().manual_seed(self.seed + number)
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            made[name] = nn.Parameter(values / math.sqrt(shape[-1]))
        return made

    def without(self, number: int) -> Program:
        """The program with that block left out: what read its result reads its source's instead."""

        def moved(old: int) -> int:
            target = self.blocks[number].source if old == number else old
            return target - (target > number)

        kept = (block for place, block in enumerate(self.blocks) if place != number)
        blocks = tuple(replace(b, source=moved(b.source), other=moved(b.other)) for b in kept)
        return replace(self, blocks=blocks)

    def smaller(self) -> Iterator[Program]:
        """Every program with one thing less."""
        for number in reversed(range(1, len(self.blocks))):
            yield self.without(number)
        if self.head:
            yield replace(self, head="")


def _assignments(block: Block) -> list[str]:
    if block.source < 0:
        return []
    reads_other = "z" in block.text.replace("torch.zeros", "")
    return [f"x, z = h{block.source}, h{block.other}" if reads_other else f"x = h{block.source}"]


def draw_program(random: Random, sizes: Sizes, inputs: tuple[str, ...], packed: bool = False) -> Program:
    """An embedding, some pieces, and perhaps a loss."""
    d = Draw(random, sizes, inputs, packed=packed)
    seed = random.randrange(2**31)
    d.padded = not packed and d.has("padding") and d.chance(0.3)
    kinds = {Kind.POSITION_WISE: 5, Kind.CAUSAL: 4}
    if not d.padded and not packed and d.chance(0.6):
        kinds |= {Kind.MIXING: 2, Kind.ANY: 2}
    blocks = [_embedding(d)]
    for _ in range(d.number(2, 6)):
        blocks.append(_block(d, draw_piece(d, kinds), len(blocks)))
    head = d.write(Piece("head", Kind.ANY, _head, lambda d: True)) if d.chance(0.2) else ""
    return Program(sizes, inputs, tuple(blocks), head, d.shapes, seed, d.fixed)


def draw_piece(d: Draw, kinds: dict[Kind, int]) -> Piece:
    kind = d.random.choices([*kinds], [*kinds.values()])[0]
    possible = [piece for piece in PIECES if piece.kind is kind and piece.when(d)]
    packed = [piece for piece in possible if piece.name in PACKED]
    return d.one_of(*(packed if d.packed and packed and d.chance(0.95) else possible))


def program_of(d: Draw, *pieces: Piece) -> Program:
    """These pieces one after the other, each between two projections, so that there is something to fold."""
    blocks = [_embedding(d)]
    for piece in pieces:
        text = f"x = F.linear(x, {{}})\n{piece.write(d)}\ny = F.linear(y, {{}})".replace("{}", "w(D, D)")
        text = d.write(replace(piece, write=lambda d, text=text: text))
        blocks.append(Block(f"{piece.kind.value}: {piece.name}", text, len(blocks) - 1, len(blocks) - 1))
    return Program(d.sizes, d.inputs, tuple(blocks), "", d.shapes, 0, d.fixed)


def _embedding(d: Draw) -> Block:
    text = d.one_of("y = F.embedding(ids, w(V, D))", "y = F.embedding(ids, w(V, D)) * 1.5")
    return Block("embedding", d.write(Piece("", Kind.POSITION_WISE, lambda d: text, lambda d: True)), -1, -1)


def _block(d: Draw, piece: Piece, number: int) -> Block:
    text = d.write(piece)
    text += d.one_of("", "", "\ny = x + y", "\ny = x + y", "\ny = F.layer_norm(x + y, (D,))")
    source = number - 1 if d.chance(0.85) else d.random.randrange(number)
    return Block(f"{piece.kind.value}: {piece.name}", text, source, d.random.randrange(number))


def _head(d: Draw) -> str:
    """Something over the vocabulary: logits, log-probabilities, a loss; or the last row of each sequence."""
    logits = "logits = F.linear(x, w(V, D))\n"
    reduction = d.one_of("'sum'", "'none'", "'mean'")
    shifted = "logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)"
    return d.one_of(
        f"{logits}y = logits",
        f"{logits}y = F.cross_entropy({shifted})",
        f"{logits}y = F.cross_entropy({shifted}, reduction={reduction}, ignore_index=0)",
        f"{logits}y = F.cross_entropy(logits.reshape(-1, V), ids.roll(-1, 1).reshape(-1), label_smoothing=0.1)",
        f"{logits}y = F.cross_entropy(logits.flatten(0, 1), ids.reshape(-1).roll(-1))",
        f"{logits}y = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)",
        f"{logits}y = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])",
        f"{logits}y = F.nll_loss(logits.log_softmax(-1).flatten(0, 1), ids.flatten())",
        "y = x[torch.arange(B), (ids != 0).sum(1) - 1]",
        "y = (x * (ids != 0)[..., None]).sum(1)",
        "y = x[:, -1]",
    )
