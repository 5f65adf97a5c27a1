"""Which rows a program reads of values that have an entry for each row: found by running it on the rows' numbers.

Behind its last layer a program picks rows (the last token of each sequence), hides rows (a product with a mask, labels
that the loss ignores), and then mixes what is left. A second program, made here from the first, does the same with row
numbers: slices and indices pick numbers, and a mask replaces the numbers of the rows it hides by -1. All numbers that
reach an op that mixes rows, or an output, are rows that are read. The second program computes no layer: it takes only
inputs and values that cheap ops compute from them (``given``).

The rules of single ops are in ``rules.row_numbers``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from radix_compile.analysis.flops import flops
from radix_compile.ir.axes import BATCH, SEQ, Axis, Size, has_tokens, shape_of
from radix_compile.ir.facts import FullyMasked
from radix_compile.ir.graph import tokens_of
from radix_compile.ir.source import upstream
from radix_compile.ir.value import value_of, values_of
from radix_compile.torch_internals import size_symbols, val

HIDDEN = -1
"""In place of the number of a row that the value does not depend on."""


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """The row numbers of a value: for each entry, the row that it is computed from.

    ``node``       the numbers ``b * S + s`` in the second program, int64, broadcast to the value: of size 1 in all
                   dimensions but ``dims``. None if the value may be computed from any rows.
    ``rank``       the number of dimensions of the value.
    ``dims``       the dimensions along which the row changes.
    ``is_whole``   every row is there.
    ``is_finite``  the value is finite, and so are its derivatives, where its rows are replaced by zeros.
    """

    node: fx.Node | None
    rank: int = 0
    dims: frozenset[int] = frozenset()
    is_whole: bool = True
    is_finite: bool = True


ANY_ROWS = RowNumbers(None)
"""Of a value that may be computed from any rows."""
NO_MORE_ROWS = RowNumbers(None, is_whole=False)
"""Of a value whose rows are known to be read."""


class NumbersProgram:
    """The second program while it is made. It takes ``(batch, seq, device, *inputs of the captured graph)``."""

    def __init__(self, captured: fx.GraphModule) -> None:
        self.captured = captured
        self.layout = tokens_of(captured).layout
        self.graph = fx.Graph()
        self.sizes = self.graph.placeholder("num_sequences"), self.graph.placeholder("num_columns")
        self.device = self.graph.placeholder("on_device")
        self.inputs = {node: self.graph.placeholder(node.name) for node in captured.graph.find_nodes(op="placeholder")}
        for node, copy in self.inputs.items():
            copy.meta.update(node.meta)
        self.symbols = size_symbols(captured.graph)
        self.read: dict[fx.Node, None] = {}
        """The numbers that are read."""
        self.masks: set[fx.Node] = set()
        """The captured masks that hide rows."""
        self.has_picks = False
        """Are rows picked, by slices or indices?"""
        self._copies: dict[fx.Node, fx.Node] = dict(self.inputs)
        self._is_given: dict[fx.Node, bool] = {}

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def given(self, value: Any) -> Any:
        """Return an argument of a captured op in this program; None if it depends on a layer's results."""
        if isinstance(value, list | tuple):
            found = [self.given(item) for item in value]
            return (
                None if any(new is None for new, item in zip(found, value, strict=True) if item is not None) else found
            )
        if not isinstance(value, fx.Node):
            return value
        if not self.is_given(value):
            return None
        for node in self.captured.graph.nodes:
            if node in self._wanted(value):
                self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        return self._copies[value]

    def _wanted(self, value: fx.Node) -> set[fx.Node]:
        return {node for node in upstream(value) if node not in self._copies}

    def is_given(self, node: fx.Node) -> bool:
        """Is a value computed from the call's inputs alone, by ops that cost no more than reading them?"""
        return all(self._is_step(one) for one in upstream(node))

    def _is_step(self, node: fx.Node) -> bool:
        if node not in self._is_given:
            is_weight = node.op == "placeholder" and _is_float(node) and not self._has_rows(node)
            is_pair = any(value.is_pair for value in values_of(node))
            is_call = node.op == "call_function"
            self._is_given[node] = not (is_weight or is_pair or (is_call and (flops(node) or node.is_impure())))
        return self._is_given[node]

    def _has_rows(self, node: fx.Node) -> bool:
        return shape_of(node)[:2] == (self.layout.batch, self.layout.seq)

    def size(self, size: Size) -> int | fx.Node | None:
        """Return a size in this program; None if it is not a sum or product of sizes of inputs."""
        match size:
            case sympy.Integer():
                return int(size)
            case sympy.Symbol() if size in self.symbols:
                position, dim, _ = self.symbols[size]
                return self.call(torch.Tensor.size, list(self.inputs.values())[position], dim)
            case sympy.Add() | sympy.Mul():
                parts = [self.size(part) for part in size.args]
                operation = operator.add if isinstance(size, sympy.Add) else operator.mul
                return None if None in parts else functools.reduce(functools.partial(self.call, operation), parts)
        return None

    def all_rows(self, node: fx.Node) -> RowNumbers:
        """Return the numbers of a captured value that has one entry for each row."""
        kinds = [_kind(axis) for axis in value_of(node).axes]
        if None in kinds:
            return ANY_ROWS
        numbers = self.call(number_rows, *self.sizes, self.device, tuple(kinds))
        dims = frozenset(dim for dim, kind in enumerate(kinds) if kind)
        return RowNumbers(numbers, len(kinds), dims)

    def picks_others_than(self, hidden: FullyMasked | None) -> bool:
        """Return whether rows are not read for another reason than that they are ``hidden`` from attention."""
        allowed = set() if hidden is None else {_origin(hidden.source)}
        return self.has_picks or any(_origin(mask) not in allowed for mask in self.masks)

    def finish(self) -> tuple[fx.GraphModule, tuple[int, ...]]:
        """Return the program, whose result is bool ``[B, S]``, and the positions of the inputs that it takes."""
        self.graph.output(self.call(mark_read, *self.sizes, *self.read))
        taken = [position for position, node in enumerate(self.inputs.values()) if node.users]
        for node in self.inputs.values():
            if not node.users:
                self.graph.erase_node(node)
        return fx.GraphModule(self.captured, self.graph), tuple(taken)


