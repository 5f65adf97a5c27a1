"""Prove that rows do not depend on their column: then left padding of different length does not keep prefixes apart.

A column gets into a row by a table with one entry for each column, by an op along the sequence, or by a mask. If there
is no such table, if attention is the only op along the sequence, if its masks compare columns with each other alone,
and if every one of them hides the padding, then a row is a function of the rows from the first visible one on,
wherever that is.
"""

from __future__ import annotations

import torch
from torch import fx

from radix_compile.mask_facts import And, Blind, Formula, Opaque, Or, Predicate, hides
from radix_compile.passes.choose_cuts import values_of
from radix_compile.passes.fold_graph import Wanted
from radix_compile.token_axes import Uniform, refuse, value_of

aten = torch.ops.aten


def prove_shift(captured: fx.GraphModule) -> Blind | None:
    """The padding that may be in front of sequences without a part in the paths of their rows.

    None if the graph hides none from every attention, or a row may depend on its column. Needs ``fold_graph``; writes
    the first op that brings a column in to ``meta["column"]``.
    """
    wanted: Wanted = captured.meta["wanted"]
    padding = hidden_padding(captured)
    captured.meta["column"] = next((refuse(node, "") for node in wanted.forms if _reads_column(node)), None)
    return padding if captured.meta["column"] is None else None


def hidden_padding(captured: fx.GraphModule) -> Blind | None:
    """The rows that every attention hides as keys, if they are the only ones that can be without a key to see."""
    values = [value for node in captured.graph.nodes if node.op != "output" for value in values_of(node)]
    sources = {(blind.source, blind.truth) for value in values for blind in value.blind}
    if len(sources) != 1:
        return None
    source, truth = sources.pop()
    padding = Blind(source, None, truth)
    seen = [value.attends for value in values if value.attends is not None]
    return padding if all(hides(weights.visible, padding, weights.key) for weights in seen) else None


def _reads_column(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    along_sequence = any(value.full_only and value.attends is None for value in values_of(node))
    moves_nothing = node.target is aten.index.Tensor  # by indices that count: the entries stay where they are
    tables = [(table, dim) for value in values_of(node) for table, dim, how in value.operands if how == "column"]
    return (along_sequence and not moves_nothing) or not all(_is_the_same_anywhere(*table) for table in tables)


def _is_the_same_anywhere(table: fx.Node, dim: int) -> bool:
    """Equal entries for all columns, or a mask that is known to be about differences of columns."""
    value = value_of(table)
    equal = all(isinstance(atom, Uniform) for atom in value.axes[dim])
    return equal or (isinstance(value.fact, Predicate) and _is_known(value.fact.formula))


def _is_known(formula: Formula) -> bool:
    terms = formula.terms if isinstance(formula, And | Or) else ()
    return not isinstance(formula, Opaque) and all(map(_is_known, terms))
