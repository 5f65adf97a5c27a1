"""The passes, in order, and the runner that times, checks and logs them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import fx

from radix_compile.ir.errors import RefusalCode
from radix_compile.options import Options
from radix_compile.passes.choose_cuts import choose_cuts
from radix_compile.passes.choose_forms import choose_forms
from radix_compile.passes.choose_head import choose_head
from radix_compile.passes.expand_mask_buffers import expand_mask_buffers
from radix_compile.passes.find_read_rows import find_read_rows
from radix_compile.passes.find_rotary import find_rotary
from radix_compile.passes.fold import Fold, FoldVariant
from radix_compile.passes.fold_attention import fold_attention
from radix_compile.passes.fold_cross_entropy import fold_cross_entropy
from radix_compile.passes.fold_graph import fold_graph
from radix_compile.passes.inline_flex_functions import inline_flex_functions
from radix_compile.passes.lower_index_ops import lower_index_ops
from radix_compile.passes.mark_token_axes import mark_token_axes
from radix_compile.passes.merge_duplicates import merge_duplicates
from radix_compile.passes.prove_shift import prove_shift
from radix_compile.passes.read_attention import read_attention
from radix_compile.passes.verify import verify_graph
from radix_compile.torch_internals import must_propagate

log = logging.getLogger(__name__)

AnalysisPass = Callable[[fx.GraphModule], None]
FoldPass = Callable[[Fold], None]


class Observer(Protocol):
    def __call__(self, after: str, gm: fx.GraphModule, fold: Fold | None = None) -> None:
        """Called after each pass with its name and the graph; by folding passes with all that was decided, too."""


ALWAYS_VERIFY = False
"""Check what ``verify_graph`` checks after every pass, whether asked to or not. The tests do."""

RAISE_MISTAKES = False
"""Raise what a pass with a mistake in it raises, in place of :class:`PassFailed`. The tests do."""

ANALYSES: tuple[AnalysisPass, ...] = (
    expand_mask_buffers,  # first, so that what it writes out for every layer is merged
    merge_duplicates,  # next, because what is one node is annotated, gathered and scattered once
    inline_flex_functions,  # after merge_duplicates, because what nothing reads is merged away; for mark_token_axes
    mark_token_axes,  # after merge_duplicates, before all else: the rest reads its annotation
    read_attention,  # after mark_token_axes, because it reads what masks were found to say
)
"""The passes that state the facts of a captured graph, once."""

FOLDING: tuple[FoldPass, ...] = (
    fold_attention,  # first, so that it need not matter to the others how attention was written
    choose_cuts,  # after fold_attention, because only rows proved position-wise may be compact
    find_rotary,  # after choose_cuts, because it lets what else than attention reads run in full form, too
    choose_forms,  # after find_rotary, because the forms in which a value is wanted depend on where its readers run
    find_read_rows,  # after choose_forms, because it follows values in full form
    choose_head,  # after find_read_rows, because the head runs for the rows found there
    fold_graph,  # after all of these, because it emits each node in the forms chosen there
    fold_cross_entropy,  # after fold_graph, because it looks for logits that are scattered for the loss alone
    lower_index_ops,  # after fold_cross_entropy, because it joins the scatters that are left
    prove_shift,  # after choose_forms, because only what runs compact must not depend on its column
)
"""The passes that make one folded form of a graph with its facts, once for each variant."""

BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""The errors that a pass with a mistake in it raises."""


class PassFailed(Exception):  # noqa: N818 - a verdict about a graph, as CannotFold is
    """A pass raised unexpectedly; the backend falls back to the plain program. The message names the pass."""

    code = RefusalCode.INTERNAL_ERROR


def annotate(gm: fx.GraphModule, observe: Observer | None = None, verify: bool = False) -> None:
    """Run the analyses on a captured graph, which then has its facts.

    Raises ``CannotFold`` if the graph as a whole cannot be folded, and :class:`PassFailed`.
    """
    for apply in ANALYSES:
        with _mistakes_of(apply.__name__, verify):
            apply(gm)
        _check(apply.__name__, gm, None, observe, verify)


def fold_as(variant: FoldVariant, captured: fx.GraphModule, options: Options, observe: Observer | None = None) -> Fold:
    """Run the folding passes: one folded form of a graph that has its facts, which stay as they are.

    Raises :class:`PassFailed`.
    """
    fold = Fold(captured, variant, options, program=captured)
    for apply in FOLDING:
        code = fold.program.code
        with _mistakes_of(apply.__name__, options.verify):
            apply(fold)
        _check(apply.__name__, fold.program, fold, observe, options.verify, code)
    return fold


@contextlib.contextmanager
def _mistakes_of(name: str, verify: bool) -> Iterator[None]:
    """Time a pass, and raise :class:`PassFailed` if it raises unexpectedly; with ``verify``, the error itself."""
    started = time.perf_counter()
    try:
        yield
    except BUGS as error:
        if verify or RAISE_MISTAKES or must_propagate(error):
            raise
        raise PassFailed(f"{name} failed: {type(error).__name__}: {error}") from error
    log.debug("%s: %.1f ms", name, 1e3 * (time.perf_counter() - started))


def _check(
    name: str, gm: fx.GraphModule, fold: Fold | None, observe: Observer | None, verify: bool, code: str = ""
) -> None:
    """Check the graph that a pass has left, and show it to the observer. ``code`` is that of the graph before."""
    gm.graph.lint()
    gm.recompile()
    if verify or ALWAYS_VERIFY:
        verify_graph(gm, None if fold is None else fold.homes, with_shapes=gm.code != code)
    if observe is not None:
        observe(name, gm, fold)
