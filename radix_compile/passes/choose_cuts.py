"""Decide for each node in which form it runs: compact (once per node of the prefix tree) or full (once per row)."""

from __future__ import annotations

import operator

import sympy
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.attention.parts import compact_attention
from radix_compile.analysis.memory import views_to_keep
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.axes import Layout, Token
from radix_compile.ir.graph import Form, home, is_arranged, is_row
from radix_compile.ir.value import values_of
from radix_compile.torch_internals import hints_of


def choose_cuts(gm: fx.GraphModule) -> fx.GraphModule:
    """Write to ``node.meta["home"]`` the form in which the node runs. Needs ``mark_token_axes``.

    Position-wise work on rows is compact, and so is attention that runs on the tree. Two things next to it are not:
    what is computed from the row keys by cheap ops alone (masks, positions) runs in the form in which it is wanted, and
    views of a full value stay full, so that the fold happens where the tensor is thinnest. (Views of a compact value
    run in either form, where they are wanted: ``fold_graph``. So do those that outputs share memory by.)
    """
    layout = gm.meta["tokens"].layout
    for node in gm.graph.nodes:
        if node.op != "output":
            node.meta["home"] = _home(node, layout)
    for node, _ in views_to_keep(gm.graph, hints_of(gm.graph)):
        if home(node) is Form.COMPACT:
            node.meta["home"] = Form.EITHER
    return gm


def _home(node: fx.Node, layout: Layout) -> Form:
    if is_arranged(node):
        return Form.EITHER
    if node.op != "call_function" or not is_row(node):
        return Form.FULL
    if node.target is operator.getitem:
        return home(node.args[0])  # type: ignore[arg-type]
    if compact_attention(node) is not None:
        return Form.COMPACT
    if any(value.full_only for value in values_of(node)) or not _can_be_derived(node, layout):
        return Form.FULL
    if is_light(node):
        return Form.EITHER
    if is_view(node) and home(_viewed(node)) is Form.FULL and is_thin(node, _viewed(node)):
        return Form.FULL
    return Form.COMPACT


def is_light(node: fx.Node) -> bool:
    """Computed from nothing but the inputs, by cheap ops: elementwise, views, running sums of keys."""
    if all(value.is_constant for value in values_of(node)):
        return True
    light: bool | None = node.meta.get("light")
    if light is None:
        light = node.meta["light"] = _is_cheap(node) and all(map(is_light, node.all_input_nodes))
    return light


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
    """What to scatter in place of a view's result: its source, if that is a row value and no wider."""
    if not is_view(node):
        return None
    source = _viewed(node)
    return source if is_row(source) and is_thin(source, node) else None


def is_thin(narrow: fx.Node, wide: fx.Node) -> bool:
    """Is a row of the one no wider, in bytes, than a row of the other?"""
    return bool((row_bytes(narrow) <= row_bytes(wide)) == True)  # noqa: E712 - a sympy relation may stay undecided


def row_bytes(node: fx.Node) -> sympy.Expr:
    atoms = [atom for axis in values_of(node)[0].axes for atom in axis if not isinstance(atom, Token)]
    assert is_tensor(node)
    return sympy.prod([atom.size for atom in atoms]) * node.meta["val"].dtype.itemsize


def _can_be_derived(node: fx.Node, layout: Layout) -> bool:
    """Can the shape argument be written down in compact form? (Not with a symbolic feature size.)"""
    if info_of(node.target).shape_argument is None:
        return True
    atoms = [atom for value in values_of(node) for axis in value.axes for atom in axis if not isinstance(atom, Token)]
    return all(isinstance(atom.size, sympy.Integer) for atom in atoms)
