"""The index arrays of a call's plan, which are inputs of folded programs.

:data:`PLAN_ARRAYS` is the only list: it defines the placeholders, the fake inputs, the shapes that ``verify`` computes
with, the schemas of our ops and the arrays of each call. All arrays are int64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Part = Literal["always", "tree", "tiles", "lists"]
"""When an array is passed: always, for attention on the tree, for its Triton kernels, or for gradients."""

Size = TypeVar("Size")


@dataclass(frozen=True, slots=True)
class PlanArray:
    """An array of the plan. Its ``shape`` has integers and names of sizes.

    ``nodes`` is T' and ``rows`` is B * S; each other name is a separate size, known only in the call.
    """

    name: str
    shape: tuple[str | int, ...]
    part: Part

    @property
    def placeholder(self) -> str:
        """Return the name of the folded program's input."""
        return f"radix_{self.name}"

    def sized(self, sizes: Mapping[str, Size]) -> tuple[Size | int, ...]:
        """Return the shape, given the size for each name."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


PLAN_ARRAYS = (
    PlanArray("fold", ("nodes",), "always"),  # see kernels.index_ops
    PlanArray("scatter", ("rows",), "always"),
    PlanArray("begin", ("nodes",), "tree"),  # PrefixPlan.tree
    PlanArray("end", ("nodes",), "tree"),
    PlanArray("stretches", ("stretches", 3), "tiles"),  # plan.tiles.TreeTiles
    PlanArray("stretch_starts", ("tiles + 1",), "tiles"),
    PlanArray("keys", ("keys",), "tiles"),
    PlanArray("key_starts", ("tiles + 1",), "tiles"),
    PlanArray("parts", ("parts", 4), "tiles"),
    PlanArray("divided", ("divided", 3), "tiles"),
    PlanArray("rows", ("rows",), "lists"),  # PrefixPlan.row_lists
    PlanArray("starts", ("nodes + 1",), "lists"),
    PlanArray("pieces", ("pieces",), "lists"),
)
"""The arrays in the order of a folded program's inputs, after the inputs of the captured graph."""

BY_NAME = {array.name: array for array in PLAN_ARRAYS}


def plan_arrays(parts: Collection[Part]) -> tuple[PlanArray, ...]:
    """Return the arrays of a folded program that takes these parts of a plan. (The part "always" is implied.)"""
    return tuple(array for array in PLAN_ARRAYS if array.part == "always" or array.part in parts)


def schema(names: Iterable[str], optional: Collection[Part] = ()) -> str:
    """Return the schema arguments for these arrays of an op; arrays of ``optional`` parts are ``Tensor?``."""
    arrays = [BY_NAME[name] for name in names]
    return ", ".join(f"{'Tensor?' if array.part in optional else 'Tensor'} {array.name}" for array in arrays)
