"""What elementwise ops do to facts: comparisons of indices become predicates, predicates become masks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from radix_compile.mask_facts import (
    FALSE,
    OPAQUE,
    TRUE,
    AtMost,
    Blind,
    Break,
    Diff,
    Distance,
    Fact,
    Filled,
    Formula,
    Index,
    Masked,
    Ones,
    PerRow,
    Predicate,
    RowMax,
    RowTrue,
    Same,
    Score,
    Shifted,
    Step,
    Weights,
    conjunction,
    disjunction,
    negation,
)
from radix_compile.op_rules.bounds import bounds_of
from radix_compile.op_rules.table import argument
from radix_compile.token_axes import SEQ, Value, value_of

aten = torch.ops.aten
FACTS: dict[OpOverload, Callable[[fx.Node], Fact | None]] = {}

ORDINARY = 1e4
"""A constant this small does not take a score out of the ordinary."""


def elementwise_fact(node: fx.Node) -> Fact | None:
    assert isinstance(node.target, OpOverload)
    derive = FACTS.get(node.target)
    return derive(node) if derive else None


def fact_of(argument: Any) -> Fact | None:
    """The fact of a tensor argument; a Python number is a tensor filled with it."""
    if isinstance(argument, fx.Node):
        return value_of(argument).fact if isinstance(argument.meta.get("val"), torch.Tensor) else None
    return Filled(float(argument)) if isinstance(argument, bool | int | float) else None


def as_formula(value: Value) -> Formula:
    """A bool tensor as a formula."""
    match value.fact:
        case Predicate(formula):
            return formula
        case Filled(filled):
            return TRUE if filled else FALSE
        case PerRow(source, dim):
            return RowTrue(source, dim)
        case _:
            return OPAQUE


def _derives(*ops: OpOverload) -> Callable[[Callable[[fx.Node], Fact | None]], Callable[[fx.Node], Fact | None]]:
    def register(derive: Callable[[fx.Node], Fact | None]) -> Callable[[fx.Node], Fact | None]:
        FACTS.update(dict.fromkeys(ops, derive))
        return derive

    return register


def is_hidden(fact: Fact | None, dtype: torch.dtype) -> bool:
    """Is this the floor of a mask: minus infinity, or so near the lowest number that no score comes near it?

    A floor such as -1e9 is not: there is no proof that scores are smaller than that.
    """
    return isinstance(fact, Filled) and fact.value <= torch.finfo(dtype).min / 2


def is_bounded(value: Any, dtype: torch.dtype) -> bool:
    """Is a tensor or number of ordinary size in that dtype? Where it is wide, so are whole numbers, and parts of them.

    The lowest number of such a dtype is nearly 1e39, and no 64-bit integer is 1e19.
    """
    if isinstance(fact_of(value), Score):
        return True
    bounds = bounds_of(value)
    return bounds is not None and max(map(abs, bounds)) <= (2.0**64 if _is_wide(dtype) else ORDINARY)


def _is_wide(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).max > 1e30


# ------------------------------------------------------------------------------------------- comparing two columns


def _compare(node: fx.Node, sign: int, slack: int) -> Fact | None:
    """``sign * (left - right) <= slack``, for indices or for the same per-row quantity at two columns."""
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(left, Index) and isinstance(right, Index) and left.dim != right.dim:
        a, b = (left, right) if sign > 0 else (right, left)
        return Predicate(Diff(a.dim, b.dim, slack - (a.offset - b.offset)))
    first, second = _as_shifted(left), _as_shifted(right)
    if first and second and first.source is second.source and first.dim != second.dim:
        one, other = (first, second) if sign > 0 else (second, first)
        return Predicate(AtMost(one.source, one.dim, other.dim, slack - (one.offset - other.offset)))
    return None


def _compare_distance(node: fx.Node, sign: int, slack: int) -> Fact | None:
    """``sign * (distance - number) <= slack``."""
    fact, number = fact_of(node.args[0]), node.args[1]
    if not isinstance(fact, Distance) or isinstance(number, bool) or not isinstance(number, int):
        return None
    a, b = (fact.a, fact.b) if sign > 0 else (fact.b, fact.a)
    return Predicate(Diff(a, b, slack + sign * (number - fact.offset)))


def _as_shifted(fact: Fact | None) -> Shifted | None:
    if isinstance(fact, PerRow) and fact.exact:
        return Shifted(fact.source, fact.dim, 0)
    return fact if isinstance(fact, Shifted) else None


def _shifted(node: fx.Node, fact: Fact | None, amount: int) -> Fact | None:
    """An index or a row's integer plus a number, in a type in which that does not wrap around."""
    if isinstance(fact, Index | Distance):
        return replace(fact, offset=fact.offset + amount)
    shifted = _as_shifted(fact)
    if shifted is None or node.meta["val"].dtype not in (torch.int32, torch.int64):
        return None
    return Shifted(shifted.source, shifted.dim, shifted.offset + amount)


