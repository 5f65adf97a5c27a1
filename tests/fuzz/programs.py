"""Random programs over a hidden state ``[B, S, D]``, as text that can be read, run and reduced."""

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
from tests.fuzz.heads import EXACT, draw_head
from tests.fuzz.outputs import draw_outputs
from tests.fuzz.pieces import PIECES
from tests.fuzz.regions import Times

Forward = Callable[..., tuple[Tensor, ...]]

_NUMBERS = itertools.count()

PACKED = ("packed_documents", "masked_by_a_formula", "boosted", "hidden_by_a_number", "added_by_baddbmm")
"""The causal pieces that mostly keep packed sequences apart."""

PADDED = (*PACKED[1:], "fused_masked", "written_out", "with_sinks", "attention_cut_off")
"""The causal pieces that mostly hide padding, and do not depend on the column in any other way."""

BY_COLUMN = ("learned_columns", "made_in_the_program", "masked_by_a_made_table", "counted_indices", "the_same_twice")
"""Pieces that make a row depend on its column, so that rows at different columns share nothing."""


@dataclass(frozen=True)
class Block:
    """``text`` computes ``y`` from ``x``, the result of block ``source``, and maybe ``z``, the result of ``other``."""

    title: str
    text: str
    source: int
    other: int


@dataclass(frozen=True)
class Program:
    """Blocks that compute hidden states. Block 0 embeds the ids.

    The program returns the result of ``head``, the ``outputs``, and all hidden states that no block reads. Its masks
    hide padding if ``padded``.
    """

    sizes: Sizes
    inputs: tuple[str, ...]
    blocks: tuple[Block, ...]
    head: str
    shapes: dict[str, tuple[int, ...]]
    seed: int
    fixed: bool
    outputs: str = ""
    padded: bool = False

    def text(self) -> str:
        """The source of ``forward``."""
        unused = set(range(len(self.blocks))) - {n for b in self.blocks[1:] for n in (b.source, b.other) if n >= 0}
        lines = ["B, S = ids.shape"]
        for number, block in enumerate(self.blocks):
            lines += ["", f"# {block.title}", *_assignments(block), *block.text.split("\n"), f"h{number} = y"]
        results = [f"h{number}" for number in sorted(unused)]
        if self.head:
            lines += ["", "# head", f"x = h{len(self.blocks) - 1}", *self.head.split("\n")]
            results.insert(0, "y")
        if self.outputs:
            lines += ["", "# outputs", f"y = h{len(self.blocks) - 1}", *self.outputs.split("\n")]
            results = ["*results", *results[:-1]]
        lines += ["", f"return ({', '.join(results)},)"]
        body = "\n".join(f"    {line}" if line else "" for line in lines)
        return f"def forward(self, {', '.join(('ids', *self.inputs))}):\n{body}\n"

    def __str__(self) -> str:
        sizes = self.sizes
        shapes = {name: shape for name, shape in self.shapes.items() if f"self.{name}" in self.text()}
        weights = "\n".join(f"# self.{name}: {list(shape)}" for name, shape in shapes.items())
        numbers = (
            f"# B, S = {sizes.B}, {sizes.S}\nH, E, D, V, K = {sizes.H}, {sizes.E}, {sizes.D}, {sizes.V}, {sizes.K}"
        )
        return f"{numbers}\n{weights}\n\n{self.text()}"

    def forward(self) -> Forward:
        """A new function of the text. Its arguments are an object with the weights, and the inputs."""
        text, name = self.text(), f"<program {next(_NUMBERS)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)  # for the source lines of refusals
        names: dict[str, Any] = {"torch": torch, "F": F, "math": math, "H": self.sizes.H, "E": self.sizes.E}
        names |= {"Times": Times, "D": self.sizes.D, "V": self.sizes.V, "K": self.sizes.K}
        exec(compile(text, name, "exec"), names)
        forward: Forward = names["forward"]
        return forward

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights by name. They depend on the seed alone, so reduced programs have the same weights."""
        weights = {}
        for number, (name, shape) in enumerate(self.shapes.items()):
            generator = torch.Generator().manual_seed(self.seed + number)
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            weights[name] = nn.Parameter(values / math.sqrt(shape[-1]))
        return weights

    def is_narrow(self) -> bool:
        """Does the program compute results in float32? Masks and exact logits do not count."""
        text = self.text().replace("mask = mask.float()", "").replace(EXACT, "")
        return "torch.float32)" in text or ".float()" in text

    def without(self, number: int) -> Program:
        """The program without a block. Blocks that read its result read the result of its source instead."""

        def renumbered(old: int) -> int:
            target = self.blocks[number].source if old == number else old
            return target - (target > number)

        kept = (block for i, block in enumerate(self.blocks) if i != number)
        blocks = tuple(replace(b, source=renumbered(b.source), other=renumbered(b.other)) for b in kept)
        return replace(self, blocks=blocks)

    def smaller(self) -> Iterator[Program]:
        """The programs without one of the blocks, without the head, and without the outputs."""
        for number in reversed(range(1, len(self.blocks))):
            yield self.without(number)
        if self.head:
            yield replace(self, head="")
        if self.outputs:
            yield replace(self, outputs="")


def _assignments(block: Block) -> list[str]:
    if block.source < 0:
        return []
    reads_other = "z" in block.text.replace("torch.zeros", "")
    return [f"x, z = h{block.source}, h{block.other}" if reads_other else f"x = h{block.source}"]


def draw_program(
    random: Random,
    sizes: Sizes,
    inputs: tuple[str, ...],
    packed: bool = False,
    only: tuple[str, ...] = (),
    most: int = 4,
    traced: bool = False,
) -> Program:
    """An embedding, up to ``most`` pieces, and maybe a head or outputs. With ``only``, mostly pieces of these names."""
    d = Draw(random, sizes, inputs, packed=packed, only=only, traced=traced)
    seed = random.randrange(2**31)
    d.padded = d.has("padding") and d.chance(0.05 if packed else 0.4)
    d.relative = (packed or d.padded) and d.chance(0.8)
    kinds = {Kind.POSITION_WISE: 5, Kind.CAUSAL: 4}
    share = d.random.random()
    has_head = share < 0.3
    if not d.padded and not packed and d.chance(0.2 if has_head else 0.6):  # behind mixing pieces every row is read
        kinds |= {Kind.MIXING: 2, Kind.ANY: 2}
    blocks = [_embedding(d)]
    for i in range(d.number(1, min(3 if d.relative else 4, most))):
        piece_kinds = {Kind.CAUSAL: 1} if (packed or d.relative) and not i else kinds
        blocks.append(_block(d, draw_piece(d, piece_kinds), len(blocks)))
    head = d.write(Piece("head", Kind.ANY, draw_head, lambda d: True)) if has_head else ""
    outputs = d.write(Piece("outputs", Kind.ANY, draw_outputs, lambda d: True)) if share > 0.7 else ""
    return Program(sizes, inputs, tuple(blocks), head, d.shapes, seed, d.fixed, outputs, d.padded)


def draw_piece(d: Draw, kinds: dict[Kind, int]) -> Piece:
    kind = d.random.choices([*kinds], [*kinds.values()])[0]
    named = [piece for piece in PIECES if piece.name in d.only and piece.when(d)]
    if named and (kind is not Kind.POSITION_WISE or d.chance(0.5)):
        return d.one_of(*named)
    possible = [piece for piece in PIECES if piece.kind is kind and piece.when(d)]
    if d.relative:
        possible = [piece for piece in possible if piece.name not in BY_COLUMN]
    preferred = [piece for piece in possible if piece.name in (PACKED if d.packed else PADDED)]
    return d.one_of(*(preferred if (d.packed or d.relative) and preferred and d.chance(0.95) else possible))


def _embedding(d: Draw) -> Block:
    text = d.one_of("y = F.embedding(ids, w(V, D))", "y = F.embedding(ids, w(V, D)) * 1.5")
    return Block("embedding", d.write(Piece("", Kind.POSITION_WISE, lambda d: text, lambda d: True)), -1, -1)


def _block(d: Draw, piece: Piece, number: int) -> Block:
    text = d.write(piece)
    text += d.one_of("", "", "\ny = x + y", "\ny = x + y", "\ny = F.layer_norm(x + y, (D,))")
    source = number - 1 if d.chance(0.85) else d.random.randrange(number)
    return Block(f"{piece.kind.value}: {piece.name}", text, source, d.random.randrange(number))
