"""A model's captured graphs before and after folding, for text, pages and JSON."""

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

MAX_EDGE_IDS = 24
"""The number of token ids that are kept of each edge."""


@dataclass(frozen=True)
class GraphPair:
    """One captured graph before and after the passes.

    ``steps``     the graph after each pass; the first is the captured graph.
    ``rows``      the rows of the recorded call; 0 if the call was not planned.
    ``nodes``     the nodes of the prefix tree of that call.
    ``edges``     the edges of that tree.
    ``edge_ids``  the first token ids of each edge.
    """

    report: GraphReport
    steps: tuple[GraphView, ...]
    before: GraphView
    after: GraphView
    rows: int = 0
    nodes: int = 0
    edges: tuple[Edge, ...] = ()
    edge_ids: tuple[tuple[int, ...], ...] = ()

    def with_call(self, plan: PrefixPlan, ids: torch.Tensor) -> GraphPair:
        """Return this pair with the prefix tree of a call."""
        edges = tuple(edges_of(plan))
        flat_ids = ids.flatten().tolist() if ids.dtype == torch.int64 else []
        starts = (int(plan.bounds[plan.order[edge.first]]) for edge in edges)
        edge_ids = tuple(
            tuple(flat_ids[start + edge.start : start + min(edge.stop, edge.start + MAX_EDGE_IDS)])
            for start, edge in zip(starts, edges, strict=True)
        )
        return replace(self, rows=len(plan.scatter), nodes=plan.compact_tokens, edges=edges, edge_ids=edge_ids)

    def across(self, name: str) -> GraphPair:
        """Return the graph before and after the pass ``name``. Raises ``KeyError`` if it did not run on this graph."""
        names = [step.after for step in self.steps]
        if name not in names[1:]:
            raise KeyError(name)
        index = names.index(name)
        return replace(self, before=self.steps[index - 1], after=self.steps[index])

    def blocks(self, layer: int | None = None) -> list[Block]:
        """Return the lines of both graphs by layer, or only those of the layer ``layer``."""
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
        """Bytes that folds and scatters read and write in the recorded call."""
        return sum(node.moved(self.nodes) for node in self.after.nodes)


@dataclass(frozen=True, repr=False)
class GraphDiff:
    """The changes that the passes made to each captured graph of a model, as text, a page or data.

    A notebook displays it as the page. If a graph was not folded, both sides are equal and its report has the reason.
    """

    pairs: tuple[GraphPair, ...]
    title: str = "model"
    layer: int | None = None

    def across(self, name: str) -> GraphDiff:
        """Return the changes of one pass, such as ``"fold_graph"``. Raises ``ValueError`` if no such pass ran."""
        passes = list(dict.fromkeys(step.after for pair in self.pairs for step in pair.steps[1:]))
        if name not in passes:
            raise ValueError(f"no pass {name!r} ran here; the passes that ran: {', '.join(passes) or 'none'}")
        pairs = (pair for pair in self.pairs if any(step.after == name for step in pair.steps[1:]))
        return replace(self, pairs=tuple(pair.across(name) for pair in pairs), title=f"{self.title}, {name}")

    def of_layer(self, number: int) -> GraphDiff:
        """Return the changes in the layers of this number. Raises ``ValueError`` if there are none."""
        numbers = sorted({layer for pair in self.pairs for block in pair.blocks() for layer in block.numbers})
        if number not in numbers:
            layers = f"the layers are {numbers[0]} to {numbers[-1]}" if numbers else "there are no numbered layers"
            raise ValueError(f"there is no layer {number}; {layers}")
        return replace(self, layer=number, title=f"{self.title}, layer {number}")

    def text(self) -> str:
        """Return the diff as text: a line for each node, and equal layers once."""
        from radix_compile.inspection.text import text

        return text(self)

    def html(self, path: str | Path | None = None) -> str:
        """Return a self-contained HTML page, and write it to ``path`` if given."""
        from radix_compile.inspection.page import page

        content = page(self)
        if path is not None:
            Path(path).write_text(content, encoding="utf-8")
        return content

    def to_dict(self) -> dict[str, Any]:
        """Return the diff as data that ``json`` can write."""
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
        labels = {Kind.COMPACT: "run once per node", Kind.ADDED: "added", Kind.REMOVED: "removed"}
        return f"<GraphDiff of {self.title}: {', '.join(f'{counts[kind]} {label}' for kind, label in labels.items())}>"

    def _repr_html_(self) -> str:
        """Return the page in an iframe, so that its style and the notebook's do not mix."""
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
