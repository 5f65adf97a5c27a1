"""The table of ops: one row, an :class:`OpInfo`, says all that is known about an op.

The rows stand in ``op_table``, which is the only module that writes to ``OP_INFO`` besides ``register_rule``. It is
imported with the package, so that nobody sees the table without them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import fx

from radix_compile.ir.axes import Layout
from radix_compile.ir.facts import Fact
from radix_compile.ir.value import Marks
from radix_compile.torch_internals import HigherOrderOperator, OpOverload

if TYPE_CHECKING:
    from radix_compile.analysis.bounds import Bounds
    from radix_compile.analysis.reach.column_reach import ReachRule

Rule: TypeAlias = Callable[[fx.Node, Layout], Marks]
"""The meaning of an op's result to the tokens, given that of its inputs.

It says that the op is position-wise by returning a value with one ``BATCH`` and one ``SEQ`` atom (or a tuple of values
for an op with several results), that it is causal by setting ``Value.full_only``, and that it is neither by raising
:class:`~radix_compile.ir.axes.Mixes` with the reason.
"""

FactRule: TypeAlias = Callable[[fx.Node], Fact | None]
"""The fact about an elementwise op's result, given those about its operands (``masks``)."""

BoundsRule: TypeAlias = "Callable[[fx.Node], Bounds | None]"
"""An interval in which all entries of the result lie; None if none is known (``bounds``)."""

Op: TypeAlias = OpOverload | HigherOrderOperator | str | torch.Tag
"""The key of a row.

It is an op; the name of one that other packages register, ``library::op.overload``; or ``torch.Tag.pointwise``, which
stands for all ops without a row that torch tags so.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpInfo:
    """All that is known about an op. Every default is the one that is always safe: nothing is known.

    rule: the meaning of the result's dimensions, and whether the result is prefix-determined. Without a rule the op is
        taken to mix rows, unless all that it reads is constant.
    fact: what is known of the result's entries; asked for if the rule is that of elementwise ops.
    reach: the last column that each entry of the result reads, asked for where axes cannot be followed.
    bounds: an interval in which all entries of the result lie.
    flops: the multiplications and additions of a node; without it they are not counted.
    shape_argument: the argument that is the result's shape, which the rewrite derives again from the axes.
    is_view: the op moves entries of its first input and computes none, so that it is free in either form.
    is_cheap: the op costs no more than to read its inputs. Masks and positions are computed by such ops alone.
    keeps_order: the result has the dimensions of the first input in their order, perhaps merged, cut or more of them.
    casts: the op may return the entries of its first input in another dtype.
    reads_layout: the op may return something else for the same entries in another memory layout. (Ops of other packages
        are all taken to: ``memory``.)
    takes_mixed: the rule looks at mixed inputs itself. The op does not read their values, or the rule knows a pattern.
    takes_arrangements: the rule knows what to do with the order that a sort gave to rows.
    """

    rule: Rule | None = None
    fact: FactRule | None = None
    reach: ReachRule | None = None
    bounds: BoundsRule | None = None
    flops: Callable[[fx.Node], int] | None = None
    shape_argument: str | None = None
    is_view: bool = False
    is_cheap: bool = False
    keeps_order: bool = False
    casts: bool = False
    reads_layout: bool = False
    takes_mixed: bool = False
    takes_arrangements: bool = False


OP_INFO: dict[Op, OpInfo] = {}
UNKNOWN = OpInfo()


def info_of(op: object) -> OpInfo:
    """The row of an op; without one, that of elementwise ops if torch tags it so and it draws no random numbers.

    ``UNKNOWN`` for any other target of a node.
    """
    if isinstance(op, HigherOrderOperator):
        return OP_INFO.get(op, UNKNOWN)
    if not isinstance(op, OpOverload):
        return UNKNOWN
    found = OP_INFO.get(op) or OP_INFO.get(op.name())
    if found is not None:
        return found
    pointwise = torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags
    return OP_INFO[torch.Tag.pointwise] if pointwise and not op._schema.is_mutable else UNKNOWN
