"""The annotation of each node's result, and how the operands of a broadcasting op line up.

A node's annotation is ``NodeFacts.marks``: :func:`mark` writes it, :func:`value_of` and :func:`values_of` read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from torch import fx

from radix_compile.ir.axes import (
    BATCH,
    SEQ,
    Arrangement,
    Atom,
    Axes,
    Axis,
    Feature,
    Layout,
    Mixes,
    Sorted,
    Token,
    Uniform,
    count_tokens,
    has_tokens,
    plain_axis,
)
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.facts import Fact, FullyMasked, Weights
from radix_compile.ir.graph import facts, set_facts
from radix_compile.torch_internals import module_stack, stack_trace


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why folding stops at a node: the reason and its code, the op, and its place in the user's program."""

    reason: str
    code: RefusalCode
    op: str
    node: str
    module: str
    source: str

    def __str__(self) -> str:
        return _sentence(self.op, self.module, self.reason, self.source)


def refuse(node: fx.Node, reason: str, code: RefusalCode) -> Refusal:
    """Return a refusal at ``node``, with the node's place in the user's program."""
    return Refusal(reason, code, str(node.target), node.name, module_of(node), source_line(node))


def locate(node: fx.Node, what: str) -> str:
    """Return a sentence about a node: its op, the statement ``what``, and its place in the user's program."""
    return _sentence(str(node.target), module_of(node), what, source_line(node))


def _sentence(op: str, module: str, what: str, source: str) -> str:
    where = f" at {source}" if source else ""
    inside = f" in {module}" if module else ""
    return f"{op}{inside}: {what}{where}"


def module_of(node: fx.Node) -> str:
    """Return the path of the innermost module that a node was traced in, or an empty string."""
    modules = module_stack(node)
    return _tidy_path(next(reversed(modules.values()))[0] if modules else "")


def _tidy_path(path: str) -> str:
    return (
        path.replace("L['self'].", "")
        .replace("L['fn'].", "")
        .replace("['", ".")
        .replace("']", "")
        .replace("_modules.", "")
    )


_PACKAGE = f'"{Path(__file__).parent.parent}{os.sep}'


def source_line(node: fx.Node) -> str:
    """Return ``file:line: code`` of the innermost frame of the user's program, or an empty string."""
    trace = stack_trace(node).strip().splitlines()
    frames = [
        (line.strip(), trace[i + 1].strip() if i + 1 < len(trace) else "")
        for i, line in enumerate(trace)
        if line.strip().startswith("File ") and _PACKAGE not in line
    ]
    if not frames:
        return ""
    where, code = frames[-1]
    parts = where.split('"')
    line = where.split("line ")[1].split(",")[0] if "line " in where else "?"
    return f"{parts[1] if len(parts) > 1 else where}:{line}: {code}"


Uses: TypeAlias = tuple[tuple[fx.Node, int, str], ...]
"""How operands without token axes line up with token axes: see ``Value.operands``."""


@dataclass(frozen=True, slots=True)
class Value:
    """The annotation of one result.

    ``axes``          the axis of each dimension.
    ``mixed``         why the value is not prefix-determined; if set, no other field holds.
    ``fully_masked``  fully masked rows, at which the value is not determined.
    ``fact``          a fact about the entries (an index, a mask, attention weights, ...).
    ``full_only``     determined, but the op must run in full form: it reads earlier rows (causal), or counts columns.
    ``identity``      the input that the op returns unchanged (a slice of everything, ``cat`` with empty tensors).
    ``attends``       for the result of causal attention, the facts of its weights.
    ``arrangement``   numbers about a sorted order of rows; then ``axes`` is empty.
    ``operands``      the operands without a token axis at a dimension where the result has one: ``(node, dim, how)``.
                      ``how`` is "column" (a constant with one entry per column: gather it), "first" (a constant with
                      equal entries: take the first), "count" (0, 1, 2, ...: make the numbers anew in compact form) or
                      "pairs" (a value of rows, whose features are the columns that each row is compared with).
    """

    axes: Axes
    mixed: Refusal | None = None
    fully_masked: frozenset[FullyMasked] = frozenset()
    fact: Fact | None = None
    full_only: bool = False
    identity: fx.Node | None = None
    attends: Weights | None = None
    arrangement: Arrangement | None = None
    operands: Uses = field(default=(), compare=False)

    @property
    def is_constant(self) -> bool:
        """Has the value no token axis? Then it is the same for every row of the call."""
        return not (self.mixed or self.arrangement or any(map(has_tokens, self.axes)))

    @property
    def is_arranged(self) -> bool:
        """Does the value hold sorted rows, or numbers about their order? Each form of the program computes its own."""
        return self.arrangement is not None or any(isinstance(atom, Sorted) for axis in self.axes for atom in axis)

    @property
    def is_row(self) -> bool:
        """Has the value one entry per row, so that it may have a compact form?"""
        # (0, 1) is one row of packed sequences.
        return self.mixed is None and count_tokens(self.axes) in ((1, 1), (0, 1))

    @property
    def is_pair(self) -> bool:
        """Has the value one entry per pair of rows of a sequence (scores, masks)?"""
        return self.mixed is None and count_tokens(self.axes)[1] == 2

    def with_fact(self, fact: Fact | None) -> Value:
        return replace(self, fact=fact)


Marks = Value | tuple[Value, ...]
"""The annotation of a node: one value, or a tuple with a value for each result."""


