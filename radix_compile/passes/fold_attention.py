"""Find the attentions that have a compact form of their own.

Position-wise work runs once per node because a row reads itself alone. Causal attention reads the rows on the way to
it, and those are the node's ancestors: where all that a mask says can be said of ancestors, attention runs on the tree
too (the op ``radix::tree_attention``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from radix_compile.analysis.arguments import argument
from radix_compile.analysis.attention.bias import Bias
from radix_compile.analysis.attention.masks import Visible, read_mask
from radix_compile.analysis.attention.parts import Parts, TreeAttention, attention_steps, is_attention
from radix_compile.analysis.attention.rows import NotOnTree, Rows, are_side_by_side, narrow
from radix_compile.analysis.rules.flex import mask_of
from radix_compile.ir.axes import Mixes
from radix_compile.ir.errors import Declined
from radix_compile.ir.facts import FullyMasked, Masked, Weights, fully_masked_rows, hides, is_known, terms_of
from radix_compile.ir.grad_modes import grad_modes
from radix_compile.ir.graph import facts, graph_facts
from radix_compile.ir.value import value_of, values_of
from radix_compile.passes.fold import Fold
from radix_compile.torch_internals import val

aten = torch.ops.aten


def fold_attention(fold: Fold) -> None:
    """State the :class:`TreeAttention` of each attention, or :class:`Declined` if there is none.

    Needs ``mark_token_axes`` and ``read_attention``. Three things are taken for granted, unless the variant forbids it:
    that sequences packed in a row are told apart by their paths; that every row sees a key, where one that sees none in
    some attention would attend to all of them, is a key, or sees keys in this attention (such rows are not in the
    tree); and that tables of blocks say what masks do.
    """
    graph = fold.captured.graph
    known = graph_facts(fold.captured)
    assumes = fold.variant.assumes
    fully_masked = {
        one for node in graph.nodes if node.op != "output" for value in values_of(node) for one in value.fully_masked
    }
    shown = sequence_ids = None
    records = grad_modes(graph, known.records_gradients)
    for node in graph.nodes:
        if is_attention(node):
            try:
                if not fold.variant.on_tree:
                    raise NotOnTree("the option fold_attention is off")
                fold.attentions[node] = found = _found(node, fully_masked)
                if known.is_differentiable and records[node] and _stops_gradient(node, found, records):
                    raise NotOnTree("a part of it has no gradient (detach, or torch.no_grad())")
                if any(bias.may_be_large() for bias in found.biases):
                    raise NotOnTree("it adds a bias with so large numbers that sums would lose their digits")
                if found.visible.sequence_ids is not None and not assumes:
                    raise NotOnTree("several sequences may be packed in a row")
                if found.parts.blocks is not None and not assumes:
                    raise NotOnTree("its table of blocks may show or hide others than its mask_mod")
                if found.needs_visible_keys and not assumes:
                    raise NotOnTree("some rows see no key: they attend to all of them, or are keys themselves")
                shown = found.visible.shown if shown is None else shown
                own_ids = found.visible.sequence_ids
                sequence_ids = own_ids if sequence_ids is None else sequence_ids
                if set(shown) != set(found.visible.shown) or own_ids not in (None, sequence_ids):
                    raise NotOnTree("another attention hides other keys, and the plan is made for those")
            except NotOnTree as verdict:
                fold.attentions[node] = Declined(str(verdict))


def _found(node: fx.Node, fully_masked: set[FullyMasked]) -> TreeAttention:
    one_op = node.target is aten.scaled_dot_product_attention.default
    parts = _parts(node) if one_op else facts(node).parts
    assert parts is not None
    if isinstance(parts, Declined):
        raise NotOnTree(parts.reason)
    value = values_of(node)[0]
    attends = value.attends
    assert attends is not None
    if parts.blocks is not None:
        attends = replace(attends, visible=mask_of(node))
    visible, biases = Visible(), parts.biases
    try:
        visible = read_mask(attends)
    except NotOnTree:
        biases += parts.masks
        said = {term for bias in biases for term in terms_of(bias.visible)}
        if not all(term in said and is_known(term) for term in terms_of(attends.visible)):
            raise
    for bias in biases:
        bias.check()
    _check(parts)
    if Rows(node, parts.order).heads()[0] != parts.query.heads()[0]:
        raise NotOnTree("its mask, its bias or its values have more heads than its queries")
    key, values = narrow(parts.key), narrow(parts.value)
    if key.heads()[0] == values.heads()[0]:
        parts = replace(parts, key=key, value=values)
    left_out = all(hides(attends.visible, one, attends.key) and _is_fully_masked(attends, one) for one in fully_masked)
    needs_visible_keys = not left_out or (bool(value.fully_masked) and not parts.zero)
    dtypes = {_result(step).dtype for step in attention_steps(node)}
    if len(dtypes) > 1:
        raise NotOnTree("its two products have different dtypes")
    return TreeAttention(parts, visible, biases, needs_visible_keys, *dtypes)


def _stops_gradient(node: fx.Node, found: TreeAttention, records: Mapping[fx.Node, bool]) -> bool:
    """Does a gradient stop between the attention's result and its queries, keys, values and sinks?"""
    ends = set(found.inputs)
    queue, behind = [node], {node}
    while queue:
        new = [arg for arg in queue.pop().all_input_nodes if arg not in ends and arg not in behind]
        behind.update(new)
        queue += new
    between: set[fx.Node] = set()  # of those, what is computed from one of the ends
    for one in node.graph.nodes:
        if one in behind and any(arg in ends or arg in between for arg in one.all_input_nodes):
            between.add(one)
    return any(one.target is aten.detach.default or not records[one] for one in between)