def _origin(mask: fx.Node) -> fx.Node:
    """Return the input that a mask is a view, a cast or a comparison of."""
    while len(mask.all_input_nodes) == 1:
        mask = mask.all_input_nodes[0]
    return mask


def _is_float(node: fx.Node) -> bool:
    return isinstance(val(node), Tensor) and val(node).dtype.is_floating_point


_KINDS: Mapping[Axis, str] = {(BATCH,): "batch", (SEQ,): "seq", (BATCH, SEQ): "rows"}


def _kind(axis: Axis) -> str | None:
    return _KINDS.get(axis) if has_tokens(axis) else ""


# ------------------------------------------------------------------------------------------- steps of the program


def number_rows(batch: int, seq: int, device: torch.device, kinds: tuple[str, ...]) -> Tensor:
    """Return the numbers of all rows, with a dimension for each kind: batch, seq, rows (both), or one of size 1."""
    rows = torch.arange(batch * seq, device=device)
    if "rows" in kinds:
        return rows.view([-1 if kind else 1 for kind in kinds])
    if "batch" not in kinds:  # one row of packed sequences
        return rows.view([seq if kind else 1 for kind in kinds])
    rows = rows.view(batch, seq)
    if kinds.index("seq") < kinds.index("batch"):
        rows = rows.T
    return rows.reshape([{"batch": batch, "seq": seq}.get(kind, 1) for kind in kinds])


def mark_read(batch: int, seq: int, *numbers: Tensor) -> Tensor:
    """Return a bool ``[B, S]`` that is true at the rows with these numbers."""
    marks = torch.zeros(batch * seq + 1, dtype=torch.bool, device=numbers[0].device if numbers else None)
    for some in numbers:
        marks.index_fill_(0, some.flatten() % len(marks), True)  # HIDDEN is the place behind the last row
    return marks[:-1].view(batch, seq)


def hide(numbers: Tensor, shown: Tensor) -> Tensor:
    """Replace the numbers of rows by ``HIDDEN`` unless ``shown``, broadcast to the value, is nonzero for some entry."""
    extra = numbers.ndim - shown.ndim
    shown = (shown != 0).view((1,) * extra + shown.shape)
    along = [dim for dim in range(numbers.ndim) if numbers.shape[dim] == 1 and shown.shape[dim] != 1]
    if along:
        shown = shown.any(along, keepdim=True)
    return torch.where(shown, numbers, HIDDEN)


def hide_rows(numbers: Tensor, shown: Tensor) -> Tensor:
    """Replace the numbers of rows by ``HIDDEN`` unless ``shown``, with an entry for each row, is true."""
    return torch.where(shown.reshape(-1)[numbers], numbers, HIDDEN)


def gather(numbers: Tensor, dim: int, index: Tensor) -> Tensor:
    """``numbers.gather(dim, index)``, where the index also has features, of which numbers have one."""
    shape = list(index.shape)
    shape[dim] = numbers.shape[dim]
    return numbers.expand(shape).gather(dim, index)
