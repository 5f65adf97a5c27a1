"""Prove that rows do not depend on their column: then paths need not start at the first one.

A column gets into a row by a table with one entry for each column, by an op along the sequence, or by a mask. If there
is no such table, if attention is the only op along the sequence, and if its masks compare columns with each other
alone, then a row is a function of the rows that it sees, wherever they are. Two kinds of masks end what it sees on the
left:

- one that hides padding: sequences with left padding start behind it;
- one that hides the other sequences of several packed in a row, numbered one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from radix_compile.analysis.attention.bias import Bias
from radix_compile.ir.axes import Uniform
from radix_compile.ir.facts import (
    AtMost,
    Formula,
    FullyMasked,
    Given,
    Masked,
    PerRow,
    Predicate,
    RowTrue,
    Same,
    Weights,
    atoms_of,
    hides,
    is_known,
    terms_of,
)
from radix_compile.ir.graph import tokens_of
from radix_compile.ir.source import upstream
from radix_compile.ir.value import is_row, value_of, values_of
from radix_compile.passes.fold import Fold, Starts

aten = torch.ops.aten


def prove_shift(fold: Fold) -> None:
    """State where the paths of rows may start, other than at the first column, or the first op that brings one in.

    Needs ``fold_graph``.
    """
    sequence_ids = sequence_ids_of(fold.captured)
    reader = fold.column = _first_reader_of_columns(fold, sequence_ids)
    tokens = tokens_of(fold.captured)
    by_column = tokens.masks or tokens.blocks  # which columns the caller's masks show, wherever a sequence starts
    if reader is None and not by_column:
        fold.starts = Starts(hidden_padding(fold.captured), sequence_ids)


def hidden_padding(captured: fx.GraphModule) -> FullyMasked | None:
    """The rows that every attention hides as keys, if they are the only ones that can be without a key to see."""
    values = [value for node in captured.graph.nodes if node.op != "output" for value in values_of(node)]
    sources = {(fully_masked.source, fully_masked.truth) for value in values for fully_masked in value.fully_masked}
    if len(sources) != 1:
        return None
    source, truth = sources.pop()
    padding = FullyMasked(source, None, truth)
    return padding if all(hides(seen.visible, padding, seen.key) for seen in attentions(captured.graph)) else None


def sequence_ids_of(captured: fx.GraphModule) -> fx.Node | None:
    """The numbers that tell the sequences of a row apart: every attention shows a row the ones with its own alone."""
    numbers = [
        {term.source: None for term in terms_of(seen.visible) if isinstance(term, Same) and _are_pair(term, seen)}
        for seen in attentions(captured.graph)
    ]
    return next((one for one in numbers[0] if all(one in other for other in numbers)), None) if numbers else None


def _are_pair(term: Same, seen: Weights) -> bool:
    return {term.a, term.b} == {seen.query, seen.key}


def attentions(graph: fx.Graph) -> Iterator[Weights]:
    """Who sees whom, in each of them."""
    for node in graph.nodes:
        if node.op != "output":
            yield from (value.attends for value in values_of(node) if value.attends is not None)


def _first_reader_of_columns(fold: Fold, sequence_ids: fx.Node | None) -> fx.Node | None:
    """The first op after which a row may depend on its column.

    A mask that compares columns with each other is excepted, as long as it is on its way to attention. Where it meets
    keys, it has an entry for each query, which another row in compact form would have in another place. The
    ``sequence_ids`` and what they are counted from are excepted as long as they only tell rows of one sequence from
    others.
    """
    graph, wanted = fold.captured.graph, fold.wanted
    masks: set[fx.Node] = set()
    numbers = _numbering(graph, sequence_ids)
    looked_up = _looked_up(graph, sequence_ids)
    node: fx.Node
    for node in graph.nodes:
        if node.op != "call_function" or not (node in wanted.forms or node in looked_up):
            continue
        if node in numbers:
            if wanted.is_compact(node):
                return node
            continue
        if wanted.is_compact(node) and any(_is_by_column(bias, sequence_ids) for bias in fold.biases(node)):
            return node
        values = values_of(node)
        along_sequence = any(value.full_only and value.attends is None for value in values)
        moves_nothing = node.target is aten.index.Tensor  # by indices that count: the entries stay where they are
        uses = [use for value in values for use in value.operands]
        tables = [table for table, dim, how in uses if how == "column" and not _is_uniform(table, dim)]
        pairs = [rows for rows, _, how in uses if how == "pairs"]
        counts = not numbers.isdisjoint(node.all_input_nodes) and not _tells_apart(node, numbers, sequence_ids)
        seen = [value.attends.visible for value in values if value.attends is not None]
        tells = any(_tells_column(atom, sequence_ids) for formula in seen for atom in atoms_of(formula))
        relative = all(_compares_columns(one, sequence_ids) for one in (*tables, *pairs))
        if (along_sequence and not moves_nothing) or counts or tells or not relative:
            return node
        if is_row(node) and not seen and (tables or not masks.isdisjoint(node.all_input_nodes)):
            masks.add(node)
            if wanted.is_compact(node):
                return node
    return None


def _looked_up(graph: fx.Graph, sequence_ids: fx.Node | None) -> set[fx.Node]:
    """The nodes that lead to the rows that masks look up, as the plan does where attention runs on the tree."""
    sources = [getattr(atom, "source", None) for seen in attentions(graph) for atom in atoms_of(seen.visible)]
    return set(upstream(*(source for source in sources if source is not None and source is not sequence_ids)))


def _numbering(graph: fx.Graph, sequence_ids: fx.Node | None) -> set[fx.Node]:
    """The numbers of the sequences, if they are given or counted along the row, all on the way to them, and views."""
    if sequence_ids is None:
        return set()
    behind = {sequence_ids}
    for node in reversed(graph.nodes):
        if node in behind:
            behind.update(node.all_input_nodes)
    found = {sequence_ids} if sequence_ids.op == "placeholder" else set()
    for node in graph.nodes:
        if node in behind:
            if any(value.full_only for value in values_of(node)) or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        elif sequence_ids in found and node.op == "call_function":
            fact = values_of(node)[0].fact
            if isinstance(fact, PerRow) and fact.source is sequence_ids and fact.exact:
                found.add(node)
    return found


def _tells_apart(node: fx.Node, numbers: set[fx.Node], sequence_ids: fx.Node | None) -> bool:
    """Does a predicate read the numbers only to ask whether two of them are the same?"""
    fact = values_of(node)[0].fact
    if not isinstance(fact, Predicate) or not is_known(fact.formula):
        return False
    read = [atom for atom in atoms_of(fact.formula) if getattr(atom, "source", None) in numbers]
    return all(isinstance(atom, Same) and atom.source is sequence_ids for atom in read)


def _is_by_column(bias: Bias, sequence_ids: fx.Node | None) -> bool:
    """Is it a table, or of rows with an entry for each column, and does not only compare columns with each other?"""
    value = value_of(bias.node)
    return (value.is_constant or (value.is_row and bias.shape()[2])) and not _compares_columns(bias.node, sequence_ids)


def _is_uniform(table: fx.Node, dim: int) -> bool:
    return all(isinstance(atom, Uniform) for atom in value_of(table).axes[dim])


def _compares_columns(node: fx.Node, sequence_ids: fx.Node | None) -> bool:
    """Does each entry depend on a difference of columns, and on the rows there, alone?"""
    match value_of(node).fact:
        case Predicate(formula):
            return _compares(formula, sequence_ids)
        case Masked(visible, zero=True):
            return _compares(visible, sequence_ids)
        case _:
            return False


def _compares(formula: Formula, sequence_ids: fx.Node | None) -> bool:
    """Does the predicate hold for two rows wherever they are, if these and their distance are the same?"""
    return is_known(formula) and not any(_tells_column(atom, sequence_ids) for atom in atoms_of(formula))


def _tells_column(atom: Formula, sequence_ids: fx.Node | None) -> bool:
    """Does it look up a tensor that is the same for all sequences, whose entries so tell columns apart?

    If they tell where sequences start, and no more is asked of them, paths start there.
    """
    match atom:
        case Same(source) if source is sequence_ids:
            return False
        case Same(source) | AtMost(source) | RowTrue(source):
            return value_of(source).is_constant
        case _:
            return isinstance(atom, Given)
