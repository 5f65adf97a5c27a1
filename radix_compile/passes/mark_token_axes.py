"""Annotate every node with its token axes, and with whether its value is prefix-determined."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.flops import flops
from radix_compile.analysis.given_masks import given_mask_value, given_masks
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.reach.column_reach import Reaches, steps_to
from radix_compile.analysis.rules.flex import FLEX, arguments_of
from radix_compile.analysis.rules.masks import zeroed_rows
from radix_compile.analysis.tokens import Tokens
from radix_compile.ir.axes import (
    BATCH,
    SEQ,
    Atom,
    Axis,
    Feature,
    Layout,
    Mixes,
    Sorted,
    Uniform,
    as_size,
    count_tokens,
    plain_axes,
    shape_of,
)
from radix_compile.ir.errors import CannotFold, RefusalCode
from radix_compile.ir.facts import Filled, PerRow, without_dims_of_size_one
from radix_compile.ir.graph import facts, graph_facts, set_graph_facts
from radix_compile.ir.value import Marks, Value, mark, marks_of, refuse, values_of
from radix_compile.torch_internals import FakeTensor, hints_of, same_size, val

aten = torch.ops.aten


def mark_token_axes(gm: fx.GraphModule) -> None:
    """Set the :class:`Value` of every node, and the :class:`Tokens` of the graph."""
    ids = _token_ids(gm.graph) or _embedded_input(gm.graph)
    batch, seq = shape_of(ids)[:2]
    may_be_packed = bool(gm.graph.find_nodes(op="call_function", target=aten.eq.Tensor))  # compares sequence ids
    if (batch == 1 and not may_be_packed) or seq == 1:
        reason = "there is one sequence only" if batch == 1 else "sequences of one token share nothing"
        raise CannotFold(reason, RefusalCode.NOTHING_TO_SHARE, expected=True)
    if batch == 0 or seq == 0:
        raise CannotFold("the batch is empty", RefusalCode.NOTHING_TO_SHARE, expected=True)
    inputs = gm.graph.find_nodes(op="placeholder")
    keys = [node for node in inputs if _is_key_input(node) and _has_rows_of(node, ids)]
    if not _is_key_input(ids):
        keys = [node for node in inputs if node in keys or (_is_embedded(node) and _has_rows_of(node, ids))]
        if any(facts(node).needs_gradient for node in keys):
            raise CannotFold(
                "the input embeddings have a gradient, and each row needs its own: pass input_ids",
                RefusalCode.EMBEDDINGS_WITH_GRADIENT,
            )
    layout = Layout(*shape_of(ids)[:2])  # read again: comparing sizes above may have unified two symbols
    reaches = Reaches(layout, hints_of(gm.graph))
    tokens = Tokens(layout, keys, reaches, given_masks(gm.graph, ids))
    set_graph_facts(gm, replace(graph_facts(gm), tokens=tokens))
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        marks = _infer(node, tokens)
        mark(node, marks)
        if any(value.mixed is not None for value in values_of(node)):
            _mark_scan(node, tokens)
        elif node.target is FLEX:
            blocks = arguments_of(node).blocks
            tokens.blocks += [blocks] if blocks not in tokens.blocks else []
        for value in values_of(node):
            if value.mixed is not None:
                tokens.refusals.setdefault(value.mixed, node)


def _mark_scan(node: fx.Node, tokens: Tokens) -> None:
    """Mark a refused node as causal, if ``column_reach`` proves that no entry reads a later column than its own."""
    axes = tokens.reaches.causal_axes(node) if is_tensor(node) else None
    refusal = values_of(node)[0].mixed
    if axes is not None and refusal is not None:
        tokens.steps.update(steps_to(node))
        tokens.scans[node] = refusal
        mark(node, Value(axes, full_only=True))


def _is_key_input(node: fx.Node) -> bool:
    """Whether a node is a tensor of integers ``[batch, sequence]``: token ids, positions, masks."""
    if not is_tensor(node) or facts(node).is_static:
        return False
    value = val(node)
    return value.ndim == 2 and not value.dtype.is_floating_point and not value.dtype.is_complex


def _is_embedded(node: fx.Node) -> bool:
    """Whether a node is an input ``[batch, sequence, features]``, such as embeddings that are computed elsewhere."""
    return is_tensor(node) and val(node).ndim == 3 and not facts(node).is_static


def _has_rows_of(node: fx.Node, ids: fx.Node) -> bool:
    """Whether the first two sizes are those of ``ids``."""
    sizes = zip(val(node).shape[:2], val(ids).shape[:2], strict=True)
    return all(same_size(size, expected) for size, expected in sizes)


def _token_ids(graph: fx.Graph) -> fx.Node | None:
    """Return the ``[batch, sequence]`` integer input that is looked up in an embedding table; None if none is."""
    shapes = []
    for lookup in graph.find_nodes(op="call_function", target=aten.embedding.default):
        node = lookup.args[1]
        while isinstance(node, fx.Node) and info_of(node.target).is_view:
            node = node.args[0]
        if isinstance(node, fx.Node) and node.op == "placeholder" and not facts(node).is_static:
            if _is_key_input(node):
                return node
            shapes.append(tuple(val(node).shape))
    if shapes:
        raise CannotFold(
            f"token ids have the shape {list(shapes[0])}; expected [batch, sequence]", RefusalCode.NO_TOKEN_IDS
        )
    return None


def _embedded_input(graph: fx.Graph) -> fx.Node:
    """Return the first floating-point input ``[batch, sequence, features]``, which is taken for embeddings.

    This is safe: rows are compared by their contents, and if the input has no rows of tokens, no op can be proved
    position-wise.
    """
    if not any(flops(node) for node in graph.nodes):
        raise CannotFold("there is no token-wise arithmetic in it", RefusalCode.NO_ARITHMETIC, expected=True)
    node: fx.Node
    for node in graph.find_nodes(op="placeholder"):
        if _is_embedded(node) and val(node).dtype.is_floating_point:
            return node
    raise CannotFold(
        "the graph takes no token ids (no embedding is looked up by an integer input), and no embeddings",
        RefusalCode.NO_TOKEN_IDS,
    )


def _infer(node: fx.Node, tokens: Tokens) -> Marks:
    if node.op == "placeholder":
        if node in tokens.masks:
            return given_mask_value(node)
        if node not in tokens.keys:
            return _with_row(node, Value(plain_axes(node) if is_tensor(node) else ()))
        return _with_row(node, Value((*tokens.layout.rows, *plain_axes(node)[2:])))
    if node.op == "get_attr":
        return Value(plain_axes(node) if is_tensor(node) else (), fact=_literal(node))
    if node.target is operator.getitem:
        source = marks_of(node.args[0])  # type: ignore[arg-type]
        return source[node.args[1]] if isinstance(source, tuple) else source  # type: ignore[index]
    try:
        marks = _apply_rule(node, tokens)
        if isinstance(marks, Value) and marks.mixed is not None:
            return marks
        results = val(node)
        if isinstance(results, tuple | list) and not (isinstance(marks, tuple) and len(marks) == len(results)):
            raise Mixes("its rule does not return a value for each of its results", RefusalCode.CUSTOM_RULE)
        if isinstance(marks, tuple):
            return tuple(_check_axes(value, tokens.layout) for value in marks)
        return _check_axes(marks, tokens.layout)
    except Mixes as error:
        return Value((), mixed=refuse(node, str(error), error.code))


def _literal(node: fx.Node) -> Filled | None:
    """A number that the program wrote as a tensor (``torch.tensor(0.0)``) is part of the program."""
    owner = node.graph.owning_module
    tensor = getattr(owner, str(node.target), None)
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.numel() != 1:
        return None
    return Filled(float(tensor.item())) if not tensor.is_complex() else None


def _apply_rule(node: fx.Node, tokens: Tokens) -> Marks:
    inputs = [value for arg in node.all_input_nodes for value in values_of(arg)]
    mixed = next((value.mixed for value in inputs if value.mixed is not None), None)
    info = info_of(node.target)
    if mixed is not None and not info.takes_mixed:
        return Value((), mixed=mixed)
    if any(value.arrangement for value in inputs) and not info.takes_arrangements:
        raise Mixes("computes with the order of the rows, which depends on all rows", RefusalCode.ORDER_OF_ROWS)
    if info.rule is None:
        if all(value.is_constant for value in inputs) and not _is_random(node):
            return _constant(node)
        raise Mixes("no rule for this op, so it may mix rows", RefusalCode.NO_RULE)
    fully_masked = frozenset().union(*(value.fully_masked for value in inputs)) - zeroed_rows(node)
    marks = info.rule(node, tokens.layout)
    if isinstance(marks, tuple):
        return tuple(replace(value, fully_masked=value.fully_masked | fully_masked) for value in marks)
    return _with_row(
        node, replace(marks, fully_masked=marks.fully_masked | fully_masked) if marks.mixed is None else marks
    )


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _constant(node: fx.Node) -> Marks:
    """Return the value of an op without a rule whose inputs are all constant."""
    outputs = val(node)
    if isinstance(outputs, tuple | list):
        sizes = [[as_size(size) for size in output.shape] for output in outputs]
        return tuple(Value(tuple(() if size == 1 else (Feature(size),) for size in shape)) for shape in sizes)
    return Value(plain_axes(node) if is_tensor(node) else ())


def _with_row(node: fx.Node, value: Value) -> Value:
    """Return the value with the fact ``PerRow``, if it has one integer for each row and no other fact."""
    if value.fact is not None or value.mixed is not None or not is_tensor(node):
        return value
    tensor = val(node)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.ndim == 0:
        return value
    if value.is_row:
        dims = [dim for dim, axis in enumerate(value.axes) if axis]
        if tuple(value.axes[dim] for dim in dims) in (((BATCH,), (SEQ,)), ((SEQ,),)):
            return value.with_fact(PerRow(node, dims[-1] - tensor.ndim))
    elif value.is_constant and tensor.ndim == 2 and value.axes[1] and _is_uniform(value.axes[0]):
        return value.with_fact(PerRow(node, -1))
    return value


def _is_uniform(axis: Axis) -> bool:
    return all(isinstance(atom, Uniform) for atom in axis)


def _check_axes(value: Value, layout: Layout) -> Value:
    """Return the value, without facts along dimensions of size one.

    Raises ``Mixes`` unless its token axes are one batch axis and one sequence axis, or two sequence axes for pairs, or
    one sorted axis.
    """
    if value.mixed is not None:
        return value
    value = value.with_fact(without_dims_of_size_one(value.fact, value.axes))
    if value.is_constant or value.arrangement:
        return value
    atoms: list[Atom] = [atom for axis in value.axes for atom in axis]
    arranged = [atom for atom in atoms if isinstance(atom, Sorted)]
    if len(arranged) == 1 and not (BATCH in atoms or SEQ in atoms):
        return value
    num_batch_axes = 1 if BATCH in layout.row else 0
    if arranged or count_tokens(value.axes) not in ((num_batch_axes, 1), (num_batch_axes, 2)):
        raise Mixes("combines different sequences", RefusalCode.MIXES_SEQUENCES)
    return value
