"""Let the loss read the logits of the nodes, so that the full logits need not exist for its sake."""

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
"""Ops after which the entries still follow each other as before."""


def fold_cross_entropy(fold: Fold) -> None:
    """Replace cross-entropy, and the look-up of log-probabilities, by ``radix.token_nll`` on nodes.

    The log-sum-exp over the vocabulary is then computed once for each node, and its gradient written once for each
    node. Needs ``fold_graph``: it looks for losses whose logits are scattered only to be read here.
    """
    replaced = 0
    gm = fold.program
    records = grad_modes(gm.graph, graph_facts(gm).records_gradients)
    for node in list(gm.graph.nodes):
        before, behind = node.prev, node.next
        if _replace(gm, node, records):
            origin = facts(node).origin
            assert origin is not None
            trace_back(origin, "fold_cross_entropy", before.next, behind)
            replaced += 1
    if replaced:
        gm.graph.eliminate_dead_code()
        fold.notes.append("the loss reads the logits of the nodes: its softmax runs once for each node")


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
    by_index = labels is not None and not labels.dtype.is_floating_point and labels.ndim == 1
    if scattered is None or not by_index or argument(node, "weight") is not None or argument(node, "label_smoothing"):
        return False
    compact = _wider(source_of(scattered))
    if not _has_its_gradient(node, compact, records):
        return False
    call, dtype = node.graph.call_function, val(node).dtype
    with node.graph.inserting_before(node):
        ignored = call(aten.eq.Scalar, (target, argument(node, "ignore_index")))
        nll = _token_nll(compact, call(aten.masked_fill.Scalar, (target, ignored, 0)), scattered)
        loss = call(aten.masked_fill.Scalar, (nll, ignored, 0))
        reduction = argument(node, "reduction")
        if reduction:
            loss = call(aten.sum.default, (loss,))
        if reduction == 1:  # the mean over what is not ignored
            loss = call(aten.div.Tensor, (loss, call(aten.sum.default, (call(aten.logical_not.default, (ignored,)),))))
        _put(_as(loss, dtype), node)
    return True


def _replace_log_probability(gm: fx.GraphModule, node: fx.Node, records: GradModes) -> bool:
    """``gather(log_softmax(logits), -1, target)``, with one target for each row."""
    source, dim, index = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(index, fx.Node)
    scattered = _scattered(source)
    if scattered is None:
        return False
    softmax = _behind_views(source_of(scattered))
    if softmax.target is not aten.log_softmax.int or not _has_rows_in_order(softmax):
        return False
    axes, layout = value_of(source).axes, tokens_of(gm).layout
    *rows, targets = map(as_size, val(index).shape)
    one_each = targets == 1 and rows == [layout.axis_size(axis) for axis in axes[:-1]]
    *_, vocabulary = value_of(softmax).axes
    over_features = argument(softmax, "dim") in (-1, len(value_of(softmax).axes) - 1) and vocabulary == axes[-1]
    if dim not in (-1, len(axes) - 1) or not one_each or not over_features:
        return False
    compact = _wider(source_of(softmax))
    if not _has_its_gradient(node, compact, records):
        return False
    call, dtype = node.graph.call_function, val(node).dtype
    computed_in = argument(softmax, "dtype")
    with node.graph.inserting_before(node):
        if computed_in not in (None, torch.float32):
            compact = _as(compact, computed_in)
        nll = _token_nll(compact, call(aten.reshape.default, (index, [-1])), scattered)
        _put(_as(call(aten.neg.default, (call(aten.view_as.default, (nll, index)),)), dtype), node)
    return True


def _has_its_gradient(node: fx.Node, logits: fx.Node, records: GradModes) -> bool:
    """Does a gradient of ``node`` reach the logits? One of what replaces it does, as far as gradients are recorded."""
    between = []
    one = source_of(node)
    while one is not logits:
        between.append(one)
        one = source_of(one)
    return not records[node] or all(records[one] for one in between)


def _scattered(node: fx.Node) -> fx.Node | None:
    """The scatter behind ``[B, S, V]`` or ``[B * S, V]``, if the rows come in its order."""
    if facts(node).marks is None or not _has_rows_in_order(node):
        return None
    node = _behind_views(node)
    if node.target is not radix.scatter_rows.default:
        return None
    given = arguments_of(node)
    return node if (given["batch_dim"], given["seq_dim"]) == (0, 1) else None


def _has_rows_in_order(node: fx.Node) -> bool:
    """Are its dimensions the tokens, sequence by sequence, and one of features?"""
    atoms = tuple(atom for axis in value_of(node).axes[:-1] for atom in axis)
    return atoms in ((BATCH, SEQ), (SEQ,))


def _behind_views(node: fx.Node) -> fx.Node:
    while node.target in ROW_MAJOR or _is_to_float32(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _token_nll(logits: fx.Node, target: fx.Node, scattered: fx.Node) -> fx.Node:
    """``[B * S]``, for a target ``[B * S]``, with the plan that ``scattered`` was made with."""
    graph = scattered.graph
    merged = facts(logits).marks is not None and len(value_of(logits).axes) == 2
    if not merged:  # [1, T', V]
        logits = graph.call_function(aten.squeeze.dim, (logits, 0))
    plan = {name: given for name, given in arguments_of(scattered).items() if name in BY_NAME}
    made = call(graph, radix.token_nll.default, logits=logits, target=target, **plan)
    return graph.call_function(operator.getitem, (made, 0))


def _wider(logits: fx.Node) -> fx.Node:
    """The logits before a cast, if the cast makes no difference."""
    return source_of(logits) if _is_to_float32(logits) else logits


def _is_to_float32(node: fx.Node) -> bool:
    """A cast that makes no difference to ``token_nll``, which computes in float32 at least."""
    return node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": torch.float32}


def _put(result: fx.Node, node: fx.Node) -> None:
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _as(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    if facts(node).marks is not None:  # the same rows
        mark(cast, marks_of(node))
    return cast
