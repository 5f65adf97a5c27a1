"""Compile a model once, run it once, and say what the backend did to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.backend import RadixBackend
from radix_compile.inspection.diff import GraphDiff, GraphPair
from radix_compile.inspection.graph_view import GraphView, view_of
from radix_compile.ir.value import Refusal
from radix_compile.options import Options, RadixOptions
from radix_compile.passes.fold import Fold
from radix_compile.passes.report import GraphReport
from radix_compile.runtime.calibration import time_programs
from radix_compile.runtime.counters import reset_stats, restore_stats, stats
from radix_compile.runtime.dispatch import Choice, Program


@dataclass
class Explanation:
    """The findings of :func:`explain`. ``print`` them, or read the fields.

    ``graphs``          the report of each captured graph, in the order of compilation.
    ``tokens``          rows (sequences times columns) of the folded calls of this one run.
    ``compact_tokens``  nodes of the prefix tree, that is the rows the folded programs ran.
    ``pairs``           pairs of a query and a key of its sequence, where attention runs on the tree.
    ``tree_pairs``      pairs of a node and an ancestor, or itself, there.
    ``predicted``       seconds by program ("plain", "full fold", ...) for the inputs, if calls of about their size were
                        timed before, or with ``measure``.
    ``measured``        with ``measure``, seconds of the call as "plain" (the inner backend alone) and as "radix".
    ``graph_breaks``    how often Dynamo cut the model into pieces, by reason: what is between them is not in any graph.
    ``diff``            each graph before and after: ``diff.text()``, ``diff.html(path)``, ...
    """

    graphs: list[GraphReport] = field(default_factory=list)
    tokens: int = 0
    compact_tokens: int = 0
    pairs: int = 0
    tree_pairs: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    diff: GraphDiff = field(default_factory=lambda: GraphDiff(()))

    @property
    def folded(self) -> bool:
        """Did a folded program run?"""
        return self.compact_tokens > 0

    @property
    def regions(self) -> list[Any]:
        """The stretches that run once per node, over all graphs."""
        return [region for graph in self.graphs for region in graph.regions]

    @property
    def refusals(self) -> list[Refusal]:
        """Where folding stops and why, over all graphs."""
        return [refusal for graph in self.graphs for refusal in graph.refusals]

    @property
    def flops_before(self) -> int:
        """Floating-point operations of matrix products and attention in this run, as written."""
        return sum(graph.flops_compact + graph.flops_tree + graph.flops_full for graph in self.graphs)

    @property
    def flops_after(self) -> int:
        """The same with token-wise work done once per node, and attention on the tree once per ancestor of a node."""
        if not self.folded:
            return self.flops_before
        share = self.compact_tokens / self.tokens
        tree_share = self.tree_pairs / self.pairs if self.pairs else 1.0
        return sum(
            round(graph.flops_compact * share + graph.flops_tree * tree_share) + graph.flops_full
            if graph.folded
            else graph.flops_compact + graph.flops_tree + graph.flops_full
            for graph in self.graphs
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "folded": self.folded,
            "tokens": self.tokens,
            "compact_tokens": self.compact_tokens,
            "pairs": self.pairs,
            "tree_pairs": self.tree_pairs,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "predicted": self.predicted,
            "measured": self.measured,
            "graph_breaks": self.graph_breaks,
            "graphs": [asdict(graph) for graph in self.graphs],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        if self.folded:
            saved = f"{self.tokens} -> {self.compact_tokens} tokens ({self.tokens / self.compact_tokens:.2f}x)"
            lines = [f"folded: {saved}", f"FLOPs:  {self.flops_before:.3g} -> {self.flops_after:.3g}"]
        else:
            lines = ["nothing folded"]
        for what, seconds in (("predicted:", self.predicted), ("measured:", self.measured)):
            if seconds:
                lines.append(f"{what:10} " + ", ".join(f"{name} {1e3 * took:.3g} ms" for name, took in seconds.items()))
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        for number, graph in enumerate(self.graphs):
            lines.append(f"graph {number}: " + ("folded" if graph.folded else f"not folded: {graph.reason}"))
            lines += [f"  region: {region.ops} ops, {region.first} .. {region.last}" for region in graph.regions]
            for attention in graph.attentions:
                lines.append(f"  attention in {attention.module}: {attention.status}")
            lines += [f"  refused: {refusal}" for refusal in graph.refusals]
            lines += [f"  note: {note}" for note in graph.notes]
        return lines


class _Recording:
    """A ``torch.compile`` backend that is radix, and keeps what it hears of: a pair for each graph, and predictions."""

    __name__ = RadixBackend.__name__

    def __init__(self, options: Options, predict_as: Options | None) -> None:
        self.options, self.predict_as = options, predict_as
        self.pairs: list[GraphPair] = []
        self.predicted: dict[str, float] = {}
        self._backend = RadixBackend(listener=self)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
        self._recorder = Recorder()
        return self._backend.compile(gm, example_inputs, self.options, self._recorder, self.predict_as)

    def on_report(self, report: GraphReport) -> None:
        self.pairs.append(self._recorder.pair(report))

    def on_choice(self, report: GraphReport, choice: Choice) -> None:
        number = next(i for i, pair in enumerate(self.pairs) if pair.report is report)
        self.pairs[number] = self.pairs[number].of_call(choice.plan, choice.ids)
        for name, seconds in (choice.predicted or {}).items():  # summed over graphs
            self.predicted[name] = self.predicted.get(name, 0.0) + seconds


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: RadixOptions | None = None,
    measure: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Run ``model(*args, **kwargs)`` once through the backend, print what it did and return it.

    ``model`` is a module or a function, compiled or not; its weights and its own compiled code are left alone, except
    that, like ``torch._dynamo.explain``, this starts Dynamo afresh: what was compiled compiles again at its next call.
    The programs run uncompiled (``inner_backend="eager"``), and whatever is shared folds (``fold="always"``), unless
    ``options`` says otherwise. Gradient mode is the caller's. With ``measure``, the programs are compiled with
    ``options`` as they are and time is taken: of the call as it would be, and of the plain program.
    """
    explanation = look_at(model, args, kwargs, options, measure)
    print(explanation)
    return explanation