def _result(node: fx.Node) -> torch.Tensor:
    value = val(node)
    result: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return result


def _is_fully_masked(attends: Weights, rows: FullyMasked) -> bool:
    """Is every row that is fully masked in ``rows`` fully masked in this attention too?"""
    try:
        own = fully_masked_rows(attends.visible, attends.query, attends.key)
    except Mixes:  # flex_attention need not tell: such rows are zero there
        return False
    if own is None or (own.source, own.truth) != (rows.source, rows.truth):
        return False
    # Who sees none of many columns sees none of fewer.
    return own.window == rows.window or (own.window is not None and (rows.window is None or own.window < rows.window))


def _parts(node: fx.Node) -> Parts:
    """The parts of attention as one op."""
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    scale, mask, strict = argument(node, "scale"), argument(node, "attn_mask"), True
    masks: tuple[Bias, ...] = ()
    biases: tuple[Bias, ...] = ()
    if mask is not None and val(mask).dtype == torch.bool:
        masks = (Bias(mask, node, hides=False),)
    elif mask is not None:
        fact = value_of(mask).fact
        assert isinstance(fact, Masked)
        strict, given = fact.is_strict, (Bias(mask, node),)
        masks, biases = (given, ()) if fact.zero else ((), given)
    _, size = Rows(query).heads()
    scale = 1 / math.sqrt(size) if scale is None else float(scale)
    grouped = bool(argument(node, "enable_gqa"))
    return Parts(Rows(query), Rows(key), Rows(value), scale, grouped=grouped, zero=strict, masks=masks, biases=biases)


def _check(parts: Parts) -> None:
    """Do the heads fit together? Raises :class:`NotOnTree`."""
    rows = (parts.query, parts.key, parts.value)
    (heads, size), (groups, key_size), (value_groups, _) = (one.heads() for one in rows)
    match = all(are_side_by_side(parts.query, one, parts.grouped) for one in rows[1:])
    if groups != value_groups or heads % groups or size != key_size or not match:
        raise NotOnTree(f"its heads do not fit: {heads} of queries, {groups} of keys, {value_groups} of values")
    if parts.sinks is not None and val(parts.sinks).numel() != heads:
        raise NotOnTree("its sinks are not one number for each head")
