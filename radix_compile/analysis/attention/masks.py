"""Read a causal mask in terms that the prefix tree knows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from radix_compile.analysis.attention.rows import NotOnTree
from radix_compile.ir.facts import AtMost, Diff, Formula, Given, Or, RowTrue, Same, Weights, terms_of


@dataclass(frozen=True, slots=True)
class Visible:
    """The content of a mask, besides that no key is later than its query.

    ``window``  how many of the last columns a row sees, its own included.
    ``shown``   rows ``[B, S]`` whose entry tells of a key whether it can be seen: if it is not zero (or if it is).
    ``sequence_ids``  the numbers that tell the sequences packed in a row apart, if it has several.
    """

    window: int | None = None
    shown: tuple[tuple[fx.Node, bool], ...] = ()
    sequence_ids: fx.Node | None = None


def read_mask(attends: Weights) -> Visible:
    """Read a causal mask, term by term. Raises :class:`NotOnTree` at a term of another kind."""
    query, key = attends.query, attends.key
    window: int | None = None
    shown: dict[tuple[fx.Node, bool], None] = {}
    terms = terms_of(attends.visible)
    same_sequence = [term for term in terms if isinstance(term, Same) and {term.a, term.b} == {query, key}]
    positions = {term.counted_from for term in same_sequence}
    for term in terms:
        bound = _columns(term, positions)
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
                raise NotOnTree(f"its mask {_in_words(term)}")
    if len({term.source for term in same_sequence}) > 1:
        raise NotOnTree("its mask tells sequences apart in two ways")
    return Visible(window, tuple(shown), same_sequence[0].source if same_sequence else None)


def _columns(term: Formula, positions: set[fx.Node | None]) -> tuple[int, int, int] | None:
    """``column[a] - column[b] <= bound``. In a run, positions count as columns do."""
    if isinstance(term, Diff) or (isinstance(term, AtMost) and term.source in positions):
        return term.a, term.b, term.bound
    return None


def _in_words(term: Formula) -> str:
    match term:
        case Given():
            return "was made by the caller"
        case Or():
            return "shows keys for one of several reasons"
        case RowTrue():
            return "hides keys by their query"
        case Diff() | AtMost():
            return "compares columns or positions in another way"
        case _:
            return "is not understood"
