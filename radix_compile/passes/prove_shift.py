"""Prove that rows do not depend on their column. Then paths may start at later columns than the first.

A row can depend on its column by a table with one entry per column, by an op along the sequence, or by a mask. If there
is no such table, if attention is the only op along the sequence, and if its masks only compare columns with each other,
then a row is a function of the rows that it sees, at whatever columns they are. (Running sums of something that is zero
in padding are allowed too: positions are counted so.) Two kinds of masks limit these on the left:

- a mask that hides padding: the paths of left-padded sequences start behind the padding;
- a mask that hides the other sequences packed in a row: paths start where the sequence id changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from radix_compile.analysis.arguments import source_of
from radix_compile.analysis.attention.bias import Bias
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.rules.masks import and_
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
from radix_compile.passes.choose_cuts import is_view
from radix_compile.passes.fold import Fold, Starts
from radix_compile.torch_internals import val

aten = torch.ops.aten


def prove_shift(fold: Fold) -> None:
    """Set ``fold.starts``, where paths may start, or ``fold.column``, the first op that depends on a row's column.

    Needs ``choose_forms``.
    """
    sequence_ids = sequence_ids_of(fold.captured)
    reader = fold.column = _first_reader_of_columns(fold, sequence_ids)
    tokens = tokens_of(fold.captured)
    has_given_masks = tokens.masks or tokens.blocks  # masks from the caller, which may show any columns
    if reader is None and not has_given_masks:
        fold.starts = Starts(hidden_padding(fold.captured), sequence_ids)


def hidden_padding(captured: fx.GraphModule) -> FullyMasked | None:
    """Return the rows that every attention hides as keys, if no other rows can be fully masked; else None."""
    values = [value for node in captured.graph.nodes if node.op != "output" for value in values_of(node)]
    sources = {(fully_masked.source, fully_masked.truth) for value in values for fully_masked in value.fully_masked}
    if len(sources) != 1:
        return None
    source, truth = sources.pop()
    padding = FullyMasked(source, None, truth)
    all_hide = all(hides(weights.visible, padding, weights.key) for weights in attentions(captured.graph))
    return padding if all_hide else None


def sequence_ids_of(captured: fx.GraphModule) -> fx.Node | None:
    """Return the sequence ids of packed rows: in every attention, a row sees only keys with its own id. Else None."""
    compared = [
        {term.source: None for term in terms_of(weights.visible) if isinstance(term, Same) and _is_pair(term, weights)}
        for weights in attentions(captured.graph)
    ]
    common = (source for source in compared[0] if all(source in sources for sources in compared)) if compared else ()
    return next(iter(common), None)


def _is_pair(term: Same, weights: Weights) -> bool:
    """Whether a term compares a query with a key."""
    return {term.a, term.b} == {weights.query, weights.key}


def attentions(graph: fx.Graph) -> Iterator[Weights]:
    """Yield the fact of each attention, which has its mask."""
    for node in graph.nodes:
        if node.op != "output":
            yield from (value.attends for value in values_of(node) if value.attends is not None)


def _first_reader_of_columns(fold: Fold, sequence_ids: fx.Node | None) -> fx.Node | None:
    """Return the first op after which a row may depend on its column; None if there is none.

    Two kinds of values that depend on columns are allowed:

    - masks that compare columns with each other, on the way to attention in full form. In compact form such a mask has
      an entry for each query, whose place depends on the row;
    - ``sequence_ids``, and the values that they are counted from, if they are only compared with each other.

    Rotary embeddings are checked in each call. A running sum of something that is zero in padding is the same wherever
    the sequence starts behind its padding.
    """
    graph, wanted = fold.captured.graph, fold.wanted
    rotary = fold.rotary.nodes if fold.rotary is not None else frozenset()
    masks: set[fx.Node] = set()
    padding = hidden_padding(fold.captured) if sequence_ids is None else None
    id_nodes = _sequence_id_nodes(graph, sequence_ids)
    looked_up = _looked_up(graph, sequence_ids)
    node: fx.Node
    for node in graph.nodes:
        if node.op != "call_function" or not (node in wanted.forms or node in looked_up) or node in rotary:
            continue
        if node in id_nodes:
            if wanted.is_compact(node):
                return node
            continue
        if wanted.is_compact(node) and any(_is_by_column(bias, sequence_ids) for bias in fold.biases(node)):
            return node
        values = values_of(node)
        is_along_sequence = any(value.full_only and value.attends is None for value in values)
        is_along_sequence &= not _counts_shown_rows(node, padding)
        is_identity = node.target is aten.index.Tensor  # the indices are proved to be 0, 1, 2, ...
        operands = [operand for value in values for operand in value.operands]
        tables = [table for table, dim, how in operands if how == "column" and not is_uniform(table, dim)]
        pairs = [rows for rows, _, how in operands if how == "pairs"]
        reads_ids = not id_nodes.isdisjoint(node.all_input_nodes) and not _compares_ids(node, id_nodes, sequence_ids)
        formulas = [value.attends.visible for value in values if value.attends is not None]
        reads_columns = any(_reads_column(atom, sequence_ids) for formula in formulas for atom in atoms_of(formula))
        is_relative = all(compares_columns(operand, sequence_ids) for operand in (*tables, *pairs))
        if (is_along_sequence and not is_identity) or reads_ids or reads_columns or not is_relative:
            return node
        if is_row(node) and not formulas and (tables or not masks.isdisjoint(node.all_input_nodes)):
            masks.add(node)
            if wanted.is_compact(node):
                return node
    return None


def _counts_shown_rows(node: fx.Node, padding: FullyMasked | None) -> bool:
    """Whether an op is a running sum of something that is zero in padding."""
    return padding is not None and node.target is aten.cumsum.default and _is_zero_in(padding, source_of(node))


def _is_zero_in(padding: FullyMasked, node: fx.Node) -> bool:
    """Whether a value is zero in padding: the mask itself, or a product with it."""
    if info_of(node.target).fact is and_:  # products, too
        return any(_is_zero_in(padding, arg) for arg in node.all_input_nodes)
    return padding.truth and _with_equal_zeros(node) is _with_equal_zeros(padding.source)


def _with_equal_zeros(node: fx.Node) -> fx.Node:
    """Return the value, before views and casts, that is zero exactly where ``node`` is."""
    while (is_view(node) and _keeps_zeros(node)) or (node.target is aten.ne.Scalar and node.args[1] == 0):
        node = source_of(node)
    return node


def _keeps_zeros(node: fx.Node) -> bool:
    """Whether a view or a cast makes zero of nothing but zero."""
    before, after = val(source_of(node)).dtype, val(node).dtype
    if before == after or torch.bool in (before, after):
        return True
    return not before.is_floating_point and (after.is_floating_point or after.itemsize >= before.itemsize)


def _looked_up(graph: fx.Graph, sequence_ids: fx.Node | None) -> set[fx.Node]:
    """Return the nodes from which the masks' row values are computed: the plan reads them for attention on the tree."""
    sources = [getattr(atom, "source", None) for weights in attentions(graph) for atom in atoms_of(weights.visible)]
    return set(upstream(*(source for source in sources if source is not None and source is not sequence_ids)))


