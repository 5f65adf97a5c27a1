"""Decide in which forms each node's value is wanted, and in which of them its op runs."""

from __future__ import annotations

from torch import fx

from radix_compile.ir.graph import Form
from radix_compile.passes.choose_cuts import has_compact_form, thin_source
from radix_compile.passes.fold import Fold, Wanted


def choose_forms(fold: Fold) -> None:
    """Set ``fold.wanted``, walking back from the outputs. What nothing wants is dropped. Needs ``choose_cuts``."""
    wanted = fold.wanted = Wanted()

    def want(node: fx.Node, form: Form) -> None:
        wanted.forms.setdefault(node, set()).add(form)

    for node in reversed(fold.captured.graph.nodes):
        impure = node.is_impure() and fold.tree_attention(node) is None  # it might have drawn numbers, and draws none
        if node.op in ("output", "placeholder") or impure:
            for arg in node.all_input_nodes:
                want(arg, Form.FULL)
            if node.op == "call_function":
                want(node, Form.FULL)
                wanted.runs[node] = {Form.FULL}
            continue
        forms = wanted.forms.get(node)
        if not forms:
            continue
        runs = wanted.runs[node] = set()
        if fold.homes[node] is Form.FULL:
            runs.add(Form.FULL)
        elif fold.homes[node] is Form.EITHER:
            runs |= forms
        else:
            source = thin_source(node) if Form.FULL in forms else None
            if source is not None:
                runs.add(Form.FULL)
            if source is None or Form.COMPACT in forms:
                runs.add(Form.COMPACT)
        if Form.FULL in runs:
            for arg in node.all_input_nodes:
                want(arg, Form.FULL)
        if Form.COMPACT in runs:
            for arg in read_by_compact(node, fold):
                want(arg, Form.COMPACT if has_compact_form(arg) else Form.FULL)
            for bias in fold.biases(node):
                want(bias.node, Form.FULL)


def read_by_compact(node: fx.Node, fold: Fold) -> list[fx.Node]:
    """The inputs of the op in compact form: attention on the tree reads no mask."""
    attention = fold.tree_attention(node)
    return node.all_input_nodes if attention is None else attention.inputs
