"""Which columns an entry reads, where no axis can say it: chunks, scans, convolutions.

Linear attention and state-space models cut the sequence into chunks, work within and between them, and put it together
again. On the way no dimension is the sequence, so axes (``token_axes``) are lost. What is followed instead is a number
for each entry: the last column that it reads. Where a dimension as long as the sequence comes back, and the entry at
each of its places reads no later column, that dimension is the sequence and the value causal. Entries that are known
numbers read nothing, and zero times anything is zero: that is how a triangle of decays hides later rows.

The sizes have to be numbers for this. Where they are symbols it is done for those of the call that is being compiled,
and again for those of every other one (``PlanInputs``).
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

LARGEST = 2**22
"""Entries of an array that is kept, at most."""

NOTHING = -1
"""The last column of an entry that reads none."""


class OutOfReach(Exception):  # noqa: N818 - a verdict about a node, not an error in it
    """It cannot be said which columns the entries read."""


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """``last`` column that each entry reads, the entry itself where it is ``known`` (else NaN), and the dim ``batch``.

    The arrays have the tensor's dimensions; those along which all entries agree, and ``batch``, are of size one.
    """

    last: NDArray[np.int32]
    known: NDArray[np.float64]
    batch: int | None = None

    @property
    def rank(self) -> int:
        return self.last.ndim


def reach(last: Any, known: Any = np.nan, batch: int | None = None) -> Reach:
    """With arrays of one shape; an entry that is known reads nothing."""
    known = np.broadcast_to(np.asarray(known, np.float64), np.broadcast_shapes(np.shape(last), np.shape(known)))
    last = np.where(np.isnan(known), np.broadcast_to(np.asarray(last, np.int32), known.shape), np.int32(NOTHING))
    return Reach(last, known, batch)


Place = tuple[int, int]
"""Which input, and which dimension of it."""

ReachRule = Callable[[fx.Node, "Reaches"], "Reach | tuple[Reach, ...]"]
"""A rule of an op for the columns that entries read. Raises :class:`OutOfReach`."""


class Reaches:
    """The reach of the nodes of one graph, for sizes that are numbers; computed as far back as axes are unknown."""

    def __init__(self, layout: Layout, sizes: Mapping[sympy.Symbol, int]) -> None:
        self.layout = layout
        self.sizes = sizes
        self.columns = self.number(layout.seq)
        self.found: dict[fx.Node, Reach | tuple[Reach, ...] | None] = {}
        self.literals: dict[fx.Node, torch.Tensor | None] = {}

    # ------------------------------------------------------------------------------------------ what rules ask for

    def of(self, node: fx.Node) -> Reach:
        """Raises :class:`OutOfReach`."""
        found = self.all_of(node)
        if isinstance(found, tuple):
            raise OutOfReach
        return found

    def all_of(self, node: fx.Node) -> Reach | tuple[Reach, ...]:
        if node not in self.found:
            self.found[node] = None
            found = self._compute(node)
            self.found[node] = tuple(map(self._kept, found)) if isinstance(found, tuple) else self._kept(found)
        result = self.found[node]
        if result is None:
            raise OutOfReach
        return result

    def _kept(self, found: Reach) -> Reach:
        """The reach of a tensor that reads all columns everywhere; it takes no room."""
        if found.last.size and found.last.min() >= self.columns - 1:
            return reach(np.full((1,) * found.rank, self.columns - 1), batch=found.batch)
        if found.last.size > LARGEST:
            raise OutOfReach
        return found

    def number(self, value: Any) -> int:
        """A size, or an argument of an op that is one."""
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
        """May entries along that dimension of what has no dimension of sequences be different ones?"""
        value = _value(node)
        return value.mixed is not None or not all(isinstance(atom, Uniform) for atom in value.axes[dim])

    # -------------------------------------------------------------------------------------------------- where from

    def _compute(self, node: fx.Node) -> Reach | tuple[Reach, ...]:
        marks = marks_of(node)
        values = marks if isinstance(marks, tuple) else (marks,)
        if any(value.is_arranged or (value.mixed is None and value.fully_masked) for value in values):
            raise OutOfReach
        value = values[0]
        if all(one.is_constant for one in values) and is_tensor(node):
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
        """A value of one row, or of a pair of rows: it reads the later one of them, and those before."""
        rank = len(value.axes)
        last = np.full((1,) * rank, NOTHING, np.int32)
        batch = None
        for dim, axis in enumerate(value.axes):
            if axis == (SEQ,):
                shape = [self.columns if other == dim else 1 for other in range(rank)]
                last = np.maximum(last, np.arange(self.columns, dtype=np.int32).reshape(shape))
            elif axis == (BATCH,):
                batch = dim
            elif has_tokens(axis):
                raise OutOfReach
        return reach(last, batch=batch)

    def _constant(self, node: fx.Node, value: Value) -> Reach:
        nothing = np.full((1,) * len(value.axes), NOTHING)
        if isinstance(value.fact, Filled):
            return reach(nothing, value.fact.value)
        literal = self.literal(node)
        return reach(nothing) if literal is None else reach(nothing, literal.double().numpy())

    def literal(self, node: fx.Node) -> torch.Tensor | None:
        """The entries of a small tensor that the program makes of nothing but numbers."""
        if node not in self.literals:
            self.literals[node] = self._made(node) if _is_repeatable(node) else None
        return self.literals[node]

    def _made(self, node: fx.Node) -> torch.Tensor | None:
        tensors = {one: self.literal(one) for one in node.all_input_nodes if is_tensor(one)}
        if None in tensors.values() or np.prod(self.shape(node), dtype=np.int64) > LARGEST:
            return None

        def real(value: fx.Node) -> Any:
            return tensors[value] if value in tensors else self.number(value)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), real)
        made = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})  # type: ignore
        return None if made.is_complex() else made

    # ---------------------------------------------------------------------------------------------------- where to

    def causal_axes(self, node: fx.Node) -> Axes | None:
        """The axes of a node, if one of its dimensions is the sequence again; None if none is."""
        try:
            found = self.of(node)
        except OutOfReach:
            return None
        if (self.layout.batch != 1) != (found.batch is not None):
            return None
        shape = shape_of(node)
        for dim in sorted(range(found.rank), key=lambda dim: -found.last.shape[dim]):
            others = tuple(other for other in range(found.rank) if other != dim)
            last = found.last.max(axis=others)
            columns = dim != found.batch and shape[dim] == self.layout.seq and (last != NOTHING).any()
            if columns and (last <= np.arange(self.columns)).all():
                return tuple(
                    (BATCH,) if other == found.batch else (SEQ,) if other == dim else plain_axis(size)
                    for other, size in enumerate(shape)
                )
        return None


class ReachCheck:
    """For a graph whose sizes are symbols: is what was proved for one call true of another one's sizes?"""

    def __init__(
        self, proved: Reaches, nodes: Sequence[fx.Node], symbols: Mapping[sympy.Symbol, tuple[int, int]]
    ) -> None:
        """``symbols`` says where in a call's inputs to find their sizes."""
        self.proved, self.symbols = proved, symbols
        self.axes = {node: proved.causal_axes(node) for node in nodes}
        self.known: dict[tuple[int, ...], bool] = {tuple(proved.sizes[symbol] for symbol in symbols): True}

    def __call__(self, args: Sequence[Any]) -> bool:
        sizes = tuple(args[position].shape[dim] for position, dim in self.symbols.values())
        if sizes not in self.known:
            here = Reaches(self.proved.layout, dict(zip(self.symbols, sizes, strict=True)))
            self.known[sizes] = all(here.causal_axes(node) == axes for node, axes in self.axes.items())
        return self.known[sizes]


def steps_to(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes without axes on the way to one that has got them back."""
    queue, seen = list(node.all_input_nodes), set()
    while queue:
        step = queue.pop()
        values = marks_of(step)
        mixed = (values if isinstance(values, tuple) else (values,))[0].mixed
        if mixed is not None and step not in seen:
            seen.add(step)
            yield step
            queue.extend(step.all_input_nodes)


def _is_repeatable(node: fx.Node) -> bool:
    """Does the op make the same tensor every time?"""
    if not isinstance(node.target, OpOverload) or not is_tensor(node) or "empty" in node.target.name():
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable


def _value(node: fx.Node) -> Value:
    marks = marks_of(node)
    return marks[0] if isinstance(marks, tuple) else marks
