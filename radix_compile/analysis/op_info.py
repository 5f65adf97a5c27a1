"""The table of ops: one row, an :class:`OpInfo`, has all that is known about an op.

The rows are in ``op_table``, the only module besides ``register_rule`` that writes to ``OP_INFO``. It is imported with
the package, so the table is complete before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import fx

from radix_compile.ir.axes import Layout
from radix_compile.ir.facts import Fact
from radix_compile.ir.value import Marks
from radix_compile.torch_internals import HigherOrderOperator, OpOverload

if TYPE_CHECKING:
    from radix_compile.analysis.bounds import Bounds
    from radix_compile.analysis.reach.column_reach import ReachRule
    from radix_compile.analysis.rules.row_numbers import RowNumbersRule

Rule: TypeAlias = Callable[[fx.Node, Layout], Marks]
"""Returns the value of an op's result (a tuple of values for several results), given the values of its inputs.

For a position-wise op the value has one ``BATCH`` and one ``SEQ`` atom; for a causal op ``Value.full_only`` is set too.
For any other op the rule raises :class:`~radix_compile.ir.axes.Mixes` with the reason.
"""

Linear: TypeAlias = Literal["all", "each", "first"]
"""In which operands an op's result is linear: in all together, in each one while the others stay, or in the first."""

FactRule: TypeAlias = Callable[[fx.Node], Fact | None]
"""Returns the fact of an elementwise op's result, given the facts of its operands (``masks``)."""

BoundsRule: TypeAlias = "Callable[[fx.Node], Bounds | None]"
"""Returns an interval that holds all entries of the result, or None if unknown (``bounds``)."""

Op: TypeAlias = OpOverload | HigherOrderOperator | str | torch.Tag
"""The key of a row.

An op; the name ``library::op.overload`` of an op that another package registers; or ``torch.Tag.pointwise``, for all
ops without a row that torch tags as pointwise.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpInfo:
    """All that is known about an op. The defaults are always safe: nothing is known.

    rule: the axes of the result, and whether the result is prefix-determined. An op without a rule is assumed to mix
        rows, unless all its inputs are constant.
    fact: the fact about the result's entries; used by the rule for elementwise ops.
    row_numbers: the rows that each entry of the result is computed from; used behind the last layer. An op without it
        may compute any entry from any rows.
    reach: the last column that each entry of the result reads; used where axes are lost.
    bounds: an interval that holds all entries of the result.
    linear: in which operands the result is linear, scalars aside; None if in none, or unknown.
    flops: the multiplications and additions of a node; None counts as 0.
    shape_argument: the argument that is the result's shape, which the rewrite derives again from the axes.
    is_view: the op moves entries of its first input and computes none, so it is free in either form.
    is_cheap: the op costs no more than reading its inputs. Masks and positions are computed by cheap ops only.
    finite_at_zero: if an elementwise op's first operand is zero, its result is finite, and so are its derivatives.
    keeps_order: the result has the dimensions of the first input in the same order, maybe merged, split or extended.
    casts: the op may return the entries of its first input in another dtype.
    reads_layout: the op's result may depend on the memory layout of its inputs. (Assumed of all ops of other packages:
        ``memory``.)
    takes_mixed: the rule handles mixed inputs: the op does not read their values, or the rule knows a pattern.
    takes_arrangements: the rule handles the sorted order of rows.
    """

    rule: Rule | None = None
    fact: FactRule | None = None
    reach: ReachRule | None = None
    bounds: BoundsRule | None = None
    row_numbers: RowNumbersRule | None = None
    linear: Linear | None = None
    flops: Callable[[fx.Node], int] | None = None
    shape_argument: str | None = None
    is_view: bool = False
    is_cheap: bool = False
    finite_at_zero: bool = False
    keeps_order: bool = False
    casts: bool = False
    reads_layout: bool = False
    takes_mixed: bool = False
    takes_arrangements: bool = False


OP_INFO: dict[Op, OpInfo] = {}
UNKNOWN = OpInfo()


def info_of(op: object) -> OpInfo:
    """Return the row of an op.

    An op without a row has the row of ``torch.Tag.pointwise`` if torch tags it as pointwise and it draws no random
    numbers. For any other op or target the result is ``UNKNOWN``.
    """
    if isinstance(op, HigherOrderOperator):
        return OP_INFO.get(op, UNKNOWN)
    if not isinstance(op, OpOverload):
        return UNKNOWN
    info = OP_INFO.get(op) or OP_INFO.get(op.name())
    if info is not None:
        return info
    pointwise = torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags
    return OP_INFO[torch.Tag.pointwise] if pointwise and not op._schema.is_mutable else UNKNOWN
