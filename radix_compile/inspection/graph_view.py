"""A graph as plain data, node by node. It holds no reference to the model."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.analysis.op_info import info_of
from radix_compile.ir.errors import Declined
from radix_compile.ir.graph import facts, graph_facts
from radix_compile.ir.source import origin_name
from radix_compile.ir.value import Value, module_of, source_line, values_of
from radix_compile.passes.fold import Fold
from radix_compile.passes.verify import HEAD, NODES, plan_shapes
from radix_compile.torch_internals import val

BOUNDARY = "boundary"
"""The form of folds, scatters and gathers, which convert between rows and nodes."""
NAMES = {NODES: "T'", HEAD: "H'"}
"""The numbers of nodes of the prefix tree, and of nodes of the head, in printed shapes."""


@dataclass(frozen=True)
class NodeView:
    """One node of a graph, with its fields as text.

    ``op``         ``linear``, ``add.Tensor``, ``placeholder``, ``output``, ...
    ``inputs``     the names of the nodes that it reads.
    ``arguments``  its other arguments; ``%`` stands for an input in a list.
    ``shape``      the shape of its first result, as in ``[1, T', 512]``; ``T'`` is the number of nodes of the prefix
                   tree.
    ``fixed``      bytes of its results whose size does not depend on the number of nodes.
    ``per_node``   bytes per node of its other results (see :meth:`size`).
    ``form``       "full", "compact", "either" or "boundary"; empty before the form is chosen.
    ``value``      whether its value is prefix-determined, in words; empty before the analysis.
    ``rule``       the rule from which ``value`` follows, and its summary.
    ``reason``     why it is not prefix-determined, or why attention does not run on the prefix tree.
    ``origin``     the name of the captured node that it comes from.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    arguments: str = ""
    shape: str = ""
    dtype: str = ""
    fixed: int = 0
    per_node: int = 0
    form: str = ""
    module: str = ""
    source: str = ""
    value: str = ""
    rule: str = ""
    reason: str = ""
    origin: str = ""

    def size(self, nodes: int) -> int:
        """Return the bytes of its results in a call with ``nodes`` nodes."""
        return self.fixed + self.per_node * nodes

    def moved(self, nodes: int) -> int:
        """Return the bytes that a fold, scatter or gather reads and writes; 0 for all other ops."""
        return 2 * self.size(nodes) if self.form == BOUNDARY else 0

    @property
    def is_computed(self) -> bool:
        """Whether it is an op: not an input, a weight or the output."""
        return self.op not in ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class GraphView:
    """A graph after the pass ``after``."""

    after: str
    nodes: tuple[NodeView, ...]

    def find(self, name: str) -> NodeView:
        return next(node for node in self.nodes if node.name == name)


def view_of(gm: fx.GraphModule, after: str, fold: Fold | None = None) -> GraphView:
    """Return a view of the graph with the decisions of ``fold``. Sizes are those of the call that is compiled."""
    results = _results_of(gm)
    return GraphView(after, tuple(_node_view(node, results.get(node), fold) for node in gm.graph.nodes))


def _node_view(node: fx.Node, result: Any, fold: Fold | None) -> NodeView:
    tensors = _tensors(result)
    origin = facts(node).origin or node
    marks = facts(origin).marks
    is_radix_op = getattr(node.target, "namespace", "") == "radix"
    return NodeView(
        name=node.name,
        op=_op(node),
        inputs=tuple(arg.name for arg in node.all_input_nodes),
        arguments=_arguments(node),
        shape=_shape(tensors[0]) if tensors else "",
        dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        fixed=sum(_bytes(tensor) for tensor in tensors if not _counted(tensor)),
        per_node=sum(_bytes(tensor) // nodes for tensor in tensors if (nodes := _counted(tensor))),
        form=BOUNDARY if is_radix_op and not _is_compute(node) else _form(node, fold),
        module=module_of(node),
        source=source_line(node),
        value="" if marks is None or is_radix_op else _in_words(values_of(origin)),
        rule="" if marks is None or is_radix_op else _rule(origin),
        reason="" if marks is None else _reason(origin, fold),
        origin=origin_name(node) or "",
    )


def _results_of(gm: fx.GraphModule) -> Mapping[fx.Node, Any]:
    if graph_facts(gm).source is not None:
        return internals.fake_results(gm, plan_shapes(gm))
    return {node: val(node) for node in gm.graph.nodes}


def _is_compute(node: fx.Node) -> bool:
    return node.target in (torch.ops.radix.tree_attention.default, torch.ops.radix.token_nll.default)


def _op(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op if node.op in ("placeholder", "output", "get_attr") else f"{node.op} {node.target}"
    name = str(getattr(node.target, "__name__", node.target))
    name = name.removesuffix(".default")
    namespace = getattr(node.target, "namespace", "aten")
    return name if namespace in ("aten", "radix") else f"{namespace}::{name}"


def _arguments(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "get_attr":
        return str(node.target)
    arguments = [_text(arg) for arg in node.args if not (arg is None or isinstance(arg, fx.Node))]
    arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items() if not isinstance(value, fx.Node)]
    return ", ".join(arguments)


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return "%"  # one of the inputs
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).removeprefix("torch.")


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [tensor for element in result for tensor in _tensors(element)]
    return []


def _shape(tensor: torch.Tensor) -> str:
    return f"[{', '.join(map(_size, tensor.shape))}]"


def _size(size: int | torch.SymInt) -> str:
    for nodes, name in NAMES.items():
        if size == nodes + 1:
            return f"{name} + 1"
        if isinstance(size, int) and size > 0 and size % nodes == 0:
            return name if size == nodes else f"{size // nodes} {name}"
    return str(size)


def _counted(tensor: torch.Tensor) -> int | None:
    """Return the number of nodes, or of nodes of the head, that a tensor has entries for; None if it has none."""
    sizes = [size for size in tensor.shape if isinstance(size, int) and size > 0]
    return next((nodes for nodes in NAMES if any(size % nodes == 0 for size in sizes)), None)


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(map(internals.size_hint, tensor.shape)) * tensor.element_size()


def _form(node: fx.Node, fold: Fold | None) -> str:
    form = facts(node).form
    if form is None and fold is not None and node.op == "call_function":
        form = fold.homes.get(node)
    return "" if form is None else str(form.value)


def _in_words(values: Iterable[Value]) -> str:
    value = next(iter(values))
    if value.mixed is not None:
        return "mixing: not a function of the row's prefix alone"
    if value.arrangement is not None or value.is_arranged:
        return "rows in an order that depends on all rows"
    if value.is_constant:
        return "constant: the same for all rows of the call"
    if value.attends is not None:
        return "prefix-determined: attends to its own and earlier rows of its sequence"
    if value.is_pair:
        return "prefix-determined: one entry for each pair of query and key"
    causal = ", by an op that reads earlier rows" if value.full_only else ""
    return f"prefix-determined: one entry for each row{causal}"


def _rule(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):  # one of several results
        return _rule(node.args[0])
    rule = info_of(node.target).rule
    if rule is None:
        return "none: an op without a rule is assumed to mix rows"
    summary = (inspect.getdoc(rule) or "").splitlines()[:1]
    module = inspect.getmodule(rule)
    file = "" if module is None else module.__name__.removeprefix("radix_compile.").replace(".", "/") + ".py"
    return f"{getattr(rule, '__name__', 'rule')} ({file})" + (f": {summary[0]}" if summary else "")


def _reason(node: fx.Node, fold: Fold | None) -> str:
    mixed = next((value.mixed for value in values_of(node) if value.mixed is not None), None)
    if mixed is not None:
        return str(mixed) if mixed.node != node.name else mixed.reason
    attention = None if fold is None else fold.attentions.get(node)
    return attention.reason if isinstance(attention, Declined) else ""
