"""Axes: for each dimension of a tensor, how it relates to the batch, the sequence and the features.

An axis is a tuple of atoms, outermost first, because a reshape merges and splits dimensions: ``[B, S, D]`` has the axes
``((BATCH,), (SEQ,), (Feature(D),))`` and its reshape to ``[B*S, D]`` has ``((BATCH, SEQ), (Feature(D),))``. A dimension
of size one has the empty axis ``()``; so has the batch dimension of one row of packed sequences. Axes come from the
structure of the program, never from sizes that happen to be equal: a feature dimension as long as the sequence stays a
feature dimension. The rules in ``analysis.rules`` derive the axes of results.

All proofs rest on this definition: a value with axes is *determined* (prefix-determined) when its entry at sequence
``b`` and columns ``i, j, ...`` (a column for each ``SEQ`` atom) is a function of the paths of the rows ``(b, i),
(b, j), ...`` alone, the same function for every ``b``. A value without token atoms is a constant of the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import sympy
import torch
from torch import fx

from radix_compile.ir.errors import RefusalCode
from radix_compile.torch_internals import val

Size: TypeAlias = sympy.Expr
"""A dimension's size, as an expression over the symbols of the capture (an ``Integer`` for static sizes)."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token atom: sequences (``BATCH``) or columns (``SEQ``)."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Feature:
    """A dimension unrelated to tokens."""

    size: Size


@dataclass(frozen=True, slots=True)
class Uniform:
    """A dimension along which the value does not change (a result of ``expand`` or ``full``)."""

    size: Size


@dataclass(frozen=True, slots=True)
class Sorted(Token):
    """The entries of a merged axis of rows, ``(BATCH, SEQ, ...)``, in the order that the node ``sort`` gives."""

    sort: fx.Node
    axis: Axis


@dataclass(frozen=True, slots=True)
class Longer(Token):
    """The columns of a sequence, followed by ``num_extra`` entries that have no column (attention sinks)."""

    num_extra: Size


class ArrangementKind(Enum):
    """The kinds of numbers that an :class:`Arrangement` holds."""

    ORDER = "for each place in the order, the index of the entry at that place, floor-divided"
    PLACE = "for each entry, its place in the order"
    BLANK = "uninitialised, with an entry for each place"
    COUNTS = "the number of entries with the key 0, 1, 2, ..."
    ENDS = "where the entries with the key 0, 1, 2, ... end in the order"


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Numbers about the sorted order ``by`` of rows.

    They are usable only together with the sorted rows, and differ between full and compact form. ``number`` is the
    divisor of an ORDER, or the number of keys of COUNTS or ENDS.
    """

    kind: ArrangementKind
    by: Sorted
    number: int = 1


BATCH = Token("batch")
SEQ = Token("seq")
Atom = Token | Feature | Uniform
Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def as_size(size: int | torch.SymInt) -> Size:
    """Return a dimension's size as a simplified expression, without adding a guard."""
    if isinstance(size, torch.SymInt):
        node = size.node
        return node.shape_env.simplify(node.expr)
    return sympy.Integer(size)


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    return tuple(as_size(size) for size in val(node).shape)


def plain_axis(size: Size) -> Axis:
    """Return the axis of a dimension unrelated to tokens."""
    return () if size == 1 else (Feature(size),)


def plain_axes(node: fx.Node) -> Axes:
    return tuple(plain_axis(size) for size in shape_of(node))


def uniform_axes(node: fx.Node) -> Axes:
    return tuple(() if size == 1 else (Uniform(size),) for size in shape_of(node))


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of the two token axes of one captured graph."""

    batch: Size
    seq: Size

    @property
    def rows(self) -> Axes:
        """Return the axes of ``[batch, sequence]``."""
        return ((BATCH,), (SEQ,)) if self.batch != 1 else ((), (SEQ,))

    @property
    def row(self) -> Axis:
        """Return the axis of ``[batch * sequence]``."""
        return tuple(atom for axis in self.rows for atom in axis)

    def atom_size(self, atom: Atom) -> Size:
        if isinstance(atom, Sorted):
            return self.axis_size(atom.axis)
        if isinstance(atom, Longer):
            return self.seq + atom.num_extra
        if isinstance(atom, Token):
            return self.batch if atom is BATCH else self.seq
        return atom.size

    def axis_size(self, axis: Axis) -> Size:
        return sympy.prod([self.atom_size(atom) for atom in axis]) if axis else sympy.Integer(1)


class Mixes(Exception):  # noqa: N818 - a verdict about an op, not an error in the program
    """Raised by a rule if the op's result is not prefix-determined for these inputs. The message is the reason."""

    def __init__(self, reason: str, code: RefusalCode = RefusalCode.CUSTOM_RULE) -> None:
        super().__init__(reason)
        self.code = code


def count_tokens(axes: Axes) -> tuple[int, int]:
    """Return the numbers of batch atoms and of sequence atoms."""
    atoms = [atom for axis in axes for atom in axis]
    return sum(atom is BATCH for atom in atoms), sum(atom is SEQ or isinstance(atom, Longer) for atom in atoms)


def is_longer(axis: Axis) -> bool:
    """Is the axis the columns of a sequence, followed by entries that have no column?"""
    return len(axis) == 1 and isinstance(axis[0], Longer)


def has_tokens(axis: Axis) -> bool:
    return any(isinstance(atom, Token) for atom in axis)


def feature(axis: Axis, what: str) -> None:
    """Raise :class:`Mixes` if an axis that the op reads along has tokens; ``what`` describes the op."""
    if has_tokens(axis):
        if SEQ in axis or is_longer(axis):
            along, code = "sequence", RefusalCode.MIXES_TOKENS
        elif BATCH in axis:
            along, code = "batch", RefusalCode.MIXES_SEQUENCES
        else:
            along, code = "sorted", RefusalCode.ORDER_OF_ROWS
        raise Mixes(f"{what} the {along} axis, so it reads other rows", code)
