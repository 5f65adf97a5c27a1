"""The algebra of masks against formulas evaluated on concrete grids."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import fx

from radix_compile.ir.axes import SEQ, Feature, Mixes
from radix_compile.ir.facts import (
    FALSE,
    OPAQUE,
    TRUE,
    And,
    AtMost,
    Break,
    Diff,
    Filled,
    Formula,
    FullyMasked,
    Index,
    Or,
    PerRow,
    Predicate,
    RowTrue,
    Same,
    Weights,
    cast_filled,
    conjunction,
    disjunction,
    fully_masked_rows,
    hides,
    holds_on_diagonal,
    implies_causal,
    negation,
    remap,
    without_dims_of_size_one,
)
from radix_compile.runtime.call_planner import rows_without_a_key

Grid = NDArray[np.bool_]
Rows = Mapping[fx.Node, NDArray[np.int64]]

COLUMNS = 6
QUERY, KEY = -2, -1
CAUSAL = Diff(KEY, QUERY, 0)
ABOVE_DIAGONAL = np.triu(np.ones((COLUMNS, COLUMNS), np.bool_), 1)

_graph = fx.Graph()
PADDING, OTHER_PADDING, POSITIONS, RUNS = (_graph.placeholder(n) for n in ("padding", "other", "positions", "runs"))

settings.register_profile("mask_facts", deadline=None, max_examples=300)
settings.load_profile("mask_facts")


def evaluate(formula: Formula, rows: Rows, query: int = QUERY) -> Grid:
    """The predicate on every pair: entry ``[i, j]`` is for column ``i`` of the query and ``j`` of the key."""
    index = np.indices((COLUMNS, COLUMNS))

    def column(dim: int) -> NDArray[np.int64]:
        return index[0] if dim == query else index[1]

    def holds(f: Formula) -> Grid:
        match f:
            case Diff(a, b, bound):
                return column(a) - column(b) <= bound
            case RowTrue(source, dim, truth):
                return (rows[source][column(dim)] != 0) == truth
            case Same(source, a, b):
                return rows[source][column(a)] == rows[source][column(b)]
            case AtMost(source, a, b, bound):
                return rows[source][column(a)] - rows[source][column(b)] <= bound
            case And(terms):
                return np.logical_and.reduce([holds(t) for t in terms], axis=0, initial=True) | np.zeros_like(
                    index[0], np.bool_
                )
            case Or(terms):
                return np.logical_or.reduce([holds(t) for t in terms], axis=0, initial=False) | np.zeros_like(
                    index[0], np.bool_
                )
        raise TypeError(f)

    return np.broadcast_to(holds(formula), (COLUMNS, COLUMNS))


dims = st.sampled_from([(QUERY, KEY), (KEY, QUERY)])
atoms = st.one_of(
    st.builds(lambda ab, bound: Diff(*ab, bound), dims, st.integers(-3, 3)),
    st.builds(RowTrue, st.sampled_from([PADDING, OTHER_PADDING]), st.sampled_from([QUERY, KEY]), st.booleans()),
    st.builds(lambda ab: Same(RUNS, *ab, counted_from=POSITIONS), dims),
    st.builds(lambda ab: Same(PADDING, *ab), dims),
    st.builds(lambda ab, bound: AtMost(POSITIONS, *ab, bound), dims, st.integers(-3, 3)),
)
formulas: st.SearchStrategy[Formula] = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda terms: conjunction(*terms)),
        st.lists(inner, max_size=3).map(lambda terms: disjunction(*terms)),
    ),
    max_leaves=6,
)


@st.composite
def batches(draw: Any) -> Rows:
    """Paddings at random, positions that restart or jump anywhere, and the numbers of their runs."""
    flags = st.lists(st.integers(0, 1), min_size=COLUMNS, max_size=COLUMNS)
    steps = draw(st.lists(st.sampled_from([1, 1, 1, -2, 0, 3]), min_size=COLUMNS, max_size=COLUMNS))
    positions = np.cumsum(steps)
    runs = np.cumsum(np.diff(positions, prepend=positions[0] - 1) != 1)
    return {PADDING: np.array(draw(flags)), OTHER_PADDING: np.array(draw(flags)), POSITIONS: positions, RUNS: runs}


@given(formulas, batches())
def test_a_causal_formula_shows_nothing_above_the_diagonal(formula: Formula, rows: Rows) -> None:
    if implies_causal(formula, QUERY, KEY):
        assert not (evaluate(formula, rows) & ABOVE_DIAGONAL).any()


@given(st.lists(formulas, max_size=2), batches())
def test_packed_documents_are_causal(others: list[Formula], rows: Rows) -> None:
    formula = conjunction(*others, Same(RUNS, QUERY, KEY, POSITIONS), AtMost(POSITIONS, KEY, QUERY))
    assert implies_causal(formula, QUERY, KEY)
    assert not (evaluate(formula, rows) & ABOVE_DIAGONAL).any()


def test_packed_documents_need_the_runs_of_the_same_positions() -> None:
    in_order = AtMost(POSITIONS, KEY, QUERY)
    assert not implies_causal(in_order, QUERY, KEY)
    assert not implies_causal(And((in_order, Same(RUNS, QUERY, KEY))), QUERY, KEY)
    assert not implies_causal(And((in_order, Same(RUNS, QUERY, KEY, PADDING))), QUERY, KEY)
    assert not implies_causal(And((AtMost(POSITIONS, QUERY, KEY), Same(RUNS, QUERY, KEY, POSITIONS))), QUERY, KEY)
    for bound, causal in ((-1, True), (0, True), (1, False)):
        off_by = And((AtMost(POSITIONS, KEY, QUERY, bound), Same(RUNS, QUERY, KEY, POSITIONS)))
        assert implies_causal(off_by, QUERY, KEY) == causal


@given(formulas, batches())
def test_a_formula_that_holds_on_the_diagonal_does(formula: Formula, rows: Rows) -> None:
    if holds_on_diagonal(formula, QUERY, KEY):
        assert evaluate(formula, rows).diagonal().all()


@pytest.mark.parametrize(("a", "b"), [(QUERY, KEY), (KEY, QUERY)])
@pytest.mark.parametrize("bound", range(-4, 5))
def test_one_comparison_is_understood_exactly(a: int, b: int, bound: int) -> None:
    formula = Diff(a, b, bound)
    grid = evaluate(formula, {})
    assert implies_causal(formula, QUERY, KEY) == (not (grid & ABOVE_DIAGONAL).any())
    assert holds_on_diagonal(formula, QUERY, KEY) == bool(grid.diagonal().all())
    np.testing.assert_array_equal(evaluate(negation(formula), {}), ~grid)


@pytest.mark.parametrize("bounds", list(itertools.product(range(-2, 3), repeat=2)))
@pytest.mark.parametrize("orientation", list(itertools.product([(QUERY, KEY), (KEY, QUERY)], repeat=2)))
@pytest.mark.parametrize("join", [conjunction, disjunction])
def test_two_comparisons_are_understood_safely(join: Any, orientation: Any, bounds: tuple[int, int]) -> None:
    formula = join(*(Diff(a, b, bound) for (a, b), bound in zip(orientation, bounds, strict=True)))
    grid = evaluate(formula, {})
    assert not implies_causal(formula, QUERY, KEY) or not (grid & ABOVE_DIAGONAL).any()
    assert holds_on_diagonal(formula, QUERY, KEY) == bool(grid.diagonal().all())


def _is_known(formula: Formula) -> bool:
    if isinstance(formula, And | Or):
        return all(_is_known(term) for term in formula.terms)
    return not isinstance(formula, Same) and formula != OPAQUE


@given(formulas, batches())
def test_negation_is_the_complement(formula: Formula, rows: Rows) -> None:
    if _is_known(formula):
        np.testing.assert_array_equal(evaluate(negation(formula), rows), ~evaluate(formula, rows))


def test_what_has_no_negation_becomes_opaque() -> None:
    for formula in (Same(PADDING, QUERY, KEY), OPAQUE):
        assert negation(formula) == OPAQUE
    assert negation(TRUE) == FALSE
    assert negation(FALSE) == TRUE
    assert not implies_causal(OPAQUE, QUERY, KEY)
    assert not holds_on_diagonal(OPAQUE, QUERY, KEY)
    assert implies_causal(conjunction(OPAQUE, CAUSAL), QUERY, KEY)
    assert not implies_causal(disjunction(OPAQUE, CAUSAL), QUERY, KEY)
    assert holds_on_diagonal(disjunction(OPAQUE, CAUSAL), QUERY, KEY)
    assert not holds_on_diagonal(conjunction(OPAQUE, CAUSAL), QUERY, KEY)


@given(formulas, formulas, batches())
def test_conjunction_and_disjunction(one: Formula, other: Formula, rows: Rows) -> None:
    both, first, second = (evaluate(f, rows) for f in (conjunction(one, other), one, other))
    np.testing.assert_array_equal(both, first & second)
    np.testing.assert_array_equal(evaluate(disjunction(one, other), rows), first | second)


masks = st.lists(
    st.one_of(
        st.builds(lambda window: Diff(QUERY, KEY, window), st.integers(-1, 4)),
        st.builds(lambda bound: Diff(KEY, QUERY, bound), st.integers(-1, 1)),
        st.builds(RowTrue, st.just(PADDING), st.just(KEY), st.just(True)),
        st.builds(RowTrue, st.sampled_from([PADDING, OTHER_PADDING]), st.sampled_from([QUERY, KEY]), st.booleans()),
        formulas,
    ),
    max_size=3,
).map(lambda terms: conjunction(CAUSAL, *terms))


@given(masks, batches())
def test_blind_rows_are_those_without_a_visible_key(formula: Formula, rows: Rows) -> None:
    try:
        fully_masked = fully_masked_rows(formula, QUERY, KEY)
    except Mixes:
        return
    grid = evaluate(formula, rows)
    if fully_masked is None:
        assert grid.diagonal().all()
        return
    visible = (rows[fully_masked.source] != 0) == fully_masked.truth
    np.testing.assert_array_equal(rows_without_a_key(visible[None], fully_masked.window)[0], ~grid.any(axis=1))
    if hides(formula, fully_masked, KEY):
        assert not grid[:, ~grid.any(axis=1)].any(), "a row sees the key of a row that sees none"


def test_blind_rows_of_the_usual_masks() -> None:
    shown = RowTrue(PADDING, KEY)
    assert fully_masked_rows(CAUSAL, QUERY, KEY) is None
    assert fully_masked_rows(conjunction(CAUSAL, shown), QUERY, KEY) == FullyMasked(PADDING, None)
    assert fully_masked_rows(conjunction(CAUSAL, Diff(QUERY, KEY, 2), shown), QUERY, KEY) == FullyMasked(PADDING, 3)
    two_windows = conjunction(CAUSAL, Diff(QUERY, KEY, 4), Diff(QUERY, KEY, 2), shown)
    assert fully_masked_rows(two_windows, QUERY, KEY) == FullyMasked(PADDING, 3)
    assert fully_masked_rows(conjunction(CAUSAL, negation(shown)), QUERY, KEY) == FullyMasked(
        PADDING, None, truth=False
    )
    for formula in (
        Diff(KEY, QUERY, -1),
        conjunction(CAUSAL, Diff(KEY, QUERY, -1)),
        conjunction(CAUSAL, Diff(QUERY, KEY, -1)),
        conjunction(CAUSAL, OPAQUE),
        conjunction(CAUSAL, FALSE),
        conjunction(CAUSAL, RowTrue(PADDING, QUERY)),
        conjunction(CAUSAL, shown, RowTrue(OTHER_PADDING, KEY)),
        conjunction(CAUSAL, shown, negation(shown)),
    ):
        with pytest.raises(Mixes, match="without a key to see"):
            fully_masked_rows(formula, QUERY, KEY)


def test_hides_asks_for_the_same_rows() -> None:
    formula = conjunction(CAUSAL, RowTrue(PADDING, KEY))
    assert hides(formula, FullyMasked(PADDING, None), KEY)
    assert hides(formula, FullyMasked(PADDING, 2), KEY)
    assert not hides(formula, FullyMasked(PADDING, None, truth=False), KEY)
    assert not hides(formula, FullyMasked(OTHER_PADDING, None), KEY)
    assert not hides(conjunction(CAUSAL, RowTrue(PADDING, QUERY)), FullyMasked(PADDING, None), KEY)
    assert not hides(disjunction(CAUSAL, RowTrue(PADDING, KEY)), FullyMasked(PADDING, None), KEY)


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 9) | st.none())
def test_sightless(visible: list[list[bool]], window: int | None) -> None:
    expected = [
        [not any(row[max(0, i + 1 - (window or len(row))) : i + 1]) for i in range(len(row))] for row in visible
    ]
    np.testing.assert_array_equal(rows_without_a_key(np.array(visible), window), expected)


@given(formulas, batches())
def test_facts_follow_a_view(formula: Formula, rows: Rows) -> None:
    """Query and key change places: the predicate is that of the transposed grid."""
    moved = remap(Predicate(formula), {QUERY: KEY, KEY: QUERY})
    assert isinstance(moved, Predicate)
    np.testing.assert_array_equal(evaluate(moved.formula, rows), evaluate(formula, rows).T)


def test_facts_about_a_dimension_that_is_gone_are_gone() -> None:
    assert remap(Index(-1, 0), {-1: -3}) == Index(-3, 0)
    assert remap(Index(-1, 0), {-2: -3}) is None
    assert remap(PerRow(PADDING, -2), {-1: -1}) is None
    assert remap(Predicate(CAUSAL), {KEY: KEY}) is None
    assert remap(Weights(TRUE, QUERY, KEY), {KEY: KEY}) is None
    assert remap(Break(POSITIONS), {KEY: KEY, QUERY: QUERY}) is None
    assert remap(Filled(1.0), {}) == Filled(1.0)


def test_facts_about_a_dimension_of_size_one_are_dropped() -> None:
    """It broadcasts: entry 0 is then next to every column."""
    wide = (Feature(sympy.Integer(6)),)
    assert without_dims_of_size_one(Index(-1, 0), ((), wide)) == Index(-1, 0)
    assert without_dims_of_size_one(Index(-1, 0), (wide, ())) is None
    assert without_dims_of_size_one(Predicate(CAUSAL), (wide, (SEQ,))) == Predicate(CAUSAL)
    assert without_dims_of_size_one(Predicate(CAUSAL), (wide, ())) is None
    assert without_dims_of_size_one(Filled(0.0), ((), ())) == Filled(0.0)
    assert without_dims_of_size_one(Break(POSITIONS), ((), wide)) == Break(POSITIONS)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.5, 256.0, 1e-50, -1e9, 3e38, float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_a_stored_value_is_as_true_and_as_low_as_is_said(value: float, dtype: torch.dtype) -> None:
    known = cast_filled(Filled(value), dtype)
    if known is None:
        return
    held = torch.tensor(value, dtype=torch.float64).to(dtype).double()
    assert bool(known.value) == bool(held)
    assert held <= known.value or held == pytest.approx(known.value, rel=1e-2)
