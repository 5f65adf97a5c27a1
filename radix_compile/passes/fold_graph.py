"""Rewrite the graph in two forms: what is position-wise runs on nodes of the prefix tree, the rest on rows.

    compact(n) = op(compact(inputs))  if n runs compact   else fold(full(n))
    full(n)    = op(full(inputs))     if n runs full      else scatter(compact(n))

Each is made only where it is wanted, starting from the outputs, which are wanted in full form.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.attention.bias import Bias
from radix_compile.analysis.attention.masks import Visible
from radix_compile.analysis.attention.parts import TreeAttention
from radix_compile.analysis.attention.rows import Rows
from radix_compile.analysis.memory import numbers, order_in_memory, reads_layout, views_to_keep
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.rules.flex import Blocks
from radix_compile.ir.axes import BATCH, SEQ, Arrangement, Axes, Axis, Sorted, Token
from radix_compile.ir.calls import call
from radix_compile.ir.grad_modes import grad_modes, with_gradient
from radix_compile.ir.graph import Form, facts, graph_facts, set_facts, set_graph_facts, tokens_of
from radix_compile.ir.plan_arrays import Code, Group, plan_arrays
from radix_compile.ir.source import trace_back, upstream
from radix_compile.ir.value import is_row, value_of, values_of
from radix_compile.kernels import index_ops
from radix_compile.kernels.tree_arguments import TreeArrays
from radix_compile.kernels.tree_attention import code_for
from radix_compile.passes.choose_cuts import has_compact_form
from radix_compile.passes.fold import Fold, Wanted
from radix_compile.torch_internals import forget_value, hints_of, keep_recompute_tag, val

aten = torch.ops.aten
radix = torch.ops.radix


def fold_graph(fold: Fold) -> None:
    """Make the folded program: the same inputs, then the plan's index arrays (``ir.plan_arrays``).

    Needs ``choose_forms`` and ``choose_head``.

    The fact ``form`` of a node says in which form it has the value of the captured node ``origin``.
    """
    fold.program = _Rewriter(fold).run()
    fold.program.meta.update(fold.captured.meta)
    set_graph_facts(fold.program, replace(graph_facts(fold.captured), source=fold.captured))


def compact_part(fold: Fold, rows: Rows, nodes: Collection[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Make a program that computes rows, ``[1, heads, T', features]``, in compact form by these nodes alone.

    Returned with it are the values of rows that the nodes are computed from. The program takes the inputs of the
    captured graph, the arrays of the plan that have the group "columns", and the compact forms of these values.
    """
    sources = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if is_row(arg) and arg not in nodes)
    if rows.node not in nodes:
        sources[rows.node] = None
    constants = [arg for node in nodes for arg in node.all_input_nodes if not has_compact_form(arg)]
    wanted = Wanted({node: {Form.FULL} for node in upstream(*constants)}, {})
    wanted.forms |= {node: {Form.COMPACT} for node in nodes}
    wanted.runs = {node: forms for node, forms in wanted.forms.items() if node.op != "placeholder"}
    part = replace(fold, wanted=wanted, attentions={}, head=frozenset(), read_rows=None)
    return _Rewriter(part).run_part(list(sources), rows), list(sources)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The arguments by which ops move entries between rows and nodes, or the nodes of the head; and how many these are.

    ``form`` is that of values that have an entry for each.
    """

    form: Form
    fold_and_scatter: dict[str, fx.Node | None]
    scatter_and_lists: dict[str, fx.Node | None]
    nodes: fx.Node


class _Rewriter:
    def __init__(self, fold: Fold) -> None:
        self.decided = fold
        self.gm = gm = fold.captured
        self.known = graph_facts(gm)
        self.tokens = tokens_of(gm)
        self.layout = self.tokens.layout
        self.wanted = fold.wanted
        self.graph = fx.Graph()
        self.full: dict[fx.Node, fx.Node] = {}
        self.compact: dict[fx.Node, fx.Node] = {}
        self.records = grad_modes(gm.graph, self.known.records_gradients)
        self.graded = with_gradient(gm.graph, self.records)
        self.records_here = True
        """Are gradients recorded where the node stands that is being rewritten? What is made where they are not has
        none, and so cannot stand for the same where they are."""
        self.hints = hints_of(gm.graph)
        self.moved: set[fx.Node] = set()
        """Captured nodes whose full form does not lie in memory as they do, or may not."""
        self.placed: dict[tuple[fx.Node, bool], fx.Node] = {}
        self.bases = {base for _, base in views_to_keep(gm.graph, self.hints)}
        self.columns: dict[tuple[Any, ...], fx.Node] = {}
        self.biases: dict[tuple[Any, ...], fx.Node | None] = {}
        self.picked: dict[tuple[fx.Node, bool], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            self.full[node] = self.graph.node_copy(node)
        self._add_plan_inputs(groups_of_plan(self.decided))
        for node in self.gm.graph.nodes:
            if node.op == "output":
                self.graph.node_copy(node, self._in_place)
            else:
                self._rewrite(node)
        return fx.GraphModule(self.gm, self.graph)

    def run_part(self, sources: list[fx.Node], rows: Rows) -> fx.GraphModule:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            self.full[node] = self.graph.node_copy(node)
        self._add_plan_inputs({"columns"})
        with self.graph.inserting_before(self.here.nodes):
            self.compact |= {node: self.graph.placeholder(f"rows_{i}") for i, node in enumerate(sources)}
        for node in self.gm.graph.nodes:
            if node in self.wanted.runs:
                self._make_forms(node)
        self.graph.output([self._by_head(rows, val(rows.node).dtype)])
        return fx.GraphModule(self.gm, self.graph)

    def _add_plan_inputs(self, groups: Collection[Group]) -> None:
        arrays = plan_arrays(groups)
        plan: dict[str, fx.Node | None] = {one.name: self.graph.placeholder(one.placeholder) for one in arrays}
        self.plan = plan
        self.of_nodes = self._rows("", Form.COMPACT)
        self.of_head = self._rows("head_", Form.HEAD) if self.decided.head else self.of_nodes
        self.here = self.of_nodes
        ids = self.full[self.tokens.keys[0]]
        self.batch = self._size(self.layout.batch, ids, 0)
        self.seq = self._size(self.layout.seq, ids, 1)

    def _rows(self, prefix: str, form: Form) -> _Rows:
        own = {name: self.plan[prefix + name] for name in ("fold", "scatter")}
        lists: dict[str, fx.Node | None] = dict.fromkeys(index_ops.LISTS)
        if "rows" in self.plan:
            lists = {name: self.plan[prefix + name] for name in index_ops.LISTS}
        nodes = self.graph.call_function(aten.sym_size.int, (own["fold"], 0))
        return _Rows(form, own, {"scatter": own["scatter"], **lists}, nodes)

    def _size(self, size: sympy.Expr, ids: fx.Node, dim: int) -> int | fx.Node:
        return int(size) if isinstance(size, sympy.Integer) else self.graph.call_function(aten.sym_size.int, (ids, dim))

    def _rewrite(self, node: fx.Node) -> None:
        last = next(iter(reversed(self.graph.nodes)))
        self.records_here = self.records[node]
        self.here = self.of_head if node in self.decided.head else self.of_nodes
        self._make_forms(node)
        trace_back(node, "fold_graph", first=last.next)

    def _make_forms(self, node: fx.Node) -> None:
        forms, runs = self.wanted.forms.get(node, set()), self.wanted.runs.get(node, set())
        if Form.FULL in runs:
            read = self._in_place if reads_layout(node) else self.full.__getitem__
            self.full[node] = _relaxed(self.graph.node_copy(node, read))
            self._state(self.full[node], node, Form.FULL)
            if read != self._in_place and not self.moved.isdisjoint(node.all_input_nodes):
                self.moved.add(node)
        if Form.COMPACT in runs:
            self.compact[node] = self._run_compact(node)
        if Form.COMPACT in forms and node not in self.compact:
            self.compact[node] = self._fold(node)
        if Form.FULL in forms and node not in self.full:
            self.full[node] = self._scatter(node)
            if not self._lies_as_captured(node):
                self.moved.add(node)
        if node in self.bases and node in self.moved:
            self.full[node] = self._with_own_memory(self._in_place(node), node)
            self.moved.discard(node)

    # ------------------------------------------------------------------------------------------- compact ops

    def _run_compact(self, node: fx.Node) -> fx.Node:
        """The same op on compact inputs, with its shape argument derived again and constants gathered by column."""
        attention = self.decided.tree_attention(node)
        if attention is not None:
            return self._attend(node, attention)
        if node.target is operator.getitem and self.decided.tree_attention(source := node.all_input_nodes[0]):
            return self.compact[source]  # flex_attention's first result, the only one that is read
        value = values_of(node)[0]
        if value.identity is not None:
            source = self._compact(value.identity)
            if self.records_here:
                return source
            return self._tagged(self.graph.call_function(aten.detach.default, (source,)), node, self.here.form)
        by_layout = reads_layout(node)
        is_rotary = self.decided.rotary is not None and node in self.decided.rotary.nodes
        uses: dict[fx.Node, list[tuple[int, str]]] = {}
        for operand, dim, how in value.operands:
            uses.setdefault(operand, []).append((dim, how))

        def compact_input(arg: fx.Node) -> fx.Node:
            if any(how == "count" for _, how in uses.get(arg, ())):
                return self._count(arg, value.arrangement)
            if not has_compact_form(arg):
                return self._constant(arg, uses.get(arg, []), is_rotary)
            compact = self._compact(arg)
            return self._laid_out(compact, arg) if by_layout and is_row(arg) else compact

        copy = self.graph.node_copy(node, compact_input)
        name = info_of(node.target).shape_argument
        if name is not None:
            copy.args = (copy.args[0], self._compact_shape(value_of(node).axes, before=copy))
            copy.kwargs = {key: value for key, value in copy.kwargs.items() if key != name}
        return self._tagged(_relaxed(copy), node, self.here.form)

    def _compact(self, node: fx.Node) -> fx.Node:
        """The compact form of an input of an op that runs here: the head takes its nodes' entries of other values."""
        if self.here is self.of_nodes or node in self.decided.head:
            return self.compact[node]
        key = (node, self.records_here)
        if key not in self.picked:
            axes = value_of(node).axes
            split = split_tokens(axes)
            self.here = self.of_nodes
            source = self._reshaped(self.compact[node], axes, split, compact=True)
            self.here = self.of_head
            plan = {"fold": self.plan["head_nodes"], "scatter": self.plan["head_places"]}
            dims = {"batch_dim": split.index((BATCH,)), "seq_dim": split.index((SEQ,))}
            made = call(self.graph, radix.fold_rows.default, full=source, **plan, **dims)
            self.picked[key] = self._tagged(self._reshaped(made, split, axes, compact=True), node, Form.HEAD)
        return self.picked[key]

    def _attend(self, node: fx.Node, attention: TreeAttention) -> fx.Node:
        """Attention on the tree."""
        parts, visible = attention.parts, attention.visible
        rows = {name: self._by_head(getattr(parts, name), attention.dtype) for name in ("query", "key", "value")}
        sinks = None if parts.sinks is None else self.full[parts.sinks]
        bias = self._bias(attention.biases)
        if bias is not None and self.known.is_differentiable:  # it has no gradient, and the op has none for it
            bias = self.graph.call_function(aten.detach.default, (bias,))
        options = {"scale": parts.scale, "window": visible.window, "softcap": parts.softcap}
        tree = self._tree(code_for(*attention.operands))
        made = call(self.graph, radix.tree_attention.default, **rows, **tree, sinks=sinks, bias=bias, **options)
        keep_recompute_tag(made, node)
        result = self.graph.call_function(operator.getitem, (made, 0))
        own = Rows(node, parts.order)
        if not own.is_by_head:
            result = self.graph.call_function(aten.reshape.default, (result, self._compact_shape(own.axes)))
        if parts.order:
            back = [parts.order.index(dim) for dim in range(len(parts.order))]
            result = self.graph.call_function(aten.permute.default, (result, back))
        return self._tagged(result, node, Form.COMPACT)

    def _tree(self, code: Code) -> dict[str, fx.Node | None]:
        """The plan of an attention on the tree that this code runs."""
        arrays = plan_arrays({"tree", code})
        return dict.fromkeys(TreeArrays._fields) | {array.name: self.plan[array.name] for array in arrays}

    def _bias(self, biases: tuple[Bias, ...]) -> fx.Node | None:
        """The sum of the biases, ``[B or 1, H or 1, S or 1, S]``; bool if they only show keys."""
        if not biases:
            return None
        said = tuple((bias.node, bias.factor, bias.hides, bias.shape(), bias.dtype) for bias in biases)
        key = (said, self.records_here)
        if key not in self.biases:
            found = [self._one_bias(bias) for bias in biases]
            numbers = [one for bias, one in zip(biases, found, strict=True) if bias.hides is None]
            seen = [one for bias, one in zip(biases, found, strict=True) if bias.hides is not None]
            made = self._joined(aten.add.Tensor, numbers)
            if seen:
                visible = self._joined(aten.logical_and.default, seen)
                hidden = (visible, made, -math.inf)
                made = visible if made is None else self.graph.call_function(aten.where.ScalarOther, hidden)
            self.biases[key] = made
        return self.biases[key]

    def _joined(self, op: Any, nodes: list[fx.Node]) -> fx.Node | None:
        return functools.reduce(lambda a, b: self.graph.call_function(op, (a, b)), nodes) if nodes else None

    def _one_bias(self, bias: Bias) -> fx.Node:
        found = self.full[bias.node]
        if bias.hides:
            found = self.graph.call_function(aten.logical_not.default, (found,))
        if bias.hides is None and val(bias.node).dtype != bias.dtype:
            found = self.graph.call_function(aten._to_copy.default, (found,), {"dtype": bias.dtype})
        if bias.factor != 1:
            found = self.graph.call_function(aten.mul.Tensor, (found, bias.factor))
        batched, heads, by_query = bias.shape()
        shape = [self.batch if batched else 1, heads, self.seq if by_query else 1, self.seq]
        return self.graph.call_function(aten.reshape.default, (found, shape))

    def _by_head(self, rows: Rows, dtype: torch.dtype) -> fx.Node:
        """``[1, heads, T', features]``, cast where autocast would: it does not know the op."""
        compact = self.compact[rows.node]
        if val(rows.node).dtype != dtype:
            compact = self.graph.call_function(aten._to_copy.default, (compact,), {"dtype": dtype})
        if rows.is_by_head:
            return compact
        present = [dim for dim in rows.order if dim is not None]
        if present != sorted(present):
            compact = self.graph.call_function(aten.permute.default, (compact, present))
        heads, size = rows.heads()
        return self.graph.call_function(aten.reshape.default, (compact, [1, heads, self.here.nodes, size]))

    def _constant(self, node: fx.Node, uses: list[tuple[int, str]], is_rotary: bool = False) -> fx.Node:
        """A constant of the call where it meets compact rows: by column, or one entry where all are equal."""
        plan = self.here.fold_and_scatter | ({"fold": self.plan["columns"]} if is_rotary else {})
        result = self.full[node]
        for dim, how in uses:
            key = (result, dim, how, self.records_here, plan["fold"])
            if key not in self.columns:
                if how == "column":
                    made = call(
                        self.graph,
                        radix.gather_columns.default,
                        table=result,
                        **plan,
                        batch=self.batch,
                        seq=self.seq,
                        dim=dim,
                    )
                else:
                    made = self.graph.call_function(aten.slice.Tensor, (result, dim, 0, 1))
                self.columns[key] = made
            result = self.columns[key]
        return result

    def _count(self, counter: fx.Node, arrangement: Arrangement | None) -> fx.Node:
        """The numbers 0, 1, 2, ... for what there are fewer of in compact form."""
        assert arrangement is not None
        tensor = val(counter)
        options = {"dtype": tensor.dtype, "device": tensor.device}
        return self.graph.call_function(aten.arange.default, (self._compact_size(arrangement.by.axis),), options)

    def _compact_shape(self, axes: Axes, before: fx.Node | None = None) -> list[int | fx.Node]:
        if before is None:
            return [self._compact_size(axis) for axis in axes]
        with self.graph.inserting_before(before):
            return [self._compact_size(axis) for axis in axes]

    def _compact_size(self, axis: Axis) -> int | fx.Node:
        atoms = [inner for atom in axis for inner in (atom.axis if isinstance(atom, Sorted) else (atom,))]
        features = int(sympy.prod([atom.size for atom in atoms if not isinstance(atom, Token)]))
        if SEQ not in atoms:
            return features
        nodes = self.here.nodes
        return nodes if features == 1 else self.graph.call_function(operator.mul, (nodes, features))

    # ------------------------------------------------------------------------------------- between the forms

    def _fold(self, node: fx.Node) -> fx.Node:
        axes = value_of(node).axes
        split = split_tokens(axes)
        full = self._reshaped(self.full[node], axes, split, compact=False)
        dims = {"batch_dim": split.index((BATCH,)), "seq_dim": split.index((SEQ,))}
        made = call(self.graph, radix.fold_rows.default, full=full, **self.here.fold_and_scatter, **dims)
        return self._tagged(self._reshaped(made, split, axes, compact=True), node, self.here.form)

    def _scatter(self, node: fx.Node) -> fx.Node:
        axes = value_of(node).axes
        split = split_tokens(axes)
        compact = self._reshaped(self.compact[node], axes, split, compact=True)
        made = call(
            self.graph,
            radix.scatter_rows.default,
            compact=compact,
            **self.here.scatter_and_lists,
            batch=self.batch,
            seq=self.seq,
            batch_dim=split.index((BATCH,)),
            seq_dim=split.index((SEQ,)),
            holes=self.decided.read_rows is not None,
        )
        set_facts(made, replace(facts(made), has_gradient=node in self.graded))
        return self._tagged(self._reshaped(made, split, axes, compact=False), node, Form.FULL)

    def _lies_as_captured(self, node: fx.Node) -> bool:
        """Does a scattered value, ``[B, S, features]`` in memory, lie there as the captured one?"""
        axes = value_of(node).axes
        split = split_tokens(axes)
        front = [split.index((BATCH,)), split.index((SEQ,))]
        order = [*front, *(dim for dim in range(len(split)) if dim not in front)]
        sizes = [self.layout.axis_size(axis).subs(self.hints) for axis in split]
        shape, strides = (numbers(of, self.hints) for of in (val(node).shape, val(node).stride()))
        if shape is None or strides is None or not all(size.is_Integer for size in sizes):
            return False
        scattered = torch.empty([int(sizes[dim]) for dim in order], device="meta")
        scattered = scattered.permute([order.index(dim) for dim in range(len(order))]).reshape(shape)
        return all(size == 1 or a == b for size, a, b in zip(shape, scattered.stride(), strides, strict=True))

    def _in_place(self, node: fx.Node) -> fx.Node:
        """The full form, in memory as the captured value: for what looks at that, as callers may do at outputs."""
        if node not in self.moved:
            return self.full[node]
        key = (node, self.records_here)
        if key not in self.placed:
            self.placed[key] = self._tagged(self._laid_out(self.full[node], node), node, Form.FULL)
        return self.placed[key]

    def _laid_out(self, made: fx.Node, captured: fx.Node) -> fx.Node:
        """With the dimensions in memory in the order of the captured tensor's. If they are already, it does nothing."""
        if not is_tensor(captured):
            return made
        order = order_in_memory(captured, self.hints)
        back = [order.index(dim) for dim in range(len(order))]
        call = self.graph.call_function
        if order == back == sorted(order):
            return call(aten.contiguous.default, (made,))
        made = call(aten.contiguous.default, (call(aten.permute.default, (made, order)),))
        return call(aten.permute.default, (made, back))

    def _with_own_memory(self, view: fx.Node, node: fx.Node) -> fx.Node:
        """A copy, in the same order: of a view and its ``detach``, AOTAutograd has to return what they are views of."""
        if view.target is not aten.permute.default:  # it is no view
            return view
        return self._tagged(self.graph.call_function(aten.clone.default, (view,)), node, Form.FULL)

    def _reshaped(self, node: fx.Node, before: Axes, after: Axes, compact: bool) -> fx.Node:
        if len(before) == len(after):
            return node
        shape = self._compact_shape(after) if compact else [self._full_size(axis) for axis in after]
        return self.graph.call_function(aten.reshape.default, (node, shape))

    def _full_size(self, axis: Axis) -> int | fx.Node:
        sizes: list[Any] = [int(sympy.prod([atom.size for atom in axis if not isinstance(atom, Token)]))]
        sizes += [self.batch if atom is BATCH else self.seq for atom in axis if isinstance(atom, Token)]
        product: int | fx.Node = 1
        for size in sizes:
            if isinstance(product, int) and isinstance(size, int):
                product *= size
            else:
                product = self.graph.call_function(operator.mul, (product, size))
        return product

    def _tagged(self, made: fx.Node, origin: fx.Node, form: Form) -> fx.Node:
        """State of which captured node ``made`` is a form."""
        keep_recompute_tag(made, origin)
        self._state(made, origin, form)
        forget_value(made)
        return made

    def _state(self, made: fx.Node, origin: fx.Node, form: Form) -> None:
        marks = facts(made).marks or facts(origin).marks
        set_facts(made, replace(facts(made), marks=marks, form=form, origin=origin))


