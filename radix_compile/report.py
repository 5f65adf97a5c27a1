"""What was folded, what was not and why: per graph, and over the calls of a process."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx

from radix_compile.attention.parts import attention_steps, compact_attention, is_attention
from radix_compile.cost import flops
from radix_compile.kernels.tree_attention import why_tiles
from radix_compile.mask_facts import RowMax
from radix_compile.op_rules.table import tensor_inputs
from radix_compile.passes.choose_cuts import Form
from radix_compile.passes.fold_graph import Wanted
from radix_compile.passes.mark_token_axes import Tokens
from radix_compile.token_axes import Refusal, refuse, values_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention: ``causal`` if it was proved so; ``status`` in words; where it is; and if it was proved causal and
    does not run on the prefix tree, why not (``full_form``).
    """

    causal: bool
    status: str
    module: str
    source: str
    full_form: str = ""


@dataclass(frozen=True)
class Region:
    """A stretch of the graph that runs once per node: how many ops, and from which module to which."""

    ops: int
    first: str
    last: str


@dataclass
class GraphReport:
    """One captured graph. FLOPs are those of matrix products and attention as written, at the captured shapes.

    ``flops_compact`` is of what runs once per node, ``flops_tree`` of attention on the tree, ``flops_full`` the rest.
    """

    folded: bool
    reason: str = ""
    regions: list[Region] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    flops_compact: int = 0
    flops_tree: int = 0
    flops_full: int = 0

    @property
    def foldable_share(self) -> float:
        total = self.flops_compact + self.flops_tree + self.flops_full
        return (self.flops_compact + self.flops_tree) / total if total else 0.0


def report_on(captured: fx.GraphModule) -> GraphReport:
    """The report of a graph that has been through the pipeline."""
    tokens: Tokens = captured.meta["tokens"]
    wanted: Wanted = captured.meta["wanted"]
    compact = {node for node, runs in wanted.runs.items() if Form.COMPACT in runs}
    report = GraphReport(folded=any(flops(node) for node in compact))
    for node in captured.graph.nodes:
        if node in compact and is_attention(node):
            report.flops_tree += sum(flops(step) for step in attention_steps(node))
        elif node in compact:
            report.flops_compact += flops(node)
        elif node.op == "call_function" and node in wanted.runs:
            report.flops_full += flops(node)
        attention = _attention(node, on_tree=node in compact)
        if attention is not None:
            report.attentions.append(attention)
    report.regions = _regions(captured.graph, compact)
    report.notes += [*captured.meta.get("notes", []), *_scans(tokens, wanted)]
    report.refusals = _that_matter(captured.graph, tokens)
    return report


def _scans(tokens: Tokens, wanted: Wanted) -> list[str]:
    followed = [node for node in tokens.scans if Form.COMPACT in wanted.forms.get(node, ())]
    modules = dict.fromkeys(refuse(node, "").module for node in followed)
    return [f"scan or convolution in {module}: proved causal; runs in full form" for module in modules]


def _attention(node: fx.Node, on_tree: bool) -> Attention | None:
    if node.op != "call_function":
        return None
    value = values_of(node)[0]
    if isinstance(value.fact, RowMax):  # a step of attention written out
        return None
    if not is_attention(node) and node.target is not aten.scaled_dot_product_attention.default:
        return None
    place = refuse(node, "")
    if value.attends is not None:
        if on_tree:
            status = f"proved causal; runs on the prefix tree{_lowering(node)}"
            return Attention(True, status, place.module, place.source)
        why: str = node.meta["attention"]
        return Attention(True, f"proved causal; runs in full form: {why}", place.module, place.source, why)
    reason = value.mixed.reason if value.mixed is not None and value.mixed.node == node.name else "follows a refusal"
    return Attention(False, reason, place.module, place.source)


def _lowering(node: fx.Node) -> str:
    found = compact_attention(node)
    assert found is not None
    why = why_tiles(*found.operands)
    return ", by Triton kernels" if why is None else f", in tiles ({why})"


def _that_matter(graph: fx.Graph, tokens: Tokens) -> list[Refusal]:
    """Refusals with arithmetic behind them. (Picking the last token of a finished output is one without.)

    A scan is not all proved causal: its last state is not. Of what it refuses, only products with weights matter.
    """
    blamed: set[Refusal] = set()
    scanned = {step.name for step in tokens.steps}
    for node in graph.nodes:
        if node.op == "call_function" and flops(node) and node not in tokens.steps:
            refusals = {value.mixed for value in values_of(node) if value.mixed is not None}
            if not _has_weights(node):
                refusals = {refusal for refusal in refusals if refusal.node not in scanned}
            blamed |= refusals
    return [refusal for refusal in tokens.refusals if refusal in blamed]


def _has_weights(node: fx.Node) -> bool:
    return any(value.is_constant for arg in tensor_inputs(node) for value in values_of(arg))


def _regions(graph: fx.Graph, compact: set[fx.Node]) -> list[Region]:
    """Connected stretches of compact ops with arithmetic in them."""
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
    return [Region(len(nodes), refuse(nodes[0], "").module, refuse(nodes[-1], "").module) for nodes in members.values()]


# -------------------------------------------------------------------------------------------------------- calls


@dataclass
class Stats:
    """Counts since the start of the process or :func:`reset_stats`.

    ``calls``, ``folded_calls``    calls of graphs that can fold, and those that did.
    ``tokens``, ``compact_tokens`` rows and nodes, summed over folded calls.
    ``pairs``, ``tree_pairs``      pairs of a query and a key of its sequence, and of a node and an ancestor or itself,
                                   summed over folded calls with attention on the tree.
    ``plain_calls``                calls by the reason that they ran plain.
    ``graphs``                     graphs handed to the backend.
    ``plain_compiles``, ``folded_compiles``  programs handed to the inner backend.
    ``plan_seconds``               time spent making plans, and timing programs.
    ``timed_calls``                calls on whose inputs programs were timed.
    """

    calls: int = 0
    folded_calls: int = 0
    tokens: int = 0
    compact_tokens: int = 0
    pairs: int = 0
    tree_pairs: int = 0
    plain_calls: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    plain_compiles: int = 0
    folded_compiles: int = 0
    plan_seconds: float = 0.0
    timed_calls: int = 0

    @property
    def compression(self) -> float:
        """Compact tokens / tokens over folded calls; 1.0 if there were none."""
        return self.compact_tokens / self.tokens if self.tokens else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Counters:
    """The process-wide statistics: the backend's programs may be called from several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stats = Stats()

    def add(self, **counts: float) -> None:
        with self.lock:
            for name, count in counts.items():
                setattr(self.stats, name, getattr(self.stats, name) + count)

    def ran_plain(self, reason: str) -> None:
        with self.lock:
            self.stats.calls += 1
            self.stats.plain_calls[reason] = self.stats.plain_calls.get(reason, 0) + 1


COUNTERS = _Counters()


def stats() -> Stats:
    """A copy of the counts since :func:`reset_stats`."""
    with COUNTERS.lock:
        return Stats(**COUNTERS.stats.to_dict())


def reset_stats() -> None:
    """Set every count to zero."""
    with COUNTERS.lock:
        COUNTERS.stats = Stats()


def restore_stats(saved: Stats) -> None:
    """Put back counts that :func:`stats` returned."""
    with COUNTERS.lock:
        COUNTERS.stats = saved
