"""Find rotary embeddings by column: queries and keys that depend on their column, but whose products may not.

A rotary embedding (RoFormer, arXiv 2104.09864) turns the query and the key at column ``c`` by linear maps ``M(c)`` and
``N(c)``, for which the product ``q @ M(c).T @ N(d) @ k`` depends on ``c - d`` alone. Then a row is the same at any
column, if its keys are as far away. This pass finds the linear maps; that their products depend on the distance alone
is proved by running them, for the sizes of each call that needs it (``runtime.rotary_check``).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

import torch
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.attention.parts import Parts, is_attention
from radix_compile.analysis.attention.rows import NotOnTree
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.graph import Form, facts, graph_facts
from radix_compile.ir.source import upstream
from radix_compile.ir.value import is_arranged, is_row, value_of, values_of
from radix_compile.passes.fold import Fold, Pair, Rotary
from radix_compile.passes.fold_attention import parts_of
from radix_compile.passes.prove_shift import compares_columns, hidden_padding, is_uniform, sequence_ids_of
from radix_compile.torch_internals import val


class NotRotary(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """A value depends on its column in another way."""


def find_rotary(fold: Fold) -> None:
    """Set ``fold.rotary``, if all values that depend on their column are rotary embeddings. Needs ``choose_cuts``.

    They run in compact form with numbers of columns that count from the start of the path. Where anything else than
    attention reads one, as a returned cache of keys does, they run in full form too, with the program's columns. So
    they do for attention in which a fully masked row sees all keys, padding among them: the gradient of its scores is
    that of their columns.
    """
    captured = fold.captured
    if not fold.options.shift_rotary:
        return
    sequence_ids = sequence_ids_of(captured)
    if sequence_ids is None and hidden_padding(captured) is None:  # all paths start in the first column
        return
    rotated = _by_column(captured.graph, sequence_ids)
    if not rotated:
        return
    try:
        pairs, needs_columns = _readers(fold, rotated)
    except NotRotary:
        return
    homes = {fold.homes[node] for node in rotated}
    if not homes <= {Form.COMPACT, Form.EITHER}:
        return
    if needs_columns or Form.EITHER in homes:
        fold.homes |= dict.fromkeys(rotated, Form.EITHER)
        for node in computed_from_rows(rotated, rotated):  # so that rows are scattered, and not parts of them as well
            if fold.homes[node] is Form.COMPACT:
                fold.homes[node] = Form.EITHER
    fold.rotary = Rotary(frozenset(rotated), tuple(dict.fromkeys(pairs)))


def _by_column(graph: fx.Graph, sequence_ids: fx.Node | None) -> dict[fx.Node, None]:
    """Return the rows of floating-point numbers that depend on their column, up to attention."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not is_row(node) or is_attention(node) or not _is_float(node):
            continue
        operands = [operand for value in values_of(node) for operand in value.operands]
        tables = [table for table, dim, how in operands if how == "column" and not is_uniform(table, dim)]
        by_column = not all(compares_columns(table, sequence_ids) for table in tables)
        if by_column or any(arg in found for arg in node.all_input_nodes):
            found[node] = None
    return found


def _is_float(node: fx.Node) -> bool:
    results = val(node) if isinstance(val(node), tuple | list) else [val(node)]
    return all(result.is_floating_point() or result.is_complex() for result in results)


def _readers(fold: Fold, rotated: dict[fx.Node, None]) -> tuple[list[Pair], bool]:
    """Return the queries and keys that are rotated, and whether anything needs those of the program's columns.

    Raises :class:`NotRotary`.
    """
    needs_columns = False
    if not all(map(is_linear, rotated)):
        raise NotRotary
    pairs: list[Pair] = []
    scores: set[tuple[fx.Node, fx.Node]] = set()
    for node in fold.captured.graph.nodes:
        parts = _parts(node)
        if parts is None or not _have_heads(parts) or rotated.keys().isdisjoint([parts.query.node, parts.key.node]):
            continue
        pairs.append(Pair(parts.query, parts.key, parts.grouped))
        has_gradient = graph_facts(fold.captured).is_differentiable
        needs_columns |= has_gradient and not parts.zero and fold.tree_attention(node) is None
        if parts.product is not None:
            scores |= {(arg, parts.product) for arg in parts.product.all_input_nodes}
        elif parts.value.node not in rotated:
            scores |= {(parts.query.node, node), (parts.key.node, node)}
    others = [user for node in rotated for user in node.users if user not in rotated and (node, user) not in scores]
    for user in others:
        if user.op != "output" and (is_arranged(user) or is_row(user) or any(one.is_pair for one in values_of(user))):
            raise NotRotary
    return pairs, needs_columns or bool(others)


def _parts(node: fx.Node) -> Parts | None:
    if not is_attention(node):
        return None
    try:
        return parts_of(node)
    except NotOnTree:
        return None


def _have_heads(parts: Parts) -> bool:
    try:
        parts.query.heads(), parts.key.heads()
    except NotOnTree:
        return False
    return True


def is_linear(node: fx.Node) -> bool:
    """Whether an op is linear in all its rows together, and its other operands are constants without a gradient.

    The gradient of a table would be that of the columns from which the path counts.
    """
    if node.target is operator.getitem:
        return is_linear(node.args[0])  # type: ignore[arg-type]
    if values_of(node)[0].identity is not None:
        return True
    operands = operands_of(node)
    rows = [operand for operand in operands if not value_of(operand).is_constant]
    constants = [operand for operand in operands if operand not in rows]
    if any(facts(one).needs_gradient is not False for one in upstream(*constants) if one.op == "placeholder"):
        return False
    match info_of(node.target).linear:
        case "all":
            adds_a_number = torch.Tag.pointwise in node.target.tags and len(operands) < len(node.args)  # type: ignore
            return not constants and not adds_a_number
        case "each":
            return len(rows) == 1
        case "first":
            return rows == [node.args[0]]
    return False


def computed_from_rows(ends: Iterable[fx.Node], rotated: Collection[fx.Node]) -> list[fx.Node]:
    """Return the rotated values in front of some nodes, and what they are computed from by linear ops of rows alone.

    Two halves of one row are no different rows, and neither is the negative of one.
    """
    found: set[fx.Node] = set()
    queue = list(ends)
    graph = queue[0].graph
    while queue:
        node = queue.pop()
        is_part = node in rotated or (node.op == "call_function" and is_linear(node) and _has_no_constants(node))
        if node not in found and is_row(node) and is_part:
            found.add(node)
            queue += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _has_no_constants(node: fx.Node) -> bool:
    return all(not value_of(operand).is_constant for operand in operands_of(node))


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an op takes, as often as it takes them."""
    operands: list[fx.Node] = []
    fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: operands.append(arg) if is_tensor(arg) else None)
    return operands