def groups_of_plan(fold: Fold) -> set[Group]:
    """The arrays of a plan that the folded program takes."""
    groups: set[Group] = {code_for(*attention.operands) for attention in fold.attentions_on_tree()}
    if groups:
        groups.add("tree")
    if fold.rotary is not None and any(Form.COMPACT in fold.wanted.runs.get(node, ()) for node in fold.rotary.nodes):
        groups.add("columns")
    if fold.head:
        groups.add("head")
    if graph_facts(fold.captured).is_differentiable:
        groups.add("lists")
        groups |= {"head lists"} if fold.head else set()
    return groups


def shown_keys(fold: Fold) -> tuple[tuple[fx.Node, bool], ...] | None:
    """The rows by which attention on the tree hides keys (see ``Visible``); None if no attention runs there."""
    return next((one.visible.shown for one in fold.attentions_on_tree()), None)


def torch_windows(fold: Fold) -> tuple[int | None, ...]:
    """The windows of the attentions on the tree that run in torch; None stands for an attention without a window."""
    attentions = (one for one in fold.attentions_on_tree() if code_for(*one.operands) == "torch")
    return tuple(dict.fromkeys(attention.visible.window for attention in attentions))


def relies_on_visible_keys(fold: Fold) -> bool:
    """Does attention run on the tree that would be wrong in calls in which rows see no key?"""
    return any(one.needs_visible_keys for one in fold.attentions_on_tree())


