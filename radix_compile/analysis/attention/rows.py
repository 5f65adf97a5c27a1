"""Queries, keys and values: rows of heads, with dimensions in any order."""

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
"""A permutation of a tensor's dimensions; None stands for a new dimension of size one. Empty: the identity."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries, keys or values: a node whose dimensions in that ``order`` are ``[..., S, E]``, with heads in front."""

    node: fx.Node
    order: Order = ()

    @property
    def axes(self) -> Axes:
        axes = values_of(self.node)[0].axes
        return tuple(() if dim is None else axes[dim] for dim in self.order) if self.order else axes

    @property
    def is_by_head(self) -> bool:
        """Is the node ``[B, H, S, E]``, without a permutation?"""
        return not self.order and len(self.axes) == 4 and all(isinstance(atom, Token) for atom in self.axes[0])

    def heads(self) -> tuple[int, int]:
        """Return the number and the size of heads. Raises :class:`NotOnTree` if these are not rows of heads."""
        axes = self.axes
        if len(axes) < 3 or axes[-2] != (SEQ,):
            raise NotOnTree("its queries, keys or values are not rows of heads")
        leading = sizes_of([atom for axis in axes[:-2] for atom in axis])
        return int(sympy.prod(leading)), int(sympy.prod(sizes_of(axes[-1])))


def sizes_of(atoms: Axis | list[object]) -> list[sympy.Expr]:
    """Return the sizes of the atoms that are not tokens. Raises :class:`NotOnTree` if a size is symbolic."""
    sizes = [atom.size for atom in atoms if isinstance(atom, Feature | Uniform)]
    if not all(isinstance(size, sympy.Integer) for size in sizes):
        raise NotOnTree("the number or the size of its heads is symbolic")
    return sizes


def are_side_by_side(query: Rows, key: Rows, grouped: bool) -> bool:
    """Are the query heads that share a key head adjacent?

    They are if the head dimensions that keys lack come after the head dimensions that keys have; also with ``grouped``
    (torch's ``enable_gqa``, for one head dimension).
    """
    of_queries, of_keys = ([sympy.prod(sizes_of(axis)) for axis in rows.axes[:-2]] for rows in (query, key))
    if grouped:
        return len(of_queries) == 2
    of_keys = [sympy.Integer(1)] * (len(of_queries) - len(of_keys)) + of_keys
    rest = itertools.dropwhile(lambda sizes: sizes[0] == sizes[1], zip(of_queries, of_keys, strict=False))
    return len(of_queries) == len(of_keys) and all(size == 1 for _, size in rest)


def narrow(rows: Rows) -> Rows:
    """Return keys or values without the repeats for the query heads of a group, if repeated heads are adjacent."""
    atoms, result, node = _without_repeats(rows.axes), rows, rows.node
    while not rows.order:
        source = value_of(node).identity or (node.args[0] if _keeps_order(node) else None)
        if not isinstance(source, fx.Node):
            break
        node, candidate = source, Rows(source)
        axes = candidate.axes
        if value_of(node).is_row and len(axes) >= 3 and axes[-2] == (SEQ,) and _without_repeats(axes) == atoms:
            result = candidate
    return result


def _keeps_order(node: fx.Node) -> bool:
    info = info_of(node.target)
    return info.keeps_order and not info.casts


def _without_repeats(axes: Axes) -> tuple[object, ...]:
    """Return the atoms, without the repeats at the end of the head dimensions."""
    heads: Axis = tuple(atom for axis in axes[:-2] for atom in axis)
    while heads and isinstance(heads[-1], Uniform):
        heads = heads[:-1]
    return (*heads, SEQ, axes[-1])
