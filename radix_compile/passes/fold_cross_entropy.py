"""Compute losses over the vocabulary from compact logits, so that full logits are not materialised for the loss."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import fx

from radix_compile.analysis.arguments import argument, source_of
from radix_compile.ir.axes import BATCH, SEQ, as_size
from radix_compile.ir.calls import arguments_of, call
from radix_compile.ir.grad_modes import grad_modes
from radix_compile.ir.graph import facts, graph_facts, tokens_of
from radix_compile.ir.plan_arrays import BY_NAME
from radix_compile.ir.source import trace_back
from radix_compile.ir.value import mark, marks_of, value_of
from radix_compile.kernels import token_nll  # noqa: F401 - importing it registers the op
from radix_compile.passes.fold import Fold
from radix_compile.torch_internals import val

aten = torch.ops.aten
radix = torch.ops.radix

GradModes: TypeAlias = Mapping[fx.Node, bool]

ROW_MAJOR = (aten.reshape.default, aten.view.default, aten.alias.default, aten.clone.default)
"""Ops that keep the row-major order of the entries."""


def fold_cross_entropy(fold: Fold) -> None:
    """Replace cross-entropy, and gathers of log-probabilities, by ``radix.token_nll`` on nodes.

    The log-sum-exp over the vocabulary and its gradient are then computed once per node. Needs ``fold_graph``, since
    the losses are found by the scatter of their logits.
    """
    has_replaced = False
    gm = fold.program
    records = grad_modes(gm.graph, graph_facts(gm).records_gradients)
    for node in list(gm.graph.nodes):
        predecessor, successor = node.prev, node.next
        if _replace(gm, node, records):
            origin = facts(node).origin
            assert origin is not None
            trace_back(origin, "fold_cross_entropy", predecessor.next, successor)
            has_replaced = True
    if has_replaced:
        gm.graph.eliminate_dead_code()
        fold.notes.append("the loss reads compact logits: its softmax runs once per node")


def _replace(gm: fx.GraphModule, node: fx.Node, records: GradModes) -> bool:
    if node.target is aten.cross_entropy_loss.default:
        return _replace_cross_entropy(node, records)
    return node.target is aten.gather.default and _replace_log_probability(gm, node, records)


def _replace_cross_entropy(node: fx.Node, records: GradModes) -> bool:
    logits, target = node.args[:2]
    assert isinstance(logits, fx.Node)
    assert isinstance(target, fx.Node)
    scattered = _scattered(logits)
    labels = val(target)
    are_indices = labels is not None and not labels.dtype.is_floating_point and labels.ndim == 1
    has_options = argument(node, "weight") is not None or argument(node, "label_smoothing")
    if scattered is None or not are_indices or has_options:
        return False
    compact = _before_cast(source_of(scattered))
    if not _keeps_gradient(node, compact, records):
        return False
    call, dtype = node.graph.call_function, val(node).dtype
    with node.graph.inserting_before(node):
        ignored = call(aten.eq.Scalar, (target, argument(node, "ignore_index")))
        nll = _token_nll(compact, call(aten.masked_fill.Scalar, (target, ignored, 0)), scattered)
        loss = call(aten.masked_fill.Scalar, (nll, ignored, 0))
        reduction = argument(node, "reduction")
        if reduction:
            loss = call(aten.sum.default, (loss,))
        if reduction == 1:  # the mean over targets that are not ignored
            loss = call(aten.div.Tensor, (loss, call(aten.sum.default, (call(aten.logical_not.default, (ignored,)),))))
        _replace_node(node, _cast(loss, dtype))
    return True


def _replace_log_probability(gm: fx.GraphModule, node: fx.Node, records: GradModes) -> bool:
    """Replace ``gather(log_softmax(logits), -1, target)`` with one target per row. Return whether ``node`` is that."""
    source, dim, index = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(index, fx.Node)
    scattered = _scattered(source)
    if scattered is None:
        return False
    softmax = _skip_views(source_of(scattered))
    if softmax.target is not aten.log_softmax.int or not _has_rows_in_order(softmax):
        return False
    axes, layout = value_of(source).axes, tokens_of(gm).layout
    *row_sizes, num_targets = map(as_size, val(index).shape)
    has_one_target = num_targets == 1 and row_sizes == [layout.axis_size(axis) for axis in axes[:-1]]
    *_, vocabulary = value_of(softmax).axes
    is_over_vocabulary = argument(softmax, "dim") in (-1, len(value_of(softmax).axes) - 1) and vocabulary == axes[-1]
    if dim not in (-1, len(axes) - 1) or not has_one_target or not is_over_vocabulary:
        return False
    compact = _before_cast(source_of(softmax))
    if not _keeps_gradient(node, compact, records):
        return False
    call, dtype = node.graph.call_function, val(node).dtype
    softmax_dtype = argument(softmax, "dtype")
    with node.graph.inserting_before(node):
        if softmax_dtype not in (None, torch.float32):
            compact = _cast(compact, softmax_dtype)
        nll = _token_nll(compact, call(aten.reshape.default, (index, [-1])), scattered)
        _replace_node(node, _cast(call(aten.neg.default, (call(aten.view_as.default, (nll, index)),)), dtype))
    return True


def _keeps_gradient(node: fx.Node, logits: fx.Node, records: GradModes) -> bool:
    """Whether the logits have the same gradient after the replacement, which skips the nodes in between."""
    between = []
    source = source_of(node)
    while source is not logits:
        between.append(source)
        source = source_of(source)
    return not records[node] or all(records[source] for source in between)


def _scattered(node: fx.Node) -> fx.Node | None:
    """Return the scatter that ``node``, ``[B, S, V]`` or ``[B * S, V]``, is a view of; None if there is none."""
    if facts(node).marks is None or not _has_rows_in_order(node):
        return None
    node = _skip_views(node)
    if node.target is not radix.scatter_rows.default:
        return None
    arguments = arguments_of(node)
    return node if (arguments["batch_dim"], arguments["seq_dim"]) == (0, 1) else None


def _has_rows_in_order(node: fx.Node) -> bool:
    """Whether the dimensions are tokens, sequence by sequence, and a last one of features."""
    atoms = tuple(atom for axis in value_of(node).axes[:-1] for atom in axis)
    return atoms in ((BATCH, SEQ), (SEQ,))


def _skip_views(node: fx.Node) -> fx.Node:
    while node.target in ROW_MAJOR or _is_to_float32(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _token_nll(logits: fx.Node, target: fx.Node, scattered: fx.Node) -> fx.Node:
    """Return the losses ``[B * S]`` for a target ``[B * S]``, with the plan arrays that ``scattered`` reads."""
    graph = scattered.graph
    is_merged = facts(logits).marks is not None and len(value_of(logits).axes) == 2
    if not is_merged:  # [1, T', V]
        logits = graph.call_function(aten.squeeze.dim, (logits, 0))
    plan = {name: value for name, value in arguments_of(scattered).items() if name in BY_NAME}
    results = call(graph, radix.token_nll.default, logits=logits, target=target, **plan)
    return graph.call_function(operator.getitem, (results, 0))


def _before_cast(logits: fx.Node) -> fx.Node:
    """Return the logits before a cast to float32, if there is one."""
    return source_of(logits) if _is_to_float32(logits) else logits


def _is_to_float32(node: fx.Node) -> bool:
    """Whether a node casts to float32, which ``token_nll`` does itself."""
    return node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": torch.float32}


def _replace_node(node: fx.Node, result: fx.Node) -> None:
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    if facts(node).marks is not None:
        mark(cast, marks_of(node))  # a cast does not change the axes
    return cast
