"""Find the attentions that can run on the prefix tree.

Causal attention of a row reads earlier rows of its sequence. These are the ancestors of the row's node, so that
attention can run once per node, over ancestors (the op ``radix::tree_attention``), if its mask can be evaluated on
nodes.
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
from radix_compile.kernels.tree_attention import code_for
from radix_compile.passes.fold import Fold
from radix_compile.torch_internals import val

aten = torch.ops.aten

MAX_SCALE = 100.0
"""The gradient of the Triton kernels starts from log-sum-exp, which has too few digits if scores are scaled by more."""


def fold_attention(fold: Fold) -> None:
    """Set ``fold.attentions``: the :class:`TreeAttention` of each attention, or :class:`Declined` with the reason.

    Needs ``mark_token_axes`` and ``read_attention``. If the variant allows assumptions, which each call checks, these
    are made:

    - packed sequences have distinct paths;
    - no row is fully masked, where fully masked rows attend to all keys, are keys, or see keys in this attention (the
      tree does not have such rows);
    - the block tables of flex_attention agree with its ``mask_mod``.
    """
    graph = fold.captured.graph
    known = graph_facts(fold.captured)
    assumes = fold.variant.assumes
    values = (value for node in graph.nodes if node.op != "output" for value in values_of(node))
    fully_masked = {rows for value in values for rows in value.fully_masked}
    shown = sequence_ids = None
    records = grad_modes(graph, known.records_gradients)
    for node in graph.nodes:
        if is_attention(node):
            try:
                if not fold.variant.on_tree:
                    raise NotOnTree("the option fold_attention is off")
                fold.attentions[node] = attention = _tree_attention(node, fully_masked)
                if known.is_differentiable and records[node] and _stops_gradient(node, attention, records):
                    raise NotOnTree("a part of it has no gradient (detach, or torch.no_grad())")
                if any(bias.may_be_large() for bias in attention.biases):
                    raise NotOnTree("its bias may be so large that sums of scores lose their digits")
                large = abs(attention.parts.scale) > MAX_SCALE
                if large and known.is_differentiable and code_for(*attention.operands) == "triton":
                    raise NotOnTree("its scores are scaled by so much that sums of them lose their digits")
                if attention.visible.sequence_ids is not None and not assumes:
                    raise NotOnTree("several sequences may be packed in a row")
                if attention.parts.blocks is not None and not assumes:
                    raise NotOnTree("its block mask may differ from its mask_mod")
                if attention.needs_visible_keys and not assumes:
                    raise NotOnTree("some rows may be fully masked, and attend to all keys or are keys themselves")
                shown = attention.visible.shown if shown is None else shown
                own_ids = attention.visible.sequence_ids
                sequence_ids = own_ids if sequence_ids is None else sequence_ids
                if set(shown) != set(attention.visible.shown) or own_ids not in (None, sequence_ids):
                    raise NotOnTree("another attention hides other keys, and all attentions on the tree share one plan")
            except NotOnTree as error:
                fold.attentions[node] = Declined(str(error))


def parts_of(node: fx.Node) -> Parts:
    """Return the parts of an attention. Raises :class:`NotOnTree` if they are not recognised."""
    is_sdpa = node.target is aten.scaled_dot_product_attention.default
    parts = _sdpa_parts(node) if is_sdpa else facts(node).parts
    assert parts is not None
    if isinstance(parts, Declined):
        raise NotOnTree(parts.reason)
    return parts


def _tree_attention(node: fx.Node, fully_masked: set[FullyMasked]) -> TreeAttention:
    parts = parts_of(node)
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
        bias_terms = {term for bias in biases for term in terms_of(bias.visible)}
        if not all(term in bias_terms and is_known(term) for term in terms_of(attends.visible)):
            raise
    for bias in biases:
        bias.check()
    _check_heads(parts)
    if Rows(node, parts.order).heads()[0] != parts.query.heads()[0]:
        raise NotOnTree("its mask, its bias or its values have more heads than its queries")
    key, values = narrow(parts.key), narrow(parts.value)
    if key.heads()[0] == values.heads()[0]:
        parts = replace(parts, key=key, value=values)
    are_left_out = all(
        hides(attends.visible, rows, attends.key) and _is_fully_masked(attends, rows) for rows in fully_masked
    )
    needs_visible_keys = not are_left_out or (bool(value.fully_masked) and not parts.zero)
    dtypes = {_result(step).dtype for step in attention_steps(node)}
    if len(dtypes) > 1:
        raise NotOnTree("its two products have different dtypes")
    return TreeAttention(parts, visible, biases, needs_visible_keys, *dtypes)


def _stops_gradient(node: fx.Node, attention: TreeAttention, records: Mapping[fx.Node, bool]) -> bool:
    """Whether a gradient stops between the attention's result and its queries, keys, values or sinks."""
    ends = set(attention.inputs)
    queue, inner = [node], {node}
    while queue:
        new = [arg for arg in queue.pop().all_input_nodes if arg not in ends and arg not in inner]
        inner.update(new)
        queue += new
    on_path: set[fx.Node] = set()  # nodes on a path from one of the ends to the result
    for other in node.graph.nodes:
        if other in inner and any(arg in ends or arg in on_path for arg in other.all_input_nodes):
            on_path.add(other)
    return any(other.target is aten.detach.default or not records[other] for other in on_path)


def _result(node: fx.Node) -> torch.Tensor:
    value = val(node)
    result: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return result


def _is_fully_masked(attends: Weights, rows: FullyMasked) -> bool:
    """Whether every row that is fully masked in ``rows`` is fully masked in this attention too."""
    try:
        own = fully_masked_rows(attends.visible, attends.query, attends.key)
    except Mixes:  # not known for flex_attention, where fully masked rows are zero
        return False
    if own is None or (own.source, own.truth) != (rows.source, rows.truth):
        return False
    # A row without a key in a window has none in a smaller window.
    return own.window == rows.window or (own.window is not None and (rows.window is None or own.window < rows.window))


def _sdpa_parts(node: fx.Node) -> Parts:
    """Return the parts of ``scaled_dot_product_attention``."""
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    scale, mask, is_strict = argument(node, "scale"), argument(node, "attn_mask"), True
    masks: tuple[Bias, ...] = ()
    biases: tuple[Bias, ...] = ()
    if mask is not None and val(mask).dtype == torch.bool:
        masks = (Bias(mask, node, hides=False),)
    elif mask is not None:
        fact = value_of(mask).fact
        assert isinstance(fact, Masked)
        is_strict, bias = fact.is_strict, Bias(mask, node)
        masks, biases = ((bias,), ()) if fact.zero else ((), (bias,))
    _, size = Rows(query).heads()
    scale = 1 / math.sqrt(size) if scale is None else float(scale)
    grouped = bool(argument(node, "enable_gqa"))
    return Parts(
        Rows(query), Rows(key), Rows(value), scale, grouped=grouped, zero=is_strict, masks=masks, biases=biases
    )


def _check_heads(parts: Parts) -> None:
    """Raise :class:`NotOnTree` unless the heads of queries, keys, values and sinks fit together."""
    heads, size = parts.query.heads()
    (groups, key_size), (value_groups, _) = parts.key.heads(), parts.value.heads()
    match = all(are_side_by_side(parts.query, rows, parts.grouped) for rows in (parts.key, parts.value))
    if groups != value_groups or heads % groups or size != key_size or not match:
        raise NotOnTree(f"its heads do not match: {heads} of queries, {groups} of keys, {value_groups} of values")
    if parts.sinks is not None and val(parts.sinks).numel() != heads:
        raise NotOnTree("its sinks are not one number for each head")
