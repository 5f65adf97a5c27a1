"""Facts of elementwise ops: comparisons of indices are predicates, and predicates make masks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.bounds import bounds_of
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.axes import SEQ, shape_of
from radix_compile.ir.facts import (
    FALSE,
    OPAQUE,
    ORDINARY,
    TRUE,
    AtMost,
    Break,
    Diff,
    Distance,
    Fact,
    Filled,
    Formula,
    FullyMasked,
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
from radix_compile.ir.value import Value, value_of
from radix_compile.torch_internals import val

aten = torch.ops.aten

MAX_SYMBOLIC_SIZE = 2**30
"""The assumed bound on symbolic sizes. A mask of 2**30 columns would have 2**60 entries."""

LARGEST_OFFSET = 2**30
"""The largest offset of a row's integer; with integers that ``PlanInputs.orders`` accepts, no sum wraps around."""


def elementwise_fact(node: fx.Node) -> Fact | None:
    """Return the fact of an elementwise op's result by the op's row in the table."""
    derive = info_of(node.target).fact
    return derive(node) if derive else None


def fact_of(argument: Any) -> Fact | None:
    """Return the fact of a tensor, or of a Python number as a filled tensor."""
    if isinstance(argument, fx.Node):
        return value_of(argument).fact if isinstance(val(argument), torch.Tensor) else None
    return Filled(float(argument)) if isinstance(argument, bool | int | float) else None


def as_formula(value: Value) -> Formula:
    """Return the formula of a bool tensor."""
    match value.fact:
        case Predicate(formula):
            return formula
        case Filled(filled):
            return TRUE if filled else FALSE
        case PerRow(source, dim):
            return RowTrue(source, dim)
        case _:
            return OPAQUE


def is_hidden(fact: Fact | None, dtype: torch.dtype) -> bool:
    """Is this the floor of a mask: minus infinity, or so near the dtype's lowest number that no score is near it?

    A number such as -1e9 is not a floor: scores are not proved to be smaller in magnitude.
    """
    return isinstance(fact, Filled) and fact.value <= torch.finfo(dtype).min / 2


def size_of(value: Any) -> float:
    """Return the largest possible magnitude of a tensor's entries or of a number; infinite if unknown."""
    fact = fact_of(value)
    if isinstance(fact, Score):
        return fact.size
    bounds = bounds_of(value)
    return math.inf if bounds is None else max(map(abs, bounds))


def _score(size: float, dtype: torch.dtype) -> Score | None:
    """Return scores of that size, or None if the dtype cannot represent them."""
    return Score(size) if dtype.is_floating_point and size <= torch.finfo(dtype).max else None


# ------------------------------------------------------------------------------------------- comparing two columns


def compare(node: fx.Node, sign: int, slack: int) -> Fact | None:
    """Return the fact of ``sign * (left - right) <= slack``, for indices or for one node's integers at two columns."""
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(left, Index) and isinstance(right, Index) and left.dim != right.dim:
        a, b = (left, right) if sign > 0 else (right, left)
        return Predicate(Diff(a.dim, b.dim, slack - (a.offset - b.offset)))
    first, second = _as_shifted(left), _as_shifted(right)
    if first and second and first.source is second.source and first.dim != second.dim:
        p, q = (first, second) if sign > 0 else (second, first)
        return Predicate(AtMost(p.source, p.dim, q.dim, slack - (p.offset - q.offset)))
    return None


def compare_distance(node: fx.Node, sign: int, slack: int) -> Fact | None:
    """Return the fact of ``sign * (distance - number) <= slack``."""
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
    """Return the fact of an index or a row's integer plus a number, or None if the sum may wrap around.

    The integers of rows are unknown when compiling; each call checks them (``PlanInputs.orders``).
    """
    if isinstance(fact, Index | Distance):
        return if_representable(node, replace(fact, offset=fact.offset + amount))
    shifted = _as_shifted(fact)
    if shifted is None or val(node).dtype not in (torch.int32, torch.int64):
        return None
    offset = shifted.offset + amount
    return Shifted(shifted.source, shifted.dim, offset) if abs(offset) <= LARGEST_OFFSET else None


def if_representable(node: fx.Node, fact: Index | Distance) -> Index | Distance | None:
    """Return the fact, or None if the node's integer dtype is too small for its numbers, so that some wrap around."""
    shape, limits = shape_of(node), torch.iinfo(val(node).dtype)

    def last(dim: int) -> int:
        return int(shape[dim]) - 1 if shape[dim].is_Integer else MAX_SYMBOLIC_SIZE

    if isinstance(fact, Index):
        low, high = fact.offset, fact.offset + last(fact.dim)
    else:
        low, high = fact.offset - last(fact.b), fact.offset + last(fact.a)
    return fact if limits.min <= low <= high <= limits.max else None


