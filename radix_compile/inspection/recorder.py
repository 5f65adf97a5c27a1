"""Graphs between passes, kept as they were."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from radix_compile.inspection.diff import GraphPair
from radix_compile.inspection.graph_view import GraphView, view_of
from radix_compile.report import GraphReport


@dataclass
class Recorder:
    """Keeps the graph as it is behind each pass: an observer of the pipeline, for one captured graph."""

    steps: list[GraphView] = field(default_factory=list)
    annotated: GraphView | None = None

    def __call__(self, after: str, gm: fx.GraphModule) -> None:
        if any(step.after == after for step in self.steps):
            return  # of another program of the same graph
        self.steps.append(view_of(gm, after))
        if self.annotated is None and "source" in gm.meta:
            self.annotated = view_of(gm.meta["source"], after)

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