def assumed_sequence_ids(fold: Fold) -> fx.Node | None:
    """The numbers of sequences packed in a row that attention on the tree takes for told apart by their paths."""
    return next(
        (one.visible.sequence_ids for one in fold.attentions_on_tree() if one.visible.sequence_ids is not None), None
    )


def with_blocks(fold: Fold) -> list[tuple[Blocks, Visible]]:
    """The tables of blocks of attentions on the tree, and what their masks say."""
    found = ((one.parts.blocks, one.visible) for one in fold.attentions_on_tree())
    return list(dict.fromkeys((blocks, visible) for blocks, visible in found if blocks is not None))


def _relaxed(node: fx.Node) -> fx.Node:
    """A view that was legal for the captured strides need not be for those of a fold or a scatter."""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default
        node.kwargs = {"shape" if key == "size" else key: value for key, value in node.kwargs.items()}
    return node


def split_tokens(axes: Axes) -> Axes:
    """The axes of a row value with the token atoms in dimensions of their own, a batch of one too."""
    result: list[Axis] = []
    for axis in axes:
        if len(axis) > 1 and any(isinstance(atom, Token) for atom in axis):
            result.extend((atom,) for atom in axis)
        else:
            result.append(axis)
    if (BATCH,) in result:
        return tuple(result)
    if () not in result:
        return ((BATCH,), *result)
    result[result.index(())] = (BATCH,)
    return tuple(result)
