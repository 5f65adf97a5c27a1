"""``explain()``: compile a model, run it once, and report what the backend did to its graphs."""

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
    """The result of :func:`explain`. ``print`` it, or read its fields.

    ``graphs``          the report of each captured graph, in the order of compilation.
    ``tokens``          rows (sequences times columns) of the folded calls in this run.
    ``read_tokens``     those that results depend on.
    ``compact_tokens``  nodes of the prefix tree: the rows that the folded programs computed.
    ``head_tokens``     those of them for which ops behind the last attention run.
    ``pairs``           pairs of a query and a key of its sequence, in calls with attention on the prefix tree.
    ``tree_pairs``      pairs of a node and an ancestor (or itself) that attention on the prefix tree computes.
    ``predicted``       predicted seconds by program ("plain", "full fold", ...). Empty unless calls of about this size
                        were timed before, or ``measure`` is set.
    ``measured``        with ``measure``, the seconds of the call: "plain" (the inner backend alone) and "radix".
    ``graph_breaks``    the number of graph breaks by reason. Code between the pieces is in no graph.
    ``diff``            each graph before and after: ``diff.text()``, ``diff.html(path)``, ...
    """

    graphs: list[GraphReport] = field(default_factory=list)
    tokens: int = 0
    read_tokens: int = 0
    compact_tokens: int = 0
    head_tokens: int = 0
    pairs: int = 0
    tree_pairs: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    diff: GraphDiff = field(default_factory=lambda: GraphDiff(()))

    @property
    def folded(self) -> bool:
        """Whether a folded program ran."""
        return self.compact_tokens > 0

    @property
    def regions(self) -> list[Any]:
        """The parts of all graphs that run once per node."""
        return [region for graph in self.graphs for region in graph.regions]

    @property
    def refusals(self) -> list[Refusal]:
        """The ops of all graphs at which folding stops, with the reasons."""
        return [refusal for graph in self.graphs for refusal in graph.refusals]

    @property
    def flops_before(self) -> int:
        """FLOPs of the matrix products and attention of this run without folding."""
        return sum(graph.flops_compact + graph.flops_tree + graph.flops_full for graph in self.graphs)

    @property
    def flops_after(self) -> int:
        """FLOPs of the matrix products and attention of this run, folded where it folds."""
        if not self.folded:
            return self.flops_before
        node_share, head_share = self.compact_tokens / self.tokens, self.head_tokens / self.tokens
        pair_share = self.tree_pairs / self.pairs if self.pairs else 1.0
        return sum(
            round(
                (graph.flops_compact - graph.flops_head) * node_share
                + graph.flops_head * head_share
                + graph.flops_tree * pair_share
            )
            + graph.flops_full
            if graph.folded
            else graph.flops_compact + graph.flops_tree + graph.flops_full
            for graph in self.graphs
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as data that ``json`` can write."""
        return {
            "folded": self.folded,
            "tokens": self.tokens,
            "read_tokens": self.read_tokens,
            "compact_tokens": self.compact_tokens,
            "head_tokens": self.head_tokens,
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
            tokens = f"{self.tokens} -> {self.compact_tokens} tokens ({self.tokens / self.compact_tokens:.2f}x)"
            read = f", {self.read_tokens} are read" if self.read_tokens < self.tokens else ""
            lines = [f"folded: {tokens}{read}", f"FLOPs:  {self.flops_before:.3g} -> {self.flops_after:.3g}"]
        else:
            lines = ["nothing folded"]
        for label, times in (("predicted:", self.predicted), ("measured:", self.measured)):
            if times:
                listed = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.items())
                lines.append(f"{label:10} {listed}")
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        for number, graph in enumerate(self.graphs):
            lines.append(f"graph {number}: " + ("folded" if graph.folded else f"not folded: {graph.reason}"))
            lines += [f"  region: {region.ops} ops, {region.first} .. {region.last}" for region in graph.regions]
            for attention in graph.attentions:
                lines.append(f"  attention in {attention.module or 'the model'}: {attention.status}")
            lines += [f"  refused: {refusal}" for refusal in graph.refusals]
            lines += [f"  note: {note}" for note in graph.remarks]
        return lines


class _RecordingBackend:
    """The radix backend for ``torch.compile``, which also records each graph before and after, and the predictions."""

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
        self.pairs[number] = self.pairs[number].with_call(choice.plan, choice.ids)
        for name, seconds in (choice.predicted or {}).items():  # summed over graphs
            self.predicted[name] = self.predicted.get(name, 0.0) + seconds


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: RadixOptions | None = None,
    measure: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Run ``model(*args, **kwargs)`` once through the backend, print the explanation and return it.

    ``model`` is a module or a function, compiled or not. Its weights are not changed. Like ``torch._dynamo.explain``,
    this resets Dynamo: functions that were compiled before are compiled again at their next call.

    Unless ``options`` says otherwise, the programs run uncompiled (``inner_backend="eager"``), and every call that can
    fold does (``fold="always"``). With ``measure``, the programs are compiled with ``options`` as given, and the call
    and the plain program are timed. The call runs in the caller's gradient mode.
    """
    explanation = explanation_of(model, args, kwargs, options, measure)
    print(explanation)
    return explanation


def graph_diff(model: Callable[..., Any], *args: Any, options: RadixOptions | None = None, **kwargs: Any) -> GraphDiff:
    """Run ``model(*args, **kwargs)`` once, as :func:`explain` does, and return each graph before and after.

    The result has ``text()``, ``html(path)`` and ``to_dict()``.
    """
    return explanation_of(model, args, kwargs, options).diff


def explanation_of(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: RadixOptions | None = None,
    measure: bool = False,
) -> Explanation:
    """Return the explanation that :func:`explain` prints."""
    model = getattr(model, "_orig_mod", model)
    user_options = Options().updated(options)
    if measure:
        backend = _RecordingBackend(user_options, predict_as=None)
    else:
        run_options = Options(inner_backend="eager", fold="always").updated(options)
        backend = _RecordingBackend(run_options, predict_as=user_options)
    torch.compiler.reset()
    internals.forget_graph_breaks()
    stats_before = stats()
    reset_stats()
    try:
        compiled = torch.compile(model, backend=backend)
        compiled(*args, **kwargs)
        counted, predicted = stats(), dict(backend.predicted)
        breaks = internals.graph_breaks()
        measured = _measure(model, compiled, user_options, args, kwargs) if measure else {}
    finally:
        restore_stats(stats_before)
        torch.compiler.reset()
    pairs = counted.pairs, counted.tree_pairs
    diff = GraphDiff(tuple(backend.pairs), getattr(model, "__name__", type(model).__name__))
    graphs = [pair.report for pair in backend.pairs]
    return Explanation(
        graphs,
        counted.tokens,
        counted.read_tokens,
        counted.compact_tokens,
        counted.head_tokens,
        *pairs,
        predicted,
        measured,
        breaks,
        diff,
    )


def _measure(
    model: Callable[..., Any], compiled: Callable[..., Any], options: Options, args: Any, kwargs: Any
) -> dict[str, float]:
    """Return the seconds of a whole call, warmed up, of the inner backend alone and of radix."""
    plain = torch.compile(model, backend=options.inner_backend, options=dict(options.inner_options) or None)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    runs = {"plain": lambda: plain(*args, **kwargs), "radix": lambda: compiled(*args, **kwargs)}
    return time_programs(runs, device)


@dataclass
class Recorder:
    """An observer of the pipeline that keeps a view of one captured graph after each pass."""

    steps: list[GraphView] = field(default_factory=list)
    annotated: GraphView | None = None

    def __call__(self, after: str, gm: fx.GraphModule, fold: Fold | None = None) -> None:
        if any(step.after == after for step in self.steps):
            return  # the passes run again for the other folded program of this graph
        self.steps.append(view_of(gm, after, fold))
        if self.annotated is None and fold is not None and gm is not fold.captured:
            self.annotated = view_of(fold.captured, after, fold)

    def pair(self, report: GraphReport) -> GraphPair:
        """Return the captured graph, annotated with the results of the analyses, and the final graph."""
        if not self.steps:  # the graph could not be captured
            empty = GraphView("capture", ())
            return GraphPair(report, (), empty, empty)
        annotated = {node.name: node for node in (self.annotated or self.steps[-1]).nodes}
        captured = self.steps[0]
        nodes = tuple(replace(annotated.get(node.name, node), inputs=node.inputs) for node in captured.nodes)
        if not report.folded:  # the forms that were chosen do not apply
            nodes = tuple(replace(node, form="") for node in nodes)
        before = GraphView("capture", nodes)
        return GraphPair(report, tuple(self.steps), before, self.steps[-1] if report.folded else before)
