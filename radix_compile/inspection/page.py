"""A self-contained HTML page with both graphs side by side."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from radix_compile.inspection.advice import advice_on, advice_on_graph
from radix_compile.inspection.graph_view import NodeView
from radix_compile.inspection.lines import Block, Line
from radix_compile.inspection.text import heading, short

if TYPE_CHECKING:
    from radix_compile.inspection.diff import GraphDiff, GraphPair


def page(diff: GraphDiff) -> str:
    """Return the page, including its style, code and data."""
    assets = files("radix_compile.inspection") / "assets"
    parts = {
        "title": escape(diff.title),
        "style": (assets / "page.css").read_text(encoding="utf-8"),
        "data": _json(_data(diff)),
        "code": "\n".join((assets / name).read_text(encoding="utf-8") for name in ("graph.js", "tree.js", "page.js")),
    }
    template = (assets / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], template)


def _json(data: Any) -> str:
    """Return JSON for a ``script`` element. ``<`` is escaped, so that the data cannot close the element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


class _Strings:
    """A table of strings. The page has each string once, since many nodes have equal fields."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


FIELDS = ("op", "arguments", "shape", "dtype", "form", "module", "source", "value", "rule", "reason", "origin")
"""The text fields of a node, in the order of the page's data."""


def _data(diff: GraphDiff) -> dict[str, Any]:
    strings = _Strings()
    graphs = [_graph(number, pair, diff.layer, strings) for number, pair in enumerate(diff.pairs)]
    return {"title": diff.title, "fields": FIELDS, "graphs": graphs, "strings": list(strings.numbers)}


def _graph(number: int, pair: GraphPair, layer: int | None, strings: _Strings) -> dict[str, Any]:
    places = [{node.name: i for i, node in enumerate(view.nodes)} for view in (pair.before, pair.after)]
    report = pair.report
    return {
        "heading": heading(number, pair),
        "folded": report.folded,
        "advice": advice_on_graph(report),
        "rows": pair.rows,
        "nodes": pair.nodes,
        "moved": pair.moved,
        "before": [_node(node, places[0], pair.nodes, strings) for node in pair.before.nodes],
        "after": [_node(node, places[1], pair.nodes, strings) for node in pair.after.nodes],
        "blocks": [_block(block, places) for block in pair.blocks(layer)],
        "attentions": [{**asdict(attention), "source": short(attention.source)} for attention in report.attentions],
        "refusals": [
            {**asdict(refusal), "source": short(refusal.source), "advice": advice_on(refusal.code)}
            for refusal in report.refusals
        ],
        "notes": report.remarks,
        "tree": [[edge.start, edge.stop, edge.first, edge.count] for edge in pair.edges],
        "ids": pair.edge_ids,
    }


def _node(node: NodeView, places: dict[str, int], nodes: int, strings: _Strings) -> list[Any]:
    """Return ``[name, inputs, bytes, bytes moved, *FIELDS]``, with numbers of strings for the fields."""
    inputs = [places[name] for name in node.inputs if name in places]
    node = replace(node, source=short(node.source))
    return [node.name, inputs, node.size(nodes), node.moved(nodes), *(strings(getattr(node, name)) for name in FIELDS)]


def _block(block: Block, places: list[dict[str, int]]) -> dict[str, Any]:
    return {
        "title": block.title,
        "numbers": block.numbers,
        "layers": [[_line(line, places) for line in layer] for layer in block.layers],
    }


def _line(line: Line, places: list[dict[str, int]]) -> list[Any]:
    """Return ``[kind, index of the node before, index of the node after]``; -1 if there is none."""
    sides = zip((line.before, line.after), places, strict=True)
    return [line.kind.value, *(-1 if node is None else side_places[node.name] for node, side_places in sides)]
