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
from radix_compile.passes.choose_cuts import Form, is_row, values_of
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
    reader = _first_reader_of_columns(captured.graph, wanted)
    captured.meta["column"] = None if reader is None else refuse(reader, "")
    by_column = captured.meta["tokens"].masks  # which columns the caller's own masks show, wherever a sequence starts
    return padding if captured.meta["column"] is None and not by_column else None


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


def _first_reader_of_columns(graph: fx.Graph, wanted: Wanted) -> fx.Node | None:
    """The first op after which a row may depend on its column.

    A mask that compares columns with each other is excepted, as long as it is on its way to attention. Where it meets
    keys, it has an entry for each query, which another row in compact form would have in another place.
    """
    masks: set[fx.Node] = set()
    node: fx.Node
    for node in graph.nodes:
        if node.op != "call_function" or node not in wanted.forms:
            continue
        values = values_of(node)
        along_sequence = any(value.full_only and value.attends is None for value in values)
        moves_nothing = node.target is aten.index.Tensor  # by indices that count: the entries stay where they are
        tables = [(table, dim) for value in values for table, dim, how in value.operands if how == "column"]
        tables = [(table, dim) for table, dim in tables if not _is_uniform(table, dim)]
        if (along_sequence and not moves_nothing) or not all(_compares_columns(table) for table, _ in tables):
            return node
        attends = any(value.attends is not None for value in values)
        if is_row(node) and not attends and (tables or not masks.isdisjoint(node.all_input_nodes)):
            masks.add(node)
            if Form.COMPACT in wanted.forms[node]:
                return node
    return None


def _is_uniform(table: fx.Node, dim: int) -> bool:
    return all(isinstance(atom, Uniform) for atom in value_of(table).axes[dim])


def _compares_columns(table: fx.Node) -> bool:
    fact = value_of(table).fact
    return isinstance(fact, Predicate) and _is_known(fact.formula)


def _is_known(formula: Formula) -> bool:
    terms = formula.terms if isinstance(formula, And | Or) else ()
    return not isinstance(formula, Opaque) and all(map(_is_known, terms))
