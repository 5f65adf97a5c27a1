"""A model's graphs before and after, and how to show them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch

from radix_compile.inspection.graph_view import GraphView, NodeView
from radix_compile.inspection.lines import Block, Kind, blocks_of, lines_of
from radix_compile.inspection.prefix_tree import Edge, edges_of
from radix_compile.passes.report import GraphReport
from radix_compile.plan.prefix_plan import PrefixPlan

LABEL = 24
"""So many token ids of an edge are kept."""


@dataclass(frozen=True)
class GraphPair:
    """One captured graph, before and after.

    ``steps``  the graph behind each pass; the first is as it was captured.
    ``rows``   and ``nodes`` of the prefix tree, in the call that was looked at; 0 if it was not planned.
    ``edges``  of the prefix tree of that call, and the token ids at their beginnings.
    """

    report: GraphReport
    steps: tuple[GraphView, ...]
    before: GraphView
    after: GraphView
    rows: int = 0
    nodes: int = 0
    edges: tuple[Edge, ...] = ()
    edge_ids: tuple[tuple[int, ...], ...] = ()

    def of_call(self, plan: PrefixPlan, ids: torch.Tensor) -> GraphPair:
        """With the prefix tree of a call."""
        edges = tuple(edges_of(plan))
        flat = ids.flatten().tolist() if ids.dtype == torch.int64 else []
        starts = (int(plan.bounds[plan.order[edge.first]]) for edge in edges)
        first = [
            flat[start + edge.start : start + min(edge.stop, edge.start + LABEL)]
            for start, edge in zip(starts, edges, strict=True)
        ]
        return replace(
            self, rows=plan.tokens, nodes=plan.compact_tokens, edges=edges, edge_ids=tuple(map(tuple, first))
        )

    def across(self, name: str) -> GraphPair:
        """Only what the pass of that name did. Raises ``KeyError`` if it did not run on this graph."""
        names = [step.after for step in self.steps]
        if name not in names[1:]:
            raise KeyError(name)
        at = names.index(name)
        return replace(self, before=self.steps[at - 1], after=self.steps[at])

    def blocks(self, layer: int | None = None) -> list[Block]:
        """The lines of both graphs by layer; of one layer only, if it is given."""
        blocks = blocks_of(lines_of(self.before, self.after))
        if layer is None:
            return blocks
        return [
            Block(block.stack, (layer,), (block.layers[block.numbers.index(layer)],))
            for block in blocks
            if layer in block.numbers
        ]

    @property
    def moved(self) -> int:
        """Bytes that go from one form to the other, read and written, in the call that was looked at."""
        return sum(node.moved(self.nodes) for node in self.after.nodes)


@dataclass(frozen=True, repr=False)
class GraphDiff:
    """The changes that the passes made to each captured graph of a model, as text, a page or data.

    In a notebook it shows itself. Where a graph was left alone, both sides are the same, and its report says why.
    """

    pairs: tuple[GraphPair, ...]
    title: str = "model"
    layer: int | None = None

    def across(self, name: str) -> GraphDiff:
        """Only what one pass did, ``"fold_graph"`` for example. Raises ``ValueError`` if there is no such pass."""
        ran = list(dict.fromkeys(step.after for pair in self.pairs for step in pair.steps[1:]))
        if name not in ran:
            raise ValueError(f"no pass {name!r} ran here; those that did are {', '.join(ran) or 'none'}")
        pairs = (pair for pair in self.pairs if any(step.after == name for step in pair.steps[1:]))
        return replace(self, pairs=tuple(pair.across(name) for pair in pairs), title=f"{self.title}, {name}")

    def of_layer(self, number: int) -> GraphDiff:
        """Only the layers of that number. Raises ``ValueError`` if there are none."""
        numbers = sorted({one for pair in self.pairs for block in pair.blocks() for one in block.numbers})
        if number not in numbers:
            there = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
            raise ValueError(f"there is no layer {number}; the layers are {there}")
        return replace(self, layer=number, title=f"{self.title}, layer {number}")

    def text(self) -> str:
        """A diff to read: a line for each node, equal layers once."""
        from radix_compile.inspection.text import text

        return text(self)

    def html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else, also written to ``path`` if that is given."""
        from radix_compile.inspection.page import page

        content = page(self)
        if path is not None:
            Path(path).write_text(content, encoding="utf-8")
        return content

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "title": self.title,
            "graphs": [
                {
                    "report": asdict(pair.report),
                    "rows": pair.rows,
                    "nodes": pair.nodes,
                    "bytes_moved": pair.moved,
                    "passes": [step.after for step in pair.steps[1:]],
                    "blocks": [_block(block) for block in pair.blocks(self.layer)],
                    "tree": [asdict(edge) for edge in pair.edges],
                }
                for pair in self.pairs
            ],
        }

    def __repr__(self) -> str:
        counts = Counter(line.kind for pair in self.pairs for line in lines_of(pair.before, pair.after))
        what = {Kind.COMPACT: "run once per node", Kind.ADDED: "added", Kind.REMOVED: "gone"}
        return f"<GraphDiff of {self.title}: {', '.join(f'{counts[kind]} {words}' for kind, words in what.items())}>"

    def _repr_html_(self) -> str:
        """In a frame of its own, so that neither page changes how the other looks."""
        return (
            f'<iframe srcdoc="{escape(self.html())}" style="width:100%;height:640px;border:1px solid #8884"></iframe>'
        )


def _block(block: Block) -> dict[str, Any]:
    lines = [
        {"kind": line.kind.name.lower(), "before": _node(line.before), "after": _node(line.after)}
        for line in block.lines
    ]
    return {"title": block.title, "layers": list(block.numbers), "lines": lines}


def _node(node: NodeView | None) -> dict[str, Any] | None:
    return None if node is None else asdict(node)