def graph_diff(model: Callable[..., Any], *args: Any, options: RadixOptions | None = None, **kwargs: Any) -> GraphDiff:
    """Run ``model(*args, **kwargs)`` once through the backend, as :func:`explain` does, and return what it rewrote.

    Of the graphs before and after there is ``text()``, ``html(path)`` and ``to_dict()``.
    """
    return look_at(model, args, kwargs, options).diff


def look_at(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: RadixOptions | None = None,
    measure: bool = False,
) -> Explanation:
    """The explanation that :func:`explain` prints."""
    model = getattr(model, "_orig_mod", model)
    given = Options().updated(options)
    if measure:
        recording = _Recording(given, predict_as=None)
    else:
        recording = _Recording(Options(inner_backend="eager", fold="always").updated(options), predict_as=given)
    torch.compiler.reset()
    internals.forget_graph_breaks()
    before = stats()
    reset_stats()
    try:
        compiled = torch.compile(model, backend=recording)
        compiled(*args, **kwargs)
        counted, predicted = stats(), dict(recording.predicted)
        breaks = internals.graph_breaks()
        measured = _measured(model, compiled, given, args, kwargs) if measure else {}
    finally:
        restore_stats(before)
        torch.compiler.reset()
    pairs = counted.pairs, counted.tree_pairs
    diff = GraphDiff(tuple(recording.pairs), getattr(model, "__name__", type(model).__name__))
    graphs = [pair.report for pair in recording.pairs]
    return Explanation(graphs, counted.tokens, counted.compact_tokens, *pairs, predicted, measured, breaks, diff)


def _measured(
    model: Callable[..., Any], compiled: Callable[..., Any], options: Options, args: Any, kwargs: Any
) -> dict[str, float]:
    """The call plain and as it is, whole, after warming up."""
    plain = torch.compile(model, backend=options.inner_backend, options=dict(options.inner_options) or None)
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    runs = {"plain": lambda: plain(*args, **kwargs), "radix": lambda: compiled(*args, **kwargs)}
    return time_programs(runs, device)


@dataclass
class Recorder:
    """Keeps the graph as it is behind each pass: an observer of the pipeline, for one captured graph."""

    steps: list[GraphView] = field(default_factory=list)
    annotated: GraphView | None = None

    def __call__(self, after: str, gm: fx.GraphModule, fold: Fold | None = None) -> None:
        if any(step.after == after for step in self.steps):
            return  # of another program of the same graph
        self.steps.append(view_of(gm, after, fold))
        if self.annotated is None and fold is not None and gm is not fold.captured:
            self.annotated = view_of(fold.captured, after, fold)

    def pair(self, report: GraphReport) -> GraphPair:
        """As captured, with what was found out about it since, and as it is now."""
        if not self.steps:  # it could not be captured
            nothing = GraphView("capture", ())
            return GraphPair(report, (), nothing, nothing)
        known = {node.name: node for node in (self.annotated or self.steps[-1]).nodes}
        captured = self.steps[0]
        nodes = tuple(replace(known.get(node.name, node), inputs=node.inputs) for node in captured.nodes)
        if not report.folded:  # in which form it would have run is no longer true
            nodes = tuple(replace(node, form="") for node in nodes)
        before = GraphView("capture", nodes)
        return GraphPair(report, tuple(self.steps), before, self.steps[-1] if report.folded else before)
