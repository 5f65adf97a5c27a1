"""Reading a causal mask in terms that the prefix tree supports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from radix_compile.analysis.attention.rows import NotOnTree
from radix_compile.ir.facts import AtMost, Diff, Formula, Given, Or, RowTrue, Same, Weights, terms_of


@dataclass(frozen=True, slots=True)
class Visible:
    """The content of a causal mask.

    ``window``        the number of last columns that a row sees, its own included; None means all.
    ``shown``         pairs of a node ``[B, S]`` and a bool: keys are visible where it is nonzero (True) or zero.
    ``sequence_ids``  the numbers of packed sequences: a row sees keys of its own sequence only.
    """

    window: int | None = None
    shown: tuple[tuple[fx.Node, bool], ...] = ()
    sequence_ids: fx.Node | None = None


def read_mask(attends: Weights) -> Visible:
    """Read a causal mask, term by term. Raises :class:`NotOnTree` at a term of any other kind."""
    query, key = attends.query, attends.key
    window: int | None = None
    shown: dict[tuple[fx.Node, bool], None] = {}
    terms = terms_of(attends.visible)
    same_sequence = [term for term in terms if isinstance(term, Same) and {term.a, term.b} == {query, key}]
    positions = {term.counted_from for term in same_sequence}
    for term in terms:
        bound = _column_bound(term, positions)
        match term:
            case Same() if term in same_sequence:
                pass
            case RowTrue(source, dim, truth) if dim == key:
                shown[source, truth] = None
            case _ if bound == (key, query, 0):
                pass
            case _ if bound is not None and bound[:2] == (query, key) and bound[2] >= 0:
                window = bound[2] + 1 if window is None else min(window, bound[2] + 1)
            case _:
                raise NotOnTree(f"its mask {_describe(term)}")
    if len({term.source for term in same_sequence}) > 1:
        raise NotOnTree("its mask tells sequences apart in two ways")
    return Visible(window, tuple(shown), same_sequence[0].source if same_sequence else None)


def _column_bound(term: Formula, positions: set[fx.Node | None]) -> tuple[int, int, int] | None:
    """Return ``(a, b, bound)`` if the term is ``column[a] - column[b] <= bound``.

    Within a sequence, positions grow by one per column, so comparing positions compares columns.
    """
    if isinstance(term, Diff) or (isinstance(term, AtMost) and term.source in positions):
        return term.a, term.b, term.bound
    return None


def _describe(term: Formula) -> str:
    match term:
        case Given():
            return "is an input"
        case Or():
            return "shows keys by one of several conditions"
        case RowTrue():
            return "hides all keys of some queries"
        case Diff() | AtMost():
            return "compares columns or positions in an unsupported way"
        case _:
            return "is not understood"