def mark(node: fx.Node, marks: Marks) -> None:
    set_facts(node, replace(facts(node), marks=marks))


def marks_of(node: fx.Node) -> Marks:
    marks = facts(node).marks
    assert marks is not None, f"mark_token_axes has not seen {node}"
    return marks


def value_of(node: fx.Node) -> Value:
    """Return the annotation of a node with one result."""
    marks = marks_of(node)
    assert isinstance(marks, Value), f"{node} has several results"
    return marks


def values_of(node: fx.Node) -> tuple[Value, ...]:
    marks = marks_of(node)
    return marks if isinstance(marks, tuple) else (marks,)


def is_row(node: fx.Node) -> bool:
    """Have all results of the node one entry per row, so that they may have a compact form?"""
    return all(value.is_row for value in values_of(node))


def is_arranged(node: fx.Node) -> bool:
    """Does any result of the node hold sorted rows, or numbers about their order?"""
    return any(value.is_arranged for value in values_of(node))


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor of a broadcasting op: its node, its value, and the axes of the dimensions that are broadcast."""

    node: fx.Node
    value: Value
    axes: Axes


def _merge_features(axis: Axis) -> Axis:
    """Merge each run of atoms that are not tokens into one atom."""
    result: list[Atom] = []
    for atom in axis:
        last = result[-1] if result else None
        if isinstance(atom, Token) or last is None or isinstance(last, Token):
            result.append(atom)
        else:
            kind = Uniform if isinstance(atom, Uniform) and isinstance(last, Uniform) else Feature
            result[-1] = kind(last.size * atom.size)
    return tuple(result)


def _repeats_for_sequences(layout: Layout, own: Axis, axis: Axis) -> bool:
    """Is a constant of axis ``own`` the same for all sequences, where ``axis`` merges the batch with features?"""
    return len(axis) > 1 and axis[0] is BATCH and not has_tokens(axis[1:]) and own[0] == Uniform(layout.batch)


def _common_axis(layout: Layout, axes: Sequence[Axis]) -> Axis:
    """Return the common axis of dimensions that line up. Raises ``Mixes`` if they mean different things."""
    varying = [axis for axis in axes if not all(isinstance(atom, Uniform) for atom in axis)]
    if not varying:
        return max(axes, key=len, default=())
    if all(axis == varying[0] for axis in varying):
        return varying[0]
    tokens = [_merge_features(axis) for axis in varying if has_tokens(axis)]
    if not tokens:
        return plain_axis(layout.axis_size(varying[0]))
    if all(axis == tokens[0] for axis in tokens):
        return tokens[0]
    raise Mixes(
        "dimensions that line up mean different things: " + " and ".join(map(str, dict.fromkeys(varying))),
        RefusalCode.UNCLEAR_DIMENSIONS,
    )


def broadcast(layout: Layout, operands: Iterable[Operand], exact: bool = False) -> tuple[Axes, Uses]:
    """Line the operands up from the right, as elementwise ops do. Return the result's axes and ``Value.operands``.

    With ``exact`` the op does not broadcast (``cat``), so a uniform dimension must be gathered as well.

    If a constant's feature dimension lines up with ``SEQ``, the constant is a table with one entry per column. The
    column is part of the row key, so the result is prefix-determined. A table that lines up with ``BATCH`` would tell
    sequences apart, and is refused.
    """
    operands = list(operands)
    rank = max((len(operand.axes) for operand in operands), default=0)
    result: list[Axis] = []
    uses: list[tuple[fx.Node, int, str]] = []
    repeats = False
    for dim in range(-rank, 0):
        lined_up = [operand for operand in operands if len(operand.axes) >= -dim]
        axis = _common_axis(layout, [operand.axes[dim] for operand in lined_up])
        result.append(axis)
        if not has_tokens(axis):
            continue
        for operand in lined_up:
            own = operand.axes[dim]
            if has_tokens(own) or own == ():
                continue
            uniform = all(isinstance(atom, Uniform) for atom in own)
            if not uniform and axis != (SEQ,) and not operand.value.is_constant:
                raise Mixes(
                    f"dimensions that line up mean different things: {axis} and {own}", RefusalCode.UNCLEAR_DIMENSIONS
                )
            if operand.value.is_constant and _repeats_for_sequences(layout, own, axis):
                repeats = True
                continue
            if len(axis) > 1 and (exact or not uniform):
                raise Mixes("a table lines up with tokens and something else at once", RefusalCode.UNCLEAR_DIMENSIONS)
            if axis != (SEQ,) and not uniform:
                along = "batch" if axis == (BATCH,) else "sorted"
                code = RefusalCode.MIXES_SEQUENCES if axis == (BATCH,) else RefusalCode.ORDER_OF_ROWS
                raise Mixes(f"a table lines up with the {along} axis, so equal prefixes get different values", code)
            gather = axis == (SEQ,) and (exact or not uniform)
            if operand.value.is_constant:
                uses.append((operand.node, dim + len(operand.axes), "column" if gather else "first"))
            elif not uniform:  # the result has an entry per pair, and pairs have no compact form
                uses.append((operand.node, dim + len(operand.axes), "pairs"))
    if repeats and count_tokens(tuple(result))[1] < 2:  # results with an entry per pair stay in full form
        raise Mixes("a table lines up with tokens and something else at once", RefusalCode.UNCLEAR_DIMENSIONS)
    return tuple(result), tuple(dict.fromkeys(uses))
