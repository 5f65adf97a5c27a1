"""One example: a random program, its batches and how to compare them, all drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor, nn

from tests.fuzz.batches import draw_batch, draw_given, draw_inputs
from tests.fuzz.draw import Sizes, draw_sizes
from tests.fuzz.programs import Program, draw_program

Batch = dict[str, Tensor]

INDUCTOR_SIZES = Sizes(B=4, S=6, H=2, E=4, V=6)
"""The sizes of every example for inductor, so that inductor finds some kernels in its cache."""


@dataclass(frozen=True)
class Example:
    """``route`` is "passes" (the folded graph runs uncompiled) or an inner backend for ``torch.compile``."""

    seed: int
    program: Program
    batches: list[Batch]
    route: str
    gradients: bool
    dynamic: bool
    skip: bool

    def __str__(self) -> str:
        settings = f"seed {self.seed}: route={self.route} gradients={self.gradients} dynamic={self.dynamic}"
        batch = "\n".join(f"# {name} = {_as_text(tensor)}" for name, tensor in self.batches[0].items())
        return f"# {settings} skip={self.skip}\n# the first batch:\n{batch}\n{self.program}"


def _as_text(tensor: Tensor) -> str:
    return f"{tensor.tolist()}" + ("" if tensor.dtype == torch.int64 else f" {tensor.dtype}")


@dataclass(frozen=True)
class Call:
    """A batch, and the results of the plain program."""

    batch: Batch
    expected: tuple[Tensor, ...]


@dataclass
class Outcome:
    """Counts of the examples: how many folded, met a refusal, could not be compared (``discarded``), computed only
    some rows (``unread``), and so on."""

    examples: int = 0
    folded: int = 0
    refused: int = 0
    discarded: int = 0
    unread: int = 0
    tokens: int = 0
    compact_tokens: int = 0
    routes: dict[str, int] = field(default_factory=dict)

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


class Module(nn.Module):
    """The program with its weights, and the tolerance of its results, relative to the largest entry."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, weight in program.weights().items():
            self.register_parameter(name, weight)
        self.run = program.forward()
        self.tolerance = 1e-4 if program.is_narrow() else 1e-9

    def forward(self, **batch: Tensor) -> tuple[Tensor, ...]:
        return self.run(self, **batch)


def draw_example(seed: int, compiled: float = 0.1, inductor: float = 0.0, only: tuple[str, ...] = ()) -> Example:
    """The example of a seed. Equal arguments give equal examples.

    ``compiled`` is the share of examples through ``torch.compile`` without inductor, ``inductor`` the share with it.
    Programs for inductor are short, because it is slow. ``only`` are names of pieces to draw mostly.
    """
    random = Random(seed)
    route = _route(Random(f"route of {seed}").random(), compiled, inductor)
    sizes, inputs = INDUCTOR_SIZES if route == "inductor" else draw_sizes(random), draw_inputs(random)
    packed = not {"positions", "documents"}.isdisjoint(inputs) and random.random() < 0.5
    if packed:
        sizes = replace(sizes, B=random.choice([1, 1, 2]), S=12 if sizes is INDUCTOR_SIZES else random.randint(4, 14))
    most = 2 if route == "inductor" else 4
    program = draw_program(random, sizes, inputs, packed, only, most, traced=route != "passes")
    gradients, dynamic, skip = (random.random() < 1 / 3 for _ in range(3))
    dynamic &= route != "passes"
    gradients |= route == "inductor"
    other_sizes = sizes
    if dynamic and not program.fixed:
        other_sizes = replace(sizes, B=random.randint(min(sizes.B, 2), sizes.B + 1), S=random.randint(2, sizes.S))
    mask = random.choice([torch.int64, torch.int32, torch.bool])
    given = draw_given(random)
    settings = {"packed": packed, "padded": program.padded}
    batches = [draw_batch(random, size, inputs, mask, given, **settings) for size in (sizes, sizes, other_sizes)]
    skip &= route == "passes" and not program.outputs
    # After a swap of batch and heads, the zeros of omitted rows are in other rows.
    skip &= not any("batch_and_heads_swapped" in block.title for block in program.blocks)
    return Example(seed, program, batches, route, gradients, dynamic, skip)


def _route(draw: float, compiled: float, inductor: float) -> str:
    if draw > 1 - inductor:
        return "inductor"
    return "aot_eager" if draw < compiled / 5 else "eager" if draw < compiled else "passes"
