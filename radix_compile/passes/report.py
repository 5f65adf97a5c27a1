"""The report of one graph: which ops are folded, which are not, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from radix_compile.analysis.arguments import tensor_inputs
from radix_compile.analysis.attention.parts import TreeAttention, attention_steps, is_attention
from radix_compile.analysis.flops import flops
from radix_compile.analysis.tokens import Tokens
from radix_compile.ir.errors import Declined, RefusalCode
from radix_compile.ir.facts import RowMax
from radix_compile.ir.graph import Form, graph_facts, tokens_of
from radix_compile.ir.value import Refusal, module_of, source_line, values_of
from radix_compile.kernels.tree_attention import why_not_triton
from radix_compile.passes.fold import Fold, Wanted
from radix_compile.torch_internals import size_hint, val

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention of the captured graph.

    ``causal``     whether it is proved causal.
    ``status``     how it runs, in words, or why it is not proved causal.
    ``full_form``  why it does not run on the prefix tree, if it is proved causal.
    """

    causal: bool
    status: str
    module: str
    source: str
    full_form: str = ""


@dataclass(frozen=True)
class Region:
    """A connected part of the graph that runs once per node: its number of ops, and its first and last module."""

    ops: int
    first: str
    last: str


@dataclass
class GraphReport:
    """The report of one captured graph.

    ``folded``           whether it is folded; else ``reason`` says why not, and ``code`` is the kind of the reason.
    ``place``            the part that runs once per node: ``layers 0-27``, or a module if no layers are numbered.
    ``model``            the class of the outermost module.
    ``bytes_folded``     bytes of the tensors that are folded, in full form, at the captured shapes.
    ``bytes_scattered``  bytes of the tensors that are scattered, in full form, at the captured shapes.
    ``regions``          the parts that run once per node.
    ``every_row``        why all rows are computed; empty if only those are that results depend on.
    ``refusals``         the ops at which folding stops, if matrix products or attention follow.
    ``flops_compact``    FLOPs of matrix products that run once per node, at the captured shapes, without folding.
    ``flops_head``       FLOPs of those of them that run for rows alone that are read themselves, likewise.
    ``flops_tree``       FLOPs of attention that runs on the prefix tree, likewise.
    ``flops_full``       FLOPs of all other matrix products and attention, likewise.
    """

    folded: bool
    reason: str = ""
    code: RefusalCode | None = None
    place: str = ""
    model: str = ""
    bytes_folded: int = 0
    bytes_scattered: int = 0
    regions: list[Region] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    every_row: str = ""
    flops_compact: int = 0
    flops_head: int = 0
    flops_tree: int = 0
    flops_full: int = 0

    @property
    def remarks(self) -> list[str]:
        """Sentences about a folded graph for its user."""
        if not self.folded:
            return self.notes
        if self.every_row:
            return [f"every row is computed: {self.every_row}", *self.notes]
        return ["only rows that results depend on are computed", *self.notes]

    @property
    def foldable_share(self) -> float:
        total = self.flops_compact + self.flops_tree + self.flops_full
        return (self.flops_compact + self.flops_tree) / total if total else 0.0


def report_on(fold: Fold) -> GraphReport:
    """Return the report of a folded graph."""
    captured, wanted, tokens = fold.captured, fold.wanted, tokens_of(fold.captured)
    compact = {node for node, runs in wanted.runs.items() if Form.COMPACT in runs}
    report = GraphReport(folded=any(flops(node) for node in compact))
    for node in captured.graph.nodes:
        if node in compact and is_attention(node):
            report.flops_tree += sum(flops(step) for step in attention_steps(node))
        elif node in compact:
            report.flops_compact += flops(node)
            report.flops_head += flops(node) if node in fold.head else 0
        elif node.op == "call_function" and node in wanted.runs:
            report.flops_full += flops(node)
        attention = _attention(node, fold, on_tree=node in compact)
        if attention is not None:
            report.attentions.append(attention)
    report.regions = _regions(captured.graph, compact)
    report.model = graph_facts(captured).model
    report.bytes_folded, report.bytes_scattered = (_bytes_converted(wanted, form) for form in (Form.COMPACT, Form.FULL))
    report.place = _place([module_of(node) for node in captured.graph.nodes if node in compact and flops(node)])
    report.every_row = fold.every_row
    report.notes += [*fold.notes, *_notes_on_scans(tokens, wanted)]
    report.refusals = _refusals_that_matter(captured.graph, tokens)
    return report


