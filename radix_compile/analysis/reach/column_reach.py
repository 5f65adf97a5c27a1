"""Reach: the last column that each entry of a tensor reads, for chunks, scans and convolutions, where axes are lost.

Linear attention and state-space models split the sequence into chunks, compute within and between chunks, and join them
again. In between no dimension is the sequence, so axes are lost. Instead we track a number for each entry: the last
column that the entry reads. Where a result has a dimension as long as the sequence, and no entry reads a column later
than its own place along that dimension, the dimension is the sequence and the value is causal. Entries that are known
numbers read no column, and zero times anything is zero: so a triangular matrix of decays hides later rows.

This needs sizes that are numbers. Symbolic sizes are replaced by those of the call that is compiled for, and the result
is computed again for the sizes of each later call (``PlanInputs``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.axes import BATCH, SEQ, Axes, Layout, Uniform, as_size, has_tokens, plain_axis, shape_of
from radix_compile.ir.facts import Filled
from radix_compile.ir.value import Value, marks_of
from radix_compile.torch_internals import OpOverload, val

MAX_ENTRIES = 2**22
"""The maximum number of entries of an array that is stored."""

NO_COLUMN = -1
"""The last column of an entry that reads no column."""


class OutOfReach(Exception):  # noqa: N818 - a verdict about a node, not an error in it
    """The columns that the entries read are unknown."""


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """The reach of a tensor.

    ``last``   the last column that each entry reads.
    ``known``  the entry itself where its value is known, NaN elsewhere.
    ``batch``  the batch dimension, None if there is none.

    The arrays have the tensor's dimensions. Dimensions along which all entries are equal, and ``batch``, have size 1.
    """

    last: NDArray[np.int32]
    known: NDArray[np.float64]
    batch: int | None = None

    @property
    def rank(self) -> int:
        return self.last.ndim


def reach(last: Any, known: Any = np.nan, batch: int | None = None) -> Reach:
    """Return a reach, with the arrays broadcast to each other. A known entry reads no column."""
    known = np.broadcast_to(np.asarray(known, np.float64), np.broadcast_shapes(np.shape(last), np.shape(known)))
    last = np.where(np.isnan(known), np.broadcast_to(np.asarray(last, np.int32), known.shape), np.int32(NO_COLUMN))
    return Reach(last, known, batch)


ReachRule = Callable[[fx.Node, "Reaches"], "Reach | tuple[Reach, ...]"]
"""Returns the reach of an op's result or results. Raises :class:`OutOfReach`."""


