"""One example: a random program, batches for it, and the way in which they are compared. All of it from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor, nn

from tests.fuzz.batches import draw_batch, draw_given, draw_inputs
from tests.fuzz.draw import Sizes, draw_sizes
from tests.fuzz.programs import Program, draw_program

Batch = dict[str, Tensor]

FEW = Sizes(B=4, S=6, H=2, E=4, V=6)
"""The same sizes for all that inductor compiles, so that it finds some kernels in its cache."""


@dataclass(frozen=True)
class Example:
    """``route`` is "passes" (the pipeline, and the folded graph as it is), or an inner backend of ``torch.compile``."""

    seed: int
    program: Program
    batches: list[Batch]
    route: str
    gradients: bool
    dynamic: bool
    skip: bool

    def __str__(self) -> str:
        settings = f"seed {self.seed}: route={self.route} gradients={self.gradients} dynamic={self.dynamic}"
        batch = "\n".join(f"# {name} = {_written(tensor)}" for name, tensor in self.batches[0].items())
        return f"# {settings} skip={self.skip}\n# the first batch:\n{batch}\n{self.program}"


def _written(tensor: Tensor) -> str:
    return f"{tensor.tolist()}" + ("" if tensor.dtype == torch.int64 else f" {tensor.dtype}")


@dataclass(frozen=True)
class Call:
    """A batch, and what the plain program makes of it."""

    batch: Batch
    wanted: tuple[Tensor, ...]


@dataclass
class Outcome:
    """What came of the examples: how many, how many folded, met a refusal, could not be compared, and so on."""

    examples: int = 0
    folded: int = 0
    refused: int = 0
    discarded: int = 0
    skipped_padding: int = 0
    tokens: int = 0
    compact_tokens: int = 0
    routes: dict[str, int] = field(default_factory=dict)

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


class Module(nn.Module):
    """The program with its weights."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, weight in program.weights().items():
            self.register_parameter(name, weight)
        self.run = program.forward()
        self.error = 1e-4 if program.is_narrow() else 1e-9

    def forward(self, **batch: Tensor) -> tuple[Tensor, ...]:
        return self.run(self, **batch)


def draw_example(seed: int, compiled: float = 0.1, inductor: float = 0.0, only: tuple[str, ...] = ()) -> Example:
    """Everything about an example follows from its seed, and from what is asked for. Inductor's are short: it is slow.

    ``compiled`` and ``inductor`` are the shares that go through ``torch.compile``, without inductor and with it;
    ``only`` are names of pieces that are to be most of the program.
    """
    random = Random(seed)
    route = _route(Random(f"route of {seed}").random(), compiled, inductor)
    sizes, inputs = FEW if route == "inductor" else draw_sizes(random), draw_inputs(random)
    packed = not {"positions", "documents"}.isdisjoint(inputs) and random.random() < 0.5
    if packed:
        sizes = replace(sizes, B=random.choice([1, 1, 2]), S=12 if sizes is FEW else random.randint(4, 14))
    most = 2 if route == "inductor" else 4
    program = draw_program(random, sizes, inputs, packed, only, most, traced=route != "passes")
    gradients, dynamic, skip = (random.random() < 1 / 3 for _ in range(3))
    dynamic &= route != "passes"
    gradients |= route == "inductor"
    other = sizes
    if dynamic and not program.fixed:
        other = replace(sizes, B=random.randint(min(sizes.B, 2), sizes.B + 1), S=random.randint(2, sizes.S))
    mask = random.choice([torch.int64, torch.int32, torch.bool])
    given = draw_given(random)
    settings = {"packed": packed, "padded": program.padded}
    batches = [draw_batch(random, of, inputs, mask, given, **settings) for of in (sizes, sizes, other)]
    skip &= route == "passes" and not program.outputs
    skip &= not any("batch_and_heads_swapped" in block.title for block in program.blocks)  # zeros of rows left out move
    return Example(seed, program, batches, route, gradients, dynamic, skip)


def _route(draw: float, compiled: float, inductor: float) -> str:
    if draw > 1 - inductor:
        return "inductor"
    return "aot_eager" if draw < compiled / 5 else "eager" if draw < compiled else "passes"
