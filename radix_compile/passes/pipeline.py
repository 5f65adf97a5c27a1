"""The passes, in order, and the runner that times, checks and logs them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from torch import fx

from radix_compile.ir.errors import RefusalCode
from radix_compile.passes.choose_cuts import choose_cuts
from radix_compile.passes.expand_mask_buffers import expand_mask_buffers
from radix_compile.passes.fold_attention import fold_attention
from radix_compile.passes.fold_cross_entropy import fold_cross_entropy
from radix_compile.passes.fold_graph import fold_graph
from radix_compile.passes.inline_flex_functions import inline_flex_functions
from radix_compile.passes.mark_token_axes import mark_token_axes
from radix_compile.passes.merge_duplicates import merge_duplicates
from radix_compile.passes.read_attention import read_attention
from radix_compile.passes.verify import verify_graph
from radix_compile.torch_internals import must_propagate

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule], fx.GraphModule]
Observer = Callable[[str, fx.GraphModule], None]

ALWAYS_VERIFY = False
"""Check what ``verify_graph`` checks after every pass, whether asked to or not. The tests do."""

RAISE_MISTAKES = False
"""Raise what a pass with a mistake in it raises, in place of :class:`PassFailed`. The tests do."""

PASSES: tuple[Pass, ...] = (
    expand_mask_buffers,  # first, so that what it writes out for every layer is merged
    merge_duplicates,  # next, because what is one node is annotated, gathered and scattered once
    inline_flex_functions,  # after merge_duplicates, because what nothing reads is merged away; for mark_token_axes
    mark_token_axes,  # after merge_duplicates, before all else: the rest reads its annotation
    read_attention,  # after mark_token_axes, because it reads what masks were found to say
    fold_attention,  # after read_attention, so that it need not matter how attention was written
    choose_cuts,  # after fold_attention, because only rows proved position-wise may be compact
    fold_graph,  # after choose_cuts, because it emits each node in the forms chosen there
    fold_cross_entropy,  # after fold_graph, because it looks for logits that are scattered for the loss alone
)


BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""What a pass raises that has a mistake in it."""


class PassFailed(Exception):  # noqa: N818 - a verdict about a graph, as CannotFold is
    """A pass has a mistake in it, which nobody's call should be lost to. The message says which pass and what."""

    code = RefusalCode.INTERNAL_ERROR


def run_pipeline(
    gm: fx.GraphModule, observe: Observer | None = None, verify: bool = False, first: Pass | None = None
) -> fx.GraphModule:
    """Run the passes on a captured graph, from ``first`` on. ``observe(pass name, graph)`` is called after each.

    Raises ``CannotFold`` if the graph as a whole cannot be folded.
    """
    for apply in PASSES[0 if first is None else PASSES.index(first) :]:
        gm = run_pass(apply, gm, observe, verify)
    return gm


def run_pass(apply: Pass, gm: fx.GraphModule, observe: Observer | None = None, verify: bool = False) -> fx.GraphModule:
    """One pass, timed, checked (all the more with ``verify``) and logged.

    Raises :class:`PassFailed`, or with ``verify`` the error itself.
    """
    started = time.perf_counter()
    try:
        gm = apply(gm)
    except BUGS as error:
        if verify or RAISE_MISTAKES or must_propagate(error):
            raise
        raise PassFailed(f"{apply.__name__} failed: {type(error).__name__}: {error}") from error
    gm.graph.lint()
    gm.recompile()
    log.debug("%s: %d nodes, %.1f ms", apply.__name__, len(gm.graph.nodes), 1e3 * (time.perf_counter() - started))
    if verify or ALWAYS_VERIFY:
        verify_graph(gm)
    if observe is not None:
        observe(apply.__name__, gm)
    return gm