def _sequence_id_nodes(graph: fx.Graph, sequence_ids: fx.Node | None) -> set[fx.Node]:
    """Return the sequence ids and their views, and the nodes that count them along the row, from the first scan on."""
    if sequence_ids is None:
        return set()
    sources = {sequence_ids}
    for node in reversed(graph.nodes):
        if node in sources:
            sources.update(node.all_input_nodes)
    id_nodes = {sequence_ids} if sequence_ids.op == "placeholder" else set()
    for node in graph.nodes:
        if node in sources:
            if any(value.full_only for value in values_of(node)) or not id_nodes.isdisjoint(node.all_input_nodes):
                id_nodes.add(node)
        elif sequence_ids in id_nodes and node.op == "call_function":
            fact = values_of(node)[0].fact
            if isinstance(fact, PerRow) and fact.source is sequence_ids and fact.exact:
                id_nodes.add(node)
    return id_nodes


def _compares_ids(node: fx.Node, id_nodes: set[fx.Node], sequence_ids: fx.Node | None) -> bool:
    """Whether a predicate reads sequence ids only to ask whether two of them are equal."""
    fact = values_of(node)[0].fact
    if not isinstance(fact, Predicate) or not is_known(fact.formula):
        return False
    atoms = [atom for atom in atoms_of(fact.formula) if getattr(atom, "source", None) in id_nodes]
    return all(isinstance(atom, Same) and atom.source is sequence_ids for atom in atoms)


def _is_by_column(bias: Bias, sequence_ids: fx.Node | None) -> bool:
    """Whether a bias has an entry per column that depends on more than the differences of columns."""
    value = value_of(bias.node)
    return (value.is_constant or (value.is_row and bias.shape()[2])) and not compares_columns(bias.node, sequence_ids)


def is_uniform(table: fx.Node, dim: int) -> bool:
    return all(isinstance(atom, Uniform) for atom in value_of(table).axes[dim])


def compares_columns(node: fx.Node, sequence_ids: fx.Node | None) -> bool:
    """Whether each entry depends only on the difference of its two columns and on the rows at them."""
    match value_of(node).fact:
        case Predicate(formula):
            return _is_relative(formula, sequence_ids)
        case Masked(visible, zero=True):
            return _is_relative(visible, sequence_ids)
        case _:
            return False


def _is_relative(formula: Formula, sequence_ids: fx.Node | None) -> bool:
    """Whether a predicate of two rows depends only on these rows and the difference of their columns."""
    return is_known(formula) and not any(_reads_column(atom, sequence_ids) for atom in atoms_of(formula))


def _reads_column(atom: Formula, sequence_ids: fx.Node | None) -> bool:
    """Whether an atom reads a tensor that is the same for all sequences, so that its entries depend on the column.

    Comparing sequence ids is allowed: paths start where they change.
    """
    match atom:
        case Same(source) if source is sequence_ids:
            return False
        case Same(source) | AtMost(source) | RowTrue(source):
            return value_of(source).is_constant
        case _:
            return isinstance(atom, Given)