def _same_source(left: PerRow, right: PerRow) -> bool:
    return left.source is right.source and left.exact and right.exact and left.dim != right.dim


def eq(node: fx.Node) -> Fact | None:
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(left, PerRow) and isinstance(right, PerRow) and _same_source(left, right):
        return Predicate(Same(left.source, left.dim, right.dim, left.counted_from))
    low, high = compare(node, 1, 0), compare(node, -1, 0)
    if isinstance(low, Predicate) and isinstance(high, Predicate):
        return Predicate(conjunction(low.formula, high.formula))
    return None


def eq_scalar(node: fx.Node) -> Fact | None:
    fact = fact_of(node.args[0])
    if isinstance(fact, Ones) and node.args[1] in (0, 1):
        return Predicate(fact.formula if node.args[1] == 1 else negation(fact.formula))
    return None


def ne_scalar(node: fx.Node) -> Fact | None:
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
    if val(node).dtype != torch.bool:
        return None
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node)
    first = as_formula(value_of(left))
    if isinstance(right, fx.Node):
        return first, as_formula(value_of(right))
    return first, TRUE if right else FALSE


def and_(node: fx.Node) -> Fact | None:
    formulas = _formulas(node)
    if formulas is not None:
        return Predicate(conjunction(*formulas))
    return scale(node) if node.target is aten.mul.Tensor else None


def or_(node: fx.Node) -> Fact | None:
    formulas = _formulas(node)
    return Predicate(disjunction(*formulas)) if formulas is not None else None


def not_(node: fx.Node) -> Fact | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if val(source).dtype != torch.bool:
        return None
    return Predicate(negation(as_formula(value_of(source))))


# --------------------------------------------------------------------------------------------- arithmetic on facts


def add(node: fx.Node) -> Fact | None:
    if argument(node, "alpha") != 1:
        return None
    (first, second), dtype = node.args[:2], val(node).dtype
    left, right = fact_of(first), fact_of(second)
    if isinstance(node.args[1], int) and isinstance(left, Index | Distance | PerRow | Shifted):
        return _shifted(node, left, node.args[1])
    for fact, other in ((left, right), (right, left)):
        if isinstance(fact, Masked):
            if isinstance(other, Masked):
                both = conjunction(fact.visible, other.visible)
                floor = max(
                    _floor_plus(fact, max(other.size, other.floor)), _floor_plus(other, max(fact.size, fact.floor))
                )
                return Masked.of(both, floor, fact.size + other.size, fact.zero and other.zero)
            return _added(fact, size_of(second if fact is left else first))
    return _score(size_of(first) + size_of(second), dtype)


def _added(mask: Masked, size: float) -> Masked:
    """Return a mask plus finite numbers of at most that magnitude."""
    return Masked.of(mask.visible, _floor_plus(mask, size), mask.size + size)


def _floor_plus(mask: Masked, size: float) -> float:
    return -math.inf if mask.is_strict else mask.floor + size


def added_to_products(mask: Masked) -> Masked:
    """Return the masked scores if the mask is added to query-key products."""
    return _added(mask, ORDINARY)


def biased_scores(bias: fx.Node, beta: Any, alpha: Any, dtype: torch.dtype) -> Fact | None:
    """Return the fact of ``beta * bias + alpha * product``, a product of queries and keys."""
    if not all(isinstance(factor, int | float) and math.isfinite(factor) for factor in (alpha, beta)):
        return None
    products, fact = ORDINARY * abs(alpha), fact_of(bias)
    if beta == 0:  # the bias is ignored
        return _score(products, dtype)
    if isinstance(fact, Masked):
        scaled = _times(fact, beta, dtype)
        return None if scaled is None else _added(scaled, products)
    return _score(products + size_of(bias) * abs(beta), dtype)


def sub(node: fx.Node) -> Fact | None:
    fact, other = fact_of(node.args[0]), fact_of(node.args[1])
    if isinstance(node.args[1], int) and isinstance(fact, Index | Distance | PerRow | Shifted):
        return _shifted(node, fact, -node.args[1]) if argument(node, "alpha") == 1 else None
    if isinstance(fact, Index) and isinstance(other, Index) and fact.dim != other.dim:
        distance = Distance(fact.dim, other.dim, fact.offset - other.offset)
        return if_representable(node, distance) if argument(node, "alpha") == 1 else None
    if isinstance(fact, Masked) and isinstance(other, RowMax) and other.of is node.args[0]:
        # The largest visible entry of each row becomes zero, and the gap to hidden entries stays the same.
        floor = -math.inf if fact.is_strict else -fact.gap
        return Masked(fact.visible, floor, math.inf, fact.gap) if argument(node, "alpha") == 1 else None
    return None


