"""Programs that compute the rotated queries or keys of an attention alone, from rows in compact form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.attention.rows import Rows
from radix_compile.ir.axes import Axes
from radix_compile.ir.value import value_of
from radix_compile.passes.find_rotary import computed_from_rows
from radix_compile.passes.fold import Fold
from radix_compile.passes.fold_graph import compact_part
from radix_compile.torch_internals import val

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Rotated:
    """A program for queries or keys ``[1, heads, S, size]`` of an attention, from rows in compact form.

    ``inputs``  the positions of the call's inputs that it takes, by the names of its placeholders,
    ``rows``    the axes of values of rows, likewise,
    ``tables``  the dtypes of inputs that may be tables with an entry for each column.
    """

    program: fx.GraphModule
    inputs: Mapping[str, int]
    rows: Mapping[str, Axes]
    tables: tuple[torch.dtype, ...]
    size: int

    def contents(self) -> list[int]:
        """Return the positions of inputs of which more is read than their sizes."""
        placeholders = {node.name: node for node in self.program.graph.find_nodes(op="placeholder")}
        return [place for name, place in self.inputs.items() if _is_read(placeholders[name])]

    def text(self) -> str:
        """Return a text that is the same for programs of the same ops on the same inputs."""
        numbers: dict[fx.Node, str] = {}
        lines: list[str] = []

        def write(node: fx.Node) -> None:
            for arg in node.all_input_nodes:
                if arg not in numbers:
                    write(arg)
            numbers[node] = f"%{len(numbers)}"
            about: Any = node.target
            if node.op == "placeholder":
                about = self.inputs.get(node.name, self.rows.get(node.name, node.name))
            lines.append(f"{about} {fx.node.map_arg((node.args, dict(node.kwargs)), numbers.__getitem__)}")

        (output,) = self.program.graph.find_nodes(op="output")
        write(output)
        return "\n".join(lines)


def _is_read(node: fx.Node) -> bool:
    """Is more of an input read than its sizes?"""
    return is_tensor(node) and any(user.target is not aten.sym_size.int for user in node.users)


def rotated(fold: Fold, rows: Rows, nodes: Collection[fx.Node]) -> Rotated:
    """Return the program for queries or keys, given the nodes that depend on their column."""
    program, sources = compact_part(fold, rows, computed_from_rows([rows.node], nodes))
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = placeholders[: len(fold.captured.graph.find_nodes(op="placeholder"))]
    places = {node.name: place for place, node in enumerate(inputs) if node.users}
    tables = tuple(val(node).dtype for node in inputs if _is_read(node) and _may_be_a_table(val(node)))
    of_rows = placeholders[len(placeholders) - len(sources) :]
    axes = {node.name: value_of(source).axes for node, source in zip(of_rows, sources, strict=True)}
    return Rotated(program, places, axes, tables, rows.heads()[1])


def _may_be_a_table(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and sum(size != 1 for size in tensor.shape) > 1