def _bytes_converted(wanted: Wanted, form: Form) -> int:
    """Return the bytes of the values that are converted to ``form``: wanted in it, and computed in the other form."""
    runs = {node: wanted.runs.get(node, set()) if node.op == "call_function" else {Form.FULL} for node in wanted.forms}
    return sum(_bytes(node) for node, forms in wanted.forms.items() if form in forms and form not in runs[node])


def _bytes(node: fx.Node) -> int:
    tensor = val(node)
    return size_hint(tensor.numel()) * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


_NUMBERED = re.compile(r"(?:(?P<stack>\w+)\.)?(?P<number>\d+)(?=\.|$)")


def _place(modules: Sequence[str]) -> str:
    matches = [match for module in modules if (match := _NUMBERED.search(module))]
    if not matches:
        return next((module for module in modules if module), "graph")
    numbers = [int(match["number"]) for match in matches]
    first, last = min(numbers), max(numbers)
    return f"{matches[0]['stack'] or 'layers'} {first}" + (f"-{last}" if first != last else "")


def _notes_on_scans(tokens: Tokens, wanted: Wanted) -> list[str]:
    scans = [node for node in tokens.scans if Form.COMPACT in wanted.forms.get(node, ())]
    modules = dict.fromkeys(module_of(node) for node in scans)
    return [f"scan or convolution in {module}: proved causal; runs in full form" for module in modules]


def _attention(node: fx.Node, fold: Fold, on_tree: bool) -> Attention | None:
    if node.op != "call_function":
        return None
    value = values_of(node)[0]
    if isinstance(value.fact, RowMax):  # a step of an attention, not an attention
        return None
    if not is_attention(node) and node.target is not aten.scaled_dot_product_attention.default:
        return None
    place = module_of(node), source_line(node)
    if value.attends is not None:
        if on_tree:
            status = f"proved causal; runs on the prefix tree{_lowering(fold.tree_attention(node))}"
            return Attention(True, status, *place)
        declined = fold.attentions[node]
        assert isinstance(declined, Declined)
        status = f"proved causal; runs in full form: {declined.reason}"
        return Attention(True, status, *place, declined.reason)
    reason = value.mixed.reason if value.mixed is not None and value.mixed.node == node.name else "follows a refusal"
    return Attention(False, reason, *place)


def _lowering(attention: TreeAttention | None) -> str:
    assert attention is not None
    reason = why_not_triton(*attention.operands)
    return ", by Triton kernels" if reason is None else f", in tiles ({reason})"


def _refusals_that_matter(graph: fx.Graph, tokens: Tokens) -> list[Refusal]:
    """Return the refusals that matrix products or attention follow. (None follow picking the last output token.)

    Some results of a scan, such as its last state, are refused though the scan is proved causal. Such a refusal only
    matters to products with weights.
    """
    relevant: set[Refusal] = set()
    step_names = {step.name for step in tokens.steps}
    for node in graph.nodes:
        if node.op == "call_function" and flops(node) and node not in tokens.steps:
            refusals = {value.mixed for value in values_of(node) if value.mixed is not None}
            if not _has_weights(node):
                refusals = {refusal for refusal in refusals if refusal.node not in step_names}
            relevant |= refusals
    return [refusal for refusal in tokens.refusals if refusal in relevant]


def _has_weights(node: fx.Node) -> bool:
    return any(value.is_constant for arg in tensor_inputs(node) for value in values_of(arg))


def _regions(graph: fx.Graph, compact: set[fx.Node]) -> list[Region]:
    """Return the connected components of compact ops that have FLOPs."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in graph.nodes:
        if node in compact:
            leader[node] = node
            for arg in node.all_input_nodes:
                if arg in compact:
                    leader[find(arg)] = find(node)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        members.setdefault(find(node), []).append(node)
    members = {node: nodes for node, nodes in members.items() if any(flops(member) for member in nodes)}
    return [Region(len(nodes), module_of(nodes[0]), module_of(nodes[-1])) for nodes in members.values()]
