"""Queries, keys and values: rows of heads, in whatever order the dimensions are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import sympy
from torch import fx

from radix_compile.analysis.op_info import info_of
from radix_compile.ir.axes import SEQ, Axes, Axis, Feature, Token, Uniform
from radix_compile.ir.value import value_of, values_of


class NotOnTree(Exception):  # noqa: N818 - a verdict about an attention
    """An attention has no compact form. The message says why."""


Order = tuple[int | None, ...]
"""A tensor's dimensions in another order; None for one of size one that it does not have. Empty: as they are."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries, keys or values: a node whose dimensions, in that ``order``, are ``[..., S, E]``; heads are in front."""

    node: fx.Node
    order: Order = ()

    @property
    def axes(self) -> Axes:
        axes = values_of(self.node)[0].axes
        return tuple(() if dim is None else axes[dim] for dim in self.order) if self.order else axes

    @property
    def is_by_head(self) -> bool:
        """Is it ``[B, H, S, E]`` as it is?"""
        return not self.order and len(self.axes) == 4 and all(isinstance(atom, Token) for atom in self.axes[0])

    def heads(self) -> tuple[int, int]:
        """The number and the size of heads. Raises :class:`NotOnTree` if these are not rows of heads."""
        axes = self.axes
        if len(axes) < 3 or axes[-2] != (SEQ,):
            raise NotOnTree("its queries, keys or values are not rows of heads")
        front = sizes_of([atom for axis in axes[:-2] for atom in axis])
        return int(sympy.prod(front)), int(sympy.prod(sizes_of(axes[-1])))


def sizes_of(atoms: Axis | list[object]) -> list[sympy.Expr]:
    sizes = [atom.size for atom in atoms if isinstance(atom, Feature | Uniform)]
    if not all(isinstance(size, sympy.Integer) for size in sizes):
        raise NotOnTree("the number or the size of its heads is not a number")
    return sizes


def are_side_by_side(query: Rows, key: Rows, grouped: bool) -> bool:
    """Are the heads of a group of queries, which share a head of keys, side by side?

    They are if a dimension that keys do not have is behind those that they have (or with ``grouped``, torch's
    ``enable_gqa``, which is for one dimension of heads).
    """
    many, few = ([sympy.prod(sizes_of(axis)) for axis in rows.axes[:-2]] for rows in (query, key))
    if grouped:
        return len(many) == 2
    few = [sympy.Integer(1)] * (len(many) - len(few)) + few
    behind = itertools.dropwhile(lambda sizes: sizes[0] == sizes[1], zip(many, few, strict=False))
    return len(many) == len(few) and all(size == 1 for _, size in behind)


def narrow(rows: Rows) -> Rows:
    """Keys or values without the copies that are made for the heads of a group, whose entries are side by side."""
    wanted, found, node = _order(rows.axes), rows, rows.node
    while not rows.order:
        source = value_of(node).identity or (node.args[0] if _keeps_order(node) else None)
        if not isinstance(source, fx.Node):
            break
        node, candidate = source, Rows(source)
        axes = candidate.axes
        if value_of(node).is_row and len(axes) >= 3 and axes[-2] == (SEQ,) and _order(axes) == wanted:
            found = candidate
    return found


def _keeps_order(node: fx.Node) -> bool:
    info = info_of(node.target)
    return info.keeps_order and not info.casts


def _order(axes: Axes) -> tuple[object, ...]:
    """The atoms, without the copies at the end of the heads."""
    heads: Axis = tuple(atom for axis in axes[:-2] for atom in axis)
    while heads and isinstance(heads[-1], Uniform):
        heads = heads[:-1]
    return (*heads, SEQ, axes[-1])