class Reaches:
    """The reaches of the nodes of a graph, for given sizes: computed on demand, back to nodes that have axes."""

    def __init__(self, layout: Layout, sizes: Mapping[sympy.Symbol, int]) -> None:
        self.layout = layout
        self.sizes = sizes
        self.num_columns = self.number(layout.seq)
        self.by_node: dict[fx.Node, Reach | tuple[Reach, ...] | None] = {}
        self.literals: dict[fx.Node, torch.Tensor | None] = {}

    # ---------------------------------------------------------------------------------------------------- for rules

    def of(self, node: fx.Node) -> Reach:
        """Return the reach of a node with one result. Raises :class:`OutOfReach`."""
        result = self.all_of(node)
        if isinstance(result, tuple):
            raise OutOfReach
        return result

    def all_of(self, node: fx.Node) -> Reach | tuple[Reach, ...]:
        """Return the reach of each result of a node. Raises :class:`OutOfReach`."""
        if node not in self.by_node:
            self.by_node[node] = None
            computed = self._compute(node)
            self.by_node[node] = (
                tuple(map(self._to_store, computed)) if isinstance(computed, tuple) else self._to_store(computed)
            )
        result = self.by_node[node]
        if result is None:
            raise OutOfReach
        return result

    def _to_store(self, computed: Reach) -> Reach:
        """Return the reach, with arrays of size 1 if all entries read all columns. Raises if they are too large."""
        if computed.last.size and computed.last.min() >= self.num_columns - 1:
            return reach(np.full((1,) * computed.rank, self.num_columns - 1), batch=computed.batch)
        if computed.last.size > MAX_ENTRIES:
            raise OutOfReach
        return computed

    def number(self, value: Any) -> int:
        """Return a size, or an argument of an op that is a size, as an integer."""
        if isinstance(value, fx.Node):
            value = val(value)
        if isinstance(value, torch.SymInt):
            value = as_size(value)
        if isinstance(value, sympy.Expr):
            value = value.subs(self.sizes)
            if not value.is_Integer:
                raise OutOfReach
        if not isinstance(value, int | sympy.Integer):
            raise OutOfReach
        return int(value)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.number(size) for size in shape_of(node))

    def may_vary(self, node: fx.Node, dim: int) -> bool:
        """May the entries of a tensor without a batch dimension differ along ``dim``?"""
        value = _value(node)
        return value.mixed is not None or not all(isinstance(atom, Uniform) for atom in value.axes[dim])

    # -------------------------------------------------------------------------------------------------- computation

    def _compute(self, node: fx.Node) -> Reach | tuple[Reach, ...]:
        marks = marks_of(node)
        values = marks if isinstance(marks, tuple) else (marks,)
        if any(value.is_arranged or (value.mixed is None and value.fully_masked) for value in values):
            raise OutOfReach
        value = values[0]
        if all(value.is_constant for value in values) and is_tensor(node):
            return self._constant(node, value)
        if value.is_row and not isinstance(marks, tuple):
            return self._rows(value)
        try:
            return self._by_rule(node)
        except OutOfReach:
            if not value.is_pair:
                raise
            return self._rows(value)

    def _by_rule(self, node: fx.Node) -> Reach | tuple[Reach, ...]:
        if node.target is operator.getitem:
            source, position = node.args
            return self.all_of(source)[position]  # type: ignore
        rule = info_of(node.target).reach
        if rule is None:
            raise OutOfReach
        return rule(node, self)

    def _rows(self, value: Value) -> Reach:
        """Return the reach of a value with an entry per row, or per pair of rows, which reads up to the later row."""
        rank = len(value.axes)
        last = np.full((1,) * rank, NO_COLUMN, np.int32)
        batch = None
        for dim, axis in enumerate(value.axes):
            if axis == (SEQ,):
                shape = [self.num_columns if other == dim else 1 for other in range(rank)]
                last = np.maximum(last, np.arange(self.num_columns, dtype=np.int32).reshape(shape))
            elif axis == (BATCH,):
                batch = dim
            elif has_tokens(axis):
                raise OutOfReach
        return reach(last, batch=batch)

    def _constant(self, node: fx.Node, value: Value) -> Reach:
        last = np.full((1,) * len(value.axes), NO_COLUMN)
        if isinstance(value.fact, Filled):
            return reach(last, value.fact.value)
        literal = self.literal(node)
        return reach(last) if literal is None else reach(last, literal.double().numpy())

    def literal(self, node: fx.Node) -> torch.Tensor | None:
        """Return the entries of a small tensor that the program computes from numbers alone, or None."""
        if node not in self.literals:
            self.literals[node] = self._evaluate(node) if _is_deterministic(node) else None
        return self.literals[node]

    def _evaluate(self, node: fx.Node) -> torch.Tensor | None:
        tensors = {arg: self.literal(arg) for arg in node.all_input_nodes if is_tensor(arg)}
        if None in tensors.values() or np.prod(self.shape(node), dtype=np.int64) > MAX_ENTRIES:
            return None

        def to_value(arg: fx.Node) -> Any:
            return tensors[arg] if arg in tensors else self.number(arg)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), to_value)
        result = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})  # type: ignore
        return None if result.is_complex() else result

    # ------------------------------------------------------------------------------------------------------- result

    def causal_axes(self, node: fx.Node) -> Axes | None:
        """Return the axes of a node if one of its dimensions is the sequence, by the columns read; else None."""
        try:
            computed = self.of(node)
        except OutOfReach:
            return None
        if (self.layout.batch != 1) != (computed.batch is not None) or 0 in computed.last.shape:
            return None
        shape = shape_of(node)
        for dim in sorted(range(computed.rank), key=lambda dim: -computed.last.shape[dim]):
            others = tuple(other for other in range(computed.rank) if other != dim)
            last = computed.last.max(axis=others)
            may_be_seq = dim != computed.batch and shape[dim] == self.layout.seq and (last != NO_COLUMN).any()
            if may_be_seq and (last <= np.arange(self.num_columns)).all():
                return tuple(
                    (BATCH,) if other == computed.batch else (SEQ,) if other == dim else plain_axis(size)
                    for other, size in enumerate(shape)
                )
        return None


class ReachCheck:
    """The check, for graphs with symbolic sizes, that causal axes proved for one call hold for another call's sizes."""

    def __init__(
        self, proved: Reaches, nodes: Sequence[fx.Node], symbols: Mapping[sympy.Symbol, tuple[int, int]]
    ) -> None:
        """``symbols`` maps each symbol to the (input, dimension) that has its size in a call."""
        self.proved, self.symbols = proved, symbols
        self.axes = {node: proved.causal_axes(node) for node in nodes}
        self.results: dict[tuple[int, ...], bool] = {tuple(proved.sizes[symbol] for symbol in symbols): True}

    def __call__(self, args: Sequence[Any]) -> bool:
        sizes = tuple(args[position].shape[dim] for position, dim in self.symbols.values())
        if sizes not in self.results:
            reaches = Reaches(self.proved.layout, dict(zip(self.symbols, sizes, strict=True)))
            self.results[sizes] = all(reaches.causal_axes(node) == axes for node, axes in self.axes.items())
        return self.results[sizes]


def steps_to(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes without axes from which a node with axes is computed."""
    queue, visited = list(node.all_input_nodes), set()
    while queue:
        step = queue.pop()
        values = marks_of(step)
        mixed = (values if isinstance(values, tuple) else (values,))[0].mixed
        if mixed is not None and step not in visited:
            visited.add(step)
            yield step
            queue.extend(step.all_input_nodes)


def _is_deterministic(node: fx.Node) -> bool:
    """Does the op return the same tensor every time?"""
    if not isinstance(node.target, OpOverload) or not is_tensor(node) or "empty" in node.target.name():
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable


def _value(node: fx.Node) -> Value:
    marks = marks_of(node)
    return marks[0] if isinstance(marks, tuple) else marks
