"""The index arrays of a call's plan, as a folded program takes them: described here once.

Placeholders, fake inputs, the shapes that ``verify`` computes with, the schemas of our ops and the arrays of each call
all follow :data:`PLAN_ARRAYS`. Most are int64, so that nothing but a name tells one from another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Code = Literal["torch", "triton"]
"""The code that runs attention on the tree: ``kernels.torch_attention`` or ``kernels.triton_attention``."""

Part = Literal["always", "tree", "lists"] | Code
"""The arrays that are passed together: always, for attention on the tree, for gradients, for the code of attention."""

Size = TypeVar("Size")


@dataclass(frozen=True, slots=True)
class PlanArray:
    """An array of the plan. Its ``shape`` is of numbers and names of sizes.

    ``nodes`` is T', ``rows`` is B * S; every other name is a size of its own, known only in the call.
    """

    name: str
    shape: tuple[str | int, ...]
    part: Part
    dtype: torch.dtype = torch.int64

    @property
    def placeholder(self) -> str:
        """The name of the folded program's input."""
        return f"radix_{self.name}"

    def sized(self, sizes: Mapping[str, Size]) -> tuple[Size | int, ...]:
        """The shape, given what each name of a size stands for."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


PLAN_ARRAYS = (
    PlanArray("fold", ("nodes",), "always"),  # kernels.index_ops says what these are
    PlanArray("scatter", ("rows",), "always"),
    PlanArray("begin", ("nodes",), "tree"),  # PrefixPlan.tree
    PlanArray("end", ("nodes",), "tree"),
    PlanArray("windows", ("windows",), "torch"),  # plan.torch_tiles.TorchTiles
    PlanArray("window_starts", ("windows + 1",), "torch"),
    PlanArray("tiles", ("torch tiles", 6), "torch"),
    PlanArray("tile_keys", ("tile keys",), "torch"),
    PlanArray("tile_masks", ("pairs",), "torch", torch.float32),
    PlanArray("stretches", ("stretches", 3), "triton"),  # plan.triton_tiles.TritonTiles
    PlanArray("stretch_starts", ("tiles + 1",), "triton"),
    PlanArray("keys", ("keys",), "triton"),
    PlanArray("key_starts", ("tiles + 1",), "triton"),
    PlanArray("parts", ("parts", 4), "triton"),
    PlanArray("divided", ("divided", 3), "triton"),
    PlanArray("rows", ("rows",), "lists"),  # PrefixPlan.row_lists
    PlanArray("starts", ("nodes + 1",), "lists"),
    PlanArray("pieces", ("pieces",), "lists"),
)
"""In the order in which a folded program takes them, behind the inputs of the captured one."""

BY_NAME = {array.name: array for array in PLAN_ARRAYS}


def plan_arrays(parts: Collection[Part]) -> tuple[PlanArray, ...]:
    """The arrays of a folded program that takes these parts of a plan besides the one that is always there."""
    return tuple(array for array in PLAN_ARRAYS if array.part == "always" or array.part in parts)


def schema(names: Iterable[str], optional: Collection[Part] = ()) -> str:
    """The arguments of an op that takes these arrays, those of ``optional`` parts as ``Tensor?``."""
    arrays = [BY_NAME[name] for name in names]
    return ", ".join(f"{'Tensor?' if array.part in optional else 'Tensor'} {array.name}" for array in arrays)
