"""Facts about a tensor's entries: indices, predicates over two columns, masked scores, attention weights.

Dimensions are counted from the right (``-1`` is the last) so that broadcasting leaves facts as they are. A predicate is
about a tensor with two column dimensions, query and key: it is a small formula whose atoms compare the two columns or
look up a row. From the formula follow three things: whether the mask is causal, whether every row sees itself, and, if
not, which rows may see nothing at all.
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
    """``source[b, column[dim]]`` is not zero (or is, if ``truth`` is false): what a padding mask says of a key."""

    source: fx.Node
    dim: int
    truth: bool = True


@dataclass(frozen=True, slots=True)
class Same:
    """``source[b, column[a]] == source[b, column[b]]``; ``counted_from``: positions whose breaks it counts."""

    source: fx.Node
    a: int
    b: int
    counted_from: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class AtMost:
    """``source[b, column[a]] - source[b, column[b]] <= bound``: ``Diff`` for positions."""

    source: fx.Node
    a: int
    b: int
    bound: int = 0


@dataclass(frozen=True, slots=True)
class Given:
    """The formula of a mask that the caller made: ``source[b, ..., column[query], column[key]]`` shows the key.

    Of its entries nothing is known when the graph is compiled. Each call checks that no row sees a later one, and that
    all see themselves (``given_masks``).
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
    """Some predicate; nothing is known of it."""


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
    """The terms that all have to hold for the predicate to hold."""
    return formula.terms if isinstance(formula, And) else (formula,)


def atoms_of(formula: Formula) -> Iterator[Formula]:
    if isinstance(formula, And | Or):
        for term in formula.terms:
            yield from atoms_of(term)
    else:
        yield formula


def ordered_by(formula: Formula) -> Iterator[fx.Node]:
    """The integers of rows whose order, or whose steps from one to the next, it is about."""
    for atom in atoms_of(formula):
        if isinstance(atom, AtMost):
            yield atom.source
        elif isinstance(atom, Same) and atom.counted_from is not None:
            yield atom.counted_from


def is_known(formula: Formula) -> bool:
    """Is all of it understood? Of two formulas that are not, nothing says that they are the same."""
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
            # Within one run positions grow by one per column, so "position at most mine" is "column at most mine".
            positions = [term for term in terms if isinstance(term, AtMost) and term.source in counted]
            ordered = any((term.a, term.b) == (key, query) and term.bound <= 0 for term in positions)
            return ordered or any(implies_causal(term, query, key) for term in terms)
        case Or(terms):
            return all(implies_causal(term, query, key) for term in terms)
        case _:
            return False


def holds_on_diagonal(formula: Formula, query: int, key: int) -> bool:
    """Is the predicate certain to hold where query and key are the same column?"""
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
    """The rows that see no key.

    None of the last ``window`` columns up to the row (all of them, if ``None``) has a ``source`` entry that is nonzero
    (or zero, if ``truth`` is false).
    """

    source: fx.Node
    window: int | None
    truth: bool = True


def fully_masked_rows(formula: Formula, query: int, key: int) -> FullyMasked | None:
    """Which rows a causal mask leaves without a key: ``None`` if every row sees itself.

    Such a row is not determined by its prefix: with an additive finite mask it attends to everything, the future too.
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
    """Are the keys that make rows fully masked hidden from every row?"""
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


def stored(fact: Filled, dtype: torch.dtype) -> Filled | None:
    """The fact that is left when the value is held in ``dtype``, which may round it to zero or wrap it around."""
    if dtype == torch.bool:
        return Filled(float(fact.value != 0))
    if dtype.is_complex:
        return None
    if dtype.is_floating_point:
        known = fact.value == 0 or abs(fact.value) >= torch.finfo(dtype).tiny
        return fact if known and fact.value <= torch.finfo(dtype).max else None
    limits = torch.iinfo(dtype)
    return fact if float(fact.value).is_integer() and limits.min <= fact.value <= limits.max else None


@dataclass(frozen=True, slots=True)
class PerRow:
    """Each entry is the entry of ``source`` at that row (``dim`` is the column). ``exact`` unless only its truth is."""

    source: fx.Node
    dim: int
    exact: bool = True
    counted_from: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Shifted:
    """Each entry is the entry of ``source`` at that row plus ``offset``."""

    source: fx.Node
    dim: int
    offset: int


@dataclass(frozen=True, slots=True)
class Step:
    """``source[:, j] - source[:, j - 1]``, and one in column 0."""

    source: fx.Node


@dataclass(frozen=True, slots=True)
class Break:
    """Where :class:`Step` is not one."""

    source: fx.Node


@dataclass(frozen=True, slots=True)
class Predicate:
    """A bool tensor that holds exactly where ``formula`` does."""

    formula: Formula


@dataclass(frozen=True, slots=True)
class Ones:
    """A number tensor that is one where ``formula`` holds and zero elsewhere (``tril(ones)``)."""

    formula: Formula


ORDINARY = 1e4
"""The bound on query-key products. It is not proved: a floor of a mask may be as near as that of float16."""

FAR = 1e3
"""Entries that are lower than another by so much have no weight in a softmax with it: exp(-1000) is zero in float64."""


@dataclass(frozen=True, slots=True)
class Score:
    """Query-key products, scaled or soft-capped perhaps, or what is added to them: at most ``size``, of either sign."""

    size: float = ORDINARY


@dataclass(frozen=True, slots=True)
class Masked:
    """Scores or a mask to add to them: hidden wherever ``visible`` does not hold.

    ``floor`` is the highest that a hidden entry is, ``size`` the largest that a visible one is, of either sign
    (infinite if that is not known). Hidden entries are lower by ``gap``, at least, than the largest visible one of
    their row, if there is one. ``zero`` if the visible entries are. (If the largest entry of each row was subtracted,
    the floor is that of rows that see a key, as the gap is.)
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
        """Have the hidden entries of a row no weight in a softmax, if it has a visible one?"""
        return self.gap >= FAR


@dataclass(frozen=True, slots=True)
class RowMax:
    """The largest entry of each row of the masked scores ``of``."""

    of: fx.Node


@dataclass(frozen=True, slots=True)
class Weights:
    """Attention weights: exactly zero wherever ``visible`` does not hold (rows that see no key excepted).

    ``undefined`` if those of rows that see no key are not numbers (a softmax of minus infinity alone).
    """

    visible: Formula
    query: int
    key: int
    undefined: bool = False


Fact = (
    Index | Distance | Filled | PerRow | Shifted | Step | Break | Predicate | Ones | Score | Masked | RowMax | Weights
)


def remap(fact: Fact | None, dims: Mapping[int, int]) -> Fact | None:
    """The fact after a view that moves dimension ``d`` to ``dims[d]``, both from the right; ``None`` if one is gone."""
    try:
        return _remap(fact, lambda dim: dims[dim])
    except KeyError:
        return None


def without_dims_of_size_one(fact: Fact | None, axes: Axes) -> Fact | None:
    """The fact, unless it is about a dimension of size one: broadcast, its entries are not those of their columns."""
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