def scale(node: fx.Node) -> Fact | None:
    """Return the fact of scores, weights or a mask times (or divided by) a number, which must be positive for masks."""
    fact, factor = fact_of(node.args[0]), fact_of(node.args[1])
    if not isinstance(factor, Filled) or not math.isfinite(factor.value) or factor.value == 0:
        return None
    divides, dtype = node.target in (aten.div.Tensor, aten.div.Scalar), val(node).dtype
    by = 1 / factor.value if divides else factor.value
    if isinstance(fact, Score):
        return _score(fact.size * abs(by), dtype)
    if isinstance(fact, Masked):
        return _times(fact, by, dtype)
    return fact if isinstance(fact, Weights) else None


def _times(mask: Masked, by: float, dtype: torch.dtype) -> Masked | None:
    if by <= 0:
        return None
    scaled = _in_dtype(replace(mask, floor=mask.floor * by, size=mask.size * by, gap=mask.gap * by), dtype)
    return scaled if scaled.is_certain or not mask.is_certain else None  # the factor may make the gap too small


def _in_dtype(mask: Masked, dtype: torch.dtype) -> Masked:
    """Return a mask after rounding to ``dtype``, where large visible entries (and hidden entries) may be infinite."""
    fits = not mask.size < math.inf or mask.size <= torch.finfo(dtype).max
    return mask if fits else Masked.of(mask.visible, mask.floor, math.inf)


def in_other_dtype(fact: Fact | None, dtype: torch.dtype) -> Fact | None:
    """Return the fact after a cast between floating-point dtypes. The floor keeps its value, also in a wider dtype."""
    if isinstance(fact, Masked):
        return _in_dtype(fact, dtype)
    return _score(fact.size, dtype) if isinstance(fact, Score) else fact


def maximum(node: fx.Node) -> Fact | None:
    """Return the fact of a maximum with the floor, which is below all visible entries, so that the mask stays."""
    left, right = fact_of(node.args[0]), fact_of(node.args[1])
    for fact, other in ((left, right), (right, left)):
        if isinstance(fact, Masked) and is_hidden(other, val(node).dtype):
            assert isinstance(other, Filled)
            if other.value <= -fact.size:
                return Masked.of(fact.visible, max(fact.floor, other.value), fact.size, fact.zero)
    return None


def tanh(node: fx.Node) -> Fact | None:
    return Score(1.0)


def zeroed_rows(node: fx.Node) -> frozenset[FullyMasked]:
    """Return the fully masked rows that a product with a padding mask sets to zero (before a scan)."""
    if node.target is not aten.mul.Tensor:
        return frozenset()
    result: set[FullyMasked] = set()
    for fact, rows in (node.args[:2], node.args[1::-1]):
        mask = fact_of(fact)
        if isinstance(mask, PerRow) and isinstance(rows, fx.Node) and value_of(rows).is_row:
            axes = value_of(rows).axes
            if -mask.dim <= len(axes) and axes[mask.dim] == (SEQ,):
                fully_masked = value_of(rows).fully_masked
                result |= {masked for masked in fully_masked if masked.source is mask.source and masked.truth}
    return frozenset(result)


# ------------------------------------------------------------------------------------------------- applying masks


def _masked(visible: Formula, source: Any, floor: Fact | None) -> Fact:
    """Return the fact of ``source`` where ``visible`` holds, and ``floor`` elsewhere."""
    fact = fact_of(source)
    assert isinstance(floor, Filled)
    if isinstance(fact, Masked):
        both = conjunction(visible, fact.visible)
        return Masked.of(both, max(floor.value, fact.floor), fact.size, fact.zero)
    return Masked.of(visible, floor.value, size_of(source), zero=fact == Filled(0))


def where(node: fx.Node) -> Fact | None:
    condition, if_true, if_false = node.args
    assert isinstance(condition, fx.Node)
    dtype = val(node).dtype
    if not dtype.is_floating_point:
        return None
    formula = as_formula(value_of(condition))
    first, second = fact_of(if_true), fact_of(if_false)
    if is_hidden(second, dtype):
        return _masked(formula, if_true, second)
    if is_hidden(first, dtype):
        return _masked(negation(formula), if_false, first)
    return None


def masked_fill(node: fx.Node) -> Fact | None:
    source, mask, value = node.args
    assert isinstance(mask, fx.Node)
    dtype = val(node).dtype
    floor = fact_of(value)
    if not dtype.is_floating_point or not is_hidden(floor, dtype):
        return None
    return _masked(negation(as_formula(value_of(mask))), source, floor)
