"""Find the ops behind the last attention: they run only for the nodes of rows that are read themselves.

Other nodes are computed because later rows see them. They take no part in what follows the last op along the sequence:
its output projection, the last MLP, the projection to the vocabulary.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import TypeAlias

from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.flops import flops
from radix_compile.ir.graph import Form
from radix_compile.ir.value import is_arranged, is_row, values_of
from radix_compile.passes.choose_cuts import has_compact_form
from radix_compile.passes.choose_forms import read_by_compact
from radix_compile.passes.fold import Fold


def choose_head(fold: Fold) -> None:
    """Set ``fold.head``, the nodes whose compact values only rows that are read depend on. Needs ``find_read_rows``.

    Empty if there is no matrix product among them, or if only padding is not read.
    """
    rows = fold.read_rows
    if rows is None or not (rows.reads_earlier and rows.are_picked):
        return
    compact_readers, full_readers = _readers(fold)
    head: set[fx.Node] = set()
    behind: set[fx.Node] = set()
    for node in reversed(fold.captured.graph.nodes):
        if node.op == "output":
            behind.add(node)
        elif node.op == "call_function":
            if _is_behind(node, fold) and behind.issuperset(full_readers[node]):
                behind.add(node)
            is_scattered = Form.FULL not in fold.wanted.runs.get(node, ())
            is_read_behind = not is_scattered or behind.issuperset(full_readers[node])
            if _may_be_in_head(node, fold) and head.issuperset(compact_readers[node]) and is_read_behind:
                head.add(node)
    inputs = {arg for node in head for arg in _compact_inputs(node, fold)} - head
    can_be_picked = all(is_row(node) and not is_arranged(node) and is_tensor(node) for node in inputs)
    if can_be_picked and any(flops(node) for node in head):
        fold.head = frozenset(head)


Readers: TypeAlias = "defaultdict[fx.Node, set[fx.Node]]"


def _readers(fold: Fold) -> tuple[Readers, Readers]:
    """Return for each node the nodes that read it in compact form, and those that read it in full form."""
    compact: Readers = defaultdict(set)
    full: Readers = defaultdict(set)
    for node in fold.captured.graph.nodes:
        if node.op == "output" or Form.FULL in fold.wanted.runs.get(node, ()):
            for arg in node.all_input_nodes:
                full[arg].add(node)
        if Form.COMPACT in fold.wanted.runs.get(node, ()):
            for arg in _compact_inputs(node, fold):
                compact[arg].add(node)
            for bias in fold.biases(node):
                full[bias.node].add(node)
    return compact, full


def _compact_inputs(node: fx.Node, fold: Fold) -> list[fx.Node]:
    if Form.COMPACT not in fold.wanted.runs.get(node, ()):
        return []
    return [arg for arg in read_by_compact(node, fold) if has_compact_form(arg)]


def _is_behind(node: fx.Node, fold: Fold) -> bool:
    """May a value in full form be of no account to what runs compact?"""
    values = values_of(node)
    is_along = any(value.full_only or value.attends is not None or value.is_pair for value in values)
    return not is_along and not fold.wanted.is_compact(node)


def _may_be_in_head(node: fx.Node, fold: Fold) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    return fold.wanted.is_compact(node) and fold.tree_attention(source) is None  # type: ignore[arg-type]
