"""The facts that passes state about a captured graph and its nodes, for the passes after them.

This module alone knows where the facts are kept. Both kinds are frozen: a pass replaces them, so that copies of a node,
which share its ``meta``, never change each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import fx

from radix_compile.ir.errors import Declined
from radix_compile.ir.triangles import Triangle

if TYPE_CHECKING:
    from radix_compile.analysis.attention.parts import Parts
    from radix_compile.analysis.tokens import Tokens
    from radix_compile.ir.value import Marks

_FACTS = "radix"


class Form(Enum):
    """One entry per row (full), one per node of the prefix tree (compact), or whichever its readers want (either)."""

    FULL = "full"
    COMPACT = "compact"
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Facts of one node. The pass that states each is named.

    Of inputs, by ``capture``:

    ``is_static``       it is a parameter or a buffer of the module.
    ``needs_gradient``  it may be given a gradient; None if that is not known.
    ``triangle``        the causal mask that a buffer holds.

    Of captured nodes:

    ``marks``     what ``mark_token_axes`` found out about the result, or each of the results.
    ``visible``   of flex_attention: what its ``mask_mod`` returns for all pairs (``inline_flex_functions``).
    ``scores``    of flex_attention: what its ``score_mod`` returns for all pairs (``inline_flex_functions``).
    ``parts``     of attention: what it is made of, or why that was not found (``read_attention``).
    ``bounds``    the least and the greatest entry that the result can have, None if nothing is known, ``()`` if nobody
                  has asked (kept by ``analysis.bounds``).

    Of nodes of a folded program, by ``fold_graph``:

    ``form``          the form of the value.
    ``origin``        the captured node whose value it is.
    ``has_gradient``  of a scatter: a gradient may come back to it.
    """

    is_static: bool = False
    needs_gradient: bool | None = None
    triangle: Triangle | None = None
    marks: Marks | None = None
    visible: fx.Node | None = None
    scores: fx.Node | None = None
    parts: Parts | Declined | None = None
    bounds: tuple[float, float] | tuple[()] | None = ()
    form: Form | None = None
    origin: fx.Node | None = None
    has_gradient: bool = False


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """Facts of a captured graph. The pass that states each is named.

    ``model``               the class of the module that was compiled (``capture``).
    ``is_differentiable``   a call may be followed by a backward pass (``capture``).
    ``records_gradients``   the mode in which the graph is entered: ``torch.is_grad_enabled()`` (``capture``).
    ``has_checkpoints``     regions of activation checkpointing were inlined (``capture``).
    ``has_wrapped_inputs``  there are inputs that wrap other tensors, which the graph takes instead (``capture``).
    ``triangles``           the buffers whose causal masks were written out (``expand_mask_buffers``).
    ``triangle_sizes``      how many of their rows are read (``expand_mask_buffers``).
    ``tokens``              the token axes (``mark_token_axes``).
    ``source``              of a folded program: the captured graph that it was made of (``fold_graph``).
    """

    model: str = ""
    is_differentiable: bool = False
    records_gradients: bool = True
    has_checkpoints: bool = False
    has_wrapped_inputs: bool = False
    triangles: dict[fx.Node, Triangle] = field(default_factory=dict)
    triangle_sizes: tuple[int | torch.SymInt, ...] = ()
    tokens: Tokens | None = None
    source: fx.GraphModule | None = None


_OF_A_NODE = NodeFacts()


def facts(node: fx.Node) -> NodeFacts:
    """The facts that are known of a node by now."""
    found: NodeFacts = node.meta.get(_FACTS, _OF_A_NODE)
    return found


def set_facts(node: fx.Node, known: NodeFacts) -> None:
    """Put ``known``, most often a ``replace(facts(node), ...)``, in place of what was known."""
    node.meta[_FACTS] = known


def graph_facts(gm: fx.GraphModule) -> GraphFacts:
    """The facts that are known of a graph by now."""
    found: GraphFacts = gm.meta.get(_FACTS) or GraphFacts()
    return found


def set_graph_facts(gm: fx.GraphModule, known: GraphFacts) -> None:
    """Put ``known``, most often a ``replace(graph_facts(gm), ...)``, in place of what was known."""
    gm.meta[_FACTS] = known


def tokens_of(gm: fx.GraphModule) -> Tokens:
    """The token axes of a graph. Needs ``mark_token_axes``."""
    tokens = graph_facts(gm).tokens
    assert tokens is not None, "mark_token_axes has not run"
    return tokens


def source_of_fold(program: fx.GraphModule) -> fx.GraphModule:
    """The captured graph that a folded program was made of. Needs ``fold_graph``."""
    source = graph_facts(program).source
    assert source is not None, "this is not a folded program"
    return source
