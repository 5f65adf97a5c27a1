"""Facts about a tensor's entries: indices, predicates over two columns, masked scores, attention weights.

Dimensions are counted from the right (``-1`` is the last) so that broadcasting keeps facts valid. A predicate is about
a tensor with two column dimensions, query and key: it is a small formula whose atoms compare the two columns or look up
a row. The formula tells whether the mask is causal, whether every row sees itself, and, if not, which rows may be fully
masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from radix_compile.ir.axes import Axes, Mixes
from radix_compile.ir.errors import RefusalCode

# ---------------------------------------------------------------------------------------------------- predicates


@dataclass(frozen=True, slots=True)
class Diff:
    """``column[a] - column[b] <= bound``."""

    a: int
    b: int
    bound: int


@dataclass(frozen=True, slots=True)
class RowTrue:
    """``source[b, column[dim]] != 0`` (``== 0`` if ``truth`` is False): the formula of a padding mask."""

    source: fx.Node
    dim: int
    truth: bool = True


@dataclass(frozen=True, slots=True)
class Same:
    """``source[b, column[a]] == source[b, column[b]]``; ``counted_from``: the positions whose breaks it counts."""

    source: fx.Node
    a: int
    b: int
    counted_from: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class AtMost:
    """``source[b, column[a]] - source[b, column[b]] <= bound``: a ``Diff`` of positions instead of columns."""

    source: fx.Node
    a: int
    b: int
    bound: int = 0


@dataclass(frozen=True, slots=True)
class Given:
    """The formula of a mask given as an input: ``source[b, ..., column[query], column[key]]`` shows the key.

    Its entries are unknown when the graph is compiled. Each call checks that no row sees a later row, and that every
    row sees itself (``given_masks``).
    """

    source: fx.Node
    query: int
    key: int


@dataclass(frozen=True, slots=True)
class And:
    terms: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class Or:
    terms: tuple[Formula, ...]


@dataclass(frozen=True, slots=True)
class Opaque:
    """An unknown predicate."""


Formula = Diff | RowTrue | Same | AtMost | Given | And | Or | Opaque
TRUE = And(())
FALSE = Or(())
OPAQUE = Opaque()


def conjunction(*formulas: Formula) -> Formula:
    terms: dict[Formula, None] = {}
    for formula in formulas:
        terms.update(dict.fromkeys(terms_of(formula)))
    return next(iter(terms)) if len(terms) == 1 else And(tuple(terms))


def disjunction(*formulas: Formula) -> Formula:
    return Or(tuple(dict.fromkeys(formulas)))


def terms_of(formula: Formula) -> tuple[Formula, ...]:
    """Return the terms of which the predicate is the conjunction."""
    return formula.terms if isinstance(formula, And) else (formula,)


def atoms_of(formula: Formula) -> Iterator[Formula]:
    if isinstance(formula, And | Or):
        for term in formula.terms:
            yield from atoms_of(term)
    else:
        yield formula


def ordered_by(formula: Formula) -> Iterator[fx.Node]:
    """Yield the integers of rows whose order, or whose differences between neighbours, the formula depends on."""
    for atom in atoms_of(formula):
        if isinstance(atom, AtMost):
            yield atom.source
        elif isinstance(atom, Same) and atom.counted_from is not None:
            yield atom.counted_from


def is_known(formula: Formula) -> bool:
    """Has the formula no opaque atom? Two equal formulas with opaque atoms may be different predicates."""
    return not any(isinstance(atom, Opaque) for atom in atoms_of(formula))


def negation(formula: Formula) -> Formula:
    match formula:
        case Diff(a, b, bound):
            return Diff(b, a, -bound - 1)
        case AtMost(source, a, b, bound):
            return AtMost(source, b, a, -bound - 1)
        case And(terms):
            return Or(tuple(negation(term) for term in terms))
        case Or(terms):
            return conjunction(*(negation(term) for term in terms))
        case RowTrue(source, dim, truth):
            return RowTrue(source, dim, not truth)
        case _:
            return OPAQUE


def implies_causal(formula: Formula, query: int, key: int) -> bool:
    """Does the predicate hold only where ``key column <= query column``?"""
    match formula:
        case Diff(a, b, bound):
            return a == key and b == query and bound <= 0
        case Given():
            return (formula.query, formula.key) == (query, key)
        case And(terms):
            counted = {
                term.counted_from for term in terms if isinstance(term, Same) and {term.a, term.b} == {query, key}
            }
            # Within one sequence positions grow by one per column, so comparing positions compares columns.
            positions = [term for term in terms if isinstance(term, AtMost) and term.source in counted]
            ordered = any((term.a, term.b) == (key, query) and term.bound <= 0 for term in positions)
            return ordered or any(implies_causal(term, query, key) for term in terms)
        case Or(terms):
            return all(implies_causal(term, query, key) for term in terms)
        case _:
            return False


def holds_on_diagonal(formula: Formula, query: int, key: int) -> bool:
    """Does the predicate certainly hold where query and key are the same column?"""
    match formula:
        case Diff() | AtMost():
            return {formula.a, formula.b} == {query, key} and formula.bound >= 0
        case Same():
            return {formula.a, formula.b} == {query, key}
        case Given():
            return (formula.query, formula.key) == (query, key)
        case And(terms):
            return all(holds_on_diagonal(term, query, key) for term in terms)
        case Or(terms):
            return any(holds_on_diagonal(term, query, key) for term in terms)
        case _:
            return False


@dataclass(frozen=True, slots=True)
class FullyMasked:
    """The fully masked rows of an attention.

    At these rows ``source`` is zero (nonzero if ``truth`` is False) in each of the last ``window`` columns up to the
    row, or in all columns up to the row if ``window`` is None.
    """

    source: fx.Node
    window: int | None
    truth: bool = True


def fully_masked_rows(formula: Formula, query: int, key: int) -> FullyMasked | None:
    """Return the fully masked rows of a causal mask, or None if every row sees itself.

    Fully masked rows are not prefix-determined: with an additive finite mask they attend to all rows, later rows too.
    """
    if holds_on_diagonal(formula, query, key):
        return None
    terms = terms_of(formula)
    window: int | None = None
    keys: set[tuple[fx.Node, bool]] = set()
    for term in terms:
        match term:
            case RowTrue(source, dim, truth) if dim == key:
                keys.add((source, truth))
            case Diff(a, b, bound) if (a, b) == (key, query) and bound == 0:
                pass
            case Diff(a, b, bound) if (a, b) == (query, key) and bound >= 0:
                window = bound + 1 if window is None else min(window, bound + 1)
            case _:
                raise Mixes(
                    "cannot tell which rows the mask leaves without a key to see", RefusalCode.ROWS_WITHOUT_KEYS
                )
    if len(keys) != 1:
        raise Mixes("cannot tell which rows the mask leaves without a key to see", RefusalCode.ROWS_WITHOUT_KEYS)
    source, truth = keys.pop()
    return FullyMasked(source, window, truth)


def hides(formula: Formula, fully_masked: FullyMasked, key: int) -> bool:
    """Does the mask hide, from every row, the keys at which ``fully_masked.source`` is zero (see ``truth``)?"""
    return RowTrue(fully_masked.source, key, fully_masked.truth) in terms_of(formula)


# --------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class Index:
    """Each entry is its own index along ``dim``, plus ``offset``."""

    dim: int
    offset: int


@dataclass(frozen=True, slots=True)
class Distance:
    """``column[a] - column[b] + offset``."""

    a: int
    b: int
    offset: int


@dataclass(frozen=True, slots=True)
class Filled:
    """Every entry is ``value``."""

    value: float


def cast_filled(fact: Filled, dtype: torch.dtype) -> Filled | None:
    """Return the fact after a cast to ``dtype``, or None if the cast may round the value to zero or wrap it around."""
    if dtype == torch.bool:
        return Filled(float(fact.value != 0))
    if dtype.is_complex:
        return None
    if dtype.is_floating_point:
        is_normal = fact.value == 0 or abs(fact.value) >= torch.finfo(dtype).tiny
        return fact if is_normal and fact.value <= torch.finfo(dtype).max else None
    limits = torch.iinfo(dtype)
    return fact if float(fact.value).is_integer() and limits.min <= fact.value <= limits.max else None


@dataclass(frozen=True, slots=True)
class PerRow:
    """Each entry is that of ``source`` at the same row (``dim`` is the column); unless ``exact``, only its truth is."""

    source: fx.Node
    dim: int
    exact: bool = True
    counted_from: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Shifted:
    """Each entry is the entry of ``source`` at the same row plus ``offset``."""

    source: fx.Node
    dim: int
    offset: int


@dataclass(frozen=True, slots=True)
class Step:
    """``source[:, j] - source[:, j - 1]``, and 1 in column 0."""

    source: fx.Node


@dataclass(frozen=True, slots=True)
class Break:
    """A bool tensor that is true where :class:`Step` is not 1."""

    source: fx.Node


@dataclass(frozen=True, slots=True)
class Predicate:
    """A bool tensor that holds exactly where ``formula`` does."""

    formula: Formula


@dataclass(frozen=True, slots=True)
class Ones:
    """A tensor of numbers, 1 where ``formula`` holds and 0 elsewhere (``tril(ones)``)."""

    formula: Formula


ORDINARY = 1e4
"""The bound on query-key products. It is assumed, not proved: the floor of a float16 mask is not far below it."""

NO_WEIGHT_GAP = 1e3
"""The gap by which an entry below another has no weight in a softmax: exp(-1000) is zero in float64."""


@dataclass(frozen=True, slots=True)
class Score:
    """Query-key products (maybe scaled or soft-capped), or terms added to them: at most ``size`` in magnitude."""

    size: float = ORDINARY


@dataclass(frozen=True, slots=True)
class Masked:
    """Masked scores, or an additive mask: entries are hidden wherever ``visible`` does not hold.

    ``floor`` bounds the hidden entries from above; ``size`` bounds the magnitude of the visible entries (infinite if
    unknown). In a row with visible entries, hidden entries are below the largest visible entry by at least ``gap``.
    ``zero`` if the visible entries are zero. (After the largest entry of each row was subtracted, the floor, like the
    gap, is about the rows that see a key.)
    """

    visible: Formula
    floor: float
    size: float
    gap: float
    zero: bool = False

    @classmethod
    def of(cls, visible: Formula, floor: float, size: float, zero: bool = False) -> Masked:
        gap = math.inf if floor == -math.inf else -size - floor
        return cls(visible, floor, size, gap, zero)

    @property
    def is_strict(self) -> bool:
        """Are the hidden entries minus infinity?"""
        return self.floor == -math.inf

    @property
    def is_certain(self) -> bool:
        """Have the hidden entries of a row with a visible entry no weight in a softmax?"""
        return self.gap >= NO_WEIGHT_GAP


@dataclass(frozen=True, slots=True)
class RowMax:
    """The largest entry of each row of the masked scores ``of``."""

    of: fx.Node


@dataclass(frozen=True, slots=True)
class Weights:
    """Attention weights: exactly zero wherever ``visible`` does not hold, except in fully masked rows.

    ``undefined`` if the weights of fully masked rows are NaN (a softmax of minus infinity alone).
    """

    visible: Formula
    query: int
    key: int
    undefined: bool = False


Fact = (
    Index | Distance | Filled | PerRow | Shifted | Step | Break | Predicate | Ones | Score | Masked | RowMax | Weights
)


def remap(fact: Fact | None, dims: Mapping[int, int]) -> Fact | None:
    """Return the fact after a view that moves dimension ``d`` to ``dims[d]``; None if a dimension is gone."""
    try:
        return _remap(fact, lambda dim: dims[dim])
    except KeyError:
        return None


def without_dims_of_size_one(fact: Fact | None, axes: Axes) -> Fact | None:
    """Return the fact, or None if it is about a dimension of size one, which may be broadcast to other columns."""
    if isinstance(fact, Step | Break | RowMax):
        return fact
    return remap(fact, {dim: dim for dim in range(-len(axes), 0) if axes[dim]})


def _remap(fact: Fact | None, to: Callable[[int], int]) -> Fact | None:
    match fact:
        case Index(dim, offset):
            return Index(to(dim), offset)
        case Distance(a, b, offset):
            return Distance(to(a), to(b), offset)
        case PerRow() | Shifted():
            return replace(fact, dim=to(fact.dim))
        case Predicate(formula):
            return Predicate(_remap_formula(formula, to))
        case Ones(formula):
            return Ones(_remap_formula(formula, to))
        case Masked(visible):
            return replace(fact, visible=_remap_formula(visible, to))
        case Weights(visible, query, key):
            return replace(fact, visible=_remap_formula(visible, to), query=to(query), key=to(key))
        case Step() | Break() | RowMax():
            return None
        case _:
            return fact


def _remap_formula(formula: Formula, to: Callable[[int], int]) -> Formula:
    match formula:
        case Diff(a, b, bound):
            return Diff(to(a), to(b), bound)
        case RowTrue(source, dim, truth):
            return RowTrue(source, to(dim), truth)
        case Same(source, a, b, counted_from):
            return Same(source, to(a), to(b), counted_from)
        case AtMost(source, a, b, bound):
            return AtMost(source, to(a), to(b), bound)
        case Given(source, query, key):
            return Given(source, to(query), to(key))
        case And(terms):
            return And(tuple(_remap_formula(term, to) for term in terms))
        case Or(terms):
            return Or(tuple(_remap_formula(term, to) for term in terms))
        case _:
            return formula