def _same_source(left: PerRow, right: PerRow) -> bool:
    return left.source is right.source and left.exact and right.exact and left.dim != right.dim


_COMPARISONS = {"le": (1, 0), "lt": (1, -1), "ge": (-1, 0), "gt": (-1, -1)}
for _name, (_sign, _slack) in _COMPARISONS.items():
    FACTS[getattr(aten, _name).Tensor] = functools.partial(_compare, sign=_sign, slack=_slack)
    FACTS[getattr(aten, _name).Scalar] = functools.partial(_compare_distance, sign=_sign, slack=_slack)


@_derives(aten.eq.Tensor)
def _eq(node: fx.Node) -> Fact | None:
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(left, PerRow) and isinstance(right, PerRow) and _same_source(left, right):
        return Predicate(Same(left.source, left.dim, right.dim, left.runs_of))
    low, high = _compare(node, 1, 0), _compare(node, -1, 0)
    if isinstance(low, Predicate) and isinstance(high, Predicate):
        return Predicate(conjunction(low.formula, high.formula))
    return None


@_derives(aten.eq.Scalar)
def _eq_scalar(node: fx.Node) -> Fact | None:
    fact = fact_of(node.args[0])
    if isinstance(fact, Ones) and node.args[1] in (0, 1):
        return Predicate(fact.formula if node.args[1] == 1 else negation(fact.formula))
    return None


@_derives(aten.ne.Scalar)
def _ne_scalar(node: fx.Node) -> Fact | None:
    fact = fact_of(node.args[0])
    if isinstance(fact, Ones) and node.args[1] == 0:
        return Predicate(fact.formula)
    if isinstance(fact, Step) and node.args[1] == 1:
        return Break(fact.source)
    if isinstance(fact, PerRow) and node.args[1] == 0:
        return PerRow(fact.source, fact.dim, exact=False)
    return None


# ------------------------------------------------------------------------------------------- combining predicates


def _formulas(node: fx.Node) -> tuple[Formula, Formula] | None:
    if node.meta["val"].dtype != torch.bool:
        return None
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node)
    first = as_formula(value_of(left))
    if isinstance(right, fx.Node):
        return first, as_formula(value_of(right))
    return first, TRUE if right else FALSE


