"""The facts that passes state about a graph and its nodes, for later passes.

Only this module knows where the facts are stored. Both classes are frozen: a pass replaces the facts of a node, so that
copies of the node, which share the entries of ``meta``, stay unchanged.
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
    """The form of a value: one entry per row (full), per node of the prefix tree (compact), or as its users need.

    Behind the last attention, the compact form has entries for rows that are read alone (head).
    """

    FULL = "full"
    COMPACT = "compact"
    HEAD = "head"
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The facts of one node, each with the pass that states it.

    Inputs, by ``capture``:

    ``is_static``       the input is a parameter or a buffer of the module.
    ``needs_gradient``  the input may get a gradient; None if unknown.
    ``triangle``        the causal mask that a buffer holds.

    Captured nodes:

    ``marks``     the annotation of the result, or of each result (``mark_token_axes``).
    ``visible``   for flex_attention, the result of its ``mask_mod`` for all pairs (``inline_flex_functions``).
    ``scores``    for flex_attention, the result of its ``score_mod`` for all pairs (``inline_flex_functions``).
    ``parts``     for attention, its operands, or why they were not recognised (``read_attention``).
    ``bounds``    the least and the greatest possible entry of the result; None if unknown, ``()`` if not computed yet
                  (cached by ``analysis.bounds``).

    Nodes of a folded program, by ``fold_graph``:

    ``form``          the form of the value.
    ``origin``        the captured node that has the same value.
    ``has_gradient``  for a scatter, whether it may get a gradient.
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
    """The facts of a graph, each with the pass that states it.

    ``model``               the class of the compiled module (``capture``).
    ``is_differentiable``   a call may be followed by a backward pass (``capture``).
    ``records_gradients``   ``torch.is_grad_enabled()`` at the start of the graph (``capture``).
    ``has_checkpoints``     activation checkpointing regions were inlined (``capture``).
    ``has_wrapped_inputs``  some inputs are wrapper subclasses; the graph takes the tensors inside (``capture``).
    ``triangles``           the buffers whose causal masks were expanded into ops (``expand_mask_buffers``).
    ``triangle_sizes``      the number of rows read of each of these buffers (``expand_mask_buffers``).
    ``tokens``              the token axes (``mark_token_axes``).
    ``source``              for a folded program, the captured graph it was made from (``fold_graph``).
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


_NO_FACTS = NodeFacts()


def facts(node: fx.Node) -> NodeFacts:
    """Return the facts stated about a node up to now."""
    result: NodeFacts = node.meta.get(_FACTS, _NO_FACTS)
    return result


def set_facts(node: fx.Node, new: NodeFacts) -> None:
    """Replace the facts of a node, usually by ``replace(facts(node), ...)``."""
    node.meta[_FACTS] = new


def graph_facts(gm: fx.GraphModule) -> GraphFacts:
    """Return the facts stated about a graph up to now."""
    result: GraphFacts = gm.meta.get(_FACTS) or GraphFacts()
    return result


def set_graph_facts(gm: fx.GraphModule, new: GraphFacts) -> None:
    """Replace the facts of a graph, usually by ``replace(graph_facts(gm), ...)``."""
    gm.meta[_FACTS] = new


def tokens_of(gm: fx.GraphModule) -> Tokens:
    """Return the token axes of a graph. Requires ``mark_token_axes``."""
    tokens = graph_facts(gm).tokens
    assert tokens is not None, "mark_token_axes has not run"
    return tokens


def source_of_fold(program: fx.GraphModule) -> fx.GraphModule:
    """Return the captured graph that a folded program was made from. Requires ``fold_graph``."""
    source = graph_facts(program).source
    assert source is not None, "this is not a folded program"
    return source
