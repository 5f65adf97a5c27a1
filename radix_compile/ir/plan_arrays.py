"""The index arrays of a call's plan, which are inputs of folded programs.

:data:`PLAN_ARRAYS` is the only list: it defines the placeholders, the fake inputs, the shapes that ``verify`` computes
with, the schemas of our ops and the arrays of each call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Code = Literal["torch", "triton"]
"""The code that runs attention on the tree: ``kernels.torch_attention`` or ``kernels.triton_attention``."""

Group = Literal["always", "columns", "tree", "lists", "head", "head lists"] | Code
"""When an array is passed: always, for tables by the column in the path, for attention on the tree, for gradients, for
ops that run for rows that are read alone (and their gradients), or for the code of attention."""

Indexes = Literal["nodes", "head", "nodes of head"]
"""What an op moves entries between with the array: rows and nodes, rows and the nodes of the head, or the two kinds of
nodes. An op takes arrays of one kind."""

Size = TypeVar("Size")


@dataclass(frozen=True, slots=True)
class PlanArray:
    """An array of the plan. Its ``shape`` has integers and names of sizes.

    ``nodes`` is T', ``head`` the number of nodes whose rows are read themselves, ``rows`` is B * S; each other name is
    a separate size, known only in the call. ``argument`` is the argument of our ops that takes the array, by default
    the one of its name.
    """

    name: str
    shape: tuple[str | int, ...]
    group: Group
    dtype: torch.dtype = torch.int64
    argument: str = ""
    indexes: Indexes = "nodes"

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
    PlanArray("columns", ("nodes",), "columns", argument="fold"),  # PrefixPlan.columns
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
    PlanArray("head_nodes", ("head",), "head", argument="fold", indexes="nodes of head"),  # PrefixPlan.head
    PlanArray("head_places", ("nodes",), "head", argument="scatter", indexes="nodes of head"),
    PlanArray("head_fold", ("head",), "head", argument="fold", indexes="head"),
    PlanArray("head_scatter", ("rows",), "head", argument="scatter", indexes="head"),
    PlanArray("head_rows", ("rows",), "head lists", argument="rows", indexes="head"),
    PlanArray("head_starts", ("head + 1",), "head lists", argument="starts", indexes="head"),
    PlanArray("head_pieces", ("head pieces",), "head lists", argument="pieces", indexes="head"),
)
"""The arrays in the order of a folded program's inputs, after the inputs of the captured graph."""

BY_NAME = {array.name: array for array in PLAN_ARRAYS}
BY_PLACEHOLDER = {array.placeholder: array for array in PLAN_ARRAYS}


def plan_arrays(groups: Collection[Group]) -> tuple[PlanArray, ...]:
    """Return the arrays of a folded program that takes these groups. (The group "always" is implied.)"""
    return tuple(array for array in PLAN_ARRAYS if array.group == "always" or array.group in groups)


def schema(names: Iterable[str], optional: Collection[Group] = ()) -> str:
    """Return the schema arguments for these arrays of an op; arrays of ``optional`` groups are ``Tensor?``."""
    arrays = [BY_NAME[name] for name in names]
    return ", ".join(f"{'Tensor?' if array.group in optional else 'Tensor'} {array.name}" for array in arrays)