@_derives(aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
def _and(node: fx.Node) -> Fact | None:
    formulas = _formulas(node)
    if formulas is not None:
        return Predicate(conjunction(*formulas))
    return _scaled(node) if node.target is aten.mul.Tensor else None


@_derives(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
def _or(node: fx.Node) -> Fact | None:
    formulas = _formulas(node)
    return Predicate(disjunction(*formulas)) if formulas is not None else None


@_derives(aten.bitwise_not.default, aten.logical_not.default)
def _not(node: fx.Node) -> Fact | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.meta["val"].dtype != torch.bool:
        return None
    return Predicate(negation(as_formula(value_of(source))))


# --------------------------------------------------------------------------------------------- arithmetic on facts


@_derives(aten.add.Tensor)
def _add(node: fx.Node) -> Fact | None:
    if argument(node, "alpha") != 1:
        return None
    (first, second), dtype = node.args[:2], node.meta["val"].dtype
    left, right = fact_of(first), fact_of(second)
    if isinstance(node.args[1], int) and isinstance(left, Index | Distance | PerRow | Shifted):
        return _shifted(node, left, node.args[1])
    for fact, other in ((left, right), (right, left)):
        if isinstance(fact, Masked):
            if isinstance(other, Masked):
                both = conjunction(fact.visible, other.visible)
                strict, scaled = fact.strict and other.strict, fact.scaled or other.scaled
                return Masked(both, fact.bounded and other.bounded, strict, scaled, zero=fact.zero and other.zero)
            ordinary = fact.bounded and is_bounded(second if fact is left else first, dtype)
            return replace(fact, bounded=ordinary, centred=False, zero=False)
    return Score() if dtype.is_floating_point and is_bounded(first, dtype) and is_bounded(second, dtype) else None


@_derives(aten.sub.Tensor)
def _sub(node: fx.Node) -> Fact | None:
    fact, other = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(node.args[1], int) and isinstance(fact, Index | Distance | PerRow | Shifted):
        return _shifted(node, fact, -node.args[1]) if argument(node, "alpha") == 1 else None
    if isinstance(fact, Index) and isinstance(other, Index) and fact.dim != other.dim:
        return Distance(fact.dim, other.dim, fact.offset - other.offset) if argument(node, "alpha") == 1 else None
    if isinstance(fact, Masked) and isinstance(other, RowMax) and other.of is node.args[0]:
        # The floor was far below the largest visible entry, and now that is zero at most.
        return (
            replace(fact, bounded=False, centred=fact.is_certain, zero=False) if argument(node, "alpha") == 1 else None
        )
    return None


@_derives(aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
def _scaled(node: fx.Node) -> Fact | None:
    """Scores stay scores under a factor of ordinary size, zero weights stay zero under any."""
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(left, Score) and isinstance(right, Filled) and 1 / ORDINARY <= abs(right.value) <= ORDINARY:
        return left
    if isinstance(left, Masked) and isinstance(right, Filled):
        divisor = right.value if node.target in (aten.div.Tensor, aten.div.Scalar) else 1 / (right.value or math.inf)
        return _scaled_mask(left, divisor, node.meta["val"].dtype)
    if isinstance(left, Weights) and isinstance(right, Filled) and math.isfinite(right.value) and right.value != 0:
        return left
    return None


def _scaled_mask(mask: Masked, divisor: float, dtype: torch.dtype) -> Masked | None:
    """Minus infinity stays it; a floor near the lowest number of a wide type stays far below any score, once."""
    if mask.strict and 0 < divisor < math.inf:
        return replace(mask, bounded=mask.bounded and 1 / ORDINARY <= divisor <= ORDINARY, centred=False)
    return (
        replace(mask, scaled=True, centred=False)
        if _is_wide(dtype) and not mask.scaled and 1 <= divisor <= ORDINARY
        else None
    )


@_derives(aten.max.other, aten.maximum.default)
def _maximum(node: fx.Node) -> Fact | None:
    """Nothing visible is as low as the floor, so raising everything to it keeps the mask."""
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    for fact, other in ((left, right), (right, left)):
        if isinstance(fact, Masked) and fact.bounded and is_hidden(other, node.meta["val"].dtype):
            return replace(fact, strict=False, centred=False)
    return None


@_derives(aten.tanh.default)
def _tanh(node: fx.Node) -> Fact | None:
    return Score()


def blanked(node: fx.Node) -> frozenset[Blind]:
    """What is blind no longer: times zero where they are padding, as before a scan, rows that saw no key are zero."""
    if node.target is not aten.mul.Tensor:
        return frozenset()
    found: set[Blind] = set()
    for fact, rows in (node.args[:2], node.args[1::-1]):
        mask = fact_of(fact)
        if isinstance(mask, PerRow) and isinstance(rows, fx.Node) and value_of(rows).is_row:
            axes = value_of(rows).axes
            if -mask.dim <= len(axes) and axes[mask.dim] == (SEQ,):
                found |= {b for b in value_of(rows).blind if b.source is mask.source and b.truth}
    return frozenset(found)


# ------------------------------------------------------------------------------------------------- applying masks


def _masked(visible: Formula, source: Any, floor: Fact | None, dtype: torch.dtype) -> Fact:
    kept = fact_of(source)
    if isinstance(kept, Masked):
        visible, bounded, strict = conjunction(visible, kept.visible), kept.bounded, kept.strict
    else:
        bounded, strict = is_bounded(source, dtype), True
    assert isinstance(floor, Filled)
    scaled = isinstance(kept, Masked) and kept.scaled
    zero = kept.zero if isinstance(kept, Masked) else kept == Filled(0)
    return Masked(visible, bounded, strict and floor.value == -math.inf, scaled, zero=zero)


@_derives(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(node: fx.Node) -> Fact | None:
    condition, first, second = node.args
    assert isinstance(condition, fx.Node)
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        return None
    formula = as_formula(value_of(condition))
    kept, other = fact_of(first), fact_of(second)
    if is_hidden(other, dtype):
        return _masked(formula, first, other, dtype)
    if is_hidden(kept, dtype):
        return _masked(negation(formula), second, kept, dtype)
    return None


@_derives(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(node: fx.Node) -> Fact | None:
    source, mask, value = node.args
    assert isinstance(mask, fx.Node)
    dtype = node.meta["val"].dtype
    floor = fact_of(value)
    if not dtype.is_floating_point or not is_hidden(floor, dtype):
        return None
    return _masked(negation(as_formula(value_of(mask))), source, floor, dtype)
