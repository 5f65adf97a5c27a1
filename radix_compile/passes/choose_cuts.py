"""Decide for each node in which form it runs: compact (once per node of the prefix tree) or full (once per row)."""

from __future__ import annotations

import operator

import sympy
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.memory import views_to_keep
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.rules.row_numbers import shown_by
from radix_compile.ir.axes import Token
from radix_compile.ir.graph import Form
from radix_compile.ir.value import is_arranged, is_row, values_of
from radix_compile.passes.fold import Fold
from radix_compile.torch_internals import hints_of, val


def choose_cuts(fold: Fold) -> None:
    """Set ``fold.homes``, the form in which each node runs. Needs ``mark_token_axes`` and ``fold_attention``.

    Position-wise ops on rows are compact, and so is attention on the prefix tree, with two exceptions. Values that
    cheap ops compute from the row keys (masks, positions) run in the form that their readers need. Views of a full
    value that are no wider stay full, so that the fold is of the narrower tensor. (``fold_graph`` runs views of a
    compact value in the form that their readers need. Views by which outputs share memory run in either form.)
    And an op that hides rows from what mixes them is full: the rows that it hides are then not computed at all.
    """
    graph = fold.captured.graph
    for node in graph.nodes:
        if node.op != "output":
            fold.homes[node] = _home(node, fold)
    for node in reversed(graph.nodes):
        if fold.homes.get(node) is Form.COMPACT and _hides_rows(node, fold) and _are_mixed(node):
            fold.homes[node] = Form.FULL
    for node, _ in views_to_keep(graph, hints_of(graph)):
        if fold.homes[node] is Form.COMPACT:
            fold.homes[node] = Form.EITHER


def _home(node: fx.Node, fold: Fold) -> Form:
    if is_arranged(node):
        return Form.EITHER
    if node.op != "call_function" or not is_row(node):
        return Form.FULL
    if node.target is operator.getitem:
        return fold.homes[node.args[0]]  # type: ignore[index]
    if fold.tree_attention(node) is not None:
        return Form.COMPACT
    if any(value.full_only for value in values_of(node)) or not _can_be_derived(node):
        return Form.FULL
    if is_light(node, fold):
        return Form.EITHER
    if is_view(node) and fold.homes[_viewed(node)] is Form.FULL and is_thin(node, _viewed(node)):
        return Form.FULL
    return Form.COMPACT


def _hides_rows(node: fx.Node, fold: Fold) -> bool:
    """Is it a product of rows with a mask, or a choice of rows by one?"""
    masks = (shown_by(node, rows) for rows in node.all_input_nodes if not is_light(rows, fold))
    return any(mask is not None and is_light(mask[0], fold) for mask in masks)


def _are_mixed(node: fx.Node) -> bool:
    """Is a value read by ops alone that mix rows, or return them? Views pass it on to such ops."""
    return bool(node.users) and all(
        user.op == "output" or values_of(user)[0].mixed is not None or (is_view(user) and _are_mixed(user))
        for user in node.users
    )


def is_light(node: fx.Node, fold: Fold) -> bool:
    """Whether a node is computed from the inputs by cheap ops alone: elementwise ops, views, running sums of keys."""
    if all(value.is_constant for value in values_of(node)):
        return True
    if node not in fold.light:
        fold.light[node] = _is_cheap(node) and all(is_light(arg, fold) for arg in node.all_input_nodes)
    return fold.light[node]


def _is_cheap(node: fx.Node) -> bool:
    if node.op != "call_function":
        return True
    if any(value.full_only for value in values_of(node)):
        return all(value.attends is None for value in values_of(node))
    return is_view(node) or info_of(node.target).is_cheap


def has_compact_form(node: fx.Node) -> bool:
    return is_row(node) or is_arranged(node)


def is_view(node: fx.Node) -> bool:
    return info_of(node.target).is_view or values_of(node)[0].identity is not None


def _viewed(node: fx.Node) -> fx.Node:
    source = values_of(node)[0].identity or node.args[0]
    assert isinstance(source, fx.Node)
    return source


def thin_source(node: fx.Node) -> fx.Node | None:
    """Return the source of a view, if it can be scattered in place of the view: it has rows and is no wider."""
    if not is_view(node):
        return None
    source = _viewed(node)
    return source if is_row(source) and is_thin(source, node) else None


def is_thin(narrow: fx.Node, wide: fx.Node) -> bool:
    """Whether a row of ``narrow`` has no more bytes than a row of ``wide``."""
    return bool((row_bytes(narrow) <= row_bytes(wide)) == True)  # noqa: E712 - a sympy relation may stay undecided


def row_bytes(node: fx.Node) -> sympy.Expr:
    atoms = [atom for axis in values_of(node)[0].axes for atom in axis if not isinstance(atom, Token)]
    assert is_tensor(node)
    return sympy.prod([atom.size for atom in atoms]) * val(node).dtype.itemsize


def _can_be_derived(node: fx.Node) -> bool:
    """Whether the shape argument can be computed for the compact form. (Not with a symbolic feature size.)"""
    if info_of(node.target).shape_argument is None:
        return True
    atoms = [atom for value in values_of(node) for axis in value.axes for atom in axis if not isinstance(atom, Token)]
    return all(isinstance(atom.size, sympy.Integer) for atom in atoms)
